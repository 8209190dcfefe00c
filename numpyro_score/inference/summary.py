"""A fit as a table: one row for each number, with its standard error and interval."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.stats
import xarray as xr
from jaxtyping import Array
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform

from numpyro_score.arviz import dataset, flat
from numpyro_score.energy import AnyEnergy, Energy, plural
from numpyro_score.labels import element_names, with_labels
from numpyro_score.losses import loss_for
from numpyro_score.placement import fetch
from numpyro_score.printed import name_of, num_numbers, settings
from numpyro_score.uncertainty import ARRIVED, AT_AN_END, MAX_PARAMETERS, NOT_CONVERGED, SandwichError, undetermined

__all__ = ["Summary", "number_names", "rows_of", "summarise", "summarise_estimates"]

_DRAWS = 4000  # for intervals of sites whose numbers are tied to each other
_SHOWN = 60  # rows of the printed table
_FREE = 8.0  # a standard error in unconstrained space, a factor of 3,000 of a scale: the data do not hold it
_FEW = 20  # numbers of a site that is several arrays


class Summary(pd.DataFrame):
    """What :meth:`fit.summary() <numpyro_score.ScoreMatchingResult.summary>` returns: a table that says what it is.

    A `pandas.DataFrame` whose printed form, in a terminal and in a notebook, has `lines` around it.

    Attributes:
        lines: sentences: what was fitted, whether it converged, and what the table cannot give and why.
    """

    _metadata = ["lines"]  # noqa: RUF012 (as pandas reads it)
    lines: tuple[str, ...]

    def __repr__(self) -> str:
        first, *rest = getattr(self, "lines", ("",))
        table = self._shown().to_string(max_rows=_SHOWN) if len(self) else ""
        return "\n".join(filter(None, [first, table, *rest]))

    def _repr_html_(self) -> str:
        first, *rest = (f"<p>{html.escape(line)}</p>" for line in getattr(self, "lines", ("",)))
        return "".join([first, self._shown().to_html(max_rows=_SHOWN) if len(self) else "", *rest])

    def _shown(self) -> pd.DataFrame:
        """Numbers as people read them: to the second digit of the standard error; without columns that are empty."""
        table = pd.DataFrame(self).dropna(axis="columns", how="all")
        if "stderr" not in table:
            return table.map(lambda v: f"{v:.4g}")
        size = np.log10(table["stderr"].where(table["stderr"] > 0).fillna(1e-3).astype(float))
        digits = np.clip(1 - np.floor(size), 0, 9).astype(int)

        def shown(column: str, value: float, decimals: int) -> str:
            if pd.isna(value):
                return "–"
            decimals = 2 if column in ("z", "distance") else decimals
            text = f"{value:.{decimals}f}" if abs(value) < 1e7 and decimals < 8 else f"{value:.4g}"
            return text if float(text) else text.removeprefix("-")  # no zero below zero

        return pd.DataFrame(
            {c: [shown(c, v, d) for v, d in zip(table[c], digits, strict=True)] for c in table}, table.index
        )


def summarise(
    fit: Any,
    level: float,
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
) -> Summary:
    """See :meth:`~numpyro_score.ScoreMatchingResult.summary`."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}: write 0.95 for an interval of 95%.")
    tail = 50 * (1 - level)
    low, high = f"{tail:g}%", f"{100 - tail:g}%"
    values, left_out = _listed({**fit.estimates, **{k: fit.sites[k]["value"] for k in fit.deterministic_sites}})
    columns: dict[str, dict[str, Any]] = {"estimate": values}
    lines = [_head(fit)]
    try:
        covariance = _covariance(fit)
    except SandwichError as error:
        lines.append(f"No standard errors: {error}")
    else:
        errors = _errors(fit)
        at_ends = _of_coordinates(fit, values, fit.curvature.at_an_end)

        def inside(column: dict[str, Any]) -> dict[str, Any]:
            return {k: np.where(np.asarray(at_ends[k]) > 0, np.nan, np.asarray(v)) for k, v in column.items()}

        intervals = _intervals(fit, covariance, 0.5 * (1 + level), values, errors)
        columns |= {
            "stderr": inside(errors),
            "z": {k: _z(fit, k, v, errors[k]) for k, v in values.items()},
            low: inside({k: v[0] for k, v in intervals.items()}),
            high: inside({k: v[1] for k, v in intervals.items()}),
            "distance": _of_coordinates(fit, values, fit.curvature.distance),
        }
        lines.append(_convergence(fit))
        lines += _at_the_end(fit, covariance)
    lines += left_out
    if fit.interrupted:
        lines.append("Ctrl-C ended the fit early.")
    order = ("estimate", "stderr", "z", low, high, "distance")
    return _as_table(order, columns, _labelled(values, coords, dims, *fit.axes), tuple(lines))


