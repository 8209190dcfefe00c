"""What to do about data that are not where their site says: told apart by what their values look like.

Never to drop rows: those that lie outside are not a random part of the data, and what is left is biased.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints

from numpyro_score.energy.domains import domain_of
from numpyro_score.energy.supports import DISCRETE, SIMPLICES, base_constraint

__all__ = ["on_boundary", "outside_remedy"]

_ROUNDED = 0.05  # sums and norms this near to one are rounded or incomplete, others are of another unit


def outside_remedy(name: str, kind: str, constraint: constraints.Constraint, value: Any) -> str:
    """What is seen of data outside of their support, and what to write instead.

    Args:
        name: of the data.
        kind: of their support.
        constraint: their support.
        value: the values of the rows outside, (M, ...).
    """
    value, base = np.asarray(value, np.float64), base_constraint(constraint)
    if not np.isfinite(value).all():
        by_cells = kind in (*DISCRETE, "box") or isinstance(base, type(constraints.circular))
        seen = ", or fit what was seen by MissingCells()" if by_cells and np.isnan(value).any() else ""
        return f"there are NaN or infinity among them, so correct or mask these rows with handlers.mask{seen}"
    if kind in DISCRETE:
        return _not_whole(name, kind, constraint, value)
    if kind == "sphere":
        return _off_one(
            name,
            np.linalg.norm(value, axis=-1),
            "norms on the unit sphere",
            f"np.linalg.norm({name}, axis=-1, keepdims=True)",
        )
    if kind in SIMPLICES:
        if (value < 0).any():
            return f"some shares are negative, at least {value.min():.3g}: correct them"
        return _off_one(name, value.sum(-1), "sums on the simplex", f"{name}.sum(-1, keepdims=True)")
    if isinstance(base, type(constraints.circular)):
        return _turn(name, value)
    if domain := domain_of(base):
        deepest = -np.asarray(domain.distances(jnp.asarray(value, jnp.result_type(float)))).min()
        return (
            f"their functions are down to {-deepest:.3g} there, and they are to be positive inside: correct these "
            "values, their unit or origin, or the domain"
        )
    lower, upper = (np.asarray(getattr(base, b, i), np.float64) for b, i in _ENDS)
    if kind == "box":
        if ((value >= lower) & (value <= upper)).all():
            return _at_ends(lower, upper, value)
        low = value < lower
        seen = f"values from {value.min():.4g} to {value.max():.4g} lie beyond " + _interval(lower, upper)
        if lower.size == upper.size == 1 and lower == 0 and upper == 1 and not low.any() and value.max() <= 100:
            return f"{seen}: if they are percentages, write {name} / 100, else give the site the support they have"
        return f"{seen}: correct their unit or origin, or give the site the support that they have"
    ordered = type(base).__name__.strip("_").lower()
    if "ordered" in ordered and (np.diff(value, axis=-1) >= 0).all() and (np.diff(value, axis=-1) == 0).any():
        return "there are ties in rows that are to increase strictly: undo the rounding that made them"
    return f"correct these values, or give the site the support that they have ({ordered} does not hold them)"


def _not_whole(name: str, kind: str, constraint: constraints.Constraint, value: np.ndarray) -> str:
    """Of values that are not among the integers of their support."""
    fractions = value[value != value.round()]
    if fractions.size:
        return (
            f"there are values such as {fractions.flat[0]:.4g} among them, which are no integers: round them if they "
            "are counts or categories in another type, or give the site a continuous support"
        )
    if kind == "binary":
        if set(np.unique(value)) <= {-1.0, 1.0}:
            return f"these are spins: write (1 + {name}) / 2, and 2 * x - 1 in the model"
        return (
            f"values from {value.min():.4g} to {value.max():.4g} are not 0 and 1: write e.g. {name} > 0 if none stands "
            "for what is missing, which is NaN for MissingCells(), or give the site the support "
            "constraints.integer_interval(low, high)"
        )
    lower, upper = (np.asarray(getattr(base_constraint(constraint), b, i), np.float64) for b, i in _ENDS)
    return (
        f"values from {value.min():.4g} to {value.max():.4g} lie beyond {_interval(lower, upper)}: correct them, or "
        "give the site the support that they have"
    )


_ENDS = (("lower_bound", -np.inf), ("upper_bound", np.inf))


def on_boundary(kind: str, constraint: constraints.Constraint, value: Array) -> Array:
    """Which rows of finite data (M, ...) touch the boundary of a bounded support or of a simplex, (M,)."""
    if kind in SIMPLICES:
        touch = value == 0
    elif kind == "box":
        lower, upper = (jnp.asarray(getattr(base_constraint(constraint), b, i), value.dtype) for b, i in _ENDS)
        touch = (value == lower) | (value == upper)
    else:
        return jnp.zeros(len(value), bool)
    return touch.reshape(len(value), -1).any(-1)


def _wrap(name: str) -> str:
    return f"({name} + np.pi) % (2 * np.pi) - np.pi"


def _turn(name: str, value: np.ndarray) -> str:
    """Of angles outside of [-π, π), whose unit only their range suggests: hours, say, lie far from 360."""
    most = np.abs(value).max()
    by_period = f"x = {name} * 2 * np.pi / period, e.g. with the period 24 for hours, then {_wrap('x')}"
    if 90 < most <= 360:
        return (
            f"angles up to {most:.4g} look like degrees: if they are, write x = np.deg2rad({name}), then {_wrap('x')}; "
            f"if they have another period, write {by_period}"
        )
    if most > 2 * np.pi or (value == value.round()).all():
        return (
            f"angles are to lie in [-π, π), and values up to {most:.4g} seem to be of another unit: write {by_period}; "
            f"if they are radians, write {_wrap(name)}"
        )
    return f"angles are to lie in [-π, π): if they are radians, write {_wrap(name)}, and if not, {by_period}"


def _interval(lower: np.ndarray, upper: np.ndarray) -> str:
    return f"the bounds {lower.min():.4g} and {upper.max():.4g}" if lower.size else "the bounds"


def _off_one(name: str, total: np.ndarray, what: str, divisor: str) -> str:
    off = np.abs(total - 1).max()
    if (total == 0).any():
        return f"some {what} are zero: correct these rows, which have no direction or composition"
    if off <= _ROUNDED:
        return f"{what} are off one by up to {off:.2g}, as after rounding: divide the rows by them, {name} / {divisor}"
    return (
        f"{what} lie between {total.min():.4g} and {total.max():.4g} instead of at one: if only the proportions of a "
        f"row matter, divide the rows by them, {name} / {divisor}"
    )


def _at_ends(lower: np.ndarray, upper: np.ndarray, value: np.ndarray) -> str:
    """Of values that lie on the ends of an open interval."""
    closed = "constraints.interval(low, high)" if np.isfinite(upper).all() else "constraints.greater_than_eq(low)"
    if not np.isfinite(lower).all():
        closed = "constraints.less_than_eq(high)"
    elif (lower == 0).all():
        closed = "constraints.nonnegative"
        if np.isfinite(upper).all():
            closed = "constraints.unit_interval" if (upper == 1).all() else "constraints.interval(0.0, high)"
    at = np.unique(value[(value == lower) | (value == upper)])[:2]
    return (
        f"values lie exactly on the boundary, at {' and '.join(f'{v:.4g}' for v in at)}: if the density is finite "
        f"there, write {closed}, under which they count; if they are small values rounded, put half of the smallest "
        "step that is measured in their place; if such values occur with a probability of their own, model them apart"
    )
