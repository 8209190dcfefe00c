"""Sandwich covariances against closed forms, and against the spread of estimates over many data sets."""

import functools
import operator
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.contrib.module import random_flax_module
from numpyro.distributions import constraints

from numpyro_score import ISM, GradientSpread, QuadraticLoss, ScoreMatching, generalized_bayes
from numpyro_score.uncertainty import SandwichError

pytestmark = pytest.mark.usefixtures("x64")

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)
N = 1500  # more than the rows that ISM takes at once


def quantiles(law, n=N):
    """A data set with the law's own moments, nearly, and nothing random in it."""
    return law.ppf((np.arange(n) + 0.5) / n)


GAUSSIAN, LAPLACE = scipy.stats.norm(scale=0.8), scipy.stats.laplace(scale=0.6)


def precision_model(x, parameter="tau", scale=1.0):
    """N(0, 1/τ), by its precision, its precision unconstrained, or its standard deviation."""
    if parameter == "sd":
        tau = numpyro.param("sd", 1.0, constraint=constraints.positive) ** -2
    else:
        support = constraints.positive if parameter == "tau" else constraints.real
        tau = numpyro.param(parameter, 1.0, constraint=support)
    with numpyro.plate("rows", len(x)), handlers.scale(scale=scale):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2)


LBFGS = optax.lbfgs()


@functools.cache
def score_matching(model, beta, optim):
    return ScoreMatching(model, optim=optim, num_steps=60, learning_rate=beta)


def fitted(model, x, *args, beta=1.0, optim=None, **kwargs):
    """A fit in double precision, with its sandwich; in closed form unless it is given an optimiser."""
    with jax.enable_x64(True):  # the fixtures of the module come before those of a test
        sm = score_matching(model, beta, optim)
        fit = sm.run(KEY, jnp.asarray(x), *args, progress_bar=False, **kwargs)
        fit.stderr()
    return fit


@pytest.fixture(scope="module")
def gaussian_fit():
    return fitted(precision_model, quantiles(GAUSSIAN), scale=np.ones(N))


@pytest.fixture(scope="module")
def laplace_fit():
    return fitted(precision_model, quantiles(LAPLACE), scale=np.ones(N))


@pytest.mark.parametrize(("name", "spread"), [("gaussian_fit", 2.0), ("laplace_fit", 5.0)])
def test_precision_of_a_gaussian(name, spread, request):
    """The variance of τ̂ is 2τ²/N for Gaussian data, and 5τ²/N for Laplace data.

    Row n has the loss ½τ²x² − τ, with gradient τx² − 1 and second derivative x². The sum is least at τ = 1/mean(x²),
    where H = Σx² = N/τ and S = N var(τx²). So H⁻¹SH⁻¹ = τ⁴ var(x²)/N, and in log τ it is τ² var(x²)/N. Gaussian
    data have var(x²) = 2/τ²; Laplace data of scale b have E x² = 2b² = 1/τ and E x⁴ = 24b⁴, so var(x²) = 5/τ². The
    curvature τ/N alone, or its Gaussian calibration 2τ²/N, would miss the second.
    """
    fit = request.getfixturevalue(name)
    x = quantiles(GAUSSIAN if name == "gaussian_fit" else LAPLACE)
    tau, variance = 1 / np.mean(x**2), np.var(x**2, ddof=1)
    np.testing.assert_allclose(fit.estimates["tau"], tau, rtol=1e-6)
    np.testing.assert_allclose(fit.stderr()["tau"], tau**2 * (variance / N) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(fit.covariance(), [[tau**2 * variance / N]], rtol=1e-5)
    # The quantiles cut off a little of the tails.
    np.testing.assert_allclose(fit.covariance(), [[spread / N]], rtol=0.06)


def test_reparametrisation_changes_nothing(laplace_fit):
    """Standard errors of σ = τ^(−½), by |dσ/dτ| = ½τ^(−3/2), are those by way of log τ."""
    fit = fitted(precision_model, quantiles(LAPLACE), "sd", optim=LBFGS)
    tau, error = laplace_fit.estimates["tau"], laplace_fit.stderr()["tau"]
    np.testing.assert_allclose(fit.stderr()["sd"], 0.5 * tau**-1.5 * error, rtol=1e-5)


def test_weights_enter_gradients_not_counts(laplace_fit):
    """With weights the objective is Σ w_n J_n, so H = Σ w x² and S = N var(w(τx² − 1)), at τ = Σw / Σ w x².

    A weight of 2 on all rows cancels, as it does not say that there are more independent rows.
    """
    x = quantiles(LAPLACE)
    double = fitted(precision_model, x, scale=np.full(N, 2.0))
    np.testing.assert_allclose(double.covariance(), laplace_fit.covariance(), rtol=1e-5)
    weight = 1.5 + np.cos(np.arange(N))
    fit = fitted(precision_model, x, scale=weight)
    tau = weight.sum() / (weight @ x**2)
    spread = np.var(weight * (tau * x**2 - 1), ddof=1)
    np.testing.assert_allclose(fit.estimates["tau"], tau, rtol=1e-6)
    error = (N * spread) ** 0.5 / (weight @ x**2)
    np.testing.assert_allclose(fit.stderr()["tau"], error, rtol=1e-5)


def test_prior_bends_the_objective_but_adds_no_noise():
    """N(μ, σ²) with σ known and μ ~ N(m, v): H = βN/σ⁴ + 1/v, and S = N var(β(μ − x)/σ⁴)."""
    sigma, v, beta = 1.3, 0.02, 0.7

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.5, v**0.5))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * ((x - mu) / sigma) ** 2)

    x = quantiles(LAPLACE, 50) + 2.0
    fit = fitted(model, x, beta=beta)
    h = beta * 50 / sigma**4 + 1 / v
    mode = (beta * x.sum() / sigma**4 + 0.5 / v) / h
    np.testing.assert_allclose(fit.estimates["mu"], mode, rtol=1e-6)
    s = 50 * np.var(x, ddof=1) * beta**2 / sigma**8
    np.testing.assert_allclose(fit.covariance(), [[s / h**2]], rtol=1e-5)


