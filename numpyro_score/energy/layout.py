"""Where the data sits in a model: which sites it enters, and what counts as one row.

NumPyro has no notion of "the data of an unnormalised model"; this module reads it off one abstract run. Nothing
here computes numbers: a :class:`Layout` is static, hashable, and found without touching the data's values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.extend.core import Jaxpr
from numpyro.distributions import constraints

from numpyro_score.energy.dependence import depends_on_inputs
from numpyro_score.energy.latents import Latent
from numpyro_score.energy.supports import FLAT, Block, Shape, Support, base_constraint, innermost, limits, row_width
from numpyro_score.energy.trace import Recorder, Site, is_factor, is_observed_sample, unwrap
from numpyro_score.energy.values import check_precision

Trace = dict[str, Site]


class DataArray(NamedTuple):
    """One array of data: an observed site, or an argument of the model."""

    name: str
    leaf: int | None  # index among the array leaves of the arguments; None if the model holds the data itself
    is_site: bool
    shape: Shape
    row_axes: Shape  # the axes of `shape` that number the rows, outermost first
    support: Support = Support("real")

    @property
    def what(self) -> str:
        """Its name in messages."""
        return f"{'site' if self.is_site else 'argument'} '{self.name}'"


class Layout(NamedTuple):
    """What is fixed about the data of a model, whatever its values."""

    arrays: tuple[DataArray, ...]
    terms: tuple[str, ...]  # observed sites whose log density depends on the data
    penalties: tuple[str, ...]  # factors that do not: part of the prior
    row_plates: tuple[str, ...]
    row_dims: Shape  # batch dimensions (negative) that number the rows
    row_shape: Shape
    masked: bool  # some rows may carry weight zero
    resizable: bool  # the model also runs on another number of rows
    width: int = 1  # the most numbers for one row that an operation of the density gives
    numbers_per_row: int = 1  # that all its operations give together
    score_terms: tuple[str, ...] = ()  # terms whose derivative in the data is known, but not their value
    latents: tuple[Latent, ...] = ()  # discrete sites of each row that the density is summed over
    quadratic: bool = False  # in discrete data, with second derivatives that are the same for all rows

    @property
    def num_rows(self) -> int:
        """N."""
        return math.prod(self.row_shape)

    @property
    def dim(self) -> int:
        """D."""
        return sum(row_width(a.support, a.shape, a.row_axes) for a in self.arrays)

    @property
    def flat(self) -> bool:
        """Whether the data fill R^D, so that score matching needs no boundary weight and no curvature."""
        return all(a.support.kind in FLAT for a in self.arrays)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The columns of a row by data array."""
        blocks, start = [], 0
        for a in self.arrays:
            stop = start + row_width(a.support, a.shape, a.row_axes)
            blocks.append(Block(a.support.kind, start, stop, a.shape[-1] if a.shape else 1))
            start = stop
        return tuple(blocks)

    @property
    def discrete_columns(self) -> np.ndarray:
        """Which numbers of a row are discrete, (K,)."""
        pairs = zip(self.arrays, self.blocks, strict=True)
        found = [np.arange(block.start, block.stop) for a, block in pairs if a.support.is_discrete]
        return np.concatenate(found) if found else np.zeros(0, int)

    @property
    def angle_columns(self) -> list[int]:
        """Which numbers of a row are angles."""
        return [j for block in self.blocks if block.kind == "circle" for j in range(block.start, block.stop)]

    def with_rows(self, n: int) -> Layout:
        """The same layout for `n` rows; only the one row axis of a resizable model changes."""
        if n == self.num_rows:
            return self

        def resize(a: DataArray) -> DataArray:
            (axis,) = a.row_axes
            return a._replace(shape=(*a.shape[:axis], n, *a.shape[axis + 1 :]))

        return self._replace(arrays=tuple(map(resize, self.arrays)), row_shape=(n,))


