"""Fits beside each other, under KL and under Fisher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from models import improper
from numpyro.distributions import constraints
from scipy import stats

from numpyro_score import (
    AdversarialDynamicsEmbedding,
    Energy,
    LearnedFlow,
    ScoreMatching,
    compare,
    score_factor,
)
from numpyro_score.comparison import HYVARINEN
from numpyro_score.comparison.verdict import find_sentence, score_scale, told_apart
from numpyro_score.normaliser import LogPartition

# Chains are short here, and the R-hat is in the table.
pytestmark = pytest.mark.filterwarnings("ignore:Draws of fit:UserWarning")

KEY = jax.random.key(0)
TRAIN, NEW = (np.random.default_rng(seed).normal(size=(400, 1)) for seed in (1, 2))


def gaussian(x):
    """Mean and precision unknown."""
    mu = numpyro.param("mu", 0.5)
    tau = numpyro.param("tau", 2.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * tau * (x[:, 0] - mu) ** 2)


def log_z(tau):
    return 0.5 * np.log(2 * np.pi / tau)


def bimodal(x):
    """Two far modes with unknown weights: f' is that of either mode wherever there are data."""
    share = numpyro.param("share", 0.5)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        modes = jnp.stack([jnp.log(share) - 0.5 * (x[:, 0] + 6) ** 2, jnp.log1p(-share) - 0.5 * (x[:, 0] - 6) ** 2])
        numpyro.factor("energy", jax.nn.logsumexp(modes, axis=0))


def at(mu, tau):
    """In the dtype of a fit, whose programs it shares then."""
    return Energy(gaussian, {"mu": jnp.float32(mu), "tau": jnp.float32(tau)}, TRAIN)


@functools.cache
def gaussians():
    """A fit, its twin, and two planted worse ones."""
    fit = ScoreMatching(gaussian, optim=optax.adam(0.1), num_steps=150).run(KEY, TRAIN, progress_bar=False)
    fits = {"fit": fit, "twin": fit.energy, "narrow": at(0.0, 2.0), "shifted": at(0.4, 1.0)}
    return fits, compare(fits, NEW, rng_key=KEY, num_samples=250)


@pytest.mark.slow
def test_the_planted_better_model_wins_under_both():
    """Scores and likelihoods by hand, sums over rows."""
    fits, found = gaussians()
    table = found.table
    values = {"fit": fits["fit"].estimates, "narrow": fits["narrow"].params, "shifted": fits["shifted"].params}
    likelihood, score = {}, {}
    for name, at in values.items():
        mu, tau = np.float64(at["mu"]), np.float64(at["tau"])
        d = NEW[:, 0] - mu
        likelihood[name] = -0.5 * tau * d**2 - log_z(tau)
        score[name] = 0.5 * tau**2 * d**2 - tau
        row = table.loc[name]
        np.testing.assert_allclose(row["log_likelihood"], likelihood[name].sum(), rtol=1e-5)
        np.testing.assert_allclose(row["score"], score[name].sum(), rtol=1e-5)
        np.testing.assert_allclose(row["log_partition"], log_z(tau), atol=1e-4)
    for column, by_name in (("log_likelihood", likelihood), ("score", score)):
        difference = by_name["shifted"] - by_name["fit"]
        np.testing.assert_allclose(table.loc["shifted", f"{column}_diff"], difference.sum(), rtol=1e-4)
        np.testing.assert_allclose(
            table.loc["shifted", f"{column}_dse"], np.sqrt(len(NEW) * difference.var()), rtol=1e-2
        )
    assert set(found.order_kl[:2]) == set(found.order_fisher[:2]) == {"fit", "twin"}
    assert found.order_kl[2:] == ("shifted", "narrow") or found.order_kl[2:] == ("narrow", "shifted")
    assert found.sentence is None
    # The goodness of fit: the wrong ones are found out, and the draws are good.
    assert (table.loc[["narrow", "shifted"], "ksd_pvalue"] < 0.01).all()
    assert table.loc["shifted", "mmd"] > table.loc["fit", "mmd"] + 2 * table.loc["shifted", "mmd_stderr"]
    assert table.loc["fit", "moments_pvalue"] > 0.01 > 0.002 > table.loc[["narrow", "shifted"], "moments_pvalue"].max()
    assert list(table.loc[["narrow", "shifted"], "moments_furthest"]) == ["variance of x[0]", "mean of x[0]"]
    assert (table["r_hat"] < 1.05).all() and (table["ess"] > 100).all()


