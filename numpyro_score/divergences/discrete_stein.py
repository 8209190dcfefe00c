"""The kernel Stein discrepancy of discrete data."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, log_ratios, num_values
from numpyro_score.operators import full_precision

__all__ = ["DiscreteRows", "discrete_rows", "discrete_stein_kernel"]


class DiscreteRows(NamedTuple):
    """Rows with what the discrete Stein operator needs of them."""

    x: Float[Array, "n d"]  # in units of the spread of counts
    above: Float[Array, "n d"]  # one step higher, of finite data on a cycle
    lower_ratio: Float[Array, "n d"]  # p(x^{d−}) / p(x); 0 where there is no lower value
    has_above: Float[Array, "n d"]  # 1 or 0
    most: Float[Array, "n d"]  # the distance of two values that differ: 1 in finite data, without a bound in counts


@jax.jit
@full_precision
def discrete_rows(energy: Energy, x: Float[Array, "n d"], bandwidth: Float[Array, ""]) -> DiscreteRows:
    """Of rows of p and a law q. Distances are means over numbers, in units of the bandwidth."""
    finite = num_values(energy) is not None
    at = energy.at(x)
    ratios, valid = log_ratios(at, (-1, 1), cycle=finite)
    low, high = at.bounds(len(x))
    above = jnp.where(valid[..., 1], jnp.where(x + 1 > high, low, x + 1), x)
    scale = jnp.where(jnp.isfinite(high), 1.0, jnp.maximum(jnp.std(x, axis=0), 1.0)) * x.shape[1] * bandwidth
    most = jnp.where(jnp.isfinite(high), 1 / (x.shape[1] * bandwidth), jnp.inf)
    lower = jnp.where(valid[..., 0], jnp.exp(ratios[..., 0]), 0.0)
    return DiscreteRows(x / scale, above / scale, lower, valid[..., 1].astype(x.dtype), most)


def discrete_stein_kernel(row: DiscreteRows, rows: DiscreteRows) -> Float[Array, "m"]:
    """H of a row against all."""
    a, b = row, rows

    def distance(x: Array, y: Array) -> Array:
        return jnp.minimum(jnp.abs(x - y), a.most)

    here = distance(a.x, b.x)

    def with_step(moved: Array) -> Array:  # of one number, relative to the kernel of the rows themselves
        return jnp.exp(here - moved)

    terms = (
        a.lower_ratio * b.lower_ratio
        - a.lower_ratio * b.has_above * with_step(distance(a.x, b.above))
        - a.has_above * b.lower_ratio * with_step(distance(a.above, b.x))
        + a.has_above * b.has_above * with_step(distance(a.above, b.above))
    )
    return jnp.exp(-here.sum(-1)) * terms.sum(-1)
