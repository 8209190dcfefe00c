"""Fits at the learning rate that they themselves lead to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from numpyro.infer.autoguide import AutoDelta

from numpyro_score.energy import Sealed
from numpyro_score.inference.fitter import Fitter
from numpyro_score.inference.result import ScoreMatchingResult

__all__ = ["CalibratedRate", "calibrated_fit", "rate_of_fit"]

_MAX_FITS = 5
_TOLERANCE = 0.02  # of β: 1% of the width of an interval


def calibrated_fit(svi: Fitter, run: Callable[..., ScoreMatchingResult], **start: Any) -> ScoreMatchingResult:
    """A fit at its own calibrated learning rate.

    The rate depends on the estimates and, with a prior, the estimates on the rate, by O(1/N). So fits follow each
    other, each from where the one before ended, until the rate is within 2% of the one that the fit used: as a rule
    two, and one without a prior, where the rate does not move the minimum. A guide that is no point is fitted once,
    at the rate of a point fit.

    Args:
        svi: made with `learning_rate="calibrated"`.
        run: `run(svi, **start)` fits such an object, at another learning rate.
        **start: where the first fit starts; where the guide's starts, if it is no point.

    Raises:
        SandwichError: if no rate can be calibrated.

    Warns:
        UserWarning: if the rate does not settle in five fits.
    """
    is_point = isinstance(svi.guide, AutoDelta)
    point = svi if is_point else svi.point()
    fit = run(point.at_learning_rate(1.0), **start if is_point else {})
    for _ in range(_MAX_FITS):
        if fit.interrupted:
            if is_point:
                return fit
            raise KeyboardInterrupt
        used, rate = float(fit.learning_rate), fit.calibrated_learning_rate()
        if not fit.has_prior:
            fit = replace(fit, svi=point.at_learning_rate(rate), losses=rate / used * fit.losses)
            break
        if abs(rate / used - 1) < _TOLERANCE:
            break
        fit = run(point.at_learning_rate(rate), init_params=fit.params)
    else:
        warnings.warn(
            f"The learning rate has not settled: the last fit used {used:.4g} and led to {rate:.4g}. The prior and "
            "the data disagree; take more steps, or pass learning_rate as a number.",
            stacklevel=3,
        )
    return fit if is_point else run(svi.at_learning_rate(fit.learning_rate), **start)


class CalibratedRate:
    """The calibrated learning rate of a model's arguments, remembered while these stay the same.

    Args:
        fit: from the model's arguments to the rate, by a point fit.
    """

    def __init__(self, fit: Callable[[tuple[Any, ...], dict[str, Any]], float]) -> None:
        self.fit = fit
        self._seen: Any = None  # the arguments and the data
        self._rate = 0.0

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], observed: Callable[[], Any]) -> float:
        """The rate of these arguments, from a point fit the first time.

        `observed()` gives the data as the model has them now: it may hold them itself, and they may change.

        Raises:
            TypeError: if an argument is traced.
            SandwichError: if no rate can be calibrated.
        """
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            raise TypeError(
                "learning_rate='calibrated' needs the values of the model's arguments, and they are traced by jit, "
                "grad or vmap: take the number from fit.calibrated_learning_rate() of a ScoreMatching fit outside, and "
                "pass it as learning_rate."
            )
        # Inside of the compiled parts of a sampler too these are numbers, and no handler around is to see the fit.
        with Sealed(None), jax.ensure_compile_time_eval():
            now = args, kwargs, observed()
            structures: list[Any] = [jax.tree.structure(self._seen), jax.tree.structure(now)]
            same = structures[0] == structures[1] and all(map(_same, jax.tree.leaves(self._seen), jax.tree.leaves(now)))
            if not same:
                self._rate = self.fit(args, kwargs)
                self._seen = jax.tree.map(lambda v: np.copy(v) if isinstance(v, np.ndarray) else v, now)
        return self._rate


def _same(old: Any, new: Any) -> bool:
    """Whether two leaves are the same argument. A NumPy array may have changed in place, so its values count."""
    if isinstance(old, np.ndarray):
        return isinstance(new, np.ndarray) and old.dtype == new.dtype and np.array_equal(old, new)
    return old is new or (not isinstance(old, jax.Array) and type(old) is type(new) and bool(old == new))


def rate_of_fit(
    make: Callable[..., Any],
    model: Callable[..., Any],
    loss: Any,
    data: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    """The β that a point fit of the model to these arguments leads to; `make` is the class of the fit."""
    svi = make(model, loss=loss, learning_rate="calibrated", data=data)
    return svi.run(jax.random.key(0), *args, progress_bar=False, **kwargs).learning_rate
