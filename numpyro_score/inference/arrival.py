"""Whether a run that ended may not have arrived, or at a fit of another density than the model's."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import scipy.stats

from numpyro_score.energy import AnyEnergy, quadrature_error
from numpyro_score.inference.processes import is_first
from numpyro_score.placement import fetch

__all__ = ["warn_at_end", "warn_if_average_lags", "warn_if_still_falling", "warn_of_density"]


def warn_at_end(fitter: Any, state: Any, losses: np.ndarray, num_rows: int) -> None:
    """Warns, in the first process, where a run that nothing stopped may not have arrived.

    Args:
        fitter: a :class:`~numpyro_score.ScoreMatching`.
        state: the last `SVIState`.
        losses: of all steps, (S,).
        num_rows: that a loss is a sum over.
    """
    if not is_first() or hasattr(fitter.score_loss, "no_objective"):
        return
    warn_if_still_falling(losses, num_rows)
    if fitter.average is not None:
        warn_if_average_lags(losses, num_rows, fitter.average, int(state.optim_state[0]))


def warn_of_density(loss: Any, fit: Any) -> None:
    """Warns, in the first process, where the density is approximated badly at the rows that a fit ended on."""
    energy = fit.energy
    _warn_of_points(energy)
    _warn_of_draws(loss, energy, jax.random.fold_in(fit.state.rng_key, 2))


def _warn_of_points(energy: AnyEnergy) -> None:
    """Warns, in the first process, where a latent site is integrated by too few points for the score to be right.

    Between points that are too far apart the density has dents, and a fit seeks parameters that make use of them: with
    normal laws, a change of the score by 7% or more came with estimates 2 to 19 standard errors off, and one by 0.05%
    with 0.04 (`tests/test_integrated_latents.py`).
    """
    for part in energy.parts:
        error = quadrature_error(part)  # of rows that may lie over all processes
        if error is None or error <= _OFF or not is_first():
            continue
        latent = next(v for v in part.latents if v.integrated)
        seen = f"changes by {error:.0%} of its size, and estimates may be off by many standard errors"
        if latent.placed:
            what, where = f"by {latent.size} points placed for each row", " or the mode looked for from other starts,"
            then = f"Write infer={{'laplace': {4 * latent.size}}}, or where a row's law of the site has several modes "
            then += "{'quadrature': 32}, whose points are the same for all rows"
        else:
            what, where, then = f"by {latent.size} points", "", f"Write infer={{'quadrature': {2 * latent.size}}}"
        warnings.warn(
            f"The integral over site '{latent.name}' {what} is off: with more of them{where} the score of a row "
            f"{seen}. {then}.",
            stacklevel=6,
        )


def _warn_of_draws(loss: Any, energy: AnyEnergy, rng_key: Any) -> None:
    """Warns, in the first process, where the draws that a loss weighs are worth few in some of the rows."""
    if not hasattr(loss, "effective_draws"):
        return
    worth = fetch(loss.effective_draws(energy, rng_key))
    worth = worth[worth < 0.999 * loss.num_draws]  # of rows that have missing cells
    if not len(worth) or (low := float(np.quantile(worth, 0.05))) >= _FEW_DRAWS or not is_first():
        return
    warnings.warn(
        f"The {loss.num_draws} draws of missing cells are worth {low:.1f} or fewer in one of twenty rows that have "
        f"such cells, and {np.mean(worth):.1f} on average: the loss is noisy and biased, and so may estimates and "
        f"errors be. Write more, num_draws={4 * loss.num_draws}.",
        stacklevel=6,
    )


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
            stacklevel=6,
        )


def warn_if_average_lags(losses: np.ndarray, num_rows: int, average: float, num_steps: int) -> None:
    """Warns if an average of the parameters may be far from where the run ended, as it holds too many early steps.

    A suspicion that costs nothing, from the losses of the steps. Near a minimum a step of excess loss e is √(2e)
    standard errors away, in the unit of :func:`warn_if_still_falling`, and the average at most as far as the weighted
    mean of these distances. It is nearer, as steps lie on several sides: five to ten times, where it was measured.

    Args:
        losses: of all steps of a run, (S,); values that are not finite do not count.
        num_rows: N.
        average: d, the decay.
        num_steps: steps that the average holds, S and those of the runs before.
    """
    weights = average ** np.arange(len(losses))[::-1].astype(np.float64)
    weights *= (1 - average) / -np.expm1(num_steps * np.log(average))
    finite = np.isfinite(losses)
    losses, weights = losses[finite].astype(np.float64), weights[finite]
    if len(losses) < 16:
        return
    last = losses[-(len(losses) // 4) :]
    variance = np.mean(np.diff(last) ** 2) / 2
    distance = 0.0
    for part, weight in zip(np.array_split(losses, 16), np.array_split(weights, 16), strict=True):
        noise = scipy.stats.norm.isf(1e-4) * np.sqrt(variance * (1 / len(part) + 1 / len(last)))
        excess = part.mean() - last.mean()
        distance += weight.sum() * np.sqrt(2 * excess * num_rows / abs(last.mean())) if excess > noise else 0.0
    if distance > _LAG:
        warnings.warn(
            f"The average of the parameters seems to hold too many early steps, of higher loss: average={average} "
            f"remembers {1 / (1 - average):.0f} steps or more of a run of {num_steps}. Take more steps with num_steps, "
            "or a smaller average.",
            stacklevel=6,
        )


_FEW_DRAWS = 2.0
_OFF = 0.01  # of the score
_FALL = 1.0
_LAG = 5.0
