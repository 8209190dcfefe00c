"""Denoising score matching over a range of noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.losses.base import positive, required, true_or_false
from numpyro_score.losses.chunks import rows_at_once, rows_in_cache
from numpyro_score.losses.dsm import DSM, at_levels, check_weighting, denoising_values
from numpyro_score.losses.terms import require_flat

__all__ = ["ContinuousDSM"]

# ln σ of Karras et al. [2022, table 1] is N(-1.2, 1.2²) for data of standard deviation 0.5; here of σ/σ_d.
_EDM_MEAN, _EDM_SCALE = -1.2 - math.log(0.5), 1.2


@dataclass(frozen=True)
class ContinuousDSM:
    r"""Denoising score matching over all noise levels of a range [Song et al. 2021, "Score-based generative modeling"].

    The model takes the level of each row as the keyword `sigma`, (N,): `def model(x, sigma=1.0)`. Its score at x and σ
    is fitted to that of p_σ, the density of the data with noise of standard deviation σ. With J(σ) the Hyvärinen
    objective of p_σ, which :class:`~numpyro_score.DSM` estimates at one level, the objective is

    - "likelihood": ∫ 2σ J(σ) dσ = ∫ 2σ² J(σ) d ln σ, in nats. By de Bruijn's identity, d KL(p_σ‖q_σ)/d(σ²) is minus the
      Fisher divergence, so that for a model q whose levels belong together this is the mean negative log density of
      the data at the smallest level less that at the largest. For others it bounds, up to what the largest level
      leaves, that of the law which the reverse diffusion draws from [Song, Durkan, Murray & Ermon 2021, "Maximum
      likelihood training of score-based diffusion models", theorem 1].
    - "uniform": the mean of σ² J(σ) over ln σ. That is the error of the noise ε in its own unit, ½‖σs + ε‖² − D/2, with
      the same weight for every level, as :class:`~numpyro_score.DSM` over several levels has it; it does not grow with
      the range. In these coordinates it is the one above, divided by 2 ln(largest/smallest): the two differ in their
      unit, and so under a prior.
    - "edm": E[(σ² + σ_d²)/(σσ_d)² ‖D(x̃) − x‖²] with the denoiser D(x̃) = x̃ + σ²s and the data's standard deviation
      σ_d, up to a constant, which is the mean of 2σ²(1 + σ²/σ_d²) J(σ). Levels are log-normal, ln(σ/(2σ_d)) ~ N(−1.2,
      1.2²), cut to the range [Karras et al. 2022, section 5 and table 1, where σ_d = ½]. It favours the levels
      from which there is most to learn, and with :func:`~numpyro_score.preconditioned_score` all weigh the same.
    - a function λ: ∫ λ(σ) J(σ) d ln σ.

    Each row has one level and one draw of noise, and its value is the integrand there over the density of the level:
    unbiased, whatever that density. It is log-uniform but for "edm". Stratified, the levels of row n are at the
    quantile u + n(√5 − 1)/2 modulo 1, with one u for all: each is distributed as it should be, and those of any
    stretch of rows are spread evenly.

    Noise enters as in DSM's plain form, which takes one score. Antithetic noise takes two, and removes what grows as
    σ → 0. For normal data of variance τ the variance of a gradient at the level σ is then 4τσ²/(τ + σ²)² of that of the
    plain form, where a control variate leaves 4σ²/(τ + σ²), which is above 1 for large σ. Over all levels with weight
    σ² that is 0.6 of the variance, for twice the scores; for a network on eight-dimensional data near a plane it was
    0.29 under "likelihood" and 0.47 under "edm", and with a control variate 1.1 and 5.7. So that form is not offered.
    Take antithetic noise where noise is held fixed, as under NUTS, where steps are few, or where a λ of your own weighs
    small levels more.

    Args:
        smallest: the smallest level, in the units of the data: as small as the finest detail that matters.
        largest: the largest: for a sampler, several times the largest distance between two rows.
        weighting: which objective.
        stratified: spread the levels of a batch evenly, instead of drawing each by itself.
        sigma_data: σ_d of "edm", the standard deviation of a number of the data.
        antithetic: the mean over ε and −ε.
        allow_kinks: as in :class:`~numpyro_score.DSM`.

    Raises:
        ValueError, TypeError: if the levels are not positive and in order; if the weighting is not known, or a function
            that does not give numbers of at least 0, or "edm" lacks `sigma_data` or gives the range no weight; if the
            model takes no `sigma` or its arguments give one already.
    """

    smallest: float = None  # type: ignore[assignment]
    largest: float = None  # type: ignore[assignment]
    weighting: Literal["likelihood", "uniform", "edm"] | Callable[[Array], Array] = "likelihood"
    stratified: bool = True
    sigma_data: float | None = None
    antithetic: bool = False
    allow_kinks: bool = False

    no_moving_kinks: ClassVar[str] = DSM.no_moving_kinks

    def __post_init__(self) -> None:
        flags = ("stratified", "antithetic", "allow_kinks")
        true_or_false("ContinuousDSM", **{name: getattr(self, name) for name in flags})
        for name in ("smallest", "largest"):
            value, what = getattr(self, name), "a noise level in the units of the data"
            required("ContinuousDSM", name, value, f"{what}, e.g. ContinuousDSM(0.01, 50.0)")
            positive("ContinuousDSM", f"{name}, {what}", value)
            object.__setattr__(self, name, float(value))
        if not self.largest > self.smallest:
            raise ValueError(f"ContinuousDSM needs largest > smallest, got {self.largest:g} and {self.smallest:g}.")
        if self.weighting == "edm":
            required(
                "ContinuousDSM",
                "sigma_data",
                self.sigma_data,
                'the standard deviation of the data, by which "edm" places its levels: write sigma_data=float(x.std())',
            )
            positive("ContinuousDSM", "sigma_data", self.sigma_data)
            object.__setattr__(self, "sigma_data", float(self.sigma_data))  # type: ignore[arg-type]
            if self._edm_range[1] < 1e-6:
                raise ValueError(
                    f'ContinuousDSM\'s "edm" has its levels around 0.6 sigma_data = {0.6 * self.sigma_data:.3g}, and '  # type: ignore[operator]
                    f"next to none from {self.smallest:g} to {self.largest:g}: give sigma_data in the units of the "
                    "data, or another weighting."
                )
        elif self.sigma_data is not None:
            raise ValueError('ContinuousDSM takes sigma_data with weighting="edm" only: leave it out.')
        elif callable(self.weighting):
            check_weighting("ContinuousDSM", self.weighting, np.geomspace(self.smallest, self.largest, 65))
        elif self.weighting not in ("likelihood", "uniform"):
            raise ValueError(
                f"ContinuousDSM has no weighting {self.weighting!r}: use 'likelihood', 'uniform', 'edm' or a function "
                "of the level."
            )

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_flat(energy, "ContinuousDSM")
        level_key, noise_key = jax.random.split(rng_key)
        sigma = self.levels(level_key, energy.num_rows, energy.data.dtype)
        bound = at_levels("ContinuousDSM", energy, sigma)
        values = denoising_values(bound, noise_key, sigma, control_variate=False, antithetic=self.antithetic)
        log_range = math.log(self.largest / self.smallest)
        if self.weighting == "likelihood":
            return 2 * log_range * sigma**2 * values
        if self.weighting == "uniform":
            return sigma**2 * values
        if callable(self.weighting):
            weight = self.weighting(sigma)
            if jnp.shape(weight) not in ((), sigma.shape):
                raise ValueError(
                    f"ContinuousDSM's weighting gave shape {jnp.shape(weight)} for levels of shape {sigma.shape}: "
                    "return one number for each."
                )
            return log_range * weight * values
        # The weight times J has the part -D (1 + σ²/σ_d²), which is much noise from few large levels. It does not
        # depend on the model, so that its mean serves as well.
        ratio = (sigma / self.sigma_data) ** 2  # type: ignore[operator]
        return 2 * sigma**2 * (1 + ratio) * values + energy.dim * (ratio - self._mean_edm_ratio)

    def levels(self, rng_key: Array, num_rows: int, dtype: DTypeLike) -> Float[Array, "n"]:
        """The level of each of N rows, (N,)."""
        if self.stratified:
            # Multiples of the golden ratio in 32 bits, whose overflow is the modulus.
            steps = jax.lax.iota(jnp.uint32, num_rows) * np.uint32(2654435769)
            quantile = (jax.random.uniform(rng_key, (), dtype) + steps.astype(dtype) * 2.0**-32) % 1.0
        else:
            quantile = jax.random.uniform(rng_key, (num_rows,), dtype)
        if self.weighting == "edm":
            start, mass, sign, scale = self._edm_range
            z = jax.scipy.special.ndtri(jnp.asarray(start + quantile * mass, dtype))
            sigma = scale * jnp.exp(sign * _EDM_SCALE * z)
        else:
            sigma = self.smallest * jnp.exp(quantile * math.log(self.largest / self.smallest))
        return jnp.clip(sigma, self.smallest, self.largest)

    @property
    def _edm_ends(self) -> tuple[float, float]:
        """The range's ends in standard deviations of the log-normal law."""
        smallest, largest = (math.log(v / self.sigma_data) for v in (self.smallest, self.largest))  # type: ignore[operator]
        return (smallest - _EDM_MEAN) / _EDM_SCALE, (largest - _EDM_MEAN) / _EDM_SCALE

    @property
    def _edm_range(self) -> tuple[float, float, float, float]:
        """The normal law cut to the range: its quantiles start + mass q, in the tail nearer to zero, and the median."""
        low, high = self._edm_ends
        sign = 1.0
        if low + high > 0:  # the upper tail has no digits
            low, high, sign = -high, -low, -1.0
        return _cdf(low), _cdf(high) - _cdf(low), sign, math.exp(_EDM_MEAN) * self.sigma_data  # type: ignore[operator]

    @property
    def _mean_edm_ratio(self) -> float:
        """E[(σ/σ_d)²], from the moments of the log-normal law on an interval."""
        low, high = self._edm_ends
        tilt = 2 * _EDM_SCALE
        share = (_cdf(high - tilt) - _cdf(low - tilt)) / (_cdf(high) - _cdf(low))
        return math.exp(2 * _EDM_MEAN + tilt**2 / 2) * share

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        return rows_at_once(energy, 4 if self.antithetic else 2, rows_in_cache(energy))


def _cdf(z: float) -> float:
    """Of the standard normal law."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
