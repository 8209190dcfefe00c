"""Finite-difference score matching: no derivative in the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.losses.base import positive
from numpyro_score.losses.ssm import Projection, check_projections, draw_directions
from numpyro_score.objective import require_flat

__all__ = ["FSM"]


@dataclass(frozen=True)
class FSM:
    """Finite-difference score matching [Pang et al. 2020]: density values alone, no derivative in the data.

    With random directions v, E[vvᵀ] = I, each row's value is

    - sliced (sigma not given): [f(x+εv) + f(x−εv) − 2f(x)]/ε² + [f(x+εv) − f(x−εv)]²/(8ε²), which tends to plain
      :class:`~numpyro_score.SSM` with the same v as ε², and so estimates J + O(ε²);
    - denoising: ½{[f(x̃+εv) − f(x̃−εv)]/(2ε) + v·z/σ}² − D/(2σ²) with x̃ = x + σz and z ~ N(0, I), which tends to the
      plain :class:`~numpyro_score.DSM` and estimates J of the data blurred by σ, + O(ε²).

    They cost 3 and 2 densities and one gradient of those in θ. Rounding in f is divided by ε² or ε: the default step
    balances it against the O(ε²), and is about 2 % of the data's spread in float32. In float64 it is about 1e-4 of
    it, and the values agree with those of derivatives to some 7 digits. Returns (N,) values, the mean over projections.

    Args:
        epsilon: ε, in the units of the data; ‖εv‖ is ε√D. Default: 2 η^¼ spread/√D (sliced) or 2 η^⅓ spread/√D
            (denoising), with η the machine precision and spread the root mean square deviation of the rows at hand.
        sigma: σ of the denoising form, in the units of the data.
        num_projections: M, directions per row.
        projection: the law of v, as in :class:`~numpyro_score.SSM`.

    Raises:
        ValueError: for a setting out of range; and, as soon as the data are known, for an epsilon so small that
            rounding leaves nothing of the differences.
    """

    epsilon: float | Array | None = None
    sigma: float | None = None
    num_projections: int = 1
    projection: Projection = "rademacher"

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            positive("FSM", "epsilon", self.epsilon)
        if self.sigma is not None:
            positive("FSM", "sigma", self.sigma)
        check_projections("FSM", self.num_projections, self.projection)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_flat(energy, "FSM")
        if energy.is_concrete:
            self.check(energy)
        x, m = energy.data, self.num_projections
        epsilon = self.step(x)
        direction_key, noise_key = jax.random.split(rng_key)
        v = draw_directions(self.projection, direction_key, (m, *x.shape), x.dtype)
        if self.sigma is not None:
            noise = jax.random.normal(noise_key, x.shape, x.dtype)
            noisy = x + self.sigma * noise
            ahead, behind = jnp.split(
                energy.log_density(jnp.concatenate([noisy + epsilon * v, noisy - epsilon * v])), 2
            )
            residual = (ahead - behind) / (2 * epsilon) + jnp.sum(v * noise, axis=-1) / self.sigma
            return jnp.mean(0.5 * residual**2, axis=0) - energy.dim / (2 * self.sigma**2)
        f = energy.log_density(jnp.concatenate([x[None], x + epsilon * v, x - epsilon * v]))
        ahead, behind = jnp.split(f[1:] - f[0], 2)
        return jnp.mean((ahead + behind) / epsilon**2 + (ahead - behind) ** 2 / (8 * epsilon**2), axis=0)

    def check(self, energy: Energy) -> None:
        """Refuses a step that rounding destroys; needs concrete values.

        Raises:
            ValueError: if the rounding error of a difference quotient is as large as the loss of a Gaussian of the
                data's spread.
        """
        if self.epsilon is None or isinstance(self.epsilon, jax.core.Tracer):
            return
        x = energy.usable()[0].data
        spread, size = _spread(x), float(jnp.median(jnp.abs(energy.log_density(x))))
        eta, order = float(jnp.finfo(x.dtype).eps), 2 if self.sigma is None else 1
        # Of the second difference against tr ∇s, of the first against v·s, both as for N(0, spread² I).
        error = (4 if order == 2 else 1) * eta * size / self.epsilon**order
        natural = energy.dim / spread**2 if order == 2 else math.sqrt(energy.dim) / spread
        if error > natural:
            least = (error / natural) ** (1 / order) * self.epsilon * 10 ** (1 / order)
            raise ValueError(
                f"FSM(epsilon={self.epsilon:g}) in {x.dtype} loses everything to rounding: for log densities of about "
                f"{size:.3g} the difference quotient is wrong by {error:.2g}; take epsilon of at least {least:.1g}, "
                "leave it out, or enable float64."
            )

    def step(self, x: Float[Array, "n d"]) -> Array | float:
        """ε for rows x (N, D): the one given, or the default."""
        if self.epsilon is not None:
            return self.epsilon
        eta = float(jnp.finfo(x.dtype).eps)
        return 2 * eta ** (1 / 4 if self.sigma is None else 1 / 3) * _spread(x) / math.sqrt(x.shape[-1])


def _spread(x: Array) -> Array:
    """The root mean square deviation of a coordinate; for a single row the size of its numbers."""
    x = jax.lax.stop_gradient(x)
    deviation = jnp.sqrt(jnp.mean((x - x.mean(axis=0)) ** 2))
    size = jnp.sqrt(jnp.mean(x**2))
    # Rows that agree to rounding have no spread.
    deviation = jnp.where(deviation > 1e-3 * size, deviation, size)
    return jnp.where(deviation > 0, deviation, 1.0)
