"""Standard errors of minimisers of a sum of pointwise losses: the Godambe sandwich."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import log_density, transform_fn

from numpyro_score._arguments import join_arrays, split_arrays
from numpyro_score.energy import Energy
from numpyro_score.losses import Loss, row_losses

__all__ = ["MAX_PARAMETERS", "Parametrisation", "SandwichError", "sandwich"]


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

    def stderr(self, covariance: Float[Array, "p p"]) -> dict[str, Any]:
        """Standard errors in constrained space by the delta method, in the sites' own shapes."""
        return _delta_method(self.position, self.transforms, covariance, self.unravel)

    def draw(self, rng_key: Array, covariance: Float[Array, "p p"], n: int) -> dict[str, Any]:
        """N draws from N(position, covariance), constrained: {site: (n, ...)}."""
        noise = jax.random.normal(rng_key, (n, len(self.position)))
        # Not Cholesky: where the data leave a direction free, the covariance is singular.
        variances, axes = jnp.linalg.eigh(covariance)
        root = axes * jnp.sqrt(jnp.maximum(variances, 0.0))
        return jax.vmap(self.constrain)(self.position + noise @ root.T)


def sandwich(
    energy: Energy,
    coordinates: Parametrisation,
    loss: Loss,
    learning_rate: Any,
    prior: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rng_key: Array,
) -> Float[Array, "p p"]:
    r"""The sandwich covariance of the minimiser of :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)`, (P, P).

    .. math:: H^{-1} S H^{-1}, \quad H = \nabla^2 \text{objective}, \quad
              S = N \operatorname{cov}_n(\beta w_n \nabla \ell_n),

    in unconstrained coordinates [Godambe 1960; Huber 1967]. Without a prior this is the H⁻¹SH⁻¹/N of per-row means.
    The prior bends H but, as it is not random, adds nothing to S. A stochastic loss is taken at the random numbers of
    `rng_key`, whose noise S then contains. Costs P gradients.

    Raises:
        SandwichError: for more than MAX_PARAMETERS parameters, fewer than two rows, or an H that is not positive
            definite.

    Warns:
        UserWarning: if the minimum is further away than three standard errors.
    """
    p = len(coordinates.position)
    if p > MAX_PARAMETERS:
        raise SandwichError(
            f"The sandwich covariance is dense and the model has {p} parameters: it stops at {MAX_PARAMETERS}."
        )
    if energy.num_rows < 2:
        raise SandwichError(
            "The sandwich covariance needs the spread over rows, and the data are one row: use NUTS instead."
        )
    arrays, static = split_arrays((args, kwargs))
    gradient, hessian, gradients = _derivatives(
        coordinates.position,
        coordinates.transforms,
        energy,
        arrays,
        learning_rate,
        rng_key,
        unravel=coordinates.unravel,
        loss=loss,
        prior=prior,
        static=static,
    )
    lowest = float(jnp.linalg.eigvalsh(hessian)[0])
    if not lowest > 0:
        raise SandwichError(
            f"The objective is not curved upwards at the estimates (lowest eigenvalue of its Hessian {lowest:.3g} for "
            f"{p} parameters): take more steps, or drop or shrink parameters that the data do not determine."
        )
    # Solved in double precision on the host: H is often badly scaled, and P is small.
    h, g = np.asarray(hessian, np.float64), np.asarray(gradients, np.float64)
    centred = g - g.mean(axis=0)
    half = np.linalg.solve(h, centred.T)
    covariance = half @ half.T * (len(g) / (len(g) - 1))
    _warn_if_not_converged(np.linalg.solve(h, np.asarray(gradient, np.float64)), covariance, coordinates)
    return jnp.asarray(covariance, jnp.result_type(float))


def _warn_if_not_converged(newton_step: np.ndarray, covariance: np.ndarray, coordinates: Parametrisation) -> None:
    """Standard errors are those of the minimum. A stochastic loss leaves a fit within about one of them."""
    errors = np.abs(newton_step) / np.sqrt(np.maximum(np.diag(covariance), 1e-30))
    errors = np.where(np.diag(covariance) > 0, errors, 0.0)
    if errors.max() > 3:
        sites = {k: ravel_pytree(v)[0] for k, v in coordinates.unravel(jnp.asarray(errors)).items()}
        name = max(sites, key=lambda k: float(jnp.max(sites[k], initial=0.0)))
        warnings.warn(
            f"The fit has not converged: the minimum is {errors.max():.1f} standard errors away in site '{name}'. Take "
            "more steps, or another optimiser such as optax.lbfgs().",
            stacklevel=5,
        )


@partial(jax.jit, static_argnames="unravel")
def _delta_method(position: Array, transforms: Any, covariance: Array, unravel: Any) -> dict[str, Any]:
    constrain = Parametrisation(transforms, position, unravel).constrain

    def row(direction: Array) -> Array:
        return jax.jvp(lambda v: ravel_pytree(constrain(v))[0], (position,), (direction,))[1]

    jacobian = jax.lax.map(row, jnp.eye(len(position)), batch_size=64)  # (P, Q)
    return ravel_pytree(constrain(position))[1](jnp.sqrt(jnp.sum(jacobian * (covariance @ jacobian), axis=0)))


@partial(jax.jit, static_argnames=("unravel", "loss", "prior", "static"))
def _derivatives(
    position: Array,
    transforms: Any,
    energy: Energy,
    arrays: Any,
    learning_rate: Any,
    rng_key: Array,
    *,
    unravel: Any,
    loss: Loss,
    prior: Any,
    static: Any,
) -> tuple[Array, Array, Array]:
    """Gradient (P,) and Hessian (P, P) of the objective, and the gradient of each row's weighted loss (N, P)."""
    args, kwargs = join_arrays(arrays, static)

    constrain = Parametrisation(transforms, position, unravel).constrain

    def rows(vector: Array) -> Array:
        values, weights = row_losses(loss, energy.with_params(constrain(vector)), rng_key)
        return learning_rate * weights * values

    def objective(vector: Array) -> Array:
        log_prior, _ = log_density(handlers.seed(prior, jax.random.key(0)), args, kwargs, constrain(vector))
        return jnp.sum(rows(vector)) - log_prior

    def along(direction: Array) -> tuple[Array, Array]:
        _, second = jax.jvp(jax.grad(objective), (position,), (direction,))
        _, first = jax.jvp(rows, (position,), (direction,))
        return second, first

    hessian, gradients = jax.lax.map(along, jnp.eye(len(position)), batch_size=8)
    return jax.grad(objective)(position), 0.5 * (hessian + hessian.T), gradients.T
