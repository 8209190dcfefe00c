"""Particles that go from noise to less noise, weighted and resampled on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_score import random
from numpyro_score.diffusion.steps import Field
from numpyro_score.diffusion.twists import Belief, Likelihood, Twist, believe, excess, log_normal

__all__ = ["Run", "run_particles"]

_RESAMPLE = 0.5  # of the particles, below which their effective number makes them resampled
_LEAST_SPREAD = 1e-4  # of a step's noise, which covariances in single precision need in order to have roots


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

    The data x are those with the smallest noise, and τ = ρ² − ρ_min² is what ρ has more. From u with noise ρ a particle
    goes to ρ' by the law of the noising process between x and u, over the normal law of x given u and y: with a = τ'/τ,

    .. math:: u' \sim K = N\big((1 - a)\, m_y + a u,\; (1 - a)^2 C_y + (1 - a) \tau' I\big).

    With P that of x given u alone and h the twists, weights grow by

    - "smc": :math:`q_{\rho'}(u')\, h'(u')\, N(u; u', (\rho^2 - \rho'^2) I) \,/\, (q_\rho(u)\, h(u)\, K(u'))`;
    - "tds": :math:`P(u')\, h'(u') \,/\, (h(u)\, K(u'))`;
    - "guided": nothing.
    """
    start_key, move_key, resample_key = jax.random.split(rng_key, 3)
    exact = method == "smc"

    def log_density(u: Array, rho: Array) -> Array:
        return field.model.log_density(u, rho) if exact else jnp.zeros(len(u), u.dtype)

    def step(state: _State, i: Array) -> tuple[_State, None]:
        state = _resampled(state, jax.random.fold_in(resample_key, i)) if method != "guided" else state
        u, old, noise, less = state.u, state.belief, rho[i], rho[i + 1]
        left = excess(less, rho[-1])
        a = left / excess(noise, rho[-1])
        # Of K, and for "tds" of P. One call for both: two at once may lock jaxlib's threads up, see laplace_update.
        covariances = jnp.stack([old.told_covariance, old.covariance])[: 2 if method == "tds" else 1]
        spread = (1 - a) * left + _LEAST_SPREAD * excess(noise, less)
        roots = jnp.linalg.cholesky((1 - a) ** 2 * covariances + spread * jnp.eye(u.shape[1], dtype=u.dtype))
        means = (1 - a) * jnp.stack([old.told_mean, old.mean])[: len(roots)] + a * u
        z = random.normal(jax.random.fold_in(move_key, i), u.shape, u.dtype)
        new_u = means[0] + jnp.einsum("nij,nj->ni", roots[0], z, precision="highest")
        new = believe(twist, field, likelihood, new_u, less, rho[-1])
        if method == "guided":
            return state._replace(u=new_u, belief=new), None
        f = log_density(new_u, less)
        proposed = log_normal(new_u, means, roots)
        growth = new.log_twist - old.log_twist - proposed[0]
        if exact:
            away = jnp.sum((u - new_u) ** 2, axis=-1) / excess(noise, less)
            size = u.shape[1] * jnp.log(2 * jnp.pi * excess(noise, less))
            growth += f - state.log_density - 0.5 * (away + size)
        else:
            growth += proposed[1]
        log_weights = state.log_weights + growth
        fails = (state.failed < 0) & jnp.isnan(log_weights).any()
        state = state._replace(
            u=new_u, belief=new, log_density=f, log_weights=log_weights, failed=jnp.where(fails, i + 1, state.failed)
        )
        return state._replace(least_ess=jnp.minimum(state.least_ess, _ess(log_weights))), None

    u = field.end.sample(start_key, num_particles, rho[0])
    belief = believe(twist, field, likelihood, u, rho[0], rho[-1])
    f = log_density(u, rho[0])
    log_weights = belief.log_twist + (f - field.end.log_prob(u, rho[0]) if exact else 0.0)
    one, none = jnp.ones((), u.dtype), jnp.zeros((), u.dtype)
    failed = jnp.where(jnp.isnan(log_weights).any(), 0, -1)
    first = _State(u, belief, f, log_weights, none, one, jnp.arange(num_particles), failed)
    state: Any = jax.lax.scan(step, first, jnp.arange(len(rho) - 1))[0]
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
