"""Noise-contrastive estimation against quadrature, closed forms and replications. float64 throughout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from models import FAST_COMPILE, assert_mean, energy_of, improper
from numpyro.distributions import constraints

from numpyro_score import NCE, Energy, NonFiniteLossError, ScoreMatching, score_factor
from numpyro_score.losses import LOG_PARTITION_SITE, total_loss

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def quadratic(a, x):
    return -0.5 * a * jnp.sum(x.reshape(len(x), -1) ** 2, -1)


def at(f, theta, c, x):
    return energy_of(f, theta, x).with_params({LOG_PARTITION_SITE: c})


@functools.partial(jax.jit, static_argnums=(0, 1))
def slopes(loss, f, theta, c, x):
    """The derivatives of each row's value in a scalar parameter and in the log normaliser, (N, 2)."""
    of = jax.jacfwd(lambda t, c: loss(at(f, t, c, x), KEY), argnums=(0, 1))
    return jnp.stack(of(theta, c), axis=-1)


# -- the value -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_value_is_logistic_regression(shape):
    """-log of the probability of the right label, data or noise, from log odds f - c - log q - log ν."""
    d, c, a = int(np.prod(shape)), 0.4, 1.3
    noise = dist.Normal(0.3, 1.7).expand(shape).to_event(len(shape))
    loss, x = NCE(noise, 3), RNG.normal(size=(5, *shape))

    found = jax.jit(lambda: loss(at(quadratic, a, c, x), KEY))()
    y = np.asarray(noise.sample(KEY, (3, 5))).reshape(3, 5, d)

    def odds(u):
        q = scipy.stats.norm(0.3, 1.7).logpdf(u).sum(-1)
        return np.exp(-0.5 * a * np.sum(u**2, -1) - c - q) / 3

    expected = -np.log(odds(x.reshape(5, d)) / (1 + odds(x.reshape(5, d)))) - np.log(1 / (1 + odds(y))).sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    if len(shape) == 2:  # the noise may be of rows as well
        flat = NCE(dist.Normal(0.3, 1.7).expand([d]).to_event(1), 3)
        np.testing.assert_allclose(jax.jit(lambda: flat(at(quadratic, a, c, x), KEY))(), found, rtol=1e-12)


# -- the population objective --------------------------------------------------------------------------

GRID = np.linspace(-14, 14, 20_001)
STEP = GRID[1] - GRID[0]
TRUTH, NU, NOISE_SD = 1.6, 2, 1.4
LOG_Z = 0.5 * np.log(2 * np.pi / TRUTH)


def log_odds(theta, u):
    a, c = theta
    return -0.5 * a * u**2 - c - jax.scipy.stats.norm.logpdf(u, 0, NOISE_SD) - jnp.log(NU)


@jax.jit
def moments(theta):
    """Gradient (2,), Hessian and row covariance (2, 2) of the population objective, by the trapezoidal rule."""
    theta = jnp.asarray(theta)
    p, q = scipy.stats.norm(0, TRUTH**-0.5).pdf(GRID), scipy.stats.norm(0, NOISE_SD).pdf(GRID)

    def of_data(theta, u):
        return jax.nn.softplus(-log_odds(theta, u))

    def of_noise(theta, u):
        return jax.nn.softplus(log_odds(theta, u))

    each = [
        (jax.vmap(jax.grad(h), (None, 0))(theta, GRID), jax.vmap(jax.hessian(h), (None, 0))(theta, GRID))
        for h in (of_data, of_noise)
    ]
    (g, h), (gn, hn) = each
    mean, mean_n = p @ g * STEP, q @ gn * STEP
    spread = jnp.einsum("n,ni,nj->ij", p, g, g) * STEP - jnp.outer(mean, mean)
    spread_n = jnp.einsum("n,ni,nj->ij", q, gn, gn) * STEP - jnp.outer(mean_n, mean_n)
    hessian = jnp.einsum("n,nij->ij", p, h) + NU * jnp.einsum("n,nij->ij", q, hn)
    return mean + NU * mean_n, hessian * STEP, spread + NU * spread_n


LOSS = NCE(dist.Normal(0.0, NOISE_SD), NU)


def data(n, seed=1):
    return np.random.default_rng(seed).normal(0, TRUTH**-0.5, n)


@pytest.mark.parametrize("theta", [(TRUTH, LOG_Z), (0.9, 0.2)])
def test_gradient_of_the_population_objective(theta):
    """The mean slope is that of the integral over data and noise; at the truth it is zero."""
    gradient = np.asarray(moments(theta)[0])
    if theta == (TRUTH, LOG_Z):
        np.testing.assert_allclose(gradient, 0, atol=1e-10)
    else:
        assert (np.abs(gradient) > 0.05).all()
    assert_mean(slopes(LOSS, quadratic, *theta, data(100_000)), gradient)


