"""Steps of Langevin chains, many at once: pure functions of keys and arrays.

All follow one convention, the Euler–Maruyama step of dX = ∇f dt + √(2T) dB with step size h,

    x' = x + h ∇f(x) + √(2hT) z,  z ~ N(0, I).

The other common form, with step ε/2 and noise √ε, is ε = 2h. At temperature T = 0 it is gradient ascent.

A chain whose log density or score is no longer finite has run away. It is flagged `diverging` from there on, and is NaN
from its next step: no number is put in place of what is not one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score import random
from numpyro_score.operators import value_score

__all__ = [
    "ChainState",
    "Chains",
    "Evaluate",
    "LogDensity",
    "MomentumState",
    "langevin_chains",
    "langevin_step",
    "mala_chains",
    "mala_step",
    "sghmc_chains",
    "sghmc_step",
    "start",
    "start_with_momentum",
]

LogDensity = Callable[[Float[Array, "*batch d"]], Float[Array, "*batch"]]
Evaluate = Callable[[Float[Array, "*batch d"]], tuple[Float[Array, "*batch"], Float[Array, "*batch d"]]]
"""From rows, the log density and the score, or unbiased estimates of them whose randomness is the function's own."""


class ChainState(NamedTuple):
    """Where chains are, one for each row."""

    x: Float[Array, "*batch d"]
    log_density: Float[Array, "*batch"]
    score: Float[Array, "*batch d"]
    accept_prob: Float[Array, "*batch"]  # of the last step; 1 without a Metropolis correction
    diverging: Bool[Array, "*batch"]


class MomentumState(NamedTuple):
    """Where chains with momentum are, one for each row."""

    x: Float[Array, "*batch d"]
    log_density: Float[Array, "*batch"]
    score: Float[Array, "*batch d"]
    accept_prob: Float[Array, "*batch"]  # 1
    diverging: Bool[Array, "*batch"]
    momentum: Float[Array, "*batch d"]


class Chains(NamedTuple):
    """A transition of independent chains, each row for itself; a state is a `ChainState` or a `MomentumState`."""

    init: Callable[[Float[Array, "*batch d"]], Any]  # from positions to a state
    step: Callable[[Array, Any], Any]  # from a random key and a state to the next state


def langevin_chains(log_density: LogDensity, step_size: float | Array, temperature: float | Array = 1.0) -> Chains:
    """Unadjusted Langevin chains [Roberts & Tweedie 1996]; their law is off by O(h).

    Args:
        log_density: f, (..., D) to (...), known up to a constant.
        step_size: h, a number or an array that broadcasts to (..., D), in squared units of x.
        temperature: T.
    """
    exact = _exact(log_density)
    return Chains(
        lambda x: start(exact, x),
        lambda rng_key, state: langevin_step(exact, rng_key, state, step_size, temperature),
    )


def mala_chains(log_density: LogDensity, step_size: float | Array) -> Chains:
    """Langevin chains with a Metropolis correction, exact for any step [Roberts & Tweedie 1996].

    A row whose proposal has a log density or score that is not finite stays where it is, with `accept_prob` 0, and is
    flagged `diverging` for this step.

    Args:
        log_density: f, (..., D) to (...), known up to a constant.
        step_size: h, a number or an array that broadcasts to (..., D), in squared units of x.
    """
    exact = _exact(log_density)
    return Chains(
        lambda x: start(exact, x),
        lambda rng_key, state: mala_step(exact, rng_key, state, step_size),
    )


def sghmc_chains(
    log_density: LogDensity, step_size: float | Array, friction: float | Array, temperature: float | Array = 1.0
) -> Chains:
    """Chains with momentum and friction [Chen, Fox & Guestrin 2014]; see :func:`sghmc_step`. They start at rest.

    Args:
        log_density: f, (..., D) to (...), known up to a constant.
        step_size: h, a number or an array that broadcasts to (..., D), in squared units of x.
        friction: α in (0, 1]; at 1 these are :func:`langevin_chains`.
        temperature: T.
    """
    exact = _exact(log_density)
    return Chains(
        lambda x: start_with_momentum(exact, x),
        lambda rng_key, state: sghmc_step(exact, rng_key, state, step_size, friction, temperature),
    )


