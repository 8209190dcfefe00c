"""Fits whose objective is quadratic in the parameters, solved at once."""

from __future__ import annotations

import warnings
from typing import Any

from numpyro.infer import SVI
from numpyro.infer.util import transform_fn

from numpyro_score.closed_form import ClosedFormError, FlatObjectiveError, minimise
from numpyro_score.inference.result import ScoreMatchingResult

__all__ = ["solve"]

_OF_RUN = 5  # frames up to the caller of `run`, through its decorators


def solve(svi: SVI, start: ScoreMatchingResult) -> tuple[Any, float] | None:
    """The `SVIState` at the minimum of a quadratic objective and its value, or None if there is no closed form.

    Args:
        svi: the ScoreMatching that fits.
        start: its fit at any values.

    Warns:
        UserWarning: if the minimum violates a constraint, and the one within is at an end; if it is not unique, and
            there is no closed form.
    """
    sites, state = start.sites, start.state
    if state.mutable_state or any(s["type"] == "plate" and len(s["value"]) != s["args"][0] for s in sites.values()):
        return None  # the objective changes from step to step
    try:
        found = minimise(svi.model, sites, start.energy, state.rng_key, start.args, start.kwargs)
    except FlatObjectiveError as error:
        warnings.warn(f"{error} The optimiser finds one of many minima.", stacklevel=_OF_RUN)
        return None
    except ClosedFormError:
        return None
    if found.at_ends:
        warnings.warn(
            f"The minimum is beyond the constraint of site {' and '.join(map(repr, found.at_ends))}, and the fit has "
            "numbers of it at the end: leave that term out, or give it a prior away from there.",
            stacklevel=_OF_RUN,
        )
    names = {k: k if sites[k]["type"] == "param" else f"{k}_{svi.guide.prefix}_loc" for k in found.estimates}
    params = {names[k]: v for k, v in found.estimates.items()}
    free = transform_fn(svi.constrain_fn.args[0], params, invert=True)
    return state._replace(optim_state=svi.optim.init(free)), found.value
