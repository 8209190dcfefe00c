"""Looks at the values of a model's data and density, before anything is fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints

from numpyro_score.energy.bound import BoundModel
from numpyro_score.energy.layout import DataArray, row_weights
from numpyro_score.energy.remedies import on_boundary, outside_remedy
from numpyro_score.energy.text import rows_text
from numpyro_score.operators import full_precision, value_score
from numpyro_score.programs import run_compiled

__all__ = ["check", "evaluate_for_check"]


def check(energy: BoundModel, evaluate: Callable[[Any], Any] | None = None) -> None:
    """See `Energy.check`; `evaluate` is a compiled :func:`evaluate_for_check`."""
    found = run_compiled(evaluate_for_check, energy) if evaluate is None else evaluate(energy)
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(found)):
        raise TypeError(
            "The model uses a traced value that is none of its arguments or parameters, such as a parameter of another "
            "model around it: call this outside of jit, vmap, grad and other models, on values that are fixed."
        )
    x, outside, weights, f, there, changed = jax.device_get(found)
    layout = energy._layout
    for name, weight in weights.items():
        if bad := rows_text(~np.isfinite(weight).all(-1)):
            raise ValueError(
                f"The weight of site '{name}' is NaN or infinite in {bad}: correct the scale in handlers.scale, and "
                "give rows that are not to count the weight zero."
            )
        if (weight != weight[:, :1]).any():
            raise ValueError(
                f"The scale or mask of site '{name}' differs within a row: weigh whole rows, or drop terms inside "
                "the factor with jnp.where."
            )
    for name, weight in weights.items():
        if (weight[:, 0] != weights[layout.terms[0]][:, 0]).any():
            raise ValueError(
                f"Sites '{layout.terms[0]}' and '{name}' have different scales or masks: these weigh whole "
                "rows, so put them around all sites of a row, or multiply inside the factor."
            )
    used = weights[layout.terms[0]][:, 0] != 0
    names = ", ".join(f"'{a.name}'" for a in layout.arrays)
    # A minibatch may by chance hold none of the rows that count, so look at all of them.
    if not used.any() and not (any(p in energy._plates for p in layout.row_plates) and _some_row_counts(energy)):
        raise ValueError(
            f"All rows of {names} have weight zero, so that nothing is left to fit: correct the handlers.mask or "
            f"handlers.scale around {', '.join(repr(k) for k in layout.terms)}."
        )
    for name, wrong in outside.items():
        if bad := rows_text(used & wrong):
            array, support, values = _seen(energy, name)
            remedy = outside_remedy(name, array.support.kind, support, values[used & wrong])
            raise ValueError(f"Data '{name}' lie outside of the support of the site in {bad}: {remedy}.")
    if bad := rows_text(used & ~np.isfinite(x).all(-1)):
        raise ValueError(
            f"Data {names} have NaN or infinity in {bad}: correct them or, if values are missing at random, drop "
            "these rows or mask them with handlers.mask."
        )
    what = "log density" if energy.has_density else "score"
    if bad := rows_text(used & ~np.isfinite(f)):
        rounded = any(a.support.kind in ("sphere", "simplex") for a in layout.arrays)
        failing = used & ~np.isfinite(f)
        for a in layout.arrays:
            if a.is_site and a.support.kind in ("box", "simplex"):
                _, support, values = _seen(energy, a.name)
                touch = failing & on_boundary(a.support.kind, support, values)
                if touch.any():
                    where = "with a share of zero" if a.support.kind == "simplex" else "on the boundary of its support"
                    raise ValueError(
                        f"The {what} is not finite in {rows_text(touch)} of data '{a.name}', {where}: if these are "
                        "small values rounded, put half of the smallest step that is measured in their place"
                        + (" and divide the rows by their sums" if a.support.kind == "simplex" else "")
                        + "; if they occur with a probability of their own, model these rows apart."
                    )
        raise ValueError(
            f"The {what} of {names} is not finite in {bad}: correct the density at these rows, or start from other "
            "parameters (init_params, or the guide's init_loc_fn)"
            + (", or divide the rows by their sum or norm, if it is off one by rounding." if rounded else ".")
        )
    # What is small at the data, such as a squared distance from a curve, may be rounding of larger numbers.
    elsewhere = 0.0 if np.isnan(there).all() else np.nanmedian(np.abs(there))
    tolerance = max(1e-4 * np.abs(f[used]).max(initial=0.0), 10 * np.finfo(f.dtype).eps * elsewhere)
    with np.errstate(invalid="ignore"):  # infinity less infinity, in rows that are not used
        interact = used & ~changed & (np.abs(there - f) > tolerance)
    if bad := rows_text(interact):
        raise ValueError(
            f"Rows of {names} interact: {bad} change when other rows do, e.g. through a mean over the plate or "
            "batch normalisation; make each row's factor depend on that row alone, or, if the data are one "
            "point, such as a time series, observe them as one site outside of any plate or scan, with one factor."
        )


def _some_row_counts(energy: BoundModel) -> bool:
    """Whether any of all rows has a weight, and not of a minibatch alone."""
    whole = energy._replace(_plates={})
    return bool(np.any(whole._replace(_layout=whole._known_layout()).weights))


def _seen(energy: BoundModel, name: str) -> tuple[DataArray, constraints.Constraint, np.ndarray]:
    """A data site, its support, and its values with the rows first, (N, ...), trailing axes of rows kept."""
    array, site = next(a for a in energy.arrays if a.name == name), energy._run().sites[name]
    axes = array.row_axes
    value = np.moveaxis(np.asarray(site["value"]), axes, tuple(range(len(axes))))
    return array, site["fn"].support, value.reshape(energy.num_rows, *value.shape[len(axes) :])


@full_precision
def evaluate_for_check(energy: BoundModel) -> tuple[Array, dict[str, Array], dict[str, Array], Array, Array, Array]:
    """What :func:`check` looks at, in one compiled call.

    Data, whether they lie outside of their support, and weights, by site; the log density of each row at the data, and
    where the data of half the rows are others; and which rows these are. Where only the score is known, the sum of its
    components stands for the log density.
    """
    layout, sites = energy._layout, energy._run().sites
    weights = {k: row_weights(sites[k], layout) for k in layout.terms}
    x = energy.data
    usable = energy.usable()[0].data

    def f(x: Array) -> Array:
        log_density = energy.row_log_density
        return log_density(x) if energy.has_density else value_score(log_density, x)[1].sum(-1)

    i = jnp.arange(len(x), dtype=jnp.uint32)
    change = jnp.where(i < 2, i == 1, (i * np.uint32(2654435761)) >> 31 == 1)  # no period that a model may have, too
    # Rows may all be equal; but where there is a boundary or curvature, a step off a row would leave the support.
    others = jnp.roll(usable, 1, axis=0) + (1.0 if layout.flat else 0.0)
    here, there = jax.lax.map(f, jnp.stack([usable, jnp.where(change[:, None], others, usable)]))
    return x, energy.rows_outside(), weights, here, there, change
