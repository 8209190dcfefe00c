"""Calibrated learning rates and adjusted draws, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from models import counted_compilations
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.util import log_density

from numpyro_score import ISM, ScoreMatching, adjust_draws, generalized_bayes
from numpyro_score.generalized import LOSS_SITE
from numpyro_score.inference import posterior
from numpyro_score.uncertainty import SandwichError

pytestmark = pytest.mark.usefixtures("x64")

FLAT = dist.ImproperUniform(constraints.real, (), ())
PLANE = dist.ImproperUniform(constraints.real_vector, (), (2,))
KEY = jax.random.key(0)
N, SIGMA, PRIOR_MEAN, PRIOR_SD = 60, 1.7, 0.5, 2.0
X = np.random.default_rng(0).laplace(2.0, 1.0, N)


def location(x, scale=1.0):
    """N(mu, σ²) with σ known. Row n has the loss ½(x − μ)²/σ⁴ − 1/σ², with the gradient (μ − x)/σ⁴."""
    mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
    numpyro.deterministic("square", mu**2)
    with numpyro.plate("rows", len(x)), handlers.scale(scale=scale):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2 / SIGMA**2)


def location_rate(x):
    """H = N/σ⁴ and S = N s²/σ⁸ for the rows' variance s²: β = H/S = σ⁴/s², which is σ² where s² is σ²."""
    return SIGMA**4 / np.var(x, ddof=1)


def location_posterior(x, beta):
    """Mean and variance."""
    precision = PRIOR_SD**-2 + beta * len(x) / SIGMA**4
    return (PRIOR_MEAN / PRIOR_SD**2 + beta * np.sum(x) / SIGMA**4) / precision, 1 / precision


@functools.cache
def matcher(model, learning_rate="calibrated", guide=None):
    return ScoreMatching(model, guide, optax.lbfgs(), ISM(), num_steps=40, learning_rate=learning_rate)


def run(sm, *args):
    return sm.run(KEY, *map(jnp.asarray, args), progress_bar=False)


# -- the rate of a fit ------------------------------------------------------------------------------


def test_rate_of_a_gaussian_mean():
    """It does not depend on N, and the estimate is the mode at this rate."""
    fit = run(matcher(location), X)
    np.testing.assert_allclose(fit.learning_rate, location_rate(X), rtol=1e-6)
    np.testing.assert_allclose(fit.calibrated_learning_rate(), location_rate(X), rtol=1e-6)
    np.testing.assert_allclose(fit.estimates["mu"], location_posterior(X, location_rate(X))[0], rtol=1e-6)


def test_weights_cancel():
    """A weight of 3 in all rows divides the rate by 3, and leaves the estimate where it was."""
    fit = run(matcher(location), X, 3.0)
    np.testing.assert_allclose(fit.learning_rate, location_rate(X) / 3, rtol=1e-6)
    np.testing.assert_allclose(fit.estimates["mu"], location_posterior(X, location_rate(X))[0], rtol=1e-6)


def test_second_run_compiles_nothing():
    """Nor do the fits at other rates: β is an input of the compiled steps."""
    run(matcher(location), X)
    with counted_compilations() as compiled:
        fit = run(matcher(location), 2 * X + 1)
    assert not compiled
    np.testing.assert_allclose(fit.learning_rate, location_rate(2 * X), rtol=1e-6)


def quartic(x):
    """f = −a x⁴ − ½b x², with a positive: no prior."""
    a, b = numpyro.param("a", 0.1, constraint=constraints.positive), numpyro.param("b", 0.1)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * b * x**2)


def test_rate_of_two_parameters():
    """tr(HS⁻¹H)/tr(H) in (log a, b), with H and S in (a, b) by hand; one fit, as the rate does not move it."""
    x = np.random.default_rng(1).uniform(-2.0, 2.0, 300)
    g = np.stack([-4 * x**3, -x], axis=1)
    slope = np.stack([-12 * x**2, -np.ones_like(x)], axis=1)
    h = g.T @ g
    theta = np.linalg.solve(h, -slope.sum(axis=0))
    s = len(x) * np.cov(((g @ theta)[:, None] * g + slope).T)
    jacobian = np.diag([theta[0], 1.0])  # the gradient is zero, so that its change does not enter H
    h, s = jacobian @ h @ jacobian, jacobian @ s @ jacobian
    rate = np.trace(h @ np.linalg.solve(s, h)) / np.trace(h)
    fit = run(matcher(quartic), x)
    np.testing.assert_allclose(fit.learning_rate, rate, rtol=1e-5)
    np.testing.assert_allclose([fit.estimates["a"], fit.estimates["b"]], theta, rtol=1e-6)
    total = np.sum(0.5 * (g @ theta) ** 2 + slope @ theta)
    np.testing.assert_allclose(fit.losses[-1], rate * total, rtol=1e-6)
    assert len(fit.losses) == 40
    np.testing.assert_allclose(fit.covariance(), np.linalg.solve(h, np.linalg.solve(h, s).T), rtol=1e-4)


