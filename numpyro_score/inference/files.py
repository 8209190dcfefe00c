"""Trees of arrays in a directory: `arrays.npz` and a JSON file that says what each array is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from numpyro_score.inference.arguments import named_leaves
from numpyro_score.inference.processes import by_first
from numpyro_score.placement import fetch
from numpyro_score.printed import settings as printed
from numpyro_score.version import __version__

__all__ = ["FORMAT", "Arrays", "read", "save_fit"]

FORMAT = 1
_ARRAYS, _HEAD = "arrays.npz", "fit.json"


class Arrays:
    """Arrays by number, and trees of dicts, lists, tuples, numbers and strings that refer to them.

    Args:
        arrays: those of a file; none where a file is to be written.
    """

    def __init__(self, arrays: dict[str, np.ndarray] | None = None) -> None:
        self.arrays = {} if arrays is None else arrays

    def put(self, value: jax.Array | np.ndarray) -> dict[str, Any]:
        """Adds an array, and gives what stands for it in JSON."""
        name, entry = f"{len(self.arrays):04d}", {}
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            entry["key"] = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        found = np.asarray(fetch(value))
        if found.dtype.kind == "V":  # bfloat16 and its like, which NumPy's files do not know
            entry["bits_of"] = found.dtype.name
            found = found.view(f"u{found.dtype.itemsize}")
        self.arrays[name] = found
        return {"array": name, **entry}

    def get(self, entry: dict[str, Any]) -> Any:
        """The array of an entry: a key, or NumPy's."""
        value = self.arrays[entry["array"]]
        if "bits_of" in entry:
            value = value.view(getattr(ml_dtypes, entry["bits_of"]))
        return jax.random.wrap_key_data(jnp.asarray(value), impl=entry["key"]) if "key" in entry else value

    def encode(self, tree: Any, name: str) -> Any:
        """A tree as JSON.

        Raises:
            TypeError: for what is neither a container nor a number, a string, None or an array.
        """
        if isinstance(tree, jax.Array | np.ndarray):
            return self.put(tree)
        if tree is None or isinstance(tree, bool | int | float | str):
            return tree
        if isinstance(tree, np.generic):
            return self.put(np.asarray(tree))
        if type(tree) in (list, tuple):
            return {type(tree).__name__: [self.encode(v, f"{name}[{i}]") for i, v in enumerate(tree)]}
        if type(tree) is dict and all(isinstance(k, str) for k in tree):
            return {"dict": {k: self.encode(v, f"{name}[{k!r}]") for k, v in tree.items()}}
        raise TypeError(
            f"{name} is a {type(tree).__name__}, and files hold arrays, numbers, strings, lists, tuples and dicts: "
            "write fit.save(path, data=False), and pass the model's arguments to load."
        )

    def decode(self, tree: Any) -> Any:
        """The tree of :meth:`encode`."""
        if not isinstance(tree, dict):
            return tree
        if "array" in tree:
            return self.get(tree)
        ((kind, parts),) = tree.items()
        if kind == "dict":
            return {k: self.decode(v) for k, v in parts.items()}
        if kind == "settings":
            return parts  # of :meth:`settings`
        return (list if kind == "list" else tuple)(self.decode(v) for v in parts)

    def settings(self, value: Any) -> dict[str, Any]:
        """A dataclass: its name, its printed form and, where they are numbers, strings and tuples, all its fields."""
        fields = None
        if dataclasses.is_dataclass(value):
            plain = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            with contextlib.suppress(TypeError):
                fields = {"dict": {k: self._setting(v) for k, v in plain.items()}}
        return {"name": type(value).__name__, "printed": printed(value), "fields": fields}

    def _setting(self, value: Any) -> Any:
        inner = dataclasses.is_dataclass(value)  # a loss of its own
        return {"settings": self.settings(value)} if inner else self.encode(value, "the loss")

    def leaves(self, tree: Any) -> list[list[Any]]:
        """The leaves of any pytree, each as its path and what stands for it."""
        return [[name, self.put(v)] for name, v in named_leaves(tree).items()]


def _write(path: str | os.PathLike[str], head: dict[str, Any], arrays: Arrays) -> None:
    """Writes a directory, which is there as a whole or not at all.

    Raises:
        FileExistsError: if there is something already.
        OSError: if it cannot be written.
    """
    target = Path(path).expanduser()
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or save under another name.")
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    head = {"format": FORMAT, "numpyro_score": __version__, **head}
    try:
        beside.mkdir(parents=True)
        with (beside / _ARRAYS).open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays.arrays)
        (beside / _HEAD).write_text(json.dumps(head, indent=1))
        beside.rename(target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The fit could not be saved in {target} ({error.strerror or error}): free space there, or give a path in "
            "a directory that can be written.",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # a part of a fit, where that failed


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """The JSON and the arrays of a directory.

    Raises:
        FileNotFoundError: if it holds no fit.
        ValueError: if a later version wrote it, or it is damaged.
    """
    directory = Path(path).expanduser()
    if not (directory / _HEAD).is_file():
        raise FileNotFoundError(f"{directory} holds no fit, as it has no {_HEAD}: pass what fit.save(path) was given.")
    with _undamaged(directory):
        head = json.loads((directory / _HEAD).read_text())
    if head["format"] > FORMAT:
        raise ValueError(
            f"{directory} has format {head['format']}, of numpyro-score {head['numpyro_score']}, and this is version "
            f"{__version__}, which reads formats up to {FORMAT}: install a later one."
        )
    # NumPy leaves a file open that it cannot read.
    with _undamaged(directory), (directory / _ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as found:
        return head, Arrays(dict(found))


@contextlib.contextmanager
def _undamaged(directory: Path) -> Iterator[None]:
    """Errors of files that are not whole, with the directory that they are in."""
    try:
        yield
    except (ValueError, EOFError, FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The fit in {directory} is damaged ({type(error).__name__}: {error}): take another copy, or save it again."
        ) from error


def save_fit(fit: Any, path: str | os.PathLike[str]) -> None:
    """Writes a :class:`~numpyro_score.ScoreMatchingResult`; see its `save`."""
    svi, arrays = fit.svi, Arrays()
    if (why := getattr(svi.score_loss, "not_saved", None)) is not None:
        raise TypeError(f"Files do not hold {why}; pickle does.")
    made = {
        "num_steps": svi.num_steps,
        "learning_rate": arrays.encode(svi.learning_rate, "learning_rate"),
        "data": svi.data,
        "average": svi.average,
        "guide": type(svi.guide).__name__,
        "optimizer": type(svi.optim).__name__,
        "default_optimizer": svi._default_optim,
    }
    head = {
        "settings": made,
        "loss": arrays.settings(svi.score_loss),
        "params": arrays.leaves(fit.params),
        "state": arrays.leaves(fit.state),
        "losses": arrays.put(fit.losses),
        "held_out": None if fit.held_out is None else arrays.put(fit.held_out),
        "dependence": None if fit.dependence is None else fit.dependence.encode(arrays.put),
        "interrupted": fit.interrupted,
        "cost": None if fit.cost is None else fit.cost._asdict(),
        "labels": fit.labels.encode(),
        "data": arrays.encode((fit.args, fit.kwargs), "arguments") if fit.has_data else None,
    }
    by_first(partial(_write, path, head, arrays))
