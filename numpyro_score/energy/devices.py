"""Functions of rows that lie over several devices: one program on each device, for its rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from numpyro_score.energy.bound import BoundModel

__all__ = ["by_device", "sum_by_device"]


def by_device(
    f: Callable[..., Any], energy: BoundModel, rng_key: Array, *rest: Any, sites: tuple[str, ...] = ()
) -> Any:
    """What `f` returns on each device for the rows there, one device's after the other's along the first axis.

    Where the rows are not spread (`Energy.spread`) it is what `f` returns for all of them. Else no row leaves its
    device, whatever XLA would make of the operations: only what `f` asks of `energy.over_devices`, and derivatives in
    the parameters, which are summed once.

    Args:
        f: from the energy of some rows, their weights (n,), a random key of their own and `rest` to arrays with a
            first axis. The weights are those of the whole energy, which some rows alone need not tell; None for all
            rows, as for `Energy.usable`.
        energy: of all rows.
        rng_key: of all rows; that of each device is folded from it.
        *rest: arrays that all devices need. Inside of `jit`, `f` must not close over any.
        sites: whose values are spread along their first axes, as the rows are; others are on every device.
    """
    if energy.spread is None:
        return f(energy, None, rng_key, *rest)
    mesh, axes = energy.spread
    x, weights = energy.data_and_weights()
    rows, same = PartitionSpec(axes), PartitionSpec()
    hollow = energy.at(jnp.zeros((1, energy.dim), x.dtype))  # else a copy of all rows would go to each device
    own = {k: jax.tree.map(lambda _: rows, energy.params[k]) for k in sites}
    parts = jax.tree.map(lambda _: same, hollow).with_params(own)

    def on_device(hollow: BoundModel, x: Array, weights: Array, rng_key: Array, *rest: Any) -> Any:
        return f(hollow.on_device(x, axes), weights, jax.random.fold_in(rng_key, jax.lax.axis_index(axes)), *rest)

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


def sum_by_device(
    f: Callable[..., Any], energy: BoundModel, rng_key: Array, *rest: Any, sites: tuple[str, ...] = ()
) -> Any:
    """The sum over devices of what `f` returns on each, arrays of any shape; otherwise as :func:`by_device`."""
    if energy.spread is None:
        return f(energy, None, rng_key, *rest)

    def stacked(*args: Any) -> Any:
        return jax.tree.map(lambda v: v[None], f(*args))

    return jax.tree.map(lambda v: v.sum(axis=0), by_device(stacked, energy, rng_key, *rest, sites=sites))
