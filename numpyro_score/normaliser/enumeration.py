"""log Z of discrete data by adding up all points."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.normaliser.tails import check_counts
from numpyro_score.operators import full_precision

__all__ = ["MAX_STATES", "enumeration", "num_states"]

MAX_STATES = 2**20
"""The most points that are added up."""

_CHUNK = 2**22  # numbers of rows at once


def num_states(energy: Energy) -> float:
    """The points of the support of a row; infinite for counts."""
    low, high = _box(energy)
    return float(np.prod(high - low + 1))


def enumeration(energy: Energy, rng_key: Array | None = None) -> tuple[float, float, dict[str, Any]]:
    """The sum of exp f over all points of a row, at most 2²⁰; counts are cut off where nothing is left.

    For counts boxes of growing size are added up, to twice the count each, until a doubling adds less than the rounding
    of the precision in force.

    Returns:
        log Z, its error by rounding, and diagnostics: `num_states`, the points added up.

    Raises:
        ValueError: for more points; for counts whose sum does not settle, as where the density cannot be normalised.
    """
    low, high = _box(energy)
    if np.isfinite(high).all():
        if num_states(energy) > MAX_STATES:
            raise ValueError(
                f"method='enumeration' adds up at most {MAX_STATES} points, and a row has {num_states(energy):.3g}: "
                "use method='ais'."
            )
        return _summary(energy, low, high)
    check_counts(energy)
    largest = np.asarray(jnp.max(energy.usable()[0].data, axis=0), np.float64)
    top = np.where(np.isfinite(high), high, np.maximum(2 * largest, low + 15))
    before = None
    while np.prod(top - low + 1) <= MAX_STATES:
        value, error, found = _summary(energy, low, top)
        if before is not None and abs(value - before) <= max(error, 1e-12):
            return value, error, found
        before, top = value, np.where(np.isfinite(high), high, low + 2 * (top - low) + 1)
    least = "" if before is None else f" beyond {before:.6g}"
    raise ValueError(
        f"The sum over the counts of '{energy.arrays[0].name}' does not settle within {MAX_STATES} points{least}: the "
        "density falls too slowly or grows, so that it may have no normaliser at these parameters; if it has one, use "
        "method='ais'."
    )


def _box(energy: Energy) -> tuple[np.ndarray, np.ndarray]:
    """The least and largest values of each number, (D,)."""
    low, high = (np.asarray(bound[0], np.float64) for bound in energy.bounds(energy.num_rows))
    return low, high


def _summary(energy: Energy, low: np.ndarray, high: np.ndarray) -> tuple[float, float, dict[str, Any]]:
    sizes = (high - low + 1).astype(int)
    total = math.prod(int(s) for s in sizes)
    chunk = max(_CHUNK // max(energy.width, energy.dim), 1)
    parts, largest = [], -np.inf
    for start in range(0, total, chunk):
        # Of the last chunk the first point again, where points are left over: one shape, one program.
        index = np.arange(start, start + min(chunk, total))
        points = np.stack(np.unravel_index(np.where(index < total, index, 0), sizes), axis=-1) + low
        f = np.asarray(_log_density(energy, jnp.asarray(points, energy.dtype)), np.float64)[index < total]
        if np.isnan(f).any() or np.isposinf(f).any():
            raise ValueError(
                f"The log density is NaN or infinite at {points[np.argmax(~(f < np.inf))].tolist()}: correct it "
                "there, or give the site the support that it has."
            )
        parts.append(scipy.special.logsumexp(f))
        largest = max(largest, float(f.max()))
    value = float(scipy.special.logsumexp(parts))
    error = 4 * float(jnp.finfo(energy.dtype).eps) * max(abs(largest), 1.0)
    return value, error, {"num_states": total}


@jax.jit
@full_precision
def _log_density(energy: Energy, x: Float[Array, "n d"]) -> Float[Array, "n"]:
    if energy.resizable:
        return energy.log_density(x)
    return energy.log_density(x[:, None])[:, 0]  # one row, every other axis a batch
