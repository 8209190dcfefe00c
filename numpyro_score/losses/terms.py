"""The two terms of the Hyvärinen objective at an energy's data, whatever their support."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score import operators
from numpyro_score.energy import FLAT, BoundaryWeight, Energy, make_frame

__all__ = ["data_frame", "exact_terms", "require_flat", "sliced_terms"]


def exact_terms(
    energy: Energy, boundary_weight: BoundaryWeight | None = None
) -> tuple[Float[Array, "n d"], Float[Array, "n"]]:
    """A ∇f and tr(A ∇²f A) + b·∇f at the data, (N, D) and (N,), in the frame (A, b) of the support.

    On R^D these are the score and its divergence. Half the square of the first plus the second is the Hyvärinen
    objective of each row.

    Args:
        energy: at its data.
        boundary_weight: h as a function of the distance to the boundary, where the support has one; the distance
            itself, at most 1, if not given.
    """
    x = energy.data
    frame = data_frame(energy, x, boundary_weight)
    # The forward Laplacian differentiates values, which a score term does not have.
    return operators.value_score_laplacian(energy.row_log_density, x, frame, forward=energy.has_density)[1:]


def sliced_terms(
    energy: Energy, v: Float[Array, "m n d"], boundary_weight: BoundaryWeight | None = None, *, score: bool
) -> tuple[Array, Float[Array, "m n"]]:
    """What :func:`exact_terms` gives, seen along M directions v of each row, (M, N, D), with E[vvᵀ] = I.

    The second is v·A ∇²f A v + b·∇f, (M, N). The first is A ∇f, (N, D), if `score`, and else v·A ∇f, (M, N), which is
    cheaper: only derivatives along v are taken.
    """
    x, f = energy.data, energy.row_log_density
    frame = data_frame(energy, x, boundary_weight)
    along = v if frame is None else frame.apply(v)
    if score:
        slope, curvature = operators.score_and_directional(f, x, along)
        second = jnp.sum(along * curvature, axis=-1)
        if frame is not None:
            second += jnp.sum(frame.drift * slope, axis=-1)
            slope = frame.apply(slope)
        return slope, second
    first, second = operators.sliced_derivatives(f, x, along)
    if frame is not None:
        second += jax.jvp(f, (x,), (frame.drift,))[1]
    return first, second


LOSS_REMEDY = "use ISM or SSM, or transform the data to the real line in the model, with the Jacobian as a factor"


def require_flat(energy: Energy, owner: str, remedy: str = LOSS_REMEDY) -> None:
    """Raises where the data are discrete, or have a boundary or curvature, which `owner` cannot respect.

    Raises:
        TypeError: for discrete data.
        NotImplementedError: for the others.
    """
    energy.require_continuous(owner)
    for a in energy.arrays:
        if a.support.kind not in FLAT:
            raise NotImplementedError(
                f"{owner} would move the data off the support of site '{a.name}' ({a.support.kind}): {remedy}."
            )


def data_frame(energy: Energy, x: Array, boundary_weight: BoundaryWeight | None) -> operators.Frame | None:
    """The frame (A, b) of the support at rows x (N, D); None on R^D, where A = I and b = 0."""
    energy.require_continuous("This loss")
    if energy.flat:
        return None
    lower, upper = energy.bounds(x.shape[0])
    return make_frame(energy.blocks, list(energy.supports.values()), x, lower, upper, boundary_weight)
