"""log Z of discrete data by annealed importance sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, lattice_density, num_values
from numpyro_score.kernels import DiscreteKernel, Gibbs, GibbsWithGradients, Lattice
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.tails import check_counts
from numpyro_score.operators import full_precision

__all__ = ["ais"]

_FEW_NUMBERS = 100  # up to which Gibbs steps, which take a density for each, are the default
_LEAST_ESS = 20.0


def ais(
    energy: Energy,
    rng_key: Array,
    *,
    num_chains: int = 512,
    num_levels: int = 200,
    kernel: DiscreteKernel | None = None,
) -> tuple[float, float, dict[str, Any]]:
    r"""Annealed importance sampling [Neal 2001] from a law q of independent numbers to exp f.

    Independent chains go from q through q^{1−t} exp(t f), with one step of the kernel at each of `num_levels` values of
    t. The mean of their weights is an unbiased estimate of Z, and the standard error that of this mean, by the delta
    method. Its logarithm is too low on average where the weights vary much.

    q has the frequencies of the data, with half an observation added to each value; for counts it is negative binomial
    with their mean and at least twice the variance of a Poisson law.

    Args:
        energy: one density for all rows, of discrete data.
        rng_key: a key.
        num_chains: chains.
        num_levels: more of them bring the weights closer together.
        kernel: Gibbs(), GibbsWithGradients() or DiscreteLangevin(); Gibbs if not given, and GibbsWithGradients with
            D proposals, at least 4 and at most 32, for counts and above 100 numbers.

    Returns:
        log Z, its standard error, and diagnostics: `ess`, the effective number of weights; `accept_prob` of the last
        step.

    Raises:
        TypeError: for another kernel.
        ValueError: if the weights are not finite, or a few outweigh the others.
    """
    check_counts(energy)
    num_chains = at_least_one("ais", "num_chains", num_chains)
    num_levels = at_least_one("ais", "num_levels", num_levels)
    finite = num_values(energy) is not None
    if kernel is None:
        few = finite and energy.dim <= _FEW_NUMBERS
        kernel = Gibbs() if few else GibbsWithGradients(num_proposals=min(max(energy.dim, 4), 32))
    if not isinstance(kernel, DiscreteKernel):
        raise TypeError(f"method='ais' needs a kernel of discrete data such as Gibbs(), got {kernel!r}.")
    log_weights, accept_prob = jax.device_get(_weights(energy, rng_key, kernel, num_chains, num_levels))
    log_weights = log_weights.astype(np.float64)
    if not np.isfinite(log_weights).all():
        raise ValueError(
            "The weights of annealed importance sampling are not finite: the density is not finite where chains went, "
            "or it has no normaliser at these parameters."
        )
    largest = log_weights.max()
    weights = np.exp(log_weights - largest)
    ess = float(weights.sum() ** 2 / (weights**2).sum())
    if ess < _LEAST_ESS:
        raise ValueError(
            f"The weights of annealed importance sampling count as {ess:.1f} of {num_chains} chains, too few for an "
            "error: take more num_levels or num_chains, or another kernel; or the density has no normaliser."
        )
    stderr = float(weights.std(ddof=1) / weights.mean() / np.sqrt(num_chains))
    return float(largest + np.log(weights.mean())), stderr, {"ess": ess, "accept_prob": float(accept_prob.mean())}


@partial(jax.jit, static_argnames=("kernel", "num_chains", "num_levels"))
@full_precision
def _weights(
    energy: Energy, rng_key: Array, kernel: DiscreteKernel, num_chains: int, num_levels: int
) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    start_key, run_key = jax.random.split(rng_key)
    usable, row_weights = energy.usable()
    low, high = (bound[0] for bound in energy.bounds(energy.num_rows))
    size = num_values(energy)
    counted = (row_weights != 0).astype(energy.dtype)
    if size is None:
        x, log_q = _of_counts(start_key, usable.data, counted, low, num_chains)
    else:
        x, log_q = _of_frequencies(start_key, usable.data, counted, low, high, size, num_chains)
    f = lattice_density(energy)

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
        x, log_weights = carry
        t = k / num_levels
        log_weights += (f(x) - log_q(x)) / num_levels

        def bridge(x: Array) -> Array:
            return (1 - t) * log_q(x) + t * f(x)

        chains = kernel.lattice_chains(Lattice(bridge, low, high, size))
        state = chains.step(jax.random.fold_in(run_key, k), chains.init(x))
        return (state.x, log_weights), state.accept_prob

    levels = jnp.arange(1, num_levels + 1)
    (_, log_weights), accept_prob = jax.lax.scan(step, (x, jnp.zeros(num_chains, energy.dtype)), levels)
    return log_weights, accept_prob[-1]


def _of_frequencies(
    rng_key: Array, data: Array, counted: Array, low: Array, high: Array, size: int, n: int
) -> tuple[Array, Any]:
    """Draws of independent numbers with smoothed frequencies of the data, and their log density."""
    values = jnp.arange(size)
    there = low[:, None] + values <= high[:, None]  # (D, V)
    counts = jnp.einsum("n,ndv->dv", counted, (data[..., None] == low[:, None] + values).astype(data.dtype))
    table = jax.nn.log_softmax(jnp.where(there, jnp.log(counts + 0.5), -jnp.inf), axis=-1)
    x = low + jax.random.categorical(rng_key, table, shape=(n, len(low)))

    def log_q(x: Array) -> Array:
        # Differentiable as a polynomial would not be: between integers a straight line, which leads chains.
        at = jnp.clip(jax.lax.stop_gradient(x - low), 0, size - 1)
        below = jnp.minimum(jnp.floor(at).astype(int), size - 2)
        index = jnp.arange(len(low))
        left, right = table[index, below], table[index, below + 1]
        ramp = jnp.where(jnp.isfinite(right), right - left, 0.0)
        here = table[index, at.astype(int)]
        moved = x - jax.lax.stop_gradient(x)
        return jnp.sum(here + ramp * moved, axis=-1)

    return x, log_q


def _of_counts(rng_key: Array, data: Array, counted: Array, low: Array, n: int) -> tuple[Array, Any]:
    """Draws of independent negative binomial numbers with the data's mean and spread, and their log density."""
    total = jnp.sum(counted)
    mean = (counted @ (data - low) + 0.5) / (total + 1)
    variance = jnp.maximum(counted @ (data - low - mean) ** 2 / total, 2 * mean)
    shape = mean**2 / (variance - mean)
    rate_key, count_key = jax.random.split(rng_key)
    rates = jax.random.gamma(rate_key, shape, (n, len(mean))) * mean / shape
    x = low + jax.random.poisson(count_key, rates).astype(data.dtype)

    def log_q(x: Array) -> Array:
        k = x - low
        found = gammaln(k + shape) - gammaln(k + 1) - gammaln(shape)
        return jnp.sum(found + shape * jnp.log(shape / (shape + mean)) + k * jnp.log(mean / (shape + mean)), axis=-1)

    return x, log_q
