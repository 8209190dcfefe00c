"""Whether the loss was still falling when a run ended, as far as its own values tell."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.stats

__all__ = ["warn_if_still_falling"]


def warn_if_still_falling(losses: np.ndarray, num_rows: int) -> None:
    """Warns if the mean loss of the last quarter of a run is well below that of the quarter before.

    That costs nothing, and is a suspicion only: how far the minimum is in standard errors needs second derivatives,
    which `fit.stderr()` takes. A distance of one standard error is about half a unit of the sum over rows, where the
    unit is the spread of a row's loss; the mean loss of a row stands for it.

    Args:
        losses: of all steps, (S,), sums over rows; values that are not finite do not count.
        num_rows: N.
    """
    losses = losses[np.isfinite(losses)].astype(np.float64)
    quarter = len(losses) // 4
    if quarter < 4:
        return
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    fall = before.mean() - last.mean()
    # Of a mean, from differences of successive steps, which a trend hardly moves; they have 2/3 of the degrees of
    # freedom that deviations from a mean would have [von Neumann 1941].
    variance = (np.mean(np.diff(before) ** 2) + np.mean(np.diff(last) ** 2)) / 2 / quarter
    noise = scipy.stats.t.ppf(1 - 1e-3, 4 / 3 * (quarter - 1)) * np.sqrt(variance)
    unit = abs(last.mean()) / num_rows
    whole = abs(losses[0] - last.mean())  # which bounds what rounding can make of a loss that falls to zero
    if fall > max(noise, _FALL * unit, 1e-5 * whole):
        warnings.warn(
            f"The loss was still falling when the run ended: its mean over the last quarter of the {len(losses)} steps "
            f"is {fall:.3g} below that of the quarter before. The estimates may be far from the minimum: take more "
            "steps with num_steps, or another optimiser such as optax.lbfgs(); fit.stderr() measures how far.",
            stacklevel=5,
        )


_FALL = 1.0
