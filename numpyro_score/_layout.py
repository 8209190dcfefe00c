"""Where the data sits in a model: which sites it enters, and what counts as one row.

NumPyro has no notion of "the data of an unnormalised model"; this module reads it off one abstract run. Nothing
here computes numbers: a :class:`Layout` is static, hashable, and found without touching the data's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.extend.core import Jaxpr, Literal
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

Site = dict[str, Any]
Trace = dict[str, Site]
Shape = tuple[int, ...]


class DataArray(NamedTuple):
    """One array of data: an observed site, or an argument of the model."""

    name: str
    leaf: int | None  # index among the array leaves of the arguments; None if the model holds the data itself
    is_site: bool
    shape: Shape
    row_axes: Shape  # the axes of `shape` that number the rows, outermost first


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

    @property
    def num_rows(self) -> int:
        return math.prod(self.row_shape)

    @property
    def dim(self) -> int:
        return sum(math.prod(a.shape) for a in self.arrays) // max(self.num_rows, 1)

    def with_rows(self, n: int) -> Layout:
        """The same layout for `n` rows; only the one row axis of a resizable model changes."""
        if self.row_shape == (n,) or (n == 1 and not self.row_shape):
            return self

        def resize(a: DataArray) -> DataArray:
            (axis,) = a.row_axes
            return a._replace(shape=(*a.shape[:axis], n, *a.shape[axis + 1 :]))

        return self._replace(arrays=tuple(map(resize, self.arrays)), row_shape=(n,))


# -- running a model in isolation ---------------------------------------------------------------------------------


class _Sealed(Messenger):
    """Keeps a run of the model away from every handler around it.

    `handlers.block` would let requests for random keys through, and an outer `seed` would then keep a key that
    belongs to an inner JAX transformation.
    """

    def __init__(self, rng_key: Any) -> None:
        self.rng_key, self.count = rng_key, 0
        super().__init__()

    def process_message(self, msg: Site) -> None:
        msg["stop"] = True
        if msg["type"] == "prng_key" and self.rng_key is not None:
            msg["value"] = jax.random.fold_in(self.rng_key, self.count)
            self.count += 1


class _Pin(Messenger):
    """Sets sites and plates to given values; a plate without a value takes all its rows."""

    def __init__(self, values: dict[str, Any], plates: dict[str, Any]) -> None:
        self.values, self.plates = values, plates
        super().__init__()

    def process_message(self, msg: Site) -> None:
        kind, name = msg["type"], msg.get("name")
        if kind == "plate":
            size = msg["args"][0]
            rows = self.plates.get(name)
            msg["value"] = jnp.arange(size) if rows is None else rows
            msg["args"] = (size, None)
        elif kind == "control_flow":
            msg["kwargs"]["substitute_stack"].append(("substitute", self.values))
        elif kind in ("sample", "param", "mutable"):
            if name in self.values:
                value = self.values[name]
                # A module updates its mutable state in place: give every run its own copy.
                msg["value"] = dict(value) if kind == "mutable" and isinstance(value, dict) else value
            elif kind == "sample" and not msg["is_observed"]:
                raise ValueError(
                    f"Energy has no value for the latent site '{name}': put one in `params`, e.g. {{'{name}': ...}}."
                )
            elif kind == "param":
                raise ValueError(
                    f"Energy has no value for the param site '{name}': put one in `params`, e.g. {{'{name}': ...}}."
                )


class Recorder(Messenger):
    """Keeps every message itself, not a copy, so that what inner plates make of it can be compared by identity."""

    def __init__(self) -> None:
        self.sites: Trace = {}
        self.subsampled: list[tuple[Any, Site]] = []
        super().__init__()

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "subsample":
            self.subsampled.append((msg["value"], msg))

    def postprocess_message(self, msg: Site) -> None:
        if msg.get("name") is not None:
            self.sites[msg["name"]] = msg

    def origin(self, value: Any) -> Any:
        """What `numpyro.subsample` took `value` from, or `value` itself."""
        for whole, msg in self.subsampled:
            if msg["value"] is value:
                return whole
        return value


def run_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Any],
    plates: dict[str, Any],
    rng_key: Any = None,
) -> Recorder:
    """Runs `model` with sites and plates set, seen by no handler around it."""
    recorder = Recorder()
    with _Sealed(rng_key), recorder, _Pin(values, plates):
        model(*args, **kwargs)
    return recorder


def unwrap(fn: dist.Distribution) -> tuple[dist.Distribution, list[Any]]:
    """The distribution under its masks and expansions, and the masks."""
    masks = []
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            # NumPyro has no public way to read a mask back. tests/test_numpyro_internals.py watches this name.
            masks.append(fn._mask)
        fn = fn.base_dist
    return fn, masks


def is_factor(site: Site) -> bool:
    return isinstance(unwrap(site["fn"])[0], dist.Unit)


def is_observed_sample(site: Site) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def term_log_prob(site: Site) -> jax.Array:
    """The unmasked, unscaled log density of a site, one value per element of its batch shape."""
    fn, _ = unwrap(site["fn"])
    log_prob = fn.log_prob(site["value"])
    shape = jnp.broadcast_shapes(jnp.shape(log_prob), tuple(site["fn"].batch_shape))
    return jnp.broadcast_to(log_prob, shape)


# -- reading the layout -------------------------------------------------------------------------------------------


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _is_real(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):  # real_vector is independent(real, 1)
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def find_arrays(
    recorder: Recorder, leaves: Sequence[Any], argument_leaves: dict[str, int], first: str | None, choice: str | None
) -> list[DataArray]:
    """The arrays that hold the data, without their row axes.

    Args:
        recorder: one run of the model on its own arguments.
        leaves: the array leaves of those arguments.
        argument_leaves: which leaf an argument is, for arguments that are one array.
        first: the name of the first positional argument.
        choice: the user's `data=`, a site or an argument.
    """
    observed = {k: s for k, s in recorder.sites.items() if is_observed_sample(s) and not is_factor(s)}
    discrete = [k for k, s in observed.items() if s["fn"].support is not None and s["fn"].support.is_discrete]
    sites = [k for k in observed if k not in discrete]
    if choice is not None:
        if choice in discrete:
            raise ValueError(
                f"Data site '{choice}' is discrete ({type(observed[choice]['fn']).__name__}): score matching "
                "differentiates in the data, so name a continuous site."
            )
        if choice not in sites and choice not in argument_leaves:
            known = ", ".join(f"'{n}'" for n in [*sites, *argument_leaves]) or "none"
            raise ValueError(f"data='{choice}' is neither a continuous observed site nor an array argument: use {known}.")
        sites = [choice] if choice in sites else []

    if not sites:
        name = choice if choice is not None else first
        if name is None or name not in argument_leaves:
            seen = f"its observed sites {discrete} are discrete" if discrete else "nothing continuous is observed"
            raise ValueError(
                f"The model has no continuous data ({seen}): observe a site, e.g. numpyro.sample('x', "
                "dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x), or take the data as the first "
                "positional argument."
            )
        leaf = argument_leaves[name]
        arrays = [DataArray(name, leaf, False, tuple(jnp.shape(leaves[leaf])), ())]
        values = [leaves[leaf]]
    else:
        arrays, values = [], []
        for name in sites:
            value = observed[name]["value"]
            whole = recorder.origin(value)
            leaf = next((i for i, v in enumerate(leaves) if v is whole), None)
            arrays.append(DataArray(name, leaf, True, tuple(jnp.shape(value)), ()))
            values.append(value)
            if not _is_real(support := observed[name]["fn"].support):
                raise NotImplementedError(
                    f"Data site '{name}' has support {type(support).__name__.strip('_')}, where the boundary adds "
                    "terms that these losses leave out: transform the data to the real line first, e.g. model log(x)."
                )

    for a, value in zip(arrays, values, strict=True):
        kind = "site" if a.is_site else "argument"
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                f"Data {kind} '{a.name}' holds {jnp.result_type(value)} values: score matching differentiates in "
                f"the data, so pass floats, e.g. {a.name}.astype(float)."
            )
        if 0 in a.shape:
            raise ValueError(f"Data {kind} '{a.name}' is empty, of shape {a.shape}: pass at least one row of one number.")
    return arrays


def depends_on_inputs(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of `jaxpr` depend on the marked inputs. A call counts as mixing all that goes in."""
    tainted = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in tainted for v in eqn.invars):
            tainted.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars]


