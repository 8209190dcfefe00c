"""The loss of a fit that names none."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.losses.base import check_settings
from numpyro_score.losses.ism import ISM
from numpyro_score.losses.ssm import SSM

__all__ = ["DefaultLoss"]


@dataclass(frozen=True)
class DefaultLoss:
    """:class:`~numpyro_score.ISM` up to 64 dimensions, and :class:`~numpyro_score.SSM` above."""

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        return self.of_dimension(energy.dim)(energy, rng_key)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """As of the loss chosen."""
        return self.of_dimension(energy.dim).rows_per_chunk(energy)

    def check(self, energy: Energy) -> None:
        """As of the loss chosen."""
        check_settings(self.of_dimension(energy.dim), energy)

    @staticmethod
    def of_dimension(dim: int) -> ISM | SSM:
        """The loss for rows of so many numbers."""
        return ISM() if dim <= 64 else SSM()