def find_arrays(
    recorder: Recorder,
    leaves: Sequence[Any],
    argument_leaves: dict[str, int],
    first: str | None,
    choice: str | tuple[str, ...] | None,
) -> list[DataArray]:
    """The arrays that hold the data, without their row axes.

    Args:
        recorder: one run of the model on its own arguments.
        leaves: the array leaves of those arguments.
        argument_leaves: which leaf an argument is, for arguments that are one array.
        first: the name of the first positional argument.
        choice: the user's `data=`, a site or an argument; or the sites of one of several plates.
    """
    observed = {k: s for k, s in recorder.sites.items() if is_observed_sample(s) and not is_factor(s)}
    sites = _choose_sites(recorder, observed, leaves, argument_leaves, first, choice)
    if not sites:
        name = choice if isinstance(choice, str) else first
        if name is None or name not in argument_leaves:
            raise ValueError(
                "The model has no data: observe a site, e.g. numpyro.sample('x', "
                "dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x), or take the data as the first "
                "positional argument."
            )
        leaf = argument_leaves[name]
        arrays = [DataArray(name, leaf, False, tuple(jnp.shape(leaves[leaf])), ())]
        values = [leaves[leaf]]
    else:
        arrays, values = [], [observed[name]["value"] for name in sites]
        for name, value in zip(sites, values, strict=True):
            whole = recorder.origin(value)
            origin = next((i for i, v in enumerate(leaves) if v is whole), None)
            support = _support_of(name, observed[name]["fn"].support, jnp.result_type(value))
            arrays.append(DataArray(name, origin, True, tuple(jnp.shape(value)), (), support))
    for a, value in zip(arrays, values, strict=True):
        _check_type(a, jnp.result_type(value))
        if 0 in a.shape:
            raise ValueError(f"Data {a.what} is empty, of shape {a.shape}: pass at least one row of one number.")
    return arrays


def _choose_sites(
    recorder: Recorder,
    observed: Trace,
    leaves: Sequence[Any],
    argument_leaves: dict[str, int],
    first: str | None,
    choice: str | tuple[str, ...] | None,
) -> list[str]:
    """The observed sites that are the data; none where an argument is."""
    if isinstance(choice, tuple):  # of one of several plates
        return list(choice)
    if choice is not None:
        if choice not in observed and choice not in argument_leaves:
            known = ", ".join(f"'{n}'" for n in dict.fromkeys([*observed, *argument_leaves])) or "none"
            raise ValueError(f"data='{choice}' is neither an observed site nor an array argument: use {known}.")
        return [choice] if choice in observed else []
    discrete = [k for k, s in observed.items() if s["fn"].support is not None and s["fn"].support.is_discrete]
    # A discrete site without a law of its own is there to be data; one with a law may be a label.
    improper = [k for k in discrete if isinstance(innermost(observed[k]["fn"]), dist.ImproperUniform)]
    if sites := [k for k in observed if k not in discrete or k in improper]:
        return sites
    if discrete and first in argument_leaves:
        value = leaves[argument_leaves[first]]
        is_site = any(recorder.origin(s["value"]) is value for s in observed.values())
        if not is_site and jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return []
    return discrete


def _check_type(a: DataArray, dtype: Any) -> None:
    """Raises TypeError for data in numbers that their support does not have, or that are too coarse."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"Data {a.what} holds {dtype} values: pass floats, e.g. np.stack([{a.name}.real, {a.name}.imag], -1)."
        )
    if not a.support.is_discrete and not jnp.issubdtype(dtype, jnp.floating):
        discrete = "constraints.boolean" if jnp.issubdtype(dtype, jnp.bool_) else "constraints.integer_interval(0, k)"
        raise TypeError(
            f"Data {a.what} holds {dtype} values: score matching differentiates in the data, so pass floats, e.g. "
            f"{a.name}.astype(float), or, if they are discrete, observe a site that says so, e.g. "
            f"numpyro.sample('{a.name}', dist.ImproperUniform({discrete}, (), (d,)), obs={a.name})."
        )
    check_precision(f"Data {a.what}", a.name, dtype)


def _support_of(name: str, constraint: constraints.Constraint, dtype: Any) -> Support:
    kept = None
    if not jnp.issubdtype(dtype, jnp.inexact):  # small integers would wrap around in the model
        kept = "bool" if jnp.issubdtype(dtype, jnp.bool_) else str(jnp.result_type(int))
    try:
        return Support.of(constraint, kept)
    except (NotImplementedError, TypeError) as error:
        kind = type(base_constraint(constraint)).__name__.strip("_").lower()
        if constraint.is_discrete:
            raise NotImplementedError(
                f"Data site '{name}' has support {kind}, whose points have no neighbours that differ in one number: "
                "give the site a product of sets, such as constraints.boolean or constraints.integer_interval(low, "
                "high), or count the sampled units in plates of their own."
            ) from error
        raise NotImplementedError(
            f"Data site '{name}' has support {kind}, for which NumPyro has no map to the real line: transform the data "
            "in the model, and observe a real site."
        ) from error


def row_weights(site: Site, layout: Layout) -> jax.Array:
    """What plates, `handlers.scale` and masks make each row of this site count, (N, ...): constant but over rows."""
    scale, masks = site["scale"], unwrap(site["fn"])[1]
    if not masks and (scale is None or isinstance(scale, int | float)):
        return jnp.full((layout.num_rows, 1), 1.0 if scale is None else scale, jnp.result_type(float))
    batch = tuple(site["fn"].batch_shape)
    return _weigh(1.0 if scale is None else scale, masks, batch, layout.num_rows, layout.row_dims)


@partial(jax.jit, static_argnames=("batch", "num_rows", "row_dims"))  # where nothing is compiled around, one program
def _weigh(scale: Any, masks: list[Any], batch: Shape, num_rows: int, row_dims: Shape) -> jax.Array:
    weight = jnp.asarray(scale, jnp.result_type(float))
    for mask in masks:
        weight = weight * jnp.asarray(mask, weight.dtype)
    batch = jnp.broadcast_shapes(batch, weight.shape)
    if row_dims and len(batch) < -row_dims[0]:  # a value with more batch dimensions than its site
        return jnp.broadcast_to(weight.reshape(-1)[:1], (num_rows, 1))
    return rows_first(jnp.broadcast_to(weight, batch), tuple(len(batch) + d for d in row_dims))


def sum_rows(log_prob: jax.Array, layout: Layout) -> jax.Array:
    """Sums a term over everything but its rows: (batch...) to (N,)."""
    if log_prob.ndim:
        log_prob = jnp.moveaxis(log_prob, layout.row_dims, range(len(layout.row_dims)))
    return log_prob.reshape(layout.num_rows, -1).sum(-1)


def rows_first(value: jax.Array, row_axes: Shape) -> jax.Array:
    """An array with some axes that number the rows, to (N, ...) with the others in one."""
    first = tuple(range(len(row_axes)))
    if row_axes != first:
        value = jnp.moveaxis(value, row_axes, first)
    shape = (math.prod(value.shape[: len(first)]), math.prod(value.shape[len(first) :]))
    return value if value.shape == shape else value.reshape(shape)


def coordinate_bounds(sites: Trace, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Bounds of the coordinates of each row, (N, D) each; infinite where there are none."""
    boxes = [
        limits(sites[a.name]["fn"].support) if a.support.has_bounds else (-jnp.inf, jnp.inf) for a in layout.arrays
    ]
    shapes = tuple(
        (a.shape, a.row_axes) if a.support.has_bounds else ((layout.num_rows, block.stop - block.start), (0,))
        for a, block in zip(layout.arrays, layout.blocks, strict=True)
    )
    return _spread(boxes, shapes)


