"""Splits a model's arguments into arrays, which are traced, and everything else, which is static."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_score.closures import outside_values
from numpyro_score.energy.values import check_argument, check_list
from numpyro_score.placement import label_auto

Static = tuple[Any, tuple[Any, ...], Hashable]


class _Array:
    """Stands for an array in the static part."""

    def __repr__(self) -> str:
        return "<array>"

    def __reduce__(self) -> str:
        return "_ARRAY"  # the one of this module, as it is compared by identity


_ARRAY = _Array()


def split_arrays(tree: Any, *functions: Any) -> tuple[list[Any], Static]:
    """Splits a pytree into its NumPy and JAX arrays and a hashable rest.

    Python numbers stay static: a model may use them as sizes or in `if`. The rest also holds what `functions`, such as
    the model, read from outside, so that a program with the rest as a static argument is traced anew when that changes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(v, jax.Array | np.ndarray) for v in leaves]
    rest = tuple(_ARRAY if yes else v for v, yes in zip(leaves, is_array, strict=True))
    for v in rest:
        if not isinstance(v, Hashable):
            raise TypeError(
                f"A model argument is a {type(v).__name__}: pass NumPy or JAX arrays, e.g. np.asarray(...)."
            )
    # As JAX arrays, so that a model can index them by traced plate indices.
    arrays = [label_auto(jnp.asarray(v)) for v, yes in zip(leaves, is_array, strict=True) if yes]
    return arrays, with_outside((treedef, rest, ()), *functions)


def with_outside(static: Static, *functions: Any) -> Static:
    """The static part of :func:`split_arrays` with what the functions read from outside now."""
    return (*static[:2], tuple(map(outside_values, functions)))


def join_arrays(arrays: list[Any], static: Static) -> Any:
    """The inverse of :func:`split_arrays`."""
    treedef, rest, _ = static
    it = iter(arrays)
    return jax.tree.unflatten(treedef, [next(it) if v is _ARRAY else v for v in rest])


def check_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Looks at a model's arguments before it runs, and fails with less to say.

    Raises:
        TypeError: for generators, lists in the place of data, and arrays that hold no numbers.
        ValueError: for data without rows or columns.
    """
    names = positional(model)
    given = {**{(names[i] if i < len(names) else f"args[{i}]"): v for i, v in enumerate(args)}, **kwargs}
    for name, value in given.items():
        check_argument(name, value)
    arrays, static = split_arrays((args, kwargs))
    if not arrays and given:  # else the first may be a list of sizes, and the data be elsewhere
        check_list(*next(iter(given.items())))
    named, first = named_arrays(model, static)
    for name, i in named.items():
        if 0 in arrays[i].shape[: None if name == first else 1]:
            raise ValueError(
                f"Argument '{name}' is empty, of shape {arrays[i].shape}: pass at least one row of one number."
            )


def named_arrays(model: Callable[..., Any], static: Static) -> tuple[dict[str, int], str | None]:
    """The arguments `(args, kwargs)` that are one array, as name to index, and the name of the first positional one."""
    treedef, rest, _ = static
    index = iter(range(len(rest)))
    args, kwargs = jax.tree.unflatten(treedef, [next(index) if v is _ARRAY else None for v in rest])
    names = positional(model)
    named = {(names[i] if i < len(names) else f"args[{i}]"): v for i, v in enumerate(args)}
    first = next(iter(named), names[0] if names and names[0] in kwargs else None)
    return {k: v for k, v in {**named, **kwargs}.items() if isinstance(v, int)}, first


def positional(model: Callable[..., Any]) -> list[str]:
    """The names of the arguments that the model takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(model).parameters.values() if p.kind in kinds]


def is_given(model: Callable[..., Any], static: Static, name: str) -> bool | None:
    """Whether the arguments give a value to the model's argument `name`; None if it has none of this name."""
    model = _innermost(model)
    if isinstance(model, functools.partial) and name in model.keywords:
        return True
    treedef, rest, _ = static
    args, kwargs = jax.tree.unflatten(treedef, rest)
    signature = inspect.signature(model)
    if name not in signature.parameters:
        return True if name in kwargs else None
    return name in signature.bind_partial(*args, **kwargs).arguments


def array_arguments(model: Callable[..., Any], arrays: list[Any], static: Static) -> list[tuple[str, Any]]:
    """The arrays among the model's arguments, each with the name of the argument that it is of."""
    args, kwargs = join_arrays(arrays, static)
    signature = inspect.signature(_innermost(model))
    given = signature.bind_partial(*args, **kwargs).arguments
    return [(name, v) for name, value in given.items() for v in jax.tree.leaves(value) if hasattr(v, "dtype")]


def takes_keyword(model: Callable[..., Any], name: str) -> bool:
    """Whether `model` can be called with the keyword `name`; handlers around it are looked through."""
    parameters = inspect.signature(_innermost(model)).parameters
    named = parameters.get(name)
    if named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY):
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _innermost(model: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(model, Messenger) and model.fn is not None:
        model = model.fn
    return model
