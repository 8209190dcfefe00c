"""Mixtures of normal laws with noise, in closed form, as models of every noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from numpyro_score import Energy, score_factor


@jax.jit  # traced once, and not at each of the places where a flow or a sampler runs the model
def _log_density(x, sigma, weights, means, variances, axes):
    spread = variances + sigma[:, None, None] ** 2
    away = jnp.einsum("nkd,kde->nke", x[:, None] - means, axes)
    normal = -0.5 * jnp.sum(away**2 / spread + jnp.log(2 * jnp.pi * spread), axis=-1)
    return logsumexp(jnp.log(weights) + normal, axis=-1)


class Mixture:
    """K normal laws in D dimensions, of total mean zero and unit variance on average."""

    def __init__(self, dim, num, seed):
        rng = np.random.default_rng(seed)
        means = 1.5 * rng.normal(size=(num, dim))
        roots = rng.normal(size=(num, dim, dim)) / np.sqrt(dim)
        covariances = 0.2 * np.einsum("kij,klj->kil", roots, roots) + 0.1 * np.eye(dim)
        self.weights = rng.dirichlet(np.full(num, 5.0))
        means -= self.weights @ means
        total = np.einsum("k,kij->ij", self.weights, covariances + np.einsum("ki,kj->kij", means, means))
        scale = np.sqrt(np.trace(total) / dim)
        self.means, self.covariances, self.total = means / scale, covariances / scale**2, total / scale**2

    def log_density(self, x, sigma):
        """With noise of standard deviation sigma, (N, D) to (N,)."""
        variances, axes = np.linalg.eigh(self.covariances)
        law = (jnp.asarray(v, x.dtype) for v in (self.weights, self.means, variances, axes))
        return _log_density(x, jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1]), *law)

    def draw(self, n, seed):
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size=n, p=self.weights)
        z = rng.normal(size=(n, self.means.shape[1]))
        return self.means[k] + np.einsum("nij,nj->ni", np.linalg.cholesky(self.covariances)[k], z)

    def energy(self, score=False):
        """The density up to a constant for each level, or its score, with data of the same mean and covariance."""
        dim = self.means.shape[1]

        def model(x, sigma=1.0):
            def f(y):
                return self.log_density(y, sigma) - 3.0 * jnp.log1p(sigma)

            with numpyro.plate("rows", len(x)):
                x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)), obs=x)
                if score:
                    score_factor("score", x, jax.vjp(f, x)[1](jnp.ones(len(x), x.dtype))[0])
                else:
                    numpyro.factor("energy", f(x))

        z = np.random.default_rng(0).normal(size=(10 * dim, dim))
        z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(len(z))
        return Energy(model, {}, jnp.asarray(z @ np.linalg.cholesky(self.total).T))
