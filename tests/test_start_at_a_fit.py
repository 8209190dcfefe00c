"""MCMC that starts at a fit, of the posterior that a fit is of."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from numpyro import handlers
from numpyro.diagnostics import gelman_rubin
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from numpyro_score import ISM, ScoreMatching, generalized_bayes

GROUP = np.repeat(np.arange(8), 25)
CENTRES = np.linspace(-1.0, 1.5, 8)


def hierarchy(x, group):
    m, s = numpyro.sample("m", dist.Normal(0.0, 1.0)), numpyro.sample("s", dist.HalfNormal(1.0))
    tau = numpyro.sample("tau", dist.Gamma(2.0, 0.5))
    with numpyro.plate("groups", 8):
        mu = numpyro.sample("mu", dist.Normal(m, s))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -0.5 * tau * (x - mu[group]) ** 2)


def tilted(x):
    tau = numpyro.param("tau", 3.0, constraint=constraints.positive)
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -0.5 * tau * (x - mu) ** 2)


@pytest.mark.slow
def test_chains_of_a_hierarchy_that_start_at_the_fit_agree():
    x = CENTRES[GROUP] + 0.2 * np.asarray(jax.random.normal(jax.random.key(0), GROUP.shape))
    fit = ScoreMatching(hierarchy, num_steps=1000).run(jax.random.key(1), x, GROUP, progress_bar=False)
    mcmc = MCMC(
        NUTS(generalized_bayes(hierarchy, ISM()), init_strategy=fit.init_strategy), num_warmup=200, num_samples=200,
        num_chains=4, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(2), x, GROUP, extra_fields=("potential_energy",))
    draws = mcmc.get_samples(group_by_chain=True)
    potential = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["potential_energy"]).mean(axis=1)
    assert max(np.max(gelman_rubin(np.asarray(v))) for v in draws.values()) < 1.05
    assert np.ptp(potential) < 5.0


@pytest.mark.slow
def test_param_sites_stay_where_the_model_or_the_fit_has_them():
    """A param moves the posterior of mu, whose sd is 1/tau: MCMC itself leaves it at the model's initial value."""
    x = 0.5 + np.asarray(jax.random.normal(jax.random.key(0), (50,)))
    fit = ScoreMatching(tilted).run(jax.random.key(1), x, progress_bar=False)
    law = generalized_bayes(tilted, ISM())

    def sd(model):
        kernel = NUTS(model, init_strategy=fit.init_strategy)
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
        mcmc.run(jax.random.key(2), x)
        return float(mcmc.get_samples()["mu"].std())

    # The loss of a row is half the square of tau (x - mu), less tau.
    tau = float(fit.params["tau"])
    assert abs(np.log(tau / 3.0)) > 0.5  # so that the two can be told apart
    np.testing.assert_allclose(sd(law), 1 / (3.0 * np.sqrt(50)), rtol=0.12)
    np.testing.assert_allclose(sd(handlers.substitute(law, fit.params)), 1 / (tau * np.sqrt(50)), rtol=0.12)
