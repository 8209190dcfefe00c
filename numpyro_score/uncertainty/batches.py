"""Standard errors of all rows of batches, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.placement import fetch
from numpyro_score.uncertainty.few_rows import sums_of_bends, warn_if_few_rows_bend, warn_if_few_rows_enter
from numpyro_score.uncertainty.hierarchy import effects, refuse_products
from numpyro_score.uncertainty.objective import USE_NUTS, Objective, SandwichError
from numpyro_score.uncertainty.sandwich import (
    ARRIVED,
    Curvature,
    check_size,
    derivatives,
    gradient_at,
    require_curved,
    used_rows,
    warn_if_not_converged,
    warn_of_ends,
)

__all__ = ["curvature_of_batches"]

_AT_ONE_KEY = 3.0  # standard errors that the minimum at one draw of a loss may be away from that of its mean


def curvature_of_batches(objectives: Iterator[Objective], num_rows: int | None) -> Curvature:
    r"""What :func:`~numpyro_score.uncertainty.curvature` gives of all rows at once, from sums over batches.

    .. math:: H = \beta \tfrac{N}{M} \sum_{b}\sum_{n \in b} w_n \nabla^2 \ell_n - \nabla^2 \log\pi_0, \quad
              S = \tfrac{N}{M} \tfrac{M}{M-1} \sum_b \sum_{n \in b} (g_n - \bar g)(g_n - \bar g)^\top,
              \quad g_n = w_n \nabla \ell_n,

    of M rows with a weight in all batches, which stand for N. In double precision on the host; a stochastic loss is
    taken at the key of each objective.

    Args:
        objectives: of each batch, all at the same estimates.
        num_rows: N; None for M.

    Raises:
        SandwichError: as `curvature`; for a hierarchy, whose groups a batch does not show; for fewer than two rows.
        ValueError: for no batch, or more rows in batches than `num_rows`.

    Warns:
        UserWarning: if the minimum is further away than a tenth of a standard error, or than three if the loss draws
            random numbers.
    """
    first: Objective | None = None
    hessian: Any = 0.0
    outer, total, bends, entered = np.zeros(()), np.zeros(()), np.zeros(()), np.zeros((), int)
    prior_hessian, prior_gradient, random, count = np.zeros(()), np.zeros(()), False, 0
    for objective in objectives:
        *found, of_batch = derivatives(objective)
        loss_hessian, of_prior, gradients, slope = (fetch(v).astype(np.float64) for v in found)
        g = gradients[used_rows(objective)]
        if first is None:
            first = objective
            check_size(first)
            refuse_products(first, g)
            if names := effects(first, g):
                raise SandwichError(
                    f"The prior of site '{names[0]}' makes rows of a group depend on each other, and batches do not "
                    f"show whole groups: give run all rows. {USE_NUTS}"
                )
            prior_hessian, prior_gradient = of_prior, slope
            one, other = (fetch(gradient_at(first, key)) for key in jax.random.split(first.rng_key))
            random = not np.array_equal(one, other)
        hessian, outer, total, count = hessian + loss_hessian, outer + g.T @ g, total + g.sum(axis=0), count + len(g)
        bends, entered = bends + sums_of_bends(of_batch), entered + np.count_nonzero(g, axis=0)
    if first is None:
        raise ValueError("batches has none: give at least one, an iterator anew as it can be used only once.")
    if num_rows is not None and num_rows < count:
        raise ValueError(f"num_rows={num_rows} is less than the {count} rows of all batches: give their number.")
    if count < 2:
        raise SandwichError(f"The sandwich covariance needs the spread over rows, and the batches have {count}.")
    share, beta = (1.0 if num_rows is None else num_rows / count), float(first.learning_rate)
    loss_hessian, outer, total = share * hessian, share * outer, share * total
    whole = beta * loss_hessian + prior_hessian
    require_curved(first, whole)
    spread = (outer - np.outer(total, total) / (share * count)) * count / (count - 1)
    warn_if_few_rows_enter(first, np.maximum(entered, bends[0]), count, np.diag(loss_hessian))
    warn_if_few_rows_bend(first, whole / share, bends)  # of the rows that there are
    size = np.sqrt(np.diag(outer))
    unit = np.where(size > 0, size, 1.0)
    variances, axes = np.linalg.eigh(spread / np.outer(unit, unit))
    root = (np.sqrt(np.maximum(variances, 0.0))[:, None] * axes.T) * unit
    errors = np.sqrt(np.sum(np.linalg.solve(whole, beta * root.T) ** 2, axis=1))
    step = np.linalg.solve(whole, beta * total + prior_gradient)
    at_an_end = warn_of_ends(first)
    distance = np.where(at_an_end, 0.0, np.abs(step) / np.where(errors > 0, errors, np.inf))
    if not random or distance.max() > _AT_ONE_KEY:
        warn_if_not_converged(first, first.unravel(jnp.asarray(distance, first.position.dtype)))
    elif distance.max() > ARRIVED:  # which one draw of the loss's random numbers may well be
        distance = np.zeros_like(distance)
    return Curvature(whole, loss_hessian, root, size, beta, None, (), distance, at_an_end)
