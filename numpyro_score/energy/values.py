"""Refuses values that cannot be data, by name, before they fail deep inside of a model or are broadcast in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

__all__ = ["check_argument", "check_list", "check_observed", "check_precision", "check_rows"]


def check_argument(name: str, value: Any) -> None:
    """Raises TypeError for an argument that no model can take more than once, or JAX not at all."""
    if isinstance(value, Iterator):
        raise TypeError(
            f"Argument '{name}' is a {type(value).__name__}, which can be read once only: pass an array, e.g. "
            f"np.array(list({name}))."
        )
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, np.ndarray):
            _check_array(f"Argument '{name}'", name, leaf)


def _check_array(what: str, name: str, array: np.ndarray) -> None:
    """Raises TypeError for an array that JAX does not take, or only without its mask."""
    kind = array.dtype.kind
    if isinstance(array, np.ma.MaskedArray):
        # Values that a fill value replaces would be data.
        raise TypeError(
            f"{what} is a masked array: pass np.ma.getdata({name}), and put the sites of the rows in "
            f"numpyro.handlers.mask(mask=~np.ma.getmaskarray({name})), with one value for each row."
        )
    if kind == "O":
        raise TypeError(
            f"{what} is an array of Python objects, of shape {array.shape}: pass numbers, e.g. "
            f"np.asarray({name}, float), with rows of equal length and nothing missing."
        )
    if kind in "mM":
        start = f"({name} - {name}.min())" if kind == "M" else name
        raise TypeError(
            f"{what} is an array of {array.dtype}, which are no numbers: pass them in a unit, e.g. days, "
            f"{start} / np.timedelta64(1, 'D')."
        )
    if kind in "UST":
        raise TypeError(
            f"{what} is an array of {array.dtype}, which are no numbers: pass numbers, e.g. {name}.astype(float) if "
            "they are written as text."
        )
    if array.dtype.names is not None:  # extended floats such as bfloat16 are of the same kind; JAX takes them
        raise TypeError(
            f"{what} is a structured array with the fields {', '.join(array.dtype.names)}: pass numbers, e.g. "
            f"np.lib.recfunctions.structured_to_unstructured({name})."
        )


def check_rows(name: str, value: Any) -> None:
    """Raises TypeError for what cannot be rows of data, or holds them in too few digits."""
    check_argument(name, value)
    if value is None:
        raise TypeError(f"'{name}' is None: pass an array of numbers.")
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, str | bytes):
            raise TypeError(f"'{name}' has {leaf!r} in the place of a number: pass an array of numbers.")
        if hasattr(leaf, "dtype"):
            check_precision(f"'{name}'", name, leaf.dtype)


def check_precision(what: str, name: str, dtype: Any) -> None:
    """Raises TypeError for floats of less than single precision, in which differences of data are lost."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{what} holds {dtype} values, which have three digits or fewer: pass data in single precision, "
            f"{name}.astype('float32'), and let the model alone compute in {dtype}."
        )


def check_list(name: str, value: Any) -> None:
    """Raises TypeError for a list of numbers in the place of the data."""
    if isinstance(value, list) and value and all(isinstance(v, float | list | np.number) for v in value):
        raise TypeError(f"Argument '{name}' is a list: pass an array, e.g. np.asarray({name}).")


def check_observed(site: Any) -> None:
    """Raises for an observed value that is no array, or not of the shape of the site's distribution and plates.

    Raises:
        TypeError: for a list or tuple, and an array that is masked or holds no numbers.
        ValueError: for another shape. NumPyro's improper distributions would take it without a word.
    """
    fn, value, name = site["fn"], site["value"], site["name"]
    if not isinstance(fn, dist.Distribution) or value is None:
        return
    if isinstance(value, list | tuple):
        raise TypeError(
            f"Observed site '{name}' is observed at a {type(value).__name__}: pass an array, e.g. np.asarray({name})."
        )
    if isinstance(value, np.ndarray):
        _check_array(f"Observed site '{name}'", name, value)
    shape, event = tuple(np.shape(value)), tuple(fn.event_shape)
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    batch = shape[: len(shape) - len(event)]
    fits = len(shape) >= len(event) and shape[len(batch) :] == event
    # A value of one number is broadcast over a plate on purpose; one with more axes than the plates have is not.
    for dim, size in sizes.items():
        seen = batch[dim] if -dim <= len(batch) else 1
        fits &= seen == size or (seen == 1 and len(batch) <= -min(sizes))
    if fits:
        return
    expected = tuple(sizes.get(d, 1) for d in range(min(sizes, default=0), 0)) + event
    rows = f"rows of shape {event}" if event else "rows of one number"
    remedy = "pass data of this shape, or change the site's shape"
    if len(shape) > 1 and shape[::-1] == expected:
        remedy = f"these seem to be transposed, so pass {name}.T"
    elif len(shape) > 1 and len(event) == 1 and shape[-2] == event[0] != shape[-1]:
        remedy = f"these seem to be transposed, so pass {name}.T"  # where the plate follows the length of the data
    elif event == (1,) and shape == expected[:-1]:
        remedy = f"pass {name}[:, None], or observe a site of single numbers"
    elif not event and shape == (*expected, 1):
        remedy = f"pass {name}[:, 0], or give the site the event shape (1,)"
    elif event and len(shape) == 1:
        remedy = f"one row is {name}[None], and several are an array (n, {', '.join(map(str, event))})"
    elif not event and len(shape) > len(expected):
        remedy = f"pass one column, or give the site the event shape {shape[len(expected) :]}"
    raise ValueError(
        f"Observed site '{name}' has values of shape {shape}, but the site has {rows}"
        + (f", {expected} with its plates" if sizes else "")
        + f": {remedy}."
    )
