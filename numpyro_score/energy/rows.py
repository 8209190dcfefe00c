"""What counts as one row of a model's data, and models that have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import jax.numpy as jnp

from numpyro_score.energy.latents import find_latents
from numpyro_score.energy.layout import DataArray, Layout, Trace
from numpyro_score.energy.supports import Shape
from numpyro_score.energy.text import plural
from numpyro_score.energy.trace import Site, is_factor, is_in_control_flow, is_score_term, is_summed, unwrap

__all__ = ["SeveralPlates", "assemble"]


class SeveralPlates(ValueError):
    """Data in plates that have no rows together.

    Attributes:
        groups: the data sites of each.
    """

    def __init__(self, message: str, groups: tuple[tuple[str, ...], ...]) -> None:
        super().__init__(message)
        self.groups = groups

    def __reduce__(self) -> Any:
        return type(self), (*self.args, self.groups)


def find_rows(
    sites: Trace, shapes: dict[str, Shape], terms: Sequence[str], arrays: Sequence[DataArray]
) -> tuple[Shape, Shape, tuple[str, ...]]:
    """What counts as one row: `(row_dims, row_shape, row_plates)`.

    Rows are numbered by the plates that all terms of the density share. Without plates the terms' common batch shape
    numbers them, and a scalar density has one row: the whole data. So has a series in a scan of NumPyro.
    """
    if not terms:
        names = ", ".join(f"'{a.name}'" for a in arrays)
        raise ValueError(
            f"No factor or density of the model depends on the data {names}: use the value that numpyro.sample "
            "returns, e.g. x = numpyro.sample('x', ..., obs=x), in the factor."
        )
    frames = {k: {f.name: (f.dim, f.size) for f in sites[k]["cond_indep_stack"]} for k in terms}
    if any(frames.values()):
        shared = set.intersection(*(set(f) for f in frames.values()))
        if not shared:
            refuse_split_rows(sites, terms, frames, arrays)
        by_dim = sorted((frames[terms[0]][p], p) for p in shared)
        return (
            tuple(d for (d, _), _ in by_dim),
            tuple(s for (_, s), _ in by_dim),
            tuple(p for _, p in by_dim),
        )

    shapes = {k: shapes[k] for k in terms}
    # A scan passes on what it has seen: its data are one point, as a series is.
    if () in shapes.values() or any(is_in_control_flow(sites[k]) for k in terms):
        return (), (), ()
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The sites {shapes} differ in shape: put them in one plate that numbers the rows.")
    shape = shapes[terms[0]]
    return tuple(range(-len(shape), 0)), shape, ()


def refuse_split_rows(
    sites: Trace, terms: Sequence[str], frames: dict[str, dict[str, Any]], arrays: Sequence[DataArray]
) -> NoReturn:
    """Raises for terms that no plate holds together: which of them is wrong is known only if some are in no plate."""
    data = {a.name for a in arrays}
    outside = [k for k in terms if not frames[k]]
    if not outside:
        where = "; ".join(
            f"{'data site' if k in data else 'site'} '{k}' in {' and '.join(repr(p) for p in frames[k])}" for k in terms
        )
        seen = (
            f"The sites that depend on the data stand in different plates ({where}), and none numbers the rows of all"
        )
        if len(groups := _by_plates({a.name: set(frames[a.name]) for a in arrays if a.name in frames})) > 1:
            raise SeveralPlates(
                f"{seen}: ScoreMatching and generalized_bayes fit all of them; an Energy is that of one, e.g. "
                f"data='{groups[0][0]}'.",
                groups,
            )
        raise ValueError(
            f"{seen}: put them into one plate if they belong to the same rows; a term of data in one plate cannot "
            "stand in another."
        )
    held = list(dict.fromkeys(p for f in frames.values() for p in f))
    sizes = {p: size for f in frames.values() for p, (_, size) in f.items()}
    plates = f"the plate {held[0]!r}" if len(held) == 1 else "the plates " + " and ".join(map(repr, held))
    names = ", ".join(f"'{k}'" for k in outside)
    if all(k in data for k in outside):
        raise ValueError(
            f"Observed {'site' if len(outside) == 1 else 'sites'} {names} stands outside {plates} of the other terms: "
            "move it into the plate of its rows, or, if it is not data, name the data site, e.g. data='x'."
        )
    shapes = ", ".join(f"'{k}' of shape {tuple(sites[k]['fn'].batch_shape)}" for k in outside)
    of = f" of {plural(sizes[held[0]], 'row')}" if len(held) == 1 else ""
    raise ValueError(
        f"{'Site' if len(outside) == 1 else 'Sites'} {shapes} {'depends' if len(outside) == 1 else 'depend'} on the "
        f"data but {'stands' if len(outside) == 1 else 'stand'} outside {plates}{of}: move "
        f"{'it' if len(outside) == 1 else 'them'} into the plate and give {'it' if len(outside) == 1 else 'each'} one "
        "value per row."
    )


def _by_plates(plates: dict[str, set[str]]) -> tuple[tuple[str, ...], ...]:
    """Names in groups that share plates, directly or by others."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, own in plates.items():
        joined = [g for g in groups if g[1] & own]
        merged = ([n for names, _ in joined for n in names] + [name], own.union(*(p for _, p in joined)))
        groups = [g for g in groups if g not in joined] + [merged]
    return tuple(tuple(names) for names, _ in groups)


