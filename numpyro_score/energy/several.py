"""Data in several plates, each of rows of its own: one energy for each, which share their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy.energy import Energy
from numpyro_score.energy.layout import DataArray
from numpyro_score.energy.rows import SeveralPlates
from numpyro_score.energy.tables import NO_LABELS, Labels
from numpyro_score.placement import Places, Spread

__all__ = ["AnyEnergy", "Energies", "bind", "one_plate"]


@jax.tree_util.register_pytree_node_class
class Energies:
    """What a fit has in place of an :class:`Energy` where its data stand in several plates.

    The objective is the sum over the plates, each with its own rows, subsample and weights. What needs one density
    takes that of one plate, `fit.energy["x"]` for the plate of data site "x".

    Args:
        parts: the energy of each plate, given the data of the others.
    """

    def __init__(self, parts: tuple[Energy, ...]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Energy:
        """The energy whose data the site is part of."""
        for part in self.parts:
            if any(a.name == name for a in part.arrays):
                return part
        raise KeyError(f"There is no data site '{name}': these are {[a.name for a in self.arrays]}.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by copy and pickle before there are parts
            raise AttributeError(name)
        raise AttributeError(f"{self._told()}, and have no {name} together: {self._instead()}.")

    def _told(self) -> str:
        return f"The data stand in {len(self.parts)} plates"

    def _instead(self) -> str:
        return f"take the energy of one of them, e.g. fit.energy['{self.parts[0].arrays[0].name}']"

    def __repr__(self) -> str:
        return f"Energies({', '.join(map(repr, self.parts))})"

    def tree_flatten(self) -> tuple[tuple[Energy, ...], None]:
        """The parts."""
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> Energies:
        """The inverse of :meth:`tree_flatten`."""
        return cls(tuple(parts))

    # -- as of an Energy ------------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self.parts[0].model

    @property
    def params(self) -> dict[str, Any]:
        """The values that it is bound to."""
        return self.parts[0].params

    @property
    def held(self) -> Any:
        """See :class:`Energy`."""
        return self.parts[0].held

    @property
    def arrays(self) -> tuple[DataArray, ...]:
        """The data of all parts."""
        return tuple(a for part in self.parts for a in part.arrays)

    @property
    def labels(self) -> Labels:
        """None of all: each part has its own."""
        return NO_LABELS

    @property
    def num_rows(self) -> int:
        """The rows of all plates together."""
        return sum(part.num_rows for part in self.parts)

    @property
    def dim(self) -> int:
        """The numbers of the widest row."""
        return max(part.dim for part in self.parts)

    @property
    def penalties(self) -> tuple[str, ...]:
        """The factors that depend on no data."""
        first, *rest = (part.penalties for part in self.parts)
        return tuple(name for name in first if all(name in other for other in rest))

    @property
    def spread(self) -> Spread | None:
        """Of no plate alone: how rows lie over devices is each part's."""
        return None

    @property
    def is_concrete(self) -> bool:
        """Whether all values are known."""
        return all(part.is_concrete for part in self.parts)

    @property
    def weights(self) -> Float[Array, "n"]:
        """What each row counts, the plates one after the other."""
        return jnp.concatenate([part.weights for part in self.parts])

    def usable(self) -> tuple[Energies, Float[Array, "n"]]:
        """As :meth:`Energy.usable`, of each part."""
        found = [part.usable() for part in self.parts]
        return Energies(tuple(energy for energy, _ in found)), jnp.concatenate([weights for _, weights in found])

    def with_params(self, params: dict[str, Any]) -> Energies:
        """At other values."""
        return Energies(tuple(part.with_params(params) for part in self.parts))

    def labelled(self, labels: Labels) -> Energies:
        """With what tables say of the columns."""
        return Energies(tuple(part.labelled(labels) for part in self.parts))

    def check(self, evaluate: Callable[[Energy], Any] | None = None) -> None:
        """Looks at each part, see :meth:`Energy.check`."""
        for part in self.parts:
            part.check(evaluate)


AnyEnergy = Energy | Energies


def one_plate(energy: Any) -> Any:
    """What is given, but for data in several plates.

    Raises:
        TypeError: for these, which have no density together.
    """
    if isinstance(energy, Energies):
        raise TypeError(f"{energy._told()}, each with a density of its own: {energy._instead()}.")
    return energy


def bind(
    model: Callable[..., Any],
    params: dict[str, Any],
    plates: dict[str, Array],
    rng_key: Array | None,
    data: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    places: Places | None = None,
    labels: Labels = NO_LABELS,
) -> AnyEnergy:
    """The energy of a model at values, as :meth:`Energy.bound_to`, or of each of several plates of data."""

    def of(choice: Any) -> Energy:
        return Energy.bound_to(model, params, plates, rng_key, choice, args, kwargs, places, labels)

    try:
        return of(data)
    except SeveralPlates as found:
        return Energies(tuple(map(of, found.groups)))
