"""log Z by quadrature, in up to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.energy import Energy
from numpyro_score.normaliser.coordinates import free_dim, free_log_density, from_free, to_free
from numpyro_score.normaliser.source import free_data
from numpyro_score.operators import full_precision

__all__ = ["MAX_DIM", "quadrature"]

MAX_DIM = 3
_MAX_POINTS = 2**22
_BATCH = 2**14  # points of one compiled call
_KNOWN = 64  # rows of the data that the grid must resolve
_WORST = 1e-2  # error of log Z above which there is no answer


def quadrature(energy: Energy, rng_key: Array | None = None) -> tuple[float, float, dict[str, Any]]:
    r"""The trapezoid rule in sinh coordinates, refined until two resolutions agree.

    .. math:: \log \int \exp g(c + L \sinh t) \, |L| \prod_j \cosh t_j \, dt,

    over free coordinates u = c + L sinh t (elementwise) that centre and scale the mass. For integrands that are smooth
    and decay at both ends the rule converges exponentially [Trefethen & Weideman 2014], and by sinh a power-law tail
    decays so, too.

    Two frames (c, L) are considered, the mean and covariance of the data and a mode with the inverse Hessian there,
    and the one is taken that needs fewer points to resolve what is known of the density: the curvature at rows of the
    data and at the modes found by ascent from them. The box holds all of these, and grows until its faces carry no
    mass. Mass that neither data nor ascent nor a grid of 10 or more standard deviations meets is not seen.

    Args:
        energy: of up to three free dimensions. On spheres, angles.
        rng_key: not used.

    Returns:
        log Z, its numerical error (the difference between resolutions, plus rounding
        and mass that floats cannot resolve), and diagnostics:
        the number of `points` and the `frame`.

    Raises:
        ValueError: more dimensions; a density whose tails carry mass as far as floats reach; NaN or +∞ in the density;
            a grid that cannot resolve it to an error of 0.01.
    """
    p = free_dim(energy, "angles")
    if p > MAX_DIM:
        raise ValueError(f"Quadrature takes up to {MAX_DIM} dimensions, and a row has {p}: use method='smc' or 'nce'.")
    known = _known_points(energy, free_data(energy, "angles"))
    frames = sorted(_frames(known), key=lambda frame: _num_points(*_grid(frame, known)))
    reasons = []
    for frame in frames:
        try:
            return _integrate(energy, frame, known)
        except _TooFineError as error:
            reasons.append(f"{frame.name}: {error}")
    raise ValueError(
        f"Quadrature did not resolve the density ({'; '.join(reasons)}): give the energy data from where the mass is, "
        "enable double precision, or use method='smc'."
    )


class _TooFineError(Exception):
    """The grid would need too many points."""


class _NotANumberError(Exception):
    """The log density is NaN or +∞ on the grid."""


class _Known(NamedTuple):
    """What is known of the density before the first grid."""

    points: np.ndarray  # (M, P): rows of the data and modes
    values: np.ndarray  # (M,)
    hessians: np.ndarray  # (M, P, P)
    data: np.ndarray  # (N, P)


class _Frame(NamedTuple):
    name: str
    centre: np.ndarray  # (P,)
    scale: np.ndarray  # (P, P), lower triangular or a rotation times scales

    def to_t(self, u: np.ndarray) -> np.ndarray:
        return np.arcsinh(np.linalg.solve(self.scale, (u - self.centre).T).T)


@jax.jit
@full_precision
def _ascend(energy: Energy, u: Array) -> tuple[Array, Array, Array]:
    """Starts u (M, P) and the modes that damped Newton steps with |H| find: points, values, Hessians, (2M, ...)."""

    def slope(u: Array) -> tuple[Array, tuple[Array, Array]]:
        value, slope = jax.value_and_grad(lambda u: free_log_density(energy, u, "angles"))(u)
        return slope, (value, slope)

    class At(NamedTuple):
        u: Array
        value: Array
        slope: Array
        hessian: Array

    def step(carry: tuple[At, Array, Array], _: None) -> tuple[tuple[At, Array, Array], At]:
        at, new, damping = carry
        hessian, (value, gradient) = jax.jacfwd(slope, has_aux=True)(new)
        better = value > at.value  # not where it is NaN
        at = jax.tree.map(lambda a, b: jnp.where(better, a, b), At(new, value, gradient, hessian), at)
        damping = jnp.where(better, damping / 8, jnp.minimum(damping * 4, 1e12))
        w, q = jnp.linalg.eigh(at.hessian)
        return (at, at.u + q @ ((q.T @ at.slope) / (jnp.abs(w) + damping * (1 + jnp.abs(w).max()))), damping), at

    def ascend(u: Array) -> At:
        start = At(u, -jnp.inf * jnp.ones((), u.dtype), u, jnp.zeros((u.size, u.size), u.dtype))
        path = jax.lax.scan(step, (start, u, jnp.asarray(1e-3, u.dtype)), length=100)[1]
        return jax.tree.map(lambda v: v[jnp.array([0, -1])], path)

    found = jax.vmap(ascend)(u)
    u, value, hessian = (v.reshape(-1, *v.shape[2:]) for v in (found.u, found.value, found.hessian))
    return u, value, hessian


def _known_points(energy: Energy, data: np.ndarray) -> _Known:
    rows = data[np.linspace(0, len(data) - 1, _KNOWN).astype(int)]  # rows repeat where there are few
    found = _ascend(energy, jnp.asarray(rows, energy.dtype))
    points, values, hessians = (np.asarray(v, np.float64) for v in found)
    good = np.isfinite(points).all(-1) & np.isfinite(values) & np.isfinite(hessians).all((-1, -2))
    # What is e^25 below the best point carries no mass that matters, whatever its shape.
    good &= values > values[good].max(initial=-np.inf) - 25
    if not good.any():
        raise ValueError("The log density is not finite, or grows without bound, where ascent from the data leads.")
    return _Known(points[good], values[good], hessians[good], data)


def _frames(known: _Known) -> Iterator[_Frame]:
    best = known.values.argmax()
    w, q = np.linalg.eigh(-known.hessians[best])
    if w.max() > 0:  # directions without curvature take the widest scale there is
        yield _Frame("mode", known.points[best], q / np.sqrt(np.maximum(w, 1e-8 * w.max())))
    p = known.data.shape[1]
    covariance = np.atleast_2d(np.cov(known.data.T)) if len(known.data) >= 5 * p else np.zeros((p, p))
    scale = np.linalg.eigvalsh(covariance)
    if scale[0] > 1e-10 * scale[-1]:
        yield _Frame("data", known.data.mean(0), np.linalg.cholesky(covariance))
    yield _Frame("unit", known.points[best], np.eye(p))


def _grid(frame: _Frame, known: _Known) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box in t and the widest spacing of each axis that resolves the known points, (P,) each."""
    t = frame.to_t(known.points)
    p = t.shape[1]
    reach = {1: 7.0, 2: 5.0, 3: 3.5}[p]
    low, high = np.minimum(t.min(0) - 1.0, -reach), np.maximum(t.max(0) + 1.0, reach)
    columns = frame.scale.T[None] * np.cosh(t)[:, :, None]  # du / dt_j at each point, (M, P, P)
    curvature = np.abs(np.einsum("mja,mab,mjb->mj", columns, known.hessians, columns))
    # Spaced by one standard deviation, the rule is right to exp(−2π²) for a Gaussian with independent coordinates.
    return low, high, 1.0 / np.sqrt(np.maximum(curvature.max(0), 4.0))


