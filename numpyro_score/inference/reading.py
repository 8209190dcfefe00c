"""Batches read ahead of the steps: where their source stands, and a thread that moves them to the device."""

from __future__ import annotations

import base64
import json
import queue
import sys
import threading
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_score.energy import as_array, split_arrays

__all__ = ["END", "Batch", "Prefetched", "Source", "as_arguments"]

END: Any = object()
"""Stands for the batch after the last one."""


class Batch(NamedTuple):
    """The model's arguments of one step.

    Attributes:
        number: of its pass, from 0.
        arrays: the arrays among them, on the device.
        static: all else.
        args: both together.
        position: where its source stands after it, as JSON; None where it cannot say or was not asked.
    """

    number: int
    arrays: list[Any]
    static: Any
    args: tuple[Any, ...]
    position: str | None


def as_arguments(name: str, item: Any) -> tuple[Any, ...]:
    """The model's positional arguments from one item, an array or a tuple, tables among them as arrays.

    Raises:
        TypeError: for anything else.
    """
    args = tuple(as_array(name, v) for v in (item if isinstance(item, tuple) else (item,)))
    if not isinstance(item, tuple) and not isinstance(args[0], jax.Array | np.ndarray):
        raise TypeError(
            f"{name} is a {type(item).__name__}: give an array, or a tuple of the model's arguments, e.g. "
            "(np.asarray(item),)."
        )
    return args


class Source:
    """An iterable of batches that knows where it stands.

    Args:
        batches: the iterable.
        repeat: whether to start anew at the end, where the iterable can.
        positions: whether to ask for positions.

    Raises:
        TypeError: for what is no iterable of batches.
    """

    def __init__(self, batches: Any, repeat: bool, positions: bool) -> None:
        if isinstance(batches, jax.Array | np.ndarray):
            raise TypeError(
                f"batches is one array of shape {batches.shape}: write run(rng_key, x), or give batches of rows, e.g. "
                "batches=np.array_split(x, 100)."
            )
        try:
            self._iterator = iter(batches)
        except TypeError:
            raise TypeError(
                f"batches must be an iterable of arrays or of tuples of the model's arguments, got "
                f"{type(batches).__name__}: write e.g. batches=[x[:1000], x[1000:2000]]."
            ) from None
        self._batches, self._repeat, self._positions = batches, repeat, positions
        self._again = self._iterator is not batches
        self.number = 0  # of the next batch in its pass
        self._told = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")

    @property
    def length(self) -> int | None:
        """Batches of a pass, None where that is not known or has no end."""
        if not isinstance(self._batches, Sized) or (n := len(self._batches)) == sys.maxsize:
            return None
        return n

    @property
    def _counts(self) -> bool:
        """Whether the number of a batch says which it is."""
        return self._again and self.length is not None and not self._told

    def take(self) -> tuple[Any, str | None]:
        """The next batch as it comes, or `END`, and the position after it."""
        item = next(self._iterator, END)
        if item is END and self._repeat and self._again:
            self._iterator, self.number = iter(self._batches), 0
            item = next(self._iterator, END)
        self.number += item is not END
        return item, self._position() if self._positions and item is not END else None

    def go_to(self, position: str | None) -> None:
        """Goes to a position that :meth:`take` gave; one of a count reads what is before it, but in a sequence.

        Raises:
            ValueError: if there is none.
        """
        found: dict[str, Any] = {"batches": 0} if position is None else json.loads(position)
        self.number = found["batches"]
        if self._told and "state" in found:
            state = found["state"]
            getattr(self._iterator, "set_state")(base64.b64decode(state) if found["bytes"] else state)  # noqa: B009
        elif self.number and "state" not in found and self._counts:
            if isinstance(self._batches, Sequence):
                self._iterator = (self._batches[i] for i in range(self.number, len(self._batches)))
            else:
                self._iterator = islice(iter(self._batches), self.number, None)
        else:
            raise ValueError(
                f"batches, a {type(self._batches).__name__}, cannot go on where the checkpoint stopped, and would give "
                "its first rows again: give a list or another iterable with a length and the same order in each pass, "
                "or an iterator with get_state() and set_state(), as Grain's."
            )

    def _position(self) -> str | None:
        if not self._told:
            return json.dumps({"batches": self.number}) if self._counts else None
        state = getattr(self._iterator, "get_state")()  # noqa: B009
        binary = isinstance(state, bytes)
        try:
            state = base64.b64encode(state).decode() if binary else state
            return json.dumps({"state": state, "bytes": binary, "batches": self.number})
        except TypeError as error:
            raise TypeError(
                f"get_state() of batches gives a {type(state).__name__} that is no JSON ({error}): return bytes, or "
                "numbers and text in dicts and lists."
            ) from None


