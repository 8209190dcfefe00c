"""Implicit score matching."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy

__all__ = ["ISM"]


@dataclass(frozen=True)
class ISM:
    """Implicit score matching, ½‖s(x)‖² + tr ∇s(x) [Hyvärinen 2005, eq. 4].

    The mean over the data estimates the Fisher divergence ½ E‖∇log p − s‖² up to a constant of the data, without
    bias and without randomness: the trace is exact. Costs D + 2 densities and their gradient; choose
    :class:`~numpyro_score.SSM` where D is large. Returns (N,) values.
    """

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        _, score, laplacian = energy.value_score_laplacian(energy.data)
        return 0.5 * jnp.sum(score**2, axis=-1) + laplacian

    def rows_per_chunk(self, energy: Energy) -> int:
        """Rows whose Jacobians, D numbers for every intermediate, still fit the cache."""
        # On a CPU the pass is bound by memory. At width 128, 256 // D rows make intermediates of 128 kB; 1024 // D took
        # 1.1 to 2 times as long at D = 2, 16 and 64. An accelerator wants large batches, and the chunk only bounds the
        # memory; that figure is not measured.
        budget = 256 if jax.default_backend() == "cpu" else 2**18
        return max(budget // energy.dim, 4)
