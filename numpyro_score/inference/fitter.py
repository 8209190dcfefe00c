"""What a result needs to know of what made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from numpyro_score.losses import Loss

__all__ = ["Fitter"]


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