def precision(x):
    """N(0, 1/τ), with a prior away from the data and nearly as strong as they are."""
    tau = numpyro.sample("tau", dist.LogNormal(0.5, 0.4))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2)


def test_rate_settles_where_prior_and_data_disagree():
    """The rate is that of the mode, which is that of the rate: by fixed-point iteration in log τ, by hand.

    The rate at the first fit, with β = 1, is off by more than a fifth.
    """
    x = X - X.mean()

    def mode(beta):
        def objective(u):
            tau = np.exp(u)
            return beta * np.sum(0.5 * tau**2 * x**2 - tau) + (u - 0.5) ** 2 / (2 * 0.4**2) + u

        return scipy.optimize.minimize_scalar(objective, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x

    def rate(u):
        tau = np.exp(u)
        return np.sum(2 * tau**2 * x**2 - tau) / (N * np.var(tau**2 * x**2 - tau, ddof=1))

    beta, first = 1.0, rate(mode(1.0))
    for _ in range(100):
        beta = rate(mode(beta))
    assert first > 1.2 * beta
    fit = run(matcher(precision), x)
    # The last fit used a rate within 2% of what it led to, and the iteration contracts by `contraction` a step.
    contraction = (rate(mode(1.01 * beta)) - rate(mode(0.99 * beta))) / (0.02 * beta)
    np.testing.assert_allclose(fit.learning_rate, beta, rtol=0.02 / (1 - abs(contraction)))
    np.testing.assert_allclose(np.log(fit.estimates["tau"]), mode(fit.learning_rate), rtol=1e-5)


@pytest.mark.slow
def test_another_guide_has_the_rate_of_a_point_fit():
    """Laplace's guide is exact for a normal posterior, and takes its curvature from the density at this rate."""
    sm = matcher(location, guide=AutoLaplaceApproximation)
    fit = run(sm, X)
    beta = location_rate(X)
    np.testing.assert_allclose(fit.learning_rate, beta, rtol=1e-6)
    law, (mean, variance) = fit.svi.guide.get_posterior(fit.params), location_posterior(X, beta)
    np.testing.assert_allclose(law.mean, [mean], rtol=1e-5)
    np.testing.assert_allclose(law.covariance_matrix, [[variance]], rtol=1e-5)


def test_the_scale_of_a_prior_does_not_count():
    """The losses do not depend on it, so the rate is that of the mean alone."""

    def model(x):
        spread = numpyro.sample("spread", dist.LogNormal(0.7, 0.1))
        mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, spread))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * (x - mu) ** 2 / SIGMA**2)

    np.testing.assert_allclose(run(matcher(model), X).learning_rate, location_rate(X), rtol=1e-6)


# -- the rate of a generalised model ------------------------------------------------------------------


@pytest.fixture
def fits(monkeypatch):
    """How many fits were made to calibrate."""
    found, fit = [], posterior.calibrated_rate

    def counted(*args):
        found.append(fit(*args))
        return found[-1]

    monkeypatch.setattr(posterior, "calibrated_rate", counted)
    return found


@pytest.mark.slow
def test_nuts_draws_from_the_calibrated_posterior(fits):
    """Mean and variance within 5 Monte Carlo errors (1e-6), after one fit."""
    kernel = NUTS(generalized_bayes(location, ISM(), "calibrated"))
    mcmc = MCMC(kernel, num_warmup=300, num_samples=1500, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, jnp.asarray(X))
    np.testing.assert_allclose(fits, [location_rate(X)], rtol=1e-4)
    mean, variance = location_posterior(X, location_rate(X))
    z = (np.asarray(mcmc.get_samples(group_by_chain=True)["mu"]) - mean) / variance**0.5
    for moment, expected in ((z, 0.0), (z**2, 1.0)):
        assert abs(moment.mean() - expected) < 5 * moment.std() / effective_sample_size(moment) ** 0.5