@partial(jax.jit, static_argnames="shapes")
def _spread(boxes: list[tuple[Any, Any]], shapes: tuple[tuple[Shape, Shape], ...]) -> tuple[jax.Array, jax.Array]:
    """Lower and upper bounds, each over its own shape with the rows in some axes, as columns of rows."""
    columns = [
        [rows_first(jnp.broadcast_to(jnp.asarray(bound, float), shape), axes) for bound in box]
        for box, (shape, axes) in zip(boxes, shapes, strict=True)
    ]
    lower, upper = (jnp.concatenate(c, axis=-1) for c in zip(*columns, strict=True))
    return lower, upper


def refuse_moving_bounds(arrays: Sequence[DataArray], jaxpr: Jaxpr, num_params: int) -> None:
    """Raises if the bounds that `jaxpr` computes vary with its first inputs, the parameters."""
    if any(depends_on_inputs(jaxpr, [i < num_params for i in range(len(jaxpr.invars))])):
        name = next(a.name for a in arrays if a.support.has_boundary)
        raise ValueError(
            f"The bounds of data site '{name}' depend on a parameter, which score matching cannot estimate: make them "
            "constants or arguments."
        )


def check_row_shape(a: DataArray, shape: Shape) -> None:
    """Raises ValueError unless data of this shape are rows of the array, of any number."""
    rest = [None if i in a.row_axes else s for i, s in enumerate(a.shape)]
    if len(shape) != len(rest) or any(r is not None and r != s for r, s in zip(rest, shape, strict=True)):
        raise ValueError(
            f"Data '{a.name}' have shape {shape}, and the model's are of shape {a.shape}: pass rows of that shape, "
            "any number of them."
        )


def by_name(layout: Layout, values: Any) -> dict[str, Any]:
    """Data of all sites, given as {name: array}, or as one array where there is one site.

    Raises:
        TypeError: for one array where there are several sites.
        ValueError: if sites are missing or empty, or names are not the model's.
    """
    names = [a.name for a in layout.arrays]
    if not isinstance(values, dict):
        if len(names) > 1:
            raise TypeError(f"The data are several sites: pass a dict with {names}.")
        values = {names[0]: values}
    if set(values) != set(names):
        raise ValueError(f"The data have {sorted(values)}, and the model's sites are {names}: pass all of these.")
    for name in names:
        if np.size(values[name]) == 0:
            raise ValueError(f"Data '{name}' are empty, of shape {np.shape(values[name])}: pass at least one row.")
    return values
