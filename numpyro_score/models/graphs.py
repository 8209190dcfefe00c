"""Pairwise graphs: an edge between two columns is a coupling that is not zero."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

__all__ = ["gaussian_graph", "power_graph", "symmetric", "truncated_graph"]


def symmetric(diagonal: Float[Array, "d"], coupling: Float[Array, "m"]) -> Float[Array, "d d"]:
    """The symmetric matrix with this diagonal and, by rows, these m = d(d−1)/2 numbers above it."""
    rows, columns = jnp.triu_indices(len(diagonal), k=1)
    return jnp.diag(diagonal).at[rows, columns].set(coupling).at[columns, rows].set(coupling)


def interactions(d: int, penalty: float) -> tuple[Float[Array, "d d"], Float[Array, "d"]]:
    """K and η of d columns, of the sites `diagonal`, `coupling` and `field`.

    Couplings have Laplace priors of scale 1/penalty, if any. The plate gives the axes the names of a table's columns.
    """
    m = d * (d - 1) // 2
    with numpyro.plate("x_column", d):
        diagonal = numpyro.param("diagonal", jnp.ones(d), constraint=constraints.positive, event_dim=0)
        field = numpyro.param("field", jnp.zeros(d), event_dim=0)
    if penalty:
        coupling = numpyro.sample("coupling", dist.Laplace(0, 1 / penalty).expand([m]).to_event(1))
    else:
        coupling = numpyro.param("coupling", jnp.zeros(m))
    return symmetric(diagonal, coupling), field


def gaussian_graph(x: Any, penalty: float = 0.0) -> None:
    """A Gaussian graph, f(x) = ηᵀx − ½ xᵀKx: the precision matrix K and the field η.

    Without a penalty score matching gives the maximum likelihood estimates, K the inverse covariance.

    Args:
        x: rows, (N, D).
        penalty: of couplings, in units of the objective; see :func:`~numpyro_score.sparse_path` for all of them.
    """
    k, field = interactions(x.shape[-1], penalty)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", x @ field - 0.5 * jnp.sum((x @ k) * x, -1))


def truncated_graph(x: Any, penalty: float = 0.0) -> None:
    """A Gaussian graph of positive columns, f(x) = ηᵀx − ½ xᵀKx for x > 0 [Lin, Drton & Shojaie 2016].

    Args:
        x: rows of positive numbers, (N, D), of about unit scale.
        penalty: as in :func:`gaussian_graph`.
    """
    power_graph(x, 1.0, 1.0, penalty)


def power_graph(x: Any, a: float = 0.5, b: float = 0.5, penalty: float = 0.0) -> None:
    r"""An a-b model of positive columns [Yu, Drton & Shojaie 2019, 2022].

    .. math:: f(x) = -\tfrac{1}{2a} (x^a)^\top K x^a + \tfrac1b \eta^\top x^b, \quad x > 0,

    with log x in place of x^a/a and x^b/b at zero: a = b = 1 is the truncated Gaussian graph, a = b = ½ the
    exponential square-root graph, a = ½ and b = 0 the gamma graph, a = b = 0 the log-normal one.

    Args:
        x: rows of positive numbers, (N, D), of about unit scale.
        a: the power of interactions, at least 0.
        b: the power of the field, at least 0.
        penalty: as in :func:`gaussian_graph`.
    """
    k, field = interactions(x.shape[-1], penalty)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), x.shape[1:]), obs=x)
        y, z = (x**a / a**0.5 if a else jnp.log(x)), (x**b / b if b else jnp.log(x))
        numpyro.factor("energy", z @ field - 0.5 * jnp.sum((y @ k) * y, -1))
