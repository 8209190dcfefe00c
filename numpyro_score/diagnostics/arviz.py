"""Fits and samples as ArviZ data, for ArviZ 0.23 and 1.x."""

from __future__ import annotations

from functools import partial
from typing import Any

import arviz as az
import jax
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from numpyro.infer import MCMC

import numpyro_score
from numpyro_score.diagnostics.partition import partition_ratios
from numpyro_score.energy import Energy
from numpyro_score.inference.generalized import GeneralizedModel
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.sandwich import SandwichError
from numpyro_score.losses import row_losses
from numpyro_score.normaliser import LogPartition
from numpyro_score.normaliser.coordinates import row_log_jacobian

__all__ = ["to_arviz"]

# The names and signs under which ArviZ knows NumPyro's fields.
_STAT_NAMES = {
    "potential_energy": "lp",
    "adapt_state.step_size": "step_size",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
}


def to_arviz(
    source: ScoreMatchingResult | MCMC,
    *args: Any,
    rng_key: Any = None,
    num_samples: int = 1000,
    log_partition: LogPartition | float | None = None,
    **kwargs: Any,
) -> Any:
    r"""Turns a fit or an MCMC run into ArviZ data: an `InferenceData` (ArviZ 0.23) or a `DataTree` (1.x).

    Groups:

    - `posterior`: draws by site, (chain, draw, ...). Those of a point fit are N(estimate, sandwich) in unconstrained
      space, and the group's attribute `draws` says so. A fit whose sandwich does not exist (too many parameters, as in
      a network, or a flat objective) has no posterior group; the attribute `no_posterior` of `score_matching` says why.
    - `sample_stats`: of an MCMC run, under ArviZ's names.
    - `observed_data`: the data, in the sites' own shapes.
    - `score_matching`: of a fit, the loss of each step (`loss`), and of each row at the estimates
      (`pointwise_loss`) with its `weight`.

    There is no `log_likelihood` group unless log Z is given: the density is unnormalised, and `az.loo` would return
    nonsense from it. Asked for the group, as `az.loo` does, the data raise a TypeError that says so.

    With log Z at the estimates of a fit there is

    - `log_likelihood`: f_θ(x_n) − log Z(θ) of each draw and each row that has a weight, (chain, draw, row), with

      .. math:: \log Z(\theta) = \log Z(\hat\theta)
                + \log \mathrm{E}_{x \sim p_{\hat\theta}} e^{f_\theta(x) - f_{\hat\theta}(x)},

      the second term from 4,000 draws x of the fitted model by NUTS. The attributes `log_partition` and
      `log_partition_stderr` are of the first term, and `log_partition_ratio_stderr` is the largest error among the
      draws of the second. `az.loo` takes the draws of θ for those of the likelihood's posterior. N(estimate,
      sandwich) is that to first order for a fit as good as maximum likelihood; a wider one costs the model some elpd.

    Args:
        source: a fit, or an `MCMC` object after `run`.
        *args: for an MCMC run, the model's arguments, to record the data.
        rng_key: a key for the draws of a fit; `jax.random.key(0)` if not given.
        num_samples: how many draws of a fit.
        log_partition: log Z at the estimates of a fit, by :func:`~numpyro_score.log_partition`, or as a number where
            it is known exactly.
        **kwargs: for an MCMC run, the model's keyword arguments.

    Raises:
        TypeError: if `source` is neither; `log_partition` for an MCMC run, or for a model without a density.
        SandwichError: with `log_partition`, for a fit without draws.
        ValueError: with `log_partition`, if rows have densities of their own, or the density at some draw cannot be
            normalised.
    """
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    if isinstance(source, ScoreMatchingResult):
        groups = _fit_groups(source, rng_key, num_samples, log_partition)
    elif isinstance(source, MCMC):
        if log_partition is not None:
            raise TypeError("log_partition is log Z at the estimates of a fit, and an MCMC run has none: leave it out.")
        groups = _mcmc_groups(source, args, kwargs)
    else:
        raise TypeError(f"to_arviz takes a ScoreMatchingResult or a numpyro.infer.MCMC, got {type(source).__name__}.")
    return as_arviz(groups)


def as_arviz(groups: dict[str, xr.Dataset]) -> Any:
    """Groups as the container that the installed ArviZ has."""
    library = {
        "inference_library": "numpyro_score",
        "inference_library_version": numpyro_score.__version__,
        "creation_library": "numpyro_score",
    }
    for group in groups.values():
        group.attrs |= library
    if hasattr(az, "convert_to_datatree"):  # ArviZ 1.x
        tree = ScoreData.from_dict(groups)
        tree.attrs |= library
        return tree
    return ScoreData(attrs=library, **groups)


class ScoreData(xr.DataTree if hasattr(az, "convert_to_datatree") else az.InferenceData):  # type: ignore[misc]
    """The container of the installed ArviZ, which says why it has no log likelihood when it is asked for one."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there otherwise."""
        if name == "log_likelihood" and name not in getattr(self, "children", ()):
            # Not an AttributeError, which ArviZ would turn into its own. It raises a TypeError here, too.
            raise TypeError(
                "There is no log likelihood: the density is unnormalised. Write "
                "fit.to_arviz(log_partition=log_partition(fit)) for az.loo, or use numpyro_score.hyvarinen_loo(fit), "
                "which needs no normaliser."
            )
        inherited = getattr(super(), "__getattr__", None)
        if inherited is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return inherited(name)