# -- a model with a quartic term: two parameters, no normaliser -----------------------------------------


def quartic(x):
    """f = −a x⁴ − ½b x²."""
    a, b = numpyro.param("a", 0.1), numpyro.param("b", 0.1)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * b * x**2)


TRUTH = np.array([0.2, 0.5])


def quartic_data(shape):
    """By the inverse of the distribution function, on a grid."""
    grid = np.linspace(-5.0, 5.0, 20_001)
    density = np.exp(-TRUTH[0] * grid**4 - 0.5 * TRUTH[1] * grid**2)
    below = np.cumsum(density) - 0.5 * density
    return np.interp(np.random.default_rng(0).uniform(size=shape), below / density.sum(), grid)


def quartic_closed_form(x):
    """Estimates of (a, b) and their sandwich, for data (..., n).

    Row n has the score −θ·g with g = (4x³, x), and the loss ½(θ·g)² − θ·c with c = (12x², 1): the minimiser is
    mean(ggᵀ)⁻¹ mean(c), and rows have the gradients g(g·θ) − c.
    """
    n = x.shape[-1]
    g = np.stack([4 * x**3, x], axis=-1)
    c = np.stack([12 * x**2, np.ones_like(x)], axis=-1)
    inverse = np.linalg.inv(np.swapaxes(g, -1, -2) @ g / n)
    theta = np.einsum("...ij,...j->...i", inverse, c.mean(-2))
    rows = g * np.sum(g * theta[..., None, :], axis=-1, keepdims=True) - c
    s = np.swapaxes(rows, -1, -2) @ rows / (n - 1)  # the rows' mean is zero at the minimiser
    return theta, inverse @ s @ inverse / n


def test_quartic_model_has_its_closed_form():
    """Estimates and covariance of the fit are those of the linear equations, in order of the sites' names."""
    x = quartic_data(500)
    fit = fitted(quartic, x)
    theta, covariance = quartic_closed_form(x)
    np.testing.assert_allclose([fit.estimates["a"], fit.estimates["b"]], theta, rtol=1e-5)
    np.testing.assert_allclose(fit.covariance(), covariance, rtol=1e-4)


def test_standard_errors_are_the_spread_over_replications():
    """The closed form, which the test above ties to the package, over 2000 data sets of 1000 rows.

    Errors z = (θ̂ − θ)/stderr have mean square 1 + O(1/n): 5 Monte Carlo errors (6e-7) and 3% for the O(1/n). The mean
    covariance is that of the estimates, in the same sense.
    """
    theta, covariance = quartic_closed_form(quartic_data((2000, 1000)))
    error = theta - TRUTH
    z = np.einsum("nij,nj->ni", np.linalg.inv(np.linalg.cholesky(covariance)), error)
    square = np.concatenate([z**2, z[:, :1] * z[:, 1:]], axis=1)
    noise = square.std(0) / len(z) ** 0.5
    assert (np.abs(square.mean(0) - [1, 1, 0]) < 5 * noise + 0.03).all()
    for i in range(2):
        noise = np.std(error[:, i] ** 2) / len(z) ** 0.5
        difference = np.mean(error[:, i] ** 2) - covariance[:, i, i].mean()
        assert abs(difference) < 5 * noise + 0.03 * covariance[:, i, i].mean()


