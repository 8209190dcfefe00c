"""log Z by importance weights from a flow along the density's own score."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.flows.fit import LearnedFlow, fit_flow
from numpyro_score.flows.weights import summarize_weights
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.coordinates import free_dim, free_log_density
from numpyro_score.normaliser.source import fitted_moments, free_data
from numpyro_score.normaliser.tails import check_tails
from numpyro_score.operators import full_precision

__all__ = ["flow"]

_LEAST_SHARE = 0.01  # of the draws that count: below, the largest weights have not been seen


def flow(
    energy: Energy,
    rng_key: Array,
    *,
    num_leapfrog: int = 10,
    num_steps: int = 1000,
    num_draws: int = 20_000,
) -> tuple[float, float, dict[str, Any]]:
    r"""Importance weights of an annealed Hamiltonian flow that is fitted to the density first.

    A :class:`~numpyro_score.LearnedFlow` over the free coordinates, in units of the data's mean and covariance, is
    fitted by :func:`~numpyro_score.fit_flow`. Fresh draws of it then have weights w with :math:`\mathrm{E}[w] = Z`, so
    that :math:`\mathrm{E}[\log w] \le \log Z` is a lower bound and the log of the mean weight an estimate, low by about
    half its squared standard error.

    Args:
        energy: one density for all rows.
        rng_key: a key.
        num_leapfrog: T, leapfrog steps of the flow.
        num_steps: steps of the fit.
        num_draws: fresh draws.

    Returns:
        log Z, its standard error by the delta method, and diagnostics: `bound` and `bound_stderr`, `ess` of the
        weights, and `bounds` along the fit.

    Raises:
        FloatingPointError: if the density has no normaliser and the flow runs away.
        ValueError: if fewer than 1% of the draws count, so that the error cannot be trusted; or if the data are too
            few to fit their covariance.
    """
    num_leapfrog = at_least_one("method='flow'", "num_leapfrog", num_leapfrog)
    num_steps = at_least_one("method='flow'", "num_steps", num_steps)
    num_draws = at_least_one("method='flow'", "num_draws", num_draws)
    data_key, fit_key, draw_key = jax.random.split(rng_key, 3)
    data = free_data(energy, rng_key=data_key)
    check_tails(energy, data)
    moments = fitted_moments(data, "give the energy more rows, or use method='smc' with base=")
    mean, cholesky = (jnp.asarray(v, energy.dtype) for v in moments)
    fit = fit_flow(
        LearnedFlow(free_dim(energy), num_leapfrog, annealed=True),
        Partial(_in_units_of, energy, mean, cholesky),
        fit_key,
        num_steps=num_steps,
    )
    weights = jax.device_get(summarize_weights(_log_weights(fit.flow, draw_key, num_draws)))
    share = float(weights.effective_sample_size) / num_draws
    if not share >= _LEAST_SHARE:
        raise ValueError(
            f"Only {share:.2%} of the flow's draws count, too few for a standard error: take more num_leapfrog and "
            "num_steps, or method='smc'."
        )
    diagnostics = {
        "bound": float(weights.bound),
        "bound_stderr": float(weights.bound_stderr),
        "ess": float(weights.effective_sample_size),
        "bounds": np.asarray(fit.bounds),
    }
    return float(weights.log_partition), float(weights.log_partition_stderr), diagnostics


@full_precision
def _in_units_of(
    energy: Energy, mean: Float[Array, "p"], cholesky: Float[Array, "p p"], w: Float[Array, "*batch p"]
) -> Float[Array, "*batch"]:
    """g(m + Lw) + log det L, whose integral over w is that of exp g."""
    return free_log_density(energy, mean + w @ cholesky.T) + jnp.sum(jnp.log(jnp.diag(cholesky)))


_log_weights = jax.jit(lambda built, rng_key, n: built.log_weights(rng_key, (n,)), static_argnums=2)