def _num_points(low: np.ndarray, high: np.ndarray, spacing: np.ndarray) -> float:
    return float(np.prod(np.ceil((high - low) / spacing)))


def _integrate(energy: Energy, frame: _Frame, known: _Known) -> tuple[float, float, dict[str, Any]]:
    low, high, spacing = _grid(frame, known)
    epsilon = float(jnp.finfo(energy.dtype).eps)
    edge, limit = (1e-7, 35.0) if epsilon > 1e-10 else (1e-11, 230.0)  # how far sinh t goes: 1e15 and 1e99
    # How far g is off because u is rounded, at the sharpest known point: each coordinate by |u| ε/√12.
    blur = 0.3 * epsilon * np.sqrt(np.einsum("mj,mjj->m", known.points**2, np.abs(known.hessians))).max().item()
    previous, gap, error = math.nan, math.inf, math.inf
    diagnostics: dict[str, Any] = {}
    grown = False
    while True:
        if _num_points(low, high, spacing) > _MAX_POINTS:
            if error < _WORST:
                return previous, error, diagnostics
            raise _TooFineError(f"{_MAX_POINTS} points are too few")
        try:
            value, rule = _trapezoid(energy, frame, low, high, spacing)
        except _NotANumberError as reason:
            raise ValueError((_HEAVY if grown else "") + str(reason)) from None
        if rule.unresolved == math.inf:
            raise ValueError(_HEAVY + "Its mass reaches data that floats cannot hold.")
        if (rule.faces > edge).any():
            grown = True
            low, high = low - 2.0 * (rule.faces[0] > edge), high + 2.0 * (rule.faces[1] > edge)
            if max(-low.min(), high.max()) > limit:
                raise ValueError(_HEAVY + f"Its mass does not end within {math.sinh(limit):.0e} scales of its mode.")
            continue
        size, points = rule.size, rule.points
        diagnostics = {"points": points, "frame": frame.name}
        last_gap, gap = gap, abs(value - previous)
        floor = 4 * epsilon * (1 + size) + blur / math.sqrt(rule.effective) + rule.unresolved + float(rule.faces.sum())
        error = gap + floor
        if floor > _WORST:
            raise _TooFineError(f"rounding makes an error of {floor:.1g}")
        if max(gap, last_gap) < max(1e3 * epsilon, 1e-10, floor):  # twice, as two grids may agree by chance
            return value, max(gap, last_gap) + floor, diagnostics
        previous, spacing = value, 0.7 * spacing  # the finer grid shares no points with this one


