"""What each row does to the estimates, and standard errors of functions of them, for any number of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.distributions.transforms import IndependentTransform

from numpyro_score.closures import Keyed
from numpyro_score.operators import full_precision
from numpyro_score.placement import fetch
from numpyro_score.programs import shared_jit
from numpyro_score.uncertainty.dependence import Dependence
from numpyro_score.uncertainty.hierarchy import rows_along, sum_of_terms, ties, unshared_sites, warn_if_few_groups
from numpyro_score.uncertainty.objective import USE_NUTS, Objective, SandwichError, norm_of_columns
from numpyro_score.uncertainty.sandwich import check_rows, distance_to_minimum, used_rows, warn_if_not_converged

__all__ = ["diagonal_stderr", "influence", "stderr_from", "stderr_of"]

_MAX_STEPS = 10_000  # of conjugate gradients


def influence(objective: Objective, of: Callable[[dict[str, Any]], Any] | None, hessian: np.ndarray | None) -> Any:
    r"""The influence of each row on functions of the estimates, as `of` returns them, each leaf (N, ...).

    .. math:: I_n = -\sqrt{\tfrac{N}{N-1}}\, \nabla g^\top H^{-1} \beta\,
              \bigl(w_n \nabla\ell_n - \tfrac1N \sum_m w_m \nabla\ell_m\bigr),

    for the N rows whose weight is not zero, and 0 for the others, with H the Hessian of the whole objective and g the
    function: the infinitesimal jackknife [Jaeckel 1972; Efron 1982], scaled so that :math:`\sum_n I_n I_n^\top` is the
    sandwich covariance; in a hierarchy, the rows' part of it. It costs one solve with H for each number that `of`
    returns, and one derivative of the losses along its solution.

    Args:
        objective: at its minimum.
        of: from estimates by site to an array, or a pytree of them; None for all estimates.
        hessian: of the objective; if None, the systems are solved by conjugate gradients, which need products with
            it alone.

    Raises:
        SandwichError: for data of one row, or where conjugate gradients find the objective not curved upwards, or do
            not converge.
        TypeError: if `of` does not return floats.

    Warns:
        UserWarning: if the minimum is further away than a tenth of a standard error.
    """
    return _influence(objective, _all if of is None else of, hessian)[0]


def _all(estimates: dict[str, Any]) -> dict[str, Any]:
    return estimates


def stderr_of(
    objective: Objective,
    of: Callable[[dict[str, Any]], Any],
    hessian: np.ndarray | None,
    effects: tuple[str, ...] | None = None,
    dependence: Dependence | None = None,
) -> Any:
    """Standard errors of what `of` returns, in its structure: of the rows' influence, and a hierarchy's own part.

    Args:
        objective: at its minimum.
        of: from estimates by site to an array, or a pytree of them.
        hessian: of the objective, or None, as for :func:`influence`, which also says what is raised.
        effects: the terms of the prior that are part of the law of the data; if None, they are
            looked for. See :func:`~numpyro_score.uncertainty.curvature`.
        dependence: which rows depend on each other; None for independent ones.
    """
    found = ties(objective) + unshared_sites(objective) if effects is None else effects
    if dependence is not None:
        dependence.refuse_effects(found)
    rows, directions = _influence(objective, of, hessian)
    if dependence is not None:
        rows = _pieces(rows, used_rows(objective), dependence)
    variances, unravel = ravel_pytree(jax.tree.map(lambda v: jnp.sum(v**2, axis=0), rows))
    errors = ravel_pytree(jax.tree.map(norm_of_columns, rows))[0]
    if effects is None:
        warn_if_few_groups(objective, found)
    if found:
        variances += _quadratic_forms(objective, directions, names=found)
        if not bool(jnp.all(variances >= 0)):
            raise SandwichError(
                f"The prior of site '{found[0]}' depends on other sites, and at the joint mode of all of them it "
                f"leaves a variance that is negative. {USE_NUTS}"
            )
        errors = jnp.sqrt(variances)
    return unravel(errors)


def stderr_from(objective: Objective, of: Callable[[dict[str, Any]], Any], covariance: np.ndarray) -> Any:
    """Standard errors of what `of` returns, in its structure, by the delta method from a covariance (P, P)."""
    values = of(objective.constrain(objective.position))
    jacobian = np.asarray(_jacobian(objective, of=Keyed(of)), np.float64)
    errors = np.sqrt(np.einsum("kp,pq,kq->k", jacobian, covariance, jacobian))
    flat, unravel = ravel_pytree(values)
    return unravel(jnp.asarray(errors, flat.dtype))


def _pieces(rows: Any, used: np.ndarray, dependence: Dependence) -> Any:
    """What the variances are sums of squares of, from the influence of rows that depend on each other."""
    dependence.check(used)
    corrected = (used.sum() / (used.sum() - 1)) ** 0.5  # as if they were independent

    def of(leaf: Array) -> Array:
        host = fetch(leaf).astype(np.float64).reshape(len(used), -1) / corrected
        return jnp.asarray(dependence.pieces(host, used), leaf.dtype).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(of, rows)


@partial(shared_jit, static_argnames=("names",))
@full_precision
def _quadratic_forms(objective: Objective, directions: Float[Array, "k p"], *, names: tuple[str, ...]) -> Array:
    """dᵀBd of each direction, with B the Hessian of some terms of the prior."""
    gradient = jax.grad(partial(sum_of_terms, objective, names))

    def form(direction: Array) -> Array:
        return direction @ jax.jvp(gradient, (objective.position,), (direction,))[1]

    return jax.lax.map(form, directions)


def _influence(
    objective: Objective, of: Callable[[dict[str, Any]], Any], hessian: np.ndarray | None
) -> tuple[Any, Float[Array, "k p"]]:
    """The influence of rows, and H⁻¹∇g for each number that `of` returns."""
    if not callable(of):
        raise TypeError(
            f"of must be a function of the estimates, e.g. lambda estimates: estimates['scale'] ** 2, got {of!r}."
        )
    used = jnp.asarray(check_rows(objective))
    values = of(objective.constrain(objective.position))
    if not all(jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in jax.tree.leaves(values)):
        raise TypeError(f"of must return arrays of floats, differentiable in the estimates; it returned {values}.")
    jacobian = _jacobian(objective, of=Keyed(of))
    if hessian is None:
        directions, gradient = _conjugate_gradients(objective, jacobian)
    else:  # whoever formed the Hessian has looked at the convergence
        directions, gradient = jnp.asarray(np.linalg.solve(hessian, jacobian.T).T, jacobian.dtype), None
    rows = -objective.learning_rate * rows_along(objective, directions)
    n = used.sum()
    rows = jnp.where(used[:, None], (rows - rows.sum(axis=0) / n) * (n / (n - 1)) ** 0.5, 0.0)
    unravel = ravel_pytree(values)[1]
    if gradient is not None:
        errors = np.sqrt(np.sum(fetch(rows).astype(np.float64) ** 2, axis=0))
        along = np.asarray(directions, np.float64)
        distance = distance_to_minimum(objective, lambda g: along @ g, np.asarray(gradient, np.float64), errors)
        warn_if_not_converged(objective, {"of": distance})
    return jax.vmap(unravel)(rows), directions


@partial(shared_jit, static_argnames=("of",))
def _jacobian(objective: Objective, *, of: Callable[[dict[str, Any]], Any]) -> Float[Array, "k p"]:
    return jax.jacrev(lambda v: ravel_pytree(of(objective.constrain(v)))[0])(objective.position)


def _conjugate_gradients(
    objective: Objective, jacobian: Float[Array, "k p"]
) -> tuple[Float[Array, "k p"], Float[Array, "p"]]:
    """H⁻¹ times each row of `jacobian`, and the gradient of the objective."""
    solutions, gradient, curved, residual = _solve(objective, jacobian)
    if not bool(jnp.all(curved)):
        raise SandwichError(
            "The objective is not curved upwards at the estimates, as conjugate gradients found on the way: take more "
            "steps, or give the parameters a prior, e.g. numpyro.sample('weights', dist.Normal(0, 1).expand(...))."
        )
    tolerance = 10 * _tolerance(jacobian)
    if not bool(jnp.all(residual <= tolerance)):
        raise SandwichError(
            f"Conjugate gradients left a relative residual of {float(jnp.max(residual)):.2g}, and {tolerance:.2g} is "
            f"asked, within {_MAX_STEPS} steps: the objective is nearly flat in some direction, so give the parameters "
            "a tighter prior, or enable double precision."
        )
    return solutions, gradient


def _tolerance(x: Array) -> float:
    """Of the relative residual: two thirds of the digits, as the condition number of H takes from them."""
    return float(jnp.finfo(x.dtype).eps) ** (2 / 3)


@shared_jit
@full_precision
def _solve(objective: Objective, jacobian: Array) -> tuple[Array, Array, Array, Array]:
    """Solutions (K, P), the gradient (P,), whether the objective curves upwards (K,), and relative residuals (K,)."""
    gradient = jax.grad(objective)

    def hessian(direction: Array) -> Array:
        return jax.jvp(gradient, (objective.position,), (direction,))[1]

    eps = jnp.finfo(jacobian.dtype).eps
    tolerance = _tolerance(jacobian)
    solver = lx.CG(rtol=tolerance, atol=tolerance, norm=jnp.linalg.norm, max_steps=_MAX_STEPS)

    def solve(row: Array) -> tuple[Array, Array, Array]:
        size = jnp.linalg.norm(row)
        unit = row / jnp.where(size > 0, size, 1.0)
        # The solver takes pᵀHp below 100 P eps for a breakdown, whatever the units of H, and compares with absolute
        # tolerances. In these units pᵀHp is 1/eps in the first step.
        unit_curvature = unit @ hessian(unit)
        scale = 1.0 / (eps * jnp.where(unit_curvature > 0, unit_curvature, 1.0))

        def product(direction: Array) -> Array:
            image = scale * hessian(direction)
            # The solver does not look for negative curvature, but it stops at NaN.
            return jnp.where(direction @ image < 0, jnp.nan, image)

        operator = lx.FunctionLinearOperator(
            product, jax.ShapeDtypeStruct(unit.shape, unit.dtype), lx.positive_semidefinite_tag
        )
        solution = lx.linear_solve(operator, unit, solver, throw=False).value
        residual = jnp.linalg.norm(product(solution) - unit)
        return size * scale * solution, jnp.all(jnp.isfinite(solution)), residual

    solutions, curved, residual = jax.lax.map(solve, jacobian)
    return solutions, gradient(objective.position), curved, residual


def diagonal_stderr(objective: Objective) -> dict[str, Any]:
    r"""Standard errors by site that ignore all correlations, for any number of parameters.

    In unconstrained coordinates :math:`\sqrt{S_{jj}} / H_{jj}` for each parameter j, with H and S as in
    :func:`~numpyro_score.uncertainty.curvature`; the delta method takes them to constrained space. They are those of
    fits in which all other parameters are known. Costs P derivatives of the losses and no (P, P) matrix.

    Raises:
        SandwichError: for data of one row, if some H_jj is not positive, or for a site whose elements enter the rows of
            one group each, beside other sites: with its effects known, those have errors that are far too small.
    """
    check_rows(objective)
    names = ties(objective)
    if unshared := [k for k in unshared_sites(objective) if k not in names]:
        raise SandwichError(
            f"Each element of site '{unshared[0]}' enters the rows of one group, which are not independent if it is "
            "not known, while diagonal=True takes each parameter as if all others were: use stderr() or, for some "
            "numbers of many, stderr(of=...)."
        )
    warn_if_few_groups(objective, names)
    curvature, spread = _diagonals(objective, names=names)
    worst = {k: float(jnp.min(ravel_pytree(v)[0], initial=jnp.inf)) for k, v in objective.unravel(curvature).items()}
    name = min(worst, key=lambda k: worst[k])
    if not worst[name] > 0:
        raise SandwichError(
            f"The objective is not curved upwards at the estimates in site '{name}' (second derivative "
            f"{worst[name]:.3g}): take more steps, or drop or shrink parameters that the data do not determine."
        )
    low = {k: float(jnp.min(ravel_pytree(v)[0], initial=0.0)) for k, v in objective.unravel(spread).items()}
    if low[name := min(low, key=lambda k: low[k])] < 0:
        raise SandwichError(
            f"The prior of site '{name}' depends on other sites and curves downwards at the estimates. {USE_NUTS}"
        )
    errors = objective.unravel((jnp.sqrt(spread) / curvature).astype(objective.position.dtype))
    at = objective.unravel(objective.position)
    return {k: _through(objective.transforms[k], at[k], errors[k]) for k in at}


@partial(shared_jit, static_argnames=("names",))
def _diagonals(objective: Objective, *, names: tuple[str, ...]) -> tuple[Float[Array, "p"], Float[Array, "p"]]:
    """The diagonals of H and S, with the Hessian of some terms of the prior in S."""
    position, used = objective.position, objective.used()

    def of(index: Array) -> tuple[Array, Array]:
        direction = jax.nn.one_hot(index, len(position), dtype=position.dtype)

        def twice(f: Callable[[Array], Array]) -> tuple[Array, Array]:
            return jax.jvp(lambda v: jax.jvp(f, (v,), (direction,))[1], (position,), (direction,))

        gradients, seconds = twice(objective.rows)
        beta = objective.learning_rate
        curvature = beta * jnp.sum(seconds) + twice(objective.penalty)[1]
        n = jnp.sum(used)
        spread = n * beta**2 * jnp.var(gradients, where=used) * n / (n - 1)
        if names:
            spread += twice(partial(sum_of_terms, objective, names))[1]
        return curvature, spread

    return jax.lax.map(of, jnp.arange(len(position)), batch_size=8)


def _through(transform: Any, value: Any, errors: Any) -> Any:
    """Standard errors of `transform(value)` from independent ones of `value`."""
    base = transform
    while isinstance(base, IndependentTransform):
        base = base.base_transform
    if base.domain.event_dim == 0:  # one number at a time; the value may then be a pytree
        return jax.tree.map(jnp.abs, jax.jvp(transform, (value,), (errors,))[1])
    jacobian = jax.jacfwd(transform)(value)
    axes = tuple(range(jacobian.ndim - jnp.ndim(value), jacobian.ndim))
    return jnp.sqrt(jnp.sum((jacobian * errors) ** 2, axis=axes))
