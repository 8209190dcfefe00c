"""log Z at many parameters at once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, plural
from numpyro_score.normaliser import sample
from numpyro_score.normaliser.coordinates import data_to_row
from numpyro_score.normaliser.source import density_of, free_data
from numpyro_score.normaliser.tails import check_tails
from numpyro_score.operators import full_precision

__all__ = ["PartitionRatios", "mcse", "pareto_smoothed", "partition_ratios"]

_BATCHES = 10  # of each chain: long beside its autocorrelation, and enough of them for a standard error
_WORST_K = 0.7  # Vehtari et al. 2024
_LEVEL = 0.95


class PartitionRatios(NamedTuple):
    """Log Z(θ) − log Z(θ₀) at S draws θ; their errors are correlated, as all come from the same rows of the model."""

    values: Float[np.ndarray, "s"]
    deviations: Float[np.ndarray, "k s"]  # of the means of K batches of rows, in units of the ratio

    @property
    def stderr(self) -> Float[np.ndarray, "s"]:
        """Of each value, from K − 1 degrees of freedom."""
        return _stderr(self.deviations)

    def stderr_of(self, weights: Float[np.ndarray, "s n"]) -> Float[np.ndarray, "n"]:
        """Of sums Σ_s w_sn log Z(θ_s), with the errors' correlation."""
        return _stderr(self.deviations @ weights)

    def bound(self, num_draws: int = 2000) -> float:
        """What the largest error over all draws θ stays below with probability 0.95.

        The errors are taken to be jointly normal with the batches' covariance, estimated with K − 1 degrees of freedom.
        """
        k = len(self.deviations)
        rng = np.random.default_rng(0)
        normal = rng.standard_normal((num_draws, k)) @ self.deviations / np.sqrt(k * (k - 1))
        scales = np.sqrt(rng.chisquare(k - 1, num_draws) / (k - 1))
        return float(np.quantile(np.abs(normal).max(axis=1) / scales, _LEVEL))


def _stderr(deviations: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "n"]:
    k = len(deviations)
    return np.sqrt(np.sum(deviations**2, axis=0) / (k * (k - 1)))


def partition_ratios(energy: Energy, draws: dict[str, Any], rng_key: Array, num_samples: int = 1000) -> PartitionRatios:
    r"""Log Z(θ) − log Z(θ₀) at S draws θ of the parameters, and their errors.

    .. math:: \frac{Z(\theta)}{Z(\theta_0)} = \mathrm{E}_{x \sim p_{\theta_0}} \exp(f_\theta(x) - f_{\theta_0}(x)),

    over rows x of the model at θ₀, drawn by :func:`~numpyro_score.sample`. The ratio is unbiased up to the chains'
    mixing. Draws θ of a posterior are O(N^{-1/2}) from a θ₀ among them, so that the error is of the order of √(P / NM)
    with M rows x.
    Standard errors are those of batch means.

    Args:
        energy: at θ₀.
        draws: {site: (S, ...)}.
        rng_key: a key.
        num_samples: rows x of each of four chains.

    Raises:
        ValueError: if rows have densities of their own, or the density at some draw cannot be normalised.

    Warns:
        UserWarning: if importance weights at some draws have a Pareto k above 0.7, or the density at some may not be
            normalisable.
    """
    energy = density_of(energy)
    if not len(energy.discrete_columns):
        check_tails(energy, free_data(energy), draws)
    posterior = sample(energy, rng_key, num_samples)["posterior"]
    values = {k: jnp.asarray(v.values) for k, v in posterior.data_vars.items()}
    x = jax.vmap(jax.vmap(lambda row: data_to_row(energy, row)))(values)
    return _ratios(np.asarray(_log_ratios(energy, draws, x), np.float64))


@jax.jit
@full_precision
def _log_ratios(energy: Energy, draws: dict[str, Any], x: Float[Array, "c m d"]) -> Float[Array, "s c m"]:
    reference = energy.log_density(x)
    return jax.lax.map(lambda theta: energy.with_params(theta).log_density(x) - reference, draws)


def _ratios(log_ratios: Float[np.ndarray, "s c m"]) -> PartitionRatios:
    s, c, m = log_ratios.shape
    largest = log_ratios.max(axis=(1, 2))
    ratios = np.exp(log_ratios - largest[:, None, None])
    mean = ratios.mean(axis=(1, 2))
    if not np.isfinite(mean).all():
        raise ValueError("The log density is not finite at some draw of the parameters and row of the model.")
    size = m // _BATCHES
    batches = ratios[..., m - _BATCHES * size :].reshape(s, c * _BATCHES, size).mean(-1)
    deviations = batches / batches.mean(-1, keepdims=True) - 1
    found = PartitionRatios(np.log(mean) + largest, deviations.T)
    variances = (ratios.reshape(s, -1) / mean[:, None]).var(-1) / (c * m)  # of independent rows
    _warn_of_heavy_weights(log_ratios.reshape(s, -1), variances, found.stderr)
    return found


def _warn_of_heavy_weights(
    log_ratios: Float[np.ndarray, "s m"], variances: Float[np.ndarray, "s"], stderr: Float[np.ndarray, "s"]
) -> None:
    """By the Pareto k of the 50 draws whose weights vary most."""
    worst = np.argsort(-variances)[:50]
    varies = worst[variances[worst] > 0]
    efficiency = float(np.median(variances[varies] / stderr[varies] ** 2)) if len(varies) else 1.0
    k = pareto_smoothed(log_ratios[worst], min(efficiency, 1.0))[1]
    if count := int(np.sum(~(k <= _WORST_K))):
        at = plural(count, "draw") + (" or more" if count == len(worst) < len(log_ratios) else "")
        warnings.warn(
            f"At {at} of {len(log_ratios)} of the parameters log Z is not to be trusted, nor its error (Pareto k up to "
            f"{k.max():.2f}): the model is too far there from that at the estimates for importance weights. Fit more "
            "rows, or compare by hyvarinen_loo with predictive='pool', which needs no log Z.",
            stacklevel=4,
        )


def mcse(values: Float[np.ndarray, "chain draw n"]) -> Float[np.ndarray, "n"]:
    """Monte Carlo standard errors of the means over chains of draws; 0 where all draws are equal."""
    errors = az.mcse(xr.Dataset({"values": (("chain", "draw", "row"), values)}), method="mean")["values"].values
    return np.where(np.ptp(values, axis=(0, 1)) > 0, errors, 0.0)


def pareto_smoothed(
    log_weights: Float[np.ndarray, "n s"], efficiency: float
) -> tuple[Float[np.ndarray, "n s"], Float[np.ndarray, "n"]]:
    """ArviZ's Pareto-smoothed importance weights of each row, which sum to one, and their tail indices k.

    Equal weights have no tail to fit; theirs is k = 0.
    """
    n, s = log_weights.shape
    weights, k = np.full((n, s), 1 / s), np.zeros(n)
    varies = np.ptp(log_weights, axis=1) > 0
    if varies.any():
        log_ratios = xr.DataArray(log_weights[varies], dims=("row", "__sample__"))
        if hasattr(az, "psislw"):  # ArviZ 0.23
            smoothed, k[varies] = az.psislw(log_ratios, efficiency)
        else:  # 1.x takes log likelihoods, the negative of the log weights of ordinary leave-one-out
            smoothed, k[varies] = (-log_ratios).azstats.psislw(r_eff=efficiency, dim="__sample__")
        smoothed = np.asarray(smoothed)
        smoothed = np.exp(smoothed - smoothed.max(-1, keepdims=True))
        weights[varies] = smoothed / smoothed.sum(-1, keepdims=True)
    return weights, k
