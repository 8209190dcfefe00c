"""What each row says of a fit without its normaliser: the score that fits are ordered under, beside the likelihood."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from numpyro_score.comparison.loo import hyvarinen_score
from numpyro_score.energy import Energy
from numpyro_score.losses import DefaultLoss, PseudoLikelihood, row_losses

__all__ = ["HYVARINEN", "Rule", "row_scores"]


class Rule(NamedTuple):
    """A proper scoring rule, of which lower is better, in words."""

    score: str  # what its values are called
    under: str  # what fits are in order under
    formula: str
    sees: str


HYVARINEN = Rule("Hyvärinen score", "Fisher", "½‖∇log p‖² + Δlog p", "the slopes of the log density there")
_PSEUDO = Rule(
    "minus log pseudo-likelihood",
    "pseudo-likelihood",
    "−Σ log p(x_d | all other numbers of the row)",
    "each number given the others of its row",
)
_PAIRS = Rule(
    "minus log likelihood of pairs",
    "pair likelihood",
    "−Σ log p(x_d | all other numbers of the row, and that x_d is one of two values)",
    "the ratios of the density to those at the distances 1, 2, 4 and so on",
)


def row_scores(energies: dict[str, Energy], rng_key: Array) -> tuple[Rule, dict[str, np.ndarray]]:
    """The rule for such data, and its value for each row of each fit, (N,).

    Discrete data have no slopes: the rule is then the loss that is meant where none is given, which has no normaliser
    either.
    """
    first = next(iter(energies.values()))
    if not len(first.discrete_columns):
        return HYVARINEN, {k: hyvarinen_score(e).pointwise.values for k, e in energies.items()}
    loss = DefaultLoss.of(first)
    rule = _PSEUDO if isinstance(loss, PseudoLikelihood) else _PAIRS
    return rule, {k: np.asarray(row_losses(loss, e, rng_key)[0], np.float64) for k, e in energies.items()}
