"""Tables among a model's arguments: turned into arrays once, with the names of their axes and columns kept beside.

What a table is, is seen from its methods, so that neither pandas nor polars nor xarray need be there: a column or a
labelled array has `to_numpy`, and a frame has `columns` as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_score.energy.arguments import check_arguments, positional
from numpyro_score.energy.layout import DataArray, Layout
from numpyro_score.energy.text import numbered

__all__ = [
    "NO_LABELS",
    "Labels",
    "as_array",
    "as_rows",
    "column_names",
    "read_arguments",
    "refuse_other_columns",
    "refuse_other_rows",
    "refuse_whole_columns",
    "row_index",
]


class Axis(NamedTuple):
    """What a table says of one axis."""

    name: str | None = None
    labels: tuple[Any, ...] | None = None
    is_column: bool = False  # the columns of a frame, whose axis is named after the argument where it has no name


class Labels(NamedTuple):
    """What the tables among a model's arguments say, by the index of their array among the arguments'."""

    axes: tuple[tuple[int, str, tuple[Axis, ...]], ...] = ()  # with the name of the argument
    whole: tuple[tuple[int, tuple[str, ...]], ...] = ()  # columns of integers in frames of other numbers

    def of_columns(self, layout: Layout) -> Labels:
        """Those of columns alone, without the labels of rows: what a density of any rows may know."""
        rows = {a.leaf: a.row_axes for a in layout.arrays if a.leaf is not None}

        def of_column(i: int, k: int, axis: Axis) -> bool:
            return k not in rows[i] if i in rows else axis.is_column

        kept = tuple(
            (i, name, tuple(v if of_column(i, k, v) else v._replace(labels=None) for k, v in enumerate(axes)))
            for i, name, axes in self.axes
        )
        return Labels(kept, tuple((i, names) for i, names in self.whole if i in rows))

    def as_coords(self, arrays: tuple[DataArray, ...]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """ArviZ's coords and dims, {name: labels} and {site: names}, with the data's axes under their sites' names."""
        sites = {a.leaf: a.name for a in arrays if a.leaf is not None}
        coords: dict[str, Any] = {}
        dims: dict[str, list[str]] = {}
        for leaf, argument, axes in self.axes:
            name = sites.get(leaf, argument)
            names = [a.name or (f"{name}_column" if a.is_column else f"{name}_dim_{i}") for i, a in enumerate(axes)]
            coords |= {dim: a.labels for dim, a in zip(names, axes, strict=True) if a.labels is not None}
            if leaf in sites:
                dims[name] = names
        return coords, dims

    def row_name(self, row: int, arrays: tuple[DataArray, ...]) -> str:
        """What the index of a table calls a row of the data, or its number."""
        axes = {a.leaf: a.row_axes[0] for a in arrays if a.leaf is not None and len(a.row_axes) == 1}
        for leaf, _, own in self.axes:
            if leaf in axes and (labels := own[axes[leaf]].labels) is not None:
                return str(labels[row])
        return str(row)

    def rows(self, arrays: tuple[DataArray, ...]) -> tuple[Any, ...] | range | None:
        """The names of the data's rows; None where they came as arrays."""
        axes = {a.leaf: a.row_axes[0] for a in arrays if a.leaf is not None and len(a.row_axes) == 1}
        sizes = {a.leaf: a.shape[a.row_axes[0]] for a in arrays if a.leaf in axes}
        for leaf, _, own in self.axes:
            if leaf in axes:
                labels = own[axes[leaf]].labels
                return range(sizes[leaf]) if labels is None else labels
        return None

    def encode(self) -> list[Any]:
        """As JSON; labels that are neither text nor numbers become text."""
        axes = [[i, name, [[a.name, _plain(a.labels), a.is_column] for a in own]] for i, name, own in self.axes]
        return [axes, [[i, list(names)] for i, names in self.whole]]

    @classmethod
    def decode(cls, saved: list[Any] | None) -> Labels:
        """The inverse of :meth:`encode`; none of files that have none."""
        axes, whole = saved or ([], [])

        def axis(name: str | None, labels: list[Any] | None, is_column: bool) -> Axis:
            return Axis(name, None if labels is None else tuple(labels), is_column)

        return cls(
            tuple((i, name, tuple(axis(*a) for a in own)) for i, name, own in axes),
            tuple((i, tuple(names)) for i, names in whole),
        )


def _plain(labels: tuple[Any, ...] | None) -> list[Any] | None:
    if labels is None:
        return None
    values = [v.item() if isinstance(v, np.generic) else v for v in labels]
    return [v if isinstance(v, bool | int | float | str) else str(v) for v in values]


NO_LABELS = Labels()


