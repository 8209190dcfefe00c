"""Directions: unit vectors in R^d."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.models.graphs import symmetric

__all__ = ["bingham", "fisher_bingham", "von_mises_fisher"]


def axes(d: int) -> Float[Array, "d d"]:
    """A symmetric A of trace zero, as xᵀIx = 1 says nothing: the sites `diagonal`, without its last, and `coupling`."""
    diagonal = numpyro.param("diagonal", jnp.zeros(d - 1))
    coupling = numpyro.param("coupling", jnp.zeros(d * (d - 1) // 2))
    return symmetric(jnp.append(diagonal, -jnp.sum(diagonal)), coupling)


def von_mises_fisher(x: Any) -> None:
    """The von Mises–Fisher law, f(x) = κμᵀx: one mode, in the direction of `direction` = κμ, of length κ.

    Args:
        x: unit vectors, (N, d).
    """
    with numpyro.plate("x_column", x.shape[-1]):
        direction = numpyro.param("direction", jnp.zeros(x.shape[-1]), event_dim=0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.sphere, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", x @ direction)


def bingham(x: Any) -> None:
    """The Bingham law of axes, f(x) = xᵀAx, with A of trace zero: x and −x are alike.

    Args:
        x: unit vectors, (N, d).
    """
    a = axes(x.shape[-1])
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.sphere, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", jnp.sum((x @ a) * x, -1))


def fisher_bingham(x: Any) -> None:
    """The Fisher–Bingham law, f(x) = κμᵀx + xᵀAx, which has the two others within it [Mardia, Kent & Laha 2016].

    Args:
        x: unit vectors, (N, d).
    """
    a = axes(x.shape[-1])
    with numpyro.plate("x_column", x.shape[-1]):
        direction = numpyro.param("direction", jnp.zeros(x.shape[-1]), event_dim=0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.sphere, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", x @ direction + jnp.sum((x @ a) * x, -1))
