"""Where arrays lie: over several devices, of several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["fetch", "label_auto", "on_cpu", "replicate"]


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


def label_auto(tree: Any) -> Any:
    """The same arrays, where they are, with the axes of their mesh left to the compiler.

    The axes of `jax.make_mesh` are explicit, so that every operation must say how its result is laid out; models and
    losses do not.
    """

    def one(value: Any) -> Any:
        if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
            return value
        place = value.sharding
        if not isinstance(place, NamedSharding) or AxisType.Explicit not in place.mesh.axis_types:
            return value
        return jax.device_put(value, NamedSharding(Mesh(place.mesh.devices, place.mesh.axis_names), place.spec))

    return jax.tree.map(one, tree)


def replicate(state: Any, data: Any) -> Any:
    """A state with a copy on each of the devices that the data are spread over, where they are spread over several.

    What is on all of these devices already, such as weights that the user has spread, stays as it is.
    """
    places = [v.sharding for v in jax.tree.leaves(data) if isinstance(v, jax.Array)]
    place = next((p for p in places if isinstance(p, NamedSharding) and p.num_devices > 1), None)
    if place is None:
        return state
    everywhere = NamedSharding(place.mesh, PartitionSpec())

    def one(value: Any) -> Any:
        there = isinstance(value, jax.Array) and value.sharding.device_set == place.device_set
        if there and not value.is_fully_replicated:
            return value
        if everywhere.is_fully_addressable:
            return jax.device_put(value, everywhere)
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(value)), impl=jax.random.key_impl(value))
        return jax.device_put(np.asarray(value), everywhere)  # JAX compares it between the processes

    return jax.tree.map(one, state)
