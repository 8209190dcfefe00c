"""A power of a model's density."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy.energy import Energy

__all__ = ["tempered"]


@jax.tree_util.register_pytree_node_class
class _Tempered(Energy):
    """An energy whose log density is multiplied by a number."""

    _power: Any

    def row_log_density(self, x: Float[Array, "n d"], rows: Array | None = None) -> Float[Array, "n"]:
        return self._power * super().row_log_density(x, rows)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, static = super().tree_flatten()
        return (*children, self._power), static

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> _Tempered:
        new = super().tree_unflatten(aux, children[:-1])
        new._power = children[-1]
        return new


def tempered(energy: Energy, power: Any) -> Energy:
    """The energy with log density `power` · f, in the coordinates of `Energy.flatten`."""
    new = object.__new__(_Tempered)
    new.__dict__.update(energy.__dict__, _power=jnp.asarray(power, energy.dtype))
    return new
