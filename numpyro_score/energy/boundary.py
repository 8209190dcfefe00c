"""The data beside their boundary: how far they are, and what a weight is when they are moved there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.energy.domains import domain_of
from numpyro_score.energy.supports import (
    SIMPLICES,
    Block,
    BoundaryWeight,
    RowWeight,
    base_constraint,
    row_weight,
)

__all__ = ["distances_to_boundary", "order_of_weight", "slopes_of_domains", "weight_at_boundary"]

_MOST = 64  # columns of a box, or shares, or parts of a boundary that are looked at
_STEPS = 20  # of Newton's method towards a part of a boundary


def weight_at_boundary(
    blocks: Sequence[Block],
    supports: Sequence[constraints.Constraint],
    weight: RowWeight,
    x: Float[Array, "n d"],
    lower: Float[Array, "n d"],
    upper: Float[Array, "n d"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest weight of rows moved to the boundary, and the mean weight of the rows themselves.

    Rows are moved to one bound, share or part at a time; those that leave the support on the way do not count. Both
    are zero where there is no boundary.
    """
    found = [(jnp.zeros(()), jnp.zeros(()))]
    for block, support in zip(blocks, supports, strict=True):
        y, low, high = (v[:, block.start : block.stop] for v in (x, lower, upper))
        if block.kind == "box":
            found.append(_of_box(y, low, high, weight))
        elif block.kind in SIMPLICES:
            found.append(_of_simplex(y.reshape(-1, block.size), weight, roots=block.kind == "simplex"))
        elif (domain := domain_of(base_constraint(support))) is not None:
            found.append(_of_domain(y.reshape(-1, block.size), domain.distances, weight))
    highest, mean = (jnp.stack(v) for v in zip(*found, strict=True))
    worst = jnp.argmax(highest / jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))
    return highest[worst], mean[worst]


def _of_box(x: Array, lower: Array, upper: Array, weight: RowWeight) -> tuple[Array, Array]:
    def at(z: Array) -> Array:
        return row_weight(weight, jnp.minimum(z - lower, upper - z), z)

    nearer = jnp.where(x - lower <= upper - x, lower, upper)

    def moved(j: Array) -> Array:
        z = jnp.where(jnp.arange(x.shape[1]) == j, nearer, x)
        return jnp.where(jnp.isfinite(nearer[:, j]), at(jnp.where(jnp.isfinite(z), z, x)), 0.0)

    return jnp.max(jax.vmap(moved)(jnp.arange(x.shape[1])[:_MOST])), jnp.mean(at(x))


def _of_simplex(x: Array, weight: RowWeight, roots: bool) -> tuple[Array, Array]:
    shares = x**2 if roots else x

    def moved(j: Array) -> Array:
        z = jnp.where(jnp.arange(x.shape[1]) == j, 0.0, shares)
        z = z / z.sum(-1, keepdims=True)
        return row_weight(weight, z, z)

    return jnp.max(jax.vmap(moved)(jnp.arange(x.shape[1])[:_MOST])), jnp.mean(row_weight(weight, shares, shares))


def _of_domain(x: Array, distances: Callable[[Array], Array], weight: RowWeight) -> tuple[Array, Array]:
    here = distances(x)
    size = jnp.mean(jnp.abs(here), axis=0)  # (K,)

    def moved(k: Array) -> Array:
        def step(z: Array, _: None) -> tuple[Array, None]:
            value, pull = jax.vjp(lambda z: distances(z)[:, k], z)
            slope = pull(jnp.ones_like(value))[0]
            square = jnp.sum(slope**2, -1)
            return z - (value / jnp.where(square > 0, square, jnp.inf))[:, None] * slope, None

        z, _ = jax.lax.scan(step, x, None, length=_STEPS)
        at = distances(z)
        there = (jnp.abs(at[:, k]) <= 1e-4 * size[k]) & (at >= -1e-4 * size).all(-1)
        return jnp.where(there, row_weight(weight, jnp.maximum(at, 0.0), z), 0.0)

    return jnp.max(jax.vmap(moved)(jnp.arange(here.shape[1])[:_MOST])), jnp.mean(row_weight(weight, here, x))


def distances_to_boundary(
    blocks: Sequence[Block],
    supports: Sequence[constraints.Constraint],
    x: Float[Array, "n d"],
    lower: Float[Array, "n d"],
    upper: Float[Array, "n d"],
) -> Float[Array, "n k"]:
    """Of bounded numbers to their nearest bound, the shares of a flat simplex, and the distances to parts of a domain.

    Spheres have no boundary, and on a simplex with x = z² densities have no pole that the weight is too large for.
    """
    found = [jnp.zeros((len(x), 0))]
    for block, support in zip(blocks, supports, strict=True):
        y, low, high = (v[:, block.start : block.stop] for v in (x, lower, upper))
        if block.kind == "box":
            found.append(jnp.minimum(y - low, high - y))
        elif block.kind == "flat simplex":
            found.append(y)
        elif (domain := domain_of(base_constraint(support))) is not None:
            found.append(domain.distances(y.reshape(len(x), -1, block.size)).reshape(len(x), -1))
    return jnp.concatenate(found, axis=1)


def order_of_weight(
    weight: BoundaryWeight, distances: Float[Array, "k"], x: Float[Array, "d"], k: int
) -> Float[Array, ""]:
    """The power as which the weight of a point falls with its k-th distance, where that is small beside any cap."""
    near = [distances.at[k].multiply(small) for small in (1e-6, 1e-9)]
    if isinstance(weight, RowWeight):
        far, close = (weight.h(d[None], x[None])[0] for d in near)
    else:
        far, close = (weight(d[k]) for d in near)
    return jnp.log(far / close) / jnp.log(1e3)


def slopes_of_domains(
    sites: Sequence[tuple[str, Block, constraints.Constraint]], x: Float[Array, "n d"]
) -> dict[str, Float[Array, "k"]]:
    """The largest slope at rows of each function of the domains of sites, by the site's name."""
    found = {}
    for name, block, support in sites:
        if (domain := domain_of(base_constraint(support))) is not None:
            y = x[:, block.start : block.stop].reshape(-1, block.size)
            slope = jax.vmap(jax.jacrev(domain.distances))(y)
            found[name] = jnp.abs(slope).max(axis=(0, 2))
    return found
