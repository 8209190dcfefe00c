r"""The Hessian of score-matching losses whose score is affine in the parameters, from its sparse Jacobian.

ISM, ESM and variance-reduced SSM are ½‖s(x)‖² + (affine in θ) if the score s is affine in θ, so that their Hessian is
Σ_n w_n A_nᵀ A_n with A_n = ∂s(x_n)/∂θ, (D, P). In graphical models few parameters enter each coordinate of the score:
columns of A without a common nonzero row share one derivative [Curtis, Powell & Reid 1974].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy import AnyEnergy, Energies, Energy, sum_by_device
from numpyro_score.operators import full_precision
from numpyro_score.programs import shared_jit

__all__ = ["score_gram"]

_NUMBERS = 2**21  # of a chunk's Jacobian: 8 MB in float32
_PROBES = 4


def score_gram(energy: AnyEnergy, unravel: Callable[[Array], Any], size: int) -> np.ndarray | None:
    """Σ_n w_n A_nᵀ A_n, (P, P) in float64; None unless the data fill R^D and the density takes any number of rows.

    Which parameters enter which coordinate of the score is read off a few rows, so compare the result with another
    product of the Hessian.

    Args:
        energy: the density and its data; the parameters' values do not matter.
        unravel: from a vector (P,) to values by site.
        size: P.
    """
    if isinstance(energy, Energies) or not (energy.resizable and energy.flat):
        return None
    enters = np.asarray(_pattern(energy, unravel=unravel, size=size))
    colours = _colour(enters)
    seeds = np.zeros((colours.max() + 1, size))
    seeds[colours, np.arange(size)] = 1.0
    widest = max(int(enters.sum(axis=1).max()), 1)
    # The parameters of each coordinate, padded by ones that do not enter.
    index = np.argsort(~enters, axis=1, kind="stable")[:, :widest]
    used = np.take_along_axis(enters, index, axis=1)
    blocks = _blocks(energy, jnp.asarray(seeds, float), colours[index], used, unravel=unravel)
    gram = np.zeros((size, size))
    for i, block in enumerate(np.asarray(blocks, np.float64)):
        keep = index[i, used[i]]
        gram[np.ix_(keep, keep)] += block[: len(keep), : len(keep)]
    return gram


@partial(shared_jit, static_argnames=("unravel", "size"))
def _pattern(energy: Energy, *, unravel: Any, size: int) -> Array:
    """Which of the P parameters enter each of the D coordinates of the score, (D, P)."""
    x = energy.usable()[0].data
    rows_key, noise_key = jax.random.split(jax.random.key(0))
    rows = x[jax.random.randint(rows_key, (_PROBES,), 0, len(x))]
    # Off the data, where a zero may be in the data alone.
    rows = rows + (x.std(axis=0) + 0.1) * jax.random.normal(noise_key, rows.shape, x.dtype)

    def enters(direction: Array) -> Array:
        return jnp.any(_along(energy, unravel, rows, direction) != 0, axis=0)

    return jax.lax.map(enters, jnp.eye(size), batch_size=64).T


@full_precision
def _along(energy: Energy, unravel: Any, x: Array, direction: Array) -> Array:
    """The derivative of the score at x along a direction of the parameters, (N, D)."""

    def score(vector: Array) -> Array:
        return energy.with_params(unravel(vector)).score(x)

    return jax.jvp(score, (jnp.zeros_like(direction),), (direction,))[1]


def _colour(enters: np.ndarray) -> np.ndarray:
    """A colour for each column, greedily, so that no two columns of a colour have a nonzero in the same row."""
    taken = np.zeros((enters.shape[1], enters.shape[0]), bool)
    colours = np.zeros(enters.shape[1], int)
    for p in range(enters.shape[1]):
        free = ~(taken & enters[:, p]).any(axis=1)
        colours[p] = np.argmax(free)
        taken[colours[p]] |= enters[:, p]
    return colours


@partial(shared_jit, static_argnames=("unravel",))
@full_precision
def _blocks(
    energy: Energy, seeds: Float[Array, "c p"], colours: Any, used: Any, *, unravel: Any
) -> Float[Array, "d r r"]:
    """Σ_n w_n a_n a_nᵀ for each coordinate of the score, over the R parameters that may enter it."""
    of_rows = partial(_blocks_of_rows, unravel=unravel)
    return sum_by_device(of_rows, energy, jax.random.key(0), seeds, colours, used)


def _blocks_of_rows(
    energy: Energy, weights: Array | None, _: Array, seeds: Array, colours: Any, used: Any, *, unravel: Any
) -> Array:
    energy, weights = energy.usable(weights)
    n, d = energy.num_rows, energy.dim
    rows = max(min(_NUMBERS // (len(seeds) * d), n), 1)
    k = -(-n // rows)
    rows = -(-n // k)
    x = jnp.pad(energy.data, ((0, k * rows - n), (0, 0)), mode="edge").reshape(k, rows, d)
    weights = jnp.pad(weights, (0, k * rows - n)).reshape(k, rows)

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        x, weights = chunk
        jacobian = jax.vmap(partial(_along, energy, unravel, x))(seeds)  # (C, rows, D)
        columns = jnp.take_along_axis(jacobian.transpose(2, 0, 1), colours[:, :, None], axis=1)
        columns = jnp.where(used[:, :, None], columns, 0.0)  # (D, R, rows)
        return total + (columns * weights) @ columns.transpose(0, 2, 1), None

    start = jnp.zeros((d, used.shape[1], used.shape[1]), weights.dtype)
    return jax.lax.scan(add, start, (x, weights))[0]
