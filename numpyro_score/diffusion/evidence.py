"""What runs of particles say of the evidence, and whether they may be trusted."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from numpyro_score.diffusion.particles import Run

__all__ = ["ALONE", "Evidence", "evidence_of", "require_numbers", "warn_of_few"]

_FEW = 10.0  # particles that count, below which there is a warning
ALONE = 2.0  # the same, below which one particle holds most of a run, and nothing tells the error
_DISAGREE = 0.5  # of a mean over runs, a standard error above which it is not one
_MOVED = 3.0  # standard errors that fewer steps may move the evidence by


class Evidence(NamedTuple):
    """Log p(y), two errors of it, and the least share of particles that counted."""

    log_value: float
    stderr: float  # of the runs
    step_error: float  # by how much it moved from half the steps; NaN if that is not known
    least_ess: float


def require_numbers(found: Run, rho: np.ndarray) -> None:
    """Raises FloatingPointError, with the noise and the runs, for weights that are NaN, lost or nowhere."""
    failed, lost = np.asarray(found.failed), np.asarray(found.lost)
    # What is lost in one step may be NaN in the next, and the first cause is named.
    if (failed >= 0).any() and not ((lost >= 0).any() and lost[lost >= 0].min() <= failed[failed >= 0].min()):
        raise FloatingPointError(
            f"Points or weights are NaN or infinite {_place(failed, rho)}: look at the model and at the observation "
            "model there, or take twist='moments'."
        )
    if (lost >= 0).any():
        size = float(np.max(found.size))
        raise FloatingPointError(
            f"Weights are lost {_place(lost, rho)}, where their logs come from numbers up to {size:.2g}, of which this "
            f"precision knows no parts below {size * float(jnp.finfo(found.size.dtype).eps):.2g}: y is too far from "
            "all that the prior draws, or proposals explode; look at y, take twist='moments', or jax.enable_x64(True)."
        )
    if not np.isfinite(found.log_z).all():
        raise FloatingPointError(
            f"The observation is impossible at all particles, at noise {rho[-1]:.3g}, in "
            f"{_runs_text(~np.isfinite(np.asarray(found.log_z)))}: take more num_particles, or look at its noise."
        )


def _place(at: Int[np.ndarray, "runs"], rho: np.ndarray) -> str:
    """Where something went wrong, from its levels by run, -1 where it did not."""
    level = int(np.min(at[at >= 0]))
    return f"from noise {rho[level]:.3g} on, after {level} of {len(rho) - 1} steps, in {_runs_text(at >= 0)}"


def _runs_text(which: Bool[np.ndarray, "runs"]) -> str:
    """How many runs, and the first of these."""
    return f"{np.sum(which)} of {len(which)} runs (first run {np.argmax(which) + 1})"


def evidence_of(found: Run, without: Run | None, coarse: Run | None, num_steps: int) -> Evidence:
    """The evidence of runs, with warnings where it is not to be trusted.

    Args:
        found: R runs.
        without: runs of "smc" without observation, whose own Z belongs to the levels' constants.
        coarse: runs of half the steps, of which some may have failed; None for "smc", and for a single step.
        num_steps: of the runs.
    """
    num_runs, num_particles = found.log_weights.shape
    value, stderr = _mean_and_error(found)
    least, moved = float(np.min(found.least_ess)), float("nan")
    if without is not None:
        constant, error = _mean_and_error(without)
        value, stderr, moved = value - constant, float(np.hypot(stderr, error)), 0.0
        least = min(least, float(np.min(without.least_ess)))
    warn_of_few(least * num_particles, num_particles)
    if num_runs == 1:
        warnings.warn("One run does not tell its error, log_evidence_stderr: take num_runs of 2 or more.", stacklevel=3)
    elif np.isinf(stderr) and least * num_particles >= _FEW:
        warnings.warn(
            f"One of the {num_runs} runs holds most of the evidence, whose error is therefore unknown: trust neither "
            "draws nor evidence; take more num_particles or num_runs.",
            stacklevel=3,
        )
    if coarse is not None:
        sound = (coarse.failed < 0).all() and (coarse.lost < 0).all() and np.isfinite(coarse.log_z).any()
        other, error = _mean_and_error(coarse) if sound else (-np.inf, 0.0)
        moved = float(abs(value - other))
        if moved > _MOVED * np.hypot(stderr, error):
            warnings.warn(
                f"From half the steps to {num_steps} the log evidence moved by {moved:.2g}, and its stderr is "
                f"{stderr:.2g}: the steps are too long for this observation; take more num_steps, or method='smc' for "
                "an energy that is known.",
                stacklevel=3,
            )
    elif without is None:
        warnings.warn(
            "One step does not tell its error, log_evidence_step_error: take num_steps of 2 or more.", stacklevel=3
        )
    return Evidence(value, stderr, moved, least)


def warn_of_few(counted: float, num_particles: int, enough: float = _FEW) -> None:
    """Warns if fewer than `enough` particles counted, out of as many."""
    if counted < enough:
        warnings.warn(
            f"At some noise level {num_particles} particles counted as {counted:.1f}: "
            "trust neither draws nor evidence; take more num_particles, more num_steps, or twist='moments'.",
            stacklevel=4,
        )


def _mean_and_error(found: Run) -> tuple[float, float]:
    """The log of the mean of Z over runs, and its standard error by the delta method.

    It is infinite where the spread of the runs does not tell: one of them holds most of the sum, or one particle most
    of a run. It is NaN for one run.
    """
    log_z = np.asarray(found.log_z, np.float64)
    value = float(np.logaddexp.reduce(log_z) - np.log(len(log_z)))
    if len(log_z) == 1:
        return value, float("nan")
    error = float(np.std(np.exp(log_z - value), ddof=1) / np.sqrt(len(log_z)))
    alone = np.min(found.least_ess) * found.log_weights.shape[-1] < ALONE
    return value, float("inf") if alone or error > _DISAGREE else error
