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
_LOST = 0.1  # nat, a rounding error of log weights that leaves nothing of them
_BELOW = 1.0  # nat, how far an impossible point's twist is below the least of the others'; by 20, few come back
_LEAST_SPREAD = 1e-4  # of a step's noise, which covariances in single precision need in order to have roots


class Run(NamedTuple):
    """The end of one run of N particles."""

    u: Float[Array, "n d"]
    log_weights: Float[Array, "n"]  # normalised; for "guided" those that its draws would need
    log_z: Float[Array, ""]  # log of the mean weight
    least_ess: Float[Array, ""]  # over the levels, as a share of N
    ancestors: Int[Array, "n"]  # the first particle that each descends from
    failed: Int[Array, ""]  # the first level with points or weights that are NaN or infinite; -1 if there is none
    lost: Int[Array, ""]  # the first whose weights are differences of numbers too large for them; -1 if there is none
    size: Float[Array, ""]  # of the largest of these numbers


class _State(NamedTuple):
    u: Float[Array, "n d"]
    belief: Belief
    log_density: Float[Array, "n"]  # of the noisy data, up to a constant; 0 where it is not asked for
    log_weights: Float[Array, "n"]
    log_z: Float[Array, ""]
    least_ess: Float[Array, ""]
    ancestors: Int[Array, "n"]
    failed: Int[Array, ""]
    lost: Int[Array, ""]
    size: Float[Array, ""]


def run_particles(
    field: Field,
    likelihood: Likelihood,
    method: str,
    twist: Twist,
    num_particles: int,
    inputs: tuple[Float[Array, "levels"], Int[Array, ""], Array],
) -> Run:
    r"""One run, over falling levels ρ: the inputs are these, how many steps to take along them, and a key.

    The data x are those with the smallest noise, and τ = ρ² − ρ_min² is what ρ has more. From u with noise ρ a particle
    goes to ρ' by the law of the noising process between x and u, over the normal law of x given u and y: with a = τ'/τ,

    .. math:: u' \sim K = N\big((1 - a)\, m_y + a u,\; (1 - a)^2 C_y + (1 - a) \tau' I\big).

    With P that of x given u alone and h the twists, weights grow by

    - "smc": :math:`q_{\rho'}(u')\, h'(u')\, N(u; u', (\rho^2 - \rho'^2) I) \,/\, (q_\rho(u)\, h(u)\, K(u'))`;
    - "tds": :math:`P(u')\, h'(u') \,/\, (h(u)\, K(u'))`;
    - "guided": as for "tds", without resampling: what these would be, as the draws are taken without them.

    At a point where y is impossible h is small and not 0, except at the end: from there y may be possible again.
    """
    rho, num_steps, rng_key = inputs
    start_key, move_key, resample_key = jax.random.split(rng_key, 3)
    exact = method == "smc"

    def log_density(u: Array, rho: Array) -> Array:
        return field.model.log_density(u, rho) if exact else jnp.zeros(len(u), u.dtype)

    def step(i: Array, state: _State) -> _State:
        state = _resampled(state, jax.random.fold_in(resample_key, i)) if method != "guided" else state
        u, old, noise, less = state.u, state.belief, rho[i], rho[i + 1]
        left = excess(less, rho[-1])
        a = left / excess(noise, rho[-1])
        # Of K, and for "tds" of P. One call for both: two at once may lock jaxlib's threads up, see laplace_update.
        covariances = jnp.stack([old.told_covariance, old.covariance])[: 1 if exact else 2]
        spread = (1 - a) * left + _LEAST_SPREAD * excess(noise, less)
        roots = jnp.linalg.cholesky((1 - a) ** 2 * covariances + spread * jnp.eye(u.shape[1], dtype=u.dtype))
        means = (1 - a) * jnp.stack([old.told_mean, old.mean])[: len(roots)] + a * u
        z = random.normal(jax.random.fold_in(move_key, i), u.shape, u.dtype)
        new_u = means[0] + jnp.einsum("nij,nj->ni", roots[0], z, precision="highest")
        new = _usable(believe(twist, field, likelihood, new_u, less, rho[-1]), i + 1 == num_steps)
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
        state = state._replace(u=new_u, belief=new, log_density=f, log_weights=log_weights)
        return _looked_at(state, i + 1, proposed[0])

    u = field.end.sample(start_key, num_particles, rho[0])
    belief = _usable(believe(twist, field, likelihood, u, rho[0], rho[-1]), jnp.asarray(False))
    f = log_density(u, rho[0])
    log_weights = belief.log_twist + (f - field.end.log_prob(u, rho[0]) if exact else 0.0)
    one, none, never = jnp.ones((), u.dtype), jnp.zeros((), u.dtype), jnp.asarray(-1)
    ancestors = jnp.arange(num_particles)
    first = _State(u, belief, f, log_weights, none, one, ancestors, never, never, none)
    first = _looked_at(first, jnp.asarray(0), jnp.zeros_like(log_weights))
    state: Any = jax.lax.fori_loop(0, num_steps, step, first)
    relative, total = _normalised(state.log_weights)
    log_z = state.log_z + total - jnp.log(num_particles)
    return Run(state.u, relative, log_z, state.least_ess, state.ancestors, state.failed, state.lost, state.size)


