"""Divergences against closed forms for Gaussians, quadrature, and the spread of replications."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, assert_variance, energy_of, improper
from numpyro.distributions import constraints
from scipy import integrate, stats

from numpyro_score import (
    Energy,
    EnergyDistribution,
    fisher_divergence,
    kernel_stein_discrepancy,
    kl_divergence,
    local_variance,
    mmd,
    sample,
    score_factor,
    squared_log_ratio,
)
from numpyro_score.arviz import as_arviz, dataset
from numpyro_score.divergences.law import Draws, thin
from numpyro_score.inference import AdversarialResult
from numpyro_score.normaliser import LogPartition

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MEANS = np.array([0.3, -0.2]), np.array([0.0, 0.4])
COVARIANCES = np.array([[1.0, 0.3], [0.3, 0.8]]), np.array([[1.5, -0.2], [-0.2, 1.0]])
(M1, M2), (S1, S2) = MEANS, COVARIANCES
K1, K2 = np.linalg.inv(S1), np.linalg.inv(S2)
D, GAP = 2, M1 - M2


def quadratic(theta, x):
    mean, precision = theta
    away = x - mean
    return 3.0 - 0.5 * jnp.einsum("ni,ij,nj->n", away, precision, away)


@functools.cache
def gaussian(which, form):
    """One of the two laws, as an energy that is off by exp 3, a distribution, or rows."""
    mean, covariance = MEANS[which], COVARIANCES[which]
    law = dist.MultivariateNormal(jnp.asarray(mean), jnp.asarray(covariance))
    if form == "distribution":
        return law
    rows = law.sample(jax.random.key(which), (4000,))
    if form == "data":
        return rows
    energy = energy_of(quadratic, (jnp.asarray(mean), jnp.asarray(np.linalg.inv(covariance))), rows[:50])
    return (energy, sample(energy, KEY, 1000)) if form == "draws of an energy" else energy


def log_z(which, form):
    if form == "distribution":
        return None
    return float(3.0 + 0.5 * np.linalg.slogdet(2 * np.pi * COVARIANCES[which])[1])


CHANGE = K2 - K1  # −∇² log(p/q)
SLOPE = K2 @ GAP  # ∇ log(p/q) at the mean of p
FISHER = 0.5 * (np.trace(CHANGE @ S1 @ CHANGE) + SLOPE @ SLOPE)
HYVARINEN = 0.5 * (np.trace(K2 @ S1 @ K2) + SLOPE @ SLOPE) - np.trace(K2)
KL = 0.5 * (np.trace(K2 @ S1) - D + GAP @ SLOPE + np.linalg.slogdet(S2)[1] - np.linalg.slogdet(S1)[1])
ENTROPY = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * S1)[1]
SQUARED = 0.5 * (KL**2 + 0.5 * np.trace(CHANGE @ S1 @ CHANGE @ S1) + SLOPE @ S1 @ SLOPE)


def close(found, expected, most):
    """Within 5 standard errors, and the standard error is small enough to mean something."""
    assert 0 < found.stderr < most, found
    assert abs(found.value - expected) < 5 * found.stderr, (found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("q", ["energy", "distribution"])
@pytest.mark.parametrize("p", ["draws of an energy", "distribution", "data"])
def test_gaussians(p, q):
    """Energies, distributions and data against each other, in closed form."""
    normalisers = {"log_partition_p": log_z(0, p), "log_partition_q": log_z(1, q)}
    if p == "data":
        del normalisers["log_partition_p"]
    p, q, data = gaussian(0, p), gaussian(1, q), p == "data"
    found = fisher_divergence(p, q, KEY)
    close(found, HYVARINEN if data else FISHER, 0.05)
    assert found.up_to_constant == data
    found = kl_divergence(p, q, KEY, **normalisers)
    close(found, KL + ENTROPY if data else KL, 0.05)
    assert found.up_to_constant == data
    if data:
        return
    close(squared_log_ratio(p, q, KEY, **normalisers), SQUARED, 0.05)
    for noise in (0.05, 1.0):
        step = noise**2 * (2 * np.trace(CHANGE @ CHANGE) + np.trace(CHANGE) ** 2) / (4 * D)
        close(local_variance(p, q, KEY, noise=noise), 2 * FISHER / D + step, 0.1)  # which tends to the first term


def test_fits_of_dynamics_embedding():
    """Such a fit is its energy."""
    energy = gaussian(1, "energy")
    fit = object.__new__(AdversarialResult)
    fit.__dict__["energy"] = energy
    rows = gaussian(0, "data")[:500]
    assert fisher_divergence(rows, fit) == fisher_divergence(rows, energy)
    assert mmd((fit, rows), rows[::-1] + 1.0) == mmd((energy, rows), rows[::-1] + 1.0)


def mixture_law(weights, locs, scale):
    return dist.MixtureSameFamily(dist.Categorical(jnp.array(weights)), dist.Normal(jnp.array(locs), scale))


def two_modes(theta, x):
    return jnp.logaddexp(-0.5 * (x + theta) ** 2, -((x - theta) ** 2)) + 2.0


def test_mixtures_by_quadrature():
    """KL and the Fisher divergence of an energy and a distribution, both with two modes, both ways round."""
    energy = energy_of(two_modes, 1.5, np.linspace(-2, 2, 9))
    law = mixture_law([0.3, 0.7], [-1.0, 2.0], 0.8)
    of_energy = mixture_law([2**0.5 / (1 + 2**0.5), 1 / (1 + 2**0.5)], [-1.5, 1.5], jnp.array([1.0, 0.5**0.5]))
    grid = np.linspace(-9, 9, 20_001)
    first, second = -0.5 * (grid + 1.5) ** 2, -((grid - 1.5) ** 2)
    of_law = 0.3 * stats.norm(-1, 0.8).pdf(grid) + 0.7 * stats.norm(2, 0.8).pdf(grid)
    logs = [np.logaddexp(first, second), np.log(of_law)]
    logs[0] -= np.log(integrate.trapezoid(np.exp(logs[0]), grid))
    for p, draw, q, (log_p, log_q) in ((energy, of_energy, law, logs), (law, law, energy, logs[::-1])):
        given, ratio, weight = (p, draw.sample(KEY, (4000,))), log_p - log_q, np.exp(log_p)
        close(kl_divergence(given, q), integrate.trapezoid(weight * ratio, grid), 0.05)
        slope = np.gradient(ratio, grid)
        close(fisher_divergence(given, q), integrate.trapezoid(0.5 * weight * slope**2, grid), 0.2)


@pytest.mark.slow
def test_all_defaults():
    """Draws and log Z of both sides from the energies alone."""
    found = kl_divergence(gaussian(0, "energy"), gaussian(1, "energy"), KEY)
    close(found, KL, 0.05)
    assert found.ess > 1000


def test_error_of_log_z():
    """Is added in quadrature, and comes with an EnergyDistribution."""
    p, q, value = gaussian(0, "distribution"), gaussian(1, "energy"), log_z(1, "energy")
    exact = kl_divergence(p, q, KEY, log_partition_q=value)
    given = LogPartition(value, 0.3, "smc", {})
    for found in (
        kl_divergence(p, q, KEY, log_partition_q=given),
        kl_divergence(p, EnergyDistribution(q, given), KEY),
    ):
        assert found.value == pytest.approx(exact.value, rel=1e-5)
        assert found.stderr == pytest.approx(math.hypot(exact.stderr, 0.3), rel=1e-5)


def test_standard_errors():
    """The reported variance is that between replications of independent draws, for KL and Fisher."""
    p, q, n = gaussian(0, "distribution"), gaussian(1, "energy"), 60
    rows = p.sample(KEY, (150, n))
    for divergence, given in (
        (functools.partial(fisher_divergence, q=q), [(gaussian(0, "energy"), x) for x in rows]),
        (functools.partial(kl_divergence, q=q, log_partition_q=0.0), rows),
    ):
        found = np.array([divergence(x)[:2] for x in given])
        assert_variance(found[:, 0], np.mean(found[:, 1] ** 2))


def chains(key, rho, num_chains, num_draws, dim=1):
    """Stationary normal chains with autocorrelation ρ^t, as `sample` returns draws."""
    noise = np.asarray(jax.random.normal(key, (num_draws, num_chains, dim)), np.float64)
    x = np.empty_like(noise)
    x[0] = noise[0]
    for t in range(1, num_draws):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho**2) * noise[t]
    return as_arviz({"posterior": dataset({"x": np.swapaxes(x, 0, 1)}, ("chain", "draw"))})


def shifted(theta, x):
    return -0.5 * jnp.sum((x - theta) ** 2, axis=-1)


def test_standard_errors_of_chains():
    """Correlated draws count as their effective number: three times the naive variance at ρ = ½."""
    q = energy_of(shifted, 1.0, np.zeros((2, 1)))
    p = energy_of(shifted, 0.0, np.zeros((2, 1)))
    found = []
    for rows in chains(KEY, 0.5, 150 * 4, 250)["posterior"]["x"].values.reshape(150, 4, 250, 1):
        draws = as_arviz({"posterior": dataset({"x": rows}, ("chain", "draw"))})
        found.append(kl_divergence((p, draws), q, log_partition_p=0.0, log_partition_q=0.0)[:2])
    found = np.array(found)
    assert_mean(found[:, 0], 0.5)
    # The estimate of the effective size is itself some per cent off.
    ratio = found[:, 0].var(ddof=1) / np.mean(found[:, 1] ** 2)
    assert stats.chi2(149).ppf(1e-5) / 149 / 1.15 < ratio < stats.chi2(149).ppf(1 - 1e-5) / 149 * 1.15
    assert np.mean(found[:, 1] ** 2) * 1000 == pytest.approx(3.0, rel=0.15)  # log(p/q) is linear in x here


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_thinned_chains_are_all_but_independent(rho):
    """The autocorrelation that is left is below 0.07, and no more is thrown away than has to be."""
    given = chains(KEY, rho, 4, 4000)["posterior"]["x"].values
    kept = np.asarray(thin(Draws(jnp.asarray(given), False)))
    step = given[..., 0].size / len(kept)
    assert rho**step < 0.1 and step <= 1.2 * (2 * (1 + rho) / (1 - rho) - 1)
    # independent rows stay as they are
    assert len(thin(Draws(jnp.asarray(given[:1]), True))) == 4000


def test_infinite_divergences_are_flagged():
    """A Cauchy law and normal tails: every sample has a finite mean, and it means nothing."""
    q = energy_of(lambda theta, x: -0.5 * theta * x**2, 1.0, np.zeros(3))
    for divergence in (kl_divergence, fisher_divergence):
        with pytest.warns(UserWarning, match="One of 4000 rows of p makes up .* may be infinite"):
            divergence(dist.Cauchy(0.0, 1.0).sample(KEY, (4000,)), q)


def one_point(x):
    numpyro.factor("energy", -0.5 * jnp.sum(x**2))


def test_one_big_point():
    """A model without rows takes draws of the whole."""
    energy, p = Energy(one_point, {}, np.zeros(2)), gaussian(0, "distribution")
    gap = np.eye(2) - K1
    close(fisher_divergence(p, energy, KEY), 0.5 * (np.trace(gap @ S1 @ gap) + M1 @ M1), 0.1)
    log_z = LogPartition(math.log(2 * math.pi), 0.0, "", {})
    close(kl_divergence(p, energy, KEY, log_partition_q=log_z), kl_divergence(p, NORMAL, KEY).value, 0.1)


def regression(x, z):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * (x[:, 0] - z) ** 2)


def test_covariates():
    """The Hyvärinen score of data whose rows have densities of their own; no draws, no log Z."""
    z, x = RNG.normal(size=(2, 30))
    found = fisher_divergence(x[:, None], Energy(regression, {}, x[:, None], z))
    assert found.value == pytest.approx(np.mean(0.5 * (x - z) ** 2 - 1), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(0.5 * (x - z) ** 2, ddof=1) / 30**0.5, rel=1e-5)


# -- supports -----------------------------------------------------------------------------------------------------


def on(support, f, *shape):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), shape), obs=x)
            numpyro.factor("energy", f(x))

    return model


GAMMA = Energy(on(constraints.positive, lambda x: 2.0 * jnp.log(x) - 2.0 * x), {}, np.ones(3))
ALPHA, BETA = np.array([2.5, 2.0, 1.7]), np.array([2.0, 3.0, 1.5])
DIRICHLET = Energy(on(constraints.simplex, lambda x: jnp.log(x) @ (BETA - 1), 3), {}, np.full((3, 3), 1 / 3))


def test_positive_data():
    """Gamma laws: KL in closed form, and the Fisher divergence weighted by h(x) = min(x, 1), as of data."""
    p, x = stats.gamma(2.5, scale=0.5), np.linspace(1e-6, 20, 200_001)
    law = dist.Gamma(2.5, 2.0)
    log_ratio = p.logpdf(x) - stats.gamma(3.0, scale=0.5).logpdf(x)
    close(
        kl_divergence(law, GAMMA, KEY, log_partition_q=-math.log(4)), integrate.trapezoid(p.pdf(x) * log_ratio, x), 0.05
    )
    h, slope = np.minimum(x, 1), 1.0 * (x < 1)
    gap = -0.5 / x  # difference of scores
    close(fisher_divergence(law, GAMMA, KEY), integrate.trapezoid(p.pdf(x) * 0.5 * h * gap**2, x), 0.2)
    s = 2.0 / x - 2.0
    hyvarinen = integrate.trapezoid(p.pdf(x) * (0.5 * h * s**2 - 2.0 * h / x**2 + slope * s), x)
    close(fisher_divergence(law.sample(KEY, (4000,)), GAMMA), hyvarinen, 0.2)


def test_simplex():
    """Dirichlet laws, in NumPyro's measure: the Jacobian of the rows √x is neither lost nor counted twice."""
    p = dist.Dirichlet(ALPHA)
    special = jax.scipy.special
    log_z = float(special.gammaln(BETA).sum() - special.gammaln(BETA.sum()))
    means = np.asarray(special.digamma(ALPHA) - special.digamma(ALPHA.sum()))
    cross_entropy = log_z - means @ (BETA - 1)
    entropy = float(p.entropy())
    close(kl_divergence(p, DIRICHLET, KEY, log_partition_q=log_z), cross_entropy - entropy, 0.1)
    close(kl_divergence(p.sample(KEY, (4000,)), DIRICHLET, log_partition_q=log_z), cross_entropy, 0.1)


