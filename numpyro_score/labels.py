"""Names of axes and labels along them, as ArviZ's dims and coords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["element_names", "site_dims", "with_labels"]


def site_dims(sites: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the axes of traced sites, as ArviZ finds them: of plates, and of `infer={"event_dims": [...]}`.

    A site is left out where none of its axes has one, and so is an axis whose plate has another size elsewhere.
    """
    found: dict[str, dict[int, str]] = {}
    sizes: dict[str, set[int]] = {}
    for name, site in sites.items():
        if site["type"] not in ("sample", "deterministic", "param"):
            continue
        shape, frames = np.shape(site["value"]) if hasattr(site["value"], "shape") else (), site["cond_indep_stack"]
        batch = max((-f.dim for f in frames), default=0)
        if site["type"] == "sample":
            batch = len(site["fn"].batch_shape)
        elif site["type"] == "param":  # NumPyro does not say which axes are the plates' but by this
            batch = len(shape) - site["kwargs"]["event_dim"] if site["kwargs"].get("event_dim") is not None else -1
        axes = {batch + f.dim: f.name for f in frames if 0 <= batch + f.dim < len(shape)}
        events = list(site.get("infer", {}).get("event_dims", []))
        axes |= {len(shape) - len(events) + i: dim for i, dim in enumerate(events)}
        found[name] = axes
        for axis, dim in axes.items():
            if 0 <= axis < len(shape):
                sizes.setdefault(dim, set()).add(shape[axis])
    known = {dim for dim, n in sizes.items() if len(n) == 1 and dim not in found}
    return {
        name: [
            axes[i] if axes.get(i) in known else f"{name}_dim_{i}" for i in range(len(np.shape(sites[name]["value"])))
        ]
        for name, axes in found.items()
        if known & set(axes.values())
    }


def with_labels(
    groups: dict[str, xr.Dataset],
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, Sequence[str]] | None,
    own_coords: Mapping[str, Any] | None = None,
    own_dims: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, xr.Dataset]:
    """Groups with axes renamed as `dims` says, {variable: names}, and labelled as `coords` says, {name: labels}.

    A name that a variable has twice, as a matrix of features by features, is `feature` and then `feature_2`, with the
    same labels. `own_coords` and `own_dims` are those that are known besides; they give way, and need not fit: of more
    names than there are axes, as for draws of one row of data, the last are taken.

    Raises:
        ValueError: for a variable or axis that is not there, another number of names than the variable has axes besides
            chain and draw, or another number of labels than an axis has.
    """
    coords, dims, own_coords, own_dims = coords or {}, dims or {}, own_coords or {}, own_dims or {}
    variables = {str(v) for group in groups.values() for v in group.data_vars}
    if unknown := sorted(set(dims) - variables):
        raise ValueError(f"dims has {unknown}, and the variables are {sorted(variables)}: use these.")
    used: set[str] = set()
    for label, group in groups.items():
        new: dict[str, xr.DataArray] = {}
        sizes: dict[str, int] = {}
        for key, array in group.data_vars.items():
            name = str(key)
            default = [str(d) for d in array.dims if str(d).startswith(f"{name}_dim_")]
            own = list(own_dims.get(name, default))[-len(default) :]
            axes = [array.sizes[d] for d in default]
            if len(own) != len(default) or any(sizes.get(d, n) != n for d, n in zip(own, axes, strict=True)):
                own = default
            names = dims.get(name, own)
            if label == "log_likelihood":  # one axis for rows, whatever axes the data have
                default, names = [], []
            given = [names] if isinstance(names, str) else list(names)
            if len(given) != len(default):
                raise ValueError(
                    f"dims names {len(given)} axes of '{name}', {given}, which has {len(default)} besides chain and "
                    "draw: give one name for each."
                )
            sizes |= zip(given, axes, strict=False)
            moved = dict(zip(default, _told_apart(given), strict=True))
            array = array.drop_vars([d for d in default if d in array.coords]).rename(
                {a: b for a, b in moved.items() if a != b}
            )
            for dim, axis in zip(given, moved.values(), strict=True):
                size = array.sizes[axis]
                if dim in coords and len(coords[dim]) != size:
                    raise ValueError(
                        f"coords has {len(coords[dim])} labels for '{dim}', and '{name}' has {size} there: give one "
                        "for each."
                    )
                known = coords.get(axis, coords.get(dim, own_coords.get(dim)))
                used |= {dim, axis}
                if known is None or len(known) != size:
                    known = np.arange(size)
                array = array.assign_coords({axis: (axis, as_labels(known))})
            new[name] = array
        groups = {**groups, label: xr.Dataset(new, attrs=group.attrs)}
    known_dims = {str(d) for group in groups.values() for d in group.dims} | used
    if unknown := sorted(set(coords) - known_dims):
        raise ValueError(f"coords has {unknown}, and the axes are {sorted(known_dims)}: name them in dims, too.")
    return groups


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names of axes, where those that were there before have a number."""
    return [n if n not in names[:i] else f"{n}_{1 + names[:i].count(n)}" for i, n in enumerate(names)]


def as_labels(labels: Any) -> np.ndarray:
    """Labels as an array of one axis, tuples (as of several header rows) as text."""
    found = [", ".join(map(str, v)) if isinstance(v, tuple) else v for v in labels]
    return np.asarray(found)


def element_names(array: xr.DataArray) -> list[str]:
    """A name for each number of a variable, as ArviZ writes them: "a[0]", "a[first, second]", or "a" if it is one."""
    labels = [array.coords[d].values if d in array.coords else np.arange(array.sizes[d]) for d in array.dims]
    return [
        f"{array.name}[{', '.join(str(axis[i]) for axis, i in zip(labels, index, strict=True))}]" if index else
        str(array.name)
        for index in np.ndindex(*array.shape)
    ]  # fmt: skip
