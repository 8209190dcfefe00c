"""The maximum mean discrepancy of two sets of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.divergences.estimates import Divergence
from numpyro_score.divergences.kernels import KernelName, check_kernel, profile
from numpyro_score.divergences.law import draw, read_pair, refuse_weights, thin, weighted
from numpyro_score.divergences.pairs import PairSums, median_distance, pair_sums
from numpyro_score.losses.base import positive
from numpyro_score.random import Key, as_key

__all__ = ["mmd"]

Kernel = Callable[[tuple[Array, ...], tuple[Array, ...]], Array]


def mmd(
    p: Any,
    q: Any,
    rng_key: Key | None = None,
    *,
    bandwidth: float | None = None,
    kernel: KernelName = "gaussian",
    weights_p: Any = None,
    weights_q: Any = None,
    num_samples: int = 4000,
) -> Divergence:
    r"""The squared maximum mean discrepancy, :math:`E\,k(x,x') + E\,k(y,y') - 2 E\,k(x,y)`, x, x' from p, y, y' from q.

    k is by default the Gaussian kernel exp(−‖x − y‖²/(2ℓ²)), for which it is zero if and only if p is q [Gretton et
    al. 2012, eq. 3]. It needs rows alone. Unbiased at a given bandwidth, for independent rows, and so negative at
    times; the chains of draws from `sample` are thinned until their rows all but are independent. The standard error
    has the terms of first and second order of Hoeffding's decomposition; where p is q it is too large, by less than √2,
    and the law of the value is not normal, so that value and error make no test.

    Costs (N + M)² kernels; the matrix of pairs is never held. Rows are in the coordinates of
    :meth:`~numpyro_score.Energy.flatten`.

    Args:
        p: rows of data, an energy, a fit, a distribution, or a pair (law, draws) as in
            :func:`~numpyro_score.fisher_divergence`.
        q: the same.
        rng_key: a key, where draws are needed.
        bandwidth: ℓ; the median distance between rows of both if not given, :func:`~numpyro_score.median_distance`.
        kernel: "gaussian", or "imq", (1 + ‖x − y‖²/ℓ²)^{-1/2}, which sees more of far rows.
        weights_p: weights of rows p that are given, (N,), as of importance or of a survey: they stand for the law of
            density w times theirs. Means of pairs are then weighted, ratios of two sums, and unbiased for many rows.
        weights_q: likewise of q, (M,).
        num_samples: how many draws of a law, before thinning.

    Raises:
        TypeError, ValueError: laws of different data; fewer than two rows of one; NaN or infinity, with the rows; no
            key where one is needed; weights of another shape, negative, or of what is no rows.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import mmd
        >>> found = mmd(dist.Normal(0, 1), dist.Normal(1, 1), jax.random.key(0), bandwidth=1.0, num_samples=2000)
        >>> abs(found.value - 2 * 3**-0.5 * (1 - 2.718281828 ** (-1 / 6))) < 5 * found.stderr < 0.1
        True
    """
    check_kernel("mmd", kernel)
    if bandwidth is not None:
        positive("mmd", "bandwidth", bandwidth)
    p, q = read_pair("mmd", p, q, needs="")
    refuse_weights("mmd", "weights_p", p, weights_p)
    refuse_weights("mmd", "weights_q", q, weights_q)
    keys = (None, None) if rng_key is None else jax.random.split(as_key(rng_key))
    x, y = (thin(draw(one, other, key, num_samples)) for one, other, key in ((p, q, keys[0]), (q, p, keys[1])))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"p has rows of {x.shape[1]} numbers and q of {y.shape[1]}: pass rows of the same data.")
    x, of_x = weighted("weights_p", p, x, weights_p)
    y, of_y = weighted("weights_q", q, y, weights_q)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"mmd needs at least two independent rows of each, got {len(x)} and {len(y)}.")
    length = median_distance(jnp.concatenate([x, y])) if bandwidth is None else jnp.asarray(bandwidth, x.dtype)
    if not length > 0:
        raise ValueError("Half of the rows are equal, so that there is no scale: give mmd a bandwidth.")
    if of_x is None and of_y is None:
        value, stderr = mmd_statistic(x, y, length, kernel)
    else:
        of_x, of_y = (jnp.ones(len(r), r.dtype) if w is None else w for r, w in ((x, of_x), (y, of_y)))
        value, stderr = weighted_mmd_statistic(x, y, of_x, of_y, length, kernel)
    sizes = [len(r) if w is None else float(w.sum() ** 2 / (w**2).sum()) for r, w in ((x, of_x), (y, of_y))]
    return Divergence(float(value), float(stderr), float(min(sizes)))


@partial(jax.jit, static_argnames="kernel")
def mmd_statistic(
    x: Float[Array, "n d"], y: Float[Array, "m d"], bandwidth: Float[Array, ""], kernel: str = "gaussian"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The unbiased squared discrepancy of independent rows, and its standard error."""
    a, b, of_rows = (x / bandwidth,), (y / bandwidth,), partial(_of_rows, kernel)
    return _statistic(a, b, of_rows, of_rows, of_rows)