def rate_in(model, *args):
    """The rate that a generalised model of a Gaussian mean uses: what multiplies the sum of the losses at mu = 0."""
    _, trace = log_density(model, args, {}, {"mu": jnp.array(0.0)})
    x = X if not args else np.asarray(args[0])
    return -trace[LOSS_SITE]["fn"].log_factor / np.sum(0.5 * x**2 / SIGMA**4 - 1 / SIGMA**2)


@pytest.fixture
def by_hand(monkeypatch):
    """The fit's result without the fit, and how many there were."""
    calls = []

    def rate(model, loss, data, args, kwargs):
        calls.append(args)
        return location_rate(np.asarray(args[0]))

    monkeypatch.setattr(posterior, "calibrated_rate", rate)
    return calls


def test_rate_is_remembered_for_the_same_arguments_alone(by_hand):
    """Inside of jit too, if the data are known there; not for other arrays, nor for an array that has changed."""
    model = generalized_bayes(location, ISM(), "calibrated")
    x, y = jnp.asarray(X), jnp.asarray(2 * X)
    for args, count in [((x,), 1), ((x,), 1), ((y,), 2), ((x,), 3), ((x, 1.0), 4)]:
        np.testing.assert_allclose(rate_in(model, *args), location_rate(args[0]), rtol=1e-9)
        assert len(by_hand) == count
    np.testing.assert_allclose(jax.jit(lambda: rate_in(model, x, 1.0))(), location_rate(X), rtol=1e-9)
    assert len(by_hand) == 4
    mutable = X.copy()
    rate_in(model, mutable)
    mutable[:] = 3 * X
    np.testing.assert_allclose(rate_in(model, mutable), location_rate(3 * X), rtol=1e-9)
    assert len(by_hand) == 6


def test_rate_follows_data_that_the_model_holds(monkeypatch):
    """A model without arguments whose data change."""
    held = {"x": jnp.asarray(X)}
    monkeypatch.setattr(posterior, "calibrated_rate", lambda *_: location_rate(np.asarray(held["x"])))
    model = generalized_bayes(lambda: location(held["x"]), ISM(), "calibrated")
    value = log_density(model, (), {}, {"mu": jnp.array(0.0)})[0]
    held["x"] = 2.0 * held["x"]
    other = log_density(model, (), {}, {"mu": jnp.array(0.0)})[0]
    log_prior = dist.Normal(PRIOR_MEAN, PRIOR_SD).log_prob(0.0)
    for found, x in ((value, X), (other, 2 * X)):
        expected = log_prior - location_rate(x) * np.sum(0.5 * x**2 / SIGMA**4 - 1 / SIGMA**2)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_traced_arguments_have_no_rate():
    """It would be a function of data that are not known."""
    model = generalized_bayes(location, ISM(), "calibrated")
    with pytest.raises(TypeError, match=r"traced by jit, grad or vmap: .* fit.calibrated_learning_rate\(\)"):
        jax.jit(lambda x: rate_in(model, x))(X)


@pytest.mark.parametrize("make", [generalized_bayes, ScoreMatching])
def test_no_other_word_is_a_rate(make):
    with pytest.raises(ValueError, match="a positive number or 'calibrated', got 'auto'"):
        make(location, loss=ISM(), learning_rate="auto")


# -- no rate ------------------------------------------------------------------------------------------


def still(model, *args):
    """A fit that stays where it starts."""
    return run(ScoreMatching(model, optim=optax.sgd(0.0), num_steps=1), *args)


