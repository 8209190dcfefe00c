"""Linear diffusions by the scale and the noise of their marginals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import AnyArray
from numpyro_score.losses.base import positive

__all__ = ["EDM", "SDE", "VE", "VP", "LinearSDE", "SubVP", "Time", "drift_and_diffusion", "noise_at", "time_at"]

Time = Float[AnyArray, "..."]


@runtime_checkable
class SDE(Protocol):
    r"""A linear diffusion, by its marginals :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, z` with standard normal z.

    The stochastic differential equation is :math:`dx = f x\, dt + g\, dw` with

    .. math:: f = \frac{d \log \alpha}{dt}, \qquad g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2

    [Kingma et al. 2021]. In :math:`u = x / \alpha` and :math:`\rho = \sigma / \alpha` all of them are one and the same:
    u has the density :math:`q_\rho`, that of the data with noise of standard deviation ρ. This is what a model fitted
    by denoising at levels `sigma` = ρ knows, so that the diffusion is chosen after the fit.

    Both functions take times of any shape, from 0, where there is no noise or almost none, to `final_time`; ρ grows
    with t.
    """

    @property
    def final_time(self) -> float:
        """The time at which the noise is largest."""

    def alpha(self, t: Time) -> Time:
        """The scale of the data at time t."""

    def sigma(self, t: Time) -> Time:
        """The standard deviation of the noise at time t, in the units of the data."""


@dataclass(frozen=True)
class VE:
    """Variance exploding: α = 1, and σ grows geometrically from `smallest` to `largest` over t in [0, 1].

    [Song et al. 2021, eq. 30.]
    """

    smallest: float = 0.01
    largest: float = 50.0

    def __post_init__(self) -> None:
        _check_ends(type(self).__name__, self.smallest, self.largest)

    final_time = 1.0

    def alpha(self, t: Time) -> Time:
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        """The geometric mean smallest · (largest/smallest)ᵗ."""
        return self.smallest * (self.largest / self.smallest) ** jnp.asarray(t)


@dataclass(frozen=True)
class VP:
    """Variance preserving: dx = −½β x dt + √β dw over t in [0, 1], where β grows linearly between its two ends.

    Data of unit variance keep it: α² + σ² = 1 [Song et al. 2021, eq. 32, the limit of Ho et al. 2020].
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _check_ends(type(self).__name__, self.beta_min, self.beta_max, "beta_min", "beta_max")

    final_time = 1.0

    def _exponent(self, t: Time) -> Time:
        """∫₀ᵗ β."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * jnp.square(t)

    def alpha(self, t: Time) -> Time:
        """exp(−½∫₀ᵗβ)."""
        return jnp.exp(-0.5 * self._exponent(t))

    def sigma(self, t: Time) -> Time:
        """√(1 − α²)."""
        return jnp.sqrt(-jnp.expm1(-self._exponent(t)))


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance preserving: the drift of :class:`VP` with less noise, σ = 1 − α² [Song et al. 2021, eq. 34]."""

    def sigma(self, t: Time) -> Time:
        """1 − α²."""
        return -jnp.expm1(-self._exponent(t))


@dataclass(frozen=True)
class EDM:
    """α = 1 and σ = t, up to `largest` [Karras et al. 2022]."""

    largest: float = 80.0

    def __post_init__(self) -> None:
        positive(type(self).__name__, "largest", self.largest)

    @property
    def final_time(self) -> float:
        """The largest σ."""
        return self.largest

    def alpha(self, t: Time) -> Time:
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        """The time itself."""
        return jnp.asarray(t)


@dataclass(frozen=True)
class LinearSDE:
    """Any linear diffusion, by two functions of t that JAX can differentiate.

    Args:
        alpha: the scale of the data, positive.
        sigma: the standard deviation of the noise, in the units of the data; σ/α must grow with t.
        final_time: where the noise is largest.

    Raises:
        TypeError: for what is no function.
        ValueError: if σ/α does not grow, or α or σ/α is not finite and positive inside, or a function changes the shape
            of t.
    """

    alpha: Callable[[Time], Time]
    sigma: Callable[[Time], Time]
    final_time: float = 1.0

    def __post_init__(self) -> None:
        positive("LinearSDE", "final_time", self.final_time)
        t = jnp.linspace(0.0, self.final_time, 1001)[1:]
        for name in ("alpha", "sigma"):
            function = getattr(self, name)
            if not callable(function):
                raise TypeError(f"LinearSDE needs a function of t as {name}, got {function!r}: write lambda t: ...")
            if (shape := jnp.shape(function(t))) != t.shape:
                raise ValueError(
                    f"LinearSDE's {name} gave shape {shape} for times of shape {t.shape}: return one number for each, "
                    "e.g. jnp.ones_like(t)."
                )
        if not (scale := self.alpha(t)).min() > 0:  # NaN included
            where = float(t[jnp.argmin(scale)])
            raise ValueError(
                f"LinearSDE needs an alpha above zero, the scale of the data, and at t={where:.3g} it is "
                f"{float(scale.min()):.3g}: turn the signs of alpha and sigma, or end before it is zero."
            )
        rho = self.sigma(t) / scale
        wrong = ~(jnp.isfinite(rho) & (rho > 0) & jnp.r_[True, jnp.diff(rho) > 0])
        if wrong.any():
            raise ValueError(
                f"LinearSDE needs sigma/alpha that grows with t, but at t={float(t[jnp.argmax(wrong)]):.3g} it is "
                f"{float(rho[jnp.argmax(wrong)]):.3g}: write time from the data (0) to noise ({self.final_time:g})."
            )


def noise_at(sde: SDE, t: Time) -> Time:
    """ρ = σ/α at times t."""
    return sde.sigma(t) / sde.alpha(t)


def time_at(sde: SDE, rho: Float[AnyArray, "..."]) -> Time:
    """The times at which σ/α is ρ, by bisection to the last digit of each; beyond the ends, these.

    Of the bits of t, which as integers are in the order of the times: small times have as many digits as large ones.
    """
    rho = jnp.asarray(rho)
    whole = jnp.int32 if rho.dtype.itemsize == 4 else jnp.int64
    low, high = (jax.lax.bitcast_convert_type(jnp.full_like(rho, t), whole) for t in (0.0, sde.final_time))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        above = noise_at(sde, jax.lax.bitcast_convert_type(middle, rho.dtype)) > rho
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    low, high = jax.lax.fori_loop(0, 8 * rho.dtype.itemsize - 1, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, rho.dtype)


def drift_and_diffusion(sde: SDE, t: Time) -> tuple[Time, Time]:
    """The f and g² of dx = f x dt + g dw at times t, by the derivatives of the marginals."""
    t = jnp.asarray(t)
    alpha, d_alpha = jax.jvp(sde.alpha, (t,), (jnp.ones_like(t),))
    variance, d_variance = jax.jvp(lambda t: jnp.square(sde.sigma(t)), (t,), (jnp.ones_like(t),))
    f = d_alpha / alpha
    return f, d_variance - 2 * f * variance


def _check_ends(owner: str, low: float, high: float, low_name: str = "smallest", high_name: str = "largest") -> None:
    positive(owner, low_name, low)
    positive(owner, high_name, high)
    if not high > low:
        raise ValueError(f"{owner} needs {high_name} > {low_name}, got {high} and {low}.")
