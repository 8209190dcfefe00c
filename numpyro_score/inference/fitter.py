"""What a result needs to know of what made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from numpyro_score.energy import Energy, read_arguments
from numpyro_score.losses import Loss
from numpyro_score.uncertainty import Objective, Parametrisation

__all__ = ["Fitter", "objectives_of"]


@runtime_checkable
class Fitter(Protocol):
    """What a result needs to know of the :class:`~numpyro_score.ScoreMatching` that made it."""

    score_model: Callable[..., Any]
    score_loss: Loss
    learning_rate: Any
    data: str | None
    prior: Callable[..., Any]  # the model's parameters alone
    trace_prior: Callable[[dict[str, Any], tuple[Any, ...], dict[str, Any]], dict[str, Any]]  # its sites at values
    guide: Any

    def at_learning_rate(self, learning_rate: float) -> Fitter:
        """The same with another β."""

    def point(self) -> Fitter:
        """The same with a point estimate for a guide."""


def objectives_of(
    at: Objective, svi: Fitter, coordinates: Parametrisation, batches: Iterable[Any]
) -> Iterator[Objective]:
    """What a fit minimises, of each batch of rows, at its estimates."""
    for i, batch in enumerate(batches):
        args, _, _ = read_arguments(svi.score_model, batch if isinstance(batch, tuple) else (batch,), {})
        args = jax.tree.map(jnp.asarray, args)
        energy = Energy.bound_to(svi.score_model, at.energy.params, {}, None, svi.data, args, {})
        key = jax.random.fold_in(at.rng_key, i)
        yield Objective.of(energy, coordinates, at.loss, at.learning_rate, at.prior, args, {}, key)
