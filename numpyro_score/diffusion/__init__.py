"""Diffusions: noise levels become samplers, likelihoods and posteriors."""

from numpyro_score.diffusion.preconditioning import preconditioned_energy, preconditioned_score
from numpyro_score.diffusion.sde import EDM, SDE, VE, VP, LinearSDE, SubVP

__all__ = ["EDM", "SDE", "VE", "VP", "LinearSDE", "SubVP", "preconditioned_energy", "preconditioned_score"]
