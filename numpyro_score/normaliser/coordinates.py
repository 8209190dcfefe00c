"""Free coordinates of a row: R^P in place of whatever support the data have, with the Jacobian.

Integrals and samplers here work on exp g over u in R^P, where g is the log density of the rows plus a log Jacobian,
such that ∫ exp g du is the integral of exp f over the data in their own base measure: Lebesgue on R^D and boxes;
Lebesgue of the first K − 1 coordinates on a simplex; surface measure on a sphere; angles on a circle; and what
NumPyro's `biject_to` takes elsewhere. These are the measures in which NumPyro's `log_prob` are densities.

Spheres and circles have two sets of free coordinates:

- *embedding*, for samplers: x = v/‖v‖ with v in R^d. With g(v) = f(v/‖v‖) + 4 log ‖v‖ − ½‖v‖² − log c and
  c = ∫ r⁴ exp(−r²/2) r^{d−1} dr = 2^{d/2+1} Γ(d/2+2), polar coordinates give v/‖v‖ the law exp f on the surface, the
  same normaliser, and ‖v‖ a χ law with d + 4 degrees of freedom. Smooth, without a boundary; the fourth power of the
  radius keeps chains from the origin, where x jumps.
- *angles*, for quadrature: d − 1 of them, each an interval and so mapped to the line.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import biject_to, constraints

from numpyro_score.energy import SIMPLICES, Energy, base_constraint, check_rows

__all__ = [
    "Chart",
    "as_events",
    "data_to_row",
    "free_dim",
    "free_log_density",
    "from_free",
    "has_domain",
    "num_draws",
    "row_log_jacobian",
    "row_to_data",
    "to_free",
]

Chart = Literal["embedding", "angles"]


class Piece(NamedTuple):
    """Free coordinates of one array of data."""

    columns: slice  # of the row, (..., D)
    free: slice  # of the free coordinates, (..., P)
    to_row: Callable[[Array], tuple[Array, Array]]  # (..., p) to (..., d) and a log Jacobian that broadcasts to (...)
    to_free: Callable[[Array], Array]
    embedded: int  # d of spheres that stand in R^d; 0 for anything else


def free_dim(energy: Energy, chart: Chart = "embedding") -> int:
    """P, the number of free coordinates of one row."""
    return _pieces(energy, chart)[-1].free.stop


def to_free(
    energy: Energy, x: Float[Array, "*batch d"], chart: Chart = "embedding", rng_key: Array | None = None
) -> Float[Array, "*batch p"]:
    """Rows as the energy takes them, (..., D), to free coordinates, (..., P).

    In the embedding spheres land at a radius drawn by the key from its law, or at its root mean square.
    """
    found = []
    for i, piece in enumerate(_pieces(energy, chart)):
        u = piece.to_free(x[..., piece.columns])
        if rng_key is not None and piece.embedded:
            shape = (*u.shape[:-1], u.shape[-1] // piece.embedded, 1)
            degrees = piece.embedded + _EXTRA
            squared = jax.random.chisquare(jax.random.fold_in(rng_key, i), degrees, shape=shape, dtype=u.dtype)
            u = (u.reshape(*u.shape[:-1], -1, piece.embedded) * jnp.sqrt(squared / degrees)).reshape(u.shape)
        found.append(u)
    return jnp.concatenate(found, axis=-1)


def from_free(
    energy: Energy, u: Float[Array, "*batch p"], chart: Chart = "embedding"
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch"]]:
    """Free coordinates (..., P) to rows (..., D), and what to add to their log density, (...)."""
    rows, log_jacobian = [], jnp.zeros(u.shape[:-1], u.dtype)
    for piece in _pieces(energy, chart):
        row, more = piece.to_row(u[..., piece.free])
        rows.append(row)
        log_jacobian += more
    return jnp.concatenate(rows, axis=-1), log_jacobian


def free_log_density(energy: Energy, u: Float[Array, "*batch p"], chart: Chart = "embedding") -> Float[Array, "*batch"]:
    """g(u), whose integral over R^P is that of exp f over the data, (..., P) to (...)."""
    x, log_jacobian = from_free(energy, u, chart)
    value = energy.log_density(x) + log_jacobian
    # Outside of a domain the density is zero, whatever the model says there, NaN included.
    return jnp.where(log_jacobian == -jnp.inf, -jnp.inf, value) if has_domain(energy) else value


def has_domain(energy: Energy) -> bool:
    """Whether some of the data live in a `Domain`, which has no map from R^P."""
    return any(a.support.kind == "domain" for a in energy.arrays)


def row_to_data(energy: Energy, x: Float[Array, "d"]) -> dict[str, Array]:
    """One row to data in the sites' own event shapes, by name."""
    values = energy.unflatten(x[None])
    return {a.name: jnp.squeeze(values[a.name], a.row_axes) for a in energy.arrays}


