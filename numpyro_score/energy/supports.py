"""Where data live, and what score matching becomes there.

On R^D the Hyvärinen objective is E[½‖s‖² + tr ∇s]. On a manifold with a weight h that vanishes at the boundary it is
E[½ h‖∇f‖² + div(h ∇f)], with the gradient and divergence of the manifold. Both are the same formula in a *frame*, a
symmetric matrix A(x) and a drift b(x):

    ½‖A s‖² + tr(A ∇s A) + b·s.

| data | A | b | source |
|---|---|---|---|
| real, and angles | I | 0 | Hyvärinen 2005 |
| bounded, coordinate by coordinate | diag √h_j | h_j' | Hyvärinen 2007; Yu, Drton & Shojaie 2019 |
| unit sphere in R^d | P = I − xxᵀ | −(d−1) x | Mardia, Kent & Laha 2016 |
| simplex, as z = √x on the sphere | √h P | P∇h − (d−1) h z | Scealy & Wood 2022 |
| simplex in its plane | √h P with P = I − 11ᵀ/d | P∇h | |
| region of R^d, and bounds with one weight for all | √h I | ∇h | Liu, Kanamori & Williams 2022 |

Other supports are mapped to the real line first, by NumPyro's `biject_to`, with the log Jacobian added to f.

Discrete data have no gradient; what takes its place is in `energy/discrete.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints

from numpyro_score.energy.domains import domain_of, flat_simplex
from numpyro_score.operators import Frame

Shape = tuple[int, ...]


class RowWeight(NamedTuple):
    """A weight h of whole points, where a boundary weight by default is a function of one distance.

    For data with several bounds, e.g. the product `RowWeight(lambda distances, x: jnp.minimum(distances, 1).prod(-1))`.
    It must be zero wherever one of the distances is, positive inside, and continuous, or the estimates are biased. A
    fit moves rows to the boundary to see whether it is zero there, and refuses one that is not.

    Attributes:
        h: from distances (..., k) and points (..., d) to (...), written with `jax.numpy`. The distances are those of
            each number to its nearest bound, infinite where it has none (k = d); the shares of a composition (k = d);
            and those to each part of a `Domain`.
    """

    h: Callable[[Array, Array], Array]


BoundaryWeight = Callable[[Array], Array] | RowWeight

DISCRETE = ("binary", "levels", "counts")
"""The kinds of discrete support: 0 and 1, the integers of an interval, and all integers from a least one on."""

FLAT = ("real", "circle", "other")
"""The kinds whose coordinates fill R^D: angles go on over the ends of their interval, with the period of a density."""

SIMPLICES = ("simplex", "flat simplex")
"""The kinds of support of compositions, by their metric."""


class Support(NamedTuple):
    """The support of one array of data: static and hashable."""

    kind: str  # "real", "circle", "box", "sphere", "simplex", "flat simplex", "domain", "other" or DISCRETE
    constraint: constraints.Constraint | None = None  # of the kind "other"
    size: int | None = None  # the most values that a number of finite discrete data has; None if not known
    dtype: str | None = None  # of discrete data, as the model sees them, unless they are floats

    @classmethod
    def of(cls, constraint: constraints.Constraint, dtype: str | None = None) -> Support:
        """Sorts a constraint into one of the kinds."""
        base = base_constraint(constraint)
        if base.is_discrete:
            return cls._of_discrete(base, dtype)
        if isinstance(base, type(constraints.real)):
            return cls("real")
        if isinstance(base, type(constraints.circular)):
            return cls("circle")
        if hasattr(base, "lower_bound") or hasattr(base, "upper_bound"):
            return cls("box")
        if isinstance(base, type(constraints.sphere)):
            return cls("sphere")
        if isinstance(base, type(constraints.simplex)):
            return cls("simplex")
        if isinstance(base, type(flat_simplex)):
            return cls("flat simplex")
        if domain_of(base) is not None:
            return cls("domain")
        biject_to(constraint)  # raises NotImplementedError
        return cls("other", constraint)

    @classmethod
    def _of_discrete(cls, base: constraints.Constraint, dtype: str | None) -> Support:
        if isinstance(base, type(constraints.boolean)):
            return cls("binary", size=2, dtype=dtype)
        if base.event_dim or not hasattr(base, "lower_bound"):  # a multinomial: no number changes alone
            raise NotImplementedError
        if not hasattr(base, "upper_bound"):
            return cls("counts", dtype=dtype)
        bounds = base.lower_bound, base.upper_bound
        known = not any(isinstance(b, jax.core.Tracer) for b in bounds)
        return cls("levels", size=int(np.max(np.subtract(*bounds[::-1]))) + 1 if known else None, dtype=dtype)

    @property
    def is_discrete(self) -> bool:
        """Whether the data are integers."""
        return self.kind in DISCRETE

    @property
    def has_bounds(self) -> bool:
        """Whether each number has a least or a largest value."""
        return self.kind == "box" or self.is_discrete

    @property
    def has_boundary(self) -> bool:
        """Whether a site of it says where data can be, in values of its own."""
        return self.has_bounds or self.kind == "domain"

    def coordinate_shape(self, shape: Shape) -> Shape:
        """The shape of the coordinates of data of the given shape."""
        return shape if self.constraint is None else tuple(biject_to(self.constraint).inverse_shape(shape))

    def to_coordinates(self, value: Array) -> Array:
        """Data to coordinates."""
        if self.kind == "simplex":
            return jnp.sqrt(value)
        if self.kind == "sphere":  # data of less precision than the computation has are not quite on it
            return value / jnp.linalg.norm(value, axis=-1, keepdims=True)
        return value if self.constraint is None else biject_to(self.constraint).inv(value)

    def to_data(self, coordinates: Array) -> Array:
        """Coordinates to data."""
        if self.kind == "simplex":
            return coordinates**2
        if self.kind == "circle":
            return wrap_angle(coordinates)
        if self.dtype is not None:
            return coordinates.astype(self.dtype)
        return coordinates if self.constraint is None else biject_to(self.constraint)(coordinates)

    def log_jacobian(self, coordinates: Array, data: Array) -> Array | None:
        """What the change of coordinates adds to the log density, by batch element; None for nothing."""
        if self.kind == "simplex":  # the uniform law on the sphere is Dirichlet(½, ..., ½)
            return jnp.sum(jnp.log(coordinates), axis=-1)
        if self.constraint is None:
            return None
        return biject_to(self.constraint).log_abs_det_jacobian(coordinates, data)


@jax.jit  # under whose name `energy/kinks.py` knows it
def wrap_angle(x: Array) -> Array:
    """The angle in [−π, π), with derivative one everywhere."""
    return x - 2 * math.pi * jnp.floor((x + math.pi) / (2 * math.pi))


def base_constraint(constraint: constraints.Constraint) -> constraints.Constraint:
    """A constraint without the dimensions that make it one of vectors."""
    while isinstance(constraint, constraints.independent):  # real_vector is independent(real, 1)
        constraint = constraint.base_constraint
    return constraint


def base_law(law: dist.Distribution) -> dist.Distribution:
    """A distribution without what only shapes it, as `to_event` and `expand` do."""
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    return law


def innermost(law: dist.Distribution) -> dist.Distribution:
    """A distribution without what wraps it, as `to_event`, `expand` and transforms do."""
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law


def limits(constraint: constraints.Constraint) -> tuple[Any, Any]:
    """Lower and upper bound, which broadcast to the data; infinite where there is none."""
    base = base_constraint(constraint)
    if isinstance(base, type(constraints.boolean)):
        return 0, 1
    return getattr(base, "lower_bound", -jnp.inf), getattr(base, "upper_bound", jnp.inf)


class Block(NamedTuple):
    """Columns of the rows that belong to one array of data."""

    kind: str
    start: int
    stop: int
    size: int  # of one sphere or simplex


def capped_distance(distance: Array) -> Array:
    """The default weight h: the distance to the boundary, at most 1 [Yu, Drton & Shojaie 2019]."""
    return jnp.minimum(distance, 1.0)


def make_frame(
    blocks: Sequence[Block],
    supports: Sequence[constraints.Constraint],
    x: Array,
    lower: Array,
    upper: Array,
    weight: BoundaryWeight | None,
) -> Frame:
    """The frame at rows x (N, D) of blocks with supports, and bounds that broadcast to the rows."""
    weight = capped_distance if weight is None else weight
    maps, drifts = [], []
    for block, support in zip(blocks, supports, strict=True):
        columns = slice(block.start, block.stop)
        apply, drift = _block_frame(block, support, x[:, columns], lower[:, columns], upper[:, columns], weight)
        maps.append((columns, apply))
        drifts.append(drift)

    def apply_all(v: Array) -> Array:
        return jnp.concatenate([apply(v[..., columns]) for columns, apply in maps], axis=-1)

    return Frame(apply_all, jnp.concatenate(drifts, axis=-1))


def _block_frame(
    block: Block, support: constraints.Constraint, x: Array, lower: Array, upper: Array, weight: BoundaryWeight
) -> tuple[Callable[[Array], Array], Array]:
    if block.kind == "box":
        if not isinstance(weight, RowWeight):
            return _box(x, lower, upper, weight)
        return _region(x, x.shape[-1], lambda x: jnp.minimum(x - lower[:, None], upper[:, None] - x), weight)
    if block.kind in ("sphere", "simplex"):
        return _sphere(x, block.size, weight if block.kind == "simplex" else None)
    if block.kind == "flat simplex":
        scale = math.sqrt(block.size / (block.size - 1))  # the distance of x from the face x_j = 0 is x_j times it
        return _region(x, block.size, lambda x: x, weight, lambda v: v - v.mean(-1, keepdims=True), scale)
    if block.kind == "domain" and (domain := domain_of(base_constraint(support))):
        return _region(x, block.size, domain.distances, weight)
    return lambda v: v, jnp.zeros_like(x)


def _box(
    x: Array, lower: Array, upper: Array, weight: Callable[[Array], Array]
) -> tuple[Callable[[Array], Array], Array]:
    bounded = jnp.isfinite(lower) | jnp.isfinite(upper)

    def h(x: Array) -> Array:
        distance = jnp.minimum(x - lower, upper - x)
        return jnp.where(bounded, weight(jnp.where(bounded, distance, 1.0)), 1.0)

    value, slope = jax.jvp(h, (x,), (jnp.ones_like(x),))  # elementwise
    root = jnp.sqrt(value)
    return lambda v: root * v, slope


def _region(
    x: Array,
    size: int,
    distances: Callable[[Array], Array],
    weight: BoundaryWeight,
    project: Callable[[Array], Array] = lambda v: v,
    scale: float = 1.0,
) -> tuple[Callable[[Array], Array], Array]:
    """Points of `size` numbers in R^d or, by `project`, in a plane of it, with one weight each."""

    def h(z: Array) -> Array:
        if isinstance(weight, RowWeight):
            return row_weight(weight, distances(z), z)
        return weight(scale * distances(z).min(-1))

    value, slope = _value_and_slope(h, x.reshape(len(x), -1, size))
    root = jnp.sqrt(jnp.maximum(value, 0.0))[..., None]  # points on the boundary may be outside by rounding

    def apply(v: Array) -> Array:
        return (root * project(v.reshape(*v.shape[:-1], -1, size))).reshape(v.shape)

    return apply, project(slope).reshape(x.shape)


def row_weight(weight: RowWeight, distances: Array, x: Array) -> Array:
    """The weight of points (..., d) with distances (..., k), (...)."""
    value = weight.h(distances, x)
    if jnp.shape(value) != x.shape[:-1]:
        raise ValueError(
            f"A RowWeight gave shape {jnp.shape(value)} for points of shape {x.shape}: return one number for each "
            f"point, {x.shape[:-1]}."
        )
    return value


def _value_and_slope(h: Callable[[Array], Array], z: Array) -> tuple[Array, Array]:
    """The weight of points (..., d) and its gradient at each."""
    value, pull = jax.vjp(h, z)
    return value, pull(jnp.ones_like(value))[0]


def _sphere(x: Array, size: int, weight: BoundaryWeight | None) -> tuple[Callable[[Array], Array], Array]:
    z = x.reshape(-1, x.shape[-1] // size, size)

    def project(v: Array) -> Array:
        return v - z * jnp.sum(z * v, axis=-1, keepdims=True)

    if weight is None:
        h, slope = jnp.ones_like(z[..., :1]), jnp.zeros_like(z)
    elif isinstance(weight, RowWeight):
        h, slope = _value_and_slope(lambda z: row_weight(weight, z**2, z**2), z)
        h = h[..., None]
    else:
        # By index, not as the gradient of a minimum: compiled, √x squared may differ from itself in the last digit, and
        # the gradient would be lost with the comparison.
        nearest = jnp.argmin(z, axis=-1, keepdims=True)
        least = jnp.take_along_axis(z, nearest, axis=-1)
        h, along = jax.jvp(lambda y: weight(y**2), (least,), (jnp.ones_like(least),))
        slope = along * (jnp.arange(size) == nearest)
    root, drift = jnp.sqrt(h), project(slope) - (size - 1) * h * z

    def apply(v: Array) -> Array:
        return (root * project(v.reshape(*v.shape[:-1], -1, size))).reshape(v.shape)

    return apply, drift.reshape(x.shape)


def distances(supports: Iterable[constraints.Constraint], blocks: Sequence[Block], x: Array) -> list[Array]:
    """Of rows x (N, D) to the boundaries of the domains among the supports."""
    pairs = ((domain_of(base_constraint(s)), block) for s, block in zip(supports, blocks, strict=True))
    return [d.distances(x[:, b.start : b.stop].reshape(len(x), -1, b.size)) for d, b in pairs if d is not None]


def row_width(support: Support, shape: Shape, row_axes: Shape) -> int:
    """The coordinates that an array adds to each row."""
    coordinates = support.coordinate_shape(shape)
    return math.prod(s for i, s in enumerate(coordinates) if i not in row_axes)


def outside(kind: str, value: Any, constraint: constraints.Constraint) -> Array:
    """Which elements of the data, of its batch shape, are not in the support."""
    if kind in ("sphere", *SIMPLICES):  # NumPyro's tolerance is for one precision
        total = jnp.sum(value**2 if kind == "sphere" else value, axis=-1)
        wrong = jnp.abs(total - 1) > 1e-4
        return wrong if kind == "sphere" else wrong | jnp.any(value < 0, axis=-1)
    domain = domain_of(base_constraint(constraint))
    return ~(constraint if domain is None else domain)(value)
