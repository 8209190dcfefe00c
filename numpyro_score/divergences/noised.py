"""Laws along noise: their densities after a scaling and Gaussian noise, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.energy import Energy, base_constraint, base_law
from numpyro_score.losses.terms import require_flat
from numpyro_score.normaliser.source import Source, density_of
from numpyro_score.operators import full_precision

__all__ = ["Law", "NoisedLaw", "noised_pair"]

Law: TypeAlias = Source | dist.Distribution | Array | np.ndarray


class NormalMixture(NamedTuple):
    """The mixture Σ_k w_k N(μ_k, Q diag(λ) Qᵀ). With λ = 0 it is weighted points, which have a density under noise."""

    log_weights: Float[Array, "k"]
    means: Float[Array, "k d"]
    axes: Float[Array, "a d d"]  # the orthogonal Q of each component, or one (A = 1) for all
    variances: Float[Array, "v d"]  # the λ of each component, or one (V = 1) for all

    @full_precision
    def log_density(
        self, x: Float[Array, "d"], scale: Float[Array, ""], variance: Float[Array, ""]
    ) -> Float[Array, ""]:
        """The log density of scale·X + √variance·Z at x, with X of this law and Z standard normal."""
        away = x @ self.axes - scale * (self.means[:, None] @ self.axes)[:, 0]
        spread = scale**2 * self.variances + variance
        terms = away**2 / spread + jnp.log(2 * jnp.pi * spread)
        return jax.nn.logsumexp(self.log_weights - 0.5 * jnp.sum(terms, axis=-1))

    @partial(jax.jit, static_argnames="n")
    def sample(self, rng_key: Array, n: int) -> Float[Array, "n d"]:
        """Draws of X."""
        choice_key, normal_key = jax.random.split(rng_key)
        k = jax.random.choice(choice_key, len(self.means), (n,), p=jnp.exp(self.log_weights))
        z = jax.random.normal(normal_key, (n, self.means.shape[1]), self.means.dtype)
        axes, variances = (v[k] if len(v) > 1 else v for v in (self.axes, self.variances))
        return self.means[k] + ((jnp.sqrt(variances) * z)[:, None] @ jnp.swapaxes(axes, 1, 2))[:, 0]


class NoisedLaw(NamedTuple):
    """A law as a mixture, and from which noise on that is what it is."""

    mixture: NormalMixture
    resolved: float  # the least variance of noise that hides the grid, or 0 where there is no grid
    discrete: bool  # whether the law is the rows of an array, without a density of its own

    @property
    def dim(self) -> int:
        """D."""
        return self.mixture.means.shape[1]


def noised_pair(p: Law, q: Law, rng_key: Array) -> tuple[NoisedLaw, NoisedLaw]:
    """Both laws along noise.

    Normal laws and their mixtures stay what they are, and rows of data are points of equal weight. Other laws on the
    line and the plane become points on a grid that covers and resolves both, weighted by their density: with noise
    as wide as the spacing the sum over these is the convolution, up to 1e-7 [Trefethen & Weideman 2014].

    Raises:
        ValueError, TypeError, NotImplementedError: if a law is none of these, or no grid resolves it.
    """
    keys = jax.random.split(rng_key)
    found = [_closed_form(law) or _Density.of(law, key) for law, key in zip((p, q), keys, strict=True)]
    dims = [law.dim for law in found]
    if dims[0] != dims[1]:
        raise ValueError(f"p has {dims[0]} dimensions and q has {dims[1]}: give laws of the same rows.")
    if any(isinstance(law, _Density) for law in found):
        known = [
            law if isinstance(law, _Density) else _Density.of_mixture(law, key)
            for law, key in zip(found, keys, strict=True)
        ]
        points, log_masses, spacing = _grid(known)
        found = [
            NoisedLaw(_points(points, mass), spacing**2, False) if isinstance(law, _Density) else law
            for law, mass in zip(found, log_masses, strict=True)
        ]
    one, other = found
    assert isinstance(one, NoisedLaw) and isinstance(other, NoisedLaw)
    return one, other


# -- closed forms -------------------------------------------------------------------------------------------------


def _points(x: np.ndarray, log_mass: np.ndarray) -> NormalMixture:
    dtype, d = jnp.result_type(float), x.shape[1]
    return NormalMixture(
        jnp.asarray(log_mass, dtype), jnp.asarray(x, dtype), jnp.eye(d, dtype=dtype)[None], jnp.zeros((1, d), dtype)
    )


def _closed_form(law: Law) -> NoisedLaw | None:
    if isinstance(law, Source):
        return None
    if isinstance(law, dist.Distribution):
        if law.batch_shape or len(law.event_shape) > 1:
            raise ValueError(
                f"{type(law).__name__} has batch shape {law.batch_shape} and event shape {law.event_shape}: give the "
                "law of one row, with event shape () or (D,), e.g. by to_event(1)."
            )
        mixture = _normal_mixture(law)
        return None if mixture is None else NoisedLaw(mixture, 0.0, False)
    x = np.asarray(law)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size or x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise ValueError(
            f"A law is an Energy, a fit, a NumPyro distribution or finite rows (N, D) or (N,), got "
            f"{type(law).__name__} of shape {x.shape} and type {x.dtype}."
        )
    return NoisedLaw(_points(x, np.full(len(x), -np.log(len(x)))), 0.0, True)


def _normal_mixture(law: dist.Distribution) -> NormalMixture | None:
    """The law as a mixture of normal laws, if it is one."""
    if isinstance(law, dist.MixtureSameFamily):
        parts = _normal_parts(law.component_distribution, len(law.event_shape))
        weights = np.asarray(law.mixing_distribution.probs, np.float64)
        weights = weights / weights.sum()  # which single precision rounds
    else:
        parts = _normal_parts(law, len(law.event_shape))
        weights = np.ones(1)
    if parts is None:
        return None
    dtype = jnp.result_type(float)
    with np.errstate(divide="ignore"):  # a component of weight 0
        return NormalMixture(*(jnp.asarray(v, dtype) for v in (np.log(weights), *parts)))


def _normal_parts(law: dist.Distribution, event_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Means (K, D), axes (K or 1, D, D) and variances (K, D) of K normal laws; None of others."""
    base = base_law(law)
    if not isinstance(base, dist.Normal | dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return None
    mean = np.asarray(law.mean, np.float64)
    d = mean.shape[-1] if event_dim else 1
    if isinstance(base, dist.Normal):
        variance = np.asarray(law.variance, np.float64)
        return mean.reshape(-1, d), np.eye(d)[None], variance.reshape(-1, d)
    variance, axes = np.linalg.eigh(np.asarray(base.covariance_matrix, np.float64))
    variance = np.broadcast_to(variance, mean.shape).reshape(-1, d)
    return mean.reshape(-1, d), np.broadcast_to(axes, (*mean.shape, d)).reshape(-1, d, d), variance


# -- grids --------------------------------------------------------------------------------------------------------

_MAX_NODES = 2**15
_BATCH = 2**12  # points of one compiled call
_STRIDE = 6  # how much coarser a grid must resolve the laws, too


class _Density(NamedTuple):
    log_density: Callable[[np.ndarray], np.ndarray] | None  # (n, D) to (n,), up to a constant
    rows: np.ndarray  # (N, D): where the mass is
    closed: bool  # whether the law is known without a grid, so that this need not resolve it

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @classmethod
    def of(cls, law: Source | dist.Distribution, rng_key: Array) -> _Density:
        if isinstance(law, dist.Distribution):
            return cls._of_distribution(law, rng_key)
        energy = density_of(law)
        require_flat(energy, "Noise", "take laws on R^D, e.g. of the logarithm")
        _refuse_many_dimensions(energy.dim)
        return cls(lambda x: _evaluate(energy, x), np.asarray(energy.data, np.float64), False)

    @classmethod
    def _of_distribution(cls, law: dist.Distribution, rng_key: Array) -> _Density:
        _refuse_many_dimensions(int(np.prod(law.event_shape)))
        if not isinstance(base_constraint(law.support), type(constraints.real)):
            raise NotImplementedError(
                f"Noise would move {type(law).__name__} off its support: take laws on R^D, e.g. of the logarithm."
            )
        rows = np.asarray(law.sample(rng_key, (1000,)), np.float64).reshape(1000, -1)
        return cls(lambda x: _evaluate(law, x), rows, False)

    @classmethod
    def of_mixture(cls, law: NoisedLaw, rng_key: Array) -> _Density:
        if law.discrete:
            return cls(None, np.asarray(law.mixture.means, np.float64), True)
        rows = np.asarray(law.mixture.sample(rng_key, 1000), np.float64)
        return cls(lambda x: _evaluate(law.mixture, x), rows, True)


def _refuse_many_dimensions(d: int) -> None:
    if d > 2:
        raise NotImplementedError(
            f"A law of {d} dimensions along noise is known for normal laws, their mixtures and data; others take up to "
            "2. Fit a model of the noise level and use entropy_from_scores."
        )


@jax.jit
@full_precision
def _log_density(law: Energy | dist.Distribution | NormalMixture, x: Array) -> Array:
    if isinstance(law, NormalMixture):
        return jax.vmap(lambda row: law.log_density(row, jnp.ones((), x.dtype), jnp.zeros((), x.dtype)))(x)
    return law.log_density(x) if isinstance(law, Energy) else law.log_prob(x.reshape(-1, *law.event_shape))


def _evaluate(law: Energy | dist.Distribution | NormalMixture, x: np.ndarray) -> np.ndarray:
    padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % _BATCH, axis=0)]).astype(jnp.result_type(float))
    batches = padded.reshape(-1, _BATCH, x.shape[1])
    return np.concatenate([np.asarray(_log_density(law, b), np.float64) for b in batches])[: len(x)]


