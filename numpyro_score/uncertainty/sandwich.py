"""Standard errors of minimisers of a sum of pointwise losses: the Godambe sandwich."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array

from numpyro_score.losses import loss_for
from numpyro_score.losses.rounding import constant_columns
from numpyro_score.placement import fetch
from numpyro_score.programs import shared_jit
from numpyro_score.uncertainty.dependence import Dependence, spread_root
from numpyro_score.uncertainty.few_rows import (
    bends_of,
    sums_of_bends,
    warn_if_few_rows_bend,
    warn_if_few_rows_enter,
)
from numpyro_score.uncertainty.hierarchy import (
    between,
    effects,
    refuse_products,
    rows_along,
    ties,
    warn_if_few_groups,
)
from numpyro_score.uncertainty.jackknife import jackknife_root, takes_jackknife
from numpyro_score.uncertainty.objective import USE_NUTS, Objective, SandwichError

__all__ = [
    "ARRIVED",
    "AT_AN_END",
    "MAX_PARAMETERS",
    "NOT_CONVERGED",
    "Curvature",
    "check_rows",
    "check_size",
    "curvature",
    "derivatives",
    "distance_to_minimum",
    "gradient_at",
    "gradients_of_rows",
    "require_curved",
    "undetermined",
    "used_rows",
    "warn_if_not_converged",
    "warn_of_ends",
]

NOT_CONVERGED = "The fit has not converged"

MAX_PARAMETERS = 2000
"""Above this many parameters the dense (P, P) matrices are not formed."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """Second-order facts of an objective at its minimum, in unconstrained coordinates and double precision."""

    hessian: np.ndarray  # (P, P), of the whole objective: β Σ w_n ∇²ℓ_n − ∇² log π₀
    loss_hessian: np.ndarray  # (P, P), of the losses alone, without β: Σ w_n ∇²ℓ_n
    root: np.ndarray  # (min(N, P), P): rootᵀ root = S, N cov_n(w_n ∇ℓ_n) of independent rows, without β
    size: np.ndarray  # (P,), root mean square of w_n ∇ℓ_n times √N: what `root` is small or large against
    learning_rate: float  # β
    between: np.ndarray | None  # (P, P), Hessian of the prior's terms that are part of the law of the data, if any
    effects: tuple[str, ...]  # the names of these terms
    distance: np.ndarray  # (P,), of the minimum from the estimates, in standard errors; see distance_to_minimum
    at_an_end: np.ndarray  # (P,), which coordinates are at the end of their constraint, and as if they were known
    degrees: float = np.inf  # of freedom of the t law of intervals: see `Dependence`

    @cached_property
    def covariance(self) -> np.ndarray:
        """The sandwich H⁻¹(β²S + B)H⁻¹, (P, P), with B = `between`.

        Raises:
            SandwichError: if a variance is negative, as it may be where a hierarchy's scale collapses.
        """
        covariance = _sandwich(self.hessian, self.learning_rate * self.root, self.between)
        if self.between is not None:
            lower = np.linalg.cholesky(self.hessian)
            lowest = float(np.linalg.eigvalsh(lower.T @ covariance @ lower)[0])
            if lowest < -1e-4:
                raise SandwichError(
                    f"The prior of site '{self.effects[0]}' depends on other sites, and at the joint mode of all of "
                    "them it leaves a variance that is negative: the learning rate is far too small, or groups are "
                    f"too few or too alike for a point fit. {USE_NUTS}"
                )
        return covariance


def _sandwich(hessian: np.ndarray, root: np.ndarray, between: np.ndarray | None) -> np.ndarray:
    half = np.linalg.solve(hessian, root.T)
    if between is None:
        return half @ half.T
    inverse = np.linalg.inv(hessian)
    return half @ half.T + inverse @ between @ inverse


def curvature(objective: Objective, dependence: Dependence | None = None) -> Curvature:
    r"""Hessians, spread of the gradients and sandwich covariance of an objective at its minimum.

    The sandwich of the minimiser of :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)` is

    .. math:: H^{-1} S H^{-1}, \quad H = \nabla^2 \text{objective}, \quad
              S = N \operatorname{cov}_n(\beta w_n \nabla \ell_n),

    over the N rows whose weight is not zero, in unconstrained coordinates [Godambe 1960; Huber 1967]. Without a prior
    this is the H⁻¹SH⁻¹/N of per-row means. The prior bends H but, as it is not random, adds nothing to S. A stochastic
    loss is taken at the random numbers of the objective's `rng_key`, whose noise S then contains. Costs P gradients.

    In a hierarchy rows are independent given all sites, but not given the hyperparameters φ. The prior π(u | φ) of the
    effects u is then part of the law of the data, and the Hessian of −log π(u | φ) is added to S: to first order the
    errors are those with which φ is estimated and u predicted, when u is drawn anew with the rows [Kackar & Harville
    1984]. Where β is calibrated and the rows' losses are a likelihood they are those of the Laplace approximation, H⁻¹.
    This is done for terms of the prior that tie sites to each other, for sites whose elements enter the rows of one
    group each, beside other sites, and where the rows' gradients in some sites have an independent direction for each
    group, along which another site moves all of them. The minimum is the joint mode: scales of effects come out too
    small, the more so the fewer rows a group has, and with them the errors.

    Args:
        objective: at its minimum.
        dependence: which rows depend on each other; None for independent ones. Of groups the spread is that of
            :func:`~numpyro_score.uncertainty.jackknife.jackknife_root`, up to 32 parameters and 1,000 groups.

    Raises:
        SandwichError: for more than MAX_PARAMETERS parameters, fewer than two rows, an H that is not positive
            definite, losses that see two sites by their product alone, or a hierarchy beside `dependence`.

    Warns:
        UserWarning: if the minimum is further away than a tenth of a standard error, see :func:`distance_to_minimum`;
            for parameters at the end of their constraint, or that enter the losses of fewer than five rows;
            if the spread of the effects of fewer than 30 groups is estimated; if few rows bend the objective, see
            :func:`warn_if_few_rows_bend`.
    """
    check_size(objective)
    used = check_rows(objective)
    loss_hessian, prior_hessian, gradients, prior_gradient, bends = derivatives(objective)
    # In double precision on the host: H is often badly scaled, and P is small.
    beta, loss_hessian = float(objective.learning_rate), np.asarray(loss_hessian, np.float64)
    hessian = beta * loss_hessian + np.asarray(prior_hessian, np.float64)
    require_curved(objective, hessian)
    all_gradients = fetch(gradients).astype(np.float64)
    g = all_gradients[used]
    gradient = beta * g.sum(axis=0) + np.asarray(prior_gradient, np.float64)
    refuse_products(objective, g)
    names = effects(objective, g)
    if dependence is not None:
        dependence.refuse_effects(names)
    if dependence is not None and takes_jackknife(dependence, used, len(hessian)):
        root = jackknife_root(objective, dependence, used, hessian, all_gradients)
    else:
        root = spread_root(all_gradients, used, dependence)
    warn_if_few_groups(objective, names)
    spread = np.asarray(between(objective, names=names), np.float64) if names else None
    errors = np.sqrt(np.maximum(np.diag(_sandwich(hessian, beta * root, spread)), 0.0))
    distance = distance_to_minimum(objective, lambda g: np.linalg.solve(hessian, g), gradient, errors)
    at_an_end = warn_of_ends(objective)
    distance = np.where(at_an_end, 0.0, distance)
    warn_if_not_converged(objective, objective.unravel(jnp.asarray(distance, objective.position.dtype)))
    sums = sums_of_bends(bends)
    entered = np.maximum(np.count_nonzero(g, axis=0), sums[0])
    warn_if_few_rows_enter(objective, entered, len(g), np.diag(loss_hessian), names)
    warn_if_few_rows_bend(objective, hessian, sums)
    size = np.sqrt(np.sum(g**2, axis=0))
    degrees = np.inf if dependence is None else dependence.degrees(used)
    return Curvature(hessian, loss_hessian, root, size, beta, spread, names, distance, at_an_end, degrees)


def check_size(objective: Objective) -> None:
    """Raises SandwichError for more than MAX_PARAMETERS parameters."""
    p = len(objective.position)
    if p > MAX_PARAMETERS:
        raise SandwichError(
            f"The sandwich covariance is dense and the model has {p} parameters: it stops at {MAX_PARAMETERS}. Use "
            "stderr(of=...) for functions of them, or stderr(diagonal=True), which ignores correlations."
        )


def require_curved(objective: Objective, hessian: np.ndarray) -> None:
    """Raises SandwichError unless the Hessian of the whole objective, (P, P), is positive definite to rounding."""
    p, lowest = len(hessian), _lowest_eigenvalue(hessian)
    if not lowest > p * np.finfo(np.float64).eps:  # else rounding decides its sign, and a Cholesky factor may not exist
        raise SandwichError(
            "The objective is not curved upwards at the estimates (lowest eigenvalue of its Hessian, scaled to a "
            f"diagonal of one, {lowest:.3g} for {p} parameters): take more steps, or drop or shrink parameters that "
            "the data do not determine." + _why_not_curved(objective)
        )


def _lowest_eigenvalue(hessian: np.ndarray) -> float:
    """The lowest eigenvalue in units where the diagonal is one, if it is positive: of the same sign as without."""
    if not np.isfinite(hessian).all():
        return np.nan
    curvatures = np.diag(hessian)
    if curvatures.min() <= 0:
        return float(curvatures.min())
    scale = np.sqrt(curvatures)
    return float(np.linalg.eigvalsh(hessian / scale / scale[:, None])[0])


def _why_not_curved(objective: Objective) -> str:
    names = ties(objective)
    if not names:
        return constant_columns(objective.energy)
    return f" The prior of site '{names[0]}' depends on other sites; its scale may have collapsed. {USE_NUTS}"


def check_rows(objective: Objective) -> np.ndarray:
    """Which rows have a weight, (N,).

    Raises:
        SandwichError: for fewer than two of them.
    """
    used = used_rows(objective)
    if used.sum() < 2:
        what = "the data are one row" if len(used) == 1 else f"{used.sum()} of {len(used)} rows have a weight"
        series = ", or dependent_rows(fit, lags=...) if it is a series of real numbers" if len(used) == 1 else ""
        raise SandwichError(
            f"The sandwich covariance needs the spread over rows, and {what}: use NUTS instead{series}."
        )
    return used


def used_rows(objective: Objective) -> np.ndarray:
    """Which rows have a weight, (N,)."""
    return fetch(_used(objective))


_used = shared_jit(Objective.used)


def distance_to_minimum(
    objective: Objective, newton_step: Callable[[np.ndarray], np.ndarray], gradient: np.ndarray, errors: np.ndarray
) -> np.ndarray:
    """How far the minimum is by a Newton step, in standard errors.

    Where all rows have one gradient there is no error: the distance is 0 at a minimum, as of data that the model meets
    exactly, and infinite elsewhere.

    A stochastic loss has its minimum elsewhere at each key, up to about one standard error away, and the fit seeks the
    minimum of their mean. So where the step at the objective's own key is not short, the mean step of 64 other keys is
    taken, less what its Monte Carlo error could be: noise alone would exceed that in one of 10,000 fits.

    Args:
        objective: at the estimates.
        newton_step: from a gradient (P,) to the numbers (K,) that the standard errors are of.
        gradient: at the objective's own key.
        errors: standard errors, (K,).
    """
    tiny = float(np.sqrt(np.finfo(objective.position.dtype).eps))

    def in_errors(step: np.ndarray) -> np.ndarray:
        elsewhere = np.where(np.abs(step) > tiny, np.inf, 0.0)
        return np.where(errors > 0, np.abs(step) / np.where(errors > 0, errors, 1.0), elsewhere)

    own = newton_step(gradient)
    distance = in_errors(own)
    if np.max(distance, initial=0.0) <= ARRIVED:
        return distance
    steps: list[np.ndarray] = []
    first = np.asarray(gradient_at(objective, objective.rng_key), np.float64)
    for key in jax.random.split(objective.rng_key, _KEYS):
        other = np.asarray(gradient_at(objective, key), np.float64)
        if not steps and np.array_equal(other, first):  # nothing is random
            return distance
        steps.append(newton_step(other))
    noise = np.std(steps, axis=0, ddof=1) / _KEYS**0.5
    quantile = float(scipy.stats.t.ppf(1 - 0.5e-4 / len(errors), _KEYS - 1))
    return in_errors(np.maximum(np.abs(np.mean(steps, axis=0)) - quantile * noise, 0.0))


ARRIVED = 0.1  # standard errors from the minimum up to which a fit is as good as there
_KEYS = 64


@shared_jit
def gradient_at(objective: Objective, rng_key: Array) -> Array:
    """The gradient of the objective (P,) at its position, at the random numbers of another key."""
    return jax.grad(replace(objective, rng_key=rng_key))(objective.position)


def undetermined(where: str) -> str:
    """What to say of an infinite distance, see :func:`distance_to_minimum`."""
    return (
        f"{NOT_CONVERGED}: all rows have the same gradient {where}, so that its error is 0, and the minimum is "
        "elsewhere, perhaps at infinity. The data do not determine it: are they all alike?"
    )


def warn_if_not_converged(objective: Objective, distance: dict[str, Any]) -> None:
    """Standard errors are those of the minimum, and say nothing of the way to it.

    Args:
        objective: whose loss it is.
        distance: of the minimum by site, in standard errors.
    """
    furthest = {
        k: max((float(np.max(v, initial=0.0)) for v in jax.tree.leaves(d)), default=0.0) for k, d in distance.items()
    }
    name = max(furthest, key=lambda k: furthest[k])
    if np.isinf(furthest[name]):
        warnings.warn(undetermined(f"in site '{name}'"), stacklevel=5)
        return
    # The draws that a loss with chains settles on are others than those of the fit, with noise that no key shows.
    if furthest[name] > (3.0 if hasattr(objective.loss, "settle") else ARRIVED):
        warnings.warn(
            f"{NOT_CONVERGED}: the minimum is {furthest[name]:.2g} standard errors away in site '{name}'. "
            "Take more steps, or another optimiser such as optax.lbfgs().",
            stacklevel=5,
        )


AT_AN_END = "are at the end of their constraint, where errors mean nothing"


def warn_of_ends(objective: Objective) -> np.ndarray:
    """Which coordinates are at the end of their constraint, (P,): the others' errors are as if these were known."""
    at_an_end = objective.at_an_end()
    if names := [k for k, block in objective.blocks().items() if at_an_end[block].any()]:
        warnings.warn(
            f"Numbers of {', '.join(map(repr, names))} {AT_AN_END}, and those of other sites are as if these were "
            "known: leave that term out, or give it a prior away from there.",
            stacklevel=5,
        )
    return at_an_end


def gradients_of_rows(objective: Objective) -> np.ndarray:
    """The gradients of the rows' weighted losses (N, P) on the host, of independent rows and not."""
    return fetch(_gradients_of_rows(objective)).astype(np.float64)


@shared_jit
def _gradients_of_rows(objective: Objective) -> Array:
    return rows_along(objective, jnp.eye(len(objective.position), dtype=objective.position.dtype))


@shared_jit
def derivatives(objective: Objective) -> tuple[Array, Array, Array, Array, Array]:
    """Hessians of the losses and of the penalty (P, P), gradients of the rows (N, P) and of the penalty (P,), and sums.

    The sums (8, P) are for :func:`sums_of_bends`, and 0 for a loss that no bend of the density in the data can harm.
    """
    position = objective.position
    rows, penalty = jax.jit(objective.rows), jax.jit(objective.penalty)  # each is traced once

    def losses(vector: Array) -> Array:
        return jnp.sum(rows(vector))

    def along(direction: Array) -> tuple[Array, Array, Array, Array]:
        def move(f: Callable[[Array], Array], at: Array = position) -> tuple[Array, Array]:
            return jax.jvp(f, (at,), (direction,))

        if hasattr(loss_for(objective.loss, objective.energy), "no_kinks"):
            g, h = move(lambda at: move(rows, at)[1])
            bends = bends_of(g, h)
        else:
            g, bends = move(rows)[1], jnp.zeros(8, position.dtype)
        return move(jax.grad(losses))[1], move(jax.grad(penalty))[1], g, bends

    unit = jnp.eye(len(position), dtype=position.dtype)
    hessian, prior_hessian, gradients, bends = jax.lax.map(along, unit, batch_size=8)
    prior_gradient = jax.grad(penalty)(position)
    return 0.5 * (hessian + hessian.T), 0.5 * (prior_hessian + prior_hessian.T), gradients.T, prior_gradient, bends.T
