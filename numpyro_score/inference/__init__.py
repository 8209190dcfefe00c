"""Fitting: the generalised model, score matching, and its standard errors."""

from numpyro_score.inference.calibration import adjust_draws, calibrated_learning_rate
from numpyro_score.inference.generalized import (
    LOSS_SITE,
    GeneralizedModel,
    generalized_bayes,
    prior_model,
)
from numpyro_score.inference.influence import diagonal_stderr, influence
from numpyro_score.inference.optim import default_optimizer, optax_optimizer
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.sandwich import Parametrisation, SandwichError, sandwich
from numpyro_score.inference.score_matching import DefaultLoss, NonFiniteLossError, ScoreMatching

__all__ = [
    "LOSS_SITE",
    "DefaultLoss",
    "GeneralizedModel",
    "NonFiniteLossError",
    "Parametrisation",
    "SandwichError",
    "ScoreMatching",
    "ScoreMatchingResult",
    "adjust_draws",
    "calibrated_learning_rate",
    "default_optimizer",
    "diagonal_stderr",
    "generalized_bayes",
    "influence",
    "optax_optimizer",
    "prior_model",
    "sandwich",
]
