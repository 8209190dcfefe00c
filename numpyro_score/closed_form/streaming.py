"""Quadratic objectives summed over batches of rows, so that memory does not bound their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import init_to_feasible

from numpyro_score.closed_form.coordinates import ClosedFormError, Coordinates
from numpyro_score.closed_form.quadratic import Inputs, Problem, Quadratic, expand
from numpyro_score.energy import Energy, evaluate_for_check, one_plate, split_arrays, sum_by_device
from numpyro_score.generalized import GeneralizedModel, prior_model
from numpyro_score.losses import row_losses
from numpyro_score.losses.base import check_settings
from numpyro_score.operators import full_precision
from numpyro_score.printed import num_numbers, values_with_errors
from numpyro_score.programs import shared_jit
from numpyro_score.random import Key, as_key
from numpyro_score.uncertainty import grouped_sites, nested_terms, prior_terms, site_blocks

__all__ = ["GradientSpread", "QuadraticFit", "QuadraticLoss"]


@dataclass(frozen=True, eq=False)
class QuadraticFit:
    """The minimiser of a :class:`QuadraticLoss`.

    Attributes:
        estimates: constrained values by site.
        value: the objective there.
        vector: the estimates as the vector θ, (P,), in float64.
    """

    estimates: dict[str, Any]
    value: float
    vector: Float[np.ndarray, "p"]

    def __repr__(self) -> str:
        return "\n  ".join([f"QuadraticFit, objective {self.value:.6g}", *values_with_errors(self.estimates, None)])


@dataclass(frozen=True, eq=False)
class QuadraticLoss:
    r"""An objective that is quadratic in its parameters, as numbers that add up over batches of rows.

    .. math:: \beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)
              = \tfrac12\theta^\top\Gamma\theta + g^\top\theta + c + \sum_j w_j |\theta_j|

    in constrained coordinates θ, sites in alphabetical order. The sum `a + b` is that of the rows of both, with the
    prior counted once; `sum(batches)` works. All is kept in float64 on the host: P² numbers, whatever the rows.

    Where the energy is affine in θ and the loss is ISM, ESM or variance-reduced SSM, Γ comes from the Jacobian of the
    score in θ, compressed by colouring its columns; else from P products with the Hessian.

    Attributes:
        data: Γ, g and c of the rows; calling it with θ gives Σ_n w_n ℓ_n times β.
        prior: those of minus the log prior, without the absolute values of Laplace priors.
        penalties: w, (P,): 1/scale of a coordinate's Laplace prior, 0 where it has none.
        between: the part of the prior's Γ whose terms tie sites to each other, such as `mu ~ Normal(m, 1)`, (P, P).
        num_rows: N, the rows whose weight is not zero.
        coordinates: which site each coordinate belongs to.
        learning_rate: β.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import ISM, QuadraticLoss, generalized_bayes
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> target, key = generalized_bayes(model, ISM()), jax.random.key(0)
        >>> batches = jax.random.normal(jax.random.key(1), (5, 100))
        >>> fit = sum(QuadraticLoss.of(target, key, x) for x in batches).solve()
        >>> bool(jnp.isclose(fit.estimates["tau"], 1 / jnp.mean(batches**2)))  # the maximum likelihood estimate
        True
    """

    data: Quadratic
    prior: Quadratic
    penalties: Float[np.ndarray, "p"]
    between: Float[np.ndarray, "p p"]
    num_rows: int
    coordinates: Coordinates
    learning_rate: Any = 1.0

    def __repr__(self) -> str:
        return f"QuadraticLoss of {self.num_rows:,} rows, {self.coordinates}"

    @classmethod
    def of(cls, target: GeneralizedModel, rng_key: Key, *args: Any, **kwargs: Any) -> QuadraticLoss:
        """The objective of one batch of rows.

        A second batch of the same shape compiles nothing; batches of some 10,000 rows or more make the cost of tracing
        the model small.

        Args:
            target: the model, its loss and β, as of :func:`~numpyro_score.generalized_bayes`.
            rng_key: of a stochastic loss; another one for each batch.
            *args: the model's arguments, with the batch as its data.
            **kwargs: the model's keyword arguments.

        Raises:
            ClosedFormError: if the objective is not quadratic in the constrained parameters.
            ValueError: for data that score matching cannot take.
        """
        coordinates, energy = _start(target, args, kwargs)
        rate = target.learning_rate
        energy.check(_evaluate)
        check_settings(target.loss, energy)
        expansion = expand(target, coordinates, energy, as_key(rng_key), args, kwargs)
        between = _tied(target, coordinates, expansion.prior, args, kwargs)
        rows = _rows_used(energy)
        return cls(expansion.data, expansion.prior, expansion.penalties, between, rows, coordinates, rate)

    def __add__(self, other: QuadraticLoss) -> QuadraticLoss:
        if not isinstance(other, QuadraticLoss):
            return NotImplemented
        same = (
            self.coordinates.supports.keys() == other.coordinates.supports.keys()
            and self.coordinates.size == other.coordinates.size
            and np.allclose(self.prior.hessian, other.prior.hessian)
            and np.allclose(self.prior.linear, other.prior.linear)
            and np.array_equal(self.penalties, other.penalties)
        )
        if not same:
            raise ValueError(
                f"The batches differ in their parameters or priors: sites {sorted(self.coordinates.supports)} and "
                f"{sorted(other.coordinates.supports)}; use one model whose priors do not depend on the batch."
            )
        if self.learning_rate != other.learning_rate:
            raise ValueError(
                f"The batches have different learning rates, {self.learning_rate} and {other.learning_rate}: take one "
                "for all."
            )
        return replace(self, data=self.data + other.data, num_rows=self.num_rows + other.num_rows)

    def __radd__(self, other: Any) -> QuadraticLoss:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of `sum`

    @property
    def total(self) -> Quadratic:
        """The rows and the prior together, without the absolute values of Laplace priors."""
        return self.data + self.prior

    def solve(self) -> QuadraticFit:
        """Minimises the objective.

        Raises:
            ClosedFormError: if the minimum violates a constraint, or there are Laplace priors.
            FlatObjectiveError: if the data do not determine the parameters; the message names the sites.
        """
        self._require_no_penalties()
        theta = -self.total.solver(self.coordinates.site_of)(self.total.linear)
        self.coordinates.require_inside(theta)
        return QuadraticFit(self.coordinates.by_site(theta), self.total(theta), theta)

    def covariance(self, spread: GradientSpread) -> Float[np.ndarray, "p p"]:
        """The sandwich covariance H⁻¹SH⁻¹ of θ̂, (P, P), in constrained coordinates, with S = N cov_n(β w_n ∇ℓ_n).

        In a hierarchy the prior of its effects adds its own part to S, as in
        :func:`~numpyro_score.uncertainty.curvature`.

        Args:
            spread: of the rows' gradients at the estimates, from a second pass over the batches, or over as many of
                them as determine a covariance.

        Raises:
            ValueError: for fewer than two rows.
        """
        self._require_no_penalties()
        bread = self.total.solver(self.coordinates.site_of)(np.eye(self.coordinates.size))
        blocks, between = site_blocks(self.coordinates.unravel, self.coordinates.size), self.between.copy()
        # Coordinates that never enter the same row have products of exactly zero.
        for name in grouped_sites(spread.outer != 0, blocks):
            block = np.ix_(blocks[name], blocks[name])
            if not between[block].any():
                between[block] = self.prior.hessian[block]
        return bread @ (self.num_rows * spread.covariance() + between) @ bread

    def stderr(self, spread: GradientSpread) -> dict[str, Any]:
        """Sandwich standard errors by site, in constrained space."""
        return self.coordinates.by_site(np.sqrt(np.diag(self.covariance(spread))))

    def _require_no_penalties(self) -> None:
        if self.penalties.any():
            name = self.coordinates.site_of(int(np.argmax(self.penalties > 0)))
            raise ClosedFormError(f"Site '{name}' has a Laplace prior, which is not quadratic: use sparse_path.")


@dataclass(frozen=True, eq=False)
class GradientSpread:
    """Sums of the rows' gradients β w_n ∇ℓ_n and of their outer products, which add up over batches."""

    outer: Float[np.ndarray, "p p"]
    total: Float[np.ndarray, "p"]
    num_rows: int

    def __repr__(self) -> str:
        return f"GradientSpread of {self.num_rows:,} rows, {num_numbers(self.total)}"

    @classmethod
    def of(
        cls, target: GeneralizedModel, estimates: dict[str, Any], rng_key: Key, *args: Any, **kwargs: Any
    ) -> GradientSpread:
        """Of one batch of rows; the arguments are those of :meth:`QuadraticLoss.of`.

        Args:
            target: the model, its loss and β.
            estimates: constrained values by site.
            rng_key: of a stochastic loss.
            *args: the model's arguments, with the batch as its data.
            **kwargs: the model's keyword arguments.
        """
        coordinates, energy = _start(target, args, kwargs)
        arrays, static = split_arrays((args, kwargs), target.model, target.loss)
        problem = Problem(target.model, target.data, target.loss, static, coordinates.unravel)
        inputs = Inputs(energy, arrays, target.learning_rate, as_key(rng_key))
        theta = Coordinates(coordinates.supports, {k: estimates[k] for k in coordinates.supports}).ravel()
        outer, total = jax.device_get(_spread(theta, inputs, problem=problem))
        return cls(np.asarray(outer, np.float64), np.asarray(total, np.float64), _rows_used(energy))

    def __add__(self, other: GradientSpread) -> GradientSpread:
        if not isinstance(other, GradientSpread):
            return NotImplemented
        return GradientSpread(self.outer + other.outer, self.total + other.total, self.num_rows + other.num_rows)

    def __radd__(self, other: Any) -> GradientSpread:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def covariance(self) -> Float[np.ndarray, "p p"]:
        """The covariance of the gradients over rows, (P, P).

        Raises:
            ValueError: for fewer than two rows.
        """
        if self.num_rows < 2:
            raise ValueError(f"A covariance over rows needs at least two of them, got {self.num_rows}.")
        return (self.outer - np.outer(self.total, self.total) / self.num_rows) / (self.num_rows - 1)


