"""Normalised log likelihoods for ArviZ."""

import functools

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from models import improper
from numpyro.distributions import constraints
from scipy.signal import lfilter
from scipy.stats import binom, norm

from numpyro_score import ScoreMatching, log_partition
from numpyro_score.normaliser import LogPartition, ratios
from numpyro_score.uncertainty import SandwichError

KEY = jax.random.key(0)
N = 100
# Normal quantiles in random order: no row is an outlier.
X = np.stack([np.random.default_rng(s).permutation(norm.ppf((np.arange(N) + 0.5) / N)) for s in (1, 2)], -1) * [1, 0.5]


def model(x):
    tau = numpyro.param("tau", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(tau * x**2, axis=-1))


@functools.cache
def fit():
    return ScoreMatching(model).run(KEY, jnp.asarray(X), progress_bar=False)


@functools.cache
def data():
    """With log Z by quadrature."""
    return fit().to_arviz(jax.random.key(2), num_samples=1000, log_partition=log_partition(fit()))


def exact(tau, x):
    """log N(x; 0, 1/τ) of each draw and row."""
    tau, x = np.float64(tau)[..., None, :], np.float64(x)
    return (0.5 * np.log(tau / (2 * np.pi)) - 0.5 * tau * x**2).sum(-1)


@pytest.mark.slow
def test_log_likelihood_is_normalised_at_every_draw():
    """log Z of each draw by importance sampling from the fitted model, within 5 of its standard errors."""
    group = data()["log_likelihood"]
    expected = exact(data()["posterior"]["tau"], X)
    assert group["x"].dims == ("chain", "draw", "row") and group["x"].shape == expected.shape == (4, 250, N)
    error = group.attrs["log_partition_ratio_stderr"]
    assert 0 < error < 0.05
    np.testing.assert_allclose(group["x"], expected, atol=5 * error + 1e-4)
    of_draws = data()["score_matching"]
    log_ratio = 0.5 * np.log(np.float64(fit().estimates["tau"]) / np.float64(data()["posterior"]["tau"])).sum(-1)
    z = (of_draws["log_partition_ratio"] - log_ratio) / of_draws["log_partition_ratio_stderr"]
    assert z.dims == ("chain", "draw") and np.abs(z).max() < 6
    assert (
        float(of_draws["log_partition_ratio_stderr"].max())
        == error
        < group.attrs["log_partition_ratio_bound"]
        < 5 * error
    )
    # Normalised only at the estimates, it would be off by much more.
    tau, at = np.float64(data()["posterior"]["tau"]), np.float64(fit().estimates["tau"])
    assert np.abs(0.5 * np.log(tau / at).sum(-1)).max() > 10 * error
    np.testing.assert_allclose(group.attrs["log_partition"], -0.5 * np.log(at / (2 * np.pi)).sum(), atol=1e-3)
    assert 0 <= group.attrs["log_partition_stderr"] < 1e-3


def test_loo_of_a_normalised_fit():
    """ArviZ's estimate is near the exact log likelihood minus two parameters."""
    loo = az.loo(data(), pointwise=True)
    elpd, p = (loo.elpd, loo.p) if hasattr(loo, "elpd") else (loo.elpd_loo, loo.p_loo)
    pointwise = exact(np.asarray(fit().estimates["tau"]), X)
    assert abs(elpd - (pointwise.sum() - p)) < 1.0 and 0.5 < p < 5
    assert not loo.warning


def test_log_partition_where_it_does_not_belong(unchecked):
    """A fit without draws has nothing to normalise."""

    def flat(x):
        tau = numpyro.param("tau", jnp.ones(2), constraint=constraints.positive)
        other = numpyro.param("other", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(tau * x**2, axis=-1) + other)

    found = ScoreMatching(flat, optim=optax.adam(0.1), num_steps=5).run(KEY, jnp.asarray(X), progress_bar=False)
    with pytest.raises(SandwichError):
        found.to_arviz(log_partition=LogPartition(0.0, 0.0, "smc", {}))


def test_draws_that_cannot_be_normalised_are_found():
    """A linear model of the precision whose draws reach below zero."""

    def linear(x):
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(1), obs=x)
            numpyro.factor("energy", -0.5 * tau * x[:, 0] ** 2)

    x = jnp.asarray(np.random.default_rng(4).standard_t(1.2, size=(12, 1)))
    found = ScoreMatching(linear).run(KEY, x, progress_bar=False)
    assert found.stderr()["tau"] > 0.3 * found.estimates["tau"]
    with pytest.raises(ValueError, match=r"At draw \d+ of the parameters: The density is not normalisable"):
        found.to_arviz(num_samples=400, log_partition=log_partition(found))


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_errors_of_log_partition_ratios_cover(rho, monkeypatch):
    """Over 300 sets of rows of a normal law, from chains with autocorrelation, at 30 draws of μ and τ.

    Counts below these limits come by chance in 1e-5 of cases, if each error covers as often as it says.
    """
    monkeypatch.setattr(ratios, "_warn_of_heavy_weights", lambda *_: None)  # tested below
    rng = np.random.default_rng(0)
    tau, mu = np.exp(rng.normal(size=30) * (2 / N) ** 0.5), rng.normal(size=30) / N**0.5
    expected = -0.5 * np.log(tau)
    weights = rng.normal(size=(30, 1)) / 30
    every, each, summed = [], [], []
    for _ in range(300):
        noise = rng.normal(size=(4, 1200))
        x = lfilter([(1 - rho**2) ** 0.5], [1.0, -rho], noise, axis=-1)[:, 200:]
        found = ratios._ratios(0.5 * x**2 - 0.5 * tau[:, None, None] * (x - mu[:, None, None]) ** 2)
        error = found.values - expected
        every.append(np.abs(error).max() < found.bound(500))
        each.append(np.abs(error[0]) < 1.96 * found.stderr[0])
        summed.append(np.abs(error @ weights) < 1.96 * found.stderr_of(weights))
    assert found.stderr.max() < found.bound() < 4 * found.stderr.max()
    assert min(np.sum(every), np.sum(each), np.sum(summed)) >= binom.ppf(1e-5, 300, 0.94)


def test_draws_too_far_for_importance_weights():
    """The weights of a precision τ at draws of precision 1 have the tail index 1 − τ."""
    x = np.random.default_rng(0).normal(size=(4, 1000))

    def found(*tau):
        return ratios._ratios(0.5 * (1 - np.array(tau))[:, None, None] * x**2)

    with pytest.warns(UserWarning, match=r"At 1 draw of 2 of the parameters log Z is not to be trusted.*Pareto k"):
        found(1.1, 0.05)
    assert len(found(1.1, 0.6, 0.6).values) == 3
