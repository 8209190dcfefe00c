"""The same losses and update steps written by hand for the network, without NumPyro.

They draw the same random numbers and use the same algorithms as the package, so what the package's
step costs beyond them is what its generality costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from folx import forward_laplacian
from folx.api import FwdJacobian, FwdLaplArray
from jax import Array

from benchmarks.problem import OPTIMIZER, WIDTH, Params, init_params, mlp
from numpyro_score.losses.chunks import chunks_in_a_pass
from numpyro_score.losses.ssm import draw_directions

LossAndGrad = Callable[[Params, Array, Array], tuple[Array, Params]]


class State(NamedTuple):
    params: Params
    optimizer: optax.OptState
    rng_key: Array


def init(rng_key: Array, dim: int, width: int = WIDTH) -> State:
    init_key, rng_key = jax.random.split(rng_key)
    return start(init_params(init_key, dim, width), rng_key)


def start(params: Params, rng_key: Array) -> State:
    return State(params, OPTIMIZER.init(params), rng_key)


def make_step(loss_and_grad: LossAndGrad) -> Callable[[State, Array], tuple[State, Array]]:
    def step(state: State, x: Array) -> tuple[State, Array]:
        rng_key, loss_key = jax.random.split(state.rng_key)
        loss, grads = loss_and_grad(state.params, x, loss_key)
        return State(*apply(grads, state.params, state.optimizer), rng_key), loss

    return step


def apply(grads: Params, params: Params, optimizer: optax.OptState) -> tuple[Params, optax.OptState]:
    updates, optimizer = OPTIMIZER.update(grads, optimizer, params)
    return optax.apply_updates(params, updates), optimizer


# Each loss is a sum over rows.


def score(params: Params, x: Array) -> Array:
    return jax.grad(lambda y: mlp(params, y).sum())(x)


def dsm_plain(sigma: float, rows_per_chunk: int) -> LossAndGrad:
    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        noise = jax.random.normal(rng_key, x.shape)
        residual = score(params, x + sigma * noise) + noise / sigma
        return 0.5 * jnp.sum(residual**2) - x.size / (2 * sigma**2)

    return in_chunks(loss, rows_per_chunk)


def dsm_control_variate(sigma: float, rows_per_chunk: int) -> LossAndGrad:
    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        noise = jax.random.normal(rng_key, x.shape)
        noisy = score(params, x + sigma * noise)
        return jnp.sum(0.5 * noisy**2 + noise * (noisy - score(params, x)) / sigma)

    return in_chunks(loss, rows_per_chunk)


def ssm_plain(rows_per_chunk: int) -> LossAndGrad:
    """Forward over forward: the value and both derivatives along v in one pass."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        v = draw_directions("rademacher", rng_key, x.shape, x.dtype)

        def slope(y: Array) -> Array:
            return jax.jvp(lambda z: mlp(params, z), (y,), (v,))[1]

        first, second = jax.jvp(slope, (x,), (v,))
        return jnp.sum(0.5 * first**2 + second)

    return in_chunks(loss, rows_per_chunk)


def ssm_variance_reduced() -> LossAndGrad:
    """Forward over reverse: the score and its derivative along v share one pass."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        v = draw_directions("rademacher", rng_key, x.shape, x.dtype)
        s, along = jax.jvp(lambda y: score(params, y), (x,), (v,))
        return jnp.sum(0.5 * s**2 + v * along)

    return jax.value_and_grad(loss)


def fsm_sliced(epsilon: float) -> LossAndGrad:
    """Three densities in one batch."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        v = draw_directions("rademacher", jax.random.split(rng_key)[0], x.shape, x.dtype)
        centre, ahead, behind = jnp.split(mlp(params, jnp.concatenate([x, x + epsilon * v, x - epsilon * v])), 3)
        ahead, behind = ahead - centre, behind - centre
        return jnp.sum((ahead + behind) / epsilon**2 + (ahead - behind) ** 2 / (8 * epsilon**2))

    return jax.value_and_grad(loss)


def fsm_denoising(epsilon: float, sigma: float) -> LossAndGrad:
    """Two densities in one batch."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        direction_key, noise_key = jax.random.split(rng_key)
        v = draw_directions("rademacher", direction_key, x.shape, x.dtype)
        noise = jax.random.normal(noise_key, x.shape)
        noisy = x + sigma * noise
        ahead, behind = jnp.split(mlp(params, jnp.concatenate([noisy + epsilon * v, noisy - epsilon * v])), 2)
        residual = (ahead - behind) / (2 * epsilon) + jnp.sum(v * noise, axis=-1) / sigma
        return 0.5 * jnp.sum(residual**2) - x.size / (2 * sigma**2)

    return jax.value_and_grad(loss)


def kl_contraction(time: float, num_samples: int) -> LossAndGrad:
    """M + 1 densities in one batch."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        away_key, back_key = jax.random.split(rng_key)
        half = jax.random.normal(back_key, (num_samples // 2, *x.shape))
        noise = jax.random.normal(away_key, x.shape) + jnp.concatenate([half, -half])
        f = mlp(params, jnp.concatenate([x[None], x + time**0.5 * noise]).reshape(-1, x.shape[1]))
        f = f.reshape(num_samples + 1, -1)
        return jnp.sum(jax.nn.logsumexp(f[1:] - f[0], axis=0) - jnp.log(num_samples)) / time

    return jax.value_and_grad(loss)


def ism(rows_per_chunk: int) -> LossAndGrad:
    """The forward Laplacian."""

    def loss(params: Params, x: Array, rng_key: Array) -> Array:
        n, d = x.shape
        unit = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype)[:, None, :], (d, n, d))
        seed = FwdLaplArray(x, FwdJacobian.from_dense(unit), jnp.zeros_like(x))
        out = forward_laplacian(lambda y: mlp(params, y), disable_jit=True)(seed)
        return 0.5 * jnp.sum(out.dense_jacobian**2) + jnp.sum(out.laplacian)

    return in_chunks(loss, rows_per_chunk)


def in_chunks(loss: Callable[[Params, Array, Array], Array], rows: int) -> LossAndGrad:
    """The gradient chunk by chunk; on a CPU four chunks in one pass of the loop."""

    def loss_and_grad(params: Params, x: Array, rng_key: Array) -> tuple[Array, Params]:
        n, d = x.shape
        if rows >= n:
            return jax.value_and_grad(loss)(params, x, rng_key)

        def add(total: tuple[Array, Params], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *chunk)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        chunks = (x.reshape(-1, rows, d), jax.random.split(rng_key, n // rows))
        return jax.lax.scan(add, zero, chunks, unroll=chunks_in_a_pass())[0]

    return loss_and_grad
