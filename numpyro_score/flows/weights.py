"""What importance weights say about a normaliser."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["WeightSummary", "summarize_weights"]


class WeightSummary(NamedTuple):
    """Two estimates of log Z from independent weights w with E[w] = Z."""

    bound: Float[Array, "*batch"]  # mean of log w; unbiased for a lower bound of log Z
    bound_stderr: Float[Array, "*batch"]
    log_partition: Float[Array, "*batch"]  # log of the mean of w; w is unbiased for Z, its log low by about ½ stderr²
    log_partition_stderr: Float[Array, "*batch"]  # by the delta method; too small where few weights carry the sum
    effective_sample_size: Float[Array, "*batch"]  # (Σw)² / Σw²


def summarize_weights(log_weights: Float[Array, "n *batch"]) -> WeightSummary:
    """Estimates from log weights, the first axis being the sample's.

    A weight that is NaN makes all estimates NaN.

    Raises:
        ValueError: for fewer than two weights.
    """
    n = log_weights.shape[0]
    if n < 2:
        raise ValueError(f"summarize_weights needs two weights or more for a standard error, got {n}.")
    total = jax.nn.logsumexp(log_weights, axis=0)
    relative = n * jnp.exp(log_weights - total)  # w over the mean of w
    return WeightSummary(
        jnp.mean(log_weights, axis=0),
        jnp.std(log_weights, axis=0, ddof=1) / n**0.5,
        total - jnp.log(n),
        jnp.std(relative, axis=0, ddof=1) / n**0.5,
        n / jnp.mean(relative**2, axis=0),
    )
