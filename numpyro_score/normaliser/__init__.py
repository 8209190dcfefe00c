"""The normaliser of a fitted model, and draws from it.

:func:`~numpyro_score.log_partition` estimates log Z, :class:`~numpyro_score.EnergyDistribution` makes a fitted energy a
NumPyro distribution with it, and :func:`~numpyro_score.sample` draws data.
"""

from numpyro_score.normaliser.ais import ais
from numpyro_score.normaliser.bridge import nce
from numpyro_score.normaliser.distribution import EnergyDistribution
from numpyro_score.normaliser.enumeration import enumeration
from numpyro_score.normaliser.flow import flow
from numpyro_score.normaliser.partition import LogPartition, log_partition
from numpyro_score.normaliser.quadrature import quadrature
from numpyro_score.normaliser.sampling import sample
from numpyro_score.normaliser.smc import smc

__all__ = [
    "EnergyDistribution",
    "LogPartition",
    "ais",
    "enumeration",
    "flow",
    "log_partition",
    "nce",
    "quadrature",
    "sample",
    "smc",
]
