"""The maximum mean discrepancy of two sets of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.divergences.estimates import Divergence
from numpyro_score.divergences.kernels import KernelName, check_kernel, profile
from numpyro_score.divergences.law import draw, read_pair, thin
from numpyro_score.divergences.pairs import PairSums, median_distance, pair_sums
from numpyro_score.losses.base import positive
from numpyro_score.random import Key, as_key

__all__ = ["mmd"]


def mmd(
    p: Any,
    q: Any,
    rng_key: Key | None = None,
    *,
    bandwidth: float | None = None,
    kernel: KernelName = "gaussian",
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
        num_samples: how many draws of a law, before thinning.

    Raises:
        TypeError, ValueError: laws of different data; fewer than two rows of one; NaN or infinity, with the rows; no
            key where one is needed.

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
    keys = (None, None) if rng_key is None else jax.random.split(as_key(rng_key))
    x, y = (thin(draw(one, other, key, num_samples)) for one, other, key in ((p, q, keys[0]), (q, p, keys[1])))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"p has rows of {x.shape[1]} numbers and q of {y.shape[1]}: pass rows of the same data.")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"mmd needs at least two independent rows of each, got {len(x)} and {len(y)}.")
    length = median_distance(jnp.concatenate([x, y])) if bandwidth is None else jnp.asarray(bandwidth, x.dtype)
    if not length > 0:
        raise ValueError("Half of the rows are equal, so that there is no scale: give mmd a bandwidth.")
    value, stderr = map(float, mmd_statistic(x, y, length, kernel))
    return Divergence(value, stderr, float(min(len(x), len(y))))


@partial(jax.jit, static_argnames="kernel")
def mmd_statistic(
    x: Float[Array, "n d"], y: Float[Array, "m d"], bandwidth: Float[Array, ""], kernel: str = "gaussian"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The unbiased squared discrepancy of independent rows, and its standard error."""
    n, m = len(x), len(y)
    a, b, of_rows = (x / bandwidth,), (y / bandwidth,), partial(_of_rows, kernel)
    xx, yy = (pair_sums(of_rows, rows, rows, distinct=True) for rows in (a, b))
    xy, yx = pair_sums(of_rows, a, b), pair_sums(of_rows, b, a)
    within_x, within_y, across = _mean(xx, n - 1), _mean(yy, m - 1), _mean(xy, m)
    value = within_x + within_y - 2 * across

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


def _of_rows(kernel: str, row: tuple[Array], rows: tuple[Array]) -> Float[Array, "m"]:
    return profile(kernel, jnp.sum((row[0] - rows[0]) ** 2, axis=-1)).value
