"""Pieces of messages."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_score.placement import fetch

__all__ = ["first_marked", "numbered", "plural", "rows_text"]

_SHOWN = 1024


def plural(n: int, noun: str) -> str:
    """The number with its noun: 2 rows."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def rows_text(bad: Any) -> str:
    """The marked rows, (N,), in words; nothing if there are none."""
    count, rows = int(fetch(bad.sum())), first_marked(bad)
    if not count:
        return ""
    shown = ", ".join(map(str, rows[:8])) + (", ..." if count > 8 else "")
    return f"row{'' if count == 1 else 's'} {shown} ({count} of {len(bad)})"


def first_marked(bad: Any) -> np.ndarray:
    """The first 1,024 marked rows of (N,), whose other numbers stay on their devices."""
    if isinstance(bad, np.ndarray):
        return np.flatnonzero(bad)[:_SHOWN]
    rows = fetch(jnp.flatnonzero(bad, size=min(_SHOWN, len(bad)), fill_value=len(bad)))
    return rows[rows < len(bad)]


def numbered(name: str, shape: tuple[int, ...]) -> list[str]:
    """A name for each number of an array: "x[0, 0]", ..., or "x" if it is one."""
    return [f"{name}[{', '.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
