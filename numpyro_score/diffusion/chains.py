"""Independent chains that take many steps on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from numpyro_score.diffusion.steps import Step
from numpyro_score.energy import plural
from numpyro_score.inference.loop import next_size

__all__ = ["State", "advance", "require_finite", "run_chains", "start"]


class State(NamedTuple):
    """Where the chains are."""

    u: Float[Array, "n d"]
    past: Float[Array, "k n d"]  # what the method remembers
    failed: Int[Array, "n"]  # the first step after which a chain is not finite; -1 where there is none
    trajectory: Float[Array, "steps n d"] | None


def start(u: Float[Array, "n d"], memory: int = 0, kept_steps: int | None = None) -> State:
    """Chains at u, with room for all their steps if these are to be kept."""
    kept = None if kept_steps is None else jnp.zeros((kept_steps + 1, *u.shape), u.dtype).at[0].set(u)
    return State(u, jnp.zeros((memory, *u.shape), u.dtype), jnp.full(len(u), -1, jnp.int32), kept)


def advance(step: Step, field: Any, plan: Any, rng_key: Array, state: State, first: Any, last: Any) -> State:
    """The steps from `first` to before `last`, each with a key of its own."""

    def body(i: Array, state: State) -> State:
        now = jax.tree.map(lambda v: v[i], plan)
        u, past = step(field, now, state.u, state.past, jax.random.fold_in(rng_key, i))
        fails = (state.failed < 0) & ~jnp.isfinite(u).all(axis=-1)
        kept = None if state.trajectory is None else state.trajectory.at[i + 1].set(u)
        return State(u, past, jnp.where(fails, i, state.failed).astype(jnp.int32), kept)

    return jax.lax.fori_loop(first, last, body, state)


def run_chains(
    advance: Callable[[State, Any, Any], State], state: State, num_steps: int, progress_bar: bool = False
) -> State:
    """All steps: in one call, or whole chunks of them between two updates of the bar, by the same program."""
    if not progress_bar or isinstance(state.u, jax.core.Tracer):
        return advance(state, 0, num_steps)
    done, size = 0, 1
    with tqdm(total=num_steps) as bar:
        while done < num_steps:
            begin, n = time.perf_counter(), min(size, num_steps - done)
            state = jax.block_until_ready(advance(state, done, done + n))
            if done:  # the first call compiles
                size = next_size(n, time.perf_counter() - begin)
            done += n
            bar.update(n)
    return state


def require_finite(u: Float[Array, "n d"], failed: Int[Array, "n"], where: Sequence[str]) -> None:
    """Raises FloatingPointError, with the step and the chains, if a chain is not finite; nothing while it is traced.

    Args:
        u: the draws.
        failed: as in :class:`State`.
        where: the noise level or time at the start of each step and at the end, (S + 1,).
    """
    if isinstance(u, jax.core.Tracer):
        return
    steps, finite = np.asarray(failed), np.isfinite(np.asarray(u)).all(-1)
    steps = np.where((steps < 0) & ~finite, len(where) - 1, steps)  # after the last step
    bad = np.flatnonzero(steps >= 0)
    if bad.size:
        first = bad[np.argmin(steps[bad])]
        step = int(steps[first])
        raise FloatingPointError(
            f"{plural(bad.size, 'chain')} of {len(u)} did not stay finite, the first of them chain {first} in step "
            f"{step} of {len(where) - 1}, from {where[step]}: the score is not finite or far too large there; look at "
            "the model at this level, or take more steps or a smaller range."
        )
