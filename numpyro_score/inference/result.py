"""What a fit returns."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import AutoDelta

from numpyro_score.arviz import as_arviz
from numpyro_score.energy import NO_LABELS, Labels, bind, layouts_kept, read_arguments
from numpyro_score.inference.absent import Absent
from numpyro_score.inference.cost import FitCost
from numpyro_score.inference.export import NormalisedDensity, fit_groups
from numpyro_score.inference.files import save_fit
from numpyro_score.inference.fitter import Fitter, objectives_of
from numpyro_score.inference.guides import draw_latents, medians
from numpyro_score.inference.pickling import without_observed
from numpyro_score.inference.summary import Summary, number_names, summarise
from numpyro_score.labels import site_dims
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser import LogPartition
from numpyro_score.printed import values_with_errors
from numpyro_score.random import Key, as_key
from numpyro_score.uncertainty import (
    MAX_PARAMETERS,
    Curvature,
    Dependence,
    Objective,
    Parametrisation,
    SandwichError,
    calibrated_learning_rate,
    curvature,
    curvature_of_batches,
    diagonal_stderr,
    influence,
    stderr_from,
    stderr_of,
)

__all__ = ["ScoreMatchingResult"]

Function = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class ScoreMatchingResult:
    """A fitted model.

    Attributes:
        params: constrained values of the param sites of model and guide, as SVI's; their average with `average`.
        state: the last `SVIState`; pass it as `init_state` to go on.
        losses: the loss of every step, (S,), at the parameters of that step.
        svi: the :class:`~numpyro_score.ScoreMatching` that made the fit.
        args, kwargs: the model's arguments.
        interrupted: whether Ctrl-C ended the fit early.
        cost: seconds, memory and evaluations of the density that the run took.
        of_batches: the curvature of more rows than `args` holds, see :meth:`over_batches`.
        labels: names of the axes and columns of tables among the model's arguments.
        held_out: steps taken and the mean loss of the rows held out there, (K, 2), see `run_batches`.
        dependence: which rows depend on each other, see :func:`~numpyro_score.dependent_rows`.
    """

    params: dict[str, Any]
    state: Any
    losses: np.ndarray
    svi: Fitter
    args: Any  # a tuple, unless it was left out
    kwargs: Any  # a dict, likewise
    interrupted: bool = False
    cost: FitCost | None = None
    of_batches: Curvature | None = None
    labels: Labels = NO_LABELS
    held_out: np.ndarray | None = None
    dependence: Dependence | None = None

    def __post_init__(self) -> None:
        if self.has_data:  # which may be tables, where `dataclasses.replace` gives it
            arguments = read_arguments(self.svi.score_model, self.args, self.kwargs, self.labels)
            self.__dict__.update(zip(("args", "kwargs", "labels"), arguments, strict=True) if arguments[2].axes else ())

    def __repr__(self) -> str:
        # Standard errors only where they are there: a printed form neither computes for long nor fails.
        errors = None
        if "curvature" in self.__dict__:
            with contextlib.suppress(SandwichError):
                errors = self.coordinates.stderr(self.curvature.covariance)
        lines = values_with_errors(self.estimates if self.is_point else self.params, errors)
        head = f"ScoreMatchingResult of {len(self.losses)} steps, last loss {self.losses[-1]:.6g}"
        return "\n  ".join([head, *lines])

    def __getstate__(self) -> dict[str, Any]:
        # Without what is computed from the fields, some of which holds functions that cannot be pickled.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        return state if self.has_data else state | {"estimates": self.estimates}  # not to be computed again

    @property
    def has_data(self) -> bool:
        """Whether the model's arguments are here."""
        return not isinstance(self.args, Absent) and not isinstance(self.kwargs, Absent)

    def without_data(self) -> ScoreMatchingResult:
        """The same fit without the model's arguments, e.g. to keep many fits, or to pass one on.

        :attr:`estimates`, `params`, `state` and `losses` stay. What needs the data raises ValueError: :attr:`energy`,
        errors, draws. `dataclasses.replace(fit, args=(x,), kwargs={...})` gives them back. Guides that hold the density
        itself, as `AutoLaplaceApproximation`, keep its data.
        """
        if not self.has_data:
            return self
        args: Any = Absent("args") if self.args else ()
        kwargs: Any = Absent("kwargs") if self.kwargs else {}
        svi = copy.copy(self.svi)
        svi.guide = without_observed(svi.guide)
        new = replace(self, svi=svi, args=args, kwargs=kwargs)
        new.__dict__["estimates"] = self.estimates  # which the model's sites are needed for
        return new

    @property
    def is_point(self) -> bool:
        """Whether the guide is a point estimate."""
        return isinstance(self.svi.guide, AutoDelta)

    @property
    def has_missing_cells(self) -> bool:
        """Whether the loss takes rows with missing cells."""
        return getattr(self.svi.score_loss, "takes_missing", False)

    @property
    def learning_rate(self) -> Any:
        """The β that the fit used."""
        return self.svi.learning_rate

    @property
    def has_prior(self) -> bool:
        """Whether the minimum depends on β: there are latent sites, or factors without data."""
        return bool(self._latents) or bool(self.energy.penalties)

    @cached_property
    def estimates(self) -> dict[str, Any]:
        """Constrained point values by site, latents and model params alike; the guide's median where it is no point."""
        return {
            **self._latents,
            **{k: s["value"] for k, s in self.sites.items() if s["type"] == "param"},
        }

    @property
    def init_strategy(self) -> Callable[..., Any]:
        """Starts NumPyro's MCMC at the fit: `NUTS(generalized_bayes(model, loss), init_strategy=fit.init_strategy)`.

        NumPyro's `init_to_value` with the :attr:`estimates`: every chain starts there, so that none is caught in
        a mode of little mass; R-hat then says nothing of modes far from the fit. MCMC holds param sites at the initial
        values that the model gives; `handlers.substitute(generalized_bayes(model, loss), fit.params)` at the fit's.
        """
        return init_to_value(values=self.estimates)

    @cached_property
    def energy(self) -> Any:  # an Energy, or Energies
        """The model bound to :attr:`estimates`, on all rows of its data; for several plates of these, one by site."""
        mutable = {k: s["value"] for k, s in self.sites.items() if s["type"] == "mutable"}
        svi, params = self.svi, {**self.estimates, **mutable}
        energy = bind(svi.score_model, params, {}, None, svi.data, self.args, self.kwargs)
        return energy.labelled(self.labels)

    def summary(
        self,
        level: float = 0.95,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Summary:
        """The fit as a table, one row for each number; names are those of ArviZ.

        Columns: `estimate`; `stderr`, as :meth:`stderr`; `z`, the estimate in standard errors, missing where the site's
        constraint leaves zero out; the ends of an interval, `2.5%` and `97.5%`, normal in unconstrained space, as draws
        of :meth:`sample_posterior`, or t for groups of rows; `distance` of the minimum, in standard errors (of a
        simplex or matrix, of the coordinate furthest away). Deterministic sites are there, and why errors are missing.

        Args:
            level: of the intervals.
            coords: labels along axes, {name: labels}, as in :meth:`to_arviz`.
            dims: names of axes, {site: [name, ...]}, likewise. Those of plates are the plates' without.

        Returns:
            A `pandas.DataFrame` that prints as text, and in notebooks as HTML.
        """
        return summarise(self, level, coords, dims)

    @cached_property
    def number_names(self) -> dict[str, list[str]]:
        """Names of the numbers of the estimates, by variable as in ArviZ."""
        return number_names(self)

    @property
    def axes(self) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Coords and dims that are known from tables and plates."""
        coords, dims = self.labels.as_coords(self.energy.arrays)
        return coords, {**site_dims(self.sites), **dims}

    def covariance(self) -> Float[Array, "p p"]:
        """The sandwich covariance H⁻¹SH⁻¹ of the estimates, (P, P), in unconstrained space.

        The order of the P coordinates is that of `jax.flatten_util.ravel_pytree` of the sites' unconstrained values:
        sites in alphabetical order. See :func:`numpyro_score.uncertainty.curvature` for the formula, which in a
        hierarchy counts the spread of its effects.

        Raises:
            SandwichError: for more than 2,000 parameters, if the objective is not curved upwards at the estimates, or
                if the losses see two sites by their product alone.
        """
        return jnp.asarray(self.curvature.covariance, jnp.result_type(float))

    def stderr(self, of: Function | None = None, *, diagonal: bool = False) -> Any:
        """Sandwich standard errors in constrained space (delta method): of :attr:`estimates`, by site.

        Args:
            of: a function of :attr:`estimates`, e.g. `lambda estimates: estimates["scale"] ** 2`; then the standard
                errors of what it returns, an array or a pytree of arrays, in the same structure.
                Above 2,000 parameters this is the way: its systems with H are then solved by conjugate gradients,
                one for each number that `of` returns.
            diagonal: ignore all correlations between parameters, as if each were estimated with the others known.
                For any number of parameters; see :func:`~numpyro_score.uncertainty.diagonal_stderr`.

        Raises:
            SandwichError: as :meth:`covariance`; with `of`, as :meth:`influence`.
            ValueError: for both `of` and `diagonal`.
        """
        if diagonal and of is not None:
            raise ValueError("stderr takes of=... or diagonal=True, not both.")
        if diagonal:
            self._refuse_batches("stderr(diagonal=True)", independent=True)
            return diagonal_stderr(self._objective)
        if of is None:
            return self.coordinates.stderr(self.curvature.covariance)
        few = len(self.coordinates.position) <= MAX_PARAMETERS
        if self.of_batches is not None or (few and self.dependence is not None):
            return stderr_from(self._objective, of, self.curvature.covariance)
        hessian, effects = (self.curvature.hessian, self.curvature.effects) if few else (None, None)
        return stderr_of(self._objective, of, hessian, effects, self.dependence)

    def influence(self, of: Function | None = None) -> Any:
        r"""How much each row moves the estimates: by site, (N, ...), in constrained space (delta method).

        .. math:: I_n = -\sqrt{\tfrac{N}{N-1}}\, J H^{-1} \beta\, (g_n - \bar g), \quad g_n = w_n \nabla \ell_n,

        with J the Jacobian of the constrained values: the infinitesimal jackknife, scaled so that Σ_n I_n I_nᵀ is the
        sandwich covariance, of a hierarchy the rows' part of it. To first order in 1/N the estimates without row n are
        estimates − I_n; with a prior, they are those in which row n's weight moves evenly to all rows.

        Args:
            of: a function of :attr:`estimates`; then the influence on what it returns, in the same structure, each
                leaf (N, ...).

        Raises:
            SandwichError: as :meth:`covariance`. With `of` and more than 2,000 parameters, where H is not formed:
                data of one row, or conjugate gradients that meet a direction in which the objective is not curved
                upwards, or that do not converge.
        """
        self._refuse_batches("influence")
        dense = of is None or len(self.coordinates.position) <= MAX_PARAMETERS
        return influence(self._objective, of, self.curvature.hessian if dense else None)

    def calibrated_learning_rate(self) -> float:
        """The β that gives the generalised posterior the spread of the estimates, whatever β the fit used.

        See :func:`~numpyro_score.uncertainty.calibrated_learning_rate` for the formula.

        Raises:
            SandwichError: as :meth:`covariance`, and if the losses alone or the rows' gradients do not determine it.
        """
        return calibrated_learning_rate(self.curvature)

    def sample_posterior(self, rng_key: Key, n: int) -> dict[str, Any]:
        """Draws of the parameters, {site: (n, ...)}.

        A point fit is drawn from N(estimate, sandwich) in unconstrained space; other guides from the guide itself,
        with the model's params at their estimates. Deterministic sites are computed from the draws.
        """
        rng_key, n = as_key(rng_key), at_least_one("sample_posterior", "n", n)
        if self.is_point:
            return self.with_deterministic(self.coordinates.draw(rng_key, self.curvature.covariance, n))
        draws = draw_latents(self.svi.guide, rng_key, n, self.params, self.args, self.kwargs)
        params = {k: v for k, v in self.estimates.items() if k not in draws}
        return self.with_deterministic(draws | jax.tree.map(lambda v: jnp.broadcast_to(v, (n, *jnp.shape(v))), params))

    @property
    def deterministic_sites(self) -> list[str]:
        """The names of the model's deterministic sites."""
        return [k for k, s in self.sites.items() if s["type"] == "deterministic"]

    def with_deterministic(self, draws: dict[str, Any]) -> dict[str, Any]:
        """Draws of the latent and param sites, {site: (n, ...)}, with the model's deterministic sites there."""
        names = self.deterministic_sites

        def run(values: dict[str, Any]) -> dict[str, Any]:
            return {k: s["value"] for k, s in self._run_prior(values).items() if k in names}

        return {**draws, **jax.vmap(run)(draws)} if names else draws

    def to_arviz(
        self,
        rng_key: Key | None = None,
        num_samples: int = 1000,
        log_partition: LogPartition | NormalisedDensity | float | None = None,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Everything about the fit as ArviZ data; see :func:`~numpyro_score.to_arviz`."""
        rng_key = as_key(0 if rng_key is None else rng_key)
        num_samples = at_least_one("to_arviz", "num_samples", num_samples)
        groups = fit_groups(self, rng_key, num_samples, log_partition)
        return as_arviz(groups, coords, dims, *self.axes)

    def save(self, path: str | os.PathLike[str], *, data: bool = True) -> None:
        """Writes the fit to a new directory, from which :func:`~numpyro_score.load` reads it in later versions too.

        It holds `arrays.npz`, the numbers, and `fit.json`, which says what they are: no pickles, and no code.

        Args:
            path: the directory.
            data: whether to write the model's arguments, too.

        Raises:
            FileExistsError: if there is something already.
            TypeError: if an argument of the model is neither an array nor a number, string, list, tuple or dict.
        """
        save_fit(self if data else self.without_data(), path)

    @cached_property
    def _latents(self) -> dict[str, Any]:
        return medians(self.svi.guide, self.params, self.args, self.kwargs)

    @cached_property
    def sites(self) -> dict[str, Any]:
        """The parameter sites of the model at the estimates."""
        return self._run_prior({**self.params, **self._latents})

    def _run_prior(self, values: dict[str, Any]) -> dict[str, Any]:
        return self.svi.trace_prior({**(self.state.mutable_state or {}), **values}, self.args, self.kwargs)

    @cached_property
    def coordinates(self) -> Parametrisation:
        """The unconstrained coordinates of the estimates."""
        return Parametrisation.of_sites(self.sites)

    @cached_property
    @layouts_kept()
    def curvature(self) -> Curvature:
        """Hessians, spread of the gradients and sandwich at the estimates; see :meth:`covariance`."""
        return curvature(self._objective, self.dependence) if self.of_batches is None else self.of_batches

    def over_batches(self, batches: Iterable[Any], *, num_rows: int | None = None) -> ScoreMatchingResult:
        """The same fit with the standard errors of all rows of `batches`, one batch in memory at a time.

        What is computed from the sandwich is then of all these rows: :meth:`covariance`, :meth:`stderr`,
        :meth:`sample_posterior`, :meth:`calibrated_learning_rate`. Each batch costs P gradients of its rows.
        :meth:`save` does not keep them.

        Args:
            batches: as those of :meth:`~numpyro_score.ScoreMatching.run_batches`, in one pass; they may differ in size,
                and each size compiles once.
            num_rows: N, if these rows are drawn evenly from N: errors of N rows. Default: the rows that there are.

        Raises:
            SandwichError: as :meth:`covariance`; for hierarchies, whose groups batches do not show.
            ValueError: for no batch, or more rows in batches than `num_rows`.
        """
        self._refuse_batches("over_batches")
        if num_rows is not None:
            num_rows = at_least_one("over_batches", "num_rows", num_rows)
        objectives = objectives_of(self._objective, self.svi, self.coordinates, batches)
        return replace(self, of_batches=curvature_of_batches(objectives, num_rows))

    def _refuse_batches(self, what: str, independent: bool = False) -> None:
        if independent and self.dependence is not None:
            raise SandwichError(f"{what} takes rows as independent: use stderr(of=...).")
        if self.of_batches is not None:
            raise SandwichError(f"{what} is of rows in memory: take the fit that over_batches or windham was given.")

    @cached_property
    def _objective(self) -> Objective:
        svi, energy = self.svi, self.energy
        if (why := getattr(svi.score_loss, "no_curvature", None)) is not None:
            raise SandwichError(f"{type(svi.score_loss).__name__} gives no standard errors, as {why}.")
        if hasattr(svi.score_loss, "settle"):
            energy = jax.jit(svi.score_loss.settle)(energy, jax.random.fold_in(self.state.rng_key, 1))
        at = self.coordinates, svi.score_loss, svi.learning_rate, svi.prior, self.args, self.kwargs
        objective = Objective.of(energy, *at, self.state.rng_key)
        return replace(objective, by_coordinate=getattr(self.dependence, "of_coordinates", False))
