"""Losses of rows that lie over several devices: one program on each device, for its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from numpyro_score.energy import Energy
from numpyro_score.placement import Spread

__all__ = ["by_device", "spread_memory", "spread_sites"]


def by_device(f: Callable[..., Any], energy: Energy, rng_key: Array, *rest: Any, loss: Any = None) -> Any:
    """What `f` returns on each device for the rows there, one device's after the other's along the first axis.

    No row leaves its device, whatever XLA would make of the operations: only what `f` asks of
    `energy.over_devices`, and derivatives in the parameters, which are summed once.

    Args:
        f: from the energy of some rows, their weights (n,), a random key of their own and `rest` to arrays with a
            first axis.
        energy: whose rows are spread, see `Energy.spread`.
        rng_key: of all rows; that of each device is folded from it.
        *rest: arrays that all devices need. Inside of `jit`, `f` must not close over any.
        loss: whose memory is among the energy's params, if it has any, see :func:`spread_sites`.
    """
    assert energy.spread is not None
    mesh, axes = energy.spread
    x, weights = energy.data_and_weights()
    rows, same = PartitionSpec(axes), PartitionSpec()
    hollow = energy.at(jnp.zeros((1, energy.dim), x.dtype))  # else a copy of all rows would go to each device
    sites = spread_sites(loss, energy.spread, energy.params)
    own = {k: jax.tree.map(lambda _: rows, energy.params[k]) for k in sites}
    parts = jax.tree.map(lambda _: same, hollow).with_params(own)

    def on_device(hollow: Energy, x: Array, weights: Array, rng_key: Array, *rest: Any) -> Any:
        local = hollow.on_device(x, axes).usable(weights)[0]
        return f(local, weights, jax.random.fold_in(rng_key, jax.lax.axis_index(axes)), *rest)

    # JAX's own account of what varies over devices would have each loop of a model say so.
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(parts, rows, rows, same, *(same for _ in rest)),
        out_specs=rows,
        axis_names=set(axes),
        check_vma=False,
    )
    return run(hollow, x, weights, rng_key, *rest)


def spread_sites(loss: Any, spread: Spread | None, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The sites of a loss's memory whose slots are spread over devices as the rows are: those in equal shares."""
    if spread is None:
        return ()

    def shares(name: str) -> bool:
        return all(len(v) % spread.num_devices == 0 for v in jax.tree.leaves(values[name]))

    return tuple(name for name in getattr(loss, "slots", ()) if name in values and shares(name))


def spread_memory(loss: Any, spread: Spread | None, memory: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The memory of a loss by site, if it has any, its slots on the devices that move them."""
    if memory is None or spread is None:
        return memory
    sites = spread_sites(loss, spread, memory)
    place = NamedSharding(spread.mesh, PartitionSpec(spread.axes))
    return {k: jax.device_put(v, place) if k in sites else v for k, v in memory.items()}
