"""Fitting: the generalised model, score matching, and its standard errors."""

from numpyro_score.inference.adversarial import (
    AdversarialDynamicsEmbedding,
    AdversarialResult,
    AdversarialState,
    AdversarialTerms,
)
from numpyro_score.inference.calibration import adjust_draws, calibrated_learning_rate
from numpyro_score.inference.closed_form import ClosedFormError, Coordinates, FlatObjectiveError, Quadratic
from numpyro_score.inference.cost import FitCost
from numpyro_score.inference.generalized import (
    LOSS_SITE,
    GeneralizedModel,
    generalized_bayes,
    prior_model,
)
from numpyro_score.inference.generator import DenoisingGenerator, GeneratorResult, GeneratorState
from numpyro_score.inference.influence import diagonal_stderr, influence
from numpyro_score.inference.loop import NonFiniteLossError
from numpyro_score.inference.optim import default_optimizer, optax_optimizer
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.sandwich import Curvature, Objective, Parametrisation, SandwichError, curvature
from numpyro_score.inference.score_matching import DefaultLoss, ScoreMatching
from numpyro_score.inference.sparse import SparsePath, sparse_path
from numpyro_score.inference.streaming import GradientSpread, QuadraticFit, QuadraticLoss

__all__ = [
    "LOSS_SITE",
    "AdversarialDynamicsEmbedding",
    "AdversarialResult",
    "AdversarialState",
    "AdversarialTerms",
    "ClosedFormError",
    "Coordinates",
    "Curvature",
    "DefaultLoss",
    "DenoisingGenerator",
    "FitCost",
    "FlatObjectiveError",
    "GeneralizedModel",
    "GeneratorResult",
    "GeneratorState",
    "GradientSpread",
    "NonFiniteLossError",
    "Objective",
    "Parametrisation",
    "Quadratic",
    "QuadraticFit",
    "QuadraticLoss",
    "SandwichError",
    "ScoreMatching",
    "ScoreMatchingResult",
    "SparsePath",
    "adjust_draws",
    "calibrated_learning_rate",
    "curvature",
    "default_optimizer",
    "diagonal_stderr",
    "generalized_bayes",
    "influence",
    "optax_optimizer",
    "prior_model",
    "sparse_path",
]
