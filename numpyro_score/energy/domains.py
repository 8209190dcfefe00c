"""Supports that NumPyro has no constraint for: regions of R^d by distances to their boundary, and the flat simplex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import constraints

__all__ = ["Domain", "ball", "domain_of", "flat_simplex", "polygon"]

Distance = Callable[[Array], Array]


class Domain(constraints.Constraint):
    r"""The points of R^d at which functions are positive, as the support of a data site.

    Each function is positive inside, zero at its part of the boundary and negative outside. The distance to that part
    is the best there is; what a polynomial inequality has on its one side will do, as score matching needs no more
    than a weight that vanishes at the boundary [Yu, Drton & Shojaie 2022; Liu, Kanamori & Williams 2022]. A function
    in place of the distance changes the variance of estimates, and not where they go. Scale it so that it is about
    the distance where that is small.

    `a & b` is where both are, `a | b` where one of them is.

    Args:
        parts: functions of points, (..., d) to (...), written with `jax.numpy`. The domain is where all are positive.

    Raises:
        TypeError: for what is no function. When called: for a part that cannot take points.
        ValueError: without any part; when called, for a part that does not give one number for each point.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_score import Domain, ScoreMatching
        >>> half_disc = Domain(lambda x: 1 - jnp.linalg.norm(x, axis=-1), lambda x: x[..., 1])
        >>> def model(x):
        ...     a = numpyro.param("a", jnp.zeros(2))
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(half_disc, (), (2,)), obs=x)
        ...         numpyro.factor("energy", x @ a)
        >>> x = jax.random.uniform(jax.random.key(0), (20000, 2), minval=-1.0)
        >>> x = x[half_disc(x)]  # uniform, so that a is zero
        >>> fit = ScoreMatching(model).run(jax.random.key(1), x)
        >>> bool((abs(fit.estimates["a"]) < 4 * fit.stderr()["a"]).all())
        True
    """

    event_dim = 1

    def __init__(self, *parts: Distance) -> None:
        if not parts:
            raise ValueError("Domain needs a function that is positive inside: write e.g. Domain(lambda x: 1 - x @ x).")
        for part in parts:
            if not callable(part):
                raise TypeError(f"Domain needs functions that are positive inside, got {part!r}.")
        self.parts = parts

    def __repr__(self) -> str:
        return f"Domain of {len(self.parts)} {'function' if len(self.parts) == 1 else 'functions'}"

    def __call__(self, x: Any) -> Any:
        """Which points are inside or, within rounding, on the boundary, (..., d) to (...)."""
        x = jnp.asarray(x, jnp.result_type(float))
        rounding = 8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=-1)
        return jnp.all(self.distances(x) >= -rounding[..., None], axis=-1)

    def distances(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch k"]:
        """To each part of the boundary, (..., d) to (..., k)."""
        found = [jnp.asarray(part(x)) for part in self.parts]
        for part, value in zip(self.parts, found, strict=True):
            name = getattr(part, "__name__", repr(part))
            if value.shape != x.shape[:-1]:
                raise ValueError(
                    f"The function {name} of a Domain gave shape {value.shape} for points of shape {x.shape}: return "
                    f"one number for each point, {x.shape[:-1]}, as by summing over axis -1."
                )
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(
                    f"The function {name} of a Domain gave values of type {value.dtype}: return numbers that fall to "
                    "zero towards the boundary, like the distance, e.g. 1 - jnp.linalg.norm(x, axis=-1)."
                )
        return jnp.stack(found, axis=-1)

    def __and__(self, other: Domain) -> Domain:
        return Domain(*self.parts, *other.parts)

    def __or__(self, other: Domain) -> Domain:
        def nearest(x: Array) -> Array:
            return jnp.maximum(self.distances(x).min(-1), other.distances(x).min(-1))

        return Domain(nearest)

    def feasible_like(self, prototype: Any) -> Any:
        """NumPyro's for a first value, which a domain does not know."""
        raise NotImplementedError("A Domain is for observed data: it does not know a point inside.")

    def tree_flatten(self) -> Any:
        """For JAX: functions are no arrays."""
        return (), ((), {"parts": self.parts})

    def eq(self, other: object, static: bool = False) -> bool:
        """Whether it is of the same functions."""
        return isinstance(other, Domain) and self.parts == other.parts


