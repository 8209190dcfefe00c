"""The entropy of data from scores along noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.divergences.de_bruijn import (
    before_first,
    checked_times,
    every_second,
    log_trapezoid,
    mean_and_stderr,
)
from numpyro_score.energy import Energy
from numpyro_score.losses.base import positive
from numpyro_score.losses.terms import require_flat
from numpyro_score.normaliser.source import Source
from numpyro_score.random import Key, as_key

__all__ = ["ScoreEntropy", "entropy_from_scores"]


class ScoreEntropy(NamedTuple):
    """An entropy in nats, and how it grows with noise; T times."""

    value: float
    stderr: float  # over the rows; without the error of the scores, which is a bias upward
    integral_error: float  # of the rule for the integral: what it differs by with every second time
    before: float  # what the noise before the first time adds to the value, extrapolated
    times: Float[np.ndarray, "t"]
    production: Float[np.ndarray, "t"]  # dH/dt = ½ E‖∇log p_t‖²
    production_stderr: Float[np.ndarray, "t"]


def entropy_from_scores(
    data: Float[Array | np.ndarray, "n d"],
    score: Source | None,
    times: Any,
    rng_key: Key,
    *,
    bandwidth: float | None = None,
) -> ScoreEntropy:
    r"""The differential entropy of the law of data, from scores s_t of the data with noise, X_t = X + √t Z.

    By de Bruijn's identity dH(X_t)/dt = ½E‖∇log p_t‖² =: ½J_t. Beside the normal law g with the data's mean and
    covariance, whose divergence from p is the integral of a Fisher divergence,

    .. math:: H(X) = -E \log g(X) - \int_0^\infty \tfrac12 E\|\nabla \log p_t - \nabla \log g_t\|^2 \, dt,

    and the integrand is the Hyvärinen objective of ∇log g_t minus that of ∇log p_t. Each is a mean over rows x ± √t z
    that needs no true score (denoising score matching, antithetic). With s_t in the place of ∇log p_t the result is

    .. math:: H(X) + \int_0^\infty \tfrac12 E\|s_t - \nabla \log p_t\|^2 \, dt

    in expectation: an upper bound, where the plain ½E‖s_t‖² would err by a term of first order in either direction.
    If the s_t are the scores of a density q with noise, this is the cross-entropy −E log q(X), without its log Z.
    After the last time s_t = ∇log g_t is taken.

    - `score`, an energy or a fit whose model takes the noise level as the keyword `sigma`, as fitted by
      :class:`~numpyro_score.DSM` with several levels: s_t is its score at σ = √t. Consistent as far as the fit is; the
      rows must not be those of the fit, which would lower the bound by overfitting.
    - `score=None`: the score of the Parzen density with variance max(t, h²) of all other rows. The bound tends to H(X)
      as N → ∞, h → 0 and N h^(D+2) → ∞; for more than a few dimensions it is slow.

    Args:
        data: rows of the law, (N, D), N > D + 1.
        score: where s_t comes from.
        times: increasing and positive, (T,) with T ≥ 3, for a fit the squares of its noise levels. None, for the Parzen
            score, spans h² and the data's variances.
        rng_key: a key for the noise z, the same for all times.
        bandwidth: h, in the units of the data. As the bound holds for all, the least over a few is the best.
            Default: that for the gradient of a normal density [Chacón, Duong & Wand 2011], (4/((D + 4) N))^(1/(D + 6))
            times the geometric mean of the standard deviations.

    Raises:
        ValueError, TypeError: for data that are not finite rows or do not span the space, times that are not as said, a
            model without the keyword `sigma` or with its value given, scores that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_score import entropy_from_scores
        >>> x = 2 * jax.random.normal(jax.random.key(0), (1000, 1))
        >>> found = entropy_from_scores(x, None, None, jax.random.key(1))
        >>> bool(abs(found.value - 0.5 * jnp.log(2 * jnp.pi * jnp.e * 4)) < 0.1)
        True
    """
    x = jnp.asarray(data, jnp.result_type(float))
    if x.ndim != 2 or not bool(jnp.isfinite(x).all()) or len(x) < x.shape[1] + 2:
        raise ValueError(f"entropy_from_scores needs finite rows (N, D) with N > D + 1, got shape {x.shape}.")
    rows = np.asarray(x, np.float64)
    mean, variances, axes = rows.mean(0), *np.linalg.eigh(np.atleast_2d(np.cov(rows.T)))
    if variances[0] <= 1e-6 * variances[-1]:
        raise ValueError("The data lie in a plane of fewer dimensions, where the entropy is −∞: leave columns out.")
    z = jax.random.normal(as_key(rng_key), x.shape, x.dtype)
    if score is None:
        n, d = x.shape
        if bandwidth is None:
            bandwidth = float(np.exp(0.5 * np.log(variances).mean()) * (4 / ((d + 4) * n)) ** (1 / (d + 6)))
        positive("entropy_from_scores", "bandwidth, in the units of the data", bandwidth)
        if times is None:
            first, last = 0.01 * bandwidth**2, 100 * variances[-1]
            times = np.geomspace(first, last, int(np.ceil(np.log2(last / first))) + 1)
        along = partial(_parzen_terms, x, z, jnp.asarray(bandwidth, x.dtype))
    else:
        if bandwidth is not None:
            raise ValueError("A bandwidth is of the Parzen score: leave it out, or give score=None.")
        if times is None:
            raise ValueError(
                "The noise levels of a fit are not known: give times, the squares of those it was fitted at."
            )
        along = partial(_energy_terms, _noise_conditional(score).at(x), z)
    times = checked_times(times)
    at = jnp.asarray(times, x.dtype)
    normal = (jnp.asarray(v, x.dtype) for v in (mean, axes, variances))
    found, reference = (np.asarray(v, np.float64) for v in (along(at), _normal_terms(x, z, *normal, at)))
    if not np.isfinite(found).all():
        t = times[np.argmin(np.isfinite(found).all(-1))]
        raise ValueError(f"The score at t = {t:.3g} is not finite at all rows: take times that it was fitted at.")
    gain = reference - found  # (T, N): its mean is what the noise at t tells of p beyond g
    away = ((rows - mean) @ axes) ** 2
    cross = 0.5 * np.sum(away / variances + np.log(2 * np.pi * variances), axis=-1)
    value, stderr = mean_and_stderr(cross - (before_first(times) + log_trapezoid(times)) @ gain)
    rule_error = np.abs((log_trapezoid(times) - every_second(times)) @ gain.mean(-1))
    before = -before_first(times) @ gain.mean(-1)
    noisy, t = variances + times[:, None, None], times[:, None, None]
    normal_production = np.sum(1 / noisy - 0.5 * (away + t) / noisy**2, axis=-1)  # that of g, its mean over z
    production = mean_and_stderr(gain + normal_production)
    return ScoreEntropy(float(value), float(stderr), float(rule_error), float(before), times, *production)


def _noise_conditional(score: Source) -> Energy:
    energy = score if isinstance(score, Energy) else score.energy
    require_flat(energy, "entropy_from_scores")
    if (given := energy.is_given("sigma")) is None:
        raise TypeError(
            "The model takes no keyword 'sigma': add it with a default, e.g. def model(x, sigma=1.0), and fit it by "
            "DSM with several levels."
        )
    if given:
        raise TypeError("The model's arguments give 'sigma', which entropy_from_scores passes: leave it out.")
    return energy


def _denoising(score: Callable[[Array], Array], x: Array, z: Array, t: Array) -> Float[Array, "n"]:
    """Each row's value of antithetic denoising score matching, whose mean is the Hyvärinen objective at t."""
    noise = jnp.sqrt(t) * z
    one, other = score(x + noise), score(x - noise)
    return jnp.sum(0.25 * (one**2 + other**2) + z * (one - other) / (2 * jnp.sqrt(t)), axis=-1)


