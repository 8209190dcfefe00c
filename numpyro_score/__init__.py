"""Unnormalised models as first-class NumPyro models."""

__version__ = "0.1.0.dev0"

from numpyro_score.diagnostics import to_arviz
from numpyro_score.energy import Energy
from numpyro_score.inference import (
    ClosedFormError,
    GradientSpread,
    NonFiniteLossError,
    QuadraticLoss,
    ScoreMatching,
    ScoreMatchingResult,
    generalized_bayes,
    sparse_path,
)
from numpyro_score.losses import DSM, ESM, FSM, ISM, SSM, KLContraction, geometric_levels, parzen_score

__all__ = [
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "SSM",
    "ClosedFormError",
    "Energy",
    "GradientSpread",
    "KLContraction",
    "NonFiniteLossError",
    "QuadraticLoss",
    "ScoreMatching",
    "ScoreMatchingResult",
    "generalized_bayes",
    "geometric_levels",
    "parzen_score",
    "sparse_path",
    "to_arviz",
]
