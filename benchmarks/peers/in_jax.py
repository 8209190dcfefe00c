"""What runs in JAX: the package's losses and steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from benchmarks.peers.common import SIGMA, seconds_per_call
from benchmarks.problem import OPTIMIZER, SITE, Params, init_params, make_data, model
from numpyro_score import DSM, ISM, SSM, Energy, ScoreMatching
from numpyro_score.losses.ssm import draw_directions

LOSSES: dict[str, Any] = {
    "dsm": DSM(SIGMA, control_variate=False),
    "ssm": SSM(variance_reduced=False),
    "ssm-vr": SSM(),
    "ism": ISM(),
}


def weights(dim: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return jax.tree.map(np.asarray, init_params(jax.random.key(0), dim))


def draw(key: str, x: np.ndarray) -> np.ndarray:
    """The random numbers that a loss draws from the key of `value_and_grad`."""
    if key.startswith("ssm"):
        return np.asarray(draw_directions("rademacher", jax.random.key(2), (1, *x.shape), x.dtype)[0])
    return np.asarray(jax.random.normal(jax.random.key(2), x.shape, x.dtype))


def value_and_grad(key: str, weights: Params, x: np.ndarray) -> tuple[float, Params]:
    """The mean loss and its gradient."""

    @jax.jit
    def of(weights: Params) -> tuple[Array, Params]:
        def mean(weights: Params) -> Array:
            return LOSSES[key](Energy(model, {SITE: weights}, jnp.asarray(x)), jax.random.key(2)).mean()

        return jax.value_and_grad(mean)(weights)

    value, grads = of(weights)
    return float(value), jax.tree.map(np.asarray, grads)


@cache
def _start(key: str, dim: int) -> tuple[Any, Any, Array]:
    """The compiled step, the state it starts from and the rows."""
    fit, x = ScoreMatching(model, optim=OPTIMIZER, loss=LOSSES[key]), make_data(dim)
    return jax.jit(fit.update), fit.init(jax.random.key(0), x), x


def seconds_per_step(key: str, dim: int, block: float) -> float:
    update, state, x = _start(key, dim)

    def step() -> float:
        nonlocal state
        state, loss = update(state, x)
        return float(loss)  # waits, as PyTorch does after every operation

    return seconds_per_call(step, block)


def isotropic(x: Array) -> None:
    a = numpyro.param("a")
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", -0.5 * a * jnp.sum(x**2, -1))


SLOPES: dict[str, Any] = {
    "ISM": ISM(),
    "SSM, plain, rademacher": SSM(variance_reduced=False),
    "SSM, plain, gaussian": SSM(projection="gaussian", variance_reduced=False),
    "SSM, plain, sphere": SSM(projection="sphere", variance_reduced=False),
    "SSM, variance-reduced": SSM(),
    "DSM, plain": DSM(SIGMA, control_variate=False),
    "DSM, control variate": DSM(SIGMA),
}


def slopes_at_zero(batches: np.ndarray) -> dict[str, np.ndarray]:
    """dJ/da of each loss at the flat density, for each batch of rows."""

    def slopes(loss: Any) -> np.ndarray:
        def slope(rows: Array, rng_key: Array) -> Array:
            return jax.grad(lambda a: loss(Energy(isotropic, {"a": a}, rows), rng_key).mean())(0.0)

        keys = jax.random.split(jax.random.key(3), len(batches))
        return np.asarray(jax.jit(jax.vmap(slope))(batches, keys))

    with jax.enable_x64(True):
        return {name: slopes(loss) for name, loss in SLOPES.items()}