def find_rows(
    sites: Trace, shapes: dict[str, Shape], terms: Sequence[str], arrays: Sequence[DataArray]
) -> tuple[Shape, Shape, tuple[str, ...]]:
    """What counts as one row: `(row_dims, row_shape, row_plates)`.

    Rows are numbered by the plates that all terms of the density share. Without plates the terms' common batch shape
    numbers them, and a scalar density has one row: the whole data.
    """
    if not terms:
        names = ", ".join(f"'{a.name}'" for a in arrays)
        raise ValueError(
            f"No factor or density of the model depends on the data {names}: use the value that numpyro.sample "
            "returns, e.g. x = numpyro.sample('x', ..., obs=x), in the factor."
        )
    frames = {k: {f.name: (f.dim, f.size) for f in sites[k]["cond_indep_stack"]} for k in terms}
    if any(frames.values()):
        shared = set.intersection(*(set(f) for f in frames.values()))
        if not shared:
            outside = next((k for k in terms if not frames[k]), terms[0])
            plate, (_, size) = next((p, v) for f in frames.values() for p, v in f.items())
            shape = tuple(sites[outside]["fn"].batch_shape)
            raise ValueError(
                f"Site '{outside}' of shape {shape} depends on the data but stands outside the plate '{plate}' of "
                f"{_plural(size, 'row')}: move it into the plate and give it one value per row."
            )
        by_dim = sorted((frames[terms[0]][p], p) for p in shared)
        return tuple(d for (d, _), _ in by_dim), tuple(s for (_, s), _ in by_dim), tuple(p for _, p in by_dim)

    shapes = {k: shapes[k] for k in terms}
    if () in shapes.values():
        return (), (), ()
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The sites {shapes} differ in shape: put them in one plate that numbers the rows.")
    shape = shapes[terms[0]]
    return tuple(range(-len(shape), 0)), shape, ()