@jax.jit
def _energy_terms(energy: Energy, z: Float[Array, "n d"], times: Float[Array, "t"]) -> Float[Array, "t n"]:
    def at(t: Array) -> Array:
        noisy = energy.bind(sigma=jnp.full(len(z), jnp.sqrt(t)))
        return _denoising(noisy.score, energy.data, z, t)

    return jax.lax.map(at, times)


@jax.jit
def _parzen_terms(
    x: Float[Array, "n d"], z: Float[Array, "n d"], bandwidth: Float[Array, ""], times: Float[Array, "t"]
) -> Float[Array, "t n"]:
    """By the Parzen density of all rows but the one whose value it is."""
    at_once = max(min(2**22 // x.size, len(x)), 1)

    def at(t: Array) -> Array:
        variance = jnp.maximum(t, bandwidth**2)

        def score(y: Array) -> Array:
            def of_row(row: tuple[Array, Array]) -> Array:
                i, y = row
                away = x - y
                logits = (-0.5 * jnp.sum(away**2, axis=-1) / variance).at[i].set(-jnp.inf)
                return jax.nn.softmax(logits) @ away / variance

            return jax.lax.map(of_row, (jnp.arange(len(x)), y), batch_size=at_once)

        return _denoising(score, x, z, t)

    return jax.lax.map(at, times)


@jax.jit
def _normal_terms(
    x: Float[Array, "n d"],
    z: Float[Array, "n d"],
    mean: Float[Array, "d"],
    axes: Float[Array, "d d"],
    variances: Float[Array, "d"],
    times: Float[Array, "t"],
) -> Float[Array, "t n"]:
    def at(t: Array) -> Array:
        return _denoising(lambda y: -((y - mean) @ axes / (variances + t)) @ axes.T, x, z, t)

    return jax.lax.map(at, times)
