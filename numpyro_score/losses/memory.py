"""Where the memory of losses lies, if rows lie over several devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from numpyro_score.placement import Spread

__all__ = ["spread_memory", "spread_sites"]


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
