"""What users pass to fits: refused by name where it cannot be meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoLaplaceApproximation,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
from numpyro.primitives import Messenger

from numpyro_score.energy import Site, takes_keyword

__all__ = ["GUIDES_WITH_DENSITY", "InitParams", "check_inside", "check_keywords", "is_loss"]

GUIDES_WITH_DENSITY = (
    AutoLaplaceApproximation,
    AutoDAIS,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
"""Guides that evaluate the density of the model that they are built on."""


def check_keywords(run: Callable[..., Any], model: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a keyword that is neither of `run`, which got it for the model, nor of the model."""
    for name in kwargs:
        if takes_keyword(model, name):
            continue
        own = [p.name for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
        near = difflib.get_close_matches(name, [*own, *_keywords(model)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"its own are {', '.join(own)}."
        raise TypeError(f"{run.__name__} has no argument '{name}', nor has the model: {hint}")


def _keywords(model: Callable[..., Any]) -> list[str]:
    return [n for n in inspect.signature(model).parameters if takes_keyword(model, n)]


def is_loss(value: Any) -> bool:
    """Whether a callable is a pointwise objective by its arguments, as an instance or a class."""
    call = getattr(value if inspect.isclass(value) else type(value), "__call__", None)  # noqa: B004
    if not inspect.isfunction(call):
        return False
    return list(inspect.signature(call).parameters)[1:] == ["energy", "rng_key"]


class InitParams(Messenger):
    """Raises ValueError at a param site whose initial value, as given by the user, violates its constraint.

    Its unconstrained value would be NaN, and the fit fail at its first step.
    """

    def __init__(self, init_params: dict[str, Any] | None) -> None:
        self.init_params = init_params or {}
        super().__init__()

    def process_message(self, msg: Site) -> None:
        """Looks at the value given."""
        if msg["type"] == "param":
            check_inside(self.init_params, {msg["name"]: msg["kwargs"].get("constraint", constraints.real)})


def check_inside(init_params: dict[str, Any] | None, supports: dict[str, constraints.Constraint]) -> None:
    """Raises ValueError if a value in `init_params` violates the constraint of its site, where one is given."""
    for name, value in (init_params or {}).items():
        if name not in supports or isinstance(value, jax.core.Tracer) or not jax.tree_util.all_leaves([value]):
            continue
        if not np.all(supports[name](jnp.asarray(value))):
            raise ValueError(
                f"init_params has {name} = {value}, which violates the site's constraint {supports[name]}: start from "
                "a value inside of it."
            )
