"""Markov chain kernels."""

from numpyro_score.kernels.langevin import Chains, ChainState, langevin_chains, mala_chains

__all__ = ["ChainState", "Chains", "langevin_chains", "mala_chains"]