# -- draws --------------------------------------------------------------------------------------------


def interval_model(x):
    """N(μ, 1/τ) with μ in an interval, near its edge, and τ positive."""
    mu = numpyro.sample("mu", dist.Uniform(-1.0, 1.0))
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * tau * (x - mu) ** 2)


def test_draws_of_a_point_fit_are_normal_in_unconstrained_space():
    """Mean, covariance and constraints of 20,000 draws: 7 moments within 5 Monte Carlo errors, 4e-6."""
    fit = fitted(interval_model, quantiles(GAUSSIAN, 40) + 0.85, optim=LBFGS)
    draws, estimates = fit.sample_posterior(jax.random.key(1), 20_000), fit.estimates
    mu, tau = np.asarray(draws["mu"]), np.asarray(draws["tau"])
    assert mu.shape == tau.shape == (20_000,)
    assert (np.abs(mu) < 1).all() and (tau > 0).all()

    def free(mu, tau):
        return np.stack([np.log1p(mu) - np.log1p(-mu), np.log(tau)], axis=-1)

    root = np.linalg.cholesky(fit.covariance())
    z = np.linalg.solve(root, (free(mu, tau) - free(estimates["mu"], estimates["tau"])).T)
    for moment, expected in ((z, 0), (z**2, 1), (z[0] * z[1], 0), (z**4, 3)):
        noise = moment.std(-1) / mu.size**0.5
        assert (np.abs(moment.mean(-1) - expected) < 5 * noise).all()


def test_stderr_agrees_with_draws_on_a_simplex():
    """Shapes follow the sites: weights on a simplex have one standard error each, that of their draws.

    The delta method is the limit of small errors; the draws agree to 3% and 5 Monte Carlo errors of 0.5%.
    """

    def model(x):
        weights = numpyro.param("weights", jnp.ones(3) / 3, constraint=constraints.simplex)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (3,)), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum((x - weights) ** 2, axis=-1))

    x = np.random.default_rng(0).normal([0.2, 0.5, 0.3], 0.3, size=(2000, 3))
    fit = fitted(model, x, optim=LBFGS)
    draws, error = fit.sample_posterior(jax.random.key(1), 20_000)["weights"], fit.stderr()["weights"]
    assert draws.shape == (20_000, 3)
    np.testing.assert_allclose(draws.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(error, draws.std(0), rtol=0.055)


@pytest.mark.slow
def test_network_with_priors_has_its_closed_form():
    """Flax's module under a prior keeps shapes in place of its parameters, at a param site without numbers.

    The score of a number is w c − x with c = 1 − tanh² x, so H = Σ c² + 1; no row sees the bias.
    """

    def model(x):
        net = random_flax_module("net", nn.Dense(1), dist.Normal(0.0, 1.0), input_shape=(2,))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            numpyro.factor("energy", net(jnp.tanh(x))[:, 0] - 0.5 * jnp.sum(x**2, -1))

    x = np.random.default_rng(0).normal(size=(200, 2))
    fit = ScoreMatching(model).run(KEY, x, progress_bar=False)
    c = 1 - np.tanh(x) ** 2
    bend, hessian = -2 * np.tanh(x) * c, np.sum(c**2, axis=0) + 1
    kernel = np.sum(c * x - bend, axis=0) / hessian
    rows = c * (kernel * c - x) + bend
    errors = np.sqrt(len(x) * rows.var(axis=0, ddof=1)) / hessian
    assert (errors > 0.05).all()
    np.testing.assert_allclose(fit.estimates["net/kernel"][:, 0], kernel, rtol=1e-6)
    np.testing.assert_allclose(fit.stderr()["net/kernel"][:, 0], errors, rtol=1e-6)
    np.testing.assert_allclose([*fit.estimates["net/bias"], *fit.stderr()["net/bias"]], 0.0, atol=1e-12)


# -- what has no sandwich -------------------------------------------------------------------------------


def test_one_row_has_no_sandwich():
    """One row has no spread."""
    with pytest.raises(SandwichError, match="the data are one row: use NUTS instead"):
        fitted(precision_model, np.array([0.5]))


def test_flat_objective_has_no_sandwich():
    """A constant that the score does not see has no curvature."""

    def model(x):
        constant = numpyro.param("constant", 0.0)
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", constant - 0.5 * tau * x**2)

    with pytest.raises(SandwichError, match=r"not curved upwards .* 2 parameters"):
        fitted(model, quantiles(GAUSSIAN, 20), optim=LBFGS)


@pytest.mark.parametrize("size", [2000, 2001])
def test_too_many_parameters(size):
    """The dense covariance stops at 2000 parameters; up to there it is formed."""

    def model(x):
        mu = numpyro.param("mu", jnp.zeros(size))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * (x - mu.sum()) ** 2)

    fit = ScoreMatching(model, optim=optax.sgd(0.0), num_steps=1)
    fit = fit.run(KEY, jnp.ones(2), progress_bar=False)
    expected = "not curved upwards" if size == 2000 else "has 2001 parameters: it stops at 2000"
    with pytest.raises(SandwichError, match=expected):
        fit.covariance()


