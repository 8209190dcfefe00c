"""Fits that go on where they were stopped: states on disk, by Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.inference.arguments import named_leaves, numbers_of, told
from numpyro_score.inference.optim import first_step, sums
from numpyro_score.inference.processes import by_first, is_first
from numpyro_score.inference.record import Record
from numpyro_score.losses.base import positive
from numpyro_score.printed import without_addresses

__all__ = ["Checkpoint"]

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one directory go unnoticed
    fcntl = None  # type: ignore[assignment]

_FORMAT = 4
_VALUES = "values.bin"
_LOCK = ".lock"
_KEPT = 2  # saves on disk: should the last one be damaged, there is one before it
_SHARE = 0.01  # of the time of a run, for saving
_SAMPLED = 64  # rows of each array of the data, which tell whether they are the same data


class Checkpoint:
    """A directory that holds the last states of a run.

    A save is complete or absent: Orbax writes it beside the others and renames it. The state is copied at once and
    written while the steps go on. The steps' values are in one file for all saves, which has those of a save's steps
    before the save itself is begun.

    Args:
        directory: it is made if it does not exist.
        every: seconds between two saves, at least; more where a save takes more than a hundredth of it.
        settings: what the run that began the directory must have in common with this one, as JSON.
        like: any numbers in the structure of a step's values.

    Raises:
        TypeError: if `directory` is no path.
        ValueError: if `every` is not positive.
    """

    def __init__(self, directory: Any, every: float, settings: dict[str, Any], like: Any) -> None:
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"checkpoint must be the path of a directory, got {type(directory).__name__}.")
        positive("run", "checkpoint_every, seconds between two saves", every)
        self.directory, self.every = Path(directory).expanduser().absolute(), float(every)
        self.settings, self.like = settings, like
        width = len(jax.tree.leaves(like))
        self._record = Record(self.directory / _VALUES, width, np.dtype(jnp.result_type(float)))
        self.position: str | None = None  # among batches, of the save that was read
        self._manager: Any = None
        self._last = time.perf_counter()
        self._cost = 0.0  # seconds that a save stopped the run for
        self.saved = 0  # steps whose state and values are on disk
        self._lock: Any = None

    @classmethod
    def of(
        cls, directory: Any, every: float, kind: str, args: Any, like: Any, begin: tuple[Any, Any], **settings: Any
    ) -> Checkpoint | None:
        """The checkpoint of a run, None without a directory.

        Args:
            directory: a path, or None.
            every: seconds between two saves.
            kind: what is fitted.
            args: the model's arguments.
            like: any numbers in the structure of a step's values.
            begin: what fits, and the first state.
            **settings: numbers, keys, or objects whose printed form says all.
        """
        if directory is None:
            return None
        fitter, state = begin
        made = {
            "format": _FORMAT,
            "kind": kind,
            **{k: _plain(v) for k, v in settings.items()},
            "data": told(args, _SAMPLED),
            "optimizer": first_step(fitter, state.optim_state),
            "begin": sums(fitter.get_params(state)),
        }
        return cls(directory, every, made, like)

    def __enter__(self) -> Checkpoint:
        logging.getLogger("absl").addFilter(_says_something)
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            if self._manager is not None:
                with self._explained("written"):
                    self._manager.wait_until_finished()
                    self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_says_something)
            if self._lock is not None:
                (self.directory / _LOCK).unlink(missing_ok=True)
                self._lock.close()

    def start(self, state: Any) -> tuple[int, Any, list[Any]]:
        """Opens the directory, and gives what is saved there.

        Args:
            state: the first state of the run, which says what a state is made of.

        Returns:
            The steps taken, the state after them, and their values, (S,) each, if there are any.

        Raises:
            ImportError: without Orbax.
            ValueError: if the directory has another run.
            OSError: if it cannot be read or written.
        """
        self.settings["state"] = {name: [str(v.dtype), list(v.shape)] for name, v in named_leaves(state).items()}
        ocp = _orbax()
        by_first(self._claim)
        with self._explained("opened"):
            options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
            # Plain Zarr arrays. Of Orbax's other format, and of JAX's arrays, each save leaves more in memory, as
            # TensorStore never frees what it says of itself as a dict.
            handlers = {
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False),
                "settings": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
            steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._read(ocp, step, state)
            except _OtherRunError as error:
                raise ValueError(str(error)) from None
            # Whatever a reader raises for damaged files: Orbax's, TensorStore's and JSON's have no common class.
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0][:200]
                warnings.warn(
                    f"The checkpoint of step {step} in {self.directory} cannot be read ({type(error).__name__}: "
                    f"{reason}), so the run goes on from the one before it.",
                    stacklevel=6,
                )
            else:
                for later in (s for s in steps if s > step):  # which would stand in the way of their successors
                    self._manager.delete(later)
                self.saved = step
                return step, *found
        if steps:
            raise OSError(
                f"None of the checkpoints in {self.directory} can be read: give another directory to begin anew."
            )
        return 0, state, []

    def _claim(self) -> None:
        """Makes the directory, which Orbax would do later, and holds it until the run ends."""
        with self._explained("opened"):
            self.directory.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return
            self._lock = open(self.directory / _LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise BlockingIOError(
                f"Another run has the checkpoint in {self.directory} open: wait until it ends, or give another "
                "directory."
            ) from None

    def _read(self, ocp: Any, step: int, state: Any) -> tuple[Any, list[Any]]:
        saved = self._manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore())).settings
        self.position = saved.pop("position", None)
        self._check(saved)
        target = _numbered(state)
        args = ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target))
        found = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        taken = jax.tree.unflatten(jax.tree.structure(self.like), list(self._record.read(step).T))
        old, treedef = jax.tree.flatten(state)
        new = [_placed_as(v, found[_name(i)]) for i, v in enumerate(old)]
        return jax.tree.unflatten(treedef, new), [taken]

    def _check(self, saved: dict[str, Any]) -> None:
        now = self.settings
        for name in [*now, *(k for k in saved if k not in now)]:
            if _alike(was := saved.get(name), new := now.get(name)):
                continue
            if name == "data":
                what = "is of a run on other data, or with other arguments of the model"
            elif name == "begin":
                what = "is of a run that began at other parameters, of init_params or the model"
            elif name == "optimizer":
                what = "is of another model or optimiser, or other settings of it"
            elif name == "state":
                what = f"is of another model or optimiser, with {_differences(was, new)}"
            else:
                what = f"is of a run with {name}={was}, and this one has {name}={new}"
            raise _OtherRunError(
                f"The checkpoint in {self.directory} {what}: run with the same settings to go on with it, or give "
                "another directory; nothing was written."
            )

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.perf_counter() - self._last > max(self.every, self._cost / _SHARE)

    def save(self, step: int, state: Any, values: Any, position: str | None = None) -> None:
        """Saves the state after `step` steps and the values of these, unless it is on disk already.

        Args:
            step: steps taken.
            state: after them.
            values: of the steps since the last save, or since the one that the run began with.
            position: where the batches stand that they were taken on.
        """
        if step == self.saved:
            return
        begin, ocp = time.perf_counter(), _orbax()
        settings = self.settings if position is None else {**self.settings, "position": position}
        with self._explained("written"):
            if is_first():
                self._record.append(self.saved, np.stack(jax.tree.leaves(values), axis=1))  # before the state
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    settings=ocp.args.JsonSave(settings),
                    state=ocp.args.PyTreeSave(_numbered(state)),
                ),
                force=True,
            )
        self.saved = step
        self._last = time.perf_counter()
        self._cost = self._last - begin

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Errors of the file system, with the directory that they are about."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise OSError(
                f"The checkpoint in {self.directory} could not be {done} ({error}): free space there, or give a "
                "directory that can be written; what was saved before is kept."
            ) from error


class _OtherRunError(ValueError):
    """The directory is another run's."""


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            "checkpoint needs Orbax, which is not installed: pip install 'numpyro-score[scale]'."
        ) from error


