"""Steps of Langevin chains, many at once: pure functions of keys and arrays.

All follow one convention, the Euler–Maruyama step of dX = ∇f dt + √(2T) dB with step size h,

    x' = x + h ∇f(x) + √(2hT) z,  z ~ N(0, I).

The other common form, with step ε/2 and noise √ε, is ε = 2h. At temperature T = 0 it is gradient ascent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.operators import value_score

__all__ = ["ChainState", "Chains", "LogDensity", "langevin_chains", "mala_chains"]

LogDensity = Callable[[Float[Array, "*batch d"]], Float[Array, "*batch"]]


class ChainState(NamedTuple):
    """Where chains are, one for each row."""

    x: Float[Array, "*batch d"]
    log_density: Float[Array, "*batch"]
    score: Float[Array, "*batch d"]
    accept_prob: Float[Array, "*batch"]  # of the last step; 1 without a Metropolis correction


class Chains(NamedTuple):
    """A transition of independent chains, each row for itself."""

    init: Callable[[Float[Array, "*batch d"]], ChainState]  # from a position
    step: Callable[[Array, ChainState], ChainState]  # from a random key and a state


def langevin_chains(log_density: LogDensity, step_size: float | Array, temperature: float | Array = 1.0) -> Chains:
    """Unadjusted Langevin chains [Roberts & Tweedie 1996]; their law is off by O(h).

    Args:
        log_density: f, (..., D) to (...), known up to a constant.
        step_size: h, a number or an array that broadcasts to (..., D), in squared units of x.
        temperature: T.
    """

    def init(x: Array) -> ChainState:
        value, score = value_score(log_density, x)
        return ChainState(x, value, score, jnp.ones_like(value))

    def step(rng_key: Array, state: ChainState) -> ChainState:
        noise = jax.random.normal(rng_key, state.x.shape, state.x.dtype)
        return init(state.x + step_size * state.score + jnp.sqrt(2.0 * step_size * temperature) * noise)

    return Chains(init, step)


def mala_chains(log_density: LogDensity, step_size: float | Array) -> Chains:
    """Langevin chains with a Metropolis correction, exact for any step [Roberts & Tweedie 1996].

    A row whose proposal has a log density that is not finite stays where it is, with `accept_prob` 0.

    Args:
        log_density: f, (..., D) to (...), known up to a constant.
        step_size: h, a number or an array that broadcasts to (..., D), in squared units of x.
    """

    def init(x: Array) -> ChainState:
        value, score = value_score(log_density, x)
        return ChainState(x, value, score, jnp.ones_like(value))

    def log_proposal(to: Array, at: ChainState) -> Array:
        return -0.25 * jnp.sum((to - at.x - step_size * at.score) ** 2 / step_size, axis=-1)

    def step(rng_key: Array, state: ChainState) -> ChainState:
        noise_key, accept_key = jax.random.split(rng_key)
        noise = jax.random.normal(noise_key, state.x.shape, state.x.dtype)
        new = init(state.x + step_size * state.score + jnp.sqrt(2.0 * step_size) * noise)
        log_ratio = new.log_density - state.log_density + log_proposal(state.x, new) - log_proposal(new.x, state)
        # Comparisons with NaN are false, so that such a proposal is refused.
        accept_prob = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
        accept = jax.random.uniform(accept_key, accept_prob.shape, accept_prob.dtype) < accept_prob
        kept = jax.tree.map(
            lambda a, b: jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - accept.ndim)), a, b), new, state
        )
        return kept._replace(accept_prob=accept_prob)

    return Chains(init, step)
