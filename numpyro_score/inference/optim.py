"""Optimisers: the default one, and Optax's with a line search."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro.optim import optax_to_numpyro

__all__ = ["PickledOptimizer", "decaying_adam", "default_optimizer", "optax_optimizer"]

_PEAK_RATE = 0.03


def default_optimizer(num_steps: Any, start: Any = 0) -> Any:
    """:func:`decaying_adam` as NumPyro's optimisers."""
    return optax_optimizer(decaying_adam(num_steps, start))


def decaying_adam(num_steps: Any, start: Any = 0) -> optax.GradientTransformation:
    """Adam whose rate falls from 0.03 to zero along half a cosine, over `num_steps` steps after step `start`."""

    def rate(count: Any) -> Any:
        progress = jnp.clip((count - start) / num_steps, 0.0, 1.0)
        return _PEAK_RATE * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return optax.adam(rate)


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


class PickledOptimizer:
    """Carries an optimiser through pickle, or, where it is made of functions that pickle refuses, a stand-in for it.

    A fit needs no optimiser for its estimates and their errors, so it can be saved without. Optax's and NumPyro's are
    made of local functions, and so never can be pickled. A deep copy shares the optimiser, which has no state.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __deepcopy__(self, memo: Any) -> PickledOptimizer:
        return self

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.optimizer)
        # What pickle raises for functions and objects that it refuses, by Python's version.
        except (pickle.PicklingError, AttributeError, TypeError):
            return {"optimizer": NotPickled(type(self.optimizer).__name__)}
        return {"optimizer": self.optimizer}


class NotPickled:
    """Stands for the optimiser of a fit that was pickled without it.

    Args:
        name: of the optimiser's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"The optimiser ({self._name}) could not be pickled with this fit: give it again, e.g. "
            "ScoreMatching(model, optim=optax.adam(1e-3), loss=loss).run(key, x, init_state=fit.state)."
        )

    init = update = get_params = eval_and_update = eval_and_stable_update = _refuse