# -- refusals -----------------------------------------------------------------------------------------------------


def score_model(x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        score_factor("network", x, -x)


ROWS = np.zeros((5, 2))
SCORE = Energy(score_model, {}, ROWS)
NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def test_score_terms():
    """The Fisher divergence needs no density; KL, of all things, does."""
    p = gaussian(0, "distribution")
    gap = np.eye(2) - K1
    expected = 0.5 * (np.trace(gap @ S1 @ gap) + M1 @ M1)
    close(fisher_divergence(p, SCORE, KEY), expected, 0.1)
    with pytest.raises(TypeError, match="'network' is a score_factor"):
        kl_divergence(p, SCORE, KEY)


def masked(x, z):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        with numpyro.handlers.mask(mask=z > 0):
            numpyro.factor("energy", -0.5 * z * x[:, 0] ** 2)


TRUNCATED = energy_of(lambda theta, x: jnp.where(x < theta, -x, -jnp.inf), 1.0, np.zeros(3))
MASKED = Energy(masked, {}, np.ones((3, 1)), np.array([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fisher_divergence(NORMAL, ROWS), TypeError, "fisher_divergence needs the density of q.*use mmd"),
        (lambda: squared_log_ratio(ROWS, NORMAL), TypeError, "needs the density of p.*use fisher_divergence or kl"),
        (lambda: local_variance(ROWS, NORMAL, KEY, noise=1.0), TypeError, "needs the density of p"),
        (lambda: local_variance(GAMMA, GAMMA, KEY, noise=1.0), NotImplementedError, "off the support of site 'x'"),
        (lambda: kl_divergence(NORMAL, NORMAL), TypeError, "p is to be drawn from: pass rng_key"),
        (lambda: kl_divergence(NORMAL, NORMAL, KEY, log_partition_p=0.0), ValueError, "leave out log_partition_p"),
        (lambda: kl_divergence(ROWS, gaussian(1, "energy"), log_partition_q=math.nan), ValueError, "must be finite"),
        (lambda: kl_divergence(ROWS, gaussian(1, "energy"), log_partition_q="smc"), TypeError, "must be a number or a"),
        (lambda: kl_divergence(NORMAL, dist.Normal(0.0, 1.0), KEY), ValueError, "not laws of the same data"),
        (
            lambda: kl_divergence(dist.Normal(0.0, 1.0), GAMMA, KEY),
            ValueError,
            "outside of the support of q's site 'x'",
        ),
        (lambda: fisher_divergence(np.array([0.5, 1.5]), TRUNCATED), ValueError, "q is not finite at p's row 1 "),
        (lambda: fisher_divergence(np.ones((3, 1)), MASKED), ValueError, "q masks or weighs"),
        (lambda: kl_divergence(dist.Normal(np.zeros(2), 1.0), NORMAL, KEY), ValueError, r"\.to_event\(1\)"),
        (lambda: kl_divergence(dist.Poisson(2.0), NORMAL, KEY), TypeError, "p is discrete"),
        (lambda: kl_divergence(NORMAL, improper(2), KEY), TypeError, "q is an ImproperUniform"),
        (lambda: fisher_divergence(np.array([[0.0, np.nan]] * 3), NORMAL), ValueError, "p have NaN or infinity in"),
        (lambda: fisher_divergence(np.zeros((5, 3)), NORMAL), ValueError, r"shape \(5, 3\)"),
        (lambda: fisher_divergence(np.zeros((1, 2)), NORMAL), ValueError, "at least two rows"),
        (lambda: fisher_divergence(np.zeros((0, 2)), NORMAL), ValueError, "are empty, of shape"),
        (lambda: mmd(np.zeros((0, 2)), ROWS), ValueError, "p is empty, of shape"),
        (lambda: mmd(ROWS, ROWS), ValueError, "give mmd a bandwidth"),
        (lambda: mmd(ROWS, ROWS[:, :1]), ValueError, "rows of 2 numbers and q of 1"),
        (lambda: kernel_stein_discrepancy(NORMAL, ROWS, KEY), TypeError, "needs the density of q"),
    ],
)
def test_refused(call, error, message, unchecked):
    """Each with what to do instead."""
    with pytest.raises(error, match=message):
        call()
