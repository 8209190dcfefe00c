"""One step of each method, from noise ρ to less noise ρ', in u = x/α.

All that a step needs of its grid is worked out beforehand in double precision, so that levels and settings are inputs
of the compiled sampler. With D(u) = u + ρ² ∇log q_ρ(u), the mean of the data given u, most methods are one form:

    u' = a u + b₀ D(u) + b₁ D(the last u) + ... + c z,     z ~ N(0, I).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.diffusion.end import NoisyNormal
from numpyro_score.diffusion.grids import Levels
from numpyro_score.diffusion.source import NoisyModel

__all__ = ["Corrected", "Field", "HeunPlan", "LangevinPlan", "LinearPlan", "Step", "heun_step", "linear_step"]

Rows = Float[Array, "n d"]
Past = Float[Array, "k n d"]


class Field(NamedTuple):
    """The model of the noisy data, and the normal law of the same mean and covariance."""

    model: NoisyModel
    end: NoisyNormal

    def denoised(self, u: Rows, rho: Float[Array, ""]) -> Rows:
        """D(u), the mean of the data given u [Tweedie's formula; Robbins 1956]."""
        return u + rho**2 * self.model.score(u, rho)


Step = Callable[[Field, Any, Rows, Past, Array], tuple[Rows, Past]]
"""From the field, this step's part of the plan, u, the last D(u), the newest first, and a key, to u' and the D(u)."""


class LinearPlan(NamedTuple):
    """The factors of the form above."""

    rho: Any  # (S,)
    a: Any  # (S,)
    b: Any  # (S, K)
    c: Any  # (S,); or (S, M), one for each variance of the end law; None without noise


def linear_step(field: Field, plan: LinearPlan, u: Rows, past: Past, rng_key: Array) -> tuple[Rows, Past]:
    """One call of the model."""
    past = jnp.concatenate([field.denoised(u, plan.rho)[None], past])
    new = plan.a * u + jnp.sum(plan.b[:, None, None] * past, axis=0)
    if plan.c is not None:
        noise = random.normal(rng_key, u.shape, u.dtype)
        new += plan.c * noise if jnp.ndim(plan.c) == 0 else field.end.scaled(plan.c, noise)
    return new, past[:-1]


class HeunPlan(NamedTuple):
    """Levels before and after noise is added, and where the step ends; the standard deviation of that noise."""

    rho: Any  # (S,)
    end: Any  # (S,)
    noise: Any  # (S,); None without


def heun_step(field: Field, plan: HeunPlan, u: Rows, past: Past, rng_key: Array) -> tuple[Rows, Past]:
    """Noise, and then the trapezoidal rule along du/dρ = (u − D)/ρ [Karras et al. 2022, algorithm 2]; two calls."""
    if plan.noise is not None:
        u = u + plan.noise * random.normal(rng_key, u.shape, u.dtype)
    step = plan.end - plan.rho
    slope = (u - field.denoised(u, plan.rho)) / plan.rho
    ahead = u + step * slope
    slope_ahead = (ahead - field.denoised(ahead, plan.end)) / plan.end
    return u + 0.5 * step * (slope + slope_ahead), past


class LangevinPlan(NamedTuple):
    """A predictor's plan, if there is one, and then the level and the step size h of Langevin steps."""

    predictor: Any
    rho: Any  # (S,)
    h: Any  # (S,)


@dataclass(frozen=True)
class Corrected:
    """A predictor's step, if any, and then u ← u + h ∇log q_ρ'(u) + √(2h) z some times."""

    predict: Step | None
    num_langevin: int

    def __call__(self, field: Field, plan: LangevinPlan, u: Rows, past: Past, rng_key: Array) -> tuple[Rows, Past]:
        """The calls of the predictor, and one for each Langevin step."""
        if self.predict is not None:
            u, past = self.predict(field, plan.predictor, u, past, jax.random.fold_in(rng_key, self.num_langevin))

        def langevin(i: Array, u: Rows) -> Rows:
            z = random.normal(jax.random.fold_in(rng_key, i), u.shape, u.dtype)
            return u + plan.h * field.model.score(u, plan.rho) + jnp.sqrt(2 * plan.h) * z

        return jax.lax.fori_loop(0, self.num_langevin, langevin, u), past


# -- the factors of the linear methods ----------------------------------------------------------------------------


def _plan(levels: Levels, a: np.ndarray, b: Any, c: Any = None) -> LinearPlan:
    return LinearPlan(levels.rho[:-1], a, np.stack(b, axis=-1), c)


def _scored(levels: Levels, a: np.ndarray, pull: np.ndarray, c: Any = None) -> LinearPlan:
    """The form with a pull along the score in place of D: a u + pull · score + c z."""
    b = pull / levels.rho[:-1] ** 2
    return _plan(levels, a - b, [b], c)


def ddim(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """The probability flow with D held, u' = D + (ρ'/ρ)(u − D) [Song, Meng & Ermon 2021]."""
    keep = levels.rho[1:] / levels.rho[:-1]
    return _plan(levels, keep, [1 - keep])


def probability_flow(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """Euler's steps in t of dx/dt = f x − ½ g² ∇log p_t [Song et al. 2021, eq. 13]."""
    ratio, half = levels.alpha[:-1] / levels.alpha[1:], 0.5 * _spread(levels)
    return _scored(levels, ratio * (1 + levels.drift * _steps(levels)), half)


def euler_maruyama(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """Of dx = (f x − g² ∇log p_t) dt + g dw, backwards in t [Song et al. 2021, eq. 6]."""
    ratio, spread = levels.alpha[:-1] / levels.alpha[1:], _spread(levels)
    return _scored(levels, ratio * (1 + levels.drift * _steps(levels)), spread, np.sqrt(spread * ratio))


def _steps(levels: Levels) -> np.ndarray:
    return levels.time[1:] - levels.time[:-1]  # negative: backwards in time


def _spread(levels: Levels) -> np.ndarray:
    """g²Δt/(αα')."""
    return -levels.squared_diffusion * _steps(levels) / (levels.alpha[:-1] * levels.alpha[1:])


def reverse_diffusion(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """The forward transition x | x' = N(x α/α', V), turned round: x' = (2 − α/α') x + V ∇log p_t + √V z.

    [Song et al. 2021, appendix E, eq. 46.]
    """
    ratio = levels.alpha[:-1] / levels.alpha[1:]
    lost = levels.rho[:-1] ** 2 - levels.rho[1:] ** 2
    return _scored(levels, ratio * (2 - ratio), ratio * lost, ratio * np.sqrt(lost))


def ddpm(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """Ancestral: the law of u' given u and the data, with D for the data [Ho, Jain & Abbeel 2020, eq. 7]."""
    keep = levels.rho[1:] ** 2 / levels.rho[:-1] ** 2
    return _plan(levels, keep, [1 - keep], levels.rho[1:] * np.sqrt(1 - keep))


def ddpm_covariance(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """:func:`ddpm` with the covariance of the data given u, that of normal data, for which it is exact.

    [The optimal covariance of Bao et al. 2022, in place of the one estimated from the score.]
    """
    rho, keep = levels.rho[:-1, None], (levels.rho[1:] ** 2 / levels.rho[:-1] ** 2)[:, None]
    variances = np.asarray(end.spread(0.0), np.float64)
    given = variances * rho**2 / (variances + rho**2)
    c = np.sqrt(levels.rho[1:, None] ** 2 * (1 - keep) + (1 - keep) ** 2 * given)
    return _plan(levels, keep[:, 0], [1 - keep[:, 0]], c)


def dpm_2m(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """DPM-Solver++(2M): D on a line through its last two values in λ = −log ρ [Lu et al. 2022, algorithm 2]."""
    keep = levels.rho[1:] / levels.rho[:-1]
    ahead = _half_ratio(levels)
    return _plan(levels, keep, [(1 - keep) * (1 + ahead), -(1 - keep) * ahead])


def sde_dpm_2m(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """SDE-DPM-Solver++(2M): the same of the diffusion, whose noise is integrated exactly [Lu et al. 2022, eq. 18]."""
    keep = levels.rho[1:] ** 2 / levels.rho[:-1] ** 2
    ahead = _half_ratio(levels)
    noise = levels.rho[1:] * np.sqrt(1 - keep)
    return _plan(levels, keep, [(1 - keep) * (1 + ahead), -(1 - keep) * ahead], noise)


def _half_ratio(levels: Levels) -> np.ndarray:
    """½ h/h of the step before, where h is the step in λ; 0 in the first step."""
    h = -np.diff(np.log(levels.rho))
    return np.append(0.0, 0.5 * h[1:] / h[:-1])


def exp_ab3(levels: Levels, end: NoisyNormal) -> LinearPlan:
    """D as a parabola through its last three values in λ = −log ρ: u'/ρ' = u/ρ + ∫ e^λ D dλ, the integral exact.

    [Exponential Adams–Bashforth, Hochbruck & Ostermann 2010, as in Zhang & Chen 2023.] Starts with orders 1 and 2.
    """
    h = -np.diff(np.log(levels.rho))
    keep = np.exp(-h)
    # e^(−h) ∫₀ʰ τᵏ e^τ dτ
    moments = [1 - keep]
    for k in (1, 2):
        moments.append(h**k - k * moments[-1])
    b = np.zeros((len(h), 3))
    for i in range(len(h)):
        nodes = -np.append(0.0, np.cumsum(h[:i][::-1]))[:3]
        order = len(nodes)
        # Weights that integrate 1, τ and τ² exactly.
        b[i, :order] = np.linalg.solve(np.vander(nodes, order, increasing=True).T, [m[i] for m in moments[:order]])
    return LinearPlan(levels.rho[:-1], keep, b, None)
