"""Fits and samples as ArviZ data, for ArviZ 0.23 and 1.x."""

from __future__ import annotations

from functools import partial
from typing import Any

import arviz as az
import jax
import numpy as np
import xarray as xr
from numpyro.infer import MCMC

import numpyro_score
from numpyro_score.energy import Energy
from numpyro_score.inference.generalized import GeneralizedModel
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.sandwich import SandwichError
from numpyro_score.losses import row_losses

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
    **kwargs: Any,
) -> Any:
    """Turns a fit or an MCMC run into ArviZ data: an `InferenceData` (ArviZ 0.23) or a `DataTree` (1.x).

    Groups:

    - `posterior`: draws by site, (chain, draw, ...). Those of a point fit are N(estimate, sandwich) in unconstrained
      space, and the group's attribute `draws` says so. A fit whose sandwich does not exist (too many parameters, as in
      a network, or a flat objective) has no posterior group; the attribute `no_posterior` of `score_matching` says why.
    - `sample_stats`: of an MCMC run, under ArviZ's names.
    - `observed_data`: the data, in the sites' own shapes.
    - `score_matching`: of a fit, the loss of each step (`loss`), and of each row at the estimates
      (`pointwise_loss`) with its `weight`.

    There is no `log_likelihood` group: the density is unnormalised, and `az.loo` would return nonsense from it.

    Args:
        source: a fit, or an `MCMC` object after `run`.
        *args: for an MCMC run, the model's arguments, to record the data.
        rng_key: a key for the draws of a fit; `jax.random.key(0)` if not given.
        num_samples: how many draws of a fit.
        **kwargs: for an MCMC run, the model's keyword arguments.

    Raises:
        TypeError: if `source` is neither.
    """
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    if isinstance(source, ScoreMatchingResult):
        groups = _fit_groups(source, rng_key, num_samples)
    elif isinstance(source, MCMC):
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
        tree = xr.DataTree.from_dict(groups)
        tree.attrs |= library
        return tree
    return az.InferenceData(attrs=library, **groups)


def _fit_groups(fit: ScoreMatchingResult, rng_key: Any, num_samples: int) -> dict[str, xr.Dataset]:
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
        details.attrs["no_posterior"] = str(error)
        return groups
    chains = 4 if num_samples % 4 == 0 else 1  # the draws are independent; ArviZ's diagnostics want several chains
    arrays = {k: np.reshape(v, (chains, num_samples // chains, *np.shape(v)[1:])) for k, v in _flat(draws).items()}
    posterior = dataset(arrays, ("chain", "draw"))
    law = "normal with sandwich covariance in unconstrained space, at a point estimate"
    posterior.attrs["draws"] = law if fit.is_point else f"from the guide {type(fit.svi.guide).__name__}"
    return {"posterior": posterior, **groups}


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
