"""Looks at the values of a model's data and density, before anything is fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints

from numpyro_score.energy.arguments import array_arguments
from numpyro_score.energy.bound import BoundModel
from numpyro_score.energy.devices import by_device
from numpyro_score.energy.layout import DataArray, Layout, row_weights
from numpyro_score.energy.remedies import on_boundary, outside_remedy
from numpyro_score.energy.supports import SIMPLICES
from numpyro_score.energy.tables import refuse_whole_columns
from numpyro_score.energy.text import first_marked, rows_text
from numpyro_score.operators import full_precision, value_score
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["check", "evaluate_for_check"]

_SAMPLED = 1024  # rows whose log densities tell how large these are
_FEW = 100_000  # rows
_NUMBERS = 2**22  # that an operation of the density may give at once: 16 MB in float32


# What may be wrong with a row, with a site where it is one's: its weight is not finite, differs within the row, or from
# that of the first site; or the row counts, and lies outside of a support, has NaN or infinity, or such a density.
_NOT_FINITE, _WITHIN, _BETWEEN, _OUTSIDE, _MISSING, _FAILING, _NOTHING = range(7)


def _faults(layout: Layout) -> list[tuple[int, str]]:
    """What may be wrong with a row, in the order in which it is told."""
    weights = [(what, name) for name in layout.terms for what in (_NOT_FINITE, _WITHIN)]
    between = [(_BETWEEN, name) for name in layout.terms]
    outside = [(_OUTSIDE, a.name) for a in layout.arrays if a.is_site]
    return [*weights, *between, *outside, (_MISSING, ""), (_FAILING, "")]


def check(energy: BoundModel, evaluate: Callable[[Any], Any] | None = None) -> None:
    """See `Energy.check`; `evaluate` is a compiled :func:`evaluate_for_check`."""
    refuse_whole_columns(energy.labels, energy.arrays)
    found = run_compiled(evaluate_for_check, energy) if evaluate is None else evaluate(energy)
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(found)):
        raise TypeError(
            "The model uses a traced value that is none of its arguments or parameters, such as a parameter of another "
            "model around it: call this outside of jit, vmap, grad and other models, on values that are fixed."
        )
    layout = energy._layout
    # By row. Many stay on their devices; of few NumPy finds the largest without compiling anything.
    if energy.num_rows <= _FEW and all(v.is_fully_addressable for v in found):
        found = fetch(found)
    faults, change, sizes, there = found
    some = there[:: -(-len(there) // _SAMPLED)]
    first, largest_change, largest, there = fetch((faults.min(), change.max(), sizes.max(), some))
    what, name = [*_faults(layout), (_NOTHING, "")][int(first)]
    names = ", ".join(f"'{a.name}'" for a in layout.arrays)
    # A minibatch may by chance hold none of the rows that count, so look at all of them.
    if largest < 0 and what == _NOTHING:
        if not any(p in energy._plates for p in layout.row_plates) or not _some_row_counts(energy):
            raise ValueError(
                f"All rows of {names} have weight zero, so that nothing is left to fit: correct the handlers.mask or "
                f"handlers.scale around {', '.join(repr(k) for k in layout.terms)}."
            )
    if what != _NOTHING:
        _refuse(energy, what, name, faults == first, names)
    # What is small at the data, such as a squared distance from a curve, may be rounding of larger numbers.
    elsewhere = 0.0 if np.isnan(there).all() else np.nanmedian(np.abs(there))
    tolerance = max(1e-4 * largest, 10 * np.finfo(there.dtype).eps * elsewhere)
    if largest_change > tolerance:
        raise ValueError(
            f"Rows of {names} interact: {rows_text(change > tolerance)} change when other rows do, e.g. through a "
            "mean over the plate or batch normalisation; make each row's factor depend on that row alone, or, if the "
            "data are one point, such as a time series, observe them as one site outside of any plate or scan, with "
            "one factor."
        )


def _refuse(energy: BoundModel, what: int, name: str, bad: Any, names: str) -> NoReturn:
    """Raises for what is wrong with the marked rows, (N,)."""
    if what == _NOT_FINITE:
        raise ValueError(
            f"The weight of site '{name}' is NaN or infinite in {rows_text(bad)}: correct the scale in "
            "handlers.scale, and give rows that are not to count the weight zero."
        )
    if what == _WITHIN:
        raise ValueError(
            f"The scale or mask of site '{name}' differs within a row: weigh whole rows, or drop terms inside "
            "the factor with jnp.where."
        )
    if what == _BETWEEN:
        raise ValueError(
            f"Sites '{energy._layout.terms[0]}' and '{name}' have different scales or masks: these weigh whole "
            "rows, so put them around all sites of a row, or multiply inside the factor."
        )
    if what == _OUTSIDE:
        array, support, values = _seen(energy, name, bad)
        remedy = outside_remedy(name, array.support.kind, support, values)
        raise ValueError(f"Data '{name}' lie outside of the support of the site in {rows_text(bad)}: {remedy}.")
    if what == _MISSING:
        values = fetch(energy.data[first_marked(bad)])
        columns = [f"'{c}'" for c in _seen_in(energy, ~np.isfinite(values).all(0))]
        where = f" of {'column' if len(columns) == 1 else 'columns'} {', '.join(columns)}" if columns else ""
        raise ValueError(
            f"Data {names} have NaN or infinity in {rows_text(bad)}{where}: correct them or, if values are missing at "
            "random, drop these rows, mask them with handlers.mask, or fit what was seen by MissingCells(); "
            "comparisons need whole rows."
        )
    _refuse_failing(energy, bad, names)


def _seen_in(energy: BoundModel, marked: np.ndarray) -> list[str]:
    """The columns of a table that are marked, (D,); none of what was no table."""
    if not energy.labels.axes or len(energy.column_names) != len(marked):
        return []
    return [name for name, yes in zip(energy.column_names, marked, strict=True) if yes][:8]


def _refuse_failing(energy: BoundModel, failing: Any, names: str) -> NoReturn:
    """Raises for rows at which the density is not finite."""
    layout, what = energy._layout, "log density" if energy.has_density else "score"
    rounded = any(a.support.kind in ("sphere", *SIMPLICES) for a in layout.arrays)
    for a in layout.arrays:
        if a.is_site and a.support.kind in ("box", *SIMPLICES):
            _, support, values = _seen(energy, a.name)
            touch = failing & on_boundary(a.support.kind, support, values)
            if fetch(touch.any()):
                if a.support.kind == "simplex":
                    raise ValueError(
                        f"The {what} is not finite in {rows_text(touch)} of data '{a.name}', with a share of zero, as "
                        "on the simplex it is that of the square roots of shares: observe under flat_simplex if the "
                        "density itself is finite there; mask these rows with handlers.mask if the exponents of shares "
                        "are given, for then the objective has no parameters there; put half of the smallest step that "
                        "is measured in their place if these are small values rounded, and divide the rows by their "
                        "sums; if zeros occur with a probability of their own, model these rows apart."
                    )
                shares = a.support.kind != "box"
                where = "with a share of zero" if shares else "on the boundary of its support"
                raise ValueError(
                    f"The {what} is not finite in {rows_text(touch)} of data '{a.name}', {where}: if these are "
                    "small values rounded, put half of the smallest step that is measured in their place"
                    + (" and divide the rows by their sums" if shares else "")
                    + "; if they occur with a probability of their own, model these rows apart."
                )
    for name, value in array_arguments(energy.model, energy._arrays, energy._static):
        if jnp.issubdtype(value.dtype, jnp.floating) and fetch(jnp.isnan(value).any()):
            by_row = value.ndim > 0 and len(value) == energy.num_rows
            where = f" in {rows_text(jnp.isnan(value).reshape(len(value), -1).any(1))}" if by_row else ""
            raise ValueError(
                f"Argument '{name}' of the model has NaN{where}, and the {what} of {names} is not finite in "
                f"{rows_text(failing)}: correct it, or drop these rows or mask them with handlers.mask."
            )
    raise ValueError(
        f"The {what} of {names} is not finite in {rows_text(failing)}: correct the density at these rows, or start "
        "from other parameters (init_params, or the guide's init_loc_fn)"
        + (", or divide the rows by their sum or norm, if it is off one by rounding." if rounded else ".")
    )


def _some_row_counts(energy: BoundModel) -> bool:
    """Whether any of all rows has a weight, and not of a minibatch alone."""
    whole = energy._replace(_plates={})
    return bool(fetch(jnp.any(whole._replace(_layout=whole._known_layout()).weights != 0)))


def _seen(energy: BoundModel, name: str, marked: Any = None) -> tuple[DataArray, constraints.Constraint, Any]:
    """A data site, its support, and its values with the rows first, (N, ...), trailing axes of rows kept.

    Of marked rows the first, as NumPy's.
    """
    array, site = next(a for a in energy.arrays if a.name == name), energy._run().sites[name]
    axes = array.row_axes
    value = jnp.moveaxis(jnp.asarray(site["value"]), axes, tuple(range(len(axes))))
    value = value.reshape(energy.num_rows, *value.shape[len(axes) :])
    return array, site["fn"].support, value if marked is None else fetch(value[first_marked(marked)])


@full_precision
def evaluate_for_check(energy: BoundModel) -> tuple[Array, Array, Array, Array]:
    """What :func:`check` looks at, in one compiled call, each device for its own rows if they are spread.

    By row, (N,) each: its first fault, an index of :func:`_faults`, or their number for none; how much its log density
    changes where the data of half the others do, if it counts; its log density, in absolute value, or -1 if it does
    not count; and the log density where half the data are others. Where only the score is known, the sum of its
    components stands for the log density.
    """
    return by_device(lambda energy, *_: _by_row(energy), energy, jax.random.key(0))


def _by_row(energy: BoundModel) -> tuple[Array, Array, Array, Array]:
    layout, sites = energy._layout, energy._run().sites
    weights = {k: row_weights(sites[k], layout) for k in layout.terms}
    first = weights[layout.terms[0]][:, 0]
    used = first != 0
    x = energy.data
    here, there, changed = _beside_others(energy, energy.usable()[0].data)
    change = jnp.where(used & ~changed, jnp.abs(there - here), 0.0)
    change = jnp.where(jnp.isnan(change), 0.0, change)  # infinity less infinity
    wrong = {
        **{(_NOT_FINITE, k): ~jnp.isfinite(w).all(-1) for k, w in weights.items()},
        **{(_WITHIN, k): (w != w[:, :1]).any(-1) for k, w in weights.items()},
        **{(_BETWEEN, k): w[:, 0] != first for k, w in weights.items()},
        **{(_OUTSIDE, k): used & is_out for k, is_out in energy.rows_outside().items()},
        (_MISSING, ""): used & ~jnp.isfinite(x).all(-1),
        (_FAILING, ""): used & ~jnp.isfinite(here),
    }
    order = _faults(layout)
    faults = jnp.full(len(x), len(order))
    for k in reversed(range(len(order))):
        faults = faults if order[k] not in wrong else jnp.where(wrong[order[k]], k, faults)
    return faults, change, jnp.where(used, jnp.abs(here), -1.0), there


def _step_off(energy: BoundModel, x: Array) -> Array:
    """Rows near x, as rows may all be equal; where there is a boundary or curvature a step would leave the support."""
    if energy.flat:
        return x + 1.0
    columns = energy._layout.discrete_columns
    if not len(columns):
        return x
    lower, upper = energy.bounds(len(x))
    next_value = jnp.where((x + 1 > upper) | (x < lower), lower, x + 1)  # bounds of a row may be its own
    return x.at[:, columns].set(next_value[:, columns])


def _beside_others(energy: BoundModel, x: Array) -> tuple[Array, Array, Array]:
    """Log densities of rows, those where about half of them are others, and which these are, (N,) each."""

    def f(x: Array) -> Array:
        log_density = energy.row_log_density
        return log_density(x) if energy.has_density else value_score(log_density, x)[1].sum(-1)

    def of(start: Array | int, size: int) -> tuple[Array, Array, Array]:
        rows = x if size == len(x) else jax.lax.dynamic_slice_in_dim(x, start, size)
        i = jnp.arange(size, dtype=jnp.uint32)
        changed = jnp.where(i < 2, i == 1, (i * np.uint32(2654435761)) >> 31 == 1)  # no period that a model may have
        others = _step_off(energy, jnp.roll(rows, 1, axis=0))
        here, there = jax.lax.map(f, jnp.stack([rows, jnp.where(changed[:, None], others, rows)]))
        return here, there, changed

    n, most = len(x), max(_NUMBERS // max(energy.width, energy.dim), _SAMPLED)
    if not energy.resizable or n <= most:
        return of(0, n)
    # What rows make of each other shows among those of a part; the last part shares rows with the one before.
    last = n - most
    parts = jax.lax.map(lambda start: of(start, most), jnp.append(jnp.arange(0, last, most), last))

    def joined(values: Array) -> Array:
        first = values[:-1].reshape(-1)[:last]
        return jnp.concatenate([first, values[-1]])

    here, there, changed = map(joined, parts)
    return here, there, changed
