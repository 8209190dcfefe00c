"""Leapfrog steps of rows, as pure functions, and their inverses.

A step of size ε moves positions x and velocities v of unit mass under a force F(x) = ∇f(x):

    v½ = v + ½ε F(x),   x' = x + ε v½,   v' = v½ + ½ε F(x').

It is reversible, keeps volume (det = 1), and changes f(x) − ½‖v‖² by O(ε²) over a given time. The generalised step
[Levy, Hoffman & Sohl-Dickstein 2018; Dai et al. 2019] multiplies v, x and v by exp of a network's output before each of
the three shears; its log determinant is the sum of these outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Phase", "Scaling", "leapfrog", "leapfrog_inverse"]

Rows = Float[Array, "*batch d"]


class Scaling(NamedTuple):
    """Log scales of the generalised leapfrog step, each (..., D); functions that output zero give the plain step.

    A network goes in as a pytree that can be called, such as `jax.tree_util.Partial(network, params)`.
    """

    velocity: Callable[[Array, Array], Array]  # from x and the force there
    position: Callable[[Array], Array]  # from the velocity


class Phase(NamedTuple):
    """Where rows are, with what was computed there, so that the next step need not compute it again."""

    x: Float[Array, "*batch d"]
    v: Float[Array, "*batch d"]
    at: Any  # what `evaluate` gave at x


def leapfrog(
    evaluate: Callable[[Rows], Any],
    force: Callable[[Any], Rows],
    step_size: float | Array,
    phase: Phase,
    scaling: Scaling | None = None,
) -> tuple[Phase, Float[Array, "*batch"]]:
    """One step, with one evaluation: the new phase and the log determinant of each row, zero without scaling.

    Args:
        evaluate: from rows x (..., D) to a pytree, for instance the score there.
        force: from what `evaluate` gave to F(x), (..., D).
        step_size: ε, a number or an array that broadcasts to (..., D).
        phase: with `at = evaluate(x)`.
        scaling: of the generalised step.
    """
    x, v, at = phase
    log_det = jnp.zeros_like(x[..., 0])
    if scaling is not None:
        log_scale = scaling.velocity(x, force(at))
        v, log_det = v * jnp.exp(log_scale), log_det + log_scale.sum(-1)
    v = v + 0.5 * step_size * force(at)
    if scaling is not None:
        log_scale = scaling.position(v)
        x, log_det = x * jnp.exp(log_scale), log_det + log_scale.sum(-1)
    x = x + step_size * v
    at = evaluate(x)
    if scaling is not None:
        log_scale = scaling.velocity(x, force(at))
        v, log_det = v * jnp.exp(log_scale), log_det + log_scale.sum(-1)
    return Phase(x, v + 0.5 * step_size * force(at), at), log_det


def leapfrog_inverse(
    evaluate: Callable[[Rows], Any],
    force: Callable[[Any], Rows],
    step_size: float | Array,
    phase: Phase,
    scaling: Scaling | None = None,
) -> tuple[Phase, Float[Array, "*batch"]]:
    """The inverse of :func:`leapfrog` in the same terms; the log determinant is that of the forward step."""
    x, v, at = phase
    log_det = jnp.zeros_like(x[..., 0])
    v = v - 0.5 * step_size * force(at)
    if scaling is not None:
        log_scale = scaling.velocity(x, force(at))
        v, log_det = v * jnp.exp(-log_scale), log_det + log_scale.sum(-1)
    x = x - step_size * v
    if scaling is not None:
        log_scale = scaling.position(v)
        x, log_det = x * jnp.exp(-log_scale), log_det + log_scale.sum(-1)
    at = evaluate(x)
    v = v - 0.5 * step_size * force(at)
    if scaling is not None:
        log_scale = scaling.velocity(x, force(at))
        v, log_det = v * jnp.exp(-log_scale), log_det + log_scale.sum(-1)
    return Phase(x, v, at), log_det