class Prefetched:
    """Batches in the order of their source, read and moved to the device by a thread.

    No more are read than there are steps, and at most `ahead` of them wait.

    Args:
        source: where they come from.
        limit: steps in all; None for as many as there are batches.
        ahead: batches that may wait.
    """

    def __init__(self, source: Source, limit: int | None, ahead: int) -> None:
        self._source, self._taken, self._limit = source, 0, limit
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room, self._stopped = threading.Semaphore(ahead), threading.Event()
        self._first: tuple[Any, Any] | None = None  # forms and static arguments of the first batch
        self._known: tuple[Any, str | None] | None = None
        # JAX's contexts are of a thread.
        self._double = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        self._device = jax.config.jax_default_device  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, name="numpyro_score batches", daemon=True)

    def first(self) -> Any:
        """The source's first batch, before the thread runs; it is given again unless the source goes elsewhere."""
        self._known = self._next()
        return END if self._known[0] is END else self._move(*self._known)

    def start(self, taken: int, position: str | None) -> None:
        """Starts reading, after `taken` batches, the first of them at `position`."""
        if taken:
            self._known, self._taken = None, taken
            if self._limit is None or taken < self._limit:
                self._source.go_to(position)
        self._thread.start()

    def take(self) -> Any:
        """The next batch, `END`, or the error that came up in reading it."""
        item = self._ready.get()
        self._room.release()
        return item

    def stop(self) -> None:
        """Reads no more."""
        self._stopped.set()
        self._room.release()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        with jax.enable_x64(self._double), jax.default_device(self._device):
            try:
                for batch in self._read():
                    self._ready.put(batch)
            except BaseException as error:  # it belongs to the main thread
                self._ready.put(error)

    def _read(self) -> Iterator[Any]:
        while self._limit is None or self._taken < self._limit:
            self._room.acquire()
            if self._stopped.is_set():
                return
            item, position = self._next() if self._known is None else self._known
            self._known = None
            if item is END:
                break
            yield self._move(item, position)
            self._taken += 1
        yield END

    def _next(self) -> tuple[Any, str | None]:
        try:
            return self._source.take()
        except BaseException as error:
            error.add_note(f"It was raised by batches, read by run_batches for step {self._taken}.")
            raise

    def _move(self, item: Any, position: str | None) -> Batch:
        number = self._source.number - 1
        args = as_arguments(f"Batch {number}", item)
        is_array = [isinstance(v, jax.Array | np.ndarray) for v in jax.tree.leaves(args)]
        leaves = [v for v, yes in zip(jax.tree.leaves(args), is_array, strict=True) if yes]
        forms = [f"{v.dtype}{list(v.shape)}" for v in leaves]
        # A copy, made at once, where `device_put` may read later, as readers may fill one buffer again and again. Pages
        # of a memory map are read here, too.
        args = jax.tree.map(lambda v: jax.device_put(np.array(v)) if isinstance(v, np.ndarray) else v, args)
        arrays, static = split_arrays((args, {}))
        if self._first is None:
            self._first = forms, static
        if forms != self._first[0]:
            raise ValueError(
                f"Batch {number} has arrays {', '.join(forms)} where the first had {', '.join(self._first[0])}: "
                "give all batches one shape and dtype, e.g. leave out a last one that is shorter."
            )
        if static != self._first[1]:
            raise ValueError(
                f"Batch {number} differs from the first in what is no array, {static[1]} where that had "
                f"{self._first[1][1]}: give these arguments as arrays, or the same in all batches."
            )
        return Batch(number, arrays, static, args, position)
