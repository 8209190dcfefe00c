"""Draws in the place of missing cells, near the law of the data, with weights that make up for the difference.

Numbers with bounds are mapped to the real line first, by a logarithm or a logit; so are angles, which are numbers
between −π and π. Integers k are taken as the real numbers between k and k + 1: a draw there stands for k, and weighted
sums over such draws are those over the integers. In these coordinates one normal law describes all columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score import random
from numpyro_score.energy import Energy

__all__ = ["Draws", "Moments", "draw", "moments", "typical_rows"]

_FREEDOM = 5  # degrees of freedom of the law that draws are from, whose tails are heavier than most densities'
_LEAST = 0.02  # eigenvalue of the correlations: columns that are nearly the same are drawn wider than they are
_NEAREST = 1e-3  # to a bound, of the column's mean distance or of the interval: nearer ones count as that near
_FARTHEST = 15.0  # from the mean on the line of numbers with bounds, so that no power of a draw is infinite


class Moments(NamedTuple):
    """Of all columns on the line: `mean` (D,) and `covariance` (D, D)."""

    mean: Float[Array, "d"]
    covariance: Float[Array, "d d"]


class Draws(NamedTuple):
    """Rows with draws in the place of missing cells.

    Attributes:
        points: (K, N, D).
        log_weights: (K, N); −∞ for points that stand for none.
        exact: rows whose points are all that there are, (N,), so that weighted sums are exact.
    """

    points: Float[Array, "k n d"]
    log_weights: Float[Array, "k n"]
    exact: Bool[Array, "n"]


def moments(energy: Energy) -> Moments:
    """Mean and covariance on the line of the cells that were seen, pair by pair, made positive definite.

    They are constants to a gradient.
    """
    return _moments(_to_line(_as_reals(energy, _counted(energy)), *_bounds(energy)))


def draw(energy: Energy, rng_key: Array, known: Moments, num_draws: int) -> Draws:
    """K points for each row of the energy's data, whose missing cells are NaN.

    They are in pairs about the mean that missing cells have given the others in a normal law, from a Student law with
    that mean and covariance. Where all missing cells of a row are integers which together take at most K values, the
    points are these values.
    """
    x, (low, high) = energy.data, _bounds(energy)
    missing, whole = jnp.isnan(x), _is_integer(energy)
    u, log_q = _draw_on_line(rng_key, _to_line(_as_reals(energy, x), low, high), known, num_draws)
    bounded = jnp.isfinite(low) | jnp.isfinite(high)
    u = jnp.where(bounded, jnp.clip(u, known.mean - _FARTHEST, known.mean + _FARTHEST), u)
    points, log_slope = _from_line(u, low, high)
    log_weights = jnp.sum(jnp.where(missing, log_slope, 0.0), axis=-1) - log_q - math.log(num_draws)
    points = jnp.where(whole, jnp.clip(jnp.floor(points), low, high - 1), points)
    values, used, few = _all_values(missing, whole, low, high, num_draws)
    points = jnp.where(few[:, None] & missing, values, points)
    log_weights = jnp.where(few, jnp.where(used, 0.0, -jnp.inf), log_weights)
    return jax.lax.stop_gradient(Draws(jnp.where(missing, points, x), log_weights, few))


def typical_rows(energy: Energy) -> Float[Array, "n d"]:
    """The data with the cell of the column nearest to its mean in the place of missing ones, (N, D).

    Of rows of some weight, and of cells inside of their support.
    """
    x, (low, high) = _counted(energy), _bounds(energy)
    inside = (x >= low) & (x <= high) & (~_is_integer(energy) | (x == jnp.round(x)))
    away = jnp.where(inside, jnp.abs(x - jnp.nanmean(x, axis=0)), jnp.inf)
    typical = jnp.take_along_axis(x, jnp.argmin(away, axis=0)[None], axis=0)
    x = energy.data
    return jnp.where(jnp.isnan(x), jnp.clip(typical, *energy.bounds(len(x))), x)


def _counted(energy: Energy) -> Float[Array, "n d"]:
    """The data, NaN in rows of weight zero."""
    x, weights = energy.data_and_weights()
    return jnp.where(weights[:, None] != 0, x, jnp.nan)


def _is_integer(energy: Energy) -> Bool[np.ndarray, "d"]:
    return np.isin(np.arange(energy.dim), energy.discrete_columns)


def _bounds(energy: Energy) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Between which real numbers each cell is: of integers up to one above the largest."""
    low, high = energy.bounds(energy.num_rows)
    angle = np.isin(np.arange(energy.dim), energy.angle_columns)
    return jnp.where(angle, -math.pi, low), jnp.where(angle, math.pi, high + _is_integer(energy))


def _as_reals(energy: Energy, x: Array) -> Array:
    return x + 0.5 * _is_integer(energy)


