"""Printed forms of fits."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["values_with_errors"]

_SHOWN = 6  # numbers of one array


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
        return f"{sum(np.size(v) for v in leaves):,} parameters in {len(leaves)} arrays"
    array, errors = np.asarray(leaves[0]), jax.tree.leaves(error)
    flat = array.reshape(-1)[:_SHOWN]
    shown = [f"{v:.4g}" for v in flat]
    if errors:
        shown = [f"{v} ± {e:.2g}" for v, e in zip(shown, np.asarray(errors[0]).reshape(-1), strict=False)]
    if array.ndim == 0:
        return shown[0]
    more = f", ... {array.size:,} of shape {array.shape}" if array.size > _SHOWN else ""
    return f"[{', '.join(shown)}{more}]"
