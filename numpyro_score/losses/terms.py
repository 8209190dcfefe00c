"""The two terms of the Hyvärinen objective at an energy's data, whatever their support."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score import operators
from numpyro_score.energy import FLAT, Energy, RowWeight, make_frame, weight_at_boundary
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["check_boundary_weight", "check_row_weight", "data_frame", "exact_terms", "require_flat", "sliced_terms"]

Weight = Callable[[Array], Array] | RowWeight


def exact_terms(energy: Energy, boundary_weight: Weight | None = None) -> tuple[Float[Array, "n d"], Float[Array, "n"]]:
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
    energy: Energy, v: Float[Array, "m n d"], boundary_weight: Weight | None = None, *, score: bool
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


def check_boundary_weight(owner: str, weight: Weight | None) -> None:
    """Raises unless `weight` is None or vanishes at the boundary, which is what makes the normaliser drop out."""
    if weight is None or (isinstance(weight, RowWeight) and callable(weight.h)):
        return
    if not callable(weight):
        raise TypeError(
            f"{owner} needs a boundary_weight that is a RowWeight or a function of distances, got {weight!r}."
        )
    with jax.ensure_compile_time_eval():
        distance = jnp.array([0.0, 1.0])
        try:
            h, _ = jax.jvp(weight, (distance,), (jnp.ones(2),))
        except jax.errors.TracerArrayConversionError as error:
            raise TypeError(f"{owner}'s boundary_weight cannot be traced by JAX: write it with jax.numpy.") from error
        if jnp.shape(h) != (2,):
            raise ValueError(
                f"{owner}'s boundary_weight gave shape {jnp.shape(h)} for distances of shape (2,): return one number "
                "for each."
            )
        if not (abs(h[0]) < 1e-6 and 0 < h[1] < math.inf):
            raise ValueError(
                f"{owner}'s boundary_weight is {h[0]:g} at distance 0 and {h[1]:g} at 1: it must be zero at the "
                "boundary and positive inside, e.g. lambda distance: jnp.minimum(distance, 1.0)."
            )


def check_row_weight(owner: str, energy: Energy, weight: Weight | None) -> None:
    """Raises ValueError for a `RowWeight` that does not vanish where rows are moved to the boundary."""
    if energy.flat or not isinstance(weight, RowWeight):
        return
    usable, weights = energy.usable()
    x = usable.data[jnp.argsort(weights == 0)[:_LOOKED_AT]]
    bounds = (b[: len(x)] for b in energy.bounds(usable.num_rows))
    looked = partial(weight_at_boundary, energy.blocks, tuple(energy.supports.values()), weight)
    highest, mean = fetch(run_compiled(looked, x, *bounds))
    if not highest <= _VANISHES * mean:
        raise ValueError(
            f"{owner}'s RowWeight is {highest:.3g} at the boundary and {mean:.3g} at the data, on average: it must be "
            "zero wherever one of the distances is, e.g. RowWeight(lambda d, x: jnp.minimum(d, 1).prod(-1))."
        )


_LOOKED_AT = 64  # rows
_VANISHES = 1e-2  # of the mean weight of the data; rows are moved to the boundary within a ten thousandth


def data_frame(energy: Energy, x: Array, boundary_weight: Weight | None) -> operators.Frame | None:
    """The frame (A, b) of the support at rows x (N, D); None on R^D, where A = I and b = 0."""
    energy.require_continuous("This loss")
    if energy.flat:
        return None
    lower, upper = energy.bounds(x.shape[0])
    return make_frame(energy.blocks, list(energy.supports.values()), x, lower, upper, boundary_weight)