def _fit_groups(
    fit: ScoreMatchingResult, rng_key: Any, num_samples: int, log_partition: LogPartition | float | None
) -> dict[str, xr.Dataset]:
    losses, weights = jax.jit(partial(row_losses, fit.svi.score_loss))(fit.energy, jax.random.key(0))
    details = dataset({"loss": fit.losses}, ("step",))
    details = details.merge(dataset({"pointwise_loss": losses, "weight": weights}, ("row",)))
    details.attrs |= {
        "loss_function": repr(fit.svi.score_loss),
        "learning_rate": float(fit.svi.learning_rate),
    }
    groups = {"observed_data": _observed(fit.energy), "score_matching": details}
    try:
        draws = fit.sample_posterior(rng_key, num_samples)
    except SandwichError as error:  # the one thing a fit may lack; everything else is still worth having
        if log_partition is not None:
            raise
        details.attrs["no_posterior"] = str(error)
        return groups
    chains = 4 if num_samples % 4 == 0 else 1  # the draws are independent; ArviZ's diagnostics want several chains
    arrays = {k: np.reshape(v, (chains, num_samples // chains, *np.shape(v)[1:])) for k, v in _flat(draws).items()}
    posterior = dataset(arrays, ("chain", "draw"))
    law = "normal with sandwich covariance in unconstrained space, at a point estimate"
    posterior.attrs["draws"] = law if fit.is_point else f"from the guide {type(fit.svi.guide).__name__}"
    if log_partition is not None:
        key = jax.random.fold_in(rng_key, 1)  # the draws have used the key itself
        groups["log_likelihood"] = _log_likelihood(fit.energy, draws, log_partition, key, chains)
    return {"posterior": posterior, **groups}


def _log_likelihood(
    energy: Energy, draws: dict[str, Any], log_partition: LogPartition | float, rng_key: Array, chains: int
) -> xr.Dataset:
    """Normalised log densities of the data, in the measure of the data's own shapes."""
    draws = {k: v for k, v in draws.items() if k in energy.params}
    value, stderr = LogPartition.of(log_partition)[:2]
    ratios, errors = partition_ratios(energy, draws, rng_key)
    log_density, weights = jax.device_get(_data_log_densities(energy, draws))
    (used,) = np.nonzero(weights)
    normalised = log_density[:, used].astype(np.float64) - (value + ratios)[:, None]
    name = "_".join(a.name for a in energy._layout.arrays)
    group = dataset({name: normalised.reshape(chains, -1, len(used))}, ("chain", "draw", "row"))
    group = group.assign_coords(row=used)
    group.attrs |= {
        "log_partition": float(value),
        "log_partition_stderr": float(stderr),
        "log_partition_ratio_stderr": float(errors.max()),
    }
    return group


@jax.jit
def _data_log_densities(energy: Energy, draws: dict[str, Any]) -> tuple[Float[Array, "s n"], Float[Array, "n"]]:
    energy, weights = energy.usable()
    x = energy.data
    log_jacobian = jax.vmap(partial(row_log_jacobian, energy))(x)
    log_density = jax.lax.map(lambda theta: energy.with_params(theta).log_density(x) - log_jacobian, draws)
    return log_density, weights


def _mcmc_groups(mcmc: MCMC, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, xr.Dataset]:
    draws = mcmc.get_samples(group_by_chain=True)
    groups = {"posterior": dataset(_flat(draws), ("chain", "draw"))}
    if stats := sample_stats(mcmc.get_extra_fields(group_by_chain=True)):
        groups["sample_stats"] = dataset(stats, ("chain", "draw"))
    if args or kwargs:
        if not isinstance(mcmc.sampler.model, GeneralizedModel):
            raise TypeError(
                "The MCMC run is not over generalized_bayes(model, loss), so its data are not known: leave the model's "
                "arguments out."
            )
        groups["observed_data"] = _observed(mcmc.sampler.model.energy(*args, **kwargs))
    return groups


def sample_stats(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of NumPyro's kernels under ArviZ's names and signs."""
    return {
        _STAT_NAMES.get(name, name): -value if name == "potential_energy" else value
        for name, value in fields.items()
        if not isinstance(value, dict | tuple)
    }


def _observed(energy: Energy) -> xr.Dataset:
    return dataset(energy.unflatten(energy.data), ())


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Sites that hold a pytree, such as a network's weights, as one variable per leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(values)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def dataset(values: dict[str, Any], dims: tuple[str, ...]) -> xr.Dataset:
    """Arrays with the given leading dimensions; further ones are named as ArviZ does, and numbered from 0."""
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for name, value in values.items():
        value = np.asarray(value)
        rest = [f"{name}_dim_{i}" for i in range(value.ndim - len(dims))]
        variables[name] = ((*dims, *rest), value)
        coords |= {d: np.arange(n) for d, n in zip((*dims, *rest), value.shape, strict=True)}
    return xr.Dataset(variables, coords)