def _to_line(x: Float[Array, "n d"], low: Float[Array, "n d"], high: Float[Array, "n d"]) -> Float[Array, "n d"]:
    above, below = jnp.isfinite(low), jnp.isfinite(high)
    share = jnp.clip((x - low) / (high - low), _NEAREST, 1 - _NEAREST)
    distance = jnp.where(above, x - low, high - x)
    typical = jnp.nanmean(jnp.where(above ^ below, distance, 1.0), axis=0)
    distance = jnp.maximum(distance, _NEAREST * jnp.where(typical > 0, typical, 1.0))
    on_line = jnp.where(above & below, jax.scipy.special.logit(share), jnp.log(distance))
    return jnp.where(above | below, on_line, x)


def _from_line(u: Float[Array, "k n d"], low: Float[Array, "n d"], high: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Numbers between the bounds, and the logarithms of how fast each moves with its coordinate."""
    above, below = jnp.isfinite(low), jnp.isfinite(high)
    eps = jnp.finfo(u.dtype).eps
    share, width = jnp.clip(jax.nn.sigmoid(u), eps, 1 - eps), jnp.where(above & below, high - low, 1.0)
    between, at_ends = low + width * share, jnp.log(width) + jax.nn.log_sigmoid(u) + jax.nn.log_sigmoid(-u)
    one_sided = jnp.where(above, low + jnp.exp(u), high - jnp.exp(u))
    x = jnp.where(above & below, between, jnp.where(above | below, one_sided, u))
    return x, jnp.where(above & below, at_ends, jnp.where(above | below, u, 0.0))


@jax.jit
def _moments(u: Float[Array, "n d"]) -> Moments:
    seen = ~jnp.isnan(u)
    count = jnp.maximum(jnp.sum(seen, axis=0), 1)
    mean = jnp.sum(jnp.where(seen, u, 0.0), axis=0) / count
    away = jnp.where(seen, u - mean, 0.0)
    scale = jnp.sqrt(jnp.sum(away**2, axis=0) / count)
    scale = jnp.where(scale > 0, scale, 1.0)
    z, pairs = away / scale, seen.astype(u.dtype)
    # Pairs of their own rows each need not have correlations that go together.
    values, axes = jnp.linalg.eigh(z.T @ z / jnp.maximum(pairs.T @ pairs, 1))
    correlation = (axes * jnp.maximum(values, _LEAST)) @ axes.T
    return jax.lax.stop_gradient(Moments(mean, correlation * scale * scale[:, None]))


def _draw_on_line(
    rng_key: Array, u: Float[Array, "n d"], known: Moments, num_draws: int
) -> tuple[Float[Array, "k n d"], Float[Array, "k n"]]:
    """Rows with Student draws in the place of NaN, and their log density."""
    missing, (mean, covariance) = jnp.isnan(u), known

    def conditional(row: Array, m: Array) -> tuple[Array, Array]:
        eye = jnp.eye(len(row), dtype=row.dtype)
        of_seen = jnp.where(m[:, None] | m, eye, covariance)
        across = jnp.where(m[:, None] & ~m, covariance, 0.0)
        slopes = jax.scipy.linalg.solve(of_seen, across.T, assume_a="pos").T
        centre = mean + slopes @ jnp.where(m, 0.0, row - mean)
        spread = jnp.where(m[:, None] & m, covariance - slopes @ across.T, eye)
        return jnp.where(m, centre, row), jnp.linalg.cholesky(spread)

    centre, root = jax.vmap(conditional)(u, missing)
    normal_key, scale_key = jax.random.split(rng_key)
    half = num_draws // 2
    z = random.normal(normal_key, (half, *u.shape), u.dtype)
    scale = jnp.mean(random.normal(scale_key, (half, len(u), _FREEDOM), u.dtype) ** 2, axis=-1, keepdims=True)
    z = jnp.where(missing, z / jnp.sqrt(scale), 0.0)
    z = jnp.concatenate([z, -z])
    log_q = -0.5 * (_FREEDOM + missing.sum(axis=1)) * jnp.log1p(jnp.sum(z**2, axis=-1) / _FREEDOM)
    return centre + jnp.einsum("nij,knj->kni", root, z), log_q


def _all_values(
    missing: Bool[Array, "n d"], whole: Bool[np.ndarray, "d"], low: Array, high: Array, num: int
) -> tuple[Float[Array, "k n d"], Bool[Array, "k n"], Bool[Array, "n"]]:
    """The values of a row's missing integers, counted through: points, which of K there are, and if they are all."""
    sizes = jnp.where(missing, jnp.where(whole, jnp.minimum(high - low, num + 1.0), num + 1.0), 1.0)
    strides = jnp.minimum(jnp.cumprod(sizes, axis=1), num + 1.0)
    strides = jnp.concatenate([jnp.ones_like(strides[:, :1]), strides], axis=1)
    index = jnp.arange(num, dtype=low.dtype)[:, None]
    values = low + jnp.mod(jnp.floor(index[..., None] / strides[:, :-1]), sizes)
    return values, index < strides[:, -1], strides[:, -1] <= num
