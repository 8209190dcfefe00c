"""Standard errors of minimisers of a sum of pointwise losses: the Godambe sandwich."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import log_density, transform_fn

from numpyro_score.energy import Energy, join_arrays, split_arrays
from numpyro_score.losses import Loss, row_losses

__all__ = ["MAX_PARAMETERS", "Curvature", "Objective", "Parametrisation", "SandwichError", "curvature"]


class SandwichError(ValueError):
    """The sandwich covariance of a fit does not exist or is too large to form."""


MAX_PARAMETERS = 2000
"""Above this many parameters the dense (P, P) matrices are not formed."""


@dataclass(frozen=True)
class Parametrisation:
    """The map between constrained values by site and one unconstrained vector of P numbers."""

    transforms: dict[str, Any]
    position: Float[Array, "p"]  # of the estimates
    unravel: Callable[[Array], dict[str, Any]]

    @classmethod
    def of_sites(cls, sites: dict[str, Any]) -> Parametrisation:
        """From the latent and param sites of a traced model, at their values there."""
        transforms, values = {}, {}
        for name, site in sites.items():
            if site["type"] == "param":
                constraint = site["kwargs"].get("constraint", constraints.real)
            elif site["type"] == "sample" and not site["is_observed"]:
                constraint = site["fn"].support
            else:
                continue
            transforms[name] = biject_to(constraint)
            values[name] = transforms[name].inv(site["value"])
        position, unravel = ravel_pytree(values)
        return cls(transforms, position, unravel)

    def constrain(self, vector: Float[Array, "p"]) -> dict[str, Any]:
        """Constrained values by site."""
        return transform_fn(self.transforms, self.unravel(vector))

    def stderr(self, covariance: np.ndarray) -> dict[str, Any]:
        """Standard errors in constrained space by the delta method, in the sites' own shapes."""
        root = _root(covariance)
        return _delta_method(self.position, self.transforms, jnp.asarray(root, self.position.dtype), self.unravel)

    def draw(self, rng_key: Array, covariance: np.ndarray, n: int) -> dict[str, Any]:
        """N draws from N(position, covariance), constrained: {site: (n, ...)}."""
        root = jnp.asarray(_root(covariance), self.position.dtype)
        return _draws(rng_key, self.position, self.transforms, root, self.unravel, n)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("position", "transforms", "energy", "arrays", "learning_rate", "rng_key"),
    meta_fields=("unravel", "loss", "prior", "static"),
)
@dataclass(frozen=True)
class Objective:
    r"""What a fit minimises, :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)`, of one unconstrained vector.

    A pytree, so that compiled functions of it serve all data of the same shapes. A stochastic loss is taken at the
    random numbers of one key.
    """

    position: Any  # of the estimates, (P,)
    transforms: Any
    energy: Any
    arrays: Any
    learning_rate: Any
    rng_key: Any
    unravel: Any
    loss: Any
    prior: Any
    static: Any

    @classmethod
    def of(
        cls,
        energy: Energy,
        coordinates: Parametrisation,
        loss: Loss,
        learning_rate: Any,
        prior: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rng_key: Array,
    ) -> Objective:
        """At the estimates; `prior` is the model's parameters alone, as :func:`prior_model` makes it."""
        arrays, static = split_arrays((args, kwargs))
        c = coordinates
        return cls(c.position, c.transforms, energy, arrays, learning_rate, rng_key, c.unravel, loss, prior, static)

    def constrain(self, vector: Array) -> dict[str, Any]:
        """Constrained values by site."""
        return Parametrisation(self.transforms, self.position, self.unravel).constrain(vector)

    def rows(self, vector: Array) -> Array:
        """The weighted loss of each row, w_n ℓ_n, (N,): without β."""
        values, weights = row_losses(self.loss, self.energy.with_params(self.constrain(vector)), self.rng_key)
        return weights * values

    def used(self) -> Array:
        """Which rows have a weight, (N,): the others, masked ones for instance, are no data."""
        return self.energy.usable()[1] != 0

    def penalty(self, vector: Array) -> Array:
        """The log prior, negative."""
        args, kwargs = join_arrays(self.arrays, self.static)
        seeded = handlers.seed(self.prior, jax.random.key(0))
        return -jnp.asarray(log_density(seeded, args, kwargs, self.constrain(vector))[0])

    def __call__(self, vector: Array) -> Array:
        """The value of the objective."""
        return self.learning_rate * jnp.sum(self.rows(vector)) + self.penalty(vector)