def read_arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: Labels | None = None
) -> tuple[tuple[Any, ...], dict[str, Any], Labels]:
    """The model's arguments, looked at, with arrays in the place of tables, and what the tables say of their axes.

    Raises:
        TypeError: for a column that holds no numbers, and other containers of them; the message names the column.
        ValueError: for two columns of one name, or other columns than those of the same arguments in `known`.
        TypeError, ValueError: as :func:`check_arguments`.
    """
    args, kwargs, labels = _from_tables(model, args, kwargs)
    refuse_other_columns(known or NO_LABELS, labels)
    check_arguments(model, args, kwargs)
    return args, kwargs, labels


def _from_tables(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Labels]:
    # JAX wants to be told that what can be read once only is a leaf; it is refused after this.
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), lambda v: isinstance(v, Iterator))
    if not any(_is_table(leaf) for _, leaf in leaves):
        return args, kwargs, NO_LABELS
    names, found, axes, whole, count = positional(model), [], [], [], 0
    rows: list[tuple[str, Any]] = []
    for path, leaf in leaves:
        if _is_table(leaf):
            name = _name_of(names, path)
            rows.append((name, leaf))
            leaf, own, integers = _read(f"'{name}'", leaf)
            axes.append((count, name, own))
            if integers:
                whole.append((count, integers))
        count += isinstance(leaf, np.ndarray | jax.Array)
        found.append(leaf)
    for (first, one), (name, other) in itertools.pairwise(rows):
        refuse_other_rows(f"'{first}'", row_index(one), f"'{name}'", row_index(other))
    new_args, new_kwargs = jax.tree.unflatten(treedef, found)
    return new_args, new_kwargs, Labels(tuple(axes), tuple(whole))


def _name_of(names: list[str], path: tuple[Any, ...]) -> str:
    """The argument that a leaf of (args, kwargs) is, or is in: x, args[3], data.height."""
    first, second, *rest = path
    head = second.key if first.idx == 1 else names[second.idx] if second.idx < len(names) else f"args[{second.idx}]"
    return ".".join([head, *([jax.tree_util.keystr(tuple(rest), simple=True, separator=".")] if rest else [])])


def as_array(name: str, value: Any) -> Any:
    """A table as an array, anything else as it is; raises as :func:`read_arguments`."""
    return _read(f"'{name}'", value)[0] if _is_table(value) else value


def as_rows(array: DataArray, value: Any, labels: Labels) -> Any:
    """Data given as a table as an array, anything else as it is.

    Raises:
        ValueError: for a frame of other columns, or in another order, than the one that the model is bound to.
        TypeError: as :func:`read_arguments`.
    """
    if not _is_table(value):
        return value
    found, axes, _ = _read(f"'{array.name}'", value)
    refuse_other_columns(labels, Labels(((-1 if array.leaf is None else array.leaf, array.name, axes),)))
    return found


def refuse_other_columns(known: Labels, new: Labels, by_name: bool = False) -> None:
    """Raises ValueError for frames of other columns, or in another order, than those of the same arguments before.

    They are told by their place among the arrays of all arguments or, where these are some of them, by name.
    """

    def key(leaf: int, name: str) -> int | str:
        return name if by_name else leaf

    before = {key(leaf, name): axes[-1] for leaf, name, axes in known.axes}
    for leaf, name, (*_, last) in new.axes:
        first = before.get(key(leaf, name), last)
        if last.is_column and first.is_column and first.labels != last.labels:
            raise ValueError(
                f"'{name}' has the columns {_listed(last.labels)}, and the model is bound to data with "
                f"{_listed(first.labels)}: give it these in this order, e.g. frame[{list(first.labels or ())!r}]."
            )


def refuse_whole_columns(labels: Labels, arrays: tuple[DataArray, ...]) -> None:
    """Raises TypeError for data with columns of integers among others."""
    for a in arrays:
        for _, names in (v for v in labels.whole if v[0] == a.leaf):
            these = ", ".join(map(repr, names))
            raise TypeError(
                f"{'Column' if len(names) == 1 else 'Columns'} {these} of '{a.name}' "
                f"{'holds' if len(names) == 1 else 'hold'} integers, and score matching differentiates in the data: "
                "pass what takes few values as an argument of its own, to condition on, and make what is measured in "
                f"small steps floats, e.g. frame.astype({{{names[0]!r}: float}})."
            )


def row_index(table: Any) -> tuple[Any, ...] | range | None:
    """What pandas calls the rows of a table; None of others, whose rows have no names."""
    index = getattr(table, "index", None)
    if index is None or callable(index) or not hasattr(index, "equals"):
        return None
    return range(len(index)) if hasattr(index, "step") and (index.start, index.step) == (0, 1) else tuple(index)


def refuse_other_rows(one: str, first: Any, other: str, second: Any) -> None:
    """Raises ValueError for two tables of equal length whose rows have other names, or the same in another order.

    Rows that are only numbered, beside rows with names, are taken as they come.
    """
    if first is None or second is None or len(first) != len(second) or tuple(first) == tuple(second):
        return
    if isinstance(first, range) != isinstance(second, range) and set(first) != set(second):
        return
    at = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    raise ValueError(
        f"The rows of {one} and {other} have different labels, first {first[at]!r} and {second[at]!r} in row {at}: "
        "bring them into one order, e.g. by .loc[other.index], or write .to_numpy() if their order is right."
    )


