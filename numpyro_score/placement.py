"""Where arrays lie: over several devices, of several processes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

__all__ = [
    "Places",
    "Spread",
    "check_sharding",
    "fetch",
    "label_auto",
    "on_cpu",
    "place_of",
    "places_of",
    "replicate",
]

Places = tuple[NamedSharding | None, ...]
"""Where each of some arrays lies, as :func:`place_of` tells."""


class Spread(NamedTuple):
    """How rows lie over several devices: in equal shares along some axes of a mesh."""

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def num_devices(self) -> int:
        """Shares."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    @classmethod
    def along(cls, place: NamedSharding | None, axis: int) -> Spread | None:
        """That of an axis of an array at `place`; None where all of it is on each device, or other axes are spread."""
        if place is None or axis >= len(place.spec) or any(s for i, s in enumerate(place.spec) if i != axis):
            return None
        names = place.spec[axis]
        found = cls(place.mesh, () if names is None else (names,) if isinstance(names, str) else tuple(names))
        return found if found.num_devices > 1 else None

    @classmethod
    def first_of(cls, data: Any) -> Spread | None:
        """That of the first array that is spread along its first axis alone, as rows are."""
        found = (cls.along(place_of(v), 0) for v in jax.tree.leaves(data))
        return next((spread for spread in found if spread is not None), None)


def place_of(value: Any) -> NamedSharding | None:
    """Where an array over several devices of a mesh lies; None for others, and for traced ones, where it is unknown."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
        return None
    place = value.sharding
    return place if isinstance(place, NamedSharding) and place.num_devices > 1 else None


def places_of(arrays: list[Any]) -> Places:
    """Where each of the arrays lies."""
    return tuple(map(place_of, arrays))


def on_cpu() -> bool:
    """Whether what is traced now is meant for a CPU: JAX's default device is one.

    An array that lies on another device than the default one is not asked, as its place is not known inside of `jit`.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "cpu"
    return (device if isinstance(device, str) else device.platform) == "cpu"


def fetch(tree: Any) -> Any:
    """The arrays as NumPy's, also those of which other processes hold parts; these are to fetch them, too."""

    def one(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
            return np.asarray(value)
        return multihost_utils.process_allgather(value, tiled=True)

    return jax.tree.map(one, tree)


def check_sharding(
    owner: str, name: str, sharding: Any, shape: tuple[int, int], kind: type[Sharding] = Sharding
) -> None:
    """Raises unless `sharding` is None or splits that many chains evenly, and not the numbers of each.

    Args:
        owner: the function that was given it.
        name: its argument that is the number of chains.
        sharding: what a user passed.
        shape: chains, and numbers of each.
        kind: of shardings that it can do with.
    """
    if sharding is None:
        return
    if not isinstance(sharding, kind):
        raise TypeError(
            f"{owner} needs a sharding such as NamedSharding(mesh, PartitionSpec('chains')), got {sharding!r}."
        )
    n, even = len(sharding.device_set), True
    try:
        even = sharding.shard_shape(shape)[1] == shape[1]
    except ValueError:
        even = False
    if not even:
        raise ValueError(
            f"{owner} cannot split {name}={shape[0]} chains evenly over the {n} devices of the sharding: take a "
            f"multiple of {n}, and split the chains alone, not the numbers of each."
        )


def label_auto(tree: Any) -> Any:
    """The same arrays, where they are, with the axes of their mesh left to the compiler.

    The axes of `jax.make_mesh` are explicit, so that every operation must say how its result is laid out; models and
    losses do not.
    """

    def one(value: Any) -> Any:
        place = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
        if not isinstance(place, NamedSharding) or AxisType.Explicit not in place.mesh.axis_types:
            return value
        return jax.device_put(value, NamedSharding(Mesh(place.mesh.devices, place.mesh.axis_names), place.spec))

    return jax.tree.map(one, tree)


def replicate(state: Any, data: Any) -> Any:
    """A state with a copy on each of the devices that the data are spread over, where they are spread over several.

    What is on all of these devices already, such as weights that the user has spread, stays as it is, and what goes by
    the same name and shape, such as an optimiser's moments of them, is spread alike.
    """
    place = next((p for p in map(place_of, jax.tree.leaves(data)) if p is not None), None)
    if place is None:
        return state
    everywhere = NamedSharding(place.mesh, PartitionSpec())

    def is_spread(value: Any) -> bool:
        there = isinstance(value, jax.Array) and value.sharding.device_set == place.device_set
        return there and not value.is_fully_replicated

    leaves = jax.tree_util.tree_leaves_with_path(state)
    spread = [(path, value) for path, value in leaves if is_spread(value)]

    def goes_to(path: Any, value: Any) -> Any:
        alike = [(_same_end(path, p), i) for i, (p, v) in enumerate(spread) if v.shape == value.shape]
        same, i = max(alike, default=(0, 0))
        return spread[i][1].sharding if same else everywhere

    def one(path: Any, value: Any) -> Any:
        if is_spread(value):
            return value
        if everywhere.is_fully_addressable:
            return jax.device_put(value, goes_to(path, value))
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(path, jax.random.key_data(value)), impl=jax.random.key_impl(value))
        return jax.device_put(np.asarray(value), goes_to(path, value))  # JAX compares it between the processes

    return jax.tree_util.tree_map_with_path(one, state)


def _same_end(a: Any, b: Any) -> int:
    """How many keys two paths have in common, from their ends."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (p, q) in enumerate(pairs) if p != q), min(len(a), len(b)))
