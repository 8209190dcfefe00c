"""Discrete models small enough to enumerate, which several test files share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from numpyro.distributions import constraints

from numpyro_score import Energy


def discrete(constraint, *event_shape):
    """A discrete data site without a law of its own."""
    return dist.ImproperUniform(constraint, (), event_shape)


BINARY, THREE, COUNT = constraints.boolean, constraints.integer_interval(0, 2), constraints.nonnegative_integer


def edges(rows, columns):
    """The edges of a square lattice with open ends, (E, 2)."""
    index = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    return np.concatenate([np.stack([a.ravel(), b.ravel()], -1) for a, b in pairs])


def ising(x, side=4):
    """A lattice of 0 and 1 with one coupling and one field."""
    j, h = numpyro.param("j", 0.0), numpyro.param("h", 0.0)
    first, second = edges(side, side).T
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", discrete(BINARY, side * side), obs=x)
        numpyro.factor("energy", h * x.sum(-1) + j * (x[:, first] * x[:, second]).sum(-1))


def potts(x, side=3):
    """A lattice of three colours with a coupling of equal neighbours and a field of the first colour."""
    j, h = numpyro.param("j", 0.0), numpyro.param("h", 0.0)
    first, second = edges(side, side).T
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", discrete(THREE, side * side), obs=x)
        numpyro.factor("energy", h * (x == 0).sum(-1) + j * (x[:, first] == x[:, second]).sum(-1))


def com_poisson(x):
    """A Conway–Maxwell–Poisson law, λ^x / (x!)^ν."""
    rate, nu = numpyro.param("rate", 1.0), numpyro.param("nu", 1.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", discrete(COUNT), obs=x)
        numpyro.factor("energy", x * jnp.log(rate) - nu * gammaln(x + 1.0))


def states(*sizes):
    """All points of a product of {0, ..., size − 1}, (S, D)."""
    return np.array(list(itertools.product(*map(range, sizes))))


def probabilities(model, params, x):
    """Of the states x, by summing over all of them."""
    energy = Energy(model, params, x)
    f = np.asarray(jax.jit(Energy.log_density)(energy, np.asarray(x, float).reshape(len(x), -1)), np.float64)
    p = np.exp(f - f.max())
    return p / p.sum()


def draw(model, params, x, n, seed):
    """Independent rows of the states x."""
    return x[np.random.default_rng(seed).choice(len(x), n, p=probabilities(model, params, x))]