def summarise_estimates(estimates: dict[str, Any], head: str, why: str) -> Summary:
    """A table of estimates that have no errors, with a sentence on what they are of, and one that says why."""
    values, left_out = _listed(estimates)
    columns = {"estimate": values}
    return _as_table(("estimate",), columns, _labelled(values, None, None, {}, {}), (head, why, *left_out))


def _as_table(
    order: Sequence[str],
    columns: dict[str, dict[str, Any]],
    labelled: dict[str, xr.DataArray],
    lines: tuple[str, ...],
) -> Summary:
    """The columns, by variable, as a table with a row for each number; empty where there are none."""
    names = {k: element_names(array) for k, array in labelled.items()}
    values = columns["estimate"]
    table = {
        c: np.concatenate([np.ravel(_number(of[k], values[k])) for k in names] or [np.zeros(0)])
        if (of := columns.get(c)) is not None
        else np.full(sum(map(len, names.values())), np.nan)
        for c in order
    }
    summary = Summary(table, index=[n for site in names.values() for n in site])
    summary.lines = lines
    return summary


def number_names(fit: Any) -> dict[str, list[str]]:
    """A name for each number of the estimates, by variable as in ArviZ: with the labels of tables and plates' names."""
    arrays = _labelled(flat(fit.estimates), None, None, *fit.axes)
    return {k: element_names(v) for k, v in arrays.items()}


def _number(value: Any, like: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, np.float64), np.shape(like))