def plate_shape(site: Site) -> Shape:
    """The batch shape that the plates around a site give it."""
    sizes = {f.dim: f.size for f in site["cond_indep_stack"]}
    return tuple(sizes.get(d, 1) for d in range(min(sizes), 0))


def check_sites(sites: Trace, layout: Layout) -> None:
    """Refuses models whose density is not a sum over rows of the data."""
    rows = set(layout.row_plates)
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        # A site in some of several row plates is one value per group of rows.
        if not rows or not rows <= {f.name for f in site["cond_indep_stack"]}:
            continue
        plate = min(rows)
        if is_summed(site):
            continue
        if not site["is_observed"]:
            if (whole := name.removesuffix("_unobserved")) != name and f"{whole}_observed" in sites:
                raise ValueError(
                    f"obs_mask leaves site '{whole}' without a value in some rows of the data plate '{plate}': leave "
                    "it out and mask these rows, with numpyro.handlers.mask(mask=...), or put NaN in the cells of rows "
                    "that others were seen of, and take MissingCells()."
                )
            remedy = (
                "marginalise it in the model, or write infer={'laplace': 16} to have it integrated out by 16 points"
            )
            if site["fn"].support is not None and site["fn"].support.is_discrete:
                remedy = "write infer={'enumerate': 'parallel'} to have the density summed over it"
            raise ValueError(
                f"Latent site '{name}' stands inside the data plate '{plate}', one value per row: {remedy}, or "
                "observe it."
            )
        if not is_factor(site):
            continue
        given = jnp.shape(unwrap(site["fn"])[0].log_factor)
        expected = plate_shape(site)
        if not math.prod(given) == math.prod(expected) == math.prod(site["fn"].batch_shape):
            raise ValueError(
                f"Factor '{name}' of shape {given} inside the plate '{plate}' would count "
                f"{math.prod(site['fn'].batch_shape)} times: give it one value per row, shape {expected}, or move it "
                "out of the plate."
            )
        if name in layout.penalties:
            raise ValueError(
                f"Factor '{name}' stands in the data plate '{plate}' but does not depend on the data: use the value "
                "that numpyro.sample returns, e.g. x = numpyro.sample('x', ..., obs=x), or move it out of the plate."
            )


def with_row_axes(a: DataArray, site: Site | None, row_dims: Shape, row_shape: Shape) -> DataArray:
    """Adds to a data array which of its axes number the rows."""
    if site is None or not row_dims:
        axes = tuple(range(len(row_dims)))
    else:
        # Without a plate a value may have more batch dimensions than its distribution.
        batch = len(a.shape) - len(site["fn"].event_shape)
        axes = tuple(batch + d for d in row_dims)
    if any(ax < 0 for ax in axes) or tuple(a.shape[ax] for ax in axes) != row_shape:
        raise ValueError(
            f"Data '{a.name}' has shape {a.shape}, which does not match the model's rows {row_shape}: give the "
            "density one value per row of the data."
        )
    return a._replace(row_axes=axes)


def assemble(arrays: Sequence[DataArray], sites: Trace, shapes: dict[str, Shape], depends: dict[str, bool]) -> Layout:
    """Puts a layout together from one run: `depends` says which observed sites depend on the data."""
    entering = tuple(k for k, yes in depends.items() if yes)
    penalties = tuple(k for k, yes in depends.items() if not yes and is_factor(sites[k]))
    if entering:  # improper data sites have no density of their own, but stand in the plates that number the rows
        entering += tuple(a.name for a in arrays if a.is_site and a.name not in entering)
    row_dims, row_shape, row_plates = find_rows(sites, shapes, entering, arrays)
    if hidden := [p for p in row_plates if p not in sites]:
        raise ValueError(
            f"Plate '{hidden[0]}' of {', '.join(repr(k) for k in entering)} stands inside a scan or cond of NumPyro, "
            "where it cannot number rows: observe the whole of a row, such as a time series, as one site, outside of "
            "the scan, with one factor."
        )
    arrays = [with_row_axes(a, sites[a.name] if a.is_site else None, row_dims, row_shape) for a in arrays]
    masked = any(
        unwrap(sites[k]["fn"])[1] or jnp.ndim(0 if sites[k]["scale"] is None else sites[k]["scale"]) for k in entering
    )
    score_terms = tuple(k for k in entering if is_score_term(sites[k]))
    latents = find_latents(sites, row_plates, row_dims)
    if latents and score_terms:
        raise ValueError(
            f"Site '{score_terms[0]}' is a score_factor, whose density is unknown, so that none can be summed over the "
            f"values of '{latents[0].name}': declare an energy with numpyro.factor."
        )
    layout = Layout(
        tuple(arrays),
        entering,
        penalties,
        row_plates,
        row_dims,
        row_shape,
        masked,
        False,
        score_terms=score_terms,
        latents=latents,
    )
    check_sites(sites, layout)
    return layout