def test_noise_has_a_name():
    noise = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    assert repr(NCE(noise, num_noise=3)) == "NCE(noise=Normal of shape (2,), num_noise=3)"


def test_much_noise_gives_the_likelihood():
    """At c = log Z and ν = 1000 the slope of a row in a is ½x² - 1/(2a), that of -log p, to O(1/ν)."""
    a, row = 1.3, 0.8
    x = np.full(2000, row)
    found = slopes(NCE(dist.Normal(0.0, 1.2), 1000), quadratic, a, 0.5 * np.log(2 * np.pi / a), x)
    assert_mean(found[:, 0], 0.5 * row**2 - 0.5 / a)


# -- standard errors -----------------------------------------------------------------------------------


def normal(x):
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", quadratic(a, numpyro.sample("x", improper(), obs=x)))


def population_errors(n):
    _, hessian, spread = moments((TRUTH, LOG_Z))
    inverse = np.linalg.inv(hessian)
    return np.sqrt(np.diag(inverse @ spread @ inverse) / n)


@pytest.mark.slow
def test_standard_errors_are_those_of_the_population():
    """With 10,000 rows the sandwich of a fit is within 10% of its integral, log Z included."""
    sm = ScoreMatching(normal, optim=optax.lbfgs(), loss=LOSS, num_steps=12)
    fit = sm.run(KEY, jnp.asarray(data(10_000)), progress_bar=False)
    errors = population_errors(10_000)
    found = fit.stderr()
    np.testing.assert_allclose([found["a"], found[LOG_PARTITION_SITE]], errors, rtol=0.1)
    assert set(fit.estimates) == {"a", LOG_PARTITION_SITE}


def test_standard_errors_are_the_spread_of_estimates():
    """1,000 data sets of 400 rows, each with its own noise held fixed: Newton's method to the minimum.

    The variance of the estimates is the sandwich within 5 standard errors, up to O(1/N), here 5%.
    """
    n, count = 400, 1000
    x = np.random.default_rng(2).normal(0, TRUTH**-0.5, (count, n))

    def estimate(x, key):
        def total(theta):
            return total_loss(LOSS, at(quadratic, theta[0], theta[1], x), key) / n

        def step(theta, _):
            return theta - jnp.linalg.solve(jax.hessian(total)(theta), jax.grad(total)(theta)), None

        return jax.lax.scan(step, jnp.array([TRUTH, LOG_Z]), None, length=6)[0]

    found = jax.jit(jax.vmap(estimate), compiler_options=FAST_COMPILE)(x, jax.random.split(KEY, count))
    variance = np.var(found, axis=0, ddof=1)
    np.testing.assert_allclose(variance, population_errors(n) ** 2, rtol=0.05 + 5 * (2 / count) ** 0.5)


# -- fits ----------------------------------------------------------------------------------------------


def gaussian(x):
    mu = numpyro.param("mu", jnp.zeros(2))
    precision = numpyro.param("precision", jnp.eye(2), constraint=constraints.positive_definite)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x - mu, precision, x - mu))


@pytest.mark.slow
def test_recovers_a_gaussian_and_its_normaliser():
    """Mean, precision and log Z within 3 sandwich errors of the truth, here with the noise fitted to the data."""
    mean, precision = np.array([1.0, -0.5]), np.array([[1.5, 0.4], [0.4, 0.8]])
    x = np.random.default_rng(3).multivariate_normal(mean, np.linalg.inv(precision), size=1000)
    noise = dist.MultivariateNormal(x.mean(0), scale_tril=np.linalg.cholesky(np.cov(x.T)))
    sm = ScoreMatching(gaussian, optim=optax.lbfgs(), loss=NCE(noise, 4), num_steps=25)
    fit = sm.run(KEY, jnp.asarray(x), progress_bar=False)
    log_z = np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    truth, errors = {"mu": mean, "precision": precision, LOG_PARTITION_SITE: log_z}, fit.stderr()
    assert set(fit.estimates) == set(truth)
    for name, value in truth.items():
        assert (np.abs(fit.estimates[name] - value) < 3 * errors[name]).all(), name
    # Where the noise is the law of the data, and ν large, the errors are those of maximum likelihood: √(1 + 1/ν).
    np.testing.assert_allclose(errors["mu"], np.sqrt(np.diag(np.linalg.inv(precision)) / 1000), rtol=0.25)


def test_log_normaliser_starts_at_its_estimate():
    """By importance sampling from the noise at the starting parameters: log ∫ exp(-½x²) within 5 standard errors."""
    sm = ScoreMatching(normal, optim=optax.adam(0.1), loss=LOSS)
    start = sm.get_params(sm.init(KEY, jnp.asarray(data(400))))[LOG_PARTITION_SITE]
    y = np.random.default_rng(4).normal(0, NOISE_SD, 100_000)
    weights = np.exp(-0.5 * y**2) / scipy.stats.norm(0, NOISE_SD).pdf(y)
    error = weights.std() / weights.mean() / 1000**0.5
    assert abs(start - 0.5 * np.log(2 * np.pi)) < 5 * error
    assert error < 0.05


