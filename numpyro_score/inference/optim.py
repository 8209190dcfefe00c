"""Optimisers: the default one, and Optax's with a line search or an average of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from numpyro.optim import Minimize, optax_to_numpyro

from numpyro_score.inference.arguments import named_leaves
from numpyro_score.inference.processes import require_common
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = [
    "NOTHING_TO_AVERAGE",
    "adam",
    "as_optimizer",
    "averaged",
    "check_state",
    "current_params",
    "decaying_adam",
    "default_optimizer",
    "first_step",
    "optax_optimizer",
    "sums",
]

NOTHING_TO_AVERAGE = (
    "The objective is quadratic in the parameters and solved at once, without steps to average: leave out average, or "
    "give an optimiser, e.g. optim=optax.adam(1e-3)."
)
_PEAK_RATE = 0.03


def as_optimizer(optim: Any, num_steps: int, average: Any, no_objective: str | None) -> Any:
    """What a user gives as an optimiser, or nothing, as NumPyro's.

    Args:
        optim: of Optax, or anything that SVI takes; None for the default.
        num_steps: steps of the default one.
        average: the decay of the average of the parameters, if any.
        no_objective: why the loss has no values to search along, if it has none.

    Raises:
        TypeError: for an average with an optimiser that is not Optax's, or that is no number.
        ValueError: for an average that is not above 0 and below 1.
    """
    if average is not None:
        if isinstance(average, bool) or not isinstance(average, int | float):
            raise TypeError(f"average must be a number such as 0.999, or None, got {average!r}.")
        if not 0 < average < 1:
            raise ValueError(
                f"average must be above 0 and below 1, got {average}: 0.999 remembers about the last 1,000 steps."
            )
    if optim is None:
        return default_optimizer(num_steps, average=average)
    if isinstance(optim, optax.GradientTransformation):
        return optax_optimizer(optim, no_objective, average)
    if average is not None and getattr(optim, "average", None) != average:
        raise TypeError(
            f"average needs an optimiser of Optax, got {type(optim).__name__}: write e.g. optim=optax.adam(1e-3)."
        )
    return optim


def default_optimizer(num_steps: Any, start: Any = 0, average: float | None = None) -> Any:
    """:func:`decaying_adam` as NumPyro's optimisers."""
    return optax_optimizer(decaying_adam(num_steps, start), average=average)


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


class AveragedState(NamedTuple):
    """The state of :func:`averaged`."""

    inner: Any  # of the transformation
    ema: optax.EmaState  # of the parameters, and of a one, which is what the weights add up to


def averaged(transformation: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """A transformation that also keeps an exponential moving average of the parameters after its updates.

    `optax.ema` averages what it is given. The one beside the parameters corrects for the start at zero, whatever
    decays a state has seen.
    """
    update, ema = optax.with_extra_args_support(transformation).update, optax.ema(decay, debias=False)

    def init_fn(params: Any) -> AveragedState:
        return AveragedState(transformation.init(params), ema.init((params, jnp.zeros(()))))

    def update_fn(updates: Any, state: AveragedState, params: Any = None, **extra: Any) -> Any:
        updates, inner = update(updates, state.inner, params, **extra)
        _, average = ema.update((optax.apply_updates(params, updates), jnp.ones(())), state.ema)
        return updates, AveragedState(inner, average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def current_params(optim: Any, optim_state: Any) -> Any:
    """The unconstrained parameters of the last step, where `optim.get_params` may give their average."""
    return optim_state[1][0] if is_averaged(optim_state) else optim.get_params(optim_state)


def is_averaged(optim_state: Any) -> bool:
    """Whether a state of an optimiser of :func:`optax_optimizer` holds an average of the parameters."""
    state = optim_state[1]
    return isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], AveragedState)