def _listed(sites: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arrays whose numbers the table lists, by their names in ArviZ, and a sentence on each site left out."""
    listed: dict[str, Any] = {}
    said, room = [], MAX_PARAMETERS
    for name, value in sites.items():
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(value))
        if size <= (room if jax.tree_util.all_leaves([value]) else min(room, _FEW)):  # else a network's weights
            listed |= flat({name: value})
            room -= size
        else:
            said.append(
                f"'{name}' is not listed, as it has {num_numbers(value)}: fit.stderr(of=...) gives the standard errors "
                "of what you compute from it."
            )
    return listed, said


def _labelled(values: dict[str, Any], *labels: Any) -> dict[str, xr.DataArray]:
    groups = with_labels({"posterior": dataset(values, ())}, *labels)
    return {str(k): v for k, v in groups["posterior"].data_vars.items()}


def _head(fit: Any) -> str:
    """What was fitted, to how much, by which loss."""
    energy = fit.energy
    loss = loss_for(fit.svi.score_loss, energy)
    rows = rows_of(energy)
    how = "" if fit.is_point else f"; medians of {type(fit.svi.guide).__name__}, with the errors of a point fit"
    rate = float(fit.learning_rate)
    beta = f", β = {rate:.4g}" if rate != 1 and fit.has_prior else ""
    return f"{name_of(energy.model)} by {settings(loss)} on {rows}{beta}{how}."


def rows_of(energy: AnyEnergy) -> str:
    """How many rows of how many numbers there are, and how many count, by plate."""

    def of(part: Energy) -> str:
        x, weights = part.data_and_weights()
        counts = weights != 0
        used, missing = (int(fetch(n)) for n in (jnp.sum(counts), jnp.sum(jnp.isnan(x) & counts[:, None])))
        counted = "" if used == part.num_rows else f", {used} of them with a weight"
        cells = f", {used * part.dim - missing} of {used * part.dim} of which were seen" if missing else ""
        return f"{plural(part.num_rows, 'row')}{counted} of {plural(part.dim, 'number')}{cells}"

    return " and ".join(map(of, energy.parts))


def _convergence(fit: Any) -> str:
    distance = float(np.max(fit.curvature.distance, initial=0.0))
    # Draws that a loss with chains settles on are others than those of the fit.
    limit = 3.0 if hasattr(fit.svi.score_loss, "settle") else ARRIVED
    if distance <= limit:
        close = f"less than {max(10 ** np.ceil(np.log10(max(distance, 1e-3))), 1e-3):g}"
        how = "the sandwich" if fit.dependence is None else f"the sandwich, where {fit.dependence.text}"
        return f"Converged: the minimum is {close} standard errors away. Errors are those of {how}."
    if np.isinf(distance):
        return undetermined("where the distance is infinite")
    return (
        f"{NOT_CONVERGED}: the minimum is {distance:.2g} standard errors away. Take more steps, or another optimiser "
        "such as optax.lbfgs()."
    )


def _at_the_end(fit: Any, covariance: np.ndarray) -> list[str]:
    """A sentence on sites that are at the end of their constraint, as a scale at zero, where errors mean nothing."""
    c = fit.coordinates
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    lost = fit.curvature.at_an_end | (errors > _FREE)
    by_site = c.unravel(jnp.asarray(lost, c.position.dtype))
    names = [
        k
        for k, t in c.transforms.items()
        if not isinstance(_base(t), IdentityTransform) and any(np.any(v) for v in jax.tree.leaves(by_site[k]))
    ]
    if not names:
        return []
    return [
        f"Numbers of {', '.join(map(repr, names))} {AT_AN_END}: the data do not have that term, so leave it out, or "
        "give it a prior away from there. Errors of the others are as if it were known."
    ]


def _covariance(fit: Any) -> np.ndarray:
    """The sandwich; that the fit has not converged, or is at an end, the table says itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        covariance = fit.curvature.covariance
    for warning in caught:
        if not (str(warning.message).startswith(NOT_CONVERGED) or AT_AN_END in str(warning.message)):
            warnings.warn(warning.message, warning.category, stacklevel=4)
    return covariance


def _errors(fit: Any) -> dict[str, Any]:
    """Standard errors by site, those of deterministic sites by the delta method, too."""
    errors = flat_leaves(fit.stderr())
    if names := fit.deterministic_sites:

        def computed(estimates: dict[str, Any]) -> dict[str, Array]:
            sites = fit.svi.trace_prior({**(fit.state.mutable_state or {}), **estimates}, fit.args, fit.kwargs)
            return {k: jnp.asarray(sites[k]["value"], float) for k in names}

        errors |= fit.stderr(of=computed)
    return errors


def flat_leaves(sites: dict[str, Any]) -> dict[str, Any]:
    """Sites and, of those that hold a pytree, its leaves by their own names, too."""
    return {**sites, **flat(sites)}


def _base(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def _site(fit: Any, name: str) -> str | None:
    """The site that a variable of the table is of, if it has coordinates."""
    return next((k for k in fit.coordinates.transforms if name == k or name.startswith(f"{k}.")), None)


def _z(fit: Any, name: str, value: Any, error: Any) -> Any:
    """Estimates in standard errors; missing where zero is no value that the parameter might have."""
    site = _site(fit, name)
    if site is not None and not isinstance(_base(fit.coordinates.transforms[site]), IdentityTransform):
        return np.nan
    error = np.asarray(error, np.float64)
    return np.asarray(value, np.float64) / np.where(error > 0, error, np.nan)


def _intervals(
    fit: Any, covariance: np.ndarray, probability: float, values: dict[str, Any], errors: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Equal-tailed intervals: normal in unconstrained space where each number has one coordinate of its own there.

    Of rows that depend on each other by the t law, with G groups of G − 1 degrees of freedom [Cameron & Miller 2015].
    """
    quantile = float(scipy.stats.t.ppf(probability, fit.curvature.degrees))
    c = fit.coordinates
    spread = jnp.asarray(quantile * np.sqrt(np.maximum(np.diag(covariance), 0.0)), c.position.dtype)
    ends = [flat_leaves(c.constrain(c.position + sign * spread)) for sign in (-1, 1)]
    draws: dict[str, Any] = {}
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in values.items():
        site = _site(fit, name)
        if site is None:  # deterministic
            away = quantile * np.asarray(errors[name], np.float64)
            found[name] = np.asarray(value, np.float64) - away, np.asarray(value, np.float64) + away
        elif _elementwise(c.transforms[site]):
            both = np.stack([np.asarray(e[name], np.float64) for e in ends])
            found[name] = both.min(axis=0), both.max(axis=0)
        else:
            wider = (quantile / scipy.stats.norm.ppf(probability)) ** 2
            draws = draws or c.draw(jax.random.key(0), wider * covariance, _DRAWS)
            low, high = np.quantile(np.asarray(draws[site], np.float64), [1 - probability, probability], axis=0)
            found[name] = low, high
    return found


def _elementwise(transform: Any) -> bool:
    base = _base(transform)
    return base.domain.event_dim == 0 and base.codomain.event_dim == 0


def _of_coordinates(fit: Any, values: dict[str, Any], numbers: np.ndarray) -> dict[str, Any]:
    """What is known of each coordinate (P,), by variable: of each number, or the most of a site's coordinates."""
    c = fit.coordinates
    by_site = flat_leaves(c.unravel(jnp.asarray(numbers, c.position.dtype)))
    found: dict[str, Any] = {}
    for name, value in values.items():
        site = _site(fit, name)
        if site is None:
            found[name] = np.nan
        elif _elementwise(c.transforms[site]):
            found[name] = by_site[name]
        else:
            found[name] = max(float(np.max(v, initial=0.0)) for v in jax.tree.leaves(by_site[site])) + 0 * value
    return found
