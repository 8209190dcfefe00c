"""What is fitted: an energy network on R^D, in plain JAX, and the NumPyro model around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array
from numpyro.distributions import constraints

ROWS = 512
WIDTH = 128
HIDDEN = 3
SITE = "network"
OPTIMIZER = optax.adam(1e-3)

Params = list[tuple[Array, Array]]


def init_params(rng_key: Array, dim: int, width: int = WIDTH) -> Params:
    """Weights of variance 1 / fan-in, biases of zero."""
    sizes = [dim, *[width] * HIDDEN, 1]
    keys = jax.random.split(rng_key, len(sizes) - 1)
    return [
        (jax.random.normal(key, (m, n)) / m**0.5, jnp.zeros(n))
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(params: Params, x: Array) -> Array:
    """The log density of each row, up to a constant: (N, D) to (N,)."""
    *hidden, (last, offset) = params
    for weight, bias in hidden:
        x = jax.nn.swish(x @ weight + bias)
    return (x @ last + offset)[:, 0]


def model(x: Array, width: int = WIDTH) -> None:
    n, dim = x.shape
    params = numpyro.param(SITE, lambda rng_key: init_params(rng_key, dim, width))
    with numpyro.plate("data", n):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)), obs=x)
        numpyro.factor("energy", mlp(params, x))


def make_data(dim: int, rows: int = ROWS) -> Array:
    return jax.random.normal(jax.random.key(1), (rows, dim))


def mean_energy_grad(params: Params, x: Array) -> Params:
    """The unit of cost: the gradient in the parameters of the mean energy."""
    return jax.grad(lambda p: mlp(p, x).mean())(params)
