"""Other arguments for a model at the same values of its parameters: a noise level, covariates, new rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.energy.arguments import join_arrays, named_arrays, positional, split_arrays, takes_keyword
from numpyro_score.energy.tables import read_arguments, refuse_other_columns
from numpyro_score.placement import places_of

__all__ = ["data_arguments", "rebound", "refuse_other_axes", "rows_given"]


def rebound(energy: Any, arguments: Mapping[str, Any]) -> Any:
    """See :meth:`Energy.bind`."""
    model = energy.model
    _, arguments, labels = read_arguments(model, (), dict(arguments))
    refuse_other_columns(energy.labels, labels, by_name=True)
    args, kwargs = join_arrays(energy._arrays, energy._static)
    args, kwargs, names = list(args), dict(kwargs), positional(model)
    for name, value in arguments.items():
        if name in names[: len(args)]:
            args[names.index(name)] = value
        elif takes_keyword(model, name):
            kwargs[name] = value
        else:
            raise TypeError(
                f"The model takes no keyword '{name}': add it with a default, e.g. def model(x, {name}=1.0)."
            )
    arrays, static = split_arrays((tuple(args), kwargs), energy.model)
    new = energy._replace(_arrays=arrays, _static=static, _places=places_of(arrays))
    refuse_other_axes(energy, new)
    try:
        new._layout = new._read_layout()
    except (TypeError, ValueError) as error:  # the model's own, which need not know what is new to it
        given = [f"{k} of shape {np.shape(v)}" for k, v in arguments.items() if hasattr(v, "shape")]
        rule = f"an argument of rows is as a rule of shape ({energy.num_rows},) with one value for each row, or () "
        rule += "with one for all; other rows go with their arguments, by energy.at(x, z=z)."
        if not given:
            given = [f"{k} = {v!r}" for k, v in arguments.items()]
            rule = "pass what the model computes with."
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The model cannot be evaluated with {', '.join(given)}: {rule} {error}") from error
    return new


def data_arguments(energy: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Data by site, {name: array}, by the names of the model's arguments.

    Raises:
        ValueError: for data that the model holds itself, or makes of its arguments.
    """
    names = {leaf: name for name, leaf in named_arrays(energy.model, energy._static)[0].items()}
    found = {}
    for a in energy.arrays:
        if a.leaf not in names:
            raise ValueError(
                f"Data '{a.name}' are no argument of the model, so that other rows cannot take their place: write "
                "def model(x, z) and observe x."
            )
        found[names[a.leaf]] = values[a.name]
    return found


def refuse_other_axes(known: Any, new: Any) -> None:
    """Raises ValueError for an argument that has axes, and others in number than where the energy `known` has it.

    A column in the place of a table would have each row meet the numbers of the others.
    """
    before = named_arrays(known.model, known._static)[0]
    for name, leaf in named_arrays(new.model, new._static)[0].items():
        if name not in before:
            continue
        first, second = np.shape(known._arrays[before[name]]), np.shape(new._arrays[leaf])
        if first and second and len(first) != len(second):
            raise ValueError(
                f"'{name}' has shape {second}, and the model is bound to one of shape {first}: give it "
                f"{len(first)} {'axis' if len(first) == 1 else 'axes'}, as there."
            )


def rows_given(energy: Any, given: Mapping[str, Any]) -> list[Any]:
    """The densities of one row that the model has at each of M values of some of its arguments, one energy for each.

    Args:
        energy: at any data, whose first row of some weight is where each starts.
        given: arguments by name, (M, ...) each; all other arguments stay as they are.

    Raises:
        TypeError: for what is no dict, or an argument that the model has not.
        ValueError: for arguments of different lengths, or with which the model cannot be evaluated for one row.
    """
    if not isinstance(given, Mapping) or not given:
        raise TypeError(f"given must be a dict of the model's arguments by name, e.g. {{'z': z}}, got {given!r}.")
    _, given, labels = read_arguments(energy.model, (), dict(given))
    refuse_other_columns(energy.labels, labels, by_name=True)
    given = {k: jnp.asarray(v) for k, v in given.items()}
    sizes = {k: v.shape[0] if v.ndim else 0 for k, v in given.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"given has arguments of the lengths {sizes}: give one value of each for every row.")
    usable, weights = energy.usable()
    row = usable.data[int(jnp.argmax(weights != 0))][None]
    start = data_arguments(energy, energy.unflatten(row))
    (m,) = set(sizes.values())
    first = rebound(energy, {**start, **{k: v[:1] for k, v in given.items()}})
    if first.num_rows != 1:
        raise ValueError(
            f"With one row of {', '.join(given)} the model has {first.num_rows} rows: let the plate of rows follow the "
            "length of the data, e.g. numpyro.plate('rows', len(x)), and give all arguments that have a value by row."
        )
    leaves = named_arrays(energy.model, first._static)[0]
    found = []
    for i in range(m):
        arrays = list(first._arrays)
        for k, v in given.items():
            arrays[leaves[k]] = jax.lax.index_in_dim(v, i)
        found.append(first._replace(_arrays=arrays))
    return found
