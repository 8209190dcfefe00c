"""The numbers of data and of draws in columns, in the sites' own units."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from numpyro_score.energy import Energy, rows_first

__all__ = ["chain_columns", "data_columns", "discrete_columns", "sample_columns"]


def data_columns(energy: Energy) -> tuple[list[str], np.ndarray]:
    """Names of the numbers of one datum in the sites' own units, and the data of some weight, (N, K)."""
    x, weights = energy.data_and_weights()
    values = energy.unflatten(x)
    columns = [np.asarray(rows_first(values[a.name], a.row_axes), np.float64) for a in energy.arrays]
    return energy.column_names, np.concatenate(columns, axis=1)[np.asarray(weights) != 0]


def discrete_columns(energy: Energy) -> list[bool]:
    """Which of these numbers are discrete."""
    x, _ = energy.data_and_weights()
    values = energy.unflatten(x[:1] if energy.resizable else x)
    widths = {a.name: rows_first(values[a.name], a.row_axes).shape[1] for a in energy.arrays}
    return [a.support.is_discrete for a in energy.arrays for _ in range(widths[a.name])]


def sample_columns(energy: Energy, samples: Any) -> Float[np.ndarray, "m k"]:
    """The numbers of each draw of the data, from ArviZ data."""
    columns = chain_columns(energy, samples)
    return columns.reshape(-1, columns.shape[-1])


def chain_columns(energy: Energy, samples: Any) -> Float[np.ndarray, "chain draw k"]:
    """The same, chain by chain."""
    missing = [a.name for a in energy.arrays if a.name not in samples["posterior"]]
    if missing:
        raise ValueError(f"The samples have no site '{missing[0]}': pass what sample(fit, key, 1000) returns.")
    sites = [samples["posterior"][a.name].values for a in energy.arrays]
    columns = np.concatenate([v.reshape(*v.shape[:2], -1) for v in sites], axis=-1)
    return columns if np.issubdtype(columns.dtype, np.floating) else columns.astype(np.float64)
