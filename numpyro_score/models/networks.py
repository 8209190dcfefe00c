"""Energies by networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import constraints

__all__ = ["energy_network"]


def energy_network(x: Any, width: int = 64, depth: int = 2, spread: float = 2.0) -> None:
    r"""An energy by a network, f(x) = net(x) − ½‖x‖²/spread².

    The network has `depth` hidden layers with the smooth activation swish; the second term makes the density
    normalisable, as the network grows no faster than linearly. Fit it by `ISM` in few dimensions, else by `DSM` or
    `SSM`. With `flax.nnx`, `flax.linen` or Equinox instead, see NumPyro's `nnx_module` and its like.

    Args:
        x: rows, (N, D), of about unit scale.
        width: of the hidden layers.
        depth: how many of them there are.
        spread: how far from zero data may be, in units of x.
    """
    sizes = [x.shape[-1], *[width] * depth, 1]

    def start(key: Array) -> list[dict[str, Array]]:
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"w": jax.random.normal(k, (m, n)) / m**0.5, "b": jnp.zeros(n)}
            for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    layers = numpyro.param("layers", start)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]), obs=x)
        y = x
        for i, layer in enumerate(layers):
            y = y @ layer["w"] + layer["b"]
            y = jax.nn.swish(y) if i < depth else y[..., 0]
        numpyro.factor("energy", y - 0.5 * jnp.sum(x**2, -1) / spread**2)