def start(evaluate: Evaluate, x: Float[Array, "*batch d"]) -> ChainState:
    """Chains at the rows x."""
    value, score = evaluate(x)
    finite = jnp.isfinite(value) & jnp.isfinite(score).all(axis=-1)
    return ChainState(x, value, score, jnp.ones_like(value), ~finite)


def start_with_momentum(evaluate: Evaluate, x: Float[Array, "*batch d"]) -> MomentumState:
    """Chains at rest at the rows x."""
    return MomentumState(*start(evaluate, x), jnp.zeros_like(x))


def langevin_step(
    evaluate: Evaluate, rng_key: Array, state: ChainState, step_size: float | Array, temperature: float | Array = 1.0
) -> ChainState:
    """One step of x' = x + h ∇f(x) + √(2hT) z; the score kept in the state is that at x, or an estimate of it."""
    noise = random.normal(rng_key, state.x.shape, state.x.dtype)
    step_size = _nan_where(state.diverging, step_size)
    x = state.x + step_size * state.score + jnp.sqrt(2.0 * step_size * temperature) * noise
    new = start(evaluate, x)
    return new._replace(diverging=new.diverging | state.diverging)


def mala_step(evaluate: Evaluate, rng_key: Array, state: ChainState, step_size: float | Array) -> ChainState:
    """A Langevin step as a proposal, accepted by the rule of Metropolis and Hastings; `evaluate` must be exact."""
    noise_key, accept_key = jax.random.split(rng_key)
    noise = random.normal(noise_key, state.x.shape, state.x.dtype)
    new = start(evaluate, state.x + step_size * state.score + jnp.sqrt(2.0 * step_size) * noise)

    def log_proposal(to: Array, at: ChainState) -> Array:
        return -0.25 * jnp.sum((to - at.x - step_size * at.score) ** 2 / step_size, axis=-1)

    log_ratio = new.log_density - state.log_density + log_proposal(state.x, new) - log_proposal(new.x, state)
    # A comparison with NaN is false, so a chain that starts where nothing is finite stays there, flagged.
    usable = ~new.diverging & jnp.isfinite(log_ratio)
    accept_prob = jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    accept = jax.random.uniform(accept_key, accept_prob.shape, accept_prob.dtype) < accept_prob
    return ChainState(
        jnp.where(accept[..., None], new.x, state.x),
        jnp.where(accept, new.log_density, state.log_density),
        jnp.where(accept[..., None], new.score, state.score),
        accept_prob,
        ~usable,
    )


def sghmc_step(
    evaluate: Evaluate,
    rng_key: Array,
    state: MomentumState,
    step_size: float | Array,
    friction: float | Array,
    temperature: float | Array = 1.0,
) -> MomentumState:
    """One step of r' = (1 − α) r + √h ∇f(x) + √(2αT) z, x' = x + √h r'.

    With v = √h r it is the form of Chen, Fox & Guestrin (2014, eq. 15), v' = (1 − α)v + h∇f + √(2αhT) z, whose
    learning rate is h; r has unit mass, so a changing h leaves its temperature alone.
    """
    noise = random.normal(rng_key, state.x.shape, state.x.dtype)
    root = jnp.sqrt(_nan_where(state.diverging, step_size))
    momentum = (1.0 - friction) * state.momentum + root * state.score + jnp.sqrt(2.0 * friction * temperature) * noise
    new = start(evaluate, state.x + root * momentum)
    return MomentumState(*new._replace(diverging=new.diverging | state.diverging), momentum)


def _nan_where(diverging: Bool[Array, "*batch"], step_size: float | Array) -> Array:
    """An energy may overflow before its gradient does; the chain is not to go on."""
    return jnp.where(diverging[..., None], jnp.nan, step_size)


def _exact(log_density: LogDensity) -> Evaluate:
    return lambda x: value_score(log_density, x)