@pytest.mark.slow
def test_identical_fits_tie():
    """Their differences are zero with error zero, and ≈ stands between them."""
    _, found = gaussians()
    behind = found.table.loc[["fit", "twin"], ["log_likelihood_diff", "score_diff", "score_dse"]]
    np.testing.assert_array_equal(behind, np.zeros((2, 3)))
    assert "fit ≈ twin" in found.lines[2] or "twin ≈ fit" in found.lines[2]
    assert " > " in found.lines[2]


def test_arviz_compares_the_likelihoods():
    """The same order, estimates and differences as `az.compare` gives them, in either generation."""
    _, found = gaussians()
    assert isinstance(found.arviz, pd.DataFrame) and tuple(found.arviz.index) == found.order_kl
    elpd = found.arviz["elpd" if "elpd" in found.arviz else "elpd_loo"]
    np.testing.assert_allclose(elpd, found.table["log_likelihood"], rtol=1e-6)
    np.testing.assert_allclose(np.abs(found.arviz["elpd_diff"]), np.abs(found.table["log_likelihood_diff"]), rtol=1e-6)


def test_what_a_run_cost():
    """150 steps of ISM in one dimension are 450 evaluations of the density for each row; energies have no run."""
    fits, found = gaussians()
    cost = fits["fit"].cost
    assert cost.gradient_evaluations == 450
    assert 0 < cost.compile_seconds < cost.seconds < 600
    assert cost.device == jax.devices()[0].device_kind
    assert (cost.peak_memory is None) == (jax.devices()[0].memory_stats() is None)
    assert found.table.loc["fit", "seconds"] == cost.seconds
    assert np.isnan(found.table.loc["twin", "seconds"])


def test_what_an_adversarial_run_cost():
    """Of each draw two along its flow of one step and one in θ's step, beside one at each row."""
    ade = AdversarialDynamicsEmbedding(gaussian, LearnedFlow(1, num_steps=1), num_samples=16, num_steps=3)
    cost = ade.run(KEY, TRAIN, progress_bar=False).cost
    np.testing.assert_allclose(cost.gradient_evaluations, 3 * (1 + 3 * 16 / 400))
    assert 0 < cost.seconds


def test_people_can_read_it():
    """Estimates with their errors, the orders, and nothing that was not measured."""
    _, found = gaussians()
    text, page = repr(found), found._repr_html_()
    for part in ("log likelihood", "±", "R-hat of draws", "Under KL, best first", "Under Fisher, best first"):
        assert part in text and part in page
    assert ("peak memory" in text) == (jax.devices()[0].memory_stats() is not None)
    assert "–" in text and "nan" not in text.lower()


