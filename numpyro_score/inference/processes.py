"""What the processes of one run must decide alike."""

from __future__ import annotations

import contextlib
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from numpyro_score.inference.arguments import told

__all__ = ["agreed", "by_first", "gathered", "interrupts", "is_first", "require_common"]


def is_first() -> bool:
    """Whether this process is the one that shows a bar and warns."""
    return jax.process_index() == 0


def gathered(*numbers: int) -> np.ndarray:
    """What each process gives, (processes, numbers)."""
    mine = np.array(numbers)
    return mine[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))


_SAMPLED = 1024  # rows of each array that are compared between processes


def require_common(owner: str, arrays: list[Any], **settings: Any) -> None:
    """Raises ValueError, in all processes, where they differ in a setting, or each has data that no other sees.

    Of arrays that lie in one process alone some rows are compared.
    """
    if jax.process_count() == 1:
        return
    texts = [str(told(v, _SAMPLED)) for v in settings.values()]
    votes = gathered(*(zlib.crc32(text.encode()) for text in texts))
    for name, text, vote in zip(settings, texts, votes.T, strict=True):
        if len(np.unique(vote)) > 1:
            raise ValueError(
                f"The processes call {owner} with different {name}, here {text[:100]}: all processes of a run must "
                "make the same call."
            )
    if not all(v.is_fully_addressable for v in arrays):
        return
    if len(np.unique(gathered(zlib.crc32(repr(told(arrays, _SAMPLED)).encode())))) > 1:
        raise ValueError(
            f"{owner} got other data in each process, of which the others know nothing: join them, e.g. by "
            "jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec('rows')), rows)."
        )


def agreed(size: int, save: bool, stop: bool) -> tuple[int, bool, bool]:
    """The number of steps and whether to save, as process 0 says, and whether any process is to stop.

    All processes of a run must take as many steps in each call, or they wait for each other for ever; clocks differ.
    """
    votes = gathered(size, save, stop)
    return int(votes[0, 0]), bool(votes[0, 1]), bool(votes[:, 2].any())


def by_first(write: Callable[[], None]) -> None:
    """Runs a function that writes files on the first process, while the others wait.

    Raises:
        OSError: on all processes, if it does on the first.
    """
    failed: OSError | None = None
    if is_first():
        try:
            write()
        except OSError as error:
            failed = error
    if jax.process_count() > 1:
        text = str(failed or "").encode()[:_TEXT]
        seen = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_TEXT), np.uint8))
        message = np.asarray(seen).tobytes().decode(errors="replace").strip()
        if message and failed is None:
            raise OSError(f"{message} So says the first process, which writes for all.")
    if failed is not None:
        raise failed


_TEXT = 1000  # bytes of a message between processes


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, among several processes, where it may not stop one of them alone.

    In a single process it raises KeyboardInterrupt as ever.
    """
    seen: list[int] = []
    if jax.process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
