"""Compositions: positive shares that add up to one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_score.models.graphs import symmetric

__all__ = ["dirichlet", "polynomially_tilted"]


def dirichlet(x: Any) -> None:
    """The Dirichlet law, f(x) = Σ_j (α_j − 1) log x_j.

    Args:
        x: compositions, (N, K), without zeros.
    """
    with numpyro.plate("x_column", x.shape[-1]):
        alpha = numpyro.param("alpha", jnp.ones(x.shape[-1]), constraint=constraints.positive, event_dim=0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.simplex, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", jnp.log(x) @ (alpha - 1))


def polynomially_tilted(x: Any) -> None:
    """The polynomially tilted pairwise interaction model (PPI), f(x) = βᵀ log x + yᵀAy + bᵀy [Scealy & Wood 2023].

    y are all shares but the last; A is symmetric, of the sites `diagonal` and `coupling`; β > −1 at the edges.

    Args:
        x: compositions, (N, K), without zeros.
    """
    k = x.shape[-1] - 1
    with numpyro.plate("x_column", k + 1):
        beta = numpyro.param("beta", jnp.zeros(k + 1), constraint=constraints.greater_than(-1.0), event_dim=0)
    linear, diagonal = numpyro.param("linear", jnp.zeros(k)), numpyro.param("diagonal", jnp.zeros(k))
    a = symmetric(diagonal, numpyro.param("coupling", jnp.zeros(k * (k - 1) // 2)))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.simplex, (), x.shape[1:]), obs=x)
        y = x[..., :-1]
        numpyro.factor("energy", jnp.log(x) @ beta + y @ linear + jnp.sum((y @ a) * y, -1))
