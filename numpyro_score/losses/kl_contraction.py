"""KL contraction, also known as energy discrepancy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.energy import Energy
from numpyro_score.losses.base import positive, required, set_counts
from numpyro_score.losses.chunks import rows_at_once
from numpyro_score.losses.rounding import warn_of_flat_data
from numpyro_score.losses.terms import require_flat
from numpyro_score.operators import full_precision

__all__ = ["KLContraction"]


@dataclass(frozen=True)
class KLContraction:
    """KL contraction under Gaussian noise [Lyu 2011], as the energy discrepancy of Schröder et al. [2023].

    With x̃ = x + √t ε₀ and M independent ε_m each row's value is

        (1/t) { log (w/M + (1/M) Σ_m exp[f(x̃ + √t ε_m) − f(x)]) },

    which for w = 0 and M → ∞ has the mean [KL(p‖q) − KL(p_t‖q_t)]/t + const, where both laws are blurred by N(0, tI).
    It falls to the Hyvärinen objective as t → 0, and t times it to the negative log likelihood as t → ∞, so it sees
    the weights of modes some √t apart. Only density values are needed. Costs M + 1 densities and their gradient.

    The logarithm of a mean of M terms is too low by about half their relative variance over M. The ε_m come in pairs
    ±ε, which removes that at small t (independent ones would shrink ½‖s‖² by 1/M there); at large t take M larger.
    Returns (N,) values.

    Args:
        time: t, a variance in the squared units of the data.
        num_samples: M, best an even number.
        stabiliser: w. Above zero it bounds the value from below, at −log(M/w)/t, which keeps the training of networks
            from running away, and shrinks the gradient at small t by M/(M + w); Schröder et al. use 1.

    Raises:
        ValueError: for a setting out of range.
    """

    time: float = None  # type: ignore[assignment]
    num_samples: int = 16
    stabiliser: float = 0.0

    def __post_init__(self) -> None:
        required(
            "KLContraction",
            "time",
            self.time,
            "the variance of its noise in squared units of the data: start from a tenth of theirs, e.g. "
            "KLContraction(time=0.1 * float(x.var()))",
        )
        positive("KLContraction", "time", self.time)
        set_counts(self, "num_samples")
        if not (math.isfinite(self.stabiliser) and self.stabiliser >= 0):
            raise ValueError(f"KLContraction needs a stabiliser of at least 0, got {self.stabiliser}.")

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_flat(energy, "KLContraction")
        x, m = energy.data, self.num_samples
        away_key, back_key = jax.random.split(rng_key)
        away = random.normal(away_key, x.shape, x.dtype)
        half = random.normal(back_key, (m - m // 2, *x.shape), x.dtype)
        back = jnp.concatenate([half, -half])[:m]
        f = energy.log_density(jnp.concatenate([x[None], x + jnp.sqrt(self.time) * (away + back)]))
        contrasts = f[1:] - f[0]
        if self.stabiliser:
            contrasts = jnp.concatenate([contrasts, jnp.full_like(f[:1], math.log(self.stabiliser))])
        return (jax.nn.logsumexp(contrasts, axis=0) - math.log(m)) / self.time

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What bounds the memory of an accelerator."""
        return rows_at_once(energy, self.num_samples + 1, None)

    def check(self, energy: Energy) -> None:
        """Warns if the data have a constant column, or one that follows from others: its noise is then the width."""
        warn_of_flat_data("KLContraction", energy, "its noise")
