"""What is believed of the data behind noisy points, before and after an observation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.diffusion.steps import Field
from numpyro_score.operators import full_precision

__all__ = ["Belief", "Likelihood", "Twist", "believe", "laplace_update", "log_normal"]

_NEWTON, _SHORTER = 4, 6  # steps, and lengths tried of each

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
        value, *told = jax.vmap(partial(laplace_update, likelihood))(mean, covariance)
        return Belief(value, mean, covariance, *told)
    if twist == "isotropic":
        v = jnp.mean(field.end.variances)
        variance = rho**2 * v / (rho**2 + v)
    else:
        variance = jnp.zeros((), u.dtype)
    covariance = jnp.broadcast_to(variance * jnp.eye(d, dtype=u.dtype), (n, d, d))

    def log_twist(u: Array) -> tuple[Array, tuple[Array, Array]]:
        mean = field.denoised(u, rho)
        if twist == "isotropic":
            value = jax.vmap(partial(laplace_update, likelihood))(mean, covariance)[0]
        else:
            value = jax.vmap(likelihood)(mean)
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


@full_precision
def laplace_update(
    likelihood: Likelihood, mean: Float[Array, "d"], covariance: Float[Array, "d d"]
) -> tuple[Array, Array, Array]:
    """Log E p(y | x) under x ~ N(mean, covariance), and the normal law of x given y, by Laplace's method.

    With C = R Rᵀ and x = mean + R z, the mode of log p(y | x) − ½‖z‖² is found by a few of Newton's steps, each at most
    its own length and shortened until the value rises. A curvature of the wrong sign counts by its absolute value
    [Dauphin et al. 2014]. Exact, in one step, for normal y with a mean that is linear in x. Where x given y has several
    modes, it is one of them.

    Returns:
        The log of the expectation, whose derivative in `mean` leaves out the change of the curvature; mean and
        covariance given y.
    """
    values, vectors = jnp.linalg.eigh(covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
    fixed = jax.lax.stop_gradient(mean)

    def below(z: Array) -> Array:
        return 0.5 * jnp.sum(z**2) - likelihood(fixed + root @ z)

    def curvature(z: Array) -> tuple[Array, Array]:
        hessian = jax.hessian(below)(z)
        values, axes = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
        return jnp.maximum(jnp.abs(values), 1.0), axes

    def newton(z: Array, _: None) -> tuple[Array, None]:
        scale, axes = curvature(z)
        step = -axes @ ((axes.T @ jax.grad(below)(z)) / scale)
        tried = z + jnp.concatenate([0.5 ** jnp.arange(_SHORTER), jnp.zeros(1)]).astype(z.dtype)[:, None] * step
        heights = jax.vmap(below)(tried)
        return tried[jnp.argmin(jnp.where(jnp.isnan(heights), jnp.inf, heights))], None

    z = jax.lax.stop_gradient(jax.lax.scan(newton, jnp.zeros_like(mean), length=_NEWTON)[0])
    scale, axes = curvature(z)
    told_root = root @ axes / jnp.sqrt(scale)
    value = likelihood(mean + root @ z) - 0.5 * jnp.sum(z**2)
    log_mean = value - 0.5 * jax.lax.stop_gradient(jnp.sum(jnp.log(scale)))
    return log_mean, fixed + root @ z, told_root @ told_root.T


@full_precision
def log_normal(
    x: Float[Array, "n d"], mean: Float[Array, "n d"], covariance: Float[Array, "n d d"]
) -> Float[Array, "n"]:
    """The log density of N(mean, covariance) at each point."""
    root = jnp.linalg.cholesky(covariance)
    z = jax.lax.linalg.triangular_solve(root, (x - mean)[..., None], left_side=True, lower=True)[..., 0]
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    return -0.5 * jnp.sum(z**2, axis=-1) - half_log_det - 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi)
