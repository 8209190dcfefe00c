"""Diffusions: noise levels become samplers, likelihoods and posteriors."""

from numpyro_score.diffusion.sde import EDM, SDE, VE, VP, LinearSDE, SubVP

__all__ = ["EDM", "SDE", "VE", "VP", "LinearSDE", "SubVP"]
