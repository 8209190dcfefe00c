"""Models whose losses are quadratic in their parameters, and what their fits are compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from models import improper
from numpyro.distributions import constraints

KEY = jax.random.key(0)
ROWS, COLS = np.triu_indices(4, k=1)
_rng = np.random.default_rng(0)
X = _rng.normal(size=(240, 4)) @ (np.eye(4) + 0.3 * _rng.normal(size=(4, 4))) + 0.5
Y = X[:50, :2]


def pairwise(x, prior=None):
    """f = −½xᵀKx + b·x, with the diagonal of K positive, its couplings latent and b normal, of mean and sd `prior`."""
    d = x.shape[-1]
    rows, cols = np.triu_indices(d, k=1)
    diagonal = numpyro.param("diagonal", jnp.ones(d), constraint=constraints.positive)
    coupling = numpyro.sample("coupling", improper(len(rows)))
    b = numpyro.sample("b", improper(d) if prior is None else dist.Normal(*prior).expand([d]).to_event(1))
    k = jnp.diag(diagonal).at[rows, cols].set(coupling).at[cols, rows].set(coupling)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(d), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("...i,ij,...j", x, k, x) + x @ b)


def maximum_likelihood(x):
    k = np.linalg.inv(np.cov(x.T, bias=True))
    return {"diagonal": np.diag(k), "coupling": k[np.triu_indices(len(k), k=1)], "b": k @ x.mean(0)}


def run(sm, *args, **kwargs):
    return sm.run(KEY, *map(jnp.asarray, args), progress_bar=False, **kwargs)


def location(x, prior=lambda: improper(2), batch=None):
    """N(μ, I) with a prior made inside the model, as users do: NumPyro then validates its values."""
    mu = numpyro.sample("mu", prior())
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x = numpyro.sample("x", improper(2), obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))


def scaled(x):
    """A precision that the data want negative in one coordinate, as x⁴ tails outweigh it."""
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", jnp.sum(-0.5 * tau * x**2 - x**4, axis=-1))


def on_simplex(x):
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - w) ** 2, axis=-1))


def laplace(loc=0.0, scale=1.0):
    return dist.Laplace(loc, scale).expand([2]).to_event(1)
