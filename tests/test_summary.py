"""The table of a fit, beside closed forms and ArviZ's own names."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
import scipy.stats
from models import improper
from numpyro.distributions import constraints

from numpyro_score import ISM, ScoreMatching

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal([1.0, -2.0], [1.0, 2.0], size=(300, 2)).astype(np.float32)


def model(x):
    """Independent normal columns of known mean zero; a site in a plate, a simplex, and a number computed of them."""
    with numpyro.plate("feature", 2):
        mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    shares = numpyro.param("shares", jnp.array([0.5, 0.5]), constraint=constraints.simplex)
    numpyro.deterministic("sd", tau**-0.5)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * tau * jnp.sum(shares * (x - mu) ** 2, -1))


@pytest.fixture(scope="module")
def fit():
    return ScoreMatching(model, loss=ISM(), optim=optax.lbfgs(), num_steps=60).run(KEY, X, progress_bar=False)


def test_numbers_of_a_normal_law(fit):
    """Means are normal, the precision is normal in its logarithm, and so is the root of a product of both."""
    table = fit.summary(0.9)
    assert isinstance(table, pd.DataFrame) and list(table) == ["estimate", "stderr", "z", "5%", "95%", "distance"]
    n, q = len(X), scipy.stats.norm.ppf(0.95)
    mean, se = X.mean(0), X.std(0) / np.sqrt(n)
    rows = table.loc[["mu[0]", "mu[1]"]]
    np.testing.assert_allclose(rows["estimate"], mean, rtol=1e-3)
    np.testing.assert_allclose(rows["stderr"], se, rtol=2e-2)
    np.testing.assert_allclose(rows["z"], rows["estimate"] / rows["stderr"], rtol=1e-6)
    np.testing.assert_allclose(rows["95%"] - rows["5%"], 2 * q * rows["stderr"], rtol=1e-4)
    tau = table.loc["tau"]
    np.testing.assert_allclose(tau["estimate"], np.sum(1 / X.var(0)), rtol=1e-3)
    np.testing.assert_allclose(np.log(tau["95%"] / tau["5%"]), 2 * q * tau["stderr"] / tau["estimate"], rtol=1e-3)
    assert np.isnan(tau["z"])  # zero is no value of it
    sd = table.loc["sd"]  # by the delta method: sd of τ^(−1/2) is ½ τ^(−3/2) that of τ
    np.testing.assert_allclose(sd["stderr"], 0.5 * tau["estimate"] ** -1.5 * tau["stderr"], rtol=1e-3)
    share = table.loc["shares[0]"]
    np.testing.assert_allclose(share["stderr"], fit.stderr()["shares"][0], rtol=1e-6)
    np.testing.assert_allclose(share["95%"] - share["5%"], 2 * q * share["stderr"], rtol=0.1)  # of 4,000 draws
    assert (table["distance"].dropna() < 0.1).all()


def test_names_are_those_of_arviz(fit):
    """With labels of a plate's axis, and of one that `dims` names."""
    labels = dict(coords={"feature": ["height", "weight"], "part": ["a", "b"]}, dims={"shares": ["part"]})
    names = fit.summary(**labels).index
    assert set(names) == set(az.summary(fit.to_arviz(num_samples=40, **labels)).index)
    assert set(names) == {"mu[height]", "mu[weight]", "tau", "shares[a]", "shares[b]", "sd"}
    with pytest.raises(ValueError, match="coords has 3 labels for 'feature', and 'mu' has 2"):
        fit.summary(coords={"feature": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        fit.summary(95.0)


def test_printed(fit):
    """As text and as HTML: what was fitted, to the digits of the errors, and that it converged."""
    table = fit.summary()
    text = repr(table)
    assert text.startswith("model by ISM() on 300 rows of 2 numbers.\n")
    assert "Converged: the minimum is less than" in text.splitlines()[-1]
    shown = next(line for line in text.splitlines() if line.startswith("mu[0]")).split()
    assert shown[1] == f"{table.loc['mu[0]', 'estimate']:.3f}" and shown[2] == f"{table.loc['mu[0]', 'stderr']:.3f}"
    page = table._repr_html_()
    assert "<th>mu[1]</th>" in page and "Converged" in page
    assert type(table[["estimate"]]) is pd.DataFrame


def network(x):
    """A site of many arrays beside one number."""
    start = {"w": jnp.ones((2, 9)), "v": jnp.ones(9)}
    net, tau = numpyro.param("net", start), numpyro.param("tau", 1.0)
    numpyro.factor("energy", jnp.tanh(x @ net["w"]) @ net["v"] - 0.5 * tau * (x**2).sum(-1))


def test_what_it_cannot_give_it_says():
    """A network is a sentence; a fit to one row has no errors, and the table says so."""
    fit = ScoreMatching(network, loss=ISM(), optim=optax.sgd(1e-9), num_steps=2).run(KEY, X[:1], progress_bar=False)
    table = fit.summary()
    assert list(table.index) == ["tau"] and np.isnan(table.loc["tau", "stderr"])
    assert any("No standard errors: The sandwich covariance needs the spread over rows" in line for line in table.lines)
    assert any(line.startswith("'net' is not listed, as it has 27 parameters in 2 arrays") for line in table.lines)
    assert "stderr" not in repr(table).splitlines()[1]


def test_a_scale_at_the_end_of_its_constraint():
    """Quartic tails of normal data: the estimate goes to zero, and a sentence says what its error is worth."""

    def tails(x):
        tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        a = numpyro.param("a", 0.1, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * tau * x**2 - a * x**4)

    x = np.random.default_rng(0).uniform(-1, 1, 400) * np.random.default_rng(1).normal(size=400) * 2
    fit = ScoreMatching(tails, optim=optax.lbfgs(), num_steps=200).run(KEY, x, progress_bar=False)
    assert any("Numbers of 'a' are at the end of their constraint" in line for line in fit.summary().lines)
    inside = ScoreMatching(tails, optim=optax.lbfgs(), num_steps=200).run(KEY, np.clip(x, -1, 1), progress_bar=False)
    assert not any("at the end of their constraint" in line for line in inside.summary().lines)
