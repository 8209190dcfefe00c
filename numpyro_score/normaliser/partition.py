"""log Z of a fitted model, by several methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from numpyro_score.energy import Energy
from numpyro_score.inference import ScoreMatchingResult
from numpyro_score.normaliser.coordinates import free_dim
from numpyro_score.normaliser.quadrature import MAX_DIM, quadrature
from numpyro_score.normaliser.smc import smc
from numpyro_score.normaliser.source import density_of

__all__ = ["LogPartition", "log_partition"]

METHODS: dict[str, Callable[..., tuple[float, float, dict[str, Any]]]] = {
    "quadrature": quadrature,
    "smc": smc,
}


class LogPartition(NamedTuple):
    """An estimate of log Z."""

    value: float
    stderr: float  # of the value; by quadrature its numerical error
    method: str
    diagnostics: dict[str, Any]  # what the method has to say about how far to trust it


def log_partition(
    energy: Energy | ScoreMatchingResult, method: str | None = None, rng_key: Array | None = None, **settings: Any
) -> LogPartition:
    chosen = method or ("quadrature" if free_dim(energy, "angles") <= MAX_DIM else "smc")
    value, stderr, diagnostics = METHODS[chosen](density_of(energy), rng_key, **settings)
    return LogPartition(value, stderr, chosen, diagnostics)
