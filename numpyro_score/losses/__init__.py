"""Objectives that need no normaliser: one small frozen dataclass each.

A loss is a callable `loss(energy, rng_key) -> (N,)`, one value per row of the energy's data. All Fisher-type losses
estimate the Hyvärinen objective J(θ) = E[½‖s‖² + tr ∇s], which is the Fisher divergence ½ E‖∇log p − s‖² up to a
constant of the data, so that their values can be compared with each other. CD, PCD and NCE estimate the likelihood,
and are not on this scale. PseudoLikelihood, PairLikelihood, RatioMatching and DiscreteFisher are for discrete data,
which have no score, and Mixed for rows of both.
"""

from numpyro_score.losses.base import Loss, row_losses, total_loss
from numpyro_score.losses.cd import CD
from numpyro_score.losses.continuous_dsm import ContinuousDSM
from numpyro_score.losses.default import DefaultLoss, loss_for
from numpyro_score.losses.discrete import DiscreteFisher, PairLikelihood, PseudoLikelihood, RatioMatching
from numpyro_score.losses.dsm import DSM, geometric_levels
from numpyro_score.losses.esm import ESM, parzen_score
from numpyro_score.losses.fsm import FSM
from numpyro_score.losses.ism import ISM
from numpyro_score.losses.kl_contraction import KLContraction
from numpyro_score.losses.missing import MissingCells
from numpyro_score.losses.mixed import Mixed
from numpyro_score.losses.nce import LOG_PARTITION_SITE, NCE
from numpyro_score.losses.pcd import CHAINS_SITE, PCD
from numpyro_score.losses.ssm import SSM

__all__ = [
    "CD",
    "CHAINS_SITE",
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "LOG_PARTITION_SITE",
    "NCE",
    "PCD",
    "SSM",
    "ContinuousDSM",
    "DefaultLoss",
    "DiscreteFisher",
    "KLContraction",
    "Loss",
    "MissingCells",
    "Mixed",
    "PairLikelihood",
    "PseudoLikelihood",
    "RatioMatching",
    "geometric_levels",
    "loss_for",
    "parzen_score",
    "row_losses",
    "total_loss",
]