class Curvature(NamedTuple):
    """Second-order facts of an objective at its minimum, in unconstrained coordinates and double precision."""

    hessian: np.ndarray  # (P, P), of the whole objective: β Σ w_n ∇²ℓ_n − ∇² log π₀
    loss_hessian: np.ndarray  # (P, P), of the losses alone, without β: Σ w_n ∇²ℓ_n
    root: np.ndarray  # (min(N, P), P): rootᵀ root = S = N cov_n(w_n ∇ℓ_n), without β
    size: np.ndarray  # (P,), root mean square of w_n ∇ℓ_n times √N: what `root` is small or large against
    covariance: np.ndarray  # (P, P), the sandwich β² H⁻¹SH⁻¹


def curvature(objective: Objective) -> Curvature:
    r"""Hessians, spread of the gradients and sandwich covariance of an objective at its minimum.

    The sandwich of the minimiser of :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)` is

    .. math:: H^{-1} S H^{-1}, \quad H = \nabla^2 \text{objective}, \quad
              S = N \operatorname{cov}_n(\beta w_n \nabla \ell_n),

    over the N rows whose weight is not zero, in unconstrained coordinates [Godambe 1960; Huber 1967]. Without a prior
    this is the H⁻¹SH⁻¹/N of per-row means. The prior bends H but, as it is not random, adds nothing to S. A stochastic
    loss is taken at the random numbers of the objective's `rng_key`, whose noise S then contains. Costs P gradients.

    Raises:
        SandwichError: for more than MAX_PARAMETERS parameters, fewer than two rows, or an H that is not positive
            definite.

    Warns:
        UserWarning: if the minimum is further away than three standard errors.
    """
    p = len(objective.position)
    if p > MAX_PARAMETERS:
        raise SandwichError(
            f"The sandwich covariance is dense and the model has {p} parameters: it stops at {MAX_PARAMETERS}. Use "
            "stderr(of=...) for functions of them, or stderr(diagonal=True), which ignores correlations."
        )
    used = check_rows(objective)
    loss_hessian, prior_hessian, gradients, prior_gradient = _derivatives(objective)
    # In double precision on the host: H is often badly scaled, and P is small.
    beta, loss_hessian = float(objective.learning_rate), np.asarray(loss_hessian, np.float64)
    hessian = beta * loss_hessian + np.asarray(prior_hessian, np.float64)
    lowest = np.linalg.eigvalsh(hessian)[0] if np.isfinite(hessian).all() else np.nan
    if not lowest > 0:
        raise SandwichError(
            f"The objective is not curved upwards at the estimates (lowest eigenvalue of its Hessian {lowest:.3g} for "
            f"{p} parameters): take more steps, or drop or shrink parameters that the data do not determine."
        )
    g = np.asarray(gradients, np.float64)[used]
    gradient = beta * g.sum(axis=0) + np.asarray(prior_gradient, np.float64)
    root = np.linalg.qr(g - g.mean(axis=0), mode="r") * (len(g) / (len(g) - 1)) ** 0.5
    half = beta * np.linalg.solve(hessian, root.T)
    covariance = half @ half.T
    distance = in_standard_errors(np.linalg.solve(hessian, gradient), np.sqrt(np.diag(covariance)))
    warn_if_not_converged(objective.unravel(jnp.asarray(distance, objective.position.dtype)))
    return Curvature(hessian, loss_hessian, root, np.sqrt(np.sum(g**2, axis=0)), covariance)


