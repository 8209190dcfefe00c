"""KL and Fisher divergence along noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.divergences.noised import Law, NoisedLaw, NormalMixture, noised_pair
from numpyro_score.random import Key, as_key

__all__ = ["DeBruijn", "Process", "de_bruijn"]

Process = Callable[[Array], tuple[Any, Any]]
FloatArray = Float[np.ndarray, "..."]


class DeBruijn(NamedTuple):
    """KL and Fisher divergence along noise, with standard errors; T times.

    By the identity `slope` and β² `fisher` are equal. Both are means over the same draws, so that their difference,
    `gap`, is known better than either.
    """

    times: Float[np.ndarray, "t"]
    kl: Float[np.ndarray, "t"]  # KL(p_t‖q_t)
    kl_stderr: Float[np.ndarray, "t"]
    fisher: Float[np.ndarray, "t"]  # D_F(p_t‖q_t) = ½ E‖∇log p_t − ∇log q_t‖²
    fisher_stderr: Float[np.ndarray, "t"]
    slope: Float[np.ndarray, "t"]  # −d/dt KL(p_t‖q_t)
    slope_stderr: Float[np.ndarray, "t"]
    diffusion: Float[np.ndarray, "t"]  # β²; 1 for X + √t Z
    gap: Float[np.ndarray, "t"]  # slope − β² fisher
    gap_stderr: Float[np.ndarray, "t"]
    integral: float  # of β² fisher over all t: KL(p‖q); infinite for data
    integral_stderr: float  # of what is finite in it
    integral_error: float  # of the rule for the integral: what it differs by with every second time
    before: float  # the part of the integral before the first time, extrapolated; infinite for data
    beyond: float  # the part beyond the last time: KL there


def de_bruijn(
    p: Law,
    q: Law,
    times: Any,
    rng_key: Key,
    *,
    process: Process | None = None,
    num_samples: int = 10_000,
) -> DeBruijn:
    r"""KL(p_t‖q_t) and D_F(p_t‖q_t) of two laws along the same noise, the slope of one against the other.

    With X_t = X + √t Z under both laws, de Bruijn's identity is

    .. math:: \tfrac{d}{dt} KL(p_t \| q_t) = -D_F(p_t \| q_t), \qquad KL(p \| q) = \int_0^\infty D_F(p_t \| q_t)\, dt

    [Stam 1959; Barron 1986; Lyu 2009]. Under any diffusion dX = V dt + β dW that both laws follow, the first has
    β² D_F on the right, whatever V is. `process` chooses among those with V linear in X.

    The slope is measured without the identity: KL is the mean over draws (x, z) of log p_t − log q_t at x ± √t z, and
    each draw's value is differentiated in t along its own path, with the same x and z for all t. The mean over ± takes
    away what grows like 1/√t in it. All means are unbiased for the laws that the grid or the rows of data stand for.

    - Normal laws and `MixtureSameFamily` of normal laws, in any dimension: p_t is in closed form.
    - Rows of data (N, D): the law that gives each row the weight 1/N, whose p_t is the Parzen density with variance t.
      By convexity both divergences are then, in expectation over the data, at least those of the law that the data
      came from; they are infinite at t = 0, and the excess falls with t.
    - An energy, a fit or another distribution on the line or the plane: by quadrature on a grid, from t of the square
      of its spacing on. Mass that is far from the energy's data is not seen. No log Z is needed.

    The integral is the trapezoid rule in log t; times in geometric progression with a ratio of 2 or less make its
    error small, as the integrand falls like t and 1/t at the ends.

    Args:
        p: the law under which expectations are.
        q: the other law.
        times: increasing and positive, (T,) with T ≥ 3; None for a progression that spans the scales of both laws.
        rng_key: a key for the draws.
        process: t ↦ (m, v), with X_t = m X + √v Z, from (1, 0) at t = 0, and β² = v' − 2 v m'/m. Default: t ↦ (1, t).
            For dX = −X dt + √2 dW it is `lambda t: (jnp.exp(-t), -jnp.expm1(-2 * t))`.
        num_samples: draws (x, z) of p and the noise.

    Raises:
        ValueError: for wrong times, laws of different dimensions, a grid that resolves no law or not the first time,
            divergences that are not finite.
        TypeError, NotImplementedError: for what is no law, or one whose density under noise is unknown.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import de_bruijn
        >>> p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)
        >>> found = de_bruijn(p, q, None, jax.random.key(0))
        >>> bool((abs(found.gap) < 5 * found.gap_stderr + 1e-5).all())
        True
        >>> from numpyro.distributions import kl_divergence
        >>> bool(abs(found.integral / kl_divergence(p, q) - 1) < 0.02)
        True
    """
    if num_samples < 2:
        raise ValueError(f"de_bruijn needs num_samples of at least 2 for standard errors, got {num_samples}.")
    law_key, x_key, z_key = jax.random.split(as_key(rng_key), 3)
    laws = noised_pair(p, q, law_key)
    if times is None:
        if process is not None:
            raise ValueError("de_bruijn has times of its own for X + √t Z alone: give times with a process.")
        times = _spanning(*laws)
    times = checked_times(times)
    process = _heat if process is None else process
    at = jnp.asarray(times, jnp.result_type(float))
    scale, variance, diffusion = (np.asarray(v, np.float64) for v in _all_coefficients(process, at))
    _check_process(laws, times, scale, variance, diffusion)
    one, other = (law.mixture for law in laws)
    x = one.sample(x_key, num_samples)
    z = jax.random.normal(z_key, x.shape, x.dtype)
    rows = (np.asarray(v, np.float64) for v in _along(one, other, at, x, z, process))
    return _summary(times, diffusion, *rows, discrete=laws[0].discrete or laws[1].discrete)


def log_trapezoid(times: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """Weights of the trapezoid rule in log t for an integral over (t_1, t_T)."""
    steps = np.diff(np.log(times))
    return times * 0.5 * (np.append(steps, 0) + np.insert(steps, 0, 0))


def before_first(times: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """Weights for the integral over (0, t_1) of the line through the first two values."""
    weights = np.zeros_like(times)
    slope = 0.5 * times[0] ** 2 / (times[1] - times[0])
    weights[:2] = times[0] + slope, -slope
    return weights


def every_second(times: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """The weights of :func:`log_trapezoid` with every second time left out, but not the last."""
    chosen = np.unique(np.append(np.arange(0, len(times), 2), len(times) - 1))
    weights = np.zeros_like(times)
    weights[chosen] = log_trapezoid(times[chosen])
    return weights


def mean_and_stderr(rows: Float[np.ndarray, "... n"]) -> tuple[FloatArray, FloatArray]:
    """Over the last axis."""
    return np.asarray(rows.mean(-1)), np.asarray(rows.std(-1, ddof=1) / np.sqrt(rows.shape[-1]))


def _heat(t: Array) -> tuple[Array, Array]:
    return jnp.ones_like(t), t


def _coefficients(process: Process, t: Float[Array, ""]) -> tuple[Array, Array, Array]:
    """m, v and β² = v' − 2 v m'/m."""

    def at(t: Array) -> tuple[Array, Array]:
        scale, variance = process(t)
        return jnp.asarray(scale, t.dtype), jnp.asarray(variance, t.dtype)

    (scale, variance), (d_scale, d_variance) = jax.jvp(at, (t,), (jnp.ones_like(t),))
    return scale, variance, d_variance - 2 * variance * d_scale / scale


@partial(jax.jit, static_argnums=0)
def _all_coefficients(process: Process, times: Float[Array, "t"]) -> tuple[Array, Array, Array]:
    return jax.vmap(partial(_coefficients, process))(times)


@partial(jax.jit, static_argnames="process")
def _along(
    p: NormalMixture,
    q: NormalMixture,
    times: Float[Array, "t"],
    x: Float[Array, "n d"],
    z: Float[Array, "n d"],
    process: Process,
) -> tuple[Float[Array, "t n"], Float[Array, "t n"], Float[Array, "t n"]]:
    """Each draw's log ratio, minus its slope in t, and half its squared difference of scores, means over ± z."""

    def log_ratio(y: Array, scale: Array, variance: Array) -> Array:
        return p.log_density(y, scale, variance) - q.log_density(y, scale, variance)

    def of_draw(t: Array, x: Array, z: Array) -> tuple[Array, Array, Array]:
        def path(t: Array) -> tuple[Array, Array, Array]:
            scale, variance, _ = _coefficients(process, t)
            noise = jnp.sqrt(variance) * jnp.stack([z, -z])
            return scale * x + noise, jnp.broadcast_to(scale, (2,)), jnp.broadcast_to(variance, (2,))

        at, along = jax.jvp(path, (t,), (jnp.ones_like(t),))
        kl, slopes = jax.vmap(jax.value_and_grad(log_ratio, argnums=(0, 1, 2)))(*at)
        slope = jnp.stack([jnp.sum(s * d) for s, d in zip(slopes, along, strict=True)]).sum()
        return kl.mean(), -0.5 * slope, 0.25 * jnp.sum(slopes[0] ** 2)

    at_once = max(2**18 // (x.shape[1] * max(len(p.means), len(q.means))), 1)  # so that the terms fit a cache
    return jax.lax.map(
        lambda t: jax.lax.map(lambda xz: of_draw(t, *xz), (x, z), batch_size=min(at_once, len(x))), times
    )


def checked_times(times: Any) -> Float[np.ndarray, "t"]:
    times = np.asarray(times, np.float64)
    if (
        times.ndim != 1
        or len(times) < 3
        or not np.isfinite(times).all()
        or times[0] <= 0
        or (np.diff(times) <= 0).any()
    ):
        raise ValueError(
            f"times must be three or more increasing positive numbers, e.g. np.geomspace(0.01, 100, 15), got {times}."
        )
    return times


def _spanning(p: NoisedLaw, q: NoisedLaw) -> np.ndarray:
    """Times from below the narrowest scale of both laws to beyond the widest."""
    if p.discrete or q.discrete:
        raise ValueError("Data are as fine as points, so that no least time is best: give times.")
    narrow, wide = [], []
    for law in (p, q):
        mixture = jax.tree.map(lambda v: np.asarray(v, np.float64), law.mixture)
        weights = np.exp(mixture.log_weights)
        away = np.sum((mixture.means - np.exp(p.mixture.log_weights) @ p.mixture.means) ** 2, axis=-1)
        wide.append(weights @ (away + mixture.variances.sum(-1)))
        narrow.append(law.resolved or 0.01 * mixture.variances.min())
    first, last = max(min(narrow), p.resolved, q.resolved) * (1 + 1e-6), 100 * max(wide)
    return np.geomspace(first, last, int(np.ceil(np.log2(last / first))) + 1)


def _check_process(
    laws: tuple[NoisedLaw, NoisedLaw],
    times: np.ndarray,
    scale: np.ndarray,
    variance: np.ndarray,
    diffusion: np.ndarray,
) -> None:
    good = np.isfinite(diffusion) & (scale != 0) & (variance > 0) & (diffusion >= 0)
    if not good.all():
        i = np.argmin(good)
        raise ValueError(
            f"At t = {times[i]:.4g} the process has m = {scale[i]:.4g}, v = {variance[i]:.4g} and β² = "
            f"{diffusion[i]:.4g}: m must not be 0, v must be positive and v/m² must not fall."
        )
    resolved = max(law.resolved for law in laws)
    if (fine := variance / scale**2 < resolved).any():
        raise ValueError(
            f"The grid resolves noise of variance {resolved:.3g} or more, and there is less at t = "
            f"{times[fine].max():.3g}: begin later."
        )


def _summary(
    times: np.ndarray, diffusion: np.ndarray, kl: np.ndarray, slope: np.ndarray, fisher: np.ndarray, *, discrete: bool
) -> DeBruijn:
    """Means over the draws, (T, n) each."""
    finite = np.isfinite(kl + slope + fisher).all(-1)
    if not finite.all():
        raise ValueError(
            f"The log ratio of the densities is not finite at t = {times[np.argmin(finite)]:.3g}: the laws are too far "
            "apart for floats; enable double precision or begin later."
        )
    flow = diffusion[:, None] * fisher
    before = np.zeros(kl.shape[1]) if discrete else before_first(times) @ flow
    integral, integral_stderr = mean_and_stderr(before + log_trapezoid(times) @ flow + kl[-1])
    rule_error = (log_trapezoid(times) - every_second(times)) @ flow.mean(-1)
    return DeBruijn(
        times,
        *mean_and_stderr(kl),
        *mean_and_stderr(fisher),
        *mean_and_stderr(slope),
        diffusion,
        *mean_and_stderr(slope - flow),
        float("inf") if discrete else float(integral),
        float(integral_stderr),
        float(np.abs(rule_error)),
        float("inf") if discrete else float(before.mean()),
        float(kl[-1].mean()),
    )