def _grid(laws: list[_Density]) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Nodes (K, D) that cover both laws, the log mass of each law at each, and the spacing of the nodes.

    Only the laws that are not closed need be resolved.
    """
    rows = np.concatenate([law.rows for law in laws])
    d = rows.shape[1]
    low, high = rows.min(0), rows.max(0)
    margin = np.maximum(0.25 * (high - low), 1e-6 * np.abs(high))
    low, high = low - margin, high + margin
    spacing = float((high - low).max()) / 60
    while True:
        counts = np.ceil((high - low) / spacing).astype(int) + 1
        if counts.astype(float).prod() > _MAX_NODES:
            raise ValueError(
                f"No grid of {_MAX_NODES} points covers and resolves both laws: they have narrow parts and heavy "
                "tails or far modes. Take mixtures of normal laws, or data."
            )
        sides = [lo + spacing * np.arange(n) for lo, n in zip(low, counts, strict=True)]
        points = np.stack([m.reshape(-1) for m in np.meshgrid(*sides, indexing="ij")], axis=-1)
        log_masses = [_log_masses(law, points) for law in laws]
        masses = [np.exp(m).reshape(counts) for m in log_masses]
        faces = [np.moveaxis(m, j, 0)[i].sum() * counts[j] for m in masses for j in range(d) for i in (0, -1)]
        coarse = [
            m[tuple(slice(s, None, _STRIDE) for s in shift)].sum() * _STRIDE**d
            for m, law in zip(masses, laws, strict=True)
            if not law.closed
            for shift in product(range(_STRIDE), repeat=d)
        ]
        if max(faces) > 1e-5:  # about the mass beyond, if it falls like a power
            low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
        elif np.abs(np.array(coarse) - 1).max() > 1e-3:
            spacing /= 1.5
        else:
            return points, log_masses, spacing


def _log_masses(law: _Density, points: np.ndarray) -> np.ndarray:
    """The log of each point's share (K,) of the mass; of points without a density, nothing anywhere."""
    if law.log_density is None:
        return np.full(len(points), -np.inf)
    values = law.log_density(points)
    if np.isnan(values).any() or (values == np.inf).any():
        raise ValueError(
            "A log density is NaN or +∞ near its data: write it so that it is a number, or −∞, everywhere."
        )
    top = values.max()
    if top == -np.inf:
        raise ValueError("A density is zero wherever the rows are: give the energy data from where its mass is.")
    return values - top - np.log(np.exp(values - top).sum())