def _usable(belief: Belief, last: Array) -> Belief:
    """With a small twist for an impossible y, and no more told than before where y has nothing finite to tell."""
    impossible = belief.log_twist == -jnp.inf
    least = jnp.min(jnp.where(jnp.isfinite(belief.log_twist), belief.log_twist, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, 0.0) - _BELOW
    told = jnp.isfinite(belief.told_mean).all(-1) & jnp.isfinite(belief.told_covariance).all((-2, -1)) & ~impossible
    return belief._replace(
        log_twist=jnp.where(impossible & ~last, least, belief.log_twist),
        told_mean=jnp.where(told[:, None], belief.told_mean, belief.mean),
        told_covariance=jnp.where(told[:, None, None], belief.told_covariance, belief.covariance),
    )


def _looked_at(state: _State, i: Array, proposed: Float[Array, "n"]) -> _State:
    """With the effective number of particles at level i, and whether the weights there mean anything."""
    fails = ~jnp.isfinite(state.u).all() | ~(state.log_weights < jnp.inf).all()
    best = jnp.argmax(state.log_weights)
    terms = [
        state.log_z,
        state.log_weights[best],
        state.belief.log_twist[best],
        state.log_density[best],
        proposed[best],
    ]
    size = jnp.max(jnp.abs(jnp.stack(terms)))
    size = jnp.where(jnp.isfinite(size), size, 0.0)  # impossible at all particles, or a failure
    loses = size * jnp.finfo(size.dtype).eps > _LOST
    return state._replace(
        least_ess=jnp.minimum(state.least_ess, _ess(state.log_weights)),
        failed=jnp.where((state.failed < 0) & fails, i, state.failed),
        lost=jnp.where((state.lost < 0) & loses, i, state.lost),
        size=jnp.maximum(state.size, size),
    )


def _normalised(log_weights: Float[Array, "n"]) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """Log weights less the log of their sum, and that; exact also where the log weights are large numbers."""
    highest = jnp.max(log_weights)
    relative = log_weights - jnp.where(jnp.isfinite(highest), highest, 0.0)
    total = jax.nn.logsumexp(relative)
    return jnp.where(jnp.isfinite(total), relative - total, relative), total + highest


def _ess(log_weights: Float[Array, "n"]) -> Float[Array, ""]:
    """The effective share of the particles, 1/N to 1; 0 where no particle has a weight."""
    weights = jnp.exp(_normalised(log_weights)[0])
    some = jnp.any(weights > 0)
    share = jnp.sum(weights) ** 2 / jnp.where(some, jnp.sum(weights**2), 1.0) / len(weights)
    return jnp.where(some, jnp.clip(share, 1 / len(weights), 1.0), 0.0)


def _resampled(state: _State, rng_key: Array) -> _State:
    """Systematic resampling, where weights are uneven."""
    n = len(state.log_weights)
    relative, total = _normalised(state.log_weights)
    below = jnp.cumsum(jnp.exp(relative))
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
