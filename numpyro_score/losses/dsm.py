"""Denoising score matching."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy

__all__ = ["DSM"]


@dataclass(frozen=True)
class DSM:
    """Denoising score matching at one noise level [Vincent 2011].

    With x̃ = x + σε and ε ~ N(0, I) each row's value is

    - plain: ½‖s(x̃) + ε/σ‖² − D/(2σ²);
    - with control variate (default): ½‖s(x̃)‖² + ε·(s(x̃) − s(x))/σ [Wang et al. 2020; Song & Kingma 2021], the same
      mean; as σ → 0 the variance of its gradient stays bounded, where the plain form's grows as σ⁻² (and that of the
      value as σ⁻⁴). It costs a second score.

    Both are unbiased for the Hyvärinen objective of the noisy data p_σ = p * N(0, σ²I), not of the data: the fit
    describes p_σ. Noise is drawn afresh for every row and every call. Returns (N,) values.

    Args:
        sigma: σ, in the units of the data.
        control_variate: which of the two forms.

    Raises:
        ValueError: if sigma is not a positive number.
    """

    sigma: float
    control_variate: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"DSM needs a positive sigma, in the units of the data, got {self.sigma}.")

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        x = energy.data
        noise = jax.random.normal(rng_key, x.shape, x.dtype)
        score = energy.score(x + self.sigma * noise)
        if not self.control_variate:
            residual = score + noise / self.sigma
            return 0.5 * jnp.sum(residual**2, axis=-1) - energy.dim / (2 * self.sigma**2)
        # Written so that the large terms, which cancel, never arise.
        drift = (score - energy.score(x)) / self.sigma
        return jnp.sum(0.5 * score**2 + noise * drift, axis=-1)
