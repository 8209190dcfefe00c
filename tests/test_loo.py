"""Leave-one-out and held-out Hyvärinen scores, against exact refits of a conjugate generalised posterior."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import Langevin, improper
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from numpyro_score import (
    ISM,
    PCD,
    Energy,
    ScoreMatching,
    generalized_bayes,
    hyvarinen_loo,
    hyvarinen_score,
)
from numpyro_score.comparison.loo import pareto_smoothed

KEY = jax.random.key(0)
N, BETA, SCALE = 60, 0.7, 5.0
# Normal quantiles in random order: no row is an outlier, whose heavy weights would make the errors far from normal.
_QUANTILES = stats.norm.ppf((np.arange(N) + 0.5) / N)
X = np.stack([np.random.default_rng(seed).permutation(_QUANTILES) for seed in (1, 2)], axis=-1) * [1.0, 0.5]
NEW = np.random.default_rng(2).normal(size=(N, 2))


def model(x, mask=True):
    """Normal rows with unknown precisions. Under ISM the loss of a row is Σ_k ½τ_k²x_k² − τ_k."""
    tau = numpyro.sample("tau", dist.HalfNormal(SCALE).expand([2]).to_event(1))
    numpyro.deterministic("variance", 1 / tau)
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(tau * x**2, axis=-1))


GENERALIZED = generalized_bayes(model, ISM(), BETA)


def precision_and_slope(x, seen):
    """The generalised posterior is ∏ exp(bτ − ½Aτ²) on τ > 0: A and b, (..., 2), from the rows that `seen` marks."""
    return BETA * seen @ x**2 + 1 / SCALE**2, BETA * seen.sum(-1, keepdims=True) * np.ones(2)


def exact_scores(x, new, seen, predictive):
    """H of each new row under the posterior of the rows seen, (M,), by quadrature over each precision."""
    tau = np.linspace(1e-6, 20.0, 20_001)
    a, b = (v[..., None] for v in precision_and_slope(x, seen))
    log_density = b * tau - 0.5 * a * tau**2
    if predictive == "mixture":  # the posterior that has seen the new row through its likelihood
        log_density = log_density + 0.5 * np.log(tau) - 0.5 * tau * new[..., None] ** 2
    w = np.exp(log_density - log_density.max(-1, keepdims=True))
    first, second = ((w * tau**p).sum(-1) / w.sum(-1) for p in (1, 2))
    score = -new * first
    if predictive == "pool":
        return (0.5 * score**2 - first).sum(-1)
    return (new**2 * second - first - 0.5 * score**2).sum(-1)


@functools.cache
def fit():
    """The mode of the generalised posterior."""
    return ScoreMatching(model, loss=ISM(), learning_rate=BETA).run(KEY, jnp.asarray(X), progress_bar=False)


@functools.cache
def exact_draws(size=4000, x=None):
    """Independent draws of the generalised posterior."""
    a, b = precision_and_slope(X if x is None else np.array(x), np.ones(N))
    loc, scale = b / a, a**-0.5
    draws = stats.truncnorm(-loc / scale, np.inf, loc, scale).rvs((size, 2), random_state=np.random.default_rng(3))
    return {"tau": jnp.asarray(draws, float)}


def assert_agrees(found, exact):
    """Every row, and their sum, within 5 of its own Monte Carlo standard errors."""
    np.testing.assert_array_less(abs(found.pointwise - exact), 5 * found.pointwise_mcse + 1e-5 * abs(exact))
    assert abs(found.estimate - exact.sum()) < 5 * found.mcse + 1e-5 * abs(exact.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("predictive", "size"), [("pool", 4000), ("mixture", 1000)])
def test_leave_one_out_agrees_with_refits(predictive, size):
    """60 refits in closed form, of draws from the posterior of all rows."""
    found = hyvarinen_loo(GENERALIZED, X, draws=exact_draws(size), predictive=predictive, rng_key=KEY)
    exact = exact_scores(X, X, 1 - np.eye(N), predictive)
    assert_agrees(found, exact)
    # The error is small enough to tell leave-one-out from the score of rows that the posterior has seen.
    seen = exact_scores(X, X, np.ones((N, N)), predictive)
    assert exact.sum() - seen.sum() > 10 * found.mcse
    assert found.kind == "loo" and found.predictive == predictive and not found.warning
    assert (found.n_samples, found.n_data_points) == (size, N)
    np.testing.assert_allclose(found.se, np.sqrt(N * np.var(found.pointwise)))


def test_draws_of_a_point_fit_are_weighted_to_the_generalised_posterior():
    """Student's t in log τ is not the posterior, and agrees with it after the weights."""
    found = hyvarinen_loo(fit(), rng_key=jax.random.key(4))
    assert_agrees(found, exact_scores(X, X, 1 - np.eye(N), "pool"))
    assert not found.warning


@functools.cache
def mcmc():
    mcmc = MCMC(
        NUTS(GENERALIZED),
        num_warmup=300,
        num_samples=1000,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, jnp.asarray(X))
    return mcmc


@pytest.mark.slow
def test_an_mcmc_run_is_a_source():
    """Draws by chain, whose autocorrelation is in the error; the same as the draws given with the model."""
    found = hyvarinen_loo(mcmc(), X)
    assert_agrees(found, exact_scores(X, X, 1 - np.eye(N), "pool"))
    again = hyvarinen_loo(GENERALIZED, X, draws=mcmc().get_samples(group_by_chain=True))
    np.testing.assert_array_equal(found.pointwise, again.pointwise)
    assert found.mcse == again.mcse and found.n_samples == 2000


