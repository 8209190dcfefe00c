"""Optimisers: the default one, and Optax's with a line search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import optax_to_numpyro

__all__ = ["adam", "decaying_adam", "default_optimizer", "optax_optimizer"]

_PEAK_RATE = 0.03


def default_optimizer(num_steps: Any, start: Any = 0) -> Any:
    """:func:`decaying_adam` as NumPyro's optimisers."""
    return optax_optimizer(decaying_adam(num_steps, start))


def decaying_adam(num_steps: Any, start: Any = 0) -> optax.GradientTransformation:
    """Adam whose rate falls from 0.03 to zero along half a cosine, over `num_steps` steps after step `start`."""
    return adam(partial(_falling_rate, num_steps, start))


def _falling_rate(num_steps: Any, start: Any, count: Any) -> Any:
    progress = jnp.clip((count - start) / num_steps, 0.0, 1.0)
    return _PEAK_RATE * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def adam(rate: Any) -> optax.GradientTransformation:
    """`optax.adam`, made of functions that can be pickled.

    Args:
        rate: a number or a schedule.
    """
    return optax.GradientTransformation(partial(_adam_init, rate), partial(_adam_update, rate))


def _adam_init(rate: Any, params: Any) -> Any:
    return optax.adam(rate).init(params)


def _adam_update(rate: Any, updates: Any, state: Any, params: Any = None) -> Any:
    return optax.adam(rate).update(updates, state, params)


def optax_optimizer(transformation: optax.GradientTransformation, no_line_search: str | None = None) -> Any:
    """An Optax optimiser as NumPyro's, which also hands over the loss function, for line searches.

    `numpyro.optim.optax_to_numpyro` passes on the value alone; `optax.lbfgs` and its like evaluate the loss at other
    points of the same step, with the step's own random numbers.

    Args:
        transformation: of Optax.
        no_line_search: why the loss has no values to search along; then such an optimiser raises NotImplementedError.
    """
    optim = optax_to_numpyro(transformation)
    update = optax.with_extra_args_support(transformation).update

    optim.remake = partial(optax_optimizer, transformation, no_line_search)  # for pickle
    optim.searches = False  # whether it has evaluated the loss at points of its own

    def value_fn(fn: Callable[[Any], tuple[Any, Any]], params: Any) -> Any:
        optim.searches = True
        if no_line_search is not None:
            raise NotImplementedError(
                f"The optimiser searches along a line for a smaller loss, but {no_line_search}: use optax.adam or "
                "another optimiser that needs the gradient alone."
            )
        return fn(params)[0]

    def eval_and_update(
        fn: Callable[[Any], tuple[Any, Any]], state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        step, (params, inner) = state
        if forward_mode_differentiation:
            grad, (value, aux) = jax.jacfwd(lambda p: (fn(p)[0], fn(p)), has_aux=True)(params)
        else:
            (value, aux), grad = jax.value_and_grad(fn, has_aux=True)(params)
        updates, inner = update(grad, inner, params, value=value, grad=grad, value_fn=lambda p: value_fn(fn, p))
        return (value, aux), (step + 1, (optax.apply_updates(params, updates), inner))

    def eval_and_stable_update(
        fn: Callable[[Any], tuple[Any, Any]], state: Any, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Any, Any], Any]:
        (value, aux), new = eval_and_update(fn, state, forward_mode_differentiation)
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(new[1][0]):
            finite &= jnp.all(jnp.isfinite(leaf))
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return (jnp.where(finite, value, jnp.nan), aux), kept

    optim.eval_and_update, optim.eval_and_stable_update = eval_and_update, eval_and_stable_update
    return optim
