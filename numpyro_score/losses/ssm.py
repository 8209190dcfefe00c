"""Sliced score matching."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.energy import Energy, RowWeight
from numpyro_score.losses.base import set_counts, true_or_false
from numpyro_score.losses.boundaries import check_boundary, check_boundary_weight
from numpyro_score.losses.chunks import rows_at_once, rows_in_cache
from numpyro_score.losses.terms import sliced_terms
from numpyro_score.operators import score_and_directional

__all__ = ["SSM"]

Projection = Literal["rademacher", "gaussian", "sphere"]


@dataclass(frozen=True)
class SSM:
    """Sliced score matching [Song et al. 2019]: the trace of ISM seen along random directions v.

    With E[vvᵀ] = I each row's value is unbiased for ISM's on the same row:

    - variance-reduced (default): ½‖s‖² + v·∇s v, whose noise is that of the trace alone;
    - plain: ½(v·s)² + v·∇s v, cheaper, as only derivatives along v are needed.

    Directions are drawn afresh for every row and every call. Returns (N,) values, the mean over projections.

    Args:
        num_projections: M, directions per row.
        projection: the law of v. "rademacher" signs have the least variance for the trace: Var(v·Kv) =
            2 Σ_{i≠j} K_ij². "gaussian" is N(0, I). "sphere" is uniform on the sphere of radius √D, not 1: other
            libraries differ here by a factor D.
        variance_reduced: which of the two forms.
        boundary_weight: as in :class:`~numpyro_score.ISM`, for data with a boundary.
        allow_kinks: do not look for jumps of the score among the data, which make the loss wrong.

    Raises:
        ValueError, TypeError: for fewer than one projection, an unknown law, or a boundary_weight as ISM refuses it.
    """

    num_projections: int = 1
    projection: Projection = "rademacher"
    variance_reduced: bool = True
    boundary_weight: Callable[[Array], Array] | RowWeight | None = None
    allow_kinks: bool = False

    no_kinks: ClassVar[str] = "the derivative of the score leaves the jump out"

    def __post_init__(self) -> None:
        check_projections(self)
        true_or_false("SSM", variance_reduced=self.variance_reduced, allow_kinks=self.allow_kinks)
        check_boundary_weight("SSM", self.boundary_weight)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        x = energy.data
        v = draw_directions(self.projection, rng_key, (self.num_projections, *x.shape), x.dtype)
        first, second = sliced_terms(energy, v, self.boundary_weight, score=self.variance_reduced)
        if self.variance_reduced:
            return 0.5 * jnp.sum(first**2, axis=-1) + jnp.mean(second, axis=0)
        return jnp.mean(0.5 * first**2 + second, axis=0)

    def by_coordinate(self, energy: Energy, rng_key: Array) -> Float[Array, "n d"]:
        """The part of each coordinate, ½ s_j² + v_j (∇s v)_j, on R^D, of the variance-reduced form: (N, D)."""
        x = energy.data
        v = draw_directions(self.projection, rng_key, (self.num_projections, *x.shape), x.dtype)
        score, curvature = score_and_directional(energy.row_log_density, x, v)
        return 0.5 * score**2 + jnp.mean(v * curvature, axis=0)

    def check(self, energy: Energy) -> None:
        """Looks at the boundary: see :func:`~numpyro_score.losses.boundaries.check_boundary`."""
        check_boundary("SSM", energy, self.boundary_weight)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, where the variance-reduced form gains nothing by chunks, or bounds the memory."""
        in_cache = None if self.variance_reduced else rows_in_cache(energy, self.num_projections)
        return rows_at_once(energy, 1 + 2 * self.num_projections, in_cache)


def check_projections(loss: Any) -> None:
    """Raises ValueError for fewer than one projection or an unknown law, TypeError for a number that is no integer."""
    set_counts(loss, "num_projections")
    if loss.projection not in ("rademacher", "gaussian", "sphere"):
        name = type(loss).__name__
        raise ValueError(f"{name} has no projection {loss.projection!r}: use 'rademacher', 'gaussian' or 'sphere'.")


def draw_directions(projection: Projection, rng_key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Directions v of the given law with E[vvᵀ] = I over the last axis."""
    if projection == "rademacher":
        return _draw_signs(rng_key, shape, dtype)
    v = random.normal(rng_key, shape, dtype)
    if projection == "gaussian":
        return v
    return v * (shape[-1] ** 0.5 / jnp.linalg.norm(v, axis=-1, keepdims=True))


def _draw_signs(rng_key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Signs ±1 from one random bit each; `jax.random.rademacher` takes 32, which shows in the time of a step."""
    n = math.prod(shape)
    words = random.bits(rng_key, (-(-n // 32), 1))
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (1 - 2 * bits.astype(dtype)).reshape(-1)[:n].reshape(shape)