@pytest.mark.parametrize("noise", [dist.HalfNormal(1.0), dist.Normal(0.4, 1.0)], ids=["inside", "beyond the bound"])
def test_bounded_data(noise):
    """Exponential data: the slope is zero at the true rate λ and c = -log λ, also if noise falls outside."""
    rate, x = 1.7, np.random.default_rng(5).exponential(1 / 1.7, 100_000)

    def model(x):
        rate = numpyro.param("rate")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", -rate * x)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    @functools.partial(jax.jacfwd, argnums=(0, 1))
    def of(rate, c):
        return NCE(noise)(Energy(model, {"rate": rate, LOG_PARTITION_SITE: c}, x), KEY)

    for c, expected in ((-np.log(rate), 0.0), (0.0, None)):
        found = np.stack(of(rate, c), -1)
        if expected is None:
            assert (np.abs(found.mean(0)) > 10 * found.std(0) / len(x) ** 0.5).all()
        else:
            assert_mean(found, expected)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NCE(dist.Normal(), 0), ValueError, "NCE needs a num_noise of at least 1, got 0"),
        (lambda: NCE(dist.Normal(), 1.5), TypeError, "NCE needs an integer as num_noise, got 1.5"),
        (lambda: NCE(dist.Normal), TypeError, r"NCE needs a noise to draw from, got <class .*Normal'>: write"),
        (lambda: NCE(improper()), TypeError, "NCE needs a noise to draw from, got .*ImproperUniform"),
        (lambda: NCE(dist.Poisson(1.0)), ValueError, "NCE needs a continuous noise, got Poisson"),
        (
            lambda: NCE(dist.Normal(jnp.zeros(3))),
            ValueError,
            r"one with the batch shape \(3,\).*write noise.to_event\(1\)",
        ),
    ],
)
def test_settings(make, error, message, unchecked):
    with pytest.raises(error, match=message):
        make()


def test_models_that_do_not_suit():
    """No log normaliser, noise of another dimension, no density, a simplex, rows that differ."""
    x, loss = np.ones((4, 2)), NCE(dist.Normal().expand([2]).to_event(1))

    def scores(x):
        with numpyro.plate("rows", len(x)):
            score_factor("score", x, -x)

    def simplex(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.simplex, (), (2,)), obs=x)
            numpyro.factor("energy", -jnp.sum(x**2, -1))

    def regression(x, z):
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", -0.5 * jnp.sum((numpyro.sample("x", improper(2), obs=x) - z) ** 2, -1))

    own = {LOG_PARTITION_SITE: 0.0}
    with pytest.raises(ValueError, match=r"add 'nce_log_partition': 0.0"):
        loss(energy_of(quadratic, 1.0, x), KEY)
    with pytest.raises(ValueError, match=r"NCE's noise is of shape \(\), but a row has the shape \(2,\)"):
        NCE(dist.Normal())(at(quadratic, 1.0, 0.0, x), KEY)
    with pytest.raises(TypeError, match="'score' is a score_factor, whose density is unknown"):
        loss(Energy(scores, own, x), KEY)
    with pytest.raises(NotImplementedError, match=r"NCE needs data in their own coordinates.*site 'x'.*simplex"):
        loss(Energy(simplex, own, x / 2), KEY)
    with pytest.raises(ValueError, match=r"NCE compares.*one density for all rows"):
        loss(Energy(regression, own, x, x + 1), KEY)


@pytest.mark.parametrize("noise", [dist.Uniform(-1.0, 1.0), dist.HalfNormal(1.0)])
def test_noise_that_does_not_cover_the_data(noise):
    """Named before a fit; in a compiled call, which cannot look at values, those rows are NaN."""
    x = np.array([0.5, -3.0, 0.2, -4.0])
    sm = ScoreMatching(normal, optim=optax.adam(0.1), loss=NCE(noise))
    with pytest.raises(ValueError, match=r"does not cover 2 of 4 rows \(rows 1, 3\)"):
        sm.run(KEY, jnp.asarray(x), progress_bar=False)
    found = jax.jit(lambda: NCE(noise)(at(quadratic, 1.0, 0.0, x), KEY))()
    np.testing.assert_array_equal(np.isnan(found), [False, True, False, True])


def test_density_that_is_not_finite_at_the_noise():
    """A density that overflows at the noise stops the fit, with a cause."""

    def model(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", a * jnp.where(jnp.abs(x) < 1, x**2, jnp.nan))

    sm = ScoreMatching(model, optim=optax.adam(0.1), loss=NCE(dist.Normal(0.0, 1.0)), num_steps=3)
    with pytest.raises(NonFiniteLossError, match=r"at step 0: .*not finite at the noise's points"):
        sm.run(KEY, jnp.asarray(np.linspace(-0.5, 0.5, 20)), progress_bar=False)