_HEAVY = "The density is not normalisable, or its tails are too heavy for the precision in force. "


class _Rule(NamedTuple):
    """What one grid says about itself; mass is in shares of the whole."""

    faces: np.ndarray  # (2, P): mass per unit of t at the lower and upper faces
    size: float  # mean |g|
    effective: float  # the number of points that carry the mass
    unresolved: float  # mass where floats cannot tell the data from their neighbours, or from a bound
    points: int


def _trapezoid(
    energy: Energy, frame: _Frame, low: np.ndarray, high: np.ndarray, spacing: np.ndarray
) -> tuple[float, _Rule]:
    """Log of the integral over the box, by the midpoints of a grid."""
    counts = np.ceil((high - low) / spacing).astype(int)
    steps = (high - low) / counts
    axes = [lo + (np.arange(n) + 0.5) * step for lo, n, step in zip(low, counts, steps, strict=True)]
    t = np.stack([m.reshape(-1) for m in np.meshgrid(*axes, indexing="ij")], axis=-1)
    batches = [
        _density(energy, frame.centre + np.sinh(t[i : i + _BATCH]) @ frame.scale.T) for i in range(0, len(t), _BATCH)
    ]
    g, resolved = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    log_mass = g + np.log(np.cosh(t)).sum(-1) + np.linalg.slogdet(frame.scale)[1] + np.log(steps).sum()
    peak = log_mass.max()
    if peak == -np.inf:
        raise _TooFineError("the density is zero at all points")
    mass = np.exp(log_mass - peak)
    total = mass.sum()
    share = mass / total
    size = float(share @ np.where(share > 0, np.abs(g), 0.0))
    unresolved = float(share @ ~resolved)
    effective = float(1 / (share @ share))
    share = share.reshape(counts)
    unresolved += _cut_off(share, resolved.reshape(counts))
    others = [tuple(k for k in range(len(counts)) if k != j) for j in range(len(counts))]
    faces = np.stack([share.sum(other)[[0, -1]] / step for other, step in zip(others, steps, strict=True)], axis=-1)
    return float(peak + math.log(total)), _Rule(faces, size, effective, unresolved, len(t))


def _cut_off(share: np.ndarray, resolved: np.ndarray) -> float:
    """Mass where the density breaks off because floats end, by geometric tails from the last two points before it."""
    total = 0.0
    for axis in range(share.ndim):
        for flip in (slice(None), slice(None, None, -1)):
            s, ok = (np.moveaxis(a, axis, 0)[flip] for a in (share, resolved))
            end = ok[:-2] & ok[1:-1] & ~ok[2:] & (s[2:] == 0) & (s[1:-1] > 1e-12)
            inner, last = s[:-2][end], s[1:-1][end]
            total += np.sum(np.where(last < inner, last**2 / np.maximum(inner - last, 1e-300), np.inf))
    return float(total)


@jax.jit
@full_precision
def _evaluate(energy: Energy, u: Array) -> tuple[Array, Array, Array]:
    """g, whether the data there are finite, and whether u can be read back from them, (n,) each."""
    x, log_jacobian = from_free(energy, u, "angles")
    # Else XLA simplifies the way there and back, log exp u, to u.
    back = to_free(energy, jax.lax.optimization_barrier(x), "angles")
    return (
        energy.log_density(x) + log_jacobian,
        jnp.isfinite(x).all(-1),
        jnp.all(jnp.abs(back - u) <= 0.03 + 1e-5 * jnp.abs(u), axis=-1),
    )


def _density(energy: Energy, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.concatenate([u, np.repeat(u[-1:], _BATCH - len(u), axis=0)])
    found = jax.device_get(_evaluate(energy, jnp.asarray(padded, energy.dtype)))
    g, finite, resolved = (v[: len(u)] for v in found)
    # Beyond the floats the density is cut off, and _cut_off says what that costs.
    bad = np.isnan(g) | (g == np.inf)
    beyond = ~finite | (bad & ~resolved)
    g, resolved, bad = np.where(beyond, -np.inf, g), resolved & finite, bad & ~beyond
    if bad.any():
        raise _NotANumberError(
            f"The log density is {g[bad][0]} at the free coordinates {u[bad][0]}: write the factor so that it is a "
            "number, or −∞, on all of the support."
        )
    return g.astype(np.float64), resolved
