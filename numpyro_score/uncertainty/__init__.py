"""Standard errors of estimates, the influence of rows on them, and learning rates that match them."""

from numpyro_score.uncertainty.batches import curvature_of_batches
from numpyro_score.uncertainty.calibration import calibrated_learning_rate
from numpyro_score.uncertainty.dependence import Dependence, automatic_window, spread_root
from numpyro_score.uncertainty.hierarchy import grouped_sites, nested_terms
from numpyro_score.uncertainty.influence import diagonal_stderr, influence, stderr_from, stderr_of
from numpyro_score.uncertainty.objective import (
    NEAR_ZERO,
    Objective,
    Parametrisation,
    SandwichError,
    norm_of_columns,
    prior_terms,
    site_blocks,
)
from numpyro_score.uncertainty.sandwich import (
    ARRIVED,
    AT_AN_END,
    MAX_PARAMETERS,
    NOT_CONVERGED,
    Curvature,
    check_rows,
    check_size,
    curvature,
    gradients_of_rows,
    require_curved,
    undetermined,
)

__all__ = [
    "ARRIVED",
    "AT_AN_END",
    "MAX_PARAMETERS",
    "NEAR_ZERO",
    "NOT_CONVERGED",
    "Curvature",
    "Dependence",
    "Objective",
    "Parametrisation",
    "SandwichError",
    "automatic_window",
    "calibrated_learning_rate",
    "check_rows",
    "check_size",
    "curvature",
    "curvature_of_batches",
    "diagonal_stderr",
    "gradients_of_rows",
    "grouped_sites",
    "influence",
    "nested_terms",
    "norm_of_columns",
    "prior_terms",
    "require_curved",
    "site_blocks",
    "spread_root",
    "stderr_from",
    "stderr_of",
    "undetermined",
]
