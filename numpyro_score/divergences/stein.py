"""The kernel Stein discrepancy: do these rows come from that density, whatever its normaliser?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.divergences.discrete_stein import discrete_rows, discrete_stein_kernel
from numpyro_score.divergences.law import check_rows, draw, read_pair, refuse_rows, thin
from numpyro_score.divergences.pairs import median_distance, pair_sums
from numpyro_score.energy import Energy, base_constraint
from numpyro_score.losses.base import at_least_one, positive
from numpyro_score.normaliser.coordinates import from_free, to_free
from numpyro_score.random import Key, as_key

__all__ = ["SteinTest", "closed_sites", "kernel_stein_discrepancy", "stein_kernel", "stein_statistic"]


class SteinTest(NamedTuple):
    """What :func:`~numpyro_score.kernel_stein_discrepancy` returns."""

    value: float  # KSD²
    stderr: float
    pvalue: float  # of the hypothesis that p is q
    num_rows: int  # independent rows of p
    bandwidth: float


def kernel_stein_discrepancy(
    p: Any,
    q: Any,
    rng_key: Key,
    *,
    bandwidth: float | None = None,
    num_samples: int = 4000,
    num_bootstrap: int = 1000,
) -> SteinTest:
    r"""The squared kernel Stein discrepancy of p from q, and a test of the hypothesis that p is q.

    .. math:: \mathrm{KSD}^2 = E_{x,x'\sim p}\, h(x, x'), \quad
              h = s\cdot s'\, k + s\cdot\nabla_{x'} k + s'\cdot\nabla_x k + \mathrm{tr}\,\nabla_x\nabla_{x'} k,

    with s the score of q and the inverse multiquadric kernel k = (1 + ‖x − x'‖²/ℓ²)^{-1/2}, for which the discrepancy
    controls convergence where the tails of q are light enough [Gorham & Mackey 2017; Liu, Lee & Jordan 2016;
    Chwialkowski, Strathmann & Gretton 2016]. It needs the score of q alone and rows of p. Zero if and only if p is q,
    for laws whose scores have second moments.

    The value is the U-statistic, the mean of h over pairs of different rows: unbiased, and so negative at times. Its
    standard error is from the unbiased estimate of the variance of a U-statistic, of both orders [Hoeffding 1948], cut
    off below at the second order alone; where p is q this makes it too large, by less than √2. The p-value is the
    share of wild bootstrap replicates Σ_{i≠j} ε_i ε_j h_ij / (n(n−1)), ε = ±1, that reach the value [Dehling & Mikosch
    1994]. It is right for many rows, and for **independent rows only**: data are taken to be independent, and the
    chains of draws from `sample` are thinned until their rows all but are.

    Scores of separated modes hardly depend on the modes' weights, and neither does the discrepancy. On bounded supports
    and simplices it is taken in the free coordinates of `biject_to`, where the density vanishes at infinity and the
    identity behind it holds; spheres and circles are refused.

    Discrete data have ratios r_d(x) = q(x^{d−})/q(x) in the place of the score, with x^{d±} one step higher or lower in
    number d, on a cycle where values are finite [Yang, Liu, Rao & Neville 2018, whose operator this is there]:

    .. math:: h = \sum_d r_d r'_d\, k(x, x') - r_d\, k(x, x'^{d+}) - r'_d\, k(x^{d+}, x') + k(x^{d+}, x'^{d+}),

    with k the exponential of minus the share of numbers that differ, over ℓ; counts differ by their distance in
    units of the standard deviation.

    Costs N² kernels and N² B products, N rows and B replicates; the matrix of pairs is never held.

    Args:
        p: rows of data, an energy, a fit, a distribution, or a pair (law, draws) as in
            :func:`~numpyro_score.fisher_divergence`.
        q: an energy, a fit or a distribution; only its score is needed.
        rng_key: a key for the bootstrap, and for draws of p.
        bandwidth: ℓ; the median distance between rows of p if not given, and 1 for discrete data.
        num_samples: how many draws of p, before thinning.
        num_bootstrap: B.

    Raises:
        TypeError, ValueError: if q is rows; laws of different data; fewer than four rows; rows out of q's support or on
            its boundary, and scores that are not finite, with the rows.
        NotImplementedError: on spheres and circles, naming the site, and for rows of discrete and continuous numbers.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import kernel_stein_discrepancy
        >>> x = dist.Normal(0.5, 1).sample(jax.random.key(0), (300,))
        >>> kernel_stein_discrepancy(x, dist.Normal(0, 1), jax.random.key(1)).pvalue < 0.01
        True
    """
    owner = "kernel_stein_discrepancy"
    num_bootstrap = at_least_one(owner, "num_bootstrap", num_bootstrap)
    if bandwidth is not None:
        positive(owner, "bandwidth", bandwidth)
    p, q = read_pair(owner, p, q)
    _refuse_closed(q.energy)
    if 0 < len(q.energy.discrete_columns) < q.energy.dim:
        raise NotImplementedError(
            f"{owner} has no kernel for rows of discrete and continuous numbers: test each given the other, by "
            "energies with data='...', the site."
        )
    draw_key, key = jax.random.split(as_key(rng_key))
    rows = thin(draw(p, q, draw_key, num_samples))
    if len(rows) < 4:
        raise ValueError(f"{owner} needs at least four independent rows of p, got {len(rows)}.")
    check_rows(q.energy, rows)
    if len(q.energy.discrete_columns):
        length = jnp.asarray(1.0 if bandwidth is None else bandwidth, rows.dtype)
        pieces = discrete_rows(q.energy, rows, length)
        refuse_rows("ratio of q at a neighbour", pieces.lower_ratio)
        return _test(discrete_stein_kernel, pieces, length, 1.0, key, num_bootstrap)
    u, scores = _free_scores(q.energy, rows)
    refuse_rows("free coordinate, on the boundary of the support,", u)
    refuse_rows("score of q", scores)
    length = median_distance(u) if bandwidth is None else jnp.asarray(bandwidth, u.dtype)
    if not length > 0:
        raise ValueError(f"Half of the rows of p are equal, so that there is no scale: give {owner} a bandwidth.")
    # In units of ℓ, where h has those of a squared score.
    return _test(stein_kernel, (u / length, length * scores), length, float(length) ** -2, key, num_bootstrap)


def _test(
    kernel: Callable[..., Array], rows: Any, bandwidth: Array, unit: float, rng_key: Array, num_bootstrap: int
) -> SteinTest:
    value, stderr, pvalue = map(float, stein_statistic(kernel, rows, rng_key, num_bootstrap))
    if not np.isfinite([unit * value, unit * stderr]).all():
        raise ValueError(
            "kernel_stein_discrepancy overflows: the largest score, or ratio of q at a neighbour, is "
            f"{float(jnp.abs(jnp.stack(rows[1:3])).max()):.3g} in units of the bandwidth."
        )
    return SteinTest(unit * value, unit * stderr, pvalue, len(rows[0]), float(bandwidth))


@partial(jax.jit, static_argnames=("kernel", "num_bootstrap"))
def stein_statistic(
    kernel: Callable[..., Array], rows: Any, rng_key: Array, num_bootstrap: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The U-statistic of h, its standard error and its p-value, of independent rows.

    Args:
        kernel: h of one row against all, (M,).
        rows: a tuple of arrays with the rows first.
        rng_key: a key.
        num_bootstrap: replicates.
    """
    n, dtype = len(rows[0]), rows[0].dtype
    signs = jax.random.rademacher(rng_key, (n, num_bootstrap), dtype)
    sums = pair_sums(kernel, rows, rows, signs, distinct=True)
    pairs = n * (n - 1)
    value = sums.values.sum() / pairs
    replicates = jnp.sum(signs * sums.signed, axis=0) / pairs
    # With ζ1 the variance of E[h | x] and ζ2 that of h, Var U = 2 (2(n−2) ζ1 + ζ2) / (n(n−1)); this solves the
    # expectations of the two sample moments for it. ζ1 ≥ 0 gives the floor. At ζ1 = 0 the mean of the maximum is below
    # E max(2χ²_1 − 1, 1) = 1.97 times the floor: with more eigenvalues the weighted sum of χ²_1 scatters less.
    spread = jnp.mean((sums.values / (n - 1) - value) ** 2)
    squares = sums.squares.sum() / pairs - value**2
    variance = 2 * (2 * (n - 1) * spread - squares) / ((n - 2) * max(n - 3, 1))
    variance = jnp.maximum(variance, 2 * squares / pairs)
    pvalue = (1 + jnp.sum(replicates >= value)) / (num_bootstrap + 1)
    return value, jnp.sqrt(variance), pvalue


def stein_kernel(row: tuple[Array, Array], rows: tuple[Array, Array]) -> Float[Array, "m"]:
    """H for the kernel (1 + ‖x − x'‖²)^{-1/2}, of a row and its score against all."""
    (x, s), (y, t) = row, rows
    away = x - y
    squared = jnp.sum(away**2, axis=-1)
    root = jax.lax.rsqrt(1 + squared)
    return root * (jnp.sum(s * t, -1) + root**2 * (jnp.sum((s - t) * away, -1) + x.size - 3 * squared * root**2))


@jax.jit
def _free_scores(energy: Energy, x: Float[Array, "n d"]) -> tuple[Float[Array, "n p"], Float[Array, "n p"]]:
    """Free coordinates of rows, and the score of their law."""
    scores = energy.score(x)
    if energy.flat:
        return x, scores
    u = to_free(energy, x)
    (_, log_jacobian), pull = jax.vjp(lambda u: from_free(energy, u), u)
    return u, pull((scores, jnp.ones_like(log_jacobian)))[0]


def _refuse_closed(energy: Energy) -> None:
    if closed := closed_sites(energy):
        raise NotImplementedError(
            f"kernel_stein_discrepancy has no kernel on the support of site '{closed[0]}', a sphere or circle: use "
            "fisher_divergence or mmd."
        )


def closed_sites(energy: Energy) -> list[str]:
    """Sites on spheres and circles, where the kernel is none."""
    return [
        a.name
        for a in energy.arrays
        if a.support.kind == "sphere"
        or isinstance(base_constraint(energy.supports[a.name]), type(constraints.circular))
    ]
