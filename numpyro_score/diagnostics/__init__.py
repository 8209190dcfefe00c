"""What ArviZ needs to know about a fit."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.de_bruijn import DeBruijn, de_bruijn
from numpyro_score.diagnostics.entropy import ScoreEntropy, entropy_from_scores

__all__ = [
    "Audit",
    "AuditRow",
    "DeBruijn",
    "ScoreEntropy",
    "audit",
    "de_bruijn",
    "entropy_from_scores",
    "to_arviz",
]
