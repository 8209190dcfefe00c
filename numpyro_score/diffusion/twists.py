"""What is believed of the data behind noisy points, before and after an observation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.diffusion.steps import Field
from numpyro_score.operators import full_precision

__all__ = ["Belief", "Likelihood", "Twist", "believe", "gaussian_update", "log_normal"]

Likelihood = Callable[[Array], Array]  # log p(y | x) of one row (D,)
Twist = Literal["moments", "isotropic", "plain"]


class Belief(NamedTuple):
    """Of N noisy points u: what their data x may be, x | u and x | u, y, both as normal laws."""

    log_twist: Float[Array, "n"]  # log h(u), an approximation of log p(y | u)
    mean: Float[Array, "n d"]
    covariance: Float[Array, "n d d"]
    told_mean: Float[Array, "n d"]
    told_covariance: Float[Array, "n d d"]


def believe(twist: Twist, field: Field, likelihood: Likelihood, u: Float[Array, "n d"], rho: Array) -> Belief:
    """The belief at points u with noise ρ.

    The mean of x given u is Tweedie's, m(u) = u + ρ² s(u). With

    - "moments" its covariance is Tweedie's as well, C(u) = ρ² (I + ρ² ∇s(u)) [Boys et al. 2023], D products with the
      score's derivative a point. Where x | u is normal and log p(y | x) quadratic, h is exact;
    - "isotropic" it is c I, c = ρ² v/(ρ² + v) with v the mean variance of the data [Song et al. 2023, ΠGDM];
    - "plain" it is 0: h(u) = p(y | x = m(u)) [Chung et al. 2023, DPS].

    The last two move the mean by ρ² ∇ log h, one reverse pass through the score.

    Args:
        twist: which.
        field: the noisy data.
        likelihood: of one row.
        u: points, (N, D).
        rho: ρ, one number.
    """
    n, d = u.shape
    if twist == "moments":
        mean, covariance = _tweedie(field, u, rho)
        return Belief(*_update(likelihood, mean, covariance))
    if twist == "isotropic":
        v = jnp.mean(field.end.variances)
        variance = rho**2 * v / (rho**2 + v)
    else:
        variance = jnp.zeros((), u.dtype)
    covariance = jnp.broadcast_to(variance * jnp.eye(d, dtype=u.dtype), (n, d, d))

    def log_twist(u: Array) -> tuple[Array, tuple[Array, Array]]:
        mean = field.denoised(u, rho)
        value = _update(likelihood, mean, covariance)[0] if twist == "isotropic" else jax.vmap(likelihood)(mean)
        return jnp.sum(value), (value, mean)

    slope, (value, mean) = jax.grad(log_twist, has_aux=True)(u)
    return Belief(value, mean, covariance, mean + rho**2 * slope, covariance)


@full_precision
def _tweedie(field: Field, u: Float[Array, "n d"], rho: Array) -> tuple[Float[Array, "n d"], Float[Array, "n d d"]]:
    """Mean and covariance of x given u; eigenvalues that a learned score makes negative are put just above zero."""
    d = u.shape[1]

    def along(direction: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda v: field.denoised(v, rho), (u,), (jnp.broadcast_to(direction, u.shape),))

    means, columns = jax.vmap(along)(jnp.eye(d, dtype=u.dtype))
    covariance = rho**2 * columns.transpose(1, 2, 0)
    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.transpose(0, 2, 1)))
    values = jnp.maximum(values, 1e-6 * rho**2)
    return means[0], (vectors * values[:, None, :]) @ vectors.transpose(0, 2, 1)


def _update(likelihood: Likelihood, mean: Float[Array, "n d"], covariance: Float[Array, "n d d"]) -> tuple[Array, ...]:
    return jax.vmap(lambda m, c: gaussian_update(likelihood, m, c))(mean, covariance)


@full_precision
def gaussian_update(
    likelihood: Likelihood, mean: Float[Array, "d"], covariance: Float[Array, "d d"]
) -> tuple[Array, Array, Array, Array, Array]:
    """Log E p(y | x) under x ~ N(mean, covariance), and the normal law of x given y, by log p to second order at mean.

    With g and −G its gradient and Hessian there, E exp(g·d − ½ dᵀG d) = |I + C G|^{-½} exp(½ gᵀ(C⁻¹ + G)⁻¹ g). Exact
    for normal y with a mean that is linear in x. Directions in which the Hessian is positive are taken as flat.

    Returns:
        The log of the expectation, mean, covariance, mean given y, covariance given y.
    """
    value, g = jax.value_and_grad(likelihood)(mean)
    values, vectors = jnp.linalg.eigh(covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
    m = -root.T @ jax.hessian(likelihood)(mean) @ root
    curvature, w = jnp.linalg.eigh(0.5 * (m + m.T))
    curvature = jnp.maximum(curvature, 0.0)
    told_root = root @ w / jnp.sqrt(1 + curvature)
    pull = told_root.T @ g
    log_mean = value + 0.5 * jnp.sum(pull**2) - 0.5 * jnp.sum(jnp.log1p(curvature))
    return log_mean, mean, covariance, mean + told_root @ pull, told_root @ told_root.T


@full_precision
def log_normal(
    x: Float[Array, "n d"], mean: Float[Array, "n d"], covariance: Float[Array, "n d d"]
) -> Float[Array, "n"]:
    """The log density of N(mean, covariance) at each point."""
    root = jnp.linalg.cholesky(covariance)
    z = jax.lax.linalg.triangular_solve(root, (x - mean)[..., None], left_side=True, lower=True)[..., 0]
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    return -0.5 * jnp.sum(z**2, axis=-1) - half_log_det - 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi)
