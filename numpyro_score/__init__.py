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
from numpyro_score.losses import (
    CD,
    DSM,
    ESM,
    FSM,
    ISM,
    NCE,
    PCD,
    SSM,
    KLContraction,
    geometric_levels,
    parzen_score,
)
from numpyro_score.score_terms import curl, score_factor

__all__ = [
    "CD",
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "NCE",
    "PCD",
    "SSM",
    "ClosedFormError",
    "DenoisingGenerator",
    "Energy",
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
    "parzen_score",
    "score_factor",
    "sparse_path",
    "to_arviz",
]
