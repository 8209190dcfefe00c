"""Denoising over a range of noise levels, against integrals over it in closed form and by quadrature.

Random comparisons allow 5 standard errors.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
from models import FAST_COMPILE, assert_mean, improper
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from numpyro_score import ContinuousDSM, Energy, ScoreMatching, generalized_bayes
from numpyro_score.diffusion.source import noise_range_of

SMALLEST, LARGEST, SIGMA_DATA = 0.05, 8.0, 0.7
MEAN, TAU = np.array([0.2, -0.4]), np.array([0.3, 1.7])  # of a model that is off; the data are N(0, I)
FORMS = {"plain": {}, "independent levels": {"stratified": False}, "antithetic": {"antithetic": True}}


def spread(x, sigma=1.0):
    """N(mean, tau) with noise: its levels belong together."""
    tau = numpyro.param("tau", jnp.full(2, 1.5), constraint=constraints.positive)
    mean = numpyro.param("mean", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        variance = tau + jnp.broadcast_to(sigma, len(x))[:, None] ** 2
        numpyro.factor("energy", -0.5 * jnp.sum((x - mean) ** 2 / variance, -1))


def objective(sigma):
    """J of N(0, (1 + σ²) I) for N(MEAN, TAU + σ²)."""
    model, data = TAU + sigma**2, 1 + sigma**2
    return np.sum(0.5 * (data + MEAN**2) / model**2 - 1 / model)


def negative_log_density(sigma):
    """The mean of -log N(x; MEAN, TAU + σ²) over the data with noise."""
    model, data = TAU + sigma**2, 1 + sigma**2
    return 0.5 * np.sum(np.log(2 * np.pi * model) + (data + MEAN**2) / model)


def integral(weight):
    """∫ weight(σ) d ln σ over the range."""
    return scipy.integrate.quad(lambda z: weight(np.exp(z)), np.log(SMALLEST), np.log(LARGEST), epsabs=1e-10)[0]


def edm_density(sigma):
    """Of ln σ, up to a constant: N(-1.2, 1.2²) for data whose standard deviation is 0.5 in some unit."""
    return scipy.stats.norm.pdf(np.log(0.5 * sigma / SIGMA_DATA), -1.2, 1.2)


def edm_weight(sigma):
    """EDM's weight of the denoiser's error, in the score's: (D - x)² = σ⁴ (s + ε/σ)², twice ½."""
    return 2 * sigma**4 * (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


LOG_RANGE = np.log(LARGEST / SMALLEST)
EXPECTED = {
    # A Kullback-Leibler divergence that ends differs from one that begins; by the densities, not by their scores.
    "likelihood": lambda: negative_log_density(SMALLEST) - negative_log_density(LARGEST),
    "uniform": lambda: integral(lambda s: s**2 * objective(s)) / LOG_RANGE,
    "edm": lambda: integral(lambda s: edm_density(s) * edm_weight(s) * objective(s)) / integral(edm_density),
    "own": lambda: integral(lambda s: np.sqrt(s) * objective(s)),
}


def loss_of(weighting, **form):
    sigma_data = {"sigma_data": SIGMA_DATA} if weighting == "edm" else {}
    return ContinuousDSM(SMALLEST, LARGEST, jnp.sqrt if weighting == "own" else weighting, **sigma_data, **form)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def rows_of(loss, tau, mean, x, key):
    return loss(Energy(spread, {"tau": tau, "mean": mean}, x), key)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def slopes_of(loss, x, key):
    """The derivative of each row's loss in a common variance tau, at the truth 1."""
    return jax.jacfwd(lambda t: loss(Energy(spread, {"tau": jnp.full(2, t), "mean": jnp.zeros(2)}, x), key))(1.0)


@pytest.mark.parametrize("weighting, form", list(itertools.product(EXPECTED, FORMS)))
def test_means_are_the_stated_integrals(weighting, form, x64):
    x = np.random.default_rng(0).normal(size=(100_000, 2))
    assert_mean(rows_of(loss_of(weighting, **FORMS[form]), TAU, MEAN, x, jax.random.key(1)), EXPECTED[weighting]())


def test_divergence_between_the_ends(x64):
    """The likelihood weighting's integral of Fisher divergences is KL at the smallest level less KL at the largest."""

    def kl(sigma):
        model, data = TAU + sigma**2, 1 + sigma**2
        return 0.5 * np.sum((data + MEAN**2) / model - 1 + np.log(model / data))

    x = np.random.default_rng(1).normal(size=(100_000, 2))
    loss, key = loss_of("likelihood"), jax.random.key(1)
    excess = rows_of(loss, TAU, MEAN, x, key) - rows_of(loss, np.ones(2), np.zeros(2), x, key)
    assert_mean(excess, kl(SMALLEST) - kl(LARGEST))


@pytest.mark.parametrize("weighting", EXPECTED)
def test_gradient_vanishes_at_the_truth(weighting, x64):
    x = np.random.default_rng(2).normal(size=(100_000, 2))
    assert_mean(slopes_of(loss_of(weighting, stratified=False), x, jax.random.key(3)), 0.0)


def test_variance_of_antithetic_noise(x64):
    """Over all levels of normal data the variance of a gradient is 0.6 of that of the plain form."""
    x = np.random.default_rng(3).normal(size=(400_000, 2))
    plain, antithetic = (
        slopes_of(ContinuousDSM(1e-2, 1e2, antithetic=a), x, jax.random.key(4)) ** 2 for a in (False, True)
    )
    assert_mean(antithetic - 0.6 * plain, 0.0)


def test_strata_remove_the_variance_between_levels(x64, optimised):
    """The mean of 64 rows loses what the levels' means differ by, over 64; at the truth, where J is -D/2(1 + σ²)."""

    @functools.partial(jax.jit, static_argnums=0)
    def means(loss):
        def mean(key):
            data_key, key = jax.random.split(key)
            x = jax.random.normal(data_key, (64, 2))
            return loss(Energy(spread, {"tau": jnp.ones(2), "mean": jnp.zeros(2)}, x), key).mean()

        return jax.vmap(mean)(jax.random.split(jax.random.key(0), 16_000))

    evenly, drawn = (np.var(means(loss_of("uniform", stratified=s))) for s in (True, False))
    first, second = (integral(lambda s, k=k: (s**2 / (1 + s**2)) ** k) / LOG_RANGE for k in (1, 2))
    np.testing.assert_allclose(drawn - evenly, (second - first**2) / 64, rtol=0.25)


@pytest.mark.parametrize("largest, sigma_data", [(8.0, None), (8.0, 0.7), (8.0, 200.0), (8.0, 0.01)])
@pytest.mark.parametrize("stratified", [True, False])
def test_levels_have_their_law(largest, sigma_data, stratified):
    """Those of one row over many keys, also in either tail; and those of a stretch of rows are spread evenly."""
    loss = ContinuousDSM(0.05, largest, "uniform" if sigma_data is None else "edm", stratified, sigma_data)
    keys = jax.random.split(jax.random.key(5), 5000)
    sigma = jax.vmap(lambda k: loss.levels(k, 200, jnp.float32))(keys)
    ends = np.log([0.05, largest])
    if sigma_data is None:
        law = scipy.stats.uniform(ends[0], ends[1] - ends[0])
    else:
        middle = -1.2 + np.log(2 * sigma_data)
        law = scipy.stats.truncnorm(*((ends - middle) / 1.2), middle, 1.2)
    for row in (0, 199):
        assert scipy.stats.kstest(np.log(np.asarray(sigma[:, row], float)), law.cdf).pvalue > 1e-5
    quantile = np.sort(law.cdf(np.log(np.asarray(sigma[0, 50:178], float))))
    gaps = np.diff(np.concatenate([quantile, quantile[:1] + 1]))
    if stratified:  # no gap of multiples of the golden ratio is above 1 + 2/(1 + √5) + ... < 2.2 times the mean
        assert gaps.max() < 2.2 / 128 + 1e-3
    assert ((sigma >= 0.05) & (sigma <= largest)).all()


@pytest.mark.slow
def test_fit_and_posterior():
    """In nats: NUTS over the objective finds the spread of an ordinary posterior of a variance, tau √(2/(N D))."""

    def model(x, sigma=1.0):
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 10.0))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1) / (tau + sigma**2))

    x = 1.5 * np.random.default_rng(6).normal(size=(2000, 2)).astype(np.float32)
    best = np.mean(x**2)  # the maximum of the likelihood, but for the smallest level
    loss = ContinuousDSM(0.03, 60.0, antithetic=True)
    fit = ScoreMatching(model, loss=loss, num_steps=500).run(jax.random.key(0), x, progress_bar=False)
    exact = best * np.sqrt(2 / x.size)
    assert abs(fit.estimates["tau"] - best) < 2 * exact  # what is left of the last steps' noise
    # The sandwich is that of one draw of noise, and so above the error of the average.
    assert exact < fit.stderr()["tau"] < 3 * exact
    assert fit.cost.gradient_evaluations == 2 * 500
    assert noise_range_of(fit) == (0.03, 60.0)
    mcmc = MCMC(NUTS(generalized_bayes(model, loss)), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(1), x)
    np.testing.assert_allclose(mcmc.get_samples()["tau"].std(), exact, rtol=0.2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, TypeError, r"needs smallest, got None: a noise level.*ContinuousDSM\(0.01, 50.0\)"),
        ({"smallest": 0.1, "largest": -1.0}, ValueError, "needs a positive largest"),
        ({"smallest": 1.0, "largest": 0.1}, ValueError, "needs largest > smallest, got 0.1 and 1"),
        ({"smallest": 0.1, "largest": 1.0, "weighting": "snr"}, ValueError, "no weighting 'snr': use 'likelihood'"),
        ({"smallest": 0.1, "largest": 1.0, "weighting": "edm"}, TypeError, "needs sigma_data.*sigma_data=float"),
        ({"smallest": 0.1, "largest": 1.0, "sigma_data": 1.0}, ValueError, 'with weighting="edm" only'),
        (
            {"smallest": 0.1, "largest": 1.0, "weighting": "edm", "sigma_data": 1e6},
            ValueError,
            r"around 0.6 sigma_data = 6e\+05, and next to none from 0.1 to 1",
        ),
        (
            {"smallest": 0.1, "largest": 1.0, "weighting": lambda s: 0.5 - s},
            ValueError,
            "-0.0.* at the level 0.5.*at least 0",
        ),
        ({"smallest": 0.1, "largest": 1.0, "weighting": lambda s: s * np.nan}, ValueError, "nan at the level 0.1"),
        ({"smallest": 0.1, "largest": 1.0, "weighting": lambda s: 0 * s}, ValueError, "0 at the level 0.1.*more for"),
        ({"smallest": 0.1, "largest": 1.0, "weighting": lambda s: "s"}, TypeError, "in the place of numbers"),
        ({"smallest": 0.1, "largest": 1.0, "stratified": "no"}, TypeError, "True or False as stratified, got 'no'"),
        ({"smallest": 0.1, "largest": 1.0, "antithetic": 3}, TypeError, "True or False as antithetic, got 3"),
    ],
)
def test_settings_that_are_refused(arguments, error, message, unchecked):
    with pytest.raises(error, match=message):
        ContinuousDSM(**arguments)


def test_models_and_weightings_that_are_refused():
    x, key, loss = np.zeros((4, 2)), jax.random.key(0), ContinuousDSM(0.1, 1.0)

    def without(x):
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1))

    params = {"tau": np.ones(2), "mean": np.zeros(2)}
    with pytest.raises(TypeError, match=r"'sigma'.*def model\(x, sigma=1.0\)"):
        jax.eval_shape(loss, Energy(without, {}, x), key)
    with pytest.raises(TypeError, match=r"arguments give 'sigma', which ContinuousDSM passes: leave it out"):
        jax.eval_shape(loss, Energy(spread, params, x, sigma=0.5), key)
    with pytest.raises(ValueError, match=r"weighting gave shape \(2,\) for levels of shape \(4,\)"):
        jax.eval_shape(ContinuousDSM(0.1, 1.0, lambda sigma: sigma[:2]), Energy(spread, params, x), key)
