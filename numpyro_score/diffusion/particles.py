"""Particles that go from noise to less noise, weighted and resampled on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_score import random
from numpyro_score.diffusion.steps import Field
from numpyro_score.diffusion.twists import Belief, Likelihood, Twist, believe, log_normal

__all__ = ["Run", "run_particles"]

_RESAMPLE = 0.5  # of the particles, below which their effective number makes them resampled


class Run(NamedTuple):
    """The end of one run of N particles."""

    u: Float[Array, "n d"]
    log_weights: Float[Array, "n"]  # normalised
    log_z: Float[Array, ""]  # log of the mean weight
    least_ess: Float[Array, ""]  # over the levels, as a share of N
    ancestors: Int[Array, "n"]  # the first particle that each descends from
    failed: Int[Array, ""]  # the first level with weights that are NaN; -1 if there is none


class _State(NamedTuple):
    u: Float[Array, "n d"]
    belief: Belief
    log_density: Float[Array, "n"]  # of the noisy data, up to a constant; 0 where it is not asked for
    log_weights: Float[Array, "n"]
    log_z: Float[Array, ""]
    least_ess: Float[Array, ""]
    ancestors: Int[Array, "n"]
    failed: Int[Array, ""]


def run_particles(
    field: Field,
    likelihood: Likelihood,
    rho: Float[Array, "levels"],
    method: str,
    twist: Twist,
    num_particles: int,
    rng_key: Array,
) -> Run:
    r"""One run, over falling levels ρ.

    From u with noise ρ a particle goes to ρ' by the law of the noising process between the data and u, over the normal
    law of x given u and y: with a = ρ'²/ρ²,

    .. math:: u' \sim K = N\big((1 - a)\, m_y + a u,\; (1 - a)^2 C_y + (1 - a) \rho'^2 I\big).

    With P that of x given u alone and h the twists, weights grow by

    - "smc": :math:`q_{\rho'}(u')\, h'(u')\, N(u; u', (\rho^2 - \rho'^2) I) \,/\, (q_\rho(u)\, h(u)\, K(u'))`;
    - "tds": :math:`P(u')\, h'(u') \,/\, (h(u)\, K(u'))`;
    - "guided": nothing.

    The last h is p(y | x = u) itself.
    """
    start_key, move_key, resample_key = jax.random.split(rng_key, 3)
    last = len(rho) - 2
    exact = method == "smc"

    def log_density(u: Array, rho: Array) -> Array:
        return field.model.log_density(u, rho) if exact else jnp.zeros(len(u), u.dtype)

    def step(state: _State, i: Array) -> tuple[_State, None]:
        state = _resampled(state, jax.random.fold_in(resample_key, i)) if method != "guided" else state
        u, old, noise, less = state.u, state.belief, rho[i], rho[i + 1]
        a = (less / noise) ** 2
        spread = (1 - a) * less**2 * jnp.eye(u.shape[1], dtype=u.dtype)
        covariance = (1 - a) ** 2 * old.told_covariance + spread
        mean = (1 - a) * old.told_mean + a * u
        z = random.normal(jax.random.fold_in(move_key, i), u.shape, u.dtype)
        new_u = mean + jnp.einsum("nij,nj->ni", jnp.linalg.cholesky(covariance), z, precision="highest")
        new = believe(twist, field, likelihood, new_u, less)
        new = new._replace(log_twist=jnp.where(i == last, jax.vmap(likelihood)(new_u), new.log_twist))
        if method == "guided":
            return state._replace(u=new_u, belief=new), None
        f = log_density(new_u, less)
        growth = new.log_twist - old.log_twist - log_normal(new_u, mean, covariance)
        if exact:
            away = jnp.sum((u - new_u) ** 2, axis=-1) / (noise**2 - less**2)
            size = u.shape[1] * jnp.log(2 * jnp.pi * (noise**2 - less**2))
            growth += f - state.log_density - 0.5 * (away + size)
        else:
            growth += log_normal(new_u, (1 - a) * old.mean + a * u, (1 - a) ** 2 * old.covariance + spread)
        log_weights = state.log_weights + growth
        fails = (state.failed < 0) & jnp.isnan(log_weights).any()
        state = state._replace(
            u=new_u, belief=new, log_density=f, log_weights=log_weights, failed=jnp.where(fails, i + 1, state.failed)
        )
        return state._replace(least_ess=jnp.minimum(state.least_ess, _ess(log_weights))), None

    u = field.end.sample(start_key, num_particles, rho[0])
    belief = believe(twist, field, likelihood, u, rho[0])
    f = log_density(u, rho[0])
    log_weights = belief.log_twist + (f - field.end.log_prob(u, rho[0]) if exact else 0.0)
    one, none = jnp.ones((), u.dtype), jnp.zeros((), u.dtype)
    failed = jnp.where(jnp.isnan(log_weights).any(), 0, -1)
    first = _State(u, belief, f, log_weights, none, one, jnp.arange(num_particles), failed)
    state: Any = jax.lax.scan(step, first, jnp.arange(last + 1))[0]
    total = jax.nn.logsumexp(state.log_weights)
    log_z = state.log_z + total - jnp.log(num_particles)
    return Run(state.u, state.log_weights - total, log_z, state.least_ess, state.ancestors, state.failed)


def _ess(log_weights: Float[Array, "n"]) -> Float[Array, ""]:
    """The effective share of the particles."""
    log_weights = log_weights - jax.nn.logsumexp(log_weights)
    return jnp.exp(-jax.nn.logsumexp(2 * log_weights)) / len(log_weights)


def _resampled(state: _State, rng_key: Array) -> _State:
    """Systematic resampling, where weights are uneven."""
    n = len(state.log_weights)
    total = jax.nn.logsumexp(state.log_weights)
    below = jnp.cumsum(jnp.exp(state.log_weights - total))
    points = (jnp.arange(n) + jax.random.uniform(rng_key, (), below.dtype)) / n
    chosen = jnp.minimum(jnp.searchsorted(below, points * below[-1]), n - 1)
    uneven = _ess(state.log_weights) < _RESAMPLE
    chosen = jnp.where(uneven, chosen, jnp.arange(n))
    u, belief, f, ancestors = jax.tree.map(
        lambda v: v[chosen], (state.u, state.belief, state.log_density, state.ancestors)
    )
    return state._replace(
        u=u,
        belief=belief,
        log_density=f,
        ancestors=ancestors,
        log_weights=jnp.where(uneven, 0.0, state.log_weights),
        log_z=state.log_z + jnp.where(uneven, total - jnp.log(n), 0.0),
    )
