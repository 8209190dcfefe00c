"""Pieces of messages."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["numbered", "plural", "rows_text"]


def plural(n: int, noun: str) -> str:
    """The number with its noun: 2 rows."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def rows_text(bad: Any) -> str:
    """The marked rows, (N,), in words; nothing if there are none."""
    rows = np.flatnonzero(bad)
    if not rows.size:
        return ""
    shown = ", ".join(map(str, rows[:8])) + (", ..." if rows.size > 8 else "")
    return f"row{'' if rows.size == 1 else 's'} {shown} ({rows.size} of {len(bad)})"


def numbered(name: str, shape: tuple[int, ...]) -> list[str]:
    """A name for each number of an array: "x[0, 0]", ..., or "x" if it is one."""
    return [f"{name}[{', '.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