def ball(radius: Any = 1.0, centre: Any = 0.0) -> Domain:
    """The points at most `radius` from `centre`, a number or (d,)."""

    def distance(x: Array) -> Array:
        y = x - jnp.asarray(centre)
        return radius - _root(jnp.sum(y**2, axis=-1))

    return Domain(distance)


def polygon(vertices: Any) -> Domain:
    """The inside of a polygon in the plane, convex or not, with vertices (K, 2) in order, either way round.

    Raises:
        ValueError: for fewer than three vertices, another shape, or sides that cross.
    """
    v = np.asarray(vertices, float)
    if v.ndim != 2 or v.shape[1:] != (2,) or len(v) < 3:
        raise ValueError(f"polygon needs vertices of shape (K, 2) with K of at least 3, got {v.shape}.")
    side = np.roll(v, -1, axis=0) - v
    if not np.isfinite(v).all() or (side == 0).all(-1).any():
        raise ValueError("polygon needs vertices that are finite, none twice in a row.")
    if pair := _crossing(v, side):
        raise ValueError(f"The sides of the polygon from vertices {pair[0]} and {pair[1]} cross: give them in order.")

    def distance(x: Array) -> Array:
        start, along = jnp.asarray(v, x.dtype), jnp.asarray(side, x.dtype)
        y = x[..., None, :] - start
        t = jnp.clip(jnp.sum(y * along, -1) / jnp.sum(along**2, -1), 0.0, 1.0)
        squared = jnp.sum((y - t[..., None] * along) ** 2, -1).min(-1)
        # A ray from x to the right meets the boundary an odd number of times if x is inside.
        above, next_above = y[..., 1] < 0, jnp.roll(y[..., 1], -1, axis=-1) < 0
        meets = (above != next_above) & ((_cross(along, y) > 0) == (along[..., 1] > 0))
        inside = jnp.sum(meets, -1) % 2 == 1
        length = _root(squared)
        return jnp.where(inside, length, -length)

    return Domain(distance)


def _root(squared: Array) -> Array:
    """The square root, with a slope at 0."""
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def _cross(a: Any, b: Any) -> Any:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _crossing(v: np.ndarray, side: np.ndarray) -> tuple[int, int] | None:
    """Two sides that cross, if there are any."""
    end = v + side
    for i in range(len(v)):
        for j in range(i + 2, len(v) - (i == 0)):
            apart = _cross(side[i], v[j] - v[i]) * _cross(side[i], end[j] - v[i])
            if apart < 0 and _cross(side[j], v[i] - v[j]) * _cross(side[j], end[i] - v[j]) < 0:
                return i, j
    return None


class _FlatSimplex(constraints.ParameterFreeConstraint):
    """Compositions as points of a plane, where NumPyro's simplex is taken as a part of the sphere."""

    event_dim = 1

    def __repr__(self) -> str:
        return "flat_simplex"

    def __call__(self, x: Any) -> Any:
        return constraints.simplex(x)

    def feasible_like(self, prototype: Any) -> Any:
        return constraints.simplex.feasible_like(prototype)


flat_simplex = _FlatSimplex()
"""The simplex with the metric of the plane that it lies in, as the support of compositions."""


def _l1_distance(x: Array) -> Array:
    return (1 - jnp.sum(jnp.abs(x), axis=-1)) / np.sqrt(x.shape[-1])


def domain_of(constraint: constraints.Constraint) -> Domain | None:
    """The domain that a constraint is, if it is one; NumPyro's ball of the 1-norm is."""
    if isinstance(constraint, type(constraints.l1_ball)):
        return Domain(_l1_distance)
    return constraint if isinstance(constraint, Domain) else None
