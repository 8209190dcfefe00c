"""Objectives that are quadratic in the parameters: one linear solve in place of an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.linalg
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro import handlers

from numpyro_score.closed_form.coordinates import ClosedFormError, Coordinates, FlatObjectiveError
from numpyro_score.closed_form.gram import score_gram
from numpyro_score.energy import (
    AnyEnergy,
    base_law,
    is_constant,
    is_quadratic,
    join_arrays,
    split_arrays,
)
from numpyro_score.generalized import GeneralizedModel, prior_model
from numpyro_score.losses import Loss, total_loss
from numpyro_score.operators import full_precision
from numpyro_score.programs import shared_jit

__all__ = ["MAX_PARAMETERS", "Quadratic", "expand", "minimise"]

MAX_PARAMETERS = 5000
"""Above this many parameters the dense Hessian is not formed."""

_FEW = 64  # parameters up to which the Hessian is formed by its products alone, which compiles less


@dataclass(frozen=True, eq=False)
class Quadratic:
    """½θᵀΓθ + gᵀθ + c, in float64 on the host."""

    hessian: np.ndarray  # Γ, (P, P)
    linear: np.ndarray  # g, (P,)
    constant: float

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.hessian + other.hessian, self.linear + other.linear, self.constant + other.constant)

    def __call__(self, theta: np.ndarray) -> float:
        """The value at θ."""
        return float(0.5 * theta @ self.hessian @ theta + self.linear @ theta + self.constant)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Γθ + g, (P,)."""
        return self.hessian @ theta + self.linear

    def restrict(self, index: np.ndarray) -> Quadratic:
        """As a function of some coordinates, with the others at zero."""
        return Quadratic(self.hessian[np.ix_(index, index)], self.linear[index], self.constant)

    def within(self, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The minimiser (P,) between bounds, and which coordinates are at the lower (−1) or the upper (1) one, (P,).

        By bounded least squares, as Γ is positive definite.

        Raises:
            ClosedFormError: if no minimiser is found.
        """
        scale = 1 / np.sqrt(np.diag(self.hessian))
        root = np.linalg.cholesky(self.hessian * scale * scale[:, None]).T
        target = -scipy.linalg.solve_triangular(root, self.linear * scale, trans=1)
        found = scipy.optimize.lsq_linear(root, target, (lower / scale, upper / scale), "bvls")
        if not found.success:
            raise ClosedFormError(f"The minimum of the quadratic within its constraints was not found: {found.message}")
        side = found.active_mask
        return np.select([side < 0, side > 0], [lower, upper], scale * found.x), side

    def solver(self, site_of: Callable[[int], str]) -> Callable[[np.ndarray], np.ndarray]:
        """The map v → Γ⁻¹v of a vector, or of the columns of a matrix.

        Args:
            site_of: the site that a coordinate belongs to, for the message.

        Raises:
            FlatObjectiveError: if Γ is not positive definite beyond the rounding of the precision in force.
        """
        diagonal = np.diag(self.hessian)
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        scaled = self.hessian * scale * scale[:, None]
        rounding = 10 * _rounding() * np.abs(scaled).sum(axis=1).max(initial=1.0)
        identity = np.eye(len(scale))
        try:
            np.linalg.cholesky(scaled - rounding * identity)
        except np.linalg.LinAlgError:
            # Two steps of inverse iteration show the flattest direction.
            flat = np.random.default_rng(0).normal(size=len(scale))
            for _ in range(2):
                flat = np.linalg.solve(scaled + 2 * rounding * identity, flat)
                flat /= np.linalg.norm(flat)
            sites = dict.fromkeys(site_of(int(i)) for i in np.flatnonzero(np.abs(flat) > 0.1))
            names = " and ".join(f"'{name}'" for name in sites)
            raise FlatObjectiveError(
                f"The data do not determine site {names}: the objective is flat along a direction there, to rounding. "
                "Drop parameters, give them a prior such as dist.Normal, or take more rows; if the data lie far from "
                "zero, centre them or enable float64."
            ) from None
        return lambda v: (scale * np.linalg.solve(scaled, (scale * v.T).T).T).T


class Problem(NamedTuple):
    """What the compiled functions below need to know that is not an array."""

    model: Callable[..., Any]
    data: str | None
    loss: Loss
    static: Any  # of the model's arguments
    unravel: Callable[[Array], dict[str, Any]]


class Inputs(NamedTuple):
    """The arrays that they need."""

    energy: AnyEnergy
    arrays: Any  # of the model's arguments
    learning_rate: Any
    rng_key: Array


class Expansion(NamedTuple):
    """The objective of some rows and of the prior, by its parts."""

    data: Quadratic
    prior: Quadratic  # without Laplace priors
    penalties: np.ndarray  # (P,): 1/scale of a Laplace prior, else 0
    value_and_gradient: Callable[[np.ndarray], tuple[float, np.ndarray]]  # of the data, by differentiation


def expand(
    target: GeneralizedModel,
    coordinates: Coordinates,
    energy: AnyEnergy,
    rng_key: Array,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Expansion:
    r"""Writes the objective :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)` as a quadratic.

    The coordinates are constrained values, with no Jacobian: the minimum is what a point guide converges to. A
    stochastic loss is taken at the random numbers of `rng_key`.

    Raises:
        ClosedFormError: if it is not quadratic in the parameters, or they are more than MAX_PARAMETERS.
    """
    if hasattr(target.loss, "no_posterior") or hasattr(target.loss, "no_closed_form"):
        raise ClosedFormError(f"{type(target.loss).__name__} has no closed form: use ScoreMatching with its optimiser.")
    size = coordinates.size
    if not 0 < size <= MAX_PARAMETERS:
        raise ClosedFormError(f"A closed form takes 1 to {MAX_PARAMETERS} parameters, and the model has {size}.")
    arrays, static = split_arrays((args, kwargs), target.model, target.loss)
    problem = Problem(target.model, target.data, target.loss, static, coordinates.unravel)
    inputs = Inputs(energy, arrays, target.learning_rate, rng_key)

    found = _prior(coordinates.ravel(), inputs, problem=problem)
    if found is None:
        raise ClosedFormError("The log prior is not quadratic in the parameters: use ScoreMatching with its optimiser.")
    start, value, gradient, hessian, penalties, centres = map(_host, (coordinates.ravel(), *found))
    if centres[penalties > 0].any():
        name = coordinates.site_of(int(np.argmax(centres * (penalties > 0) != 0)))
        raise ClosedFormError(f"The Laplace prior of site '{name}' is not centred at zero: shift the parameter.")
    linear = gradient - hessian @ start
    prior = Quadratic(hessian, linear, float(value - 0.5 * start @ hessian @ start - linear @ start))

    probe = np.random.default_rng(0).normal(size=size)
    few = size <= _FEW
    products = _products(np.eye(size) if few else probe[None], inputs, problem=problem)
    if products is None:
        raise ClosedFormError(
            "The loss is not quadratic in the parameters (the energy is not affine in them, or the loss not quadratic "
            "in the energy): use ScoreMatching with its optimiser."
        )
    hessian = _host(products)
    if not few:
        gram = score_gram(energy, coordinates.unravel, size)
        gram = None if gram is None else gram * float(target.learning_rate)
        if gram is None or not _agree(gram @ probe, hessian[0], np.abs(gram) @ np.abs(probe), 200 * _rounding()):
            gram = _host(_products(np.eye(size), inputs, problem=problem))
        hessian = gram

    def value_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _value_and_gradient(jnp.asarray(theta, float), inputs, problem=problem)
        return float(value), _host(gradient)

    constant, linear = value_and_gradient(np.zeros(size))
    data = Quadratic(0.5 * (hessian + hessian.T), linear, constant)
    for term in (data, prior):
        if not (np.isfinite(term.hessian).all() and np.isfinite(term.linear).all() and np.isfinite(term.constant)):
            raise ClosedFormError("The loss or the log prior, or a derivative, is not finite: see Energy.check.")
    # What a custom derivative rule hides from the analysis shows a unit of score per row away.
    away = probe * np.sqrt(energy.num_rows / np.where(np.diag(hessian) > 0, np.diag(hessian), np.inf))
    size_of_terms = np.abs(data.hessian) @ np.abs(away) + np.abs(linear)
    if not _agree(data.gradient(away), value_and_gradient(away)[1], size_of_terms, 1e-3):
        raise ClosedFormError("The derivatives of the loss are not those of a quadratic: use an optimiser.")
    return Expansion(data, prior, penalties, value_and_gradient)


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _rounding() -> float:
    return float(jnp.finfo(jnp.result_type(float)).eps)


def _agree(a: np.ndarray, b: np.ndarray, size: np.ndarray, tolerance: float) -> bool:
    """Whether two results agree, relative to the terms that they are sums of."""
    return bool(np.all(np.abs(a - b) <= tolerance * size))


@full_precision
def _data_term(problem: Problem, inputs: Inputs, theta: Array) -> Array:
    energy = inputs.energy.with_params(problem.unravel(theta))
    return inputs.learning_rate * total_loss(problem.loss, energy, inputs.rng_key)


@partial(shared_jit, static_argnames=("problem",))
def _value_and_gradient(theta: Array, inputs: Inputs, *, problem: Problem) -> tuple[Array, Array]:
    return jax.value_and_grad(partial(_data_term, problem, inputs))(theta)


def _products_of(f: Callable[[Array], Array], directions: Array, at_once: int) -> Array:
    """The Hessian of a quadratic times each direction, (K, P)."""
    origin = jnp.zeros_like(directions[0])

    def product(v: Array) -> Array:
        return jax.jvp(jax.grad(f), (origin,), (v,))[1]

    return jax.lax.map(product, directions, batch_size=at_once)


@partial(shared_jit, static_argnames=("problem",))
def _products(directions: Any, inputs: Inputs, *, problem: Problem) -> Array | None:
    """The Hessian of the data's term times each direction, (K, P); None if the term is not quadratic."""
    f, directions = partial(_data_term, problem, inputs), jnp.asarray(directions, float)
    if not is_quadratic(f, directions[0]):
        return None
    numbers = sum(part.num_rows * part.dim for part in inputs.energy.parts)
    # Some hundred megabytes for each of the model's intermediates, at most.
    return _products_of(f, directions, min(max(2**24 // numbers, 1), 16))


@full_precision
def _prior_terms(problem: Problem, inputs: Inputs, theta: Array) -> tuple[Array, tuple[Array, Array]]:
    """Minus the log prior without the |θ| of Laplace priors, and the weights and centres of these, (P,) each."""
    args, kwargs = join_arrays(inputs.arrays, problem.static)
    values = problem.unravel(theta)
    prior = handlers.substitute(handlers.seed(prior_model(problem.model, problem.data), jax.random.key(0)), data=values)
    total = jnp.zeros((), theta.dtype)
    weights, centres = (jax.tree.map(jnp.zeros_like, values) for _ in range(2))
    # Validation makes a density −∞ outside its support, where no formula of it is quadratic.
    with numpyro.validation_enabled(False):
        sites = handlers.trace(prior).get_trace(*args, **kwargs)
        for name, site in sites.items():
            if site["type"] != "sample":
                continue
            scale, laplace = 1.0 if site["scale"] is None else site["scale"], _laplace(site)
            at = site["value"]
            if laplace is not None and name in values and jnp.ndim(scale) == 0:
                weights[name] = jnp.broadcast_to(scale / laplace.scale, jnp.shape(at))
                centres[name] = at = jnp.broadcast_to(laplace.loc, jnp.shape(at))
            total = total - jnp.sum(scale * site["fn"].log_prob(at))
    return total, (ravel_pytree(weights)[0], ravel_pytree(centres)[0])


def _laplace(site: dict[str, Any]) -> dist.Laplace | None:
    law = base_law(site["fn"])
    return law if isinstance(law, dist.Laplace) else None


@partial(shared_jit, static_argnames=("problem",))
def _prior(theta: Array, inputs: Inputs, *, problem: Problem) -> tuple[Array, ...] | None:
    """Value, gradient and Hessian of minus the log prior at θ, then weights and centres of Laplace priors.

    None if these are not all that there is.
    """
    terms = partial(_prior_terms, problem, inputs)
    if not is_quadratic(lambda t: terms(t)[0], theta) or not is_constant(lambda t: terms(t)[1], theta):
        return None
    value, gradient = jax.value_and_grad(lambda t: terms(t)[0])(theta)
    return value, gradient, _products_of(lambda t: terms(t)[0], jnp.eye(len(theta)), 64), *terms(theta)[1]


class Minimum(NamedTuple):
    """Where an objective is least."""

    estimates: dict[str, Any]  # constrained values by site
    value: float  # of the objective there
    at_ends: tuple[str, ...]  # sites with numbers at the end of their constraint, beyond which it would be less


def minimise(
    target: GeneralizedModel,
    sites: dict[str, Any],
    energy: AnyEnergy,
    rng_key: Array,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Minimum:
    """The constrained values of the latent and param sites at the minimum of the objective.

    Constraints are open, so where the minimum violates one the values are beside its end, see
    :meth:`Coordinates.beside_ends`.

    Args:
        target: the generalised model.
        sites: of a trace of its prior, anywhere.
        energy: at the values in `sites`.
        rng_key: where a stochastic loss is held.
        args: the model's arguments.
        kwargs: its keyword arguments.

    Raises:
        ClosedFormError: if there is no closed form.
        FlatObjectiveError: if the minimum is not unique.
    """
    coordinates = Coordinates.of_sites(sites)
    expansion = expand(target, coordinates, energy, rng_key, args, kwargs)
    if expansion.penalties.any():
        raise ClosedFormError("A Laplace prior is not quadratic: see sparse_path.")
    whole = expansion.data + expansion.prior
    theta, at = -whole.solver(coordinates.site_of)(whole.linear), np.zeros(coordinates.size)
    lower, upper = coordinates.ends()
    if not ((lower < theta) & (theta < upper)).all():
        theta, at = whole.within(lower, upper)
    free = np.flatnonzero(at == 0)
    inverse = whole.restrict(free).solver(lambda i: coordinates.site_of(int(free[i])))
    # What forming Γ has lost to rounding, gradients at the solution give back.
    for _ in range(2):
        theta[free] -= inverse((expansion.value_and_gradient(theta)[1] + expansion.prior.gradient(theta))[free])
    if at.any():
        theta = coordinates.beside_ends(theta, at, np.diag(whole.hessian))
    coordinates.require_inside(theta)
    value = expansion.value_and_gradient(theta)[0] + expansion.prior(theta)
    names = dict.fromkeys(coordinates.site_of(int(i)) for i in np.flatnonzero(at))
    return Minimum(coordinates.by_site(theta), value, tuple(names))
