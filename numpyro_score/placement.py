"""Where arrays lie: over several devices, of several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["fetch"]


def fetch(tree: Any) -> Any:
    """The arrays as NumPy's, also those of which other processes hold parts; these are to fetch them, too."""

    def one(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
            return np.asarray(value)
        return multihost_utils.process_allgather(value, tiled=True)

    return jax.tree.map(one, tree)
