"""Unnormalised models as first-class NumPyro models."""

__version__ = "0.1.0.dev0"

from numpyro_score.diagnostics import audit, to_arviz
from numpyro_score.energy import Energy
from numpyro_score.inference import (
    ClosedFormError,
    DenoisingGenerator,
    GradientSpread,
    NonFiniteLossError,
    QuadraticLoss,
    ScoreMatching,
    ScoreMatchingResult,
    adjust_draws,
    generalized_bayes,
    sparse_path,
)
from numpyro_score.losses import DSM, ESM, FSM, ISM, SSM, KLContraction, geometric_levels, parzen_score
from numpyro_score.normaliser import EnergyDistribution, log_partition, sample
from numpyro_score.score_terms import curl, score_factor

__all__ = [
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "SSM",
    "ClosedFormError",
    "DenoisingGenerator",
    "Energy",
    "EnergyDistribution",
    "GradientSpread",
    "KLContraction",
    "NonFiniteLossError",
    "QuadraticLoss",
    "ScoreMatching",
    "ScoreMatchingResult",
    "adjust_draws",
    "audit",
    "curl",
    "generalized_bayes",
    "geometric_levels",
    "log_partition",
    "parzen_score",
    "sample",
    "score_factor",
    "sparse_path",
    "to_arviz",
]
