"""Whether chains have mixed, by R-hat beside the noise that it has for so many effective draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.stats

__all__ = ["mixed", "too_many_diverged"]

_ENOUGH, _HALVES, _LEVEL = 400, 8, 0.01
_DIVERGED = 0.005


def too_many_diverged(count: int, transitions: int) -> bool:
    """Whether more than one in 200 transitions diverged: fewer do so in a third of good fits, of 4,000 draws."""
    return count > _DIVERGED * transitions


def mixed(r_hat: Any, ess: Any, usual: float, draws: int) -> bool:
    """Whether no R-hat is above its usual limit, nor above what chains that have mixed show once in a hundred times.

    The means of m halves of chains that agree, of E effective draws in all, vary so that R̂² − 1 is about
    m χ²_{m−1}/((m − 1) E). For 400 to 1,000 draws, as of chains that move slowly, this is above 1.01 where nothing is
    wrong [so are a fifth of those with autocorrelation 0.8, see `benchmarks.false_alarms`]. The same draws' bulk and
    tail are looked at for each number of a row. With fewer than 400, and fewer than a quarter of all draws, chains are
    slow and the limit is the usual one [Vehtari et al. 2021].

    Args:
        r_hat: {site: array}, of four chains.
        ess: {site: array}, the same.
        usual: the limit where effective draws are many or too few.
        draws: of all chains together.
    """
    values = np.concatenate([np.ravel(v.values) for v in r_hat.values()])
    effective = min(float(v.min(skipna=False)) for v in ess.values())
    limit = usual
    if effective >= min(_ENOUGH, draws / 4):
        chi2 = scipy.stats.chi2.isf(_LEVEL / (2 * len(values)), _HALVES - 1)
        limit = max(usual, math.sqrt(1 + _HALVES * chi2 / ((_HALVES - 1) * effective)))
    return bool((values <= limit).all())  # not if NaN