def _says_something(record: logging.LogRecord) -> bool:
    """False of what Orbax warns of at each save: that there is nothing of its other format to merge."""
    return "Skipping merge of OCDBT" not in str(record.msg)


def _name(i: int) -> str:
    return f"{i:04d}"


def _numbered(state: Any) -> dict[str, Any]:
    """The arrays of a state as they are written: copies on the host, of keys their numbers, where one process can."""
    return {_name(i): _on_host(v) for i, v in enumerate(jax.tree.leaves(state))}


def _on_host(value: Any) -> Any:
    if not isinstance(value, jax.Array):
        return np.array(value)
    value = numbers_of(value)
    return np.array(value) if value.is_fully_addressable or value.is_fully_replicated else value


def _placed_as(like: Any, found: Any) -> Any:
    """What was read as the array of the state that it stands for."""
    if not isinstance(like, jax.Array):
        return found
    if not isinstance(found, jax.Array):
        found = jax.device_put(found, numbers_of(like).sharding)
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(like)) if is_key else found


def _differences(was: Any, new: Any) -> str:
    was = was or {}
    names = sorted(k for k in was.keys() | new.keys() if was.get(k) != new.get(k))
    shown = [f"{k}: {was.get(k, 'none')} where this run has {new.get(k, 'none')}" for k in names[:3]]
    return "; ".join(shown) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _alike(was: Any, new: Any) -> bool:
    """Whether settings are the same; sums of numbers may differ as on other devices."""
    if isinstance(was, dict) and isinstance(new, dict) and was.keys() == new.keys():
        return all(_alike(was[k], new[k]) for k in was)
    if isinstance(was, float) and isinstance(new, float):
        return math.isclose(was, new, rel_tol=1e-3, abs_tol=1e-6)
    return bool(was == new)


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, jax.Array | np.ndarray):
        return np.asarray(numbers_of(value)).tolist()
    fields = [getattr(value, f.name) for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    inside = told([v for v in jax.tree.leaves(fields) if isinstance(v, jax.Array | np.ndarray)], _SAMPLED)
    return without_addresses(value) + (f" with the arrays {inside}" if inside else "")