def sums(tree: Any) -> dict[str, float]:
    """Sums, and sums of squares, of the leaves of a tree that are no whole numbers: they tell other values."""
    leaves = {k: jnp.asarray(v) for k, v in named_leaves(tree).items()}
    leaves = {k: v.astype(float) for k, v in leaves.items() if jnp.issubdtype(v.dtype, jnp.inexact)}

    def of(leaves: dict[str, Array]) -> dict[str, Array]:
        kinds = {"absolute": jnp.abs, "square": jnp.square, "sum": lambda v: v}
        return {f"{k}, {name}": jnp.sum(f(v)) for k, v in leaves.items() for name, f in kinds.items()}

    return {k: float(v) for k, v in fetch(run_compiled(of, leaves)).items()}


def first_step(fitter: Any, optim_state: Any) -> dict[str, float] | None:
    """What an optimiser makes of a gradient, in the middle of a run, by which its settings are known.

    None for the default one, which the other settings tell, and for those that search along a line.
    """
    optim = fitter.optim
    searches = isinstance(optim, Minimize) or getattr(optim, "searches", False)
    if searches or getattr(fitter, "_default_optim", False):
        return None

    def step(state: Any) -> Any:
        whole = jax.tree.map(lambda v: jnp.full_like(v, 37) if jnp.issubdtype(v.dtype, jnp.integer) else v, state)
        gradient = jax.tree.map(lambda v: jnp.full_like(v, 0.1), optim.get_params(whole))
        return optim.get_params(optim.update(gradient, whole, value=jnp.ones(())))

    return sums(run_compiled(step, jax.tree.map(jnp.asarray, optim_state)))


def check_state(owner: str, fitter: Any, optim_state: Any) -> None:
    """Raises ValueError for a state that a fit cannot go on from, and where processes have optimisers that differ.

    A fit cannot where the state has an average and the fit keeps none, or the other way round, or it has lost its
    optimiser's part.
    """
    average = fitter.average
    if len(optim_state) > 1 and isinstance(optim_state[1], tuple) and not optim_state[1]:
        raise ValueError(
            "init_state is of a fit that was loaded without its optimiser: give it to load, as load(path, model, "
            "optim=...), or start from init_params=fit.params."
        )
    if jax.process_count() > 1:
        step = first_step(fitter, optim_state)
        require_common(owner, [], optim=step and {k: f"{v:.3g}" for k, v in step.items()})
    if average is not None and not is_averaged(optim_state):
        raise ValueError(
            "init_state has no average of the parameters, which this fit keeps: pass a state of a fit with average, or "
            "init_params=fit.params."
        )
    if average is None and is_averaged(optim_state):
        raise ValueError(
            "init_state has an average of the parameters, which this fit would drop: write ScoreMatching(..., "
            "average=0.999), or pass init_params=fit.params."
        )


def _average(params: Any, state: AveragedState) -> Any:
    """The average, or the parameters before the first step."""
    ema, weight = state.ema.ema
    started = weight > 0
    divisor = jnp.where(started, weight, 1.0)
    return jax.tree.map(lambda p, e: jnp.where(started, (e / divisor).astype(p.dtype), p), params, ema)


def optax_optimizer(
    transformation: optax.GradientTransformation, no_line_search: str | None = None, average: float | None = None
) -> Any:
    """An Optax optimiser as NumPyro's, which also hands over the loss function, for line searches.

    `numpyro.optim.optax_to_numpyro` passes on the value alone; `optax.lbfgs` and its like evaluate the loss at other
    points of the same step, with the step's own random numbers.

    Args:
        transformation: of Optax.
        no_line_search: why the loss has no values to search along; then such an optimiser raises NotImplementedError.
        average: the decay of an exponential moving average of the parameters, which `get_params` then gives; a line
            search is refused.
    """
    remake = partial(optax_optimizer, transformation, no_line_search, average)  # for pickle
    if average is not None:
        transformation = averaged(transformation, average)
        no_line_search = no_line_search or f"average={average} is of the many steps of a stochastic optimiser"
    optim = optax_to_numpyro(transformation)
    if average is not None:
        optim.get_params_fn = lambda state: _average(*state)
    update = optax.with_extra_args_support(transformation).update

    optim.remake, optim.average = remake, average
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
