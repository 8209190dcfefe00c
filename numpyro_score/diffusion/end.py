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

_MOST_AXES = 1024  # of a covariance known in full: it has D² numbers and its axes take D³ operations
_PRINCIPAL = 64  # axes that are kept of a larger one
_ROWS_AT_ONCE = 4096


class NoisyNormal(NamedTuple):
    """N(μ, Q diag(λ) Qᵀ + v (I − QQᵀ)) and the same with noise, which describes the data once the noise is large.

    With N(0, ρ²I) in its place, as is usual, log densities are off by 4e-3 nat and more at any tolerance; with this,
    by the third and higher cumulants of the data, which noise makes small by ρ⁻³.
    """

    mean: Float[Array, "d"]
    axes: Float[Array, "d k"]  # Q: all D, or the K that carry most
    variances: Float[Array, "k"]  # λ, of the data along them
    rest: Float[Array, ""]  # v, along all others, where there are others

    @property
    def largest(self) -> Float[Array, ""]:
        """The variance along the axis of most."""
        return jnp.maximum(jnp.max(self.variances), self.rest)

    @property
    def per_coordinate(self) -> Float[Array, ""]:
        """The variance of a coordinate, in the mean."""
        return (jnp.sum(self.variances) + self._num_others * self.rest) / len(self.mean)

    def times(self, factor: Any) -> NoisyNormal:
        """The law of the data times a number."""
        return NoisyNormal(factor * self.mean, self.axes, factor**2 * self.variances, factor**2 * self.rest)

    def sample(self, rng_key: Array, n: int, rho: Any) -> Float[Array, "n d"]:
        """Draws u, (N, D), with noise of standard deviation ρ."""
        return self.from_code(jax.random.normal(rng_key, (n, len(self.mean)), self.mean.dtype), rho)

    def from_code(self, z: Float[AnyArray, "n d"], rho: Any) -> Float[Array, "n d"]:
        """Points from independent standard normal numbers, those along the axes if all are known."""
        root = jnp.sqrt(self.spread(rho))
        return self.mean + (self.scaled(root, z) if self._num_others else _product(root * z, self.axes.T))

    def code(self, u: Float[AnyArray, "n d"], rho: Any) -> Float[Array, "n d"]:
        """The other way."""
        root, away = jnp.sqrt(self.spread(rho)), u - self.mean
        return self.scaled(1 / root, away) if self._num_others else _product(away, self.axes) / root

    def log_prob(self, u: Float[AnyArray, "... d"], rho: Any) -> Float[Array, "..."]:
        """The log density with noise of standard deviation ρ: (..., D) to (...)."""
        spread, counts = self.spread(rho), self.counts
        return -0.5 * jnp.sum(self.squares(u) / spread + counts * jnp.log(2 * jnp.pi * spread), axis=-1)

    def score(self, u: Float[AnyArray, "... d"], rho: Any) -> Float[Array, "... d"]:
        """The gradient of :meth:`log_prob`."""
        return -self.scaled(1 / self.spread(rho), u - self.mean)

    @property
    def counts(self) -> np.ndarray:
        """How many directions have each variance of :meth:`spread`."""
        return np.append(np.ones(len(self.variances)), [self._num_others] if self._num_others else [])

    def spread(self, rho: Any) -> Float[Array, "m"]:
        """The variances with noise: λ + ρ², and then v + ρ² if there are other directions."""
        known = self.variances if not self._num_others else jnp.append(self.variances, self.rest)
        return known + jnp.asarray(rho) ** 2

    def squares(self, u: Float[AnyArray, "... d"]) -> Float[Array, "... m"]:
        """The squared distances from the mean along each axis, and then in all others together."""
        away = u - self.mean
        along = _product(away, self.axes) ** 2
        if not self._num_others:
            return along
        others = (away - _product(_product(away, self.axes), self.axes.T)) ** 2
        return jnp.concatenate([along, jnp.sum(others, axis=-1, keepdims=True)], axis=-1)

    def scaled(self, factors: Float[AnyArray, "m"], v: Float[AnyArray, "... d"]) -> Float[Array, "... d"]:
        """Vectors whose parts along each axis, and then in all others, are multiplied."""
        along = _product(v, self.axes)
        if not self._num_others:
            return _product(factors * along, self.axes.T)
        return factors[-1] * v + _product((factors[:-1] - factors[-1]) * along, self.axes.T)

    @property
    def _num_others(self) -> int:
        return len(self.mean) - len(self.variances)


# Accelerators multiply matrices of floats to three digits by default.
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def end_law(x: Any, weights: Any, dtype: Any = jnp.float32) -> NoisyNormal:
    """The normal law with the mean and covariance of weighted rows x, (N, D); one row has no variance.

    Of more than 1,024 coordinates it has the 64 axes of most variance, and one variance for all others: axes from at
    most 1,024 rows spread over the data, variances from as many others, lest they be those that the axes were sought
    for. NumPy's arrays are summed in double precision, JAX's in their own.
    """
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    n, dim = x.shape
    size = _ROWS_AT_ONCE if xp is np else max(n, 1)
    blocks = [slice(i, i + size) for i in range(0, n, size)]

    def rows(of: slice) -> Any:
        return x[of].astype(np.float64) if xp is np else x[of]

    weights = weights.astype(np.float64) if xp is np else weights
    mean = sum(weights[b] @ rows(b) for b in blocks) / weights.sum()

    def spread_of(of: slice, mean: Any) -> Any:
        """Roots, whose products in pairs sum to the covariance of these rows about a mean."""
        share = weights[of] / weights[of].sum()
        return (rows(of) - mean) * xp.sqrt(share)[:, None]

    if dim <= _MOST_AXES:
        parts = [(weights[b].sum() / weights.sum(), spread_of(b, mean)) for b in blocks]
        variances, axes = xp.linalg.eigh(sum(share * (root.T @ root) for share, root in parts))
        rest = xp.zeros(())
    else:
        step = 2 * max(1, n // (2 * _MOST_AXES))
        halves = [slice(first, step * _MOST_AXES, step) for first in ((0, step // 2) if n > 3 else (0, 0))]
        # Each about its own mean: about that of all, the two halves are as far apart along one axis as their noise is
        # long, which where rows are fewer than coordinates is many times any standard deviation.
        sought, held_out = (spread_of(h, weights[h] @ rows(h) / weights[h].sum()) for h in halves)
        axes = xp.linalg.eigh(sought @ sought.T)[1][:, -_PRINCIPAL:]
        axes = xp.linalg.qr(sought.T @ axes)[0]
        share = weights[halves[1]] / weights[halves[1]].sum()
        unbiased = 1 / xp.maximum(1 - xp.sum(share**2), 1e-3)  # of the mean that was taken from these rows
        variances = unbiased * xp.sum((held_out @ axes) ** 2, axis=0)
        rest = (unbiased * xp.sum(held_out**2) - variances.sum()) / (dim - axes.shape[1])
    variances, rest = (xp.maximum(v, 0.0) for v in (variances, rest))
    return NoisyNormal(*(jnp.asarray(v, dtype) for v in (mean, axes, variances, rest)))
