"""What both libraries share; it imports neither. JAX runs in the parent process, PyTorch in a child."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

SIGMA = 0.1  # of denoising score matching


def seconds_per_call(call: Callable[[], object], block: float) -> float:
    """The mean over calls for `block` seconds, after one call that is not counted."""
    call()
    gc.collect()
    gc.disable()
    calls, elapsed, begin = 0, 0.0, time.perf_counter()
    while elapsed < block:
        call()
        calls, elapsed = calls + 1, time.perf_counter() - begin
    gc.enable()
    return elapsed / calls
