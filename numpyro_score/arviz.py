"""Fits and samples as ArviZ data, for ArviZ 0.23 and 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import arviz as az
import jax
import numpy as np
import xarray as xr
from numpyro.infer import MCMC

from numpyro_score.energy import AnyEnergy
from numpyro_score.generalized import GeneralizedModel
from numpyro_score.labels import site_dims, with_labels
from numpyro_score.placement import fetch
from numpyro_score.version import __version__

__all__ = ["ScoreData", "as_arviz", "dataset", "flat", "observed", "sample_stats", "to_arviz"]

# The names and signs under which ArviZ knows NumPyro's fields.
_STAT_NAMES = {
    "potential_energy": "lp",
    "adapt_state.step_size": "step_size",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
}


@runtime_checkable
class Exportable(Protocol):
    """A fit that knows its own groups."""

    def to_arviz(
        self,
        rng_key: Any = None,
        num_samples: int = 1000,
        log_partition: Any = None,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Everything about the fit as ArviZ data."""


def to_arviz(
    source: Exportable | MCMC,
    *args: Any,
    rng_key: Any = None,
    num_samples: int = 1000,
    log_partition: Any = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
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
      `log_partition_stderr` are of the first term. The second and its standard error at each draw of θ are
      `log_partition_ratio` and `log_partition_ratio_stderr` of the group `score_matching`, (chain, draw). Of many
      draws some are off by more than two standard errors: with probability 0.95 none is off by more than the
      attribute `log_partition_ratio_bound`; `log_partition_ratio_stderr` is the largest standard error.
      `az.loo` takes the draws of θ for those of the likelihood's posterior. N(estimate,
      sandwich) is that to first order for a fit as good as maximum likelihood; a wider one costs the model some elpd.

    Args:
        source: a fit, or an `MCMC` object after `run`.
        *args: for an MCMC run, the model's arguments, to record the data.
        rng_key: a key for the draws of a fit; `jax.random.key(0)` if not given.
        num_samples: how many draws of a fit.
        log_partition: log Z at the estimates of a fit, by :func:`~numpyro_score.log_partition`, or as a number where
            it is known exactly. Of a fit at every noise level its :class:`~numpyro_score.ScoreDistribution`, which
            needs none: the `log_likelihood` is then by the probability flow at each draw, of the data with the noise
            that the attribute `smallest_sigma` says.
        coords: labels of axes, {name: labels}, as in `az.from_numpyro`.
        dims: names of a variable's axes besides chain and draw, {variable: [name, ...]}; `x_dim_0` and so on if not
            given. Those of a data site include the axis of its rows.
        **kwargs: for an MCMC run, the model's keyword arguments.

    Raises:
        TypeError: if `source` is neither; arguments of the model for a fit; `log_partition` for an MCMC run, or for a
            model without a density.
        SandwichError: with `log_partition`, for a fit without draws.
        ValueError: names or labels of other lengths than the axes, or of none; with `log_partition`, if rows have
            densities of their own, or the density at some draw cannot be normalised.

    Warns:
        UserWarning: with `log_partition`, if the model at some draws is too far from that at the estimates (Pareto k
            above 0.7), or may not be normalisable there.
    """
    if isinstance(source, Exportable):
        if args or kwargs:
            given = ", ".join([*(["the model's arguments"] if args else []), *map(repr, kwargs)])
            raise TypeError(f"A fit has its own data, and to_arviz takes no more of it; leave out {given}.")
        return source.to_arviz(rng_key, num_samples, log_partition, coords=coords, dims=dims)
    if isinstance(source, MCMC):
        if log_partition is not None:
            raise TypeError("log_partition is log Z at the estimates of a fit, and an MCMC run has none: leave it out.")
        groups, own_coords, own_dims = _mcmc_groups(source, args, kwargs)
    else:
        raise TypeError(f"to_arviz takes a ScoreMatchingResult or a numpyro.infer.MCMC, got {type(source).__name__}.")
    return as_arviz(groups, coords, dims, own_coords, own_dims)


def as_arviz(
    groups: dict[str, xr.Dataset],
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    own_coords: Mapping[str, Any] | None = None,
    own_dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Groups as the container that the installed ArviZ has; names of axes as :func:`with_labels` takes them."""
    groups = with_labels(groups, coords, dims, own_coords, own_dims)
    library = {
        "inference_library": "numpyro_score",
        "inference_library_version": __version__,
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


def _mcmc_groups(
    mcmc: MCMC, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, xr.Dataset], dict[str, Any], dict[str, list[str]]]:
    """The groups, and the coords and dims that the model's arguments and its plates give."""
    draws = mcmc.get_samples(group_by_chain=True)
    _warn_of_lost_chains(mcmc, draws)
    # Of a bare potential_fn there are no sites: ArviZ's own names.
    named = draws if isinstance(draws, dict) else {f"Param:{i}": v for i, v in enumerate(jax.tree.leaves(draws))}
    groups = {"posterior": dataset(flat(named), ("chain", "draw"))}
    if stats := sample_stats(mcmc.get_extra_fields(group_by_chain=True)):
        groups["sample_stats"] = dataset(stats, ("chain", "draw"))
    if args or kwargs:
        if not isinstance(mcmc.sampler.model, GeneralizedModel):
            raise TypeError(
                "The MCMC run is not over generalized_bayes(model, loss), so its data are not known: leave the model's "
                "arguments out."
            )
        energy, sites = mcmc.sampler.model.energy_and_sites(*args, **kwargs)
        groups["observed_data"] = observed(energy)
        coords, data_dims = energy.labels.as_coords(energy.arrays)
        return groups, coords, {**site_dims(sites), **data_dims}
    return groups, {}, {}


