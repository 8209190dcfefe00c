"""Printed forms: short, and the same in every process."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np

__all__ = ["name_of", "num_numbers", "settings", "values_with_errors", "without_addresses"]

_SHOWN = 6  # numbers of one array


def without_addresses(value: Any) -> str:
    """`repr` without the addresses of objects, and with functions by their names."""
    named = re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", repr(value))
    return re.sub(r" at 0x[0-9a-f]+", "", named)


def name_of(function: Any) -> str:
    """The name of a function, or of the class of what can be called like one."""
    return getattr(function, "__name__", type(function).__name__)


def settings(loss: Any) -> str:
    """A dataclass with those of its settings that are not the defaults."""
    if not dataclasses.is_dataclass(loss):
        return without_addresses(loss)
    values = {f.name: (getattr(loss, f.name), f.default) for f in dataclasses.fields(loss)}
    changed = (f"{k}={_value(v)}" for k, (v, default) in values.items() if _is_array(v) or v != default)
    return f"{type(loss).__name__}({', '.join(changed)})"


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _value(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a loss within a loss
        return settings(value)
    return _site(value, None) if _is_array(value) else without_addresses(value)


def num_numbers(tree: Any) -> str:
    """How many numbers a pytree of arrays holds, in words."""
    leaves = jax.tree.leaves(tree)
    n = sum(np.size(v) for v in leaves)
    return f"{n:,} parameter{'' if n == 1 else 's'} in {len(leaves)} array{'' if len(leaves) == 1 else 's'}"


def values_with_errors(values: dict[str, Any], errors: dict[str, Any] | None) -> list[str]:
    """One line per site: its estimates with ± their standard errors, or how many numbers a large one has.

    Args:
        values: a number, an array or a pytree of arrays by site.
        errors: in the same structure, or None where they are not known.
    """
    return [f"{name}: {_site(value, None if errors is None else errors.get(name))}" for name, value in values.items()]


def _site(value: Any, error: Any) -> str:
    leaves = jax.tree.leaves(value)
    if len(leaves) != 1:
        return num_numbers(value)
    array, errors = np.asarray(leaves[0]), jax.tree.leaves(error)
    flat = array.reshape(-1)[:_SHOWN]
    shown = [f"{v:.4g}" for v in flat]
    if errors:
        shown = [f"{v} ± {e:.2g}" for v, e in zip(shown, np.asarray(errors[0]).reshape(-1), strict=False)]
    if array.ndim == 0:
        return shown[0]
    more = f", ... {array.size:,} of shape {array.shape}" if array.size > _SHOWN else ""
    return f"[{', '.join(shown)}{more}]"
