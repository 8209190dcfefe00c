"""Estimates over many data sets: where the truth lies in standard errors, and how the estimates vary.

The models are affine in their parameters, so that the loss is quadratic and each fit is one Newton step from zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.stats import vonmises_fisher

from numpyro_score import ISM, Energy

pytestmark = pytest.mark.usefixtures("x64")


def on(support, f, *event_shape):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), event_shape), obs=x)
            numpyro.factor("energy", f(numpyro.param("theta"), x))

    return model


def fits(model, dim, data, loss):
    """Estimates and sandwich standard errors for data sets (R, N, ...)."""

    def losses(theta, x):
        return loss(Energy(model, {"theta": theta}, x), jax.random.key(0))

    @jax.jit
    def one(x):
        start = jnp.zeros(dim)
        slope, curvature = (
            jax.grad(lambda t: losses(t, x).mean())(start),
            jax.hessian(lambda t: losses(t, x).mean())(start),
        )
        estimate = -jnp.linalg.solve(curvature, slope)
        rows = jax.jacfwd(losses)(estimate, x)
        half = jnp.linalg.solve(curvature, (rows - rows.mean(0)).T)
        return estimate, jnp.sqrt(jnp.sum(half**2, axis=1)) / len(x)

    estimates, errors = jax.lax.map(one, data)
    return np.asarray(estimates), np.asarray(errors)


# -- spheres and simplices -------------------------------------------------------------------------


def fisher_data(rng, r, n):
    x = vonmises_fisher(MU / np.linalg.norm(MU), np.linalg.norm(MU)).rvs(r * n, random_state=rng)
    return x.reshape(r, n, 3)


def accepted(propose, log_weight, n):
    """Draws by rejection; the weight is at most one."""
    kept = []
    while sum(map(len, kept)) < n:
        x, u = propose()
        kept.append(x[np.log(u) < log_weight(x)])
    return np.concatenate(kept)[:n]


def bingham_data(rng, r, n):
    def propose():
        z = rng.normal(size=(400_000, 3))
        return z / np.linalg.norm(z, axis=-1, keepdims=True), rng.uniform(size=400_000)

    top = np.linalg.eigvalsh(A)[-1]
    return accepted(propose, lambda x: np.einsum("ni,ij,nj->n", x, A, x) - top, r * n).reshape(r, n, 3)


def tilted_data(rng, r, n):
    def propose():
        return rng.dirichlet(TILTED[:3] + 1, 400_000), rng.uniform(size=400_000)

    return accepted(propose, lambda x: TILTED[3] * (x[:, 0] * x[:, 1] - 0.25), r * n).reshape(r, n, 3)


def symmetric(t):
    return jnp.array([[t[0], t[1], t[2]], [t[1], t[3], t[4]], [t[2], t[4], -t[0] - t[3]]])


MU = np.array([1.5, -1.0, 2.0])
BINGHAM = np.array([1.0, 0.5, -0.8, -1.2, 0.3])
A = np.asarray([[1.0, 0.5, -0.8], [0.5, -1.2, 0.3], [-0.8, 0.3, 0.2]])
TILTED = np.array([0.2, 1.0, 1.5, 3.0])  # α - 1 and the tilt
CASES = {
    "von Mises-Fisher": (on(constraints.sphere, lambda t, x: x @ t, 3), fisher_data, MU),
    "Bingham": (
        on(constraints.sphere, lambda t, x: jnp.einsum("ni,ij,nj->n", x, symmetric(t), x), 3),
        bingham_data,
        BINGHAM,
    ),
    "tilted Dirichlet": (
        on(constraints.simplex, lambda t, x: jnp.log(x) @ t[:3] + t[3] * x[:, 0] * x[:, 1], 3),
        tilted_data,
        TILTED,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_truth_lies_within_standard_errors(name):
    """Over 300 data sets of 800 rows: within 3 in at least 95 %, and within 1.645 in 90 %, by chance within 8 %."""
    model, draw, truth = CASES[name]
    data = draw(np.random.default_rng(0), 300, 800)
    estimates, errors = fits(model, len(truth), data, ISM())
    z = (estimates - truth) / errors
    assert ((np.abs(z) < 3).mean(axis=0) >= 0.95).all()
    coverage = (np.abs(z) < 1.645).mean(axis=0)
    assert (np.abs(coverage - 0.9) < 0.08).all(), coverage
    # Five standard errors of the mean: no bias beyond a few tenths of a standard error.
    assert (np.abs(z.mean(axis=0)) < 0.3 + 5 / np.sqrt(300)).all()


# -- the truncated normal --------------------------------------------------------------------------


def log_weight(d):
    return jnp.minimum(jnp.log1p(d), 2.0)


@pytest.mark.parametrize(("which", "variance"), [("mean", 2.795459), ("variance", 2.379507)])
def test_variance_of_truncated_normal_estimates(which, variance):
    """Over 3,000 data sets of 1,000 rows the variance of √N times the estimate is the asymptotic one.

    Five standard errors of a variance are 13 %.
    """

    def f(t, x):
        return t[0] * x - 0.5 * x**2 if which == "mean" else -0.5 * t[0] * x**2

    data = np.abs(np.random.default_rng(1).normal(size=(3000, 1000)))
    estimates, errors = fits(on(constraints.positive, f), 1, data, ISM(log_weight))
    found = estimates[:, 0] if which == "mean" else 1 / estimates[:, 0]
    np.testing.assert_allclose(found.var() * 1000, variance, rtol=0.13)
    scale = 1.0 if which == "mean" else found**2
    np.testing.assert_allclose(np.mean((scale * errors[:, 0]) ** 2) * 1000, variance, rtol=0.05)
