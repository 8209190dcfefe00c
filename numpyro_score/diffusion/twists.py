"""What is believed of the data behind noisy points, before and after an observation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.diffusion.steps import Field
from numpyro_score.operators import full_precision

__all__ = ["Belief", "Likelihood", "Twist", "believe", "excess", "laplace_update", "log_normal"]

_NEWTON, _SHORTER = 4, 6  # most steps, and lengths tried of each
_ARRIVED = 1e-3  # length of a step, in standard deviations of x given u, that need not be taken

Likelihood = Callable[[Array], Array]  # log p(y | x) of one row (D,)
Twist = Literal["moments", "isotropic", "plain"]


class Belief(NamedTuple):
    """Of N noisy points u: what their data x may be, x | u and x | u, y, both as normal laws."""

    log_twist: Float[Array, "n"]  # log h(u), an approximation of log p(y | u)
    mean: Float[Array, "n d"]
    covariance: Float[Array, "n d d"]
    told_mean: Float[Array, "n d"]
    told_covariance: Float[Array, "n d d"]


def excess(rho: Array, least: Array) -> Array:
    """ρ² − ρ_min², which is 0 where they are the same; the difference of squares may be a negative rounding error."""
    return (rho - least) * (rho + least)


def believe(
    twist: Twist, field: Field, likelihood: Likelihood, u: Float[Array, "n d"], rho: Array, least: Array
) -> Belief:
    """The belief at points u with noise ρ, of the data x with the smallest noise, from which τ = ρ² − ρ_min² is left.

    The mean of x given u is Tweedie's, m(u) = u + τ s(u). With

    - "moments" its covariance is Tweedie's as well, C(u) = τ (I + τ ∇s(u)) [Boys et al. 2023], D products with the
      score's derivative a point. Where x | u is normal and log p(y | x) quadratic, h is exact;
    - "isotropic" it is c I, c = τ v/(τ + v) with v the mean variance of x [Song et al. 2023, ΠGDM];
    - "plain" it is 0: h(u) = p(y | x = m(u)) [Chung et al. 2023, DPS].

    The last two move the mean by τ ∇ log h, one reverse pass through the score. At the smallest noise all are
    h(u) = p(y | x = u).

    Args:
        twist: which.
        field: the noisy data.
        likelihood: of one row.
        u: points, (N, D).
        rho: ρ, one number.
        least: ρ_min.
    """
    n, d = u.shape
    tau = excess(rho, least)
    if twist == "moments":
        mean, root = _tweedie(field, u, rho, tau)
        value, *told = jax.vmap(partial(laplace_update, likelihood))(mean, root)
        return Belief(value, mean, _squared(root), *told)
    if twist == "isotropic":
        v = field.end.per_coordinate + least**2
        variance = tau * v / (tau + v)
    else:
        variance = jnp.zeros((), u.dtype)
    root = jnp.broadcast_to(jnp.sqrt(variance) * jnp.eye(d, dtype=u.dtype), (n, d, d))

    def log_twist(u: Array) -> tuple[Array, tuple[Array, Array]]:
        mean = u + tau * field.model.score(u, rho)
        if twist == "isotropic":
            value = jax.vmap(partial(laplace_update, likelihood))(mean, root)[0]
        else:
            value = jax.vmap(likelihood)(mean)
        return jnp.sum(value), (value, mean)

    slope, (value, mean) = jax.grad(log_twist, has_aux=True)(u)
    return Belief(value, mean, root**2, mean + tau * slope, root**2)  # diagonal


@full_precision
def _tweedie(
    field: Field, u: Float[Array, "n d"], rho: Array, tau: Array
) -> tuple[Float[Array, "n d"], Float[Array, "n d d"]]:
    """Mean of x given u, and a root R of its covariance R Rᵀ, whose eigenvalues are kept above zero."""
    d = u.shape[1]

    def along(direction: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda v: v + tau * field.model.score(v, rho), (u,), (jnp.broadcast_to(direction, u.shape),))

    means, columns = jax.vmap(along)(jnp.eye(d, dtype=u.dtype))
    covariance = tau * columns.transpose(1, 2, 0)
    values, vectors = jnp.linalg.eigh(0.5 * (covariance + covariance.transpose(0, 2, 1)))
    values = jnp.maximum(values, 1e-6 * tau)  # a learned score may make them negative
    return means[0], vectors * jnp.sqrt(values)[:, None, :]


@full_precision
def _squared(root: Float[Array, "*n d d"]) -> Float[Array, "*n d d"]:
    return root @ jnp.swapaxes(root, -1, -2)


class _Newton(NamedTuple):
    """Where Newton's steps are."""

    z: Float[Array, "d"]
    scale: Float[Array, "d"]  # curvatures at z, by their absolute values,
    axes: Float[Array, "d d"]  # along these axes
    step: Float[Array, "d"]  # from z
    count: Any  # of turns


