"""The loss of a fit that names none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Array, Float

from numpyro_score.energy import AnyEnergy, Energy
from numpyro_score.losses.base import Loss, check_settings
from numpyro_score.losses.discrete import PairLikelihood, PseudoLikelihood
from numpyro_score.losses.ism import ISM
from numpyro_score.losses.mixed import Mixed
from numpyro_score.losses.ssm import SSM

__all__ = ["DefaultLoss", "loss_for"]


@dataclass(frozen=True)
class DefaultLoss:
    """:class:`~numpyro_score.ISM` up to 64 dimensions, and :class:`~numpyro_score.SSM` above.

    For discrete data :class:`~numpyro_score.PseudoLikelihood`, and for counts :class:`~numpyro_score.PairLikelihood`;
    for rows of discrete and continuous numbers :class:`~numpyro_score.Mixed` of these.
    """

    takes_discrete: ClassVar[bool] = True

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        return self.of(energy)(energy, rng_key)

    def by_coordinate(self, energy: Energy, rng_key: Array) -> Float[Array, "n d"]:
        """As of the loss chosen, of continuous data."""
        return self.of(energy).by_coordinate(energy, rng_key)  # type: ignore[attr-defined]

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """As of the loss chosen."""
        return self.of(energy).rows_per_chunk(energy)  # type: ignore[attr-defined]

    def check(self, energy: Energy) -> None:
        """As of the loss chosen."""
        check_settings(self.of(energy), energy)

    @staticmethod
    def of(energy: Energy) -> Loss:
        """The loss for such rows."""
        discrete = len(energy.discrete_columns)
        smooth = ISM() if energy.dim - discrete <= 64 else SSM()
        if not discrete:
            return smooth
        finite = all(a.support.size is not None for a in energy.arrays if a.support.is_discrete)
        ratios: Loss = PseudoLikelihood() if finite else PairLikelihood()
        return ratios if discrete == energy.dim else Mixed(smooth, ratios)


def loss_for(loss: Loss, energy: AnyEnergy) -> Loss:
    """The loss itself, or the one that is chosen for such rows where none was given."""
    if isinstance(loss, DefaultLoss):
        return loss.of(energy.parts[0])
    inner = getattr(loss, "loss", None)
    return replace(loss, loss=inner.of(energy.parts[0])) if isinstance(inner, DefaultLoss) else loss  # type: ignore[type-var]
