"""Networks of every noise level, scaled so that inputs and targets have unit variance."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_score.energy import AnyArray
from numpyro_score.losses.base import as_numbers, positive

__all__ = ["preconditioned_energy", "preconditioned_score"]

Network = Callable[[Array, Array], Array]


def preconditioned_score(
    network: Network, x: Float[AnyArray, "n ..."], sigma: ArrayLike, sigma_data: float
) -> Float[Array, "n ..."]:
    r"""The score of a network F whose input and target have unit variance at every noise level.

    With σ_d the standard deviation of the data and τ² = σ² + σ_d²,

    .. math:: s(x, \sigma) = -\frac{x}{\tau^2}
              + \frac{\sigma_d}{\sigma\tau}\, F\big(x/\tau, \tfrac14 \ln(\sigma/\sigma_d)\big).

    That is (D − x)/σ² for the denoiser D = c_skip x + c_out F(c_in x, c_noise) with c_skip = σ_d²/τ², c_out = σσ_d/τ
    and c_in = 1/τ [Karras et al. 2022, table 1 and appendix B.6]; c_noise is theirs, ¼ ln σ, but for a constant, so
    that the units of the data do not matter. At F = 0 it is the score of N(0, σ_d² I) with the noise. For data of mean
    zero and variance σ_d², whatever else their law, F has to predict numbers of variance 1 at every level, and
    `ContinuousDSM(..., weighting="edm")` weighs all its errors the same. Of a network that takes u and c_noise::

        def model(x, sigma=1.0):
            net = nnx_module("net", NETWORK)
            with numpyro.plate("rows", len(x)):
                x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x)
                score_factor("score", x, preconditioned_score(net, x, sigma, sigma_data=1.0))

    Args:
        network: F, a function of rows (N, ...) and of c_noise, (N,), to an array of the rows' shape.
        x: the noisy data, (N, ...), of mean zero.
        sigma: the level of each row, (N,), or one for all.
        sigma_data: σ_d, the standard deviation of a number of the data without noise.

    Raises:
        ValueError: if the network's output, or sigma, has another shape; if sigma_data, or a level that is not
            traced, is not positive.
    """
    x, scaled, sigma, noise = _inputs("preconditioned_score", x, sigma, sigma_data)
    output = network(scaled, noise)
    if jnp.shape(output) != x.shape:
        raise ValueError(
            f"preconditioned_score needs a network that returns the shape of its rows, {x.shape}, and it returned "
            f"{jnp.shape(output)}: reshape its output, or use preconditioned_energy for a network of one number a row."
        )
    wide = sigma.reshape(-1, *[1] * (x.ndim - 1))
    variance = wide**2 + sigma_data**2
    return -x / variance + sigma_data / (wide * jnp.sqrt(variance)) * output


def preconditioned_energy(
    network: Network, x: Float[AnyArray, "n ..."], sigma: ArrayLike, sigma_data: float
) -> Float[Array, "n"]:
    r"""The log density whose score is :func:`preconditioned_score` with the gradient of a network g in place of F.

    .. math:: f(x, \sigma) = -\frac{\|x\|^2}{2\tau^2}
              + \frac{\sigma_d}{\sigma}\, g\big(x/\tau, \tfrac14 \ln(\sigma/\sigma_d)\big).

    By the chain rule ∇f = −x/τ² + σ_d/(στ) ∇g: the denoiser has EDM's form exactly, and ∇g, in the network's own input,
    has to predict numbers of variance 1. To be added by `numpyro.factor`.

    Args:
        network: g, a function of rows (N, ...) and of c_noise, (N,), to one number for each row, (N,).
        x: the noisy data, (N, ...), of mean zero.
        sigma: the level of each row, (N,), or one for all.
        sigma_data: σ_d, the standard deviation of a number of the data without noise.

    Raises:
        ValueError: as :func:`preconditioned_score`.
    """
    x, scaled, sigma, noise = _inputs("preconditioned_energy", x, sigma, sigma_data)
    output = network(scaled, noise)
    if jnp.shape(output) != x.shape[:1]:
        raise ValueError(
            f"preconditioned_energy needs a network that returns one number for each row, shape {x.shape[:1]}, and it "
            f"returned {jnp.shape(output)}: take [:, 0] of its output, or use preconditioned_score for a network of "
            "the rows' shape."
        )
    return -0.5 * jnp.sum(scaled**2, axis=range(1, x.ndim)) + sigma_data / sigma * output


def _inputs(owner: str, x: ArrayLike, sigma: ArrayLike, sigma_data: float) -> tuple[Array, Array, Array, Array]:
    """The data, what the network sees of them, the level of each row and what the network sees of it."""
    positive(owner, "sigma_data, the standard deviation of the data", sigma_data)
    if not isinstance(sigma, jax.core.Tracer):
        levels = as_numbers(owner, "sigma", sigma).reshape(-1)
        if not (np.isfinite(levels).all() and (levels > 0).all()):
            bad = levels[~(np.isfinite(levels) & (levels > 0))][0]
            raise ValueError(f"{owner} needs positive noise levels as sigma, got {bad:g}: its score is infinite at 0.")
    x, sigma = jnp.asarray(x), jnp.asarray(sigma)
    if not x.ndim or sigma.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"{owner} got data of shape {x.shape} and levels of shape {sigma.shape}: give rows along the first axis, "
            "and one level for each of them or for all."
        )
    sigma = jnp.broadcast_to(sigma.astype(x.dtype), x.shape[:1])
    wide = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x, x / jnp.sqrt(wide**2 + sigma_data**2), sigma, 0.25 * jnp.log(sigma / sigma_data)