def _listed(labels: tuple[Any, ...] | None) -> str:
    labels = labels or ()
    shown = ", ".join(repr(v) for v in labels[:8])
    return shown + (f", ... ({len(labels)})" if len(labels) > 8 else "")


def _is_table(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array | Mapping | np.generic):
        # A data set of xarray is a mapping of arrays.
        return hasattr(value, "data_vars")
    return any(hasattr(value, name) for name in ("to_numpy", "collect_schema", "__dataframe__", "to_pandas"))


def _read(what: str, table: Any) -> tuple[np.ndarray, tuple[Axis, ...], tuple[str, ...]]:
    """The array of a table, its axes, and its columns of integers if it has others too."""
    kind = type(table).__name__
    if hasattr(table, "data_vars"):
        raise TypeError(f"{what} is a {kind} of several arrays: pass them one by one, e.g. {what.strip(chr(39))}['a'].")
    if not hasattr(table, "to_numpy"):
        how = ".collect()" if hasattr(table, "collect") else ".to_pandas()"
        raise TypeError(f"{what} is a {kind}: pass a frame or an array, e.g. {what.strip(chr(39))}{how}.")
    if hasattr(table, "dims") and hasattr(table, "coords"):  # xarray's
        axes = tuple(Axis(str(d), _coordinate(table, d)) for d in table.dims)
        return _numbers(what, table, None), axes, ()
    rows = Axis(*_index(table))
    if not hasattr(table, "columns"):
        return _numbers(what, table, None), (rows,), ()
    names = tuple(table.columns)
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise ValueError(f"{what} has two columns {twice[0]!r}: rename one of them.")
    columns = [_numbers(f"Column {n!r} of {what}", table[n], n) for n in names]
    is_whole = [c.dtype.kind in "iub" for c in columns]
    whole = () if all(is_whole) else tuple(str(n) for n, yes in zip(names, is_whole, strict=True) if yes)
    array = np.stack(columns, axis=1) if columns else np.zeros((len(table), 0))
    header = getattr(table.columns, "name", None)
    return array, (rows, Axis(None if header is None else str(header), names, True)), whole


def _index(table: Any) -> tuple[str | None, tuple[Any, ...] | None]:
    """Name and labels of the rows of pandas, where they are more than their numbers."""
    index = getattr(table, "index", None)
    if index is None or callable(index) or hasattr(index, "step"):  # a range has steps
        return None, None
    name = getattr(index, "name", None)
    return None if name is None else str(name), tuple(index)


def _coordinate(array: Any, dim: Any) -> tuple[Any, ...] | None:
    return tuple(array.coords[dim].values.tolist()) if dim in array.coords else None


def _numbers(what: str, column: Any, name: Any) -> np.ndarray:
    """The numbers of a column.

    Raises:
        TypeError: if it holds something else.
    """
    values = np.asarray(column.to_numpy())
    # pandas' own integers and floats are objects where some are missing.
    if values.dtype.kind == "O" and getattr(column.dtype, "kind", "O") in "iufb":
        values = np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    if values.dtype.kind in "biufc":
        return values
    leave = "leave it out, or encode it as numbers" if name is not None else "pass numbers"
    if values.dtype.kind in "mM":
        raise TypeError(
            f"{what} holds times ({values.dtype}), which are no numbers: {leave} in a unit, e.g. days since the first."
        )
    seen = next((v for v in values.reshape(-1).tolist() if not _is_number(v)), None)
    held = "values that are missing among objects" if seen is None else f"{type(seen).__name__} such as {seen!r}"
    raise TypeError(f"{what} holds {held} (dtype {column.dtype}), which are no numbers: {leave}.")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float | np.number)


def column_names(arrays: tuple[DataArray, ...], labels: Labels) -> list[str]:
    """Names of the numbers of one datum, in the sites' own units: the columns of a frame, else x[0], x[1], ..."""
    axes: dict[int | None, tuple[Axis, ...]] = {leaf: found for leaf, _, found in labels.axes}
    names: list[str] = []
    for a in arrays:
        shape = tuple(s for i, s in enumerate(a.shape) if i not in a.row_axes)
        found = axes.get(a.leaf, ())
        known = (
            [axis.labels for i, axis in enumerate(found) if i not in a.row_axes] if len(found) == len(a.shape) else []
        )
        if len(known) == 1 and known[0] is not None and len(known[0]) == shape[0]:
            own = [", ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in known[0]]
            names += own if len(arrays) == 1 else [f"{a.name}[{v}]" for v in own]
        else:
            names += numbered(a.name, shape)
    return names