def data_to_row(energy: Energy, values: dict[str, Array]) -> Float[Array, "d"]:
    """The inverse of :func:`row_to_data`."""
    arrays = energy.arrays
    return energy.flatten({a.name: jnp.expand_dims(values[a.name], a.row_axes) for a in arrays})[0]


def as_events(energy: Energy, shape: tuple[int, ...], value: Any) -> tuple[Float[Array, "n ..."], tuple[int, ...]]:
    """What a distribution's `log_prob` got, (..., event shape), as events along one axis, and its batch shape.

    Raises:
        TypeError: for what holds no numbers, or in too few digits.
        ValueError: for another event shape.
    """
    check_rows("value", value)
    value = jnp.asarray(value, energy.dtype)
    batch = value.shape[: max(value.ndim - len(shape), 0)]
    if value.shape != (*batch, *shape):
        raise ValueError(f"The value has shape {value.shape}: pass events of shape {shape}.")
    return value.reshape(math.prod(batch), *shape), batch


def num_draws(owner: str, sample_shape: Any) -> int:
    """How many draws a distribution's `sample` is asked for; raises for what is no shape."""
    if not isinstance(sample_shape, tuple | list) or any(
        isinstance(n, bool) or not isinstance(n, numbers.Integral) for n in sample_shape
    ):
        raise TypeError(f"{owner}.sample needs integers as sample_shape, got {sample_shape!r}: write e.g. (100,).")
    if any(n < 0 for n in sample_shape):
        raise ValueError(f"{owner}.sample needs a sample_shape of no negative numbers, got {tuple(sample_shape)}.")
    return math.prod(sample_shape)


def row_log_jacobian(energy: Energy, x: Float[Array, "d"]) -> Float[Array, ""]:
    """What `energy.log_density` holds beyond the density of the data: the change from these to the row x."""
    coordinates = energy.coordinates(x[None])
    found = (a.support.log_jacobian(coordinates[a.name], a.support.to_data(coordinates[a.name])) for a in energy.arrays)
    return sum((jnp.sum(v) for v in found if v is not None), jnp.zeros((), x.dtype))


def _pieces(energy: Energy, chart: Chart) -> Sequence[Piece]:
    supports = energy.supports
    lower, upper = (bound[0] for bound in energy.bounds(energy.num_rows))
    pieces: list[Piece] = []
    for a, block in zip(energy.arrays, energy.blocks, strict=True):
        columns = slice(block.start, block.stop)
        width, start = block.stop - block.start, pieces[-1].free.stop if pieces else 0
        base = base_constraint(supports[a.name])
        num_free, embedded = width, 0
        if block.kind == "circle":
            if chart == "angles":
                maps = _elementwise(constraints.interval(-math.pi, math.pi))
            else:
                maps, num_free, embedded = _circles(width), 2 * width, 2
        elif block.kind == "box":
            low, high = lower[columns], upper[columns]
            if not hasattr(base, "lower_bound"):
                maps = _elementwise(constraints.less_than(high))
            elif not hasattr(base, "upper_bound"):
                maps = _elementwise(constraints.greater_than(low))
            else:
                maps = _elementwise(constraints.interval(low, high))
        elif block.kind == "sphere" and chart == "angles":
            maps, num_free = _angles(block.size), width // block.size * (block.size - 1)
        elif block.kind == "sphere":
            maps, embedded = _sphere(block.size), block.size
        elif block.kind in SIMPLICES:
            maps, num_free = _simplex(block.size, block.kind == "flat simplex"), width // block.size * (block.size - 1)
        elif block.kind == "domain":
            maps = _domain(supports[a.name], block.size)
        else:  # real already, or mapped there by `Energy`, which has the Jacobian in its log density
            maps = lambda u: (u, jnp.zeros(())), lambda x: x
        pieces.append(Piece(columns, slice(start, start + num_free), *maps, embedded))
    return pieces


Maps = tuple[Callable[[Array], tuple[Array, Array]], Callable[[Array], Array]]


def _elementwise(constraint: constraints.Constraint) -> Maps:
    transform = biject_to(constraint)

    def to_row(u: Array) -> tuple[Array, Array]:
        x = transform(u)
        return x, jnp.sum(transform.log_abs_det_jacobian(u, x), axis=-1)

    return to_row, transform.inv


def _sphere(size: int) -> Maps:
    def to_row(u: Array) -> tuple[Array, Array]:
        v = u.reshape(*u.shape[:-1], -1, size)
        return (v / jnp.linalg.norm(v, axis=-1, keepdims=True)).reshape(u.shape), _log_radial(v)

    return to_row, lambda x: math.sqrt(size + _EXTRA) * x


