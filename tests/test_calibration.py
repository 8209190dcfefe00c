"""Calibrated learning rates, adjusted draws and influence, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_score import ISM, ScoreMatching, generalized_bayes
from numpyro_score.inference import LOSS_SITE, SandwichError

pytestmark = pytest.mark.usefixtures("x64")

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)
N, SIGMA, PRIOR_MEAN, PRIOR_SD = 60, 1.7, 0.5, 2.0
X = np.random.default_rng(0).laplace(2.0, 1.0, N)


def location(x, scale=1.0):
    """N(mu, σ²) with σ known. Row n has the loss ½(x − μ)²/σ⁴ − 1/σ², with gradient (μ − x)/σ⁴."""
    mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
    numpyro.deterministic("square", mu**2)
    with numpyro.plate("rows", len(x)), handlers.scale(scale=scale):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2 / SIGMA**2)


def location_rate(x):
    """H = N/σ⁴ and S = N s²/σ⁸ for the rows' variance s², so β = H/S = σ⁴/s²; where s² = σ², it is σ²."""
    return SIGMA**4 / np.var(x, ddof=1)


def matcher(model, learning_rate="calibrated", **options):
    return ScoreMatching(model, optim=optax.lbfgs(), num_steps=30, learning_rate=learning_rate, **options)


def run(sm, *args):
    return sm.run(KEY, *map(jnp.asarray, args), progress_bar=False)


def test_rate_of_a_gaussian_mean():
    fit = run(matcher(location), X)
    np.testing.assert_allclose(fit.learning_rate, location_rate(X), rtol=1e-6)
    np.testing.assert_allclose(fit.calibrated_learning_rate(), location_rate(X), rtol=1e-6)
    precision = PRIOR_SD**-2 + fit.learning_rate * N / SIGMA**4
    mode = (PRIOR_MEAN / PRIOR_SD**2 + fit.learning_rate * X.sum() / SIGMA**4) / precision
    np.testing.assert_allclose(fit.estimates["mu"], mode, rtol=1e-6)


def test_nuts():
    model = generalized_bayes(location, ISM(), "calibrated")
    mcmc = MCMC(
        NUTS(model), num_warmup=300, num_samples=1000, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(KEY, jnp.asarray(X))
    print(mcmc.get_samples()["mu"].mean(), mcmc.get_samples()["mu"].var(), np.var(X) / N)