def _warn_of_lost_chains(mcmc: MCMC, draws: Any) -> None:
    """Warns of chains that left the finite numbers, as NumPyro's `run` ends without a word from its kernel."""
    lost = np.zeros(mcmc.num_chains, bool)
    latents = attrgetter(mcmc.sampler.sample_field)(mcmc.last_state)
    if isinstance(latents, dict):  # a deterministic site may be NaN where the chain is sound
        draws = {k: v for k, v in draws.items() if k in latents}
    for leaf in map(np.asarray, jax.tree.leaves(draws)):
        if np.issubdtype(leaf.dtype, np.inexact):
            lost |= ~np.isfinite(leaf.reshape(mcmc.num_chains, -1)).all(-1)
    if not lost.any():
        return
    size, model = (getattr(mcmc.sampler, k, None) for k in ("step_size", "model"))
    advice = f"step_size={size / 10:.2g}" if isinstance(size, int | float) else "a smaller step size"
    start = "by other init_params" if model is None else "by another init_strategy"
    if isinstance(model, GeneralizedModel):
        start = "at a fit by init_strategy=fit.init_strategy"
    warnings.warn(
        f"{lost.sum()} of {len(lost)} chains have draws that are NaN or infinite: they may have run away, so try "
        f"{type(mcmc.sampler).__name__} with {advice}, or start them {start}.",
        stacklevel=4,
    )


def sample_stats(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of NumPyro's kernels under ArviZ's names and signs."""
    return {
        _STAT_NAMES.get(name, name): -value if name == "potential_energy" else value
        for name, value in fields.items()
        if not isinstance(value, dict | tuple)
    }


def observed(energy: AnyEnergy) -> xr.Dataset:
    """The data, in the sites' own shapes."""
    data = {k: v for part in energy.parts for k, v in part.unflatten(part.data).items()}
    return dataset(data, ())


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Sites that hold a pytree, such as a network's weights, as one variable per leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(values)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def dataset(values: dict[str, Any], dims: tuple[str, ...]) -> xr.Dataset:
    """Arrays with the given leading dimensions; further ones are named as ArviZ does, and numbered from 0."""
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for name, value in values.items():
        value = np.asarray(fetch(value) if isinstance(value, jax.Array) else value)
        rest = [f"{name}_dim_{i}" for i in range(value.ndim - len(dims))]
        variables[name] = ((*dims, *rest), value)
        coords |= {d: np.arange(n) for d, n in zip((*dims, *rest), value.shape, strict=True)}
    return xr.Dataset(variables, coords)