_EXTRA = 4


def _log_radial(v: Float[Array, "*batch m d"]) -> Float[Array, "*batch"]:
    """What m embedded points add to the log density."""
    k = v.shape[-1] + _EXTRA
    squared = jnp.sum(v**2, axis=-1)
    log_c = (k / 2 - 1) * math.log(2) + math.lgamma(k / 2)
    return jnp.sum(0.5 * _EXTRA * jnp.log(squared) - 0.5 * squared - log_c, axis=-1)


def _circles(width: int) -> Maps:
    def to_row(u: Array) -> tuple[Array, Array]:
        v = u.reshape(*u.shape[:-1], width, 2)
        return jnp.arctan2(v[..., 1], v[..., 0]), _log_radial(v)

    def to_free(x: Array) -> Array:
        return math.sqrt(2 + _EXTRA) * jnp.stack([jnp.cos(x), jnp.sin(x)], axis=-1).reshape(*x.shape[:-1], -1)

    return to_row, to_free


def _angles(size: int) -> Maps:
    """x_1 = cos a_1, x_2 = sin a_1 cos a_2, ...; surface element ∏ sin^{d−1−i} a_i, the last angle once around."""
    highest = math.pi * jnp.where(jnp.arange(size - 1) < size - 2, 1.0, 2.0)
    transform = biject_to(constraints.interval(0.0, highest))
    powers = jnp.arange(size - 2, -1, -1)

    def to_row(u: Array) -> tuple[Array, Array]:
        v = u.reshape(*u.shape[:-1], -1, size - 1)
        a = transform(v)
        sines = jnp.concatenate([jnp.ones_like(a[..., :1]), jnp.cumprod(jnp.sin(a), axis=-1)], axis=-1)
        x = sines * jnp.concatenate([jnp.cos(a), jnp.ones_like(a[..., :1])], axis=-1)
        surface = jnp.where(powers > 0, powers * jnp.log(jnp.where(powers > 0, jnp.sin(a), 1.0)), 0.0)
        log_jacobian = jnp.sum(transform.log_abs_det_jacobian(v, a) + surface, axis=(-2, -1))
        return x.reshape(*u.shape[:-1], -1), log_jacobian

    def to_free(x: Array) -> Array:
        y = x.reshape(*x.shape[:-1], -1, size)
        rest = jnp.sqrt(jnp.cumsum(y[..., ::-1] ** 2, axis=-1))[..., ::-1]  # ‖(x_i, ..., x_d)‖
        first = jnp.arctan2(rest[..., 1:-1], y[..., :-2])
        last = jnp.arctan2(y[..., -1:], y[..., -2:-1]) % (2 * math.pi)
        return transform.inv(jnp.concatenate([first, last], axis=-1)).reshape(*x.shape[:-1], -1)

    return to_row, to_free


def _domain(constraint: constraints.Constraint, size: int) -> Maps:
    """Points as they are: outside the density is zero."""

    def to_row(u: Array) -> tuple[Array, Array]:
        inside = constraint(u.reshape(*u.shape[:-1], -1, size)).all(-1)
        return u, jnp.where(inside, 0.0, -jnp.inf)

    return to_row, lambda x: x


def _simplex(size: int, flat: bool) -> Maps:
    """Rows are the shares x if flat, and else √x."""
    transform = biject_to(constraints.simplex)

    def to_row(u: Array) -> tuple[Array, Array]:
        v = u.reshape(*u.shape[:-1], -1, size - 1)
        x = transform(v)
        log_jacobian = transform.log_abs_det_jacobian(v, x)
        x = jnp.maximum(x, jnp.finfo(x.dtype).tiny)  # far out a product of small numbers is 0, and the Jacobian too
        if flat:
            return x.reshape(*u.shape[:-1], -1), jnp.sum(log_jacobian, axis=-1)
        # The rows are √x, and Σ log √x is in their log density.
        return jnp.sqrt(x).reshape(*u.shape[:-1], -1), jnp.sum(log_jacobian - 0.5 * jnp.sum(jnp.log(x), -1), axis=-1)

    def to_free(z: Array) -> Array:
        x = z.reshape(*z.shape[:-1], -1, size)
        x = x if flat else x**2
        # NumPyro's inverse takes the rest of the stick as 1 − Σ, which loses a small last share.
        rest = jnp.flip(jnp.cumsum(jnp.flip(x, -1), -1), -1)[..., 1:]
        u = jnp.log(x[..., :-1]) - jnp.log(rest) + jnp.log(jnp.arange(size - 1, 0, -1))
        return u.reshape(*z.shape[:-1], -1)

    return to_row, to_free