@pytest.mark.slow
@pytest.mark.parametrize(("predictive", "size"), [("pool", 4000), ("mixture", 1000)])
def test_new_rows_under_the_posterior(predictive, size):
    """The posterior as it is predicts rows that it has not seen."""
    found = hyvarinen_score(GENERALIZED, NEW, draws=exact_draws(size), predictive=predictive)
    assert_agrees(found, exact_scores(X, NEW, np.ones(N), predictive))
    assert found.kind == "held-out" and (found.pareto_k is None) == (predictive == "pool")


def test_new_rows_under_a_point_fit():
    """H = ½τ²x² − τ at the estimates."""
    energy = Energy(model, {"tau": jnp.array([1.0, 3.0])}, NEW)
    assert fit().cost.gradient_evaluations is None and fit().cost.seconds > 0  # solved in closed form, without steps
    for source, args, tau in ((energy, (), np.array([1.0, 3.0])), (fit(), (NEW,), np.asarray(fit().estimates["tau"]))):
        found = hyvarinen_score(source, *args)
        np.testing.assert_allclose(found.pointwise, (0.5 * tau**2 * NEW**2 - tau).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(found.estimate, found.pointwise.sum())
        assert found.mcse == 0 and found.predictive == "plug-in"


def test_a_row_that_weights_cannot_leave_out_is_named():
    """The weights of a row have the tail index β x_n² / (β Σx² + 1/scale²), here 0.87."""
    x = X.copy()
    x[7, 0] = 20.0
    with pytest.warns(UserWarning, match=r"1 of 60 rows have a Pareto k above 0.70, .* at row 7"):
        found = hyvarinen_loo(GENERALIZED, x, draws=exact_draws(x=tuple(map(tuple, x))))
    assert found.warning and found.pareto_k.values.argmax() == 7
    assert " 1    1.7%" in repr(found)


def test_draws_that_do_not_cover_the_posterior_are_to_blame():
    """With a prior that matters, the posterior of a rate has a heavier left tail than draws around the estimates."""

    def gamma(x):
        shape = numpyro.sample("shape", dist.Gamma(20.0, 10.0))
        rate = numpyro.sample("rate", dist.Exponential(3.0))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", (shape - 1) * jnp.log(x) - rate * x)

    x = np.random.default_rng(1).gamma(3.0, 0.7, 30)
    fitted = ScoreMatching(gamma, num_steps=1000).run(KEY, x, progress_bar=False)
    with pytest.warns(UserWarning, match=r"draws around the fit's estimates \(whose own k is 0.*Pass an MCMC run"):
        hyvarinen_loo(fitted)


def test_equal_weights_have_no_tail():
    """Rows whose loss does not depend on the parameters leave the draws as they are, with both ArviZ."""
    weights, k = pareto_smoothed(np.zeros((2, 100)), 1.0)
    np.testing.assert_array_equal(weights, np.full((2, 100), 0.01))
    np.testing.assert_array_equal(k, 0)


def test_masked_rows_are_left_out():
    """They may hold NaN, and the rest keep their numbers."""
    x, mask = X.copy(), np.arange(N) != 5
    x[5] = np.nan
    a, b = precision_and_slope(X, 1.0 * mask)
    noise = np.random.default_rng(6).normal(size=(4000, 2))
    found = hyvarinen_loo(GENERALIZED, x, mask, draws={"tau": jnp.asarray(b / a + noise / a**0.5)})
    exact = exact_scores(X, X, mask * (1 - np.eye(N)), "pool")[mask]
    assert_agrees(found, exact)
    assert found.n_data_points == N - 1 and 5 not in found.pointwise.row


def test_table_is_printed_as_arviz_does():
    """Estimate, standard error and the counts of k."""
    text = repr(hyvarinen_loo(GENERALIZED, X, draws=exact_draws()))
    assert "4000 posterior samples and 60 observations, pool prediction" in text
    assert "Pareto k diagnostic values" in text and "  60  100.0%" in text and "lower is better" in text


# -- errors -----------------------------------------------------------------------------------------


def bad_draws(**changes):
    return {**exact_draws(), **changes}


@pytest.mark.parametrize(
    ("source", "draws", "error", "message"),
    [
        (GENERALIZED, None, TypeError, "has no draws of its own"),
        (GENERALIZED, {}, ValueError, "no site 'tau'"),
        (GENERALIZED, {"tau": jnp.ones((100, 3))}, ValueError, r"shape \(100, 3\), where a value has \(2,\)"),
        (GENERALIZED, {"tau": jnp.full((100, 2), jnp.nan)}, ValueError, "are not finite"),
        (GENERALIZED, {"tau": jnp.ones((10, 2))}, ValueError, "take at least 25"),
        (model, None, TypeError, "got function"),
    ],
)
def test_draws_that_cannot_be_used(source, draws, error, message, unchecked):
    """Each says what to pass."""
    with pytest.raises(error, match=message):
        hyvarinen_loo(source, X, draws=draws)


def test_fits_without_a_generalised_posterior(unchecked):
    """Other guides, losses without a density, and arguments where a fit has its own."""
    normal = dataclasses.replace(fit(), svi=ScoreMatching(model, AutoNormal))
    with pytest.raises(TypeError, match="draws of AutoNormal are not of the generalised posterior"):
        hyvarinen_loo(normal)
    pcd = dataclasses.replace(
        normal, svi=ScoreMatching(model, loss=PCD(kernel=Langevin(0.1), num_chains=4), num_steps=2)
    )
    with pytest.raises(TypeError, match="PCD gives no posterior"):
        hyvarinen_loo(pcd)
    with pytest.raises(TypeError, match="own data and draws"):
        hyvarinen_loo(normal, X)
    with pytest.raises(TypeError, match="its own rows have seen it"):
        hyvarinen_score(normal)
    with pytest.raises(ValueError, match="predictive must be 'pool' or 'mixture'"):
        hyvarinen_loo(normal, predictive="mean")