def linear(x):
    """f = θx has the loss ½θ² in every row."""
    theta = numpyro.param("theta", 0.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", theta * x)


def regression(x):
    """As many parameters as rows."""
    w = numpyro.sample("w", dist.Normal().expand([4]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", jnp.sin(x[:, None] * jnp.arange(1, 5)) @ w - 0.5 * x**2)


def constant(x):
    """The score does not see the constant, but it has a prior."""
    offset = numpyro.sample("offset", dist.Normal())
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", offset - 0.5 * x**2)


@pytest.mark.filterwarnings("ignore:The fit has not converged")  # it stays where it starts
@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (linear, 10, "do not spread in all 1 parameters, .* more rows than parameters"),
        (regression, 4, "do not spread in all 4 parameters, .* more rows than parameters"),
        (constant, 10, "not curved upwards at the estimates in all 1 parameters, .* or pass learning_rate as a number"),
    ],
)
def test_undetermined_rates_are_refused(model, rows, message):
    """Gradients that are the same in all rows, as many rows as parameters, and losses without curvature."""
    fit = still(model, X[:rows] - 2.0)
    with pytest.raises(SandwichError, match=message):
        fit.calibrated_learning_rate()


# -- adjusted draws -----------------------------------------------------------------------------------


def plane(x):
    """N(m, K⁻¹) with K known: rows have the gradient K²(m − x) and the Hessian K²."""
    m = numpyro.sample("m", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    numpyro.deterministic("sum", m.sum())
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", PLANE, obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x - m, K, x - m))


K = np.array([[2.0, 0.8], [0.8, 1.0]])


def with_covariance(covariance):
    """Rows with exactly this covariance, of N − 1, and mean (1, 2)."""
    z = np.random.default_rng(2).normal(size=(N, 2))
    z = (z - z.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    return z @ np.linalg.cholesky(covariance).T + np.array([1.0, 2.0])


def posterior_draws(shape):
    """Of m in the plane, with covariance (N K²)⁻¹."""
    z = np.random.default_rng(3).normal(size=(*shape, 2))
    return np.array([1.0, 2.0]) + z @ np.linalg.cholesky(np.linalg.inv(N * K @ K)).T


def test_draws_of_a_right_likelihood_do_not_move():
    """H = N K² and S = N K² cov(x) K² are equal where cov(x) = K⁻²; K⁻¹ is what the model says, and β = 1."""
    fit = run(matcher(plane, 1.0), with_covariance(np.linalg.inv(K @ K)))
    m = posterior_draws((50,))
    np.testing.assert_allclose(adjust_draws({"m": m}, fit)["m"], m, rtol=1e-6)


@pytest.mark.parametrize("shape", [(400,), (2, 200)])
def test_adjusted_draws_have_the_sandwich_covariance(shape):
    """cov(x)/N, whatever K: what the draws' own covariance is mapped to is exact, and their shapes stay."""
    covariance = np.array([[1.0, -0.6], [-0.6, 2.0]])
    fit = run(matcher(plane, 1.0), with_covariance(covariance))
    z = posterior_draws(shape).reshape(-1, 2) - [1.0, 2.0]
    # Give the draws exactly the covariance that they should have, and the centre.
    z = (z - z.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    m = [1.0, 2.0] + z @ np.linalg.cholesky(np.linalg.inv(N * K @ K)).T
    draws = {"m": m.reshape(*shape, 2), "sum": np.zeros(shape)}
    moved = adjust_draws(draws, fit)
    assert moved["m"].shape == (*shape, 2) and moved["sum"].shape == shape
    np.testing.assert_allclose(np.cov(moved["m"].reshape(-1, 2).T), covariance / N, rtol=1e-5)
    np.testing.assert_allclose(moved["m"].reshape(-1, 2).mean(axis=0), [1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(moved["sum"], moved["m"].sum(-1), rtol=1e-12)


def test_adjustment_is_in_unconstrained_space():
    """log τ moves by the factor (V H)^½ away from its estimate, and τ stays positive."""
    fit = run(matcher(precision), X - X.mean())
    u, centre = np.linspace(-3.0, 3.0, 7), np.log(fit.estimates["tau"])
    factor = (fit.covariance()[0, 0] * fit.curvature.hessian[0, 0]) ** 0.5
    moved = adjust_draws({"tau": np.exp(u)}, fit)["tau"]
    np.testing.assert_allclose(np.log(moved), centre + factor * (u - centre), rtol=1e-6)
    assert abs(factor - 1) > 0.05


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({}, "no site 'mu', which the fit estimates"),
        ({"mu": np.zeros(3), "tau": np.zeros(3)}, "a site 'tau', which the fit does not"),
        ({"mu": np.float64(0.0)}, r"shapes \{'mu': \(\)\}: pass"),
        ({"mu": np.array([0.0, np.nan])}, "not finite or outside of their support"),
    ],
)
def test_draws_of_another_model_are_refused(draws, message):
    with pytest.raises(ValueError, match=message):
        adjust_draws(draws, run(matcher(location), X))


# -- deterministic sites --------------------------------------------------------------------------------


def test_draws_of_a_fit_have_deterministic_sites():
    """As an MCMC run's have; in the ArviZ export too."""
    fit = run(matcher(location), X)
    draws = fit.sample_posterior(KEY, 8)
    assert set(draws) == {"mu", "square"} and set(fit.estimates) == {"mu"}
    np.testing.assert_allclose(draws["square"], draws["mu"] ** 2, rtol=1e-12)
    np.testing.assert_array_equal(fit.to_arviz(KEY, 8)["posterior"]["square"], draws["square"].reshape(4, 2))
