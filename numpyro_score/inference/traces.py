"""Traces of a model's parameters, found in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from numpyro import handlers

from numpyro_score.energy import join_arrays, split_arrays
from numpyro_score.programs import shared_jit

__all__ = ["CompiledTrace", "jit_once"]

# What runs once, on little, is not worth optimising: that would take three times as long as all else.
jit_once = partial(shared_jit, xla_backend_optimization_level=0)


class CompiledTrace:
    """The sites of a model at given values, as `handlers.trace` finds them, where NumPyro would run it eagerly.

    Args:
        model: without the density of data, as :func:`~numpyro_score.generalized.prior_model` makes it.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self._run = jit_once(self._trace, static_argnames=("static",))

    def __call__(self, values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The sites by name; arrays in them are those of the program."""
        arrays, static = split_arrays((args, kwargs), self.model)
        return self._run(values, arrays, static=static).trace()

    def _trace(self, values: dict[str, Any], arrays: list[Any], *, static: Any) -> Sites:
        args, kwargs = join_arrays(arrays, static)
        model = handlers.substitute(self.model, data=values)
        return Sites.of(handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace(*args, **kwargs))


@jax.tree_util.register_pytree_node_class
class Sites:
    """A trace as what a compiled function may return: its arrays, and beside them what is no array.

    Args:
        arrays: the leaves that are arrays, by their place.
        treedef: of the trace.
        rest: all leaves, None in the places of arrays.
    """

    def __init__(self, arrays: dict[int, Any], treedef: Any, rest: list[Any]) -> None:
        self.arrays, self.treedef, self.rest = arrays, treedef, rest

    @classmethod
    def of(cls, trace: dict[str, Any]) -> Sites:
        leaves, treedef = jax.tree.flatten(trace)
        arrays = {i: v for i, v in enumerate(leaves) if isinstance(v, jax.Array | np.ndarray)}
        return cls(arrays, treedef, [None if i in arrays else v for i, v in enumerate(leaves)])

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any, Any]]:
        return (self.arrays,), (self.treedef, self.rest)

    @classmethod
    def tree_unflatten(cls, held: tuple[Any, Any], arrays: tuple[Any]) -> Sites:
        return cls(*arrays, *held)

    def trace(self) -> dict[str, Any]:
        """The trace with its arrays."""
        return jax.tree.unflatten(self.treedef, [self.arrays.get(i, v) for i, v in enumerate(self.rest)])
