"""What differences between fits mean, in words."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from numpyro_score.comparison.scores import Rule
from numpyro_score.energy import Energy

__all__ = ["ERRORS", "Difference", "Rows", "cell", "find_sentence", "joined", "paired", "score_scale", "told_apart"]

Rows = dict[str, np.ndarray]  # (N,) each, by fit

ERRORS = 3.0  # a difference is beyond its error above this many standard errors
BLIND = 0.1  # Fisher's share of what KL sees, below which it is blind


class Difference(NamedTuple):
    """A paired difference of two sums over rows."""

    value: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether it is beyond its error."""
        return abs(self.value) > ERRORS * self.error


def paired(a: np.ndarray, b: np.ndarray, *common: float) -> Difference:
    """Σ (a − b) with the error of rows that could have been others, and of what is common to all rows of a sum."""
    n, difference = len(a), a - b
    error = math.hypot(math.sqrt(n * np.var(difference)), *(n * c for c in common))
    return Difference(float(difference.sum()), error)


def score_scale(energy: Energy) -> float:
    """Nats to a unit of the Hyvärinen score, at most, for Gaussian fits.

    The largest variance of the data, over the mean of the weight that scores near a boundary carry in the coordinate
    where it is least.
    """
    x = np.asarray(energy.data, np.float64)
    lower, upper = (np.asarray(b, np.float64) for b in energy.bounds(len(x)))
    weights = np.minimum(np.minimum(x - lower, upper - x), 1.0)
    for block in energy.blocks:
        if block.kind == "simplex":  # its rows are square roots
            columns = slice(block.start, block.stop)
            weights[:, columns] = np.min(x[:, columns] ** 2, axis=1, keepdims=True)
    return float(np.linalg.eigvalsh(np.atleast_2d(np.cov(x.T)))[-1] / weights.mean(0).min())


def find_sentence(
    likelihoods: Rows,
    errors: dict[str, float],
    scores: Rows,
    rule: Rule,
    scale: float | None,
) -> str | None:
    """Of the pair of fits whose likelihoods differ most among those where the score disagrees.

    Args:
        likelihoods: log p of each row.
        errors: of log Z.
        scores: of each row, lower is better.
        rule: what they are.
        scale: as :func:`score_scale`; None for scores that are not blind to weights of modes by what is known.
    """
    found: list[tuple[float, str]] = []
    for a, b in itertools.permutations(likelihoods, 2):
        kl = paired(likelihoods[a], likelihoods[b], errors[a], errors[b])
        fisher = paired(scores[b], scores[a])  # lower is better
        if kl.value <= 0 or not kl.significant:
            continue
        ahead = f"KL and {rule.under} disagree: the log likelihood of '{a}' is {cell(*kl)} above that of '{b}'"
        agrees = fisher.value > 0 and fisher.significant
        if scale is not None and not agrees and (abs(fisher.value) + ERRORS * fisher.error) * scale < BLIND * kl.value:
            found.append(
                (
                    kl.value,
                    f"{ahead}, while their {rule.score}s differ by {cell(*fisher)}: {rule.under} cannot see the "
                    "weights of separated modes, nor anything else that slopes at the data do not show. Go by the "
                    "likelihood.",
                )
            )
        elif fisher.value < 0 and fisher.significant:
            found.append(
                (
                    kl.value,
                    f"{ahead}, but its {rule.score} is worse by {cell(-fisher.value, fisher.error)}: KL weighs how "
                    f"much mass is where the data are, {rule.under} {rule.sees}. "
                    "Neither model is right; go by what you need of it.",
                )
            )
    return max(found)[1] if found else None


def told_apart(
    order: tuple[str, ...], likelihoods: Rows, errors: dict[str, float], scores: Rows, rule: Rule
) -> list[str]:
    """A line if the likelihood tells the best two apart and the score does not, for whatever reason."""
    a, b = order[:2]
    kl, fisher = paired(likelihoods[a], likelihoods[b], errors[a], errors[b]), paired(scores[b], scores[a])
    if not kl.significant or fisher.significant:
        return []
    return [
        f"The likelihood tells '{a}' from '{b}', by {cell(*kl)}, and on these rows the {rule.score} does not "
        f"({cell(*fisher)}): too few rows for it, or what it cannot see."
    ]


def joined(order: tuple[str, ...], values: dict[str, Any], errors: dict[str, float]) -> str:
    """Names, with > between neighbours that differ beyond the error, and ≈ between others."""
    text = order[0]
    for a, b in itertools.pairwise(order):
        text += (" > " if paired(values[a], values[b], errors[a], errors[b]).significant else " ≈ ") + b
    return text


def cell(value: Any, error: Any = None) -> str:
    """A value to two digits of its error; four digits without one, and a dash where there is nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return value
    if error is None or error < 5e-5:  # beyond what anyone reads
        return f"{value + 0.0:.4g}"  # no negative zero
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
