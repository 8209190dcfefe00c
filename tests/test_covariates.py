"""Densities given covariates: normal lines, where all there is to know has a closed form."""

import html
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from models import improper
from numpyro.infer import HMC, Predictive

from numpyro_score import ISM, Energy, compare, generalized_bayes, hyvarinen_score, log_partition, report, sample

KEY = jax.random.key(0)
Z = np.linspace(-2, 2, 40, dtype=np.float32)
B, TAU = 1.5, 2.0
X = np.asarray(B * Z + np.random.default_rng(0).normal(size=40) / TAU**0.5, np.float32)


def line(x=None, z=None):
    """x | z is normal about b z with precision τ, without the terms that x is not in."""
    b, tau = numpyro.sample("b", dist.Normal(0.0, 3.0)), numpyro.param("tau", 1.0)
    with numpyro.plate("rows", len(z) if x is None else len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", tau * b * z * x - 0.5 * tau * x**2)


ENERGY = Energy(line, {"b": B, "tau": TAU}, X, Z)


def test_new_rows_with_their_covariates():
    """By `at` and by `bind`, though the argument was given by position; the score is τ(bz − x)."""
    x, z = X[:7] + 1, Z[:7] - 1
    for energy in (ENERGY.at(x[:, None], z=z), ENERGY.bind(x=x, z=z)):
        np.testing.assert_allclose(energy.score(energy.data)[:, 0], TAU * (B * z - x), rtol=1e-5)
    np.testing.assert_allclose(ENERGY.bind(z=-Z).score(X[:, None])[:, 0], TAU * (-B * Z - X), rtol=1e-5)
    expected = 0.5 * (TAU * (B * z - x)) ** 2 - TAU
    np.testing.assert_allclose(hyvarinen_score(ENERGY.at(x[:, None], z=z)).pointwise, expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"has 40 rows and cannot take 7: .*rows go with covariates, at\(x, z=z\)"):
        ENERGY.at(x[:, None])
    with pytest.raises(TypeError, match="takes no keyword 'w'"):
        ENERGY.at(x[:, None], w=z)


def test_normalisers(unchecked):
    """log Z(z) = ½ log 2π/τ + ½ τ b² z², once for values that are alike."""
    z = np.array([-1.0, 0.0, 2.0, 2.0], np.float32)
    found = log_partition(ENERGY, given={"z": z})
    exact = 0.5 * np.log(2 * np.pi / TAU) + 0.5 * TAU * (B * z) ** 2
    np.testing.assert_allclose([v.value for v in found], exact, atol=1e-4)
    assert found[2] is found[3]
    with pytest.raises(ValueError, match=r"say which, e.g. by given=\{'z': z\}"):
        log_partition(ENERGY)
    with pytest.raises(ValueError, match=r"lengths \{'z': 4, 'x': 3\}"):
        log_partition(ENERGY, given={"z": z, "x": z[:3]})
    with pytest.raises(TypeError, match="given must be a dict"):
        log_partition(ENERGY, given=z)


def test_draws():
    """Each row has chains of its own, with the mean bz and the variance 1/τ."""
    z = np.array([-2.0, 0.0, 1.0], np.float32)
    draws = sample(
        ENERGY, KEY, 1500, kernel=partial(HMC, num_steps=5, trajectory_length=None), num_warmup=300, given={"z": z}
    )
    x, ess = draws["posterior"]["x"], draws["ess"]["x"].values
    assert x.dims == ("chain", "draw", "given") and x.shape == (4, 1500, 3)
    error = np.sqrt(1 / TAU / ess)
    assert (np.abs(x.mean(["chain", "draw"]) - B * z) < 5 * error).all()
    assert (np.abs(x.var(["chain", "draw"]) * TAU - 1) < 5 * np.sqrt(6 / ess)).all()


def test_comparison(tmp_path):
    """The likelihood is that of the normal laws, each with its own normaliser."""
    fits = {"line": ENERGY, "level": ENERGY.with_params({"b": 0.0, "tau": 0.5})}
    new, z = X[::4] + 0.1, Z[::4]
    comparison = compare(fits, new, rng_key=KEY, given={"z": z})
    found = comparison.table
    exact = {
        "line": scipy.stats.norm(B * z, TAU**-0.5).logpdf(new).sum(),
        "level": scipy.stats.norm(0, 2**0.5).logpdf(new).sum(),
    }
    for name, value in exact.items():
        np.testing.assert_allclose(found.loc[name, "log_likelihood"], value, atol=1e-2)
    assert np.isnan(found.loc["line", "mmd"]) and np.isnan(found.loc["line", "log_partition"])
    page = report(comparison, tmp_path / "fits.html").read_text()
    assert "<h1>Comparison of line, level</h1>" in page and "data:image/png" in page and "not drawn" not in page
    assert all(html.escape(line) in page for line in comparison.lines)
    assert "<td>log likelihood</td>" in page and "<td>moments, p-value</td>" not in page
    with pytest.raises(TypeError, match="given has 'w', which no model takes"):
        compare(fits, new, rng_key=KEY, given={"w": z})
    with pytest.raises(NotImplementedError, match="pass the covariates of the new rows"):
        compare(fits, new, rng_key=KEY)


def test_predictive():
    """Parameters are drawn, data are not: there is no law to draw from, and the message says what does."""
    model, draws = generalized_bayes(line, ISM()), {"b": jnp.ones(3)}
    assert len(Predictive(model, draws, return_sites=["b"])(KEY, X, Z)["b"]) == 3
    with pytest.raises(NotImplementedError, match=r"for draws of the data use numpyro_score.sample\(fit, key, 1000\)"):
        Predictive(model, draws)(KEY, None, Z)
