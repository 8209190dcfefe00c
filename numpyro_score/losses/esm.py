"""Explicit score matching: against a score that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import AnyArray, Energy, RowWeight
from numpyro_score.losses.base import positive, required, true_or_false
from numpyro_score.losses.terms import data_frame

__all__ = ["ESM", "parzen_score"]


@dataclass(frozen=True)
class ESM:
    """Explicit score matching, ½‖s(x) − t(x)‖² with t the known score of the target [Hyvärinen 2005, eq. 2].

    The mean over draws of the target is the Fisher divergence itself: the Hyvärinen objective plus ½ E‖t‖². The rows
    must be draws of the law whose score is t. Costs one score and its gradient. Returns (N,) values.

    On other supports it is ½‖A(s − t)‖² with the A of :class:`~numpyro_score.ISM`'s objective there: on a sphere only
    what is tangent counts, and rows near a boundary weigh less. It then differs from ISM by a constant, as on R^D.

    Args:
        target_score: t, a function of rows (N, D) that returns (N, D), e.g. :func:`~numpyro_score.parzen_score`, in
            the coordinates of :meth:`~numpyro_score.Energy.flatten`: on a simplex it is the score of √x, Jacobian
            included.
        boundary_weight: as in :class:`~numpyro_score.ISM`. It need not vanish at the boundary here.
        allow_kinks: do not look for jumps of the score whose place depends on the parameters, which bias the gradient.

    Raises:
        TypeError: if target_score is not callable.
        ValueError: if it returns another shape.
    """

    target_score: Callable[[Array], Array] = None  # type: ignore[assignment]
    boundary_weight: Callable[[Array], Array] | RowWeight | None = None
    allow_kinks: bool = False

    no_moving_kinks: ClassVar[str] = "its gradient leaves out that the jump moves with the parameters"

    def __post_init__(self) -> None:
        required(
            "ESM",
            "target_score",
            self.target_score,
            "the known score of the law of the data, a function of rows: for data alone use ISM(), or start from "
            "ESM(parzen_score(x, sigma))",
        )
        if not callable(self.target_score):
            raise TypeError(f"ESM needs a target_score that is a function of rows, got {self.target_score!r}.")
        true_or_false("ESM", allow_kinks=self.allow_kinks)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        x = energy.data
        target = jnp.asarray(self.target_score(x), x.dtype)
        if target.shape != x.shape:
            raise ValueError(
                f"ESM's target_score gave shape {target.shape} for rows of shape {x.shape}: return one for each row."
            )
        difference = energy.score(x) - target
        frame = data_frame(energy, x, self.boundary_weight)
        return 0.5 * jnp.sum((difference if frame is None else frame.apply(difference)) ** 2, axis=-1)


@dataclass(frozen=True, eq=False)
class _ParzenScore:
    data: Float[Array, "b d"]
    sigma: float

    def __repr__(self) -> str:
        return f"parzen_score(data of shape {self.data.shape}, sigma={self.sigma})"

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        if x.ndim != 2:
            raise ValueError(
                f"The score of parzen_score takes rows of shape (N, {self.data.shape[-1]}), got {x.shape}: pass one "
                "row as x[None]."
            )
        if x.shape[-1] != self.data.shape[-1]:
            raise ValueError(
                f"parzen_score was made of data with {self.data.shape[-1]} columns, and asked at rows with "
                f"{x.shape[-1]}: give both as many."
            )

        def of_row(row: Array) -> Array:
            away = (self.data - row) / self.sigma
            return jax.nn.softmax(-0.5 * jnp.sum(away**2, axis=-1)) @ away / self.sigma

        # A few million differences at a time.
        return jax.lax.map(of_row, x, batch_size=max(min(2**22 // self.data.size, len(x)), 1))


def parzen_score(data: Float[AnyArray, "b d"], sigma: float) -> Callable[[Array], Array]:
    """The score of the Parzen density (1/B) Σ_b N(x; x_b, σ²I) of data (B, D), as a target for ESM.

    On draws x_b + σε of that density, ESM with this target and plain DSM at σ differ by a constant of the parameters
    alone, on average [Vincent 2011]. Costs B D for each row. The result maps rows (N, D) to (N, D).

    Raises:
        ValueError: if the data are not (B, D) with B ≥ 1 or hold NaN or infinity, or sigma is not a positive number.
    """
    data = jnp.asarray(data, jnp.result_type(float))
    if data.ndim != 2 or data.size == 0:
        raise ValueError(f"parzen_score needs data of shape (B, D), got {data.shape}.")
    if not bool(jnp.isfinite(data).all()):
        raise ValueError("parzen_score got data with NaN or infinity: drop these rows.")
    positive("parzen_score", "sigma", sigma)
    return _ParzenScore(data, sigma)