def check_sites(sites: Trace, layout: Layout) -> None:
    """Refuses models whose density is not a sum over rows of the data."""
    rows = set(layout.row_plates)
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        plates = rows & {f.name for f in site["cond_indep_stack"]}
        if not plates:
            continue
        plate = min(plates)
        if not site["is_observed"]:
            raise ValueError(
                f"Latent site '{name}' stands inside the data plate '{plate}', one value per row: marginalise it out "
                "of the density, or observe it."
            )
        if not is_factor(site):
            continue
        size, given = math.prod(site["fn"].batch_shape), jnp.shape(unwrap(site["fn"])[0].log_factor)
        if math.prod(given) != size:
            raise ValueError(
                f"Factor '{name}' of shape {given} inside the plate '{plate}' would count {size} times: give it one "
                f"value per row, shape {tuple(site['fn'].batch_shape)}, or move it out of the plate."
            )
        if name in layout.penalties:
            raise ValueError(
                f"Factor '{name}' stands in the data plate '{plate}' but does not depend on the data: use the value "
                "that numpyro.sample returns, e.g. x = numpyro.sample('x', ..., obs=x), or move it out of the plate."
            )


def with_row_axes(a: DataArray, site: Site | None, row_dims: Shape, row_shape: Shape) -> DataArray:
    """Adds to a data array which of its axes number the rows."""
    if site is None or not row_dims:
        axes = tuple(range(len(row_dims)))
    else:
        # Without a plate a value may have more batch dimensions than its distribution.
        batch = len(a.shape) - len(site["fn"].event_shape)
        axes = tuple(batch + d for d in row_dims)
    if any(ax < 0 for ax in axes) or tuple(a.shape[ax] for ax in axes) != row_shape:
        raise ValueError(
            f"Data '{a.name}' has shape {a.shape}, which does not match the model's rows {row_shape}: give the "
            "density one value per row of the data."
        )
    return a._replace(row_axes=axes)


def assemble(arrays: Sequence[DataArray], sites: Trace, shapes: dict[str, Shape], depends: dict[str, bool]) -> Layout:
    """Puts a layout together from one run: `depends` says which observed sites depend on the data."""
    entering = tuple(k for k, yes in depends.items() if yes)
    penalties = tuple(k for k, yes in depends.items() if not yes and is_factor(sites[k]))
    if entering:  # improper data sites have no density of their own, but stand in the plates that number the rows
        entering += tuple(a.name for a in arrays if a.is_site and a.name not in entering)
    row_dims, row_shape, row_plates = find_rows(sites, shapes, entering, arrays)
    arrays = [with_row_axes(a, sites[a.name] if a.is_site else None, row_dims, row_shape) for a in arrays]
    masked = any(unwrap(sites[k]["fn"])[1] or jnp.ndim(0 if sites[k]["scale"] is None else sites[k]["scale"]) for k in entering)
    layout = Layout(tuple(arrays), entering, penalties, row_plates, row_dims, row_shape, masked, resizable=False)
    check_sites(sites, layout)
    return layout


def row_weights(site: Site, layout: Layout) -> jax.Array:
    """What plates, `handlers.scale` and masks make each row of this site count, (N, ...): constant but over rows."""
    weight = jnp.asarray(1.0 if site["scale"] is None else site["scale"], jnp.result_type(float))
    for mask in unwrap(site["fn"])[1]:
        weight = weight * jnp.asarray(mask, weight.dtype)
    batch = jnp.broadcast_shapes(tuple(site["fn"].batch_shape), weight.shape)
    if layout.row_dims and len(batch) < -layout.row_dims[0]:  # a value with more batch dimensions than its site
        return jnp.broadcast_to(weight.reshape(-1)[:1], (layout.num_rows, 1))
    rows = jnp.moveaxis(jnp.broadcast_to(weight, batch), layout.row_dims, range(len(layout.row_dims)))
    return rows.reshape(layout.num_rows, -1)


def sum_rows(log_prob: jax.Array, layout: Layout) -> jax.Array:
    """Sums a term over everything but its rows: (batch...) to (N,)."""
    if log_prob.ndim:
        log_prob = jnp.moveaxis(log_prob, layout.row_dims, range(len(layout.row_dims)))
    return log_prob.reshape(layout.num_rows, -1).sum(-1)
