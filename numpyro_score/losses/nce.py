"""Noise-contrastive estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float

from numpyro_score.energy import Energy, distances, innermost
from numpyro_score.losses.base import require_equal_rows, required, set_counts
from numpyro_score.placement import fetch

__all__ = ["LOG_PARTITION_SITE", "NCE"]

LOG_PARTITION_SITE = "nce_log_partition"
"""The param site that holds the log normaliser that :class:`~numpyro_score.NCE` estimates."""

_START_DRAWS = 1000  # of the noise, for the starting value of the log normaliser


@dataclass(frozen=True, repr=False)
class NCE:
    r"""Noise-contrastive estimation [Gutmann & Hyvärinen 2012]: logistic regression of data against noise.

    With ν points y_m of a noise q for each row and G(u) = f(u) − c − log q(u) − log ν its value is

        −log σ(G(x)) − Σ_m log σ(−G(y_m)).

    It is least, on average, where exp(f − c) is the law of the data. So it fits the log normaliser c = log Z along
    with the model's own parameters: `generalized_bayes` and `ScoreMatching` declare it as the param site
    `numpyro_score.losses.LOG_PARTITION_SITE`, and it has a standard error. The value is a classification loss and not
    on the Hyvärinen scale.

    As ν → ∞ it becomes −f(x) + c + Z exp(−c) plus terms without parameters, whose minimiser is the maximum likelihood
    estimate. At finite ν estimates have more spread, and much more if the noise is far from the data: fit it to them,
    e.g. a normal distribution with their mean and covariance.

    Noise is drawn afresh in every call. Standard errors are those of one draw that is held fixed; a fit that draws
    anew in every step averages over the noise, so that they are somewhat too large for it. `generalized_bayes(...,
    rng_key=key)` holds one draw.

    Costs 1 + ν densities and their gradient in the parameters. Returns (N,) values.

    Args:
        noise: q, a NumPyro distribution of one row: without batch shape, its event has the shape of a row's data, or
            is a vector of the row's D numbers. It has to cover the data. Where the data are bounded it should respect
            the bounds, as points outside teach nothing.
        num_noise: ν.

    Raises:
        ValueError: for num_noise below 1, or noise of discrete numbers or with a batch shape; when called, for noise
            of another dimension, or that does not cover the data.
        TypeError: for noise that is no proper distribution.
        NotImplementedError: when called, for data on a sphere or a simplex, or another support with a change of
            coordinates.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import NCE, ScoreMatching
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> x = 2.0 * jax.random.normal(jax.random.key(0), (1000,))
        >>> sm = ScoreMatching(model, loss=NCE(dist.Normal(0.0, 3.0), num_noise=5))
        >>> fit = sm.run(jax.random.key(1), x, progress_bar=False)
        >>> log_z = 0.5 * jnp.log(2 * jnp.pi / fit.estimates["tau"])  # of a normal density
        >>> bool(jnp.abs(fit.estimates["nce_log_partition"] - log_z) < 0.1)
        True
    """

    noise: dist.Distribution = None
    num_noise: int = 1

    no_posterior: ClassVar[str] = "it estimates the log normaliser as a param, which would be frozen"
    not_finite: ClassVar[str] = "the noise does not cover the data, or the density is not finite at the noise's points"

    def __repr__(self) -> str:
        law = type(innermost(self.noise)).__name__
        return f"NCE(noise={law} of shape {self.noise.event_shape}, num_noise={self.num_noise})"

    def __post_init__(self) -> None:
        required(
            "NCE",
            "noise",
            self.noise,
            "a normalised law of one row that covers the data: start from a normal of their mean and twice their "
            "standard deviation, e.g. NCE(dist.Normal(x.mean(0), 2 * x.std(0)).to_event(1))",
        )
        set_counts(self, "num_noise")
        if not isinstance(self.noise, dist.Distribution) or isinstance(self.noise, dist.ImproperUniform):
            raise TypeError(
                f"NCE needs a noise to draw from, got {self.noise!r}: write e.g. noise=dist.Normal(0.0, 1.0)."
            )
        if self.noise.support is None or self.noise.support.is_discrete:
            raise ValueError(
                f"NCE needs a continuous noise, got {type(self.noise).__name__}: write e.g. dist.Normal(0.0, 1.0)."
            )
        if self.noise.batch_shape:
            raise ValueError(
                f"NCE needs the noise of one row, got one with the batch shape {self.noise.batch_shape}: if that is "
                f"the shape of a row, write noise.to_event({len(self.noise.batch_shape)})."
            )

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        if LOG_PARTITION_SITE not in energy.params:
            raise ValueError(
                f"NCE needs the log normaliser in the energy's params: add '{LOG_PARTITION_SITE}': 0.0 to them, or use "
                "ScoreMatching, which fits it."
            )
        self._require_suitable(energy)
        x, offset = energy.data, energy.params[LOG_PARTITION_SITE] + math.log(self.num_noise)
        log_q = self._log_noise(x)
        # Data without noise would have no loss at all.
        at_data = jnp.where(jnp.isfinite(log_q), energy.log_density(x) - offset - log_q, jnp.nan)
        at_noise = self._contrast(energy, self._draw(rng_key, (self.num_noise, len(x)), x.dtype)) - offset
        return jax.nn.softplus(-at_data) + jnp.sum(jax.nn.softplus(at_noise), axis=0)

    def declare(self, energy: Energy) -> dict[str, Any]:
        """Declares the log normaliser, which starts at its estimate by importance sampling from the noise."""

        def start(rng_key: Array | None) -> Array:
            self._require_suitable(energy)
            rng_key = jax.random.key(0) if rng_key is None else rng_key
            rounds = -(-_START_DRAWS // energy.num_rows)
            draws = self._draw(rng_key, (rounds, energy.num_rows), energy.data.dtype)
            contrast = self._contrast(energy, draws)
            value = jax.nn.logsumexp(contrast) - jnp.log(contrast.size)
            return jnp.where(jnp.isfinite(value), value, 0.0)  # else the loss itself fails, and says why

        return {LOG_PARTITION_SITE: numpyro.param(LOG_PARTITION_SITE, start)}

    def check(self, energy: Energy) -> None:
        """Raises ValueError if the noise does not cover the data."""
        self._require_suitable(energy)
        x = energy.usable()[0].data.reshape(-1, *self.noise.event_shape)
        if (angles := energy.angle_columns) and (
            np.abs(fetch(self._draw(jax.random.key(0), (_START_DRAWS,), x.dtype))[:, angles]) > np.pi + 1e-5
        ).any():
            raise ValueError(
                f"NCE's noise {type(self.noise).__name__} leaves [-π, π), where angles are, so that its density on the "
                "circle is another: write e.g. dist.VonMises(0.0, 1.0) or dist.Uniform(-np.pi, np.pi)."
            )
        bare = ~fetch(self.noise.support(x))
        if not bare.any():  # NumPyro warns outside of the support
            bare = ~np.isfinite(fetch(self.noise.log_prob(x)))
        if bare.any():
            shown = ", ".join(map(str, np.flatnonzero(bare)[:8]))
            raise ValueError(
                f"NCE's noise {type(self.noise).__name__} does not cover {bare.sum()} of {len(bare)} rows (rows "
                f"{shown}{', ...' if bare.sum() > 8 else ''}): take one whose support holds all data."
            )

    def _contrast(self, energy: Energy, y: Float[Array, "m n d"]) -> Float[Array, "m n"]:
        """The log density less log q at draws of the noise; −∞ outside of the data's bounds or domain."""
        if energy.flat:
            return energy.log_density(y) - self._log_noise(y)
        lower, upper = energy.bounds(energy.num_rows)
        inside = jnp.all((y > lower) & (y < upper), axis=-1)
        for distance in distances(energy.supports.values(), energy.blocks, y.reshape(-1, energy.dim)):
            inside &= jnp.all(distance > 0, axis=(1, 2)).reshape(inside.shape)
        # The model has no mass outside. Its density is not defined there: even an unused NaN would spoil the gradient.
        y = jnp.where(inside[..., None], y, energy.data)
        return jnp.where(inside, energy.log_density(y) - self._log_noise(y), -jnp.inf)

    def _draw(self, rng_key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, "*n d"]:
        return self.noise.sample(rng_key, shape).reshape(*shape, -1).astype(dtype)

    def _log_noise(self, x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        x = x.reshape(*x.shape[:-1], *self.noise.event_shape)
        # Outside of its support a distribution may return anything.
        inside: Bool[Array, "*n"] = self.noise.support(x)
        return jnp.where(inside, self.noise.log_prob(x), -jnp.inf)

    def _require_suitable(self, energy: Energy) -> None:
        energy.require_continuous("NCE")
        require_equal_rows(energy, "NCE")
        for a in energy.arrays:
            if a.support.kind not in ("real", "circle", "box", "domain"):
                raise NotImplementedError(
                    f"NCE needs data in their own coordinates, and those of site '{a.name}' are changed "
                    f"({a.support.kind}): transform the data to the real line in the model, with the Jacobian as a "
                    "factor."
                )
        arrays = energy.arrays
        shapes: list[tuple[int, ...]] = [(energy.dim,)]  # of a row
        if len(arrays) == 1:
            shapes.append(tuple(s for i, s in enumerate(arrays[0].shape) if i not in arrays[0].row_axes))
        if self.noise.event_shape not in shapes:
            raise ValueError(
                f"NCE's noise is of shape {self.noise.event_shape}, but a row has the shape {shapes[-1]}: write e.g. "
                f"dist.Normal(0.0, 1.0).expand({list(shapes[-1])}).to_event({len(shapes[-1])})."
            )
