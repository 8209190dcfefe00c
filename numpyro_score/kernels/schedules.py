"""Step sizes that change with time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Schedule", "cyclical_schedule", "polynomial_schedule"]

Schedule = Callable[[Int[Array, "*chains"]], Float[Array, "*chains"]]
"""From the number of steps taken, warm-up included, to the step size."""


def polynomial_schedule(a: float, b: float, gamma: float) -> Schedule:
    r"""The step sizes :math:`h_t = a (b + t)^{-\gamma}` [Welling & Teh 2011].

    Averages over draws weighted by h_t converge to those under the posterior for γ in (0, 1], fastest at γ = 1/3
    [Teh, Thiery & Vollmer 2016]. Unweighted draws are biased by about the mean step size.

    Args:
        a: scale, in squared units of the parameters, times (steps)^γ.
        b: offset in steps.
        gamma: the power γ.

    Raises:
        ValueError: unless a and b are positive and γ lies in (0, 1].

    Example:
        >>> import numpy as np
        >>> from numpyro_score import polynomial_schedule
        >>> np.round(polynomial_schedule(1.0, 8.0, 1 / 3)(np.array([0, 19])), 4).tolist()  # 8 and 27 steps
        [0.5, 0.3333]
    """
    if not (a > 0 and b > 0 and 0 < gamma <= 1):
        raise ValueError(
            f"polynomial_schedule takes positive a and b and a gamma in (0, 1], got a={a}, b={b}, gamma={gamma}."
        )
    return functools.partial(_polynomial, a, b, gamma)


def cyclical_schedule(initial: float, cycle_length: int) -> Schedule:
    r"""The step sizes :math:`h_t = \tfrac12 h_0 \{1 + \cos(\pi\, (t \bmod L) / L)\}` [Zhang et al. 2020].

    Long steps at the start of a cycle find other modes, short ones at its end sample the mode that was found.

    Args:
        initial: h₀, in squared units of the parameters.
        cycle_length: L, in steps.

    Raises:
        ValueError: unless both are positive.
    """
    if not (initial > 0 and cycle_length > 0):
        raise ValueError(
            f"cyclical_schedule takes a positive initial step size and cycle_length, got {initial} and {cycle_length}."
        )
    return functools.partial(_cyclical, initial, cycle_length)


def _polynomial(a: float, b: float, gamma: float, t: Array) -> Array:
    return a * (b + t) ** -gamma


def _cyclical(initial: float, cycle_length: int, t: Array) -> Array:
    return 0.5 * initial * (1.0 + jnp.cos(jnp.pi * (t % cycle_length) / cycle_length))