def check_rows(objective: Objective) -> np.ndarray:
    """Which rows have a weight, (N,).

    Raises:
        SandwichError: for fewer than two of them.
    """
    used = np.asarray(_used(objective))
    if used.sum() < 2:
        what = "the data are one row" if len(used) == 1 else f"{used.sum()} of {len(used)} rows have a weight"
        raise SandwichError(f"The sandwich covariance needs the spread over rows, and {what}: use NUTS instead.")
    return used


_used = jax.jit(Objective.used)


def in_standard_errors(newton_step: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """How far the minimum is, element by element; 0 where there is no error."""
    return np.abs(newton_step) / np.where(errors > 0, errors, np.inf)


def warn_if_not_converged(distance: dict[str, Any]) -> None:
    """Standard errors are those of the minimum. A stochastic loss leaves a fit within about one of them.

    Args:
        distance: of the minimum by site, in standard errors.
    """
    furthest = {
        k: max((float(np.max(v, initial=0.0)) for v in jax.tree.leaves(d)), default=0.0) for k, d in distance.items()
    }
    name = max(furthest, key=lambda k: furthest[k])
    if furthest[name] > 3:
        warnings.warn(
            f"The fit has not converged: the minimum is {furthest[name]:.1f} standard errors away in site '{name}'. "
            "Take more steps, or another optimiser such as optax.lbfgs().",
            stacklevel=5,
        )


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R Rᵀ the covariance, in double precision, as variances may be beyond the range of single."""
    covariance = np.asarray(covariance, np.float64)
    scale = np.sqrt(np.diag(covariance))
    scale = np.where(scale > 0, scale, 1.0)
    # Not Cholesky: where the data leave a direction free, the covariance is singular.
    variances, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    return scale[:, None] * axes * np.sqrt(np.maximum(variances, 0.0))


@partial(jax.jit, static_argnames="unravel")
def _delta_method(position: Array, transforms: Any, root: Array, unravel: Any) -> dict[str, Any]:
    constrain = Parametrisation(transforms, position, unravel).constrain

    def row(direction: Array) -> Array:
        return jax.jvp(lambda v: ravel_pytree(constrain(v))[0], (position,), (direction,))[1]

    images = jax.lax.map(row, root.T, batch_size=64)  # (P, Q), of the covariance's principal axes
    return ravel_pytree(constrain(position))[1](norm_of_columns(images))


@partial(jax.jit, static_argnames=("unravel", "n"))
def _draws(rng_key: Array, position: Array, transforms: Any, root: Array, unravel: Any, n: int) -> dict[str, Any]:
    draws = position + jax.random.normal(rng_key, (n, len(position)), position.dtype) @ root.T
    return jax.vmap(Parametrisation(transforms, position, unravel).constrain)(draws)


def norm_of_columns(x: Float[Array, "n *columns"]) -> Float[Array, "*columns"]:
    """Euclidean norms over the first axis, also of numbers whose squares are out of the range of floats."""
    largest = jnp.max(jnp.abs(x), axis=0)
    largest = jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum((x / largest) ** 2, axis=0))


@jax.jit
def _derivatives(objective: Objective) -> tuple[Array, Array, Array, Array]:
    """Hessians of the losses and of the penalty (P, P), gradients of the rows (N, P) and of the penalty (P,)."""
    position = objective.position

    def losses(vector: Array) -> Array:
        return jnp.sum(objective.rows(vector))

    def along(direction: Array) -> tuple[Array, Array, Array]:
        def move(f: Callable[[Array], Array]) -> Array:
            return jax.jvp(f, (position,), (direction,))[1]

        return move(jax.grad(losses)), move(jax.grad(objective.penalty)), move(objective.rows)

    hessian, prior_hessian, gradients = jax.lax.map(along, jnp.eye(len(position)), batch_size=8)
    prior_gradient = jax.grad(objective.penalty)(position)
    return 0.5 * (hessian + hessian.T), 0.5 * (prior_hessian + prior_hessian.T), gradients.T, prior_gradient
