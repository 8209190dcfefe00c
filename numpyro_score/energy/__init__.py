"""Models as densities of their data: the one place that runs models and reads how their data enter.

Everything else of the package knows a model through :class:`Energy` and the names below, which are all that this room
shows; none of its modules is imported from outside.
"""

from numpyro_score.energy.accuracy import quadrature_error
from numpyro_score.energy.arguments import join_arrays, split_arrays, takes_keyword, with_outside
from numpyro_score.energy.base import AnyArray, layouts_kept
from numpyro_score.energy.binding import refuse_other_axes, rows_given
from numpyro_score.energy.boundary import (
    distances_to_boundary,
    order_of_weight,
    slopes_of_domains,
    weight_at_boundary,
)
from numpyro_score.energy.check import evaluate_for_check
from numpyro_score.energy.dependence import (
    coarsest_rounding,
    depends_on_inputs,
    is_constant,
    is_quadratic,
    varying_outputs,
)
from numpyro_score.energy.devices import by_device, sum_by_device
from numpyro_score.energy.discrete import evaluations, lattice_density, log_ratios, num_values, part
from numpyro_score.energy.domains import Domain, ball, flat_simplex, polygon
from numpyro_score.energy.energy import Energy
from numpyro_score.energy.kinks import NOT_PERIODIC, Kink, find_kink
from numpyro_score.energy.layout import rows_first
from numpyro_score.energy.missing import SeenCells, seen_cells
from numpyro_score.energy.relaxation import relaxed
from numpyro_score.energy.score_terms import curl, score_factor
from numpyro_score.energy.several import AnyEnergy, Energies, bind, one_plate
from numpyro_score.energy.supports import (
    FLAT,
    SIMPLICES,
    BoundaryWeight,
    RowWeight,
    base_constraint,
    base_law,
    capped_distance,
    distances,
    innermost,
    limits,
    make_frame,
)
from numpyro_score.energy.tables import (
    NO_LABELS,
    Labels,
    as_array,
    read_arguments,
    refuse_other_columns,
    refuse_other_rows,
    row_index,
)
from numpyro_score.energy.tempered import tempered
from numpyro_score.energy.text import numbered, plural, rows_text
from numpyro_score.energy.trace import Parameters, Sealed, Site
from numpyro_score.energy.values import check_rows

__all__ = [
    "FLAT",
    "NOT_PERIODIC",
    "NO_LABELS",
    "SIMPLICES",
    "AnyArray",
    "AnyEnergy",
    "BoundaryWeight",
    "Domain",
    "Energies",
    "Energy",
    "Kink",
    "Labels",
    "Parameters",
    "RowWeight",
    "Sealed",
    "SeenCells",
    "Site",
    "as_array",
    "ball",
    "base_constraint",
    "base_law",
    "bind",
    "by_device",
    "capped_distance",
    "check_rows",
    "coarsest_rounding",
    "curl",
    "depends_on_inputs",
    "distances",
    "distances_to_boundary",
    "evaluate_for_check",
    "evaluations",
    "find_kink",
    "flat_simplex",
    "innermost",
    "is_constant",
    "is_quadratic",
    "join_arrays",
    "lattice_density",
    "layouts_kept",
    "limits",
    "log_ratios",
    "make_frame",
    "num_values",
    "numbered",
    "one_plate",
    "order_of_weight",
    "part",
    "plural",
    "polygon",
    "quadrature_error",
    "read_arguments",
    "refuse_other_axes",
    "refuse_other_columns",
    "refuse_other_rows",
    "relaxed",
    "row_index",
    "rows_first",
    "rows_given",
    "rows_text",
    "score_factor",
    "seen_cells",
    "slopes_of_domains",
    "split_arrays",
    "sum_by_device",
    "takes_keyword",
    "tempered",
    "varying_outputs",
    "weight_at_boundary",
    "with_outside",
]
