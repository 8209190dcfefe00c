"""Langevin and discrete kernels for `numpyro.infer.MCMC`, and their transitions as pure functions of many chains."""

from numpyro_score.kernels.base import KernelState
from numpyro_score.kernels.discrete import DiscreteKernel, DiscreteLangevin, Gibbs, GibbsWithGradients
from numpyro_score.kernels.langevin import (
    Chains,
    ChainState,
    MomentumState,
    langevin_chains,
    mala_chains,
    sghmc_chains,
)
from numpyro_score.kernels.lattice import (
    Lattice,
    LatticeState,
    discrete_langevin_chains,
    gibbs_chains,
    gibbs_with_gradients_chains,
)
from numpyro_score.kernels.samplers import MALA, SGHMC, SGLD
from numpyro_score.kernels.schedules import cyclical_schedule, polynomial_schedule

__all__ = [
    "MALA",
    "SGHMC",
    "SGLD",
    "ChainState",
    "Chains",
    "DiscreteKernel",
    "DiscreteLangevin",
    "Gibbs",
    "GibbsWithGradients",
    "KernelState",
    "Lattice",
    "LatticeState",
    "MomentumState",
    "cyclical_schedule",
    "discrete_langevin_chains",
    "gibbs_chains",
    "gibbs_with_gradients_chains",
    "langevin_chains",
    "mala_chains",
    "polynomial_schedule",
    "sghmc_chains",
]
