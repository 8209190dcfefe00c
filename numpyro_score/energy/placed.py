"""Points for the continuous latent sites of each row, placed where the row's own density of them is."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float

__all__ = ["fewest_points", "log_integral", "logsumexp", "more_points"]

_PRODUCT = 3  # numbers of a row; for more of them the points are quasi-random
_CONDITIONS = 1000  # of a rule, which take longer to solve than the rule is worth
_STEPS = 40
_SMALL = 1e-3  # a step, in standard deviations of the law given the row
_LEAST = 0.1  # curvature, in that of the prior's law: a step in other directions is ten prior deviations at most


def log_integral(
    joint: Callable[[Array], Float[Array, "n"]],
    frozen: Callable[[Array], Float[Array, "n"]],
    start: Float[Array, "n m"],
    count: int,
) -> Float[Array, "n"]:
    r"""The log of the integral over M numbers of each row, by points about the mode with the curvature there, (N,).

    .. math:: \log \sum_k w_k \, e^{h(u_k)} \, |L| / \varphi(\xi_k), \quad u_k = \hat u + L \xi_k, \quad
              \hat u = \arg\max_u h(u), \quad L L^T = (-\nabla^2 h(\hat u))^{-1},

    with a rule (ξ, w) for N(0, I) [Liu & Pierce 1994]. It is exact where h is a quadratic in u.

    To derivatives L is constant, and :math:`\hat u` moves as Newton's step with that L makes it. They are those of a
    sum at whatever points, and so as right as the rule: for factors of normal data those in the data are exact, and
    the first and second in the parameters with a rule of degree 2 and 4.

    Args:
        joint: the log density h of each row with its latent numbers, from standard normal ones (N, M) to (N,).
        frozen: the same without derivatives in anything that the function sees, besides u.
        start: of the search, (N, M).
        count: K, the points of a row.
    """
    found, root = jax.lax.stop_gradient(_find(frozen, start))
    slope = jax.grad(lambda u: joint(u).sum())(found)
    centre = found + jnp.sum(root * jnp.sum(root * slope[:, :, None], axis=1)[:, None], axis=2)
    z, log_w = _rule(count, start.shape[1])
    points = jnp.asarray(z, start.dtype)
    spread = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root, axis1=1, axis2=2))), axis=1)

    def at(point: Array, weight: Array) -> Array:
        return joint(centre + jnp.sum(root * point, axis=-1)) + weight + spread

    return logsumexp(jax.vmap(at)(points, jnp.asarray(log_w, start.dtype)))


@jax.jit  # under its name, by which it is known to have no kink, as its parts have
def logsumexp(terms: Float[Array, "a n"]) -> Float[Array, "n"]:
    """The log of Σ e^{terms} over the first axis."""
    return jax.nn.logsumexp(terms, axis=0)


def fewest_points(dim: int) -> int:
    """The fewest points that integrate over that many numbers."""
    return 2**dim if dim <= _PRODUCT else 2 * dim


def more_points(count: int, dim: int) -> int:
    """So many that the rule differs in all points but 0."""
    return int((2 * _by_number(count, dim) + 1) ** dim) if dim <= _PRODUCT else 4 * count


def _by_number(count: int, dim: int) -> int:
    return math.floor(count ** (1 / dim) + 1e-9)


class _Seen(NamedTuple):
    """The density and its slope at some numbers of each row, and the axes and sizes of its curvature."""

    u: Float[Array, "n m"]
    value: Float[Array, "n"]
    slope: Float[Array, "n m"]
    values: Float[Array, "n m"]
    axes: Float[Array, "n m m"]


@functools.cache
def _rule(count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Points ξ (K', M) and log w/φ(ξ), (K',), for integrals over R^M that are near to normal: K' is K or fewer.

    Up to three numbers it is the product of Gauss and Hermite's rules. For more of them it is made of a scrambled Sobol
    sequence under the quantiles of N(0, 1), with its reflection: the few of its points that have positive weights with
    which the rule is exact to the highest odd degree [Tchakaloff 1957], or where K is too small for the degree 5 all K,
    scaled to the covariance I, which is exact to the degree 3.
    """
    if dim <= _PRODUCT:
        points, weights = np.polynomial.hermite_e.hermegauss(_by_number(count, dim))
        z = np.stack(np.meshgrid(*[points] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
        w = functools.reduce(np.multiply.outer, [weights / weights.sum()] * dim).reshape(-1)
    else:
        z, w = _few_exact(count // 2, dim) or _all_scaled(count // 2, dim)
        z, w = np.concatenate([z, -z]), np.concatenate([w, w]) / 2
    return z, np.log(w) + 0.5 * np.sum(z**2, axis=1) + 0.5 * dim * math.log(2 * math.pi)


def _normal_points(count: int, dim: int) -> np.ndarray:
    uniform = scipy.stats.qmc.Sobol(dim, rng=0).random_base2(math.ceil(math.log2(count)))[:count]
    return np.asarray(scipy.stats.norm.ppf(uniform))


def _all_scaled(half: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    z = _normal_points(half, dim)
    return np.linalg.solve(np.linalg.cholesky(z.T @ z / half), z.T).T, np.full(half, 1 / half)


def _few_exact(half: int, dim: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Points and weights that integrate even polynomials of a degree exactly, at least 4; None for too few of them."""
    degree = 2
    while math.comb(dim + degree + 2, dim) <= _CONDITIONS and _even_polynomials(dim, degree + 2) <= half:
        degree += 2
    if degree < 4:
        return None
    z = _normal_points(16 * _even_polynomials(dim, degree), dim)
    by_degree = [np.polynomial.hermite_e.hermeval(z, np.eye(degree + 1)[k]) for k in range(degree + 1)]
    rows = [
        np.prod([by_degree[n][:, i] / math.sqrt(math.factorial(n)) for i, n in Counter(which).items()], axis=0)
        for k in range(0, degree + 1, 2)
        for which in itertools.combinations_with_replacement(range(dim), k)
    ]
    rows[0] = np.ones(len(z))
    mean = np.eye(len(rows))[0]  # of orthogonal polynomials, of which the first is 1
    weights, error = scipy.optimize.nnls(np.stack(rows), mean)
    few = weights > 0
    return (z[few], weights[few]) if error < 1e-10 else None


def _even_polynomials(dim: int, degree: int) -> int:
    return sum(math.comb(dim + k - 1, k) for k in range(0, degree + 1, 2))


def _find(
    h: Callable[[Array], Float[Array, "n"]], start: Float[Array, "n m"]
) -> tuple[Float[Array, "n m"], Float[Array, "n m m"]]:
    """The mode of h of each row, and a root of the inverse of its negative curvature there: (N, M), (N, M, M).

    Newton's steps, uphill also where the curvature is not negative, shorter after one that leads down. A row that has
    arrived stays, whatever the others do.
    """
    n, m = start.shape
    basis = jnp.broadcast_to(jnp.eye(m, dtype=start.dtype)[:, None], (m, n, m))

    def look(u: Array) -> _Seen:
        value = h(u)
        slope, push = jax.linearize(jax.grad(lambda u: h(u).sum()), u)
        curvature = -jnp.moveaxis(jax.vmap(push)(basis), 0, -1)  # (N, M, M)
        if m == 1:
            values, axes = curvature[:, 0], jnp.ones_like(curvature)
        else:
            values, axes = jnp.linalg.eigh(curvature)
        return _Seen(u, value, slope, jnp.maximum(jnp.abs(values), _LEAST), axes)

    def move(state: tuple[Array, _Seen, Array, Array]) -> tuple[Array, _Seen, Array, Array]:
        step, here, size, _ = state
        along = jnp.einsum("nij,ni->nj", here.axes, here.slope)
        way = jnp.einsum("nij,nj->ni", here.axes, along / here.values)
        arrived = (jnp.sum(along**2 / here.values, axis=1) < _SMALL**2) | (size < _SMALL**2)
        arrived &= step > 0  # which is there to look at the start, so that the model is compiled once
        there = look(jnp.where(arrived[:, None], here.u, here.u + size[:, None] * way))
        rounding = 8 * jnp.finfo(start.dtype).eps * (1 + jnp.abs(here.value))
        up = ~arrived & (there.value >= here.value - rounding)
        new = jax.tree.map(lambda a, b: jnp.where(up.reshape(-1, *[1] * (a.ndim - 1)), a, b), there, here)
        return step + 1, new, jnp.where(up, jnp.minimum(2 * size, 1), size / 4), arrived

    def on(state: tuple[Array, _Seen, Array, Array]) -> Array:
        return (state[0] < _STEPS) & ~state[-1].all()

    flat, least = jnp.ones_like(start), jnp.full(n, -jnp.inf, start.dtype)
    nowhere = _Seen(start, least, 0 * flat, flat, jnp.moveaxis(basis, 0, 1))
    begin = (jnp.zeros((), int), nowhere, jnp.ones(n, start.dtype), jnp.zeros(n, bool))
    _, mode, _, _ = jax.lax.while_loop(on, move, begin)
    spread = jnp.einsum("nij,nj,nkj->nik", mode.axes, 1 / mode.values, mode.axes)
    return mode.u, jnp.linalg.cholesky(spread) if m > 1 else jnp.sqrt(spread)
