"""How much data tell, by the noise through which they are seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.diffusion.end import NoisyNormal
from numpyro_score.diffusion.flow import require_finite
from numpyro_score.diffusion.noise_range import shared_noise_range
from numpyro_score.diffusion.samplers import field_of, warn_of_structure
from numpyro_score.diffusion.source import noisy_model
from numpyro_score.diffusion.steps import Field
from numpyro_score.energy import plural, rows_text
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.source import Source
from numpyro_score.programs import being_traced
from numpyro_score.random import Key, as_key

__all__ = ["NoiseBits", "bits_by_noise"]


class NoiseBits(NamedTuple):
    """What :func:`bits_by_noise` returns, for L rising noise levels."""

    noise: Float[np.ndarray, "l"]  # ρ, in the units of the data
    error: Float[np.ndarray, "l"]  # E‖ε̂ − ε‖²/D
    error_stderr: Float[np.ndarray, "l"]
    bits: Float[np.ndarray, "l"]  # for each number of the data
    bits_stderr: Float[np.ndarray, "l"]

    def __repr__(self) -> str:
        return (
            f"NoiseBits: {self.bits[0]:.4g} ± {self.bits_stderr[0]:.2g} bits a number at noise {self.noise[0]:.3g}, "
            f"from {plural(len(self.noise), 'level')} up to {self.noise[-1]:.3g}"
        )


def bits_by_noise(
    source: Source,
    x: Any,
    rng_key: Key,
    *,
    noise_range: tuple[float, float] | None = None,
    num_levels: int = 64,
    num_draws: int = 1,
) -> NoiseBits:
    r"""Bits for each number of the data that are seen through noise, by the noise, under a fitted model.

    With the noise that the model sees in a noisy row, :math:`\hat\varepsilon = -\rho\, s(x + \rho\varepsilon, \rho)`,
    its error at level ρ is :math:`e(\rho) = \mathrm{E}\|\hat\varepsilon - \varepsilon\|^2/D`, and

    .. math:: \text{bits}(\rho) = \frac{1}{\ln 2}\int_{\ln\rho}^{\ln\rho_{max}} e(r)\, d\ln r
              + \text{bits}(\rho_{max}),

    where those at the largest noise, nearly none, are by the normal law with the mean and covariance of the fitted
    data. If the score is that of the data with noise these are the bits that a noisy number tells of the clean one,
    their mutual information [Guo, Shamai & Verdú 2005]. In any case

    .. math:: \text{bits}(\rho) = -\tfrac1D \mathrm{E}\log_2 q_\rho(x + \rho\varepsilon) - \log_2(\sqrt{2\pi e}\,\rho)

    for a model q whose levels belong together, by de Bruijn's identity, and for others it bounds this from above for
    the law of the reverse diffusion [Song, Durkan, Murray & Ermon 2021, theorem 1]. So it compares models, costs one
    score for each row and level, where :func:`~numpyro_score.flow_log_prob` costs D derivatives for each step, and
    shows at which noise held-out rows cost more than those of the fit. Of integers the truth has no more bits once ρ is
    well below ½: they can be read back from under the noise.

    Args:
        source: a fit by ContinuousDSM or DSM with several levels, or an energy.
        x: rows as the data site takes them, held out or those of the fit.
        rng_key: for the noise, drawn anew for each row and level.
        noise_range: the smallest and largest level, by default those of the fit.
        num_levels: L, even in log ρ; integrals are by Simpson's rule, whose error for 64 levels over
            a range of 10⁵ is below 10⁻⁴ bits for normal data.
        num_draws: of noise for each row and level.

    Returns:
        The levels, e and bits at each, and the standard errors of both over rows, which hold for rows like these: the
        noise is in them, and nothing of the fit's own uncertainty.

    Raises:
        TypeError, ValueError: for a source that is no model of noise levels, levels it has not seen, rows that are not
            finite or fewer than two.
        FloatingPointError: if the model's score is not finite, naming level and rows.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, bits_by_noise
        >>> def model(x, sigma=1.0):  # a standard normal law with noise
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))
        >>> x = jax.random.normal(jax.random.key(0), (4000,))
        >>> found = bits_by_noise(Energy(model, {}, x), x, jax.random.key(1), noise_range=(0.1, 100.0))
        >>> bool(abs(found.bits[0] - 0.5 * jnp.log2(1 + 0.1**-2)) < 4 * found.bits_stderr[0])
        True
    """
    num_levels = at_least_one("bits_by_noise", "num_levels", num_levels)
    num_draws = at_least_one("bits_by_noise", "num_draws", num_draws)
    if num_levels < 3:
        raise ValueError(f"bits_by_noise integrates over noise levels: num_levels must be 3 or more, got {num_levels}.")
    key = as_key(rng_key, "write bits_by_noise(fit, held_out, jax.random.key(0))")
    model = noisy_model("bits_by_noise", source)
    if being_traced((key, x, model.energy)):
        raise TypeError("bits_by_noise got traced values, and integrates by NumPy: call it outside of jit and vmap.")
    low, high = shared_noise_range("bits_by_noise", source, None, noise_range)
    rows = model.energy.flatten(x)
    require_finite("bits_by_noise", rows)
    if len(rows) < 2:
        raise ValueError(f"bits_by_noise has errors from the spread over rows, and got {plural(len(rows), 'row')}.")
    field = field_of(model)
    warn_of_structure("bits_by_noise", field, high, "bits at that noise are of a normal law", stacklevel=2)
    rho = np.geomspace(low, high, num_levels)
    keys = jax.random.split(key, (num_draws, num_levels))
    errors = np.mean([np.asarray(_errors(field, rows, jnp.asarray(rho, rows.dtype), k), float) for k in keys], axis=0)
    if not np.isfinite(errors).all():
        level = int(np.argmin(np.isfinite(errors).all(axis=1)))
        raise FloatingPointError(
            f"The model's score at noise {rho[level]:.3g} is not finite in {rows_text(~np.isfinite(errors[level]))}."
        )
    step = np.log(high / low) / (num_levels - 1)
    integral = scipy.integrate.cumulative_simpson(errors[::-1], dx=step, axis=0, initial=0)[::-1]
    bits = (integral + _at_the_end(field.end, rows, high)) / np.log(2)
    spread = np.sqrt(len(rows))
    return NoiseBits(rho, errors.mean(1), errors.std(1, ddof=1) / spread, bits.mean(1), bits.std(1, ddof=1) / spread)


@jax.jit
def _errors(field: Field, rows: Float[Array, "n d"], rho: Float[Array, "l"], keys: Array) -> Float[Array, "l n"]:
    """‖ρ s + ε‖²/D of each level and row."""

    def at(level: tuple[Array, Array]) -> Array:
        rho, key = level
        noise = random.normal(key, rows.shape, rows.dtype)
        return jnp.mean((rho * field.model.score(rows + rho * noise, rho) + noise) ** 2, axis=-1)

    return jax.lax.map(at, (rho, keys))


def _at_the_end(end: NoisyNormal, rows: Float[Array, "n d"], rho: float) -> Float[np.ndarray, "n"]:
    """Nats a number of the noisy rows under the end's normal law, less those of the noise alone, in its mean."""
    noise, spread = end.counts * rho**2, np.asarray(end.spread(rho), float)
    nats = (np.asarray(end.squares(rows), float) + noise) / spread + end.counts * (np.log(spread / rho**2) - 1)
    return 0.5 * nats.sum(axis=-1) / rows.shape[1]
