"""The kernel Stein discrepancy: do these rows come from that density, whatever its normaliser?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.divergences.discrete_stein import discrete_rows, discrete_stein_kernel
from numpyro_score.divergences.kernels import KernelName, check_kernel, profile
from numpyro_score.divergences.law import check_rows, draw, read_pair, refuse_rows, refuse_weights, thin, weighted
from numpyro_score.divergences.pairs import median_distance, pair_sums
from numpyro_score.energy import SIMPLICES, Energy
from numpyro_score.losses.base import at_least_one, positive
from numpyro_score.normaliser.coordinates import from_free, has_domain, to_free
from numpyro_score.random import Key, as_key

__all__ = ["SteinTest", "kernel_stein_discrepancy", "spheres_of", "stein_kernel", "stein_statistic"]


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
    kernel: KernelName = "imq",
    weights: Any = None,
    num_samples: int = 4000,
    num_bootstrap: int = 1000,
) -> SteinTest:
    r"""The squared kernel Stein discrepancy of p from q, and a test of the hypothesis that p is q.

    .. math:: \mathrm{KSD}^2 = E_{x,x'\sim p}\, h(x, x'), \quad
              h = s\cdot s'\, k + s\cdot\nabla_{x'} k + s'\cdot\nabla_x k + \mathrm{tr}\,\nabla_x\nabla_{x'} k,

    with s the score of q and, by default, the inverse multiquadric kernel k = (1 + ‖x − x'‖²/ℓ²)^{-1/2}, for which it
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
    identity behind it holds. On the unit sphere in R^d, and circles as spheres in R², distances are those in R^d, the
    gradients of the kernel are projected on the tangent spaces, P = I − xxᵀ, and b = Ps − (d − 1)x takes the place of
    s: for fields P g the divergence on the sphere is tr P∇g − (d − 1) x·g, and its mean with s·Pg is zero under q
    [Barp, Oates, Porcu & Girolami 2022; Xu & Matsuda 2020].

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
        bandwidth: ℓ; the median distance between rows of p if not given, :func:`~numpyro_score.median_distance`, and 1
            for discrete data.
        kernel: "imq", the one above, or "gaussian", exp(−‖x − x'‖²/(2ℓ²)), which sees less of far rows. Discrete data
            have one of their own.
        weights: weights of rows p that are given, (N,), as of importance or of a survey: they stand for the law of
            density w times theirs. Value and replicates are then weighted, Σ w w' h over Σ w w'.
        num_samples: how many draws of p, before thinning.
        num_bootstrap: B.

    Raises:
        TypeError, ValueError: if q is rows; laws of different data; fewer than four rows; rows out of q's support or on
            its boundary, and scores that are not finite, with the rows; an unknown kernel; weights of another shape,
            negative, or of what is no rows.
        NotImplementedError: in a `Domain`, naming the site, and for rows of discrete and continuous numbers.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import kernel_stein_discrepancy
        >>> x = dist.Normal(0.5, 1).sample(jax.random.key(0), (300,))
        >>> kernel_stein_discrepancy(x, dist.Normal(0, 1), jax.random.key(1)).pvalue < 0.01
        True
    """
    owner = "kernel_stein_discrepancy"
    num_bootstrap = at_least_one(owner, "num_bootstrap", num_bootstrap)
    check_kernel(owner, kernel)
    if bandwidth is not None:
        positive(owner, "bandwidth", bandwidth)
    p, q = read_pair(owner, p, q)
    if has_domain(q.energy):
        raise NotImplementedError(f"{owner} has no kernel that vanishes at the boundary of a Domain: use mmd.")
    if q.energy.is_mixed:
        raise NotImplementedError(
            f"{owner} has no kernel for rows of discrete and continuous numbers: test each given the other, by "
            "energies with data='...', the site."
        )
    refuse_weights(owner, "weights", p, weights)
    draw_key, key = jax.random.split(as_key(rng_key))
    rows, of_rows = weighted("weights", p, thin(draw(p, q, draw_key, num_samples)), weights)
    if len(rows) < 4:
        raise ValueError(f"{owner} needs at least four independent rows of p, got {len(rows)}.")
    check_rows(q.energy, rows)
    if len(q.energy.discrete_columns):
        length = jnp.asarray(1.0 if bandwidth is None else bandwidth, rows.dtype)
        pieces = discrete_rows(q.energy, rows, length)
        refuse_rows("ratio of q at a neighbour", pieces.lower_ratio)
        return _test(discrete_stein_kernel, pieces, of_rows, length, 1.0, key, num_bootstrap)
    spheres = spheres_of(q.energy)
    u, scores = _free_scores(q.energy, rows, spheres=spheres)
    refuse_rows("free coordinate, on the boundary of the support,", u)
    refuse_rows("score of q", scores)
    length = median_distance(u) if bandwidth is None else jnp.asarray(bandwidth, u.dtype)
    if not length > 0:
        raise ValueError(f"Half of the rows of p are equal, so that there is no scale: give {owner} a bandwidth.")
    # In units of ℓ, where h has those of a squared score.
    of_pair = stein_kernel(kernel, spheres)
    return _test(of_pair, (u / length, length * scores), of_rows, length, float(length) ** -2, key, num_bootstrap)


def _test(
    kernel: Callable[..., Array],
    rows: Any,
    weights: Array | None,
    bandwidth: Array,
    unit: float,
    rng_key: Array,
    num_bootstrap: int,
) -> SteinTest:
    if weights is None:
        found = stein_statistic(kernel, rows, rng_key, num_bootstrap)
    else:
        found = weighted_stein_statistic(kernel, rows, weights, rng_key, num_bootstrap)
    value, stderr, pvalue = map(float, found)
    if not np.isfinite([unit * value, unit * stderr]).all():
        raise ValueError(
            "kernel_stein_discrepancy overflows: the largest score, or ratio of q at a neighbour, is "
            f"{float(jnp.abs(jnp.stack(rows[1:3])).max()):.3g} in units of the bandwidth."
        )
    return SteinTest(unit * value, unit * stderr, pvalue, len(rows[0]), float(bandwidth))


Spheres = tuple[tuple[int, int], ...]  # the columns that begin one, and its dimension d


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


@partial(jax.jit, static_argnames=("kernel", "num_bootstrap"))
def weighted_stein_statistic(
    kernel: Callable[..., Array], rows: Any, weights: Float[Array, "n"], rng_key: Array, num_bootstrap: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The same of rows with weights of mean one.

    The value is a ratio R = Σ w w' h / Σ w w', whose error is that of Σ w w' (h − R) / Σ w w'; the replicates have no
    need of that, as they hold under a law at which the sum above is zero.
    """
    n, both, make = len(weights), (*rows, weights), getattr(type(rows), "_make", tuple)
    pairs = (weights.sum() ** 2 - jnp.sum(weights**2)) / (n * (n - 1))

    def of(centre: Array | float) -> Callable[..., Array]:
        def weighted_kernel(row: Any, others: Any) -> Array:
            return row[-1] * others[-1] * (kernel(make(row[:-1]), make(others[:-1])) - centre) / pairs

        return weighted_kernel

    value, _, pvalue = stein_statistic(of(0.0), both, rng_key, num_bootstrap)
    return value, stein_statistic(of(value), both, rng_key, 1)[1], pvalue


@functools.cache  # so that equal settings are one function, and compile once
def stein_kernel(kernel: str, spheres: Spheres = ()) -> Callable[..., Array]:
    """H of a row and its score against all, (M,), for a kernel by name."""
    return partial(_stein_kernel, kernel, spheres)


def _stein_kernel(
    kernel: str, spheres: Spheres, row: tuple[Array, Array], rows: tuple[Array, Array]
) -> Float[Array, "m"]:
    """H of a row and its score against all, in units of the bandwidth; on spheres b in the place of the score.

    With u = x − y and P, Q the projections at x and y, ∇_x k = 2φ'u, ∇_y k = −2φ'u and ∇_x∇_yᵀ k = −2φ'I − 4φ''uuᵀ.
    """
    (x, s), (y, t) = row, rows
    away = x - y
    phi = profile(kernel, jnp.sum(away**2, axis=-1))
    at_x, at_y, trace = away, away, x.size + jnp.zeros(len(y), x.dtype)  # Pu, Qu and tr PQ
    for start, d in spheres:
        columns = slice(start, start + d)
        normal_x = x[columns] / jnp.linalg.norm(x[columns])
        normal_y = y[:, columns] / jnp.linalg.norm(y[:, columns], axis=-1, keepdims=True)
        u, cosine = away[:, columns], normal_y @ normal_x
        at_x = at_x.at[:, columns].set(u - (u @ normal_x)[:, None] * normal_x)
        at_y = at_y.at[:, columns].set(u - jnp.sum(u * normal_y, -1, keepdims=True) * normal_y)
        trace += cosine**2 - 2
    first = jnp.sum(s * at_y, -1) - jnp.sum(t * at_x, -1) + trace
    return phi.value * jnp.sum(s * t, -1) - 2 * phi.first * first - 4 * phi.second * jnp.sum(at_x * at_y, -1)


@partial(jax.jit, static_argnames="spheres")
def _free_scores(
    energy: Energy, x: Float[Array, "n d"], spheres: Spheres = ()
) -> tuple[Float[Array, "n p"], Float[Array, "n p"]]:
    """Free coordinates of rows, spheres in R^d, and the score of their law, on spheres b = Ps − (d − 1)x."""
    scores = energy.score(x)
    if energy.flat and not spheres:
        return x, scores
    u = to_free(energy, x)
    (_, log_jacobian), pull = jax.vjp(lambda u: from_free(energy, u), u)
    pulled = pull((scores, jnp.ones_like(log_jacobian)))[0]
    for start, d in spheres:
        columns = slice(start, start + d)
        radius = jnp.linalg.norm(u[:, columns], axis=-1, keepdims=True)
        normal, slope = u[:, columns] / radius, radius * pulled[:, columns]  # the way there divides by the radius
        tangent = slope - jnp.sum(slope * normal, -1, keepdims=True) * normal
        u, pulled = u.at[:, columns].set(normal), pulled.at[:, columns].set(tangent - (d - 1) * normal)
    return u, pulled


def spheres_of(energy: Energy) -> Spheres:
    """Where in the free coordinates there are spheres, circles among them, and their dimensions d."""
    found: list[tuple[int, int]] = []
    start = 0
    for a, block in zip(energy.arrays, energy.blocks, strict=True):
        width, size = block.stop - block.start, block.size
        if a.support.kind == "circle":
            width, size = 2 * width, 2
        elif a.support.kind in SIMPLICES:
            start += width // size * (size - 1)
            continue
        elif a.support.kind != "sphere":
            start += width
            continue
        found += [(start + k, size) for k in range(0, width, size)]
        start += width
    return tuple(found)
