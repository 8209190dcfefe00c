"""A model with its arguments and the values of its parameters set, so that it can be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.energy.arguments import is_given, join_arrays, split_arrays, with_outside
from numpyro_score.energy.layout import Layout
from numpyro_score.energy.tables import NO_LABELS, Labels, column_names, read_arguments
from numpyro_score.energy.trace import Recorder, run_model
from numpyro_score.placement import Places, places_of
from numpyro_score.printed import name_of

__all__ = ["AnyArray", "ModelAtValues", "Table", "layouts_kept"]

AnyArray = Array | np.ndarray


@runtime_checkable
class Table(Protocol):
    """Rows of pandas, polars or xarray, whose columns have names."""

    def to_numpy(self) -> Any:
        """All numbers as one array."""


_LAYOUTS: ContextVar[dict[Any, Layout] | None] = ContextVar("layouts", default=None)


@contextmanager
def layouts_kept() -> Iterator[None]:
    """Reads each model once for values of the same shapes, in code during which no model changes.

    A fit binds its model to parameters some ten times, and reading the layout runs the model half a dozen times. It
    cannot be kept for longer: what a model closes over may be other data at the next call.
    """
    known = _LAYOUTS.get()
    token = _LAYOUTS.set({} if known is None else known)
    try:
        yield
    finally:
        _LAYOUTS.reset(token)


# Not typing.Self, which beartype does not take in methods.
M = TypeVar("M", bound="ModelAtValues")


class ModelAtValues:
    """A pytree whose leaves are the parameters and the array arguments of a model, all else static.

    What :class:`Energy` is before its data are found and its density is taken.
    """

    _traced = False  # whether it came out of a pytree, as it does inside of compiled programs
    labels: Labels = NO_LABELS  # of the columns of data that came as tables; in old pickles there are none

    def __init__(self, model: Callable[..., Any], params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if not isinstance(params, Mapping):
            kind = type(self).__name__
            given = f"an array of shape {np.shape(params)}" if hasattr(params, "shape") else repr(params)
            raise TypeError(
                f"params must be a dict of values by site, got {given}: write {kind}(model, params, x), with {{}} for "
                "a model without parameters."
            )
        choice = kwargs.pop("data") if isinstance(kwargs.get("data"), str) else None
        self._set(model, params, {}, None, choice, args, kwargs)

    @classmethod
    def bound_to(
        cls: type[M],
        model: Callable[..., Any],
        params: dict[str, Any],
        plates: dict[str, Array],
        rng_key: Array | None,
        data: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: Places | None = None,
        labels: Labels = NO_LABELS,
    ) -> M:
        """The energy inside a run of the model: on the rows its plates drew, with a key for its random numbers.

        `places` are those of the arrays among the arguments, where they are traced and cannot tell; `labels` those of
        tables that were turned into arrays before.
        """
        new = object.__new__(cls)
        new._set(model, params, plates, rng_key, data, args, kwargs)
        new._places = new._places if places is None else places
        return new.labelled(labels)

    def labelled(self: M, labels: Labels) -> M:
        """The same with what tables say of the data's columns, where there were any."""
        return self._replace(labels=labels.of_columns(self._layout)) if labels.axes else self

    def _set(
        self,
        model: Any,
        params: Any,
        plates: Any,
        rng_key: Any,
        choice: Any,
        args: Any,
        kwargs: Any,
    ) -> None:
        args, kwargs, labels = read_arguments(model, args, kwargs)
        self.model, self.params = model, params
        self._arrays, self._static = split_arrays((args, kwargs), model)
        self._places = places_of(self._arrays)
        self._axes: tuple[str, ...] = ()  # of a mesh, inside of a program for the rows of each device
        self._choice = choice
        self._plates = plates  # the rows that subsampled plates take; all of them if not given
        self._pinned: dict[str, Any] = {}  # observed sites given another value
        self._rng_key = rng_key  # what `numpyro.prng_key()` in the model draws from
        self._layout = self._known_layout()
        self.labels = labels.of_columns(self._layout)

    def _replace(self: M, **changes: Any) -> M:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **changes)
        return new

    def __repr__(self) -> str:
        return f"{type(self).__name__}({name_of(self.model)} at {', '.join(sorted(self.params)) or 'no parameters'})"

    def __getstate__(self) -> dict[str, Any]:
        # The arguments themselves: JAX does not pickle the structure of a pytree of the user's own classes.
        state = {k: v for k, v in self.__dict__.items() if k not in ("_arrays", "_static", "_places")}
        return {**state, "arguments": join_arrays(self._arrays, self._static)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._arrays, self._static = split_arrays(state.pop("arguments"), state["model"])
        self._places = places_of(self._arrays)
        self.__dict__.update(state)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Parameters and arrays are leaves; the model, its other arguments and the layout are static."""
        children = (self.params, self._arrays, self._plates, self._pinned, self._rng_key)
        # What the model reads outside may have changed, unless this is inside of a program that was traced before.
        read = self._static if self._traced else with_outside(self._static, self.model)
        static = (self.model, read, self._choice, self._layout, self._places, self._axes, self.labels)
        return children, static

    @classmethod
    def tree_unflatten(cls: type[M], aux: tuple[Any, ...], children: tuple[Any, ...]) -> M:
        """The inverse of :meth:`tree_flatten`."""
        new = object.__new__(cls)
        new.params, new._arrays, new._plates, new._pinned, new._rng_key = children
        new._traced = True
        new.model, new._static, new._choice, new._layout, new._places, new._axes, new.labels = aux
        return new

    @property
    def held(self) -> tuple[dict[str, Any], dict[str, Array], Array | None]:
        """What :meth:`bound_to` was given: values by site, the rows of subsampled plates, and the key of the run."""
        return self.params, self._plates, self._rng_key

    def is_given(self, name: str) -> bool | None:
        """Whether the model's argument `name` was given, or is at its default; None if there is none of this name."""
        return is_given(self.model, self._static, name)

    def with_params(self: M, params: dict[str, Any]) -> M:
        """The same density at other values of the given sites, of the same shapes."""
        return self._replace(params={**self.params, **params})

    @property
    def column_names(self) -> list[str]:
        """Names of the numbers of one datum in the sites' own units: columns of a table, else x[0], x[1] and so on."""
        return column_names(self._layout.arrays, self.labels)

    @property
    def dtype(self) -> Any:
        """The floats of the computation: float32, or float64 where it is enabled."""
        return jnp.result_type(float)

    def _run(self) -> Recorder:
        args, kwargs = join_arrays(self._arrays, self._static)
        values = {**self.params, **self._pinned}
        return run_model(self.model, args, kwargs, values, self._plates, self._rng_key)

    def _known_layout(self) -> Layout:
        known = _LAYOUTS.get()
        if known is None:
            return self._read_layout()
        leaves, treedef = jax.tree.flatten((self.params, self._arrays, self._plates, self._pinned))
        types = tuple((jnp.shape(v), v.dtype if hasattr(v, "dtype") else jnp.result_type(v)) for v in leaves)
        key = (self.model, self._static, self._choice, treedef, types, self.dtype)
        if key not in known:
            known[key] = self._read_layout()
        return known[key]

    def _read_layout(self) -> Layout:
        raise NotImplementedError
