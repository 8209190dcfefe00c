"""The law at the end of large noise."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy import AnyArray

__all__ = ["NoisyNormal", "end_law"]


class NoisyNormal(NamedTuple):
    """N(μ, Q diag(λ) Qᵀ) and the same with noise, of which it is the best description once the noise is large.

    With N(0, ρ²I) in its place, as is usual, log densities are off by 4e-3 nat and more at any tolerance; with this,
    by the third and higher cumulants of the data, which noise makes small by ρ⁻³.
    """

    mean: Float[Array, "d"]
    axes: Float[Array, "d d"]  # Q
    variances: Float[Array, "d"]  # λ, of the data

    def sample(self, rng_key: Array, n: int, rho: Any) -> Float[Array, "n d"]:
        """Draws u, (N, D), with noise of standard deviation ρ."""
        z = jax.random.normal(rng_key, (n, len(self.mean)), self.mean.dtype)
        return self.mean + self.turned(jnp.sqrt(self.variances + rho**2) * z)

    def log_prob(self, u: Float[AnyArray, "... d"], rho: Any) -> Float[Array, "..."]:
        """The log density with noise of standard deviation ρ: (..., D) to (...)."""
        spread = self.variances + rho**2
        away = _product(u - self.mean, self.axes)
        return -0.5 * jnp.sum(away**2 / spread + jnp.log(2 * jnp.pi * spread), axis=-1)

    def score(self, u: Float[AnyArray, "... d"], rho: Any) -> Float[Array, "... d"]:
        """The gradient of :meth:`log_prob`."""
        return -self.turned(_product(u - self.mean, self.axes) / (self.variances + rho**2))

    def turned(self, v: Float[AnyArray, "... d"]) -> Float[Array, "... d"]:
        """Vectors along the axes, as vectors of the data: Q v."""
        return _product(v, self.axes.T)


# Accelerators multiply matrices of floats to three digits by default.
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def end_law(x: Any, weights: Any, dtype: Any = jnp.float32) -> NoisyNormal:
    """The normal law with the mean and covariance of weighted rows x, (N, D); one row has no variance.

    In NumPy's precision for its arrays, in JAX's for others.
    """
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    mean = xp.average(x, axis=0, weights=weights)
    away = x - mean
    covariance = (away * weights[:, None]).T @ away / weights.sum()
    variances, axes = xp.linalg.eigh(covariance)
    return NoisyNormal(*(jnp.asarray(v, dtype) for v in (mean, axes, xp.maximum(variances, 0.0))))
