"""log Z by adaptive tempered sequential Monte Carlo."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.normaliser.coordinates import free_dim, free_log_density
from numpyro_score.normaliser.source import fitted_moments, free_data
from numpyro_score.normaliser.tails import check_tails
from numpyro_score.operators import full_precision

__all__ = ["smc"]

_MAX_LEVELS = 1000
_WIDTHS = (1.0, 1.5)  # of the base, for every other replicate
_LEAPFROG_STEPS = 5
_ACCEPT_PROB = 0.8
_MAX_SD = 0.5  # of log Z between replicates; improper densities have more


class Run(NamedTuple):
    """The end of one run."""

    log_z: Float[Array, ""]
    inverse_temperature: Float[Array, ""]  # 1 if it came to its end
    num_levels: Array  # ()
    accept_prob: Float[Array, ""]  # of the last level


def smc(
    energy: Energy,
    rng_key: Array,
    *,
    base: dist.Distribution | None = None,
    num_particles: int = 512,
    num_replicates: int = 16,
    num_mcmc_steps: int = 5,
) -> tuple[float, float, dict[str, Any]]:
    r"""Tempered SMC [Del Moral, Doucet & Jasra 2006] from a base law q to exp f, by BlackJAX.

    Particles move from q through q^{1−λ} exp(λ g) to λ = 1 over the free coordinates u of a row, the λ chosen so that
    each reweighting keeps 70% of the effective sample size, with HMC moves between them. The product of mean weights
    estimates Z, without bias but for the adaptation, which adds O(1/particles). Replicates run independently; the
    value is the log of the mean of their Z, and the standard error comes from their spread.

    Every other replicate starts from a base that is 1.5 times as wide. If the density cannot be normalised, or mass is
    missed, the two halves disagree, and there is no answer.

    Args:
        energy: one density for all rows.
        rng_key: a key.
        base: q, a distribution over the free coordinates (P,), which are the row itself on R^D. By default
            Student's t with five degrees of freedom, with mean and scale matrix those of the data. Give one for
            densities with heavier tails: its own must be at least as heavy.
        num_particles: of each replicate.
        num_replicates: an even number, at least 8.
        num_mcmc_steps: HMC moves of five leapfrog steps at each level.

    Returns:
        log Z, its standard error, and diagnostics: `replicates`, their log Z; `num_levels`, the longest ladder;
        `accept_prob` of the moves on the last level.

    Raises:
        ModuleNotFoundError: without BlackJAX.
        ValueError: if the runs do not come to an end, spread by more than half a nat (sd), or disagree between the
            two widths of the base; or if the data are too few to fit the base.
    """
    if num_replicates < 8 or num_replicates % 2 or num_particles < 32:
        raise ValueError(
            "method='smc' needs an even num_replicates of at least 8 and num_particles of at least 32, got "
            f"{num_replicates} and {num_particles}."
        )
    base_key, run_key = jax.random.split(rng_key)
    data = free_data(energy, rng_key=base_key)
    check_tails(energy, data)
    if base is None:
        mean, cholesky = fitted_moments(data, "give base=, a NumPyro distribution over the free coordinates of a row")
        base = dist.MultivariateStudentT(5.0, jnp.asarray(mean, energy.dtype), jnp.asarray(cholesky, energy.dtype))
    elif base.event_shape != (free_dim(energy),) or base.batch_shape:
        raise ValueError(
            f"base has batch shape {base.batch_shape} and event shape {base.event_shape}: give a distribution over the "
            f"free coordinates of one row, event shape ({free_dim(energy)},)."
        )
    widths = jnp.tile(jnp.asarray(_WIDTHS, energy.dtype), num_replicates // 2)
    keys = jax.random.split(run_key, num_replicates)
    runs = jax.device_get(_runs(energy, base, keys, widths, num_particles, num_mcmc_steps))
    return _summary(runs)


def _summary(runs: Run) -> tuple[float, float, dict[str, Any]]:
    log_z = np.asarray(runs.log_z, np.float64)
    n = len(log_z)
    if not np.isfinite(log_z).all():
        raise ValueError(
            "The log density is NaN or +∞ where particles went, or the base has no mass where it is finite: look at "
            "the factor there, or give base=."
        )
    if (runs.inverse_temperature < 1).any():
        raise ValueError(
            f"Tempering did not end within {_MAX_LEVELS} levels: the density is far from the base; give the energy "
            "data from where its mass is, or base=."
        )
    halves = log_z[::2], log_z[1::2]
    apart = abs(halves[0].mean() - halves[1].mean())
    spread = np.sqrt(sum(h.var(ddof=1) / len(h) for h in halves))
    sd = float(log_z.std(ddof=1))
    if apart > 7 * spread or sd > _MAX_SD:
        raise ValueError(
            f"The replicates of SMC disagree (log Z {log_z.min():.4g} to {log_z.max():.4g}, by {apart:.2g} between two "
            "widths of the base): the density is not normalisable, or mass lies far from the data; give base=, or "
            "more num_particles."
        )
    value = log_z.max() + np.log(np.mean(np.exp(log_z - log_z.max())))
    ratios = np.exp(log_z - value)  # of mean 1
    diagnostics = {
        "replicates": log_z,
        "num_levels": int(runs.num_levels.max()),
        "accept_prob": float(runs.accept_prob.mean()),
    }
    return float(value), float(ratios.std(ddof=1) / np.sqrt(n)), diagnostics


@partial(jax.jit, static_argnames=("num_particles", "num_mcmc_steps"))
@full_precision
def _runs(
    energy: Energy,
    base: dist.Distribution,
    rng_keys: Array,
    widths: Float[Array, "r"],
    num_particles: int,
    num_mcmc_steps: int,
) -> Run:
    """Replicates over whitened coordinates w, with u = m + L w; m and L from draws of the base."""
    draws = base.sample(rng_keys[0], (max(2000, 20 * base.event_shape[0]),))
    mean = draws.mean(0)
    cholesky = jnp.linalg.cholesky(jnp.atleast_2d(jnp.cov(draws.T)))
    log_det = jnp.sum(jnp.log(jnp.diag(cholesky)))

    def one(rng_key: Array, width: Array) -> Run:
        start_key, run_key = jax.random.split(rng_key)

        def log_base(w: Array) -> Array:
            return base.log_prob(mean + cholesky @ w / width) + log_det - w.size * jnp.log(width)

        def log_ratio(w: Array) -> Array:
            return free_log_density(energy, mean + cholesky @ w) + log_det - log_base(w)

        u = base.sample(start_key, (num_particles,)) - mean
        start = width * jax.scipy.linalg.solve_triangular(cholesky, u.T, lower=True).T
        return _temper(run_key, log_base, log_ratio, start, num_mcmc_steps)

    return jax.vmap(one)(rng_keys, widths)


def _temper(rng_key: Array, log_base: Any, log_ratio: Any, start: Float[Array, "n p"], num_mcmc_steps: int) -> Run:
    try:
        import blackjax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("method='smc' needs BlackJAX: pip install 'numpyro-score[smc]'.") from error

    hmc = blackjax.hmc.build_kernel()
    n, p = start.shape

    def level(carry: tuple[Any, Array, Array, Run]) -> tuple[Any, Array, Array, Run]:
        state, rng_key, step_size, run = carry
        rng_key, jitter_key, step_key = jax.random.split(rng_key, 3)
        settings = {
            # Each particle has a step of its own, so that no trajectory length is a period of all.
            "step_size": step_size * jax.random.uniform(jitter_key, (n,), start.dtype, 0.4, 1.0),
            "inverse_mass_matrix": jnp.var(state.particles, axis=0)[None],
            "num_integration_steps": jnp.full(1, _LEAPFROG_STEPS),
        }
        algorithm = blackjax.adaptive_tempered_smc(
            log_base,
            log_ratio,
            hmc,
            blackjax.hmc.init,
            settings,
            blackjax.smc.resampling.systematic,
            target_ess=0.7,
            num_mcmc_steps=num_mcmc_steps,
        )
        state, info = algorithm.step(step_key, state)
        accept_prob = jnp.mean(info.update_info.acceptance_rate)
        run = Run(run.log_z + info.log_likelihood_increment, state.tempering_param, run.num_levels + 1, accept_prob)
        return state, rng_key, step_size * jnp.exp(2 * (accept_prob - _ACCEPT_PROB)), run

    def unfinished(carry: tuple[Any, Array, Array, Run]) -> Array:
        run = carry[-1]
        return (run.inverse_temperature < 1) & (run.num_levels < _MAX_LEVELS) & ~jnp.isnan(run.log_z)

    zero = jnp.zeros((), start.dtype)
    bad = jnp.isnan(jax.vmap(log_ratio)(start)).any()
    run = Run(jnp.where(bad, jnp.nan, zero), zero, jnp.zeros((), int), zero)
    state = blackjax.smc.tempered.init(start)._replace(weights=jnp.full(n, 1 / n, start.dtype), tempering_param=zero)
    step_size = jnp.asarray(0.8 / p**0.25, start.dtype)
    return jax.lax.while_loop(unfinished, level, (state, rng_key, step_size, run))[-1]