@partial(jax.jit, static_argnames="kernel")
def weighted_mmd_statistic(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    of_x: Float[Array, "n"],
    of_y: Float[Array, "m"],
    bandwidth: Float[Array, ""],
    kernel: str = "gaussian",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same of rows with weights of mean one.

    Each mean of pairs is a ratio R = Σ w w' k / Σ w w', whose error is that of Σ w w' (k − R) / Σ w w'.
    """
    a, b = (x / bandwidth, of_x), (y / bandwidth, of_y)

    def mean(rows: tuple[Array, Array], others: tuple[Array, Array], distinct: bool) -> tuple[Array, Array]:
        sums = pair_sums(partial(_of_weighted_rows, kernel, 0.0, 1.0), rows, others, distinct=distinct)
        pairs = rows[1].sum() * others[1].sum() - (jnp.sum(rows[1] ** 2) if distinct else 0.0)
        count = len(rows[1]) * (len(others[1]) - distinct)
        return sums.values.sum() / pairs, pairs / count

    means = mean(a, a, True), mean(b, b, True), mean(a, b, False)
    value = means[0][0] + means[1][0] - 2 * means[2][0]
    return value, _statistic(a, b, *(partial(_of_weighted_rows, kernel, *m) for m in means))[1]


def _statistic(
    a: tuple[Array, ...], b: tuple[Array, ...], of_xx: Kernel, of_yy: Kernel, of_xy: Kernel
) -> tuple[Array, Array]:
    n, m = len(a[0]), len(b[0])
    xx, yy = pair_sums(of_xx, a, a, distinct=True), pair_sums(of_yy, b, b, distinct=True)
    xy, yx = pair_sums(of_xy, a, b), pair_sums(of_xy, b, a)
    value = _mean(xx, n - 1) + _mean(yy, m - 1) - 2 * _mean(xy, m)

    # First order: variances of E[k(x, ·)] differences. Rows' means over n and m others scatter around these
    # expectations, which adds just twice the terms of second order.
    first = 4 * jnp.var(xx.values / (n - 1) - xy.values / m) / n + 4 * jnp.var(yy.values / (m - 1) - yx.values / n) / m
    second = (
        2 * _interaction(xx, xx, n - 1, n - 1) / n**2
        + 2 * _interaction(yy, yy, m - 1, m - 1) / m**2
        + 4 * _interaction(xy, yx, m, n) / (n * m)
    )
    return value, jnp.sqrt(jnp.maximum(first - second, second))


def _mean(sums: PairSums, others: int) -> Array:
    return jnp.mean(sums.values) / others


def _interaction(rows: PairSums, columns: PairSums, others: int, others_of_columns: int) -> Array:
    """The variance of k(x, y) − E[k | x] − E[k | y]."""
    return jnp.maximum(
        jnp.mean(rows.squares) / others
        - jnp.mean((rows.values / others) ** 2)
        - jnp.mean((columns.values / others_of_columns) ** 2)
        + _mean(rows, others) ** 2,
        0.0,
    )


def _of_weighted_rows(
    kernel: str, centre: Array | float, scale: Array | float, row: tuple[Array, Array], rows: tuple[Array, Array]
) -> Float[Array, "m"]:
    return row[1] * rows[1] * (_of_rows(kernel, row[:1], rows[:1]) - centre) / scale


def _of_rows(kernel: str, row: tuple[Array], rows: tuple[Array]) -> Float[Array, "m"]:
    return profile(kernel, jnp.sum((row[0] - rows[0]) ** 2, axis=-1)).value
