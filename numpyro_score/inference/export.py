"""A fit as ArviZ's groups."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from numpyro_score.arviz import dataset, flat, observed
from numpyro_score.energy import Energy
from numpyro_score.losses import row_losses
from numpyro_score.normaliser import LogPartition
from numpyro_score.normaliser.coordinates import row_log_jacobian
from numpyro_score.normaliser.ratios import partition_ratios
from numpyro_score.printed import without_addresses
from numpyro_score.uncertainty import SandwichError

__all__ = ["NormalisedDensity", "fit_groups"]


@runtime_checkable
class NormalisedDensity(Protocol):
    """A density that needs no log Z, as :class:`~numpyro_score.ScoreDistribution`."""

    smallest_sigma: Any

    @property
    def energy(self) -> Energy:
        """The model that it is the density of."""

    def log_prob_at(self, params: dict[str, Any], x: Float[Array, "n d"]) -> Float[Array, "s n"]:
        """Log densities of rows (N, D) at each of S values of the parameters."""


def fit_groups(
    fit: Any, rng_key: Any, num_samples: int, log_partition: LogPartition | NormalisedDensity | float | None
) -> dict[str, xr.Dataset]:
    """The groups of a :class:`~numpyro_score.ScoreMatchingResult`; see :func:`~numpyro_score.to_arviz`."""
    losses, weights = row_losses(fit.svi.score_loss, fit.energy, jax.random.key(0))
    details = dataset({"loss": fit.losses}, ("step",))
    details = details.merge(dataset({"pointwise_loss": losses, "weight": weights}, ("row",)))
    details.attrs |= {
        "loss_function": without_addresses(fit.svi.score_loss),
        "learning_rate": float(fit.svi.learning_rate),
    }
    groups = {"observed_data": observed(fit.energy), "score_matching": details}
    try:
        draws = fit.sample_posterior(rng_key, num_samples)
    except SandwichError as error:  # the one thing a fit may lack; everything else is still worth having
        if log_partition is not None:
            raise
        details.attrs["no_posterior"] = str(error)
        return groups
    chains = 4 if num_samples % 4 == 0 else 1  # the draws are independent; ArviZ's diagnostics want several chains
    arrays = {k: np.reshape(v, (chains, num_samples // chains, *np.shape(v)[1:])) for k, v in flat(draws).items()}
    posterior = dataset(arrays, ("chain", "draw"))
    law = "normal with sandwich covariance in unconstrained space, at a point estimate"
    posterior.attrs["draws"] = law if fit.is_point else f"from the guide {type(fit.svi.guide).__name__}"
    if isinstance(log_partition, NormalisedDensity):
        groups["log_likelihood"] = _by_density(fit.energy, draws, log_partition, chains)
    elif log_partition is not None:
        key = jax.random.fold_in(rng_key, 1)  # the draws have used the key itself
        groups["log_likelihood"], ratios = _log_likelihood(fit.energy, draws, log_partition, key, chains)
        groups["score_matching"] = details.assign(ratios)
    return {"posterior": posterior, **groups}


def _by_density(energy: Energy, draws: dict[str, Any], density: NormalisedDensity, chains: int) -> xr.Dataset:
    """Log densities of the data that count, at each draw.

    Raises:
        ValueError: if the density is of another model or fit.
    """
    own, other = energy.params, density.energy.params
    if density.energy.model is not energy.model or own.keys() != other.keys():
        raise ValueError(
            f"log_partition is a {type(density).__name__} of another model than the fit's: pass "
            f"{type(density).__name__}(fit)."
        )
    for name, value in own.items():
        if not jax.tree.all(jax.tree.map(np.array_equal, value, other[name])):
            raise ValueError(
                f"log_partition is a {type(density).__name__} of another fit, whose '{name}' is another: pass "
                f"{type(density).__name__}(fit)."
            )
    x, weights = jax.device_get(jax.jit(Energy.data_and_weights)(energy))
    (used,) = np.nonzero(weights)
    values = density.log_prob_at({k: v for k, v in draws.items() if k in energy.params}, jnp.asarray(x[used]))
    name = "_".join(a.name for a in energy.arrays)
    group = dataset({name: np.reshape(values, (chains, -1, len(used)))}, ("chain", "draw", "row"))
    group = group.assign_coords(row=used)
    group.attrs["smallest_sigma"] = float(density.smallest_sigma)
    return group


def _log_likelihood(
    energy: Energy, draws: dict[str, Any], log_partition: LogPartition | float, rng_key: Array, chains: int
) -> tuple[xr.Dataset, xr.Dataset]:
    """Normalised log densities of the data, in the measure of the data's own shapes, and log Z(θ) − log Z(θ₀)."""
    draws = {k: v for k, v in draws.items() if k in energy.params}
    value, stderr = LogPartition.of(log_partition)[:2]
    ratios = partition_ratios(energy, draws, rng_key)
    log_density, weights = jax.device_get(_data_log_densities(energy, draws))
    (used,) = np.nonzero(weights)
    normalised = log_density[:, used].astype(np.float64) - (value + ratios.values)[:, None]
    name = "_".join(a.name for a in energy.arrays)
    group = dataset({name: normalised.reshape(chains, -1, len(used))}, ("chain", "draw", "row"))
    group = group.assign_coords(row=used)
    group.attrs |= {
        "log_partition": float(value),
        "log_partition_stderr": float(stderr),
        "log_partition_ratio_stderr": float(ratios.stderr.max()),
        "log_partition_ratio_bound": ratios.bound(),
    }
    of_draws = {"log_partition_ratio": ratios.values, "log_partition_ratio_stderr": ratios.stderr}
    return group, dataset({k: v.reshape(chains, -1) for k, v in of_draws.items()}, ("chain", "draw"))


@jax.jit
def _data_log_densities(energy: Energy, draws: dict[str, Any]) -> tuple[Float[Array, "s n"], Float[Array, "n"]]:
    energy, weights = energy.usable()
    x = energy.data
    log_jacobian = jax.vmap(partial(row_log_jacobian, energy))(x)
    log_density = jax.lax.map(lambda theta: energy.with_params(theta).log_density(x) - log_jacobian, draws)
    return log_density, weights