@full_precision
def laplace_update(
    likelihood: Likelihood, mean: Float[Array, "d"], root: Float[Array, "d d"]
) -> tuple[Array, Array, Array]:
    """Log E p(y | x) under x ~ N(mean, R Rᵀ), and the normal law of x given y, by Laplace's method.

    With x = mean + R z, the mode of log p(y | x) − ½‖z‖² is found by up to four of Newton's steps, each at most its own
    length and shortened until the value rises. A curvature of the wrong sign counts by its absolute value [Dauphin et
    al. 2014]. Exact, in one step, for normal y with a mean that is linear in x. Where x given y has several modes, it
    is one of them.

    Returns:
        The log of the expectation, whose derivative in `mean` leaves out the change of the curvature; mean and
        covariance given y.
    """
    fixed, root = jax.lax.stop_gradient((mean, root))

    def below(z: Array) -> Array:
        return 0.5 * jnp.sum(z**2) - likelihood(fixed + root @ z)

    def goes_on(state: _Newton) -> Array:
        return (state.count == 0) | ((state.count <= _NEWTON) & ~(jnp.max(jnp.abs(state.step)) <= _ARRIVED))

    def moved(state: _Newton) -> _Newton:
        lengths = jnp.concatenate([0.5 ** jnp.arange(_SHORTER), jnp.zeros(1)]).astype(mean.dtype)
        tried = state.z + lengths[:, None] * state.step
        heights = jax.vmap(below)(tried)
        z = tried[jnp.argmin(jnp.where(jnp.isnan(heights), jnp.inf, heights))]
        hessian = jax.hessian(below)(z) + 0.0 * root[0, 0]
        values, axes = jnp.linalg.eigh(0.5 * (hessian + hessian.T))
        scale = jnp.maximum(jnp.abs(values), 1.0)
        return _Newton(z, scale, axes, -axes @ ((axes.T @ jax.grad(below)(z)) / scale), state.count + 1)

    # The first turn goes nowhere and looks at z = 0. One decomposition stands here and not two: of a curvature that is
    # the same everywhere XLA would run both at once, and on two cores jaxlib's threads then wait for each other for
    # ever. Nor may it run beside that of the root, so that it must depend on it, also where y says nothing of x.
    none = jnp.zeros_like(mean)
    start = _Newton(none, jnp.ones_like(mean), jnp.eye(len(mean), dtype=mean.dtype), none, 0)
    z, scale, axes, *_ = jax.lax.while_loop(goes_on, moved, start)
    told_root = root @ axes / jnp.sqrt(scale)
    value = likelihood(mean + root @ z) - 0.5 * jnp.sum(z**2)
    log_mean = value - 0.5 * jax.lax.stop_gradient(jnp.sum(jnp.log(scale)))
    return log_mean, fixed + root @ z, told_root @ told_root.T


@full_precision
def log_normal(
    x: Float[Array, "n d"], mean: Float[Array, "*k n d"], root: Float[Array, "*k n d d"]
) -> Float[Array, "*k n"]:
    """The log density of N(mean, L Lᵀ) at each point, for lower triangular L."""
    z = jax.lax.linalg.triangular_solve(root, (x - mean)[..., None], left_side=True, lower=True)[..., 0]
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    return -0.5 * jnp.sum(z**2, axis=-1) - half_log_det - 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi)