@pytest.mark.slow
def test_fisher_cannot_see_the_weights_of_separated_modes():
    """KL prefers the right weights by N times KL(0.8, 0.5) or so, and the scores are those of either mode."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 1)) + np.where(rng.random((400, 1)) < 0.8, -6, 6)
    fits = {k: Energy(bimodal, {"share": jnp.asarray(s)}, x) for k, s in {"equal": 0.5, "right": 0.8}.items()}
    found = compare(fits, x, rng_key=KEY, num_samples=100)
    k = np.sum(x < 0)
    exact = k * np.log(0.8 / 0.5) + (400 - k) * np.log(0.2 / 0.5)
    np.testing.assert_allclose(found.table.loc["equal", "log_likelihood_diff"], -exact, rtol=1e-3)
    assert found.order_kl == ("right", "equal")
    assert "Fisher cannot see the weights of separated modes" in found.sentence
    assert "'right' is" in found.sentence and found.sentence in repr(found)


def sentence(kl, fisher, rows=NEW, log_z_error=0.0):
    """Of two fits 'a' and 'b' with these differences by row, a over b, positive where a is better."""
    zeros, widest = np.zeros(len(kl)), float(np.linalg.eigvalsh(np.atleast_2d(np.cov(rows.T)))[-1])
    return find_sentence(
        {"a": kl, "b": zeros}, {"a": log_z_error, "b": 0.0}, {"a": -fisher, "b": zeros}, HYVARINEN, widest
    )


def test_a_difference_that_only_the_likelihood_sees_has_a_line():
    noise = np.random.default_rng(5).normal(size=400)
    likelihoods, errors = {"a": 0.5 + noise, "b": 0 * noise}, {"a": 0.0, "b": 0.0}
    (line,) = told_apart(("a", "b"), likelihoods, errors, {"a": noise, "b": 0 * noise}, HYVARINEN)
    assert line.startswith("The likelihood tells 'a' from 'b', by ") and "the Hyvärinen score does not" in line
    assert told_apart(("a", "b"), likelihoods, errors, {"a": noise - 0.5, "b": 0 * noise}, HYVARINEN) == []
    assert told_apart(("a", "b"), {"a": noise, "b": 0 * noise}, errors, {"a": noise, "b": 0 * noise}, HYVARINEN) == []


@pytest.mark.slow
def test_small_units_are_not_blindness():
    """Scores of positive data carry their distance from zero, which makes them small in small units."""

    def exponential(x):
        rate = numpyro.param("rate", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", jnp.log(x) - rate * x)

    x = 0.01 * np.random.default_rng(0).gamma(2.0, 1.0, 500)
    energies = {str(r): Energy(exponential, {"rate": jnp.asarray(r)}, x) for r in (100.0, 160.0)}
    assert score_scale(energies["100.0"]) == pytest.approx(x.var(ddof=1) / x.mean(), rel=1e-5)
    found = compare(
        energies, x, rng_key=KEY, num_samples=100, log_partition={k: -2 * np.log(float(k)) for k in energies}
    )
    assert found.order_kl == found.order_fisher == ("100.0", "160.0") and found.sentence is None
    noise = np.random.default_rng(5).normal(size=400)
    assert sentence(0.5 + noise, 1e-5 + 1e-6 * noise) is None  # Fisher has the same order


def test_when_there_is_a_sentence():
    """Opposite and both significant, or KL significant and Fisher nil, in either order of the two fits."""
    noise = np.random.default_rng(5).normal(size=400)
    clear, unclear, nil = 0.5 + noise, 0.05 + noise, 1e-4 * noise
    assert "log likelihood of 'a'" in sentence(clear, -clear) and "its Hyvärinen score is worse" in sentence(
        clear, -clear
    )
    assert "Fisher cannot see" in sentence(clear, nil)
    assert "log likelihood of 'b'" in sentence(-clear, nil)
    assert sentence(clear, clear) is None  # they agree
    assert sentence(unclear, -clear) is None  # KL is within its error
    assert sentence(clear, -unclear) is None and sentence(clear, unclear) is None  # Fisher might agree
    assert sentence(clear, nil, log_z_error=0.3) is None  # the error of log Z is that of every row
    assert sentence(clear, 0.01 + nil, rows=100 * NEW) is None  # little, but not in units of such wide data


def test_log_partition_can_be_given():
    """A number is exact, and the error of an estimate is in the differences."""
    fits = {"a": at(0.0, 1.0), "b": at(0.0, 1.1)}
    given = {"a": log_z(1.0), "b": LogPartition(log_z(1.1), 0.02, "smc", {})}
    table = compare(fits, NEW, rng_key=KEY, log_partition=given, num_samples=250).table
    behind = table.loc[table["log_likelihood_diff"].idxmin()]
    difference = 0.5 * 0.1 * NEW[:, 0] ** 2
    expected = np.hypot(np.sqrt(400 * difference.var()), 400 * 0.02)
    np.testing.assert_allclose(behind["log_likelihood_dse"], expected, rtol=1e-5)
    np.testing.assert_allclose(table.loc["a", "log_partition"], log_z(1.0), rtol=1e-6)
    assert table.loc["a", "log_partition_stderr"] == 0 and table.loc["b", "log_partition_stderr"] == 0.02


def test_a_score_without_a_density_has_no_order_under_kl():
    """And neither draws nor a likelihood."""

    def network(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(1), obs=x)
            score_factor("score", x, -a * x)

    fits = {
        "good": Energy(network, {"a": jnp.asarray(1.0)}, TRAIN),
        "bad": Energy(network, {"a": jnp.asarray(3.0)}, TRAIN),
    }
    found = compare(fits, NEW, rng_key=KEY)
    assert found.order_fisher == ("good", "bad") and found.order_kl is None and found.arviz is None
    assert "Under KL" not in repr(found) and found.table["mmd"].isna().all()


@pytest.mark.slow
def test_angles():
    """Von Mises laws, whose normaliser is 2π I₀(κ)."""

    def von_mises(x):
        kappa = numpyro.param("kappa", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.circular, (), ()), obs=x)
            numpyro.factor("energy", kappa * jnp.cos(x))

    angles = np.random.default_rng(0).vonmises(0.0, 2.0, 100)
    fits = {str(kappa): Energy(von_mises, {"kappa": jnp.asarray(kappa)}, angles[:50]) for kappa in (2.0, 1.0)}
    table = compare(fits, angles[50:], rng_key=KEY, num_samples=100).table
    for name, row in table.iterrows():
        expected = stats.vonmises(float(name)).logpdf(angles[50:]).sum()
        np.testing.assert_allclose(row["log_likelihood"], expected, rtol=1e-4)
    assert table.loc["2.0", "ksd_pvalue"] > 1e-3 and table["ksd"].notna().all() and (table["mmd"] < 0.5).all()


# -- errors -----------------------------------------------------------------------------------------


def other_site(x):
    with numpyro.plate("rows", len(x)):
        y = numpyro.sample("y", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * y[:, 0] ** 2)


def positive(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.HalfNormal(1.0).expand([1]).to_event(1), obs=x)


def regression(x, z):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * (x[:, 0] - z) ** 2)


REGRESSION = Energy(regression, {}, TRAIN, TRAIN[:, 0] + 1.0)


@pytest.mark.parametrize(
    ("fits", "data", "error", "message"),
    [
        ({"a": at(0.0, 1.0)}, NEW, ValueError, "needs two fits or more, got 1"),
        ({"a": at(0.0, 1.0), "b": Energy(other_site, {}, TRAIN)}, NEW, ValueError, "of 'y' .* and 'a' of 'x'"),
        ({"a": at(0.0, 1.0), "b": Energy(positive, {}, abs(TRAIN))}, NEW, ValueError, "on the same support"),
        ({"a": at(0.0, 1.0), "b": at(0.0, 2.0)}, NEW * np.nan, ValueError, "Fit 'a' cannot take the data"),
        ({"a": at(0.0, 1.0), "b": gaussian}, NEW, TypeError, "Fit 'b' is a function"),
        ([at(0.0, 1.0), at(0.0, 2.0)], NEW, TypeError, "takes fits by name, got a list"),
        ({"a": at(0.0, 1.0), "b": at(0.0, 2.0)}, NEW[:0], ValueError, "Data 'x' are empty"),
        ({"a": at(0.0, 1.0), "b": at(0.0, 2.0)}, {"y": NEW}, ValueError, "have .'y'., and the model's sites are .'x'."),
        ({"a": at(0.0, 1.0), "b": REGRESSION}, NEW, NotImplementedError, "Rows of fit 'b' differ in density"),
    ],
)
def test_fits_that_cannot_be_compared(fits, data, error, message, unchecked):
    """Each says which fit, and what to pass."""
    with pytest.raises(error, match=message):
        compare(fits, data, rng_key=KEY)


def test_log_partition_of_no_fit_is_refused():
    """A name that is misspelt."""
    with pytest.raises(ValueError, match="log_partition has 'c', which is no fit"):
        compare({"a": at(0.0, 1.0), "b": at(0.0, 2.0)}, NEW, rng_key=KEY, log_partition={"c": 0.0})
