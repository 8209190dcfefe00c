"""Fits that go through pickle, cloudpickle and deepcopy, and their printed forms."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import improper
from numpyro.distributions import constraints
from numpyro.infer import MCMC

from numpyro_score import ISM, SGLD, ScoreMatching, generalized_bayes, hyvarinen_loo, to_arviz

X = 2.0 * jax.random.normal(jax.random.key(0), (60,))
COPIES = {
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
    "cloudpickle": lambda v: cloudpickle.loads(cloudpickle.dumps(v)),
}


def precision(x):
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2)


def wave(x):
    tau = numpyro.sample("tau", dist.Exponential(1.0))
    b = numpyro.param("b", 0.1)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2 - 0.1 * jnp.cosh(b * x))


def run(svi, state=None):
    return svi.run(jax.random.key(1), X, num_steps=5, progress_bar=False, init_state=state)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def solved():
    return run(ScoreMatching(precision))


@pytest.fixture(scope="module")
def adam():
    return run(ScoreMatching(wave))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["solved", "adam"])
def test_a_copy_of_a_fit_agrees_and_goes_on(request, name, how):
    fit = request.getfixturevalue(name)
    estimates = fit.estimates  # what is computed from the fit need not be pickled
    found = COPIES[how](fit)
    same(estimates, found.estimates)
    same(fit.energy.score(X[:, None]), found.energy.score(X[:, None]))
    same(run(fit.svi, fit.state).params, run(found.svi, found.state).params)


def test_a_fit_is_loaded_in_another_process(solved, tmp_path):
    (tmp_path / "fit").write_bytes(pickle.dumps(solved))
    quickly = jax.config.values["jax_disable_most_optimizations"]  # compiled alike, the two processes agree bit for bit
    code = f"""
import pickle, sys, jax
sys.path.insert(0, {str(Path(__file__).parent)!r})
jax.config.update("jax_disable_most_optimizations", {quickly})
print(float(pickle.load(open({str(tmp_path / "fit")!r}, "rb")).stderr()["tau"]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) == float(solved.stderr()["tau"])


@pytest.mark.filterwarnings("ignore:The fit has not converged")
def test_an_optimiser_that_cannot_be_pickled_is_asked_for():
    fit = run(ScoreMatching(wave, optim=optax.adam(0.01)))
    same(run(fit.svi, fit.state).params, run(copy.deepcopy(fit).svi, fit.state).params)
    found = pickle.loads(pickle.dumps(fit))
    same(fit.estimates, found.estimates)
    with pytest.raises(ValueError, match="could not be saved with this fit: give it again"):
        run(found.svi, found.state)
    with pytest.raises(ValueError, match="could not be saved with this fit: give it again"):
        found.svi.run(jax.random.key(0), X, progress_bar=False)
    same(fit.stderr(), found.stderr())
    same(fit.influence(), found.influence())
    same(fit.sample_posterior(0, 3), found.sample_posterior(0, 3))
    again = ScoreMatching(wave, optim=optax.adam(0.01))
    same(run(fit.svi, fit.state).params, run(again, found.state).params)


def test_printed_fits_show_estimates_and_errors_once_computed(solved):
    fit = copy.copy(solved)  # whose errors nobody has asked for yet
    assert f"tau: {float(fit.estimates['tau']):.4g}" in repr(fit) and "±" not in repr(fit)
    assert f"± {float(fit.stderr()['tau']):.2g}" in repr(fit) and "0x" not in repr(fit)


LAW = generalized_bayes(wave, ISM())


def well(z):
    return 0.25 * z**4


def defined_nowhere():
    tau = numpyro.sample("tau", dist.Exponential(1.0))
    numpyro.deterministic("nan", jnp.log(-tau))


def two_chains(step_size, *args, init_params=None, **target):
    kernel = SGLD(**target, step_size=step_size)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=50, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), *args, init_params=init_params)
    return mcmc


def test_sound_chains_are_not_warned_of():
    data = to_arviz(two_chains(0.1, init_params=jnp.ones(2), potential_fn=well))  # warnings are errors
    assert data.posterior["Param:0"].shape == (2, 50)
    to_arviz(two_chains(0.1, model=defined_nowhere))


def test_chains_that_run_away_are_told():
    told = "2 of 2 chains have draws that are NaN or infinite.*step_size=10, or start them "
    with pytest.warns(UserWarning, match=told + "by other init_params"):
        to_arviz(two_chains(100.0, init_params=jnp.ones(2), potential_fn=well))
    mcmc = two_chains(100.0, X, model=LAW)
    with pytest.warns(UserWarning, match=told + "at a fit by init_strategy"):
        to_arviz(mcmc)
    with pytest.raises(ValueError, match="draws of 'tau' are not finite: the chains may have run away"):
        hyvarinen_loo(mcmc, X)
