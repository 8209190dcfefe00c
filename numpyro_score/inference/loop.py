"""Steps in compiled chunks, with a progress bar between two of them."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_score.inference.checkpoint import Checkpoint
from numpyro_score.inference.processes import agreed, interrupts, is_first
from numpyro_score.placement import fetch

__all__ = [
    "Advance",
    "Course",
    "NonFiniteLossError",
    "check_num_steps",
    "next_size",
    "run_steps",
    "strongly_typed",
    "take_steps",
]

_BUFFER = 1024  # values kept on the device between two looks at them
_SECONDS = 0.1  # between two updates of the progress bar

Advance = Callable[[Any, int], tuple[Any, Any, Any]]
"""A compiled :func:`take_steps`: a state and a number of steps to the state, the values and the steps taken."""


class Course(NamedTuple):
    """What stays the same over the steps of a run, and would otherwise be baked into compiled ones."""

    transforms: Any  # to constrained space, by site
    start: Any  # the number of the first step
    total: Any  # steps
    learning_rate: Any


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite during a fit.

    Attributes:
        step: the step, from 0, whose loss is not finite.
        state: the last state with a finite loss; pass it as `init_state` to go on from there.
        params: the parameters of `state`.
        losses: the finite losses up to then.
    """

    def __init__(self, message: str, step: int, state: Any, params: dict[str, Any], losses: Any) -> None:
        super().__init__(message)
        self.step, self.state, self.params, self.losses = step, state, params, losses


def take_steps(
    step: Callable[[Any], tuple[Any, Any]], state: Any, n: Any, like: Any = 0.0, keep_going: bool = False
) -> tuple[Any, Any, Array]:
    """Takes n steps in one loop, fewer if a value is not finite; n may be traced.

    Args:
        step: from a state to the next state and its values, a pytree of numbers, the loss first.
        state: the first state.
        n: steps, at most 1024.
        like: any numbers in the structure of the values.
        keep_going: whether to go on after values that are not finite.

    Returns:
        The state, the values in a buffer (1024,) each, and the steps taken; a step whose values are not finite has
        been taken in the state, and its values are in the buffer, but it is not counted.
    """

    def go_on(carry: Any) -> Array:
        i, _, _, finite = carry
        return (i < n) & finite

    def body(carry: Any) -> Any:
        i, state, buffers, _ = carry
        state, values = step(state)
        finite = jnp.array(keep_going)
        if not keep_going:
            finite = jnp.all(jnp.stack([jnp.isfinite(v) for v in jax.tree.leaves(values)]))
        return i + finite, state, jax.tree.map(lambda b, v: b.at[i].set(v), buffers, values), finite

    buffers = jax.tree.map(lambda _: jnp.zeros(_BUFFER, jnp.result_type(float)), like)
    taken, state, buffers, _ = jax.lax.while_loop(go_on, body, (jnp.array(0), state, buffers, jnp.array(True)))
    return state, buffers, taken


def run_steps(
    advance: Advance,
    state: Any,
    num_steps: int,
    progress_bar: bool,
    error: Callable[[Any, Any, int, Any], Exception],
    checkpoint: Checkpoint | None = None,
) -> tuple[Any, Any, bool]:
    """Takes all steps, whole chunks of them on the device between two updates of the bar.

    Args:
        advance: takes some steps.
        state: the first state.
        num_steps: steps.
        progress_bar: whether to show one.
        error: what to raise at a value that is not finite, from the state before the failing step, the state before
            that one, the failing step's number, and all values up to the failing step's, (step + 1,) each.
        checkpoint: where to go on from, and to save states from time to time, when Ctrl-C is pressed and at the end.

    Returns:
        The last state, the values (S,) each, and whether Ctrl-C ended the run early, with a warning.
    """
    with checkpoint or contextlib.nullcontext():
        taken: int = 0
        chunks: list[Any] = []
        if checkpoint is not None:
            taken, state, chunks = checkpoint.start(state)
        bar = tqdm(total=num_steps, initial=taken, disable=not progress_bar or not is_first())
        return _run_steps(advance, state, num_steps, bar, error, checkpoint, taken, chunks)


def _run_steps(
    advance: Advance,
    state: Any,
    num_steps: int,
    bar: Any,
    error: Callable[[Any, Any, int, Any], Exception],
    checkpoint: Checkpoint | None,
    done: int,
    chunks: list[Any],
) -> tuple[Any, Any, bool]:
    first_call, size, previous, on_disk = True, 1, None, len(chunks)

    def save_fresh(checkpoint: Checkpoint) -> None:
        checkpoint.save(done, state, _joined(chunks[on_disk:], done - checkpoint.saved))

    try:
        with bar, interrupts() as interrupted:
            while done < num_steps:
                begin, n = time.perf_counter(), min(size, num_steps - done)
                new, buffers, taken = advance(state, n)
                taken = int(taken)
                values = jax.tree.map(lambda b, n=n: np.array(b[:n]), fetch(buffers))  # a view would keep the buffer
                chunks.append(values)
                if taken < n:
                    # Steps are deterministic, so the states around the failing one are had by taking them again.
                    failing = advance(state, taken)[0]
                    if taken:
                        last = advance(state, taken - 1)[0]
                    else:
                        last = state if previous is None else advance(previous[0], previous[1] - 1)[0]
                    raise error(failing, last, done + taken, _joined(chunks, done + taken + 1))
                previous, state, done = (state, n), new, done + n
                losses = jax.tree.leaves(values)[0]
                finite = losses[np.isfinite(losses)]
                mean = finite.mean() if finite.size else np.nan
                first = jax.tree.leaves(chunks[0])[0][0]
                bar.set_postfix_str(f"init loss: {first:.4f}, loss: {mean:.4f}", refresh=False)
                bar.update(n)
                if first_call:  # which compiles
                    first_call, size = False, min(8, num_steps)
                else:
                    size = next_size(n, time.perf_counter() - begin)
                save = checkpoint is not None and checkpoint.due()
                size, save, stop = agreed(size, save, interrupted())
                if stop:
                    raise KeyboardInterrupt
                if save and checkpoint is not None and done < num_steps:
                    save_fresh(checkpoint)
                    on_disk = len(chunks)
    except KeyboardInterrupt:
        if not done:
            raise
        if is_first():
            warnings.warn(f"Interrupted after {done} of {num_steps} steps; this is the fit so far.", stacklevel=5)
    if checkpoint is not None and done > checkpoint.saved:
        save_fresh(checkpoint)
    return state, _joined(chunks, done), done < num_steps


def _joined(chunks: list[Any], n: int) -> Any:
    return jax.tree.map(lambda *v: np.concatenate(v)[:n], *chunks)


def next_size(n: int, seconds: float) -> int:
    """Steps until the next look: what takes about a tenth of a second, growing at most fourfold."""
    return int(np.clip(n * _SECONDS / max(seconds, 1e-6), 1, min(4 * n, _BUFFER)))


def strongly_typed(state: Any) -> Any:
    """The same; a weakly typed number in the first state would make the second call compile again."""
    return jax.tree.map(lambda v: jax.lax.convert_element_type(v, jnp.result_type(v)), state)


def check_num_steps(num_steps: int) -> int:
    """Raises ValueError unless `num_steps` is a positive integer."""
    if num_steps != int(num_steps) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps}.")
    return int(num_steps)