_evaluate = shared_jit(evaluate_for_check)


def _tied(
    target: GeneralizedModel, coordinates: Coordinates, prior: Quadratic, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> np.ndarray:
    """The Hessian of the terms of a quadratic prior that tie sites to each other, (P, P)."""
    tied = prior.hessian.copy()
    for block in site_blocks(coordinates.unravel, coordinates.size).values():
        tied[np.ix_(block, block)] = 0.0
    if not tied.any():
        return tied
    terms = partial(prior_terms, prior_model(target.model, target.data), args, kwargs)
    names = nested_terms(terms, coordinates.values)

    def total(theta: Array) -> Array:
        values = terms(coordinates.unravel(theta))
        return sum((values[k] for k in names), start=jnp.zeros(()))

    return np.asarray(jax.jit(jax.hessian(total))(coordinates.ravel()), np.float64)


def _start(target: GeneralizedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Coordinates, Energy]:
    """The model's sites at feasible values, and its energy there, on all rows."""
    found: list[Energy] = []
    prior: Callable[..., Any] = prior_model(target.model, target.data, inspect_energy=found.append)
    prior = handlers.substitute(handlers.seed(prior, jax.random.key(0)), substitute_fn=init_to_feasible)
    sites = handlers.trace(prior).get_trace(*args, **kwargs)
    if any(s["type"] == "plate" and len(s["value"]) != s["args"][0] for s in sites.values()):
        raise ValueError("The model subsamples a plate: leave subsample_size out and pass batches instead.")
    return Coordinates.of_sites(sites), one_plate(found[0])


def _rows_used(energy: Energy) -> int:
    return int(np.count_nonzero(np.asarray(_weights(energy)[1])))


_weights = shared_jit(Energy.data_and_weights)


@partial(shared_jit, static_argnames=("problem",))
@full_precision
def _spread(theta: Array, inputs: Inputs, *, problem: Problem) -> tuple[Array, Array]:
    """Σ_n g_n g_nᵀ and Σ_n g_n of the rows' gradients."""
    if not inputs.energy.resizable:  # one row cannot be had alone: one direction at a time

        def all_rows(vector: Array) -> Array:
            at = inputs.energy.with_params(problem.unravel(vector))
            losses, weights = row_losses(problem.loss, at, inputs.rng_key)
            return inputs.learning_rate * weights * losses

        _, push = jax.linearize(all_rows, theta)
        g = jax.lax.map(push, jnp.eye(len(theta)), batch_size=8).T
        return g.T @ g, g.sum(axis=0)
    of_rows = partial(_spread_of_rows, problem=problem)
    return sum_by_device(of_rows, one_plate(inputs.energy), inputs.rng_key, theta, inputs.learning_rate)


def _spread_of_rows(
    energy: Energy, weights: Array | None, rng_key: Array, theta: Array, learning_rate: Any, *, problem: Problem
) -> tuple[Array, Array]:
    energy, weights = energy.usable(weights)
    weights = learning_rate * weights
    keys = jax.random.split(rng_key, energy.num_rows)

    def row(values: tuple[Array, Array, Array]) -> Array:
        x, weight, key = values

        def loss(vector: Array) -> Array:
            return weight * problem.loss(energy.with_params(problem.unravel(vector)).at(x[None]), key)[0]

        return jnp.where(weight != 0, jax.grad(loss)(theta), 0.0)

    def add(total: tuple[Array, Array], rows: Any) -> tuple[tuple[Array, Array], None]:
        g = jax.vmap(row)(rows)
        return (total[0] + g.T @ g, total[1] + g.sum(axis=0)), None

    size = min(_ROWS, energy.num_rows)
    k = -(-energy.num_rows // size)
    pad = k * size - energy.num_rows
    rows = (
        jnp.pad(energy.data, ((0, pad), (0, 0)), mode="edge").reshape(k, size, -1),
        jnp.pad(weights, (0, pad)).reshape(k, size),
        keys[jnp.minimum(jnp.arange(k * size), energy.num_rows - 1)].reshape(k, size, *keys.shape[1:]),
    )
    start = (jnp.zeros((len(theta), len(theta)), theta.dtype), jnp.zeros_like(theta))
    return jax.lax.scan(add, start, rows)[0]


_ROWS = 512  # whose gradients are held at once
