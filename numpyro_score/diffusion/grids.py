"""Noise levels that samplers pass through, from the largest to the smallest."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.diffusion.sde import SDE, Time, drift_and_diffusion, noise_at, time_at
from numpyro_score.losses.base import at_least_one
from numpyro_score.programs import run_compiled

__all__ = ["Grid", "Levels", "levels_on"]

Grid = Literal["karras", "log_snr", "uniform"]

_BEND = 7.0  # Karras et al. 2022, who call it ρ


class Levels(NamedTuple):
    """The S + 1 levels of S steps, and the diffusion there; NumPy's numbers in double precision."""

    rho: np.ndarray  # (S + 1,), falling: the noise in the units of the data, σ/α
    time: np.ndarray  # (S + 1,)
    alpha: np.ndarray  # (S + 1,)
    drift: np.ndarray  # (S,), f of dx = f x dt + g dw where each step begins
    squared_diffusion: np.ndarray  # (S,), g² there

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.rho) - 1


def levels_on(sde: SDE | None, grid: Any, num_steps: int, ends: tuple[float, float], owner: str = "diffuse") -> Levels:
    """The levels of a grid between two noise levels, the smallest first.

    Args:
        sde: the diffusion, whose ρ = σ/α reaches both ends; None for α = 1 and σ = t, where t is ρ.
        grid: "karras", even in ρ^(1/7) [Karras et al. 2022, eq. 5]; "log_snr", even in log ρ; "uniform", even in t; or
            the levels themselves, (S + 1,), falling.
        num_steps: S, where the levels are not given.
        ends: the smallest and the largest level.
        owner: who asks, for messages.

    Raises:
        ValueError, TypeError: for an unknown grid, or levels that do not fall or lie beyond the ends.
    """
    at_least_one(owner, "num_steps", num_steps)
    low, high = ends
    uniform = isinstance(grid, str) and grid == "uniform"
    if not isinstance(grid, str):
        given = _checked(owner, np.asarray(grid, np.float64), low, high)
    elif grid == "karras":
        given = np.linspace(high ** (1 / _BEND), low ** (1 / _BEND), num_steps + 1) ** _BEND
    elif grid == "log_snr":
        given = np.geomspace(high, low, num_steps + 1)
    elif uniform:
        given = np.linspace(high, low, num_steps + 1) if sde is None else np.array([high, low])
    else:
        raise ValueError(f"{owner} has no grid {grid!r}: use 'karras', 'log_snr', 'uniform', or falling noise levels.")

    if sde is None:
        return Levels(given, given, np.ones_like(given), np.zeros_like(given[1:]), 2 * given[:-1])

    def at(given: Array) -> tuple[Time, ...]:
        t = time_at(sde, given)
        if uniform:
            t = jnp.linspace(t[0], t[1], num_steps + 1)
        return noise_at(sde, t), t, sde.alpha(t), *drift_and_diffusion(sde, t[:-1])

    levels = Levels(*(np.asarray(v, np.float64) for v in run_compiled(at, jnp.asarray(given, jnp.result_type(float)))))
    return levels if uniform else levels._replace(rho=given)


def _checked(owner: str, rho: np.ndarray, low: float, high: float) -> np.ndarray:
    if rho.ndim != 1 or len(rho) < 2:
        raise ValueError(f"{owner} needs at least two noise levels in one row as grid, got shape {rho.shape}.")
    if not (np.isfinite(rho).all() and (np.diff(rho) < 0).all() and rho[-1] > 0):
        raise ValueError(f"{owner} needs positive noise levels that fall from the largest to the smallest as grid.")
    if rho[0] > high * (1 + 1e-5) or rho[-1] < low * (1 - 1e-5):
        raise ValueError(
            f"The grid's levels, {rho[-1]:.3g} to {rho[0]:.3g}, lie beyond {low:.3g} to {high:.3g}, where model and "
            "SDE are known: take levels within."
        )
    return rho
