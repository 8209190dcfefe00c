"""Finite-difference score matching: no derivative in the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.energy import Energy, coarsest_rounding
from numpyro_score.losses.base import positive
from numpyro_score.losses.chunks import rows_at_once
from numpyro_score.losses.rounding import density_noise, log_density_at, warn_of_flat_data
from numpyro_score.losses.ssm import Projection, check_projections, draw_directions
from numpyro_score.losses.terms import require_flat
from numpyro_score.operators import full_precision

__all__ = ["FSM"]


_COARSE = 0.1  # relative error of a difference
_STEP_BITS = 3  # after the leading one


@dataclass(frozen=True)
class FSM:
    """Finite-difference score matching [Pang et al. 2020]: density values alone, no derivative in the data.

    With random directions v, E[vvᵀ] = I, each row's value is

    - sliced (sigma not given): [f(x+εv) + f(x−εv) − 2f(x)]/ε² + [f(x+εv) − f(x−εv)]²/(8ε²), which tends to plain
      :class:`~numpyro_score.SSM` with the same v as ε², and so estimates J + O(ε²);
    - denoising: ½{[f(x̃+εv) − f(x̃−εv)]/(2ε) + v·z/σ}² − D/(2σ²) with x̃ = x + σz and z ~ N(0, I), which tends to the
      plain :class:`~numpyro_score.DSM` and estimates J of the data blurred by σ, + O(ε²).

    They cost 3 and 2 densities and one gradient of those in θ. Rounding in f is divided by ε² or ε, and in the mean
    over N rows by √N as well, while the O(ε²) stays. The default step balances the two for a log density whose k-th
    derivative along v is D/spread^k for even k and √D/spread^k for odd k, and whose values have rounding errors of
    τ = ¼η(1 + √D). Here η is the machine precision of the coarsest operation between data and density, so layers in
    bfloat16 lengthen the step. For 1,000 rows in three columns it is about 1 % of their spread in float32, 12 % where
    operations have 10 bits, and 1e-4 in float64. The step is one for all columns, and the default follows the one of
    least spread: standardise columns of very different units. Matrices are multiplied in full precision, whatever
    `jax.default_matmul_precision` says. A density that is coarser than its operations tell, or much larger than √D,
    may need a larger ε, and the fit says which. Returns (N,) values, the mean over projections.

    Args:
        epsilon: ε, in the units of the data; ‖εv‖ is ε√D. Default: (12 √6 τ/(D √N))^¼ spread (sliced) or
            (3 √2 τ/√(N D))^⅓ spread (denoising), with spread the least standard deviation of a column.
        sigma: σ of the denoising form, in the units of the data.
        num_projections: M, directions per row.
        projection: the law of v, as in :class:`~numpyro_score.SSM`.

    Raises:
        ValueError: for a setting out of range; and, as soon as the data are known, where rounding leaves nothing of
            the differences.
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
        check_projections(self)

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_flat(energy, "FSM")
        if energy.is_concrete:
            self.check(energy)
        x, m = energy.data, self.num_projections
        epsilon = self.step(energy)
        direction_key, noise_key = jax.random.split(rng_key)
        v = draw_directions(self.projection, direction_key, (m, *x.shape), x.dtype)
        if self.sigma is not None:
            noise = random.normal(noise_key, x.shape, x.dtype)
            noisy = x + self.sigma * noise
            ahead, behind = jnp.split(
                energy.log_density(jnp.concatenate([noisy + epsilon * v, noisy - epsilon * v])), 2
            )
            residual = (ahead - behind) / (2 * epsilon) + jnp.sum(v * noise, axis=-1) / self.sigma
            return jnp.mean(0.5 * residual**2, axis=0) - energy.dim / (2 * self.sigma**2)
        f = energy.log_density(jnp.concatenate([x[None], x + epsilon * v, x - epsilon * v]))
        ahead, behind = jnp.split(f[1:] - f[0], 2)
        return jnp.mean((ahead + behind) / epsilon**2 + (ahead - behind) ** 2 / (8 * epsilon**2), axis=0)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What bounds the memory of an accelerator; all rows at the default step, which depends on all of them."""
        if self.epsilon is None:
            return None
        return rows_at_once(energy, 2 * self.num_projections + (self.sigma is None), None)

    def check(self, energy: Energy) -> None:
        """Refuses a step that rounding destroys; needs concrete values.

        Warns:
            UserWarning: if the density is rounded so coarsely that a difference is wrong by a tenth, and, without
                `sigma`, if the data have a constant column or one that follows from the others.

        Raises:
            ValueError: if the rounding error of a difference quotient is as large as the loss of a Gaussian of the
                data's spread.
        """
        if isinstance(self.epsilon, jax.core.Tracer):
            return
        if self.sigma is None:
            warn_of_flat_data("FSM", energy, "the length of its step")
        usable = energy.usable()[0]
        x = usable.data
        epsilon, spreads = float(self.step(usable)), _spreads(usable)
        # What rounding of f itself, and of x where its offset is large, are proportional to.
        size = float(jnp.median(jnp.abs(log_density_at(energy, x))) + jnp.linalg.norm(x.mean(axis=0) / spreads))
        eta, order = float(jnp.finfo(x.dtype).eps), 2 if self.sigma is None else 1
        # Of the second difference against tr ∇s, of the first against v·s, both as for a Gaussian of these spreads.
        error = (4 if order == 2 else 1) * eta * size / epsilon**order
        noise = density_noise(energy, x, spreads)
        coarse = noise > 8 * eta * size  # than its dtype
        if coarse:
            error = max(error, (math.sqrt(6) if order == 2 else math.sqrt(0.5)) * noise / epsilon**order)
        natural = float(jnp.sum(spreads**-2.0)) ** (order / 2)
        if error > natural:
            least = (error / natural) ** (1 / order) * epsilon * 10 ** (1 / order)
            raise ValueError(
                f"FSM with epsilon={epsilon:.3g} in {x.dtype} loses everything to rounding: for log densities of about "
                f"{size:.3g} the difference quotient is wrong by {error:.2g}; take epsilon of at least {least:.1g}, "
                "centre the data, take constants off the energy, or enable float64."
                + (f" It seems to be rounded to about {noise:.2g}: compute it in full precision." if coarse else "")
            )
        if coarse and error > _COARSE * natural:
            needed = (error / natural / _COARSE) ** (1 / order) * epsilon
            names = ", ".join(f"'{a.name}'" for a in energy.arrays)
            warnings.warn(
                f"The log density of {names} seems to be rounded to about {noise:.2g}, {noise / eta / size:.0f} times "
                f"as coarsely as {x.dtype} would: FSM with epsilon={epsilon:.2g} is wrong by about "
                f"{error / natural:.0%} of its size. Take epsilon={needed:.2g}, or compute the density in full "
                "precision, or use SSM.",
                stacklevel=2,
            )

    def step(self, energy: Energy) -> Array | float:
        """ε for the rows of an energy: the one given, or the default, which does not depend on the parameters."""
        if self.epsilon is not None:
            return self.epsilon
        x = energy.data
        n, d = x.shape
        eta = max(float(jnp.finfo(x.dtype).eps), coarsest_rounding(energy.log_density, x))
        n = energy.over_devices(jax.lax.psum, n)
        # A quarter of an ulp is the standard deviation of one rounding; log densities vary by about √D.
        noise = 0.25 * eta * (1 + math.sqrt(d)) / math.sqrt(n)
        if self.sigma is None:
            relative = (12 * math.sqrt(6) * noise / d) ** (1 / 4)
        else:
            relative = (3 * math.sqrt(2) * noise / math.sqrt(d)) ** (1 / 3)
        step = relative * jnp.min(_spreads(energy))
        # In few bits, so that x ± ε is not rounded: by signs v the same error of ε would stand in every row.
        return jax.lax.reduce_precision(step, jnp.finfo(x.dtype).nexp, _STEP_BITS)


def _spreads(energy: Energy) -> Float[Array, "d"]:
    """The standard deviation of each column; where rows agree to rounding, the size of all the numbers."""
    x, over_devices = jax.lax.stop_gradient(energy.data), energy.over_devices
    mean, square = over_devices(jax.lax.pmean, (x.mean(axis=0), jnp.mean(x**2)))
    deviation, size = jnp.sqrt(over_devices(jax.lax.pmean, jnp.mean((x - mean) ** 2, axis=0))), jnp.sqrt(square)
    varies = deviation > 10 * jnp.finfo(x.dtype).eps * over_devices(jax.lax.pmax, jnp.abs(x).max(axis=0))
    # A column that does not vary says nothing, unless none does.
    largest = jnp.max(jnp.where(varies, deviation, 0.0))
    other = jnp.where(largest > 0, largest, jnp.where(size > 0, size, 1.0))
    return jnp.where(varies, deviation, other)
