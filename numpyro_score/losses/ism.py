"""Implicit score matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, RowWeight
from numpyro_score.losses.base import true_or_false
from numpyro_score.losses.boundaries import check_boundary, check_boundary_weight
from numpyro_score.losses.chunks import narrowness, rows_at_once
from numpyro_score.losses.terms import exact_terms, sliced_terms

__all__ = ["ISM"]


@dataclass(frozen=True)
class ISM:
    """Implicit score matching, ½‖s(x)‖² + tr ∇s(x) [Hyvärinen 2005, eq. 4].

    The mean over the data estimates the Fisher divergence ½ E‖∇log p − s‖² up to a constant of the data, without
    bias and without randomness: the trace is exact. Costs D + 2 densities and their gradient; choose
    :class:`~numpyro_score.SSM` where D is large. Returns (N,) values.

    On other supports than R^D, which the data site's distribution declares, the same objective is taken where the data
    live, and the normaliser drops out as before:

    - bounded data, each coordinate with its own bounds: ½ h_j s_j² + h_j ∂_j s_j + h_j' s_j summed over coordinates,
      with a weight h that vanishes at the boundary [Hyvärinen 2007; Yu, Drton & Shojaie 2019];
    - the unit sphere: ½‖∇f‖² + Δf with the gradient and Laplacian of the sphere [Mardia, Kent & Laha 2016];
    - the simplex: as the sphere by x = z², with the weight h(min_j x_j) [Scealy & Wood 2022];
    - any other support: in the unconstrained coordinates of NumPyro's `biject_to`, Jacobian included.

    Args:
        boundary_weight: h, an increasing function of the distance to the boundary, zero at zero and with a finite
            limit. Default: the distance, at most 1. The estimates are consistent for any such h where the density is
            finite at the boundary; one with a pole there, as a gamma law of shape below 1, needs an h that falls
            faster, such as the squared distance. Their variance depends on h, and with data far from unit scale on the
            cap.
        allow_kinks: do not look for jumps of the score among the data, which make the loss wrong.

    Raises:
        ValueError, TypeError: for a boundary_weight that does not vanish at zero, or is no function of JAX arrays.

    Warns:
        UserWarning: at the start of a fit, if the density of the data plainly grows towards the boundary without end.
    """

    boundary_weight: Callable[[Array], Array] | RowWeight | None = None
    allow_kinks: bool = False

    no_kinks: ClassVar[str] = "the trace of the score's derivative leaves the jump out"

    def __post_init__(self) -> None:
        check_boundary_weight("ISM", self.boundary_weight)
        true_or_false("ISM", allow_kinks=self.allow_kinks)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        score, laplacian = exact_terms(energy, self.boundary_weight)
        return 0.5 * jnp.sum(score**2, axis=-1) + laplacian

    def by_coordinate(self, energy: Energy, rng_key: Array) -> Float[Array, "n d"]:
        """The part of each coordinate, ½ s_j² + ∂_j s_j, on R^D: (N, D); costs D Hessian-vector products at once."""
        v = jnp.broadcast_to(jnp.eye(energy.dim, dtype=energy.dtype)[:, None], (energy.dim, *energy.data.shape))
        score, second = sliced_terms(energy, v, score=True)
        return 0.5 * score**2 + second.T

    def check(self, energy: Energy) -> None:
        """Looks at the boundary: see :func:`~numpyro_score.losses.boundaries.check_boundary`."""
        check_boundary("ISM", energy, self.boundary_weight)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """Rows whose Jacobians, D numbers for every intermediate, still fit the cache, or bound the memory."""
        # On a CPU the pass is bound by memory. At width 128, 256 // D rows make intermediates of 128 kB; 1024 // D took
        # 1.1 to 2 times as long at D = 2, 16 and 64.
        return rows_at_once(energy, energy.dim + 2, max(256 * narrowness(energy) // energy.dim, 4))
