"""FLOPs, memory, times."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from benchmarks import by_hand
from benchmarks.cases import Step

Call = Callable[[], Any]
Calls = list[Call]
Times = np.ndarray  # seconds, one for each round


# -- counted ------------------------------------------------------------------------------------


def compile_call(call: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(call).lower(*args).compile()


def flops(compiled: Any) -> float:
    return compiled.cost_analysis()["flops"]


class Cost(NamedTuple):
    flops: float
    bytes: int  # the most that is held beside inputs and outputs


def step_cost(step: Step, x: Array, rows_per_chunk: int) -> Cost:
    """What XLA says of the compiled step, with loops over chunks of rows counted in full.

    XLA counts the body of a loop once, however often it runs. The body is what is counted less the
    optimiser, the one part outside the loop that matters. It holds as many chunks as it is larger
    than a step on the rows of one chunk, which needs no loop.
    """
    compiled = compile_call(step.call, step.state, x)
    total = flops(compiled)
    if rows_per_chunk < len(x):
        outside = _optimizer_flops(x.shape[1])
        body = total - outside
        chunk = flops(compile_call(step.call, step.state, x[:rows_per_chunk])) - outside
        passes = len(x) / rows_per_chunk / round(body / chunk)
        total = outside + passes * body
    return Cost(total, compiled.memory_analysis().temp_size_in_bytes)


def _optimizer_flops(dim: int) -> float:
    state = by_hand.init(jax.random.key(0), dim)
    return flops(compile_call(by_hand.apply, state.params, state.params, state.optimizer))


# -- timed --------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(call: Call, repeats: int = 1) -> float:
    """Mean time of a call until its result is there."""
    begin = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - begin) / repeats


def interleaved(calls: Calls, rounds: int) -> list[Times]:
    """Times of several calls, each once in every round, so that all see the same machine.

    Short calls are repeated, so that one timing lasts at least 20 ms.
    """
    for call in calls:
        seconds(call)  # compiles
    repeats = [math.ceil(0.02 / min(seconds(call) for _ in range(3))) for call in calls]
    with no_garbage_collection():
        pairs = list(zip(calls, repeats, strict=True))
        times = [[seconds(call, n) for call, n in pairs] for _ in range(rounds)]
    return list(np.transpose(times))


def interleaved_first(calls: Calls, rounds: int) -> list[Times]:
    """The same for calls that trace and compile, each time anew."""

    def first(call: Call) -> float:
        jax.clear_caches()
        with no_garbage_collection():
            return seconds(call)

    return list(np.transpose([[first(call) for call in calls] for _ in range(rounds)]))