# -- rows without weight, and numbers out of the range of single precision ---------------------------


def shrunk(x, mask=True):
    """N(μ, 9) with a prior that pulls μ far from the data."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 0.3))
    with numpyro.plate("rows", len(x)), handlers.mask(mask=mask):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2 / 9.0)


@pytest.mark.slow
def test_masked_rows_are_no_rows():
    """With a prior the mean gradient is not zero, so rows without one, of NaN here, would look like spread."""
    x = np.random.default_rng(0).normal(5.0, 1.0, 100)
    h, s = 100 / 81, 100 * np.var(x, ddof=1) / 81**2  # of the rows alone
    whole = h + 0.3**-2
    error = s**0.5 / whole
    mask = np.arange(400) % 4 == 0
    padded = np.full(400, np.nan)
    padded[mask] = x
    fit = fitted(shrunk, padded, jnp.asarray(mask))
    np.testing.assert_allclose(fit.estimates["mu"], x.sum() / 81 / whole, rtol=1e-9)
    np.testing.assert_allclose(fit.stderr()["mu"], error, rtol=1e-9)
    np.testing.assert_allclose(fit.calibrated_learning_rate(), h / s, rtol=1e-9)
    influence = fit.influence()["mu"]
    np.testing.assert_allclose(influence[mask], (100 / 99) ** 0.5 * (x - x.mean()) / 81 / whole, rtol=1e-9)
    np.testing.assert_array_equal(influence[~mask], np.zeros(300))
    np.testing.assert_allclose(fit.stderr(diagonal=True)["mu"], error, rtol=1e-9)
    target = generalized_bayes(shrunk, ISM())
    batch = QuadraticLoss.of(target, KEY, jnp.asarray(padded), jnp.asarray(mask))
    spread = GradientSpread.of(target, batch.solve().estimates, KEY, jnp.asarray(padded), jnp.asarray(mask))
    assert batch.num_rows == spread.num_rows == 100
    np.testing.assert_allclose(batch.stderr(spread)["mu"], error, rtol=1e-9)
    with pytest.raises(SandwichError, match="1 of 400 rows have a weight"):
        fitted(shrunk, padded, jnp.asarray(np.arange(400) == 0))


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_number_of_few_rows(rows):
    """Its residuals are made small: the interval of a single row is that of the others' mean."""
    z = np.arange(200) < rows

    def model(x):
        b = numpyro.param("b", jnp.zeros(2))
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", -0.5 * (x - b[0] - b[1] * z) ** 2)

    fit = ScoreMatching(model).run(KEY, np.random.default_rng(0).normal(size=200).astype(np.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.stderr()
    said = [str(w.message) for w in caught if "whose spread tells their errors" in str(w.message)]
    expected = [f"Numbers of site 'b' are fitted to {rows} of 200"] if rows < 5 else []
    assert [message.split(" rows")[0] for message in said] == expected


@pytest.mark.slow
def test_variances_beyond_single_precision():
    """The standard error of τ̂ scales as the inverse square of the data, in units of any size."""
    x = quantiles(GAUSSIAN, 100)
    errors, of = [], operator.itemgetter("k")
    sm = ScoreMatching(precision_model)
    for s in (1.0, 1e-9, 1e10):
        with jax.enable_x64(False):
            fit = sm.run(KEY, np.float32(s * x), "k", progress_bar=False)
            errors.append(fit.stderr()["k"] * s**2)
            np.testing.assert_allclose(fit.stderr(of=of) * s**2, errors[-1], rtol=1e-4)
            draws = fit.sample_posterior(KEY, 2000)["k"] * s**2
            np.testing.assert_allclose(np.std(draws), errors[-1], rtol=0.1)
    np.testing.assert_allclose(errors[1:], errors[0], rtol=1e-4)
