"""Fits whose standard errors allow rows to depend on each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from numpyro_score.energy import refuse_other_rows, row_index
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.losses import loss_for
from numpyro_score.losses.base import at_least_one
from numpyro_score.uncertainty import (
    MAX_PARAMETERS,
    Dependence,
    SandwichError,
    automatic_window,
    check_size,
    gradients_of_rows,
)

__all__ = ["dependent_rows"]


def dependent_rows(
    fit: ScoreMatchingResult, *, groups: Any = None, lags: int | str | Mapping[str, int] | None = None
) -> ScoreMatchingResult:
    r"""The same fit with standard errors that allow rows to depend on each other.

    Estimates stay: a sum of losses needs no independent rows. Their spread does. With the rows' gradients g_n the
    middle of the sandwich is

    .. math:: S = \sum_c \Bigl(\sum_{n \in c} g_n\Bigr)\Bigl(\sum_{n \in c} g_n\Bigr)^{\!\top}
              \quad\text{or}\quad S = \sum_{l=-L}^{L} \Bigl(1 - \frac{|l|}{L+1}\Bigr) \sum_t g_t g_{t+l}^\top:

    of groups c that are independent of each other, such as the visits of a patient [Liang & Zeger 1986], or of a series
    [Newey & West 1987]; in a field the product of such weights along several axes [Conley 1999]. Both need many groups,
    or rows of many times L. As rows l apart count by the weight 1 − l/(L + 1) only, L must be several times as large as
    the distance at which rows still depend on each other, or errors are too small: where that is one row, and its
    correlation ½ on either side, they are 0.87 of the right ones with L = 1 and 0.96 with L = 6; in a field the square
    of that. Where the model is right and
    every row is given its past, as in `model(x, past)`, gradients are uncorrelated, and the ordinary errors are right.

    A fit follows its groups, and where they are few that S is too small. Up to 32 parameters and 1,000 groups the
    errors of groups are those of a jackknife: the spread of the G estimates without one group each, times (G − 1)/G.
    They are found from the group's gradient and Hessian, exactly where the objective is quadratic in the constrained
    values [Bell & McCaffrey 2002]; `stderr(of=...)` is their delta method. Intervals of `summary` are those of the t
    law of G − 1 degrees of freedom [Cameron & Miller 2015], with lags of 3 N W / (2 W² + 1) for N rows and W = L + 1.

    What is computed from the sandwich follows: `stderr`, `covariance`, `summary`, `sample_posterior`, `to_arviz`,
    `calibrated_learning_rate`, `adjust_draws`. :meth:`influence` stays that of each row.

    Data of one point, such as a series that is one site or in a scan of NumPyro, have no rows at all; there the loss is
    a sum over the numbers of the point, and g_t is the gradient of its parts at time t, the first axis of the data.

    Args:
        fit: of rows in memory, without effects of groups, whose prior says already how rows depend on each other; or of
            one point of real numbers by ISM or variance-reduced SSM.
        groups: the name of a plate of rows, one of several within each other; or a label for each row, (N,), of any
            kind, such as a column of a table.
        lags: L, several times the number of rows over which they depend on each other, where they are in order; "auto"
            chooses it from the gradients [Andrews 1991]. With rows in several plates {plate: L}: rows that differ in
            the index of a plate that is not named are independent.

    Returns:
        A fit.

    Raises:
        ValueError: for both or neither, a plate that is not one of rows, labels of another length or with missing ones,
            lags beyond the rows.
        SandwichError: for a hierarchy, for batches, for fewer than two groups; "auto" for more than 2,000 parameters.

    Warns:
        UserWarning: of fewer than 30 groups, or windows of L + 1 rows that fit less than 30 times into the rows.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from numpyro_score import ScoreMatching, dependent_rows
        >>> def model(x):
        ...     mu = numpyro.param("mu", 0.0)
        ...     numpyro.factor("energy", -0.5 * (x - mu) ** 2)
        >>> patient = jnp.repeat(jnp.arange(100), 5)  # five visits each
        >>> x = jax.random.normal(jax.random.key(0), (100,))[patient] + 0.1 * jax.random.normal(
        ...     jax.random.key(1), (500,)
        ... )
        >>> fit = ScoreMatching(model).run(jax.random.key(2), x, progress_bar=False)
        >>> clustered = dependent_rows(fit, groups=patient)
        >>> bool(clustered.stderr()["mu"] > 2 * fit.stderr()["mu"])  # as of 100 patients, not of 500 rows
        True
    """
    if not isinstance(fit, ScoreMatchingResult):
        raise TypeError(f"dependent_rows takes a fit of ScoreMatching, got {type(fit).__name__}.")
    if (groups is None) == (lags is None):
        raise ValueError("dependent_rows takes groups=... or lags=..., one of them.")
    fit._refuse_batches("dependent_rows")
    if len(fit.energy.parts) > 1:
        raise SandwichError(
            "dependent_rows takes data in one plate, or in plates within each other, and these are in several beside "
            "each other."
        )
    axes, parts = fit.energy.row_axes, None
    if fit.energy.num_rows == 1:
        length, parts = _parts_of_a_point(fit)
        axes = (("the series", length),)
    shape, names = [n for _, n in axes], [name or "the rows" for name, _ in axes]
    if groups is not None:
        if (known := fit.labels.rows(fit.energy.arrays)) is not None:
            refuse_other_rows("the data", known, "groups", row_index(groups))
        dependence = Dependence.of_groups(*_numbered(groups, shape, names))
    else:
        dependence = Dependence.of_windows(shape, _windows(fit, lags, shape, names, parts), names)
    dependent = replace(fit, dependence=dependence if parts is None else dependence.of_parts(parts))
    if len(dependent.coordinates.position) <= MAX_PARAMETERS:
        dependent.curvature  # noqa: B018 - what is wrong is said here, not at the first question
    return dependent


def _parts_of_a_point(fit: ScoreMatchingResult) -> tuple[int, scipy.sparse.csr_array]:
    """The length T of the first axis of data that are one point, and which of its D numbers are where, (T, D)."""
    energy, loss = fit.energy, loss_for(fit.svi.score_loss, fit.energy)
    if discrete := [a.name for a in energy.arrays if a.support.is_discrete]:
        raise SandwichError(
            f"The data are one point, and errors by lags are for real numbers, where site '{discrete[0]}' is discrete: "
            "make rows of its numbers, each given those before it, as in model(x, past)."
        )
    if not (hasattr(loss, "by_coordinate") and getattr(loss, "variance_reduced", True)):
        raise SandwichError(
            f"The data are one point, whose errors need the loss as a sum over its numbers, and {type(loss).__name__} "
            "is none: fit by ISM() or SSM()."
        )
    lengths = {a.shape[0] if a.shape else 1 for a in energy.arrays}
    if len(lengths) > 1 or not energy.flat:
        shapes = {a.name: (a.support.kind, a.shape) for a in energy.arrays}
        raise SandwichError(
            f"The data are one point of {shapes}: errors by its own parts need real sites whose first axes, those of "
            "time, are all of one length."
        )
    length = lengths.pop()
    at = np.concatenate([np.repeat(np.arange(length), (b.stop - b.start) // length) for b in energy.blocks])
    return length, scipy.sparse.csr_array(
        (np.ones(energy.dim), (at, np.arange(energy.dim))), shape=(length, energy.dim)
    )


def _numbered(groups: Any, shape: list[int], names: list[str]) -> tuple[np.ndarray, str]:
    """The number of the group of each row, and what the groups are of."""
    if isinstance(groups, str):
        if groups not in names:
            raise ValueError(
                f"groups='{groups}' is no plate of rows, which are {names}: name one, or give a label per row."
            )
        along = np.indices(shape)[names.index(groups)]
        return along.ravel(), f"groups of plate '{groups}'"
    labels = np.asarray(groups)
    if labels.size != np.prod(shape) or labels.shape not in ((labels.size,), tuple(shape)):
        raise ValueError(
            f"groups has shape {labels.shape}, and the data have {np.prod(shape)} rows: give a label per row."
        )
    numbers, _ = pd.factorize(labels.ravel())
    if (numbers < 0).any():
        raise ValueError(
            f"groups has no label for rows {np.flatnonzero(numbers < 0)[:5].tolist()}: give each row one, its own if "
            "its group is not known."
        )
    return numbers, "groups"


def _windows(fit: ScoreMatchingResult, lags: Any, shape: list[int], names: list[str], parts: Any) -> dict[int, int]:
    """L + 1 of each axis along which rows depend on each other."""
    if not isinstance(lags, Mapping):
        if len(shape) > 1:
            raise ValueError(
                f"The rows are in the plates {names}: write lags={{'{names[-1]}': {lags!r}}} for the plate along which "
                "they are in order."
            )
        lags = {names[0]: lags}
    if unknown := [k for k in lags if k not in names]:
        raise ValueError(f"lags names '{unknown[0]}', which is no plate of rows: these are {names}.")
    windows = {}
    for name, lag in lags.items():
        axis = names.index(name)
        if isinstance(lag, str):
            if lag != "auto":
                raise ValueError(f"lags must be a number, 'auto' or {{plate: number}}, got '{lag}'.")
            if len(lags) > 1:
                raise ValueError("lags='auto' is for one plate: give numbers for several.")
            check_size(fit._objective)
            gradients = gradients_of_rows(replace(fit._objective, by_coordinate=parts is not None))
            gradients = (gradients if parts is None else parts @ gradients).reshape(*shape, -1)
            series = np.moveaxis(gradients, axis, 0).reshape(shape[axis], -1)
            windows[axis] = min(automatic_window(series), shape[axis])
            continue
        windows[axis] = at_least_one("dependent_rows", "lags", lag) + 1
        if windows[axis] > shape[axis]:
            raise ValueError(f"lags={lag} reaches beyond the {shape[axis]} rows of {name}: give fewer.")
    return windows
