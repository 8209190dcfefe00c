"""log Z at many parameters at once."""

from __future__ import annotations

from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.normaliser import sample
from numpyro_score.normaliser.coordinates import data_to_row
from numpyro_score.normaliser.source import density_of, free_data, refuse_rays

__all__ = ["partition_ratios"]


def partition_ratios(
    energy: Energy, draws: dict[str, Any], rng_key: Array, num_samples: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    r"""Log Z(θ) − log Z(θ₀) at S draws θ of the parameters, and their standard errors, (S,) each.

    .. math:: \frac{Z(\theta)}{Z(\theta_0)} = \mathrm{E}_{x \sim p_{\theta_0}} \exp(f_\theta(x) - f_{\theta_0}(x)),

    over rows x of the model at θ₀, drawn by NUTS. The ratio is unbiased up to the chains' mixing. Draws θ of a
    posterior are O(N^{-1/2}) from a θ₀ among them, so that the error is of the order of √(P / NM) with M rows x.

    Args:
        energy: at θ₀.
        draws: {site: (S, ...)}.
        rng_key: a key.
        num_samples: rows x of each of four chains.

    Raises:
        ValueError: if rows have densities of their own, or the density at some draw cannot be normalised.
    """
    energy = density_of(energy)
    u = free_data(energy)
    size = len(next(iter(jax.tree.leaves(draws))))
    for s in range(size):
        try:
            refuse_rays(energy.with_params(jax.tree.map(lambda v, s=s: v[s], draws)), u)
        except ValueError as error:
            raise ValueError(f"At draw {s} of the parameters: {error}") from None
    posterior = sample(energy, rng_key, num_samples)["posterior"]
    values = {k: jnp.asarray(v.values) for k, v in posterior.data_vars.items()}
    x = jax.vmap(jax.vmap(lambda row: data_to_row(energy, row)))(values)
    log_ratios = np.asarray(_log_ratios(energy, draws, x), np.float64)  # (S, chain, draw)
    largest = log_ratios.max(axis=(1, 2), keepdims=True)
    ratios = np.exp(log_ratios - largest)
    mean = ratios.mean(axis=(1, 2))
    if not np.isfinite(mean).all():
        raise ValueError("The log density is not finite at some draw of the parameters and row of the model.")
    errors = mcse(np.moveaxis(ratios, 0, -1)) / mean
    return np.log(mean) + largest[:, 0, 0], errors


@jax.jit
def _log_ratios(energy: Energy, draws: dict[str, Any], x: Float[Array, "c m d"]) -> Float[Array, "s c m"]:
    reference = energy.log_density(x)
    return jax.lax.map(lambda theta: energy.with_params(theta).log_density(x) - reference, draws)


def mcse(values: Float[np.ndarray, "chain draw n"]) -> Float[np.ndarray, "n"]:
    """Monte Carlo standard errors of the means over chains of draws; 0 where all draws are equal."""
    errors = az.mcse(xr.Dataset({"values": (("chain", "draw", "row"), values)}), method="mean")["values"].values
    return np.where(np.ptp(values, axis=(0, 1)) > 0, errors, 0.0)
