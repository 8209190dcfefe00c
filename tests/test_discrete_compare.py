"""Fits of discrete data beside each other, against enumeration."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import pytest
from discretes import BINARY, COUNT, com_poisson, discrete, ising, states
from models import improper
from scipy.special import gammaln, logsumexp

from numpyro_score import Energy, compare, plot_comparison, plot_marginals, report, sample

KEY = jax.random.key(0)
STATES = states(2, 2, 2, 2)


def lattice(x):
    ising(x, side=2)


def exact(j, h):
    """Log p of all sixteen states of a square."""
    pairs = STATES[:, [0, 2, 0, 1]] * STATES[:, [1, 3, 2, 3]]
    f = h * STATES.sum(-1) + j * pairs.sum(-1)
    return f - logsumexp(f)


@pytest.fixture(scope="module")
def compared():
    """The law of the data, and one with a weaker coupling, on 400 rows."""
    log_p = exact(1.0, -1.0)
    rows = np.random.default_rng(0).choice(16, 400, p=np.exp(log_p))
    fits = {"weak": dict(j=0.2, h=-0.5), "truth": dict(j=1.0, h=-1.0)}
    x = jnp.asarray(STATES[rows])
    energies = {k: Energy(lattice, v, x[:50]) for k, v in fits.items()}
    return rows, fits, compare(energies, x, rng_key=KEY, num_samples=200)


def test_likelihood_and_pseudo_likelihood(compared):
    """Sums over rows by enumeration; the better law is first under both."""
    rows, fits, found = compared
    flipped = [((STATES != row).sum(-1) == 1).nonzero()[0] for row in STATES]
    for name, at in fits.items():
        log_p = exact(**at)
        np.testing.assert_allclose(found.table["log_likelihood"][name], log_p[rows].sum(), rtol=1e-5)
        pseudo = np.array([np.sum(log_p[i] - np.logaddexp(log_p[i], log_p[flipped[i]])) for i in range(16)])
        np.testing.assert_allclose(found.table["score"][name], -pseudo[rows].sum(), rtol=1e-5)
    assert found.order_kl == found.order_fisher == ("truth", "weak") and found.sentence is None
    assert (found.table["ksd_pvalue"]["truth"] > 0.01) and (found.table["ksd_pvalue"]["weak"] < 0.01)
    assert found.table["mmd"]["weak"] > found.table["mmd"]["truth"]


def test_words(compared, tmp_path):
    """What takes the place of the Hyvärinen score is called so, in text, pictures and pages."""
    found = compared[2]
    assert "minus log pseudo-likelihood" in repr(found) and "Under pseudo-likelihood, best first: " in repr(found)
    assert "Hyvärinen" not in repr(found) and "Fisher" not in repr(found)
    kl, fisher = (line.rindex("truth") for line in found.lines[1:3])
    assert kl == fisher
    assert plot_comparison(found)[1].get_title().startswith("Pseudo-likelihood: minus log")
    page = report(found, tmp_path / "compared.html").read_text()
    assert "minus log pseudo-likelihood" in page and "Fisher" not in page


def test_counts():
    """A Poisson law beside one of half its rate, of 300 counts: the score is by pairs."""
    x = np.random.default_rng(1).poisson(3.0, 300)
    energies = {k: Energy(com_poisson, {"rate": k, "nu": 1.0}, jnp.asarray(x[:20])) for k in (3.0, 1.5)}
    found = compare({str(k): e for k, e in energies.items()}, x, rng_key=KEY, num_samples=1000)

    def x_to_log_p(k):
        at = np.arange(2000)
        return at * np.log(k) - gammaln(at + 1)

    for k in (3.0, 1.5):
        np.testing.assert_allclose(
            found.table["log_likelihood"][str(k)], np.sum(x * np.log(k) - k - gammaln(x + 1)), rtol=1e-4
        )
        log_p = x_to_log_p(k)
        score = sum(
            np.logaddexp(0.0, log_p[x + s] - log_p[x]) + np.where(x >= s, np.logaddexp(0.0, log_p[x - s] - log_p[x]), 0)
            for s in 2 ** np.arange(11)
        )
        np.testing.assert_allclose(found.table["score"][str(k)], score.sum(), rtol=1e-4)
    assert found.order_kl == found.order_fisher == ("3.0", "1.5")
    assert found.rule.score == "minus log likelihood of pairs"


def test_chains_that_are_short(compared):
    """The advice is for discrete data."""
    energy = Energy(com_poisson, {"rate": 3.0, "nu": 1.0}, jnp.arange(5))
    with pytest.warns(UserWarning, match="if that does not help, take another kernel of Gibbs, GibbsWithGradients"):
        sample(energy, KEY, 20, num_warmup=5)


def test_rows_of_both_kinds_are_refused():
    def model(x, y):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(BINARY, 2), obs=x)
            y = numpyro.sample("y", improper(1), obs=y)
            numpyro.factor("energy", -jnp.sum((y - x[:, :1]) ** 2, -1))

    energy = Energy(model, {}, jnp.zeros((5, 2), int), jnp.zeros((5, 1)))
    with pytest.raises(
        NotImplementedError, match="no draws for rows of discrete and continuous numbers, as of fit 'a'"
    ):
        compare({"a": energy, "b": energy}, {"x": np.zeros((5, 2), int), "y": np.zeros((5, 1))}, rng_key=KEY)


def test_counts_and_binary_data_are_not_alike():
    one = Energy(com_poisson, {"rate": 1.0, "nu": 1.0}, jnp.arange(4))

    def binary(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(BINARY), obs=x)
            numpyro.factor("energy", x * 1.0)

    with pytest.raises(ValueError, match=r"'x' \(binary\) .* 'x' \(counts\)"):
        compare({"a": one, "b": Energy(binary, {}, jnp.arange(2))}, np.arange(2), rng_key=KEY)
    assert COUNT.is_discrete


def test_marginals_of_discrete_data_are_shares():
    """Bars for single columns, and points moved by less than half a step in pairs."""
    rng = np.random.default_rng(0)
    x, draws = rng.integers(0, 2, (50, 16)), rng.integers(0, 2, (40, 16))
    axes = plot_marginals(Energy(ising, {"j": 0.1, "h": 0.0}, x), draws, columns=[0, 3])
    for panel, column in ((axes[0, 0], 0), (axes[1, 1], 3)):
        assert not panel.lines
        for bars, values in zip(panel.containers, (draws, x), strict=True):
            shares = [np.mean(values[:, column] == v) for v in (0, 1)]
            np.testing.assert_allclose([bar.get_height() for bar in bars], shares)
    drawn, seen = axes[1, 0].collections
    for points, values in ((drawn, draws), (seen, x)):
        away = points.get_offsets() - values[:, [0, 3]]
        assert 0 < np.abs(away).max() <= 0.3
    assert axes[0, 0].get_ylabel() == "share"
    plt.close(axes[0, 0].figure)
