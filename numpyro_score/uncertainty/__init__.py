"""Standard errors of estimates, the influence of rows on them, and learning rates that match them."""

from numpyro_score.uncertainty.calibration import calibrated_learning_rate
from numpyro_score.uncertainty.influence import diagonal_stderr, influence
from numpyro_score.uncertainty.sandwich import (
    MAX_PARAMETERS,
    Curvature,
    Objective,
    Parametrisation,
    SandwichError,
    curvature,
    norm_of_columns,
)

__all__ = [
    "MAX_PARAMETERS",
    "Curvature",
    "Objective",
    "Parametrisation",
    "SandwichError",
    "calibrated_learning_rate",
    "curvature",
    "diagonal_stderr",
    "influence",
    "norm_of_columns",
]
