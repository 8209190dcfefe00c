"""What ArviZ needs to know about a fit."""

from numpyro_score.diagnostics.arviz import to_arviz

__all__ = ["to_arviz"]
