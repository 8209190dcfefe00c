"""Diffusions with any drift, run backwards in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.diffusion.chains import advance, require_finite, run_chains, start
from numpyro_score.energy import check_rows, rows_text
from numpyro_score.losses.base import as_numbers, true_or_false
from numpyro_score.programs import compiled
from numpyro_score.random import Key, as_key

__all__ = ["reverse_sde"]

RowsAndTime = Callable[[Float[Array, "n d"], Float[Array, ""]], Float[Array, "n d"]]


def reverse_sde(
    drift: RowsAndTime,
    diffusion: Callable[[Float[Array, ""]], Array],
    score: RowsAndTime,
    rng_key: Key,
    x: Any,
    times: Any,
    *,
    progress_bar: bool = False,
) -> Float[Array, "n d"]:
    r"""Draws from the past of :math:`dx = f(x, t)\, dt + g(t)\, dw`, given draws of its present [Anderson 1982].

    If x at time t has the density :math:`p_t`, the same laws are passed in the other direction by

    .. math:: dx = (f(x, t) - g(t)^2 \nabla \log p_t(x))\, dt + g(t)\, d\bar w,

    which is followed by Euler and Maruyama's steps of first order. For linear drifts :func:`~numpyro_score.diffuse`
    has better methods.

    Args:
        drift: f, from rows (N, D) and a time () to (N, D).
        diffusion: g, from a time () to a number or one for each coordinate, (D,). It must not depend on x: the
            equation would have more terms.
        score: ∇ log p_t, from rows (N, D) and a time () to (N, D).
        rng_key: a key.
        x: draws at `times[0]`, (N, D).
        times: (S + 1,), falling.
        progress_bar: whether to show one.

    Returns:
        Draws at `times[-1]`, (N, D).

    Raises:
        TypeError: for what is no function, no numbers, or x of less than single precision.
        ValueError: for times that do not fall, x that is not rows of finite numbers, or functions that return another
            shape.
        FloatingPointError: if a draw is not finite, naming the step and the chains.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_score import reverse_sde
        >>> x = jax.random.normal(jax.random.key(0), (10_000, 1))  # the stationary law of dx = -x dt + √2 dw
        >>> x = reverse_sde(lambda x, t: -x, lambda t: jnp.sqrt(2.0), lambda x, t: -x, 1, x, jnp.linspace(1, 0, 101))
        >>> bool(abs(x.std() - 1) < 0.03)
        True
    """
    key = as_key(rng_key, "write reverse_sde(drift, diffusion, score, jax.random.key(0), x, times)")
    true_or_false("reverse_sde", progress_bar=progress_bar)
    for name, given in {"drift": drift, "diffusion": diffusion, "score": score}.items():
        if not callable(given):
            raise TypeError(f"reverse_sde needs a function as {name}, got {given!r}: write e.g. lambda t: {given!r}.")
    check_rows("x", x)
    real = jnp.result_type(float)
    t, x = as_numbers("reverse_sde", "times", times), jnp.asarray(x, real)
    if t.ndim != 1 or len(t) < 2 or not (np.isfinite(t).all() and (np.diff(t) < 0).all()):
        raise ValueError("reverse_sde needs at least two times that fall, from that of x to the past.")
    if x.ndim != 2:
        raise ValueError(f"reverse_sde needs rows x of shape (N, D), got shape {x.shape}.")
    if not isinstance(x, jax.core.Tracer) and (bad := rows_text(~np.isfinite(np.asarray(x)).all(-1))):
        raise ValueError(f"reverse_sde got {bad} of x with NaN or infinity: pass finite rows.")

    def step(_: Any, now: tuple[Array, Array], x: Array, past: Array, key: Array) -> tuple[Array, Array]:
        t, dt = now
        g, f, s = jnp.asarray(diffusion(t), x.dtype), drift(x, t), score(x, t)
        if g.shape not in ((), x.shape[1:]):
            raise ValueError(
                f"reverse_sde's diffusion gave shape {g.shape}: return one number, or one for each coordinate, "
                f"{x.shape[1:]}."
            )
        for name, value in {"drift": f, "score": s}.items():
            if jnp.shape(value) != x.shape:
                raise ValueError(
                    f"reverse_sde's {name} gave shape {jnp.shape(value)} for rows of shape {x.shape}: return the same."
                )
        return x - (f - g**2 * s) * dt + g * jnp.sqrt(dt) * random.normal(key, x.shape, x.dtype), past

    plan = (jnp.asarray(t[:-1], real), jnp.asarray(-np.diff(t), real))
    state, last = start(x), jnp.asarray(0)
    program = compiled(partial(advance, step, None), plan, key, state, last, last)
    state = run_chains(lambda *at: program(plan, key, *at), state, len(t) - 1, progress_bar)
    require_finite(state.u, state.failed, [f"time {v:.3g}" for v in t])
    return state.u
