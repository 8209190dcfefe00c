"""Standard errors of estimates, the influence of rows on them, and learning rates that match them."""

from numpyro_score.uncertainty.batches import curvature_of_batches
from numpyro_score.uncertainty.calibration import calibrated_learning_rate
from numpyro_score.uncertainty.hierarchy import grouped_sites, nested_terms
from numpyro_score.uncertainty.influence import diagonal_stderr, influence, stderr_from, stderr_of
from numpyro_score.uncertainty.objective import (
    Objective,
    Parametrisation,
    SandwichError,
    norm_of_columns,
    prior_terms,
    site_blocks,
)
from numpyro_score.uncertainty.sandwich import (
    ARRIVED,
    MAX_PARAMETERS,
    NOT_CONVERGED,
    Curvature,
    check_rows,
    check_size,
    curvature,
    require_curved,
)

__all__ = [
    "ARRIVED",
    "MAX_PARAMETERS",
    "NOT_CONVERGED",
    "Curvature",
    "Objective",
    "Parametrisation",
    "SandwichError",
    "calibrated_learning_rate",
    "check_rows",
    "check_size",
    "curvature",
    "curvature_of_batches",
    "diagonal_stderr",
    "grouped_sites",
    "influence",
    "nested_terms",
    "norm_of_columns",
    "prior_terms",
    "require_curved",
    "site_blocks",
    "stderr_from",
    "stderr_of",
]
