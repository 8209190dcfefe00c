"""Estimates that outlying rows hardly move: Windham's weights by the fitted density itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer.util import transform_fn

from numpyro_score.energy import Energy, tempered
from numpyro_score.generalized import GeneralizedModel
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.losses import Loss, loss_for, row_losses
from numpyro_score.losses.base import positive
from numpyro_score.operators import full_precision
from numpyro_score.placement import fetch
from numpyro_score.programs import shared_jit
from numpyro_score.uncertainty import (
    Curvature,
    Objective,
    SandwichError,
    check_rows,
    check_size,
    require_curved,
    spread_root,
)

__all__ = ["Windham", "windham"]

_MOST = 200  # steps of the fixed point
_CLOSE = 1e-3  # of a standard error, to which it is followed


@dataclass(frozen=True)
class Windham:
    """The loss of a robust fit, as :func:`~numpyro_score.windham` makes it: w_n(θ) times the loss of f^{1+c}.

    Args:
        loss: of the density to the power 1 + c.
        c: of the weights exp(c f).
    """

    loss: Loss
    c: float

    no_objective = "its weights follow the parameters, so that the fit is a root and no minimum"
    no_posterior = "its weights follow the parameters, so that it is no sum of losses"

    @property
    def not_saved(self) -> str:
        """Why files do not hold the fit, and what to write instead."""
        return f"robust fits: save the fit that windham was given, and write windham(load(...), {self.c:g}) again"

    def check(self, energy: Energy) -> None:
        """Raises, as the weights are of all rows together, and go with a fit."""
        raise NotImplementedError(f"Windham is the loss of a robust fit: write windham(fit, {self.c}).")

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """The weighted loss of each row, weights of mean one."""
        weights = _weights(energy, self.c)
        return weights * self.loss(tempered(energy, 1 + self.c), rng_key)


def windham(fit: ScoreMatchingResult, c: float) -> ScoreMatchingResult:
    r"""The fit with each row weighted by its own fitted density, which outlying rows hardly move [Windham 1995].

    The estimates solve

    .. math:: \sum_n w_n(\theta)\, \nabla_\theta\, \ell_n[(1 + c) f_\theta] = 0, \quad
              w_n(\theta) = e^{c f_\theta(x_n)},

    where :math:`\ell_n[g]` is the loss of the fit for the log density g. If the rows are from
    :math:`e^{f_\theta} / Z`, rows weighted by :math:`e^{c f_\theta}` are from :math:`e^{(1+c) f_\theta}` up to its
    normaliser, for which the loss is least at the same θ: the estimates are consistent, whatever c and without a
    normaliser, as is seen for exponential families in Scealy, Hingee, Kent & Wood [2024]. c = 0 is the fit itself, and
    0.1 to 0.5 give rows far out little weight; what that costs in standard errors, these say.

    A fixed point from the fit's estimates: with weights held, a Newton step of the weighted objective. There may be
    several, and where most rows are outlying the one found is theirs. Standard errors
    are those of an estimating equation, :math:`A^{-1} S A^{-\top}` with A its Jacobian, weights included, and S the
    spread of its rows. Densities are in the coordinates of :meth:`Energy.flatten <numpyro_score.Energy.flatten>`.

    Args:
        fit: a point fit by a loss of score matching, whose rows are independent or of :func:`dependent_rows`.
        c: how much the weights differ, above zero.

    Returns:
        A fit, whose :meth:`summary`, `stderr`, `sample_posterior`, `to_arviz` and `energy` are those of the robust
        estimates. `row_losses` of its loss are the weighted ones.

    Raises:
        TypeError: for a guide that is no point, a loss without a posterior or with parameters of its own, rows in
            several plates or with missing cells, and a model without a density.
        SandwichError: as `fit.covariance`; for hierarchies; if the fixed point is not reached.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from numpyro_score import ScoreMatching, windham
        >>> def model(x):
        ...     mu, tau = numpyro.param("mu", 0.0), numpyro.param("tau", 1.0)
        ...     numpyro.factor("energy", tau * (mu * x - 0.5 * x**2))
        >>> x = jnp.append(jax.random.normal(jax.random.key(0), (500,)), jnp.full(10, 20.0))  # ten rows are no data
        >>> fit = ScoreMatching(model).run(jax.random.key(1), x, progress_bar=False)
        >>> robust = windham(fit, 0.3)
        >>> bool(fit.estimates["mu"] > 0.3), bool(abs(robust.estimates["mu"]) < 0.15)
        (True, True)
    """
    positive("windham", "c", c)
    if not isinstance(fit, ScoreMatchingResult):
        raise TypeError(f"windham takes a fit of ScoreMatching, got {type(fit).__name__}.")
    if len(fit.energy.parts) > 1:
        raise TypeError("windham takes data in one plate, whose rows have one density, and these are in several.")
    loss = loss_for(fit.svi.score_loss, fit.energy)
    if fit.has_missing_cells:
        raise TypeError("windham weighs whole rows by their density, and this fit has rows with missing cells.")
    if not fit.is_point or hasattr(loss, "no_posterior") or hasattr(loss, "declare"):
        what = type(fit.svi.guide if not fit.is_point else loss).__name__
        raise TypeError(
            f"windham takes a point fit by a loss of rows alone, such as ISM or SSM, and this one is by {what}."
        )
    if not fit.energy.has_density:
        raise TypeError(
            "windham weighs rows by the density, and the model has a score_factor, whose density is unknown."
        )
    objective = replace(fit._objective, loss=loss)
    check_size(objective)
    used = check_rows(objective)
    if fit.curvature.effects:
        raise SandwichError(
            f"windham takes rows as independent, and the prior of site '{fit.curvature.effects[0]}' is of groups of "
            "them: fix its scale."
        )
    objective, found = _fixed_point(objective, c)
    gradient, fixed, jacobian, rows = found
    require_curved(objective, fixed)
    root = spread_root(rows, used, fit.dependence)
    errors = np.linalg.norm(np.linalg.solve(jacobian, root.T), axis=1)
    distance = np.abs(np.linalg.solve(jacobian, gradient)) / np.where(errors > 0, errors, np.inf)
    size = np.sqrt(np.sum(rows[used] ** 2, axis=0))
    rate = float(objective.learning_rate)
    none = np.full_like(jacobian, np.nan)  # there is no objective whose Hessian it were
    curvature = Curvature(jacobian, none, root / rate, size, rate, None, (), distance, objective.at_an_end())
    return _at(fit, objective, Windham(loss, float(c)), curvature)


def _fixed_point(objective: Objective, c: float) -> tuple[Objective, list[np.ndarray]]:
    """The objective at the root, and there what :func:`_equation` returns.

    Steps are Newton's for the objective with the weights held, damped until they descend it; each moves the weights.
    """
    damping = 1e-3
    found = _at_host(objective, c)
    for _ in range(_MOST):
        gradient, fixed, _, rows = found
        values, axes = np.linalg.eigh(fixed)
        spread = np.sqrt(np.maximum(np.sum((rows @ axes) ** 2, axis=0), 1e-300))
        # The gradient beside its own spread: small against the standard errors of any direction.
        if np.max(np.abs(axes.T @ gradient) / spread) < _CLOSE and values[0] > 0:
            return objective, found
        here = float(_total(objective, c, objective.position))
        step = -axes @ ((axes.T @ gradient) / (np.abs(values) + damping * (np.abs(values).max() + 1e-300)))
        moved = objective.position + jnp.asarray(step, objective.position.dtype)
        there = float(_total(objective, c, moved))
        tolerance = 1e-6 * (1.0 + abs(here))  # rounding, near the end
        if np.isfinite(there) and there <= here + tolerance:
            objective, damping = replace(objective, position=moved), max(damping / 10, 1e-12)
            found = _at_host(objective, c)
        else:
            damping = min(damping * 10, 1e12)
    raise SandwichError(
        f"The fixed point was not reached in {_MOST} steps: c = {c} may be too large for these rows, so that few of "
        "them keep a weight, or the fit itself has not converged. Take a smaller one, or more steps of the fit."
    )


def _at_host(objective: Objective, c: float) -> list[np.ndarray]:
    return [fetch(v).astype(np.float64) for v in _equation(objective, c)]


def _at(fit: ScoreMatchingResult, objective: Objective, loss: Windham, curvature: Curvature) -> ScoreMatchingResult:
    """The fit at the position of the objective, with a curvature of its own."""
    svi: Any = copy.copy(fit.svi)
    svi.score_loss = loss
    svi.model = GeneralizedModel(svi.score_model, loss, svi.learning_rate, svi.data)
    prefix = getattr(svi.guide, "prefix", "auto")
    sites = objective.constrain(objective.position)
    params = {k if fit.sites[k]["type"] == "param" else f"{k}_{prefix}_loc": v for k, v in sites.items()}
    free = transform_fn(svi.constrain_fn.args[0], params, invert=True)
    state = fit.state._replace(optim_state=svi.optim.init(free))
    return replace(fit, params=svi.get_params(state), state=state, svi=svi, of_batches=curvature, cost=None)


def _weights(energy: Energy, c: Any) -> Float[Array, "n"]:
    """Exp(c f) of each row, of mean one over the rows that count; the scale is held, as it moves no root."""
    usable, counts = energy.usable()
    log_weights = c * usable.row_log_density(usable.data)
    shift = jax.lax.stop_gradient(jnp.max(jnp.where(counts != 0, log_weights, -jnp.inf)))
    weights = jnp.exp(log_weights - shift)
    return weights / jax.lax.stop_gradient(jnp.sum(counts * weights) / jnp.sum(counts))


def _weighted(objective: Objective, c: Any, weights_at: Array, vector: Array) -> Array:
    """Rows (N,) of the objective at `vector`, weighted by the density at `weights_at`."""
    own = _weights(objective.energy.with_params(objective.constrain(weights_at)), c)
    energy = tempered(objective.energy.with_params(objective.constrain(vector)), 1 + c)
    values, counts = row_losses(objective.loss, energy, objective.rng_key)
    return objective.learning_rate * own * counts * values


@shared_jit
@full_precision
def _total(objective: Objective, c: Any, vector: Array) -> Array:
    """The objective at `vector`, with the weights of its position."""
    return jnp.sum(_weighted(objective, c, objective.position, vector)) + objective.penalty(vector)


@shared_jit
@full_precision
def _equation(objective: Objective, c: Any) -> tuple[Array, Array, Array, Array]:
    """The left side (P,), its Jacobian with the weights held (P, P), that with all (P, P), and its rows (N, P)."""
    position = objective.position

    def total(weights_at: Array, vector: Array) -> Array:
        return jnp.sum(_weighted(objective, c, weights_at, vector)) + objective.penalty(vector)

    left = jax.grad(total, argnums=1)

    def along(direction: Array) -> tuple[Array, Array, Array]:
        held = jax.jvp(lambda v: left(position, v), (position,), (direction,))[1]
        whole = held + jax.jvp(lambda w: left(w, position), (position,), (direction,))[1]
        return held, whole, jax.jvp(lambda v: _weighted(objective, c, position, v), (position,), (direction,))[1]

    held, whole, rows = jax.lax.map(along, jnp.eye(len(position), dtype=position.dtype), batch_size=8)
    return left(position, position), 0.5 * (held + held.T), whole.T, rows.T
