"""Unnormalised models as first-class NumPyro models."""

__version__ = "0.1.0.dev0"

from numpyro_score.diagnostics import to_arviz
from numpyro_score.energy import Energy
from numpyro_score.inference import (
    NonFiniteLossError,
    ScoreMatching,
    ScoreMatchingResult,
    adjust_draws,
    generalized_bayes,
)
from numpyro_score.losses import DSM, ESM, FSM, ISM, SSM, KLContraction, geometric_levels, parzen_score

__all__ = [
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "SSM",
    "Energy",
    "KLContraction",
    "NonFiniteLossError",
    "ScoreMatching",
    "ScoreMatchingResult",
    "adjust_draws",
    "generalized_bayes",
    "geometric_levels",
    "parzen_score",
    "to_arviz",
]
