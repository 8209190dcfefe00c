"""What a function reads from outside of its arguments, as a key for programs that were traced from it.

JAX traces a function once and knows it again by its identity. A model that reads a global, as one does in a notebook,
is the same function after that has another value, and the old program would be run without a word.
"""

from __future__ import annotations

import functools
import inspect
import types
import zlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["Keyed", "outside_values"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEPTH = 4  # of functions in functions, and attributes of attributes
_LIBRARIES = {"equinox", "flax", "jax", "numpy", "numpyro", "numpyro_score", "optax", "scipy"}
_LOOKED_AT = 2**12  # numbers of a NumPy array, which may change where it is


class _Same:
    """An object by its identity, which it keeps alive so that no other takes it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Keyed:
    """A function as a static argument of a compiled one: equal to itself while what it reads outside is the same."""

    def __init__(self, f: Any) -> None:
        self.f = f
        self._key = (_Same(f), outside_values(f))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.f(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def outside_values(f: Any) -> Hashable:
    """The values that a function reads from globals, enclosing functions and its own object, as a hashable key.

    Numbers, strings, tuples and dicts of these count by value, NumPy's arrays by identity and a sum over up to 4,096
    of their numbers, functions by what they read in turn if they are of the same module, objects, classes and modules
    by the attributes that the function names, and everything else, lists included, by identity. What a function reads
    otherwise, such as a file or an item of a list, is not seen.
    """
    return _of(f, _DEPTH, None, None)


def _of(value: Any, depth: int, module: Any, read: tuple[str, ...] | None) -> Hashable:
    """The key of a value, of which a function of `module` reads the attributes `read`; None for all."""
    if isinstance(value, _PLAIN):
        return type(value), value if value == value else "nan"
    if isinstance(value, np.ndarray | np.generic):
        return _Same(value) if isinstance(value, np.ndarray) else None, _sum(np.asarray(value))
    if isinstance(value, jax.Array | types.BuiltinFunctionType) or depth == 0:
        return _Same(value)
    if isinstance(value, tuple):
        return tuple(_of(v, depth - 1, module, read) for v in value)
    if isinstance(value, Mapping):
        keys = [k if isinstance(k, _PLAIN) else _Same(k) for k in value]
        return tuple(zip(keys, (_of(v, depth - 1, module, read) for v in value.values()), strict=True))
    if isinstance(value, functools.partial):
        return tuple(_of(v, depth - 1, module, read) for v in (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        inside = _names(value.__func__.__code__) if isinstance(value.__func__, types.FunctionType) else None
        return _of(value.__func__, depth - 1, module, read), _of(value.__self__, depth - 1, module, inside)
    if isinstance(value, types.FunctionType):
        if (module is not None and module is not value.__globals__) or _of_library(value.__module__):
            return _Same(value)
        names = _names(value.__code__)
        return _Same(value.__code__), *(_of(v, depth - 1, value.__globals__, names) for v in _read_by(value, names))
    if hasattr(value, "__wrapped__"):
        return _Same(value), _of(inspect.unwrap(value), depth - 1, module, None)
    return _Same(value), *_of_attributes(value, depth, module, read)


def _of_attributes(value: Any, depth: int, module: Any, read: tuple[str, ...] | None) -> Iterator[Hashable]:
    """Of an object, class or module, the attributes that are read, and what its own call reads."""
    own = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if isinstance(value, type | types.ModuleType) and _of_library(own):
        return
    call = vars(type(value)).get("__call__")
    if isinstance(call, types.FunctionType) and not isinstance(value, type | types.ModuleType):
        yield _of(call, depth - 1, module, read)
        read = None if _of_library(call.__module__) or read is None else (*read, *_names(call.__code__))
    held = getattr(value, "__dict__", {})
    for name in held if read is None else dict.fromkeys(read):
        if name in held:
            yield name, _of(held[name], depth - 1, module, read)


def _of_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _read_by(f: types.FunctionType, names: tuple[str, ...]) -> Iterator[Any]:
    """The values of the names that a function and those defined in it read from outside, and of its defaults."""
    yield from f.__defaults__ or ()
    yield from (f.__kwdefaults__ or {}).values()
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet, as of a function that names itself
            yield None
    for name in names:
        if name in f.__globals__:
            yield f.__globals__[name]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(n for c in inner for n in _names(c))]))


def _sum(value: np.ndarray) -> Hashable:
    """Tells an array from what it was before, if numbers among those looked at have changed."""
    if value.dtype.hasobject:
        return value.shape
    flat = value.reshape(-1) if value.flags.c_contiguous else value.flat  # no copy of what may be large
    some = flat[:: max(len(flat) // _LOOKED_AT, 1)]
    return value.shape, value.dtype.str, zlib.crc32(some.tobytes())
