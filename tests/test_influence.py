"""Influence of rows, and standard errors of functions of many parameters, against linear algebra by hand."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, ScoreMatching
from numpyro_score.uncertainty import SandwichError, influence

pytestmark = pytest.mark.usefixtures("x64")

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)


def data(n):
    return np.random.default_rng(0).normal(0.3, 1.1, n)


# -- three parameters in linear equations ---------------------------------------------------------------


def model(x):
    """f = −a x⁴ − ½b x² + c x, with a > 0 and priors on b and c."""
    a = numpyro.param("a", 0.1, constraint=constraints.positive)
    b = numpyro.sample("b", dist.Normal(0.0, 2.0))
    c = numpyro.sample("c", dist.Normal(0.0, 0.5))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * b * x**2 + c * x)


BETA = 0.6
PRIOR = np.diag([0.0, 2.0**-2, 0.5**-2])


def minimiser(x, weight=1.0):
    """The score is θ·g with g = (−4x³, −x, 1), and row n has the loss ½(θ·g)² + θ·g': linear equations in θ."""
    g = np.stack([-4 * x**3, -x, np.ones_like(x)])
    slope = np.stack([-12 * x**2, -np.ones_like(x), np.zeros_like(x)])
    hessian = BETA * (weight * g) @ g.T + PRIOR
    theta = np.linalg.solve(hessian, -BETA * (weight * slope).sum(axis=1))
    return theta, hessian, BETA * (g * (theta @ g) + slope).T


@functools.cache
def fitted(n):
    with jax.enable_x64(True):
        fit = ScoreMatching(model, learning_rate=BETA).run(
            KEY, jnp.asarray(data(n)), progress_bar=False
        )  # in closed form
        np.testing.assert_allclose([fit.estimates[k] for k in "abc"], minimiser(data(n))[0], rtol=1e-6)
        return fit


def by_hand(n):
    _, hessian, rows = minimiser(data(n))
    return -np.linalg.solve(hessian, (rows - rows.mean(axis=0)).T).T * (n / (n - 1)) ** 0.5


@pytest.mark.slow
def test_influence_is_the_scaled_newton_step_of_a_row():
    fit = fitted(200)
    values = fit.influence()
    assert {k: v.shape for k, v in values.items()} == dict.fromkeys("abc", (200,))
    np.testing.assert_allclose(np.stack([values[k] for k in "abc"], axis=1), by_hand(200), rtol=1e-4, atol=1e-9)


def test_squares_of_influence_sum_to_the_sandwich():
    """In constrained space, so those of log a, of which the covariance is, are those of a over a."""
    fit = fitted(200)
    values, errors = fit.influence(), fit.stderr()
    log_a = values["a"] / fit.estimates["a"]
    free = np.stack([log_a, values["b"], values["c"]], axis=1)
    np.testing.assert_allclose(free.T @ free, fit.covariance(), rtol=1e-8)
    for name in "abc":
        np.testing.assert_allclose(np.sum(values[name] ** 2) ** 0.5, errors[name], rtol=1e-8)


def test_influence_is_a_derivative_in_the_weight_of_a_row():
    """The estimates as a little of the row's weight moves to all rows, over how much, to first order in it."""
    x, amount = data(200), 1e-6
    values = fitted(200).influence()
    for n in (0, 7, int(np.argmax(x))):
        weight = 1 + amount * (1 / 200 - (np.arange(200) == n))
        slope = (minimiser(x)[0] - minimiser(x, weight)[0]) / amount
        np.testing.assert_allclose([values[k][n] for k in "abc"], slope * (200 / 199) ** 0.5, rtol=1e-4)


def test_refits_without_a_row_differ_by_its_influence():
    """All the weight moves, and H changes: θ̂ less the refit is √(N/(N − 1)) H'⁻¹H times the influence.

    For, with row n's weight moved, the loss has the gradient N/(N − 1) (ḡ − g_n) at θ̂ and the Hessian H'.
    """
    x, n = data(200), 200
    values = fitted(n).influence()
    theta, hessian, _ = minimiser(x)
    for row in range(0, n, 20):
        refit, other, _ = minimiser(x, np.where(np.arange(n) == row, 0.0, n / (n - 1)))
        expected = np.linalg.solve(hessian, other @ (theta - refit)) / (n / (n - 1)) ** 0.5
        np.testing.assert_allclose([values[k][row] for k in "abc"], expected, rtol=1e-4, atol=1e-9)


def ratio(estimates):
    return {"ratio": estimates["b"] / estimates["a"], "pair": jnp.stack([estimates["c"], estimates["a"] ** 2])}


def test_influence_on_functions():
    """The gradient of b/a and of a², by hand, times the influence on a, b and c."""
    fit = fitted(200)
    a, b, _ = minimiser(data(200))[0]
    i = by_hand(200)
    values, errors = fit.influence(of=ratio), fit.stderr(of=ratio)
    expected = {"ratio": i[:, 1] / a - i[:, 0] * b / a**2, "pair": np.stack([i[:, 2], 2 * a * i[:, 0]], axis=1)}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(errors[name], np.sum(value**2, axis=0) ** 0.5, rtol=1e-5)


def test_conjugate_gradients_agree_with_the_dense_solve():
    fit = fitted(200)
    values = influence(fit._objective, ratio, None)
    for name, value in fit.influence(of=ratio).items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-8)


def test_diagonal_errors():
    """Those of fits in which the other parameters are known: the square root of S_jj over H_jj."""
    fit = fitted(200)
    _, hessian, rows = minimiser(data(200))
    expected = (200 * rows.var(axis=0, ddof=1)) ** 0.5 / np.diag(hessian)
    # In log a, where the Hessian has the gradient a·∂/∂a besides; the gradient is zero but for convergence.
    errors = fit.stderr(diagonal=True)
    np.testing.assert_allclose([errors[k] for k in "abc"], expected, rtol=1e-4)


@pytest.mark.parametrize("support", [constraints.positive, constraints.real_vector, constraints.simplex])
def test_diagonal_errors_by_way_of_the_jacobian(support):
    """The root of the diagonal of J V Jᵀ, with the Jacobian by finite differences, for a site of three numbers."""
    transform = dist.biject_to(support)
    value, errors = jnp.array([0.3, -0.7, 0.5]), jnp.array([0.1, 0.2, 0.4])
    step = 1e-6 * np.eye(3)
    jacobian = np.array([(transform(value + s) - transform(value - s)) / 2e-6 for s in step]).T
    expected = np.sqrt(np.diag(jacobian @ np.diag(errors**2) @ jacobian.T))
    through = sys.modules["numpyro_score.uncertainty.influence"]._through
    np.testing.assert_allclose(through(transform, value, errors), expected, rtol=1e-7)


def test_either_a_function_or_the_diagonal():
    with pytest.raises(ValueError, match=r"of=... or diagonal=True, not both"):
        fitted(200).stderr(of=ratio, diagonal=True)


def test_functions_have_to_return_floats():
    with pytest.raises(TypeError, match="of must return arrays of floats"):
        fitted(200).stderr(of=lambda estimates: jnp.argmax(estimates["a"]))


# -- more parameters than a dense sandwich takes --------------------------------------------------------

WIDTH, ROWS = 2100, 40
FEATURES = np.random.default_rng(1).normal(size=(2, WIDTH))


def network(x):
    """f = −½x² + Σ_j w_j tanh(u_j x + v_j) with random u and v, and a prior on w."""
    w = numpyro.sample("w", dist.Normal(0.0, 0.3).expand([WIDTH]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * x**2 + jnp.tanh(x[:, None] * FEATURES[0] + FEATURES[1]) @ w)


def network_by_hand():
    """The score is −x + w·φ with φ = u sech², so rows have the loss ½(w·φ − x)² + w·φ' − 1, as above."""
    x, (u, v) = data(ROWS), FEATURES
    t = np.tanh(np.outer(x, u) + v)
    g, slope = u * (1 - t**2), -2 * u**2 * t * (1 - t**2)
    hessian = g.T @ g + np.eye(WIDTH) / 0.3**2
    w = np.linalg.solve(hessian, g.T @ x - slope.sum(axis=0))
    return w, hessian, g * (g @ w - x)[:, None] + slope


@functools.cache
def staying(model):
    return ScoreMatching(model, optim=optax.sgd(0.0), loss=ISM(), num_steps=1)


def at(model, site, value, x=None):
    """A fit that stays where it is put."""
    with jax.enable_x64(True):
        x = jnp.asarray(data(ROWS) if x is None else x)
        return staying(model).run(KEY, x, progress_bar=False, init_params={site: jnp.asarray(value)})


@pytest.fixture(scope="module")
def wide():
    w, hessian, rows = network_by_hand()
    influence = -np.linalg.solve(hessian, (rows - rows.mean(axis=0)).T).T * (ROWS / (ROWS - 1)) ** 0.5
    return at(network, "w_auto_loc", w), w, hessian, rows, influence


def log_density_ratio(estimates):
    """f(1) − f(0), and Σ w²."""
    w, (u, v) = estimates["w"], FEATURES
    return jnp.tanh(u + v) @ w - jnp.tanh(v) @ w - 0.5, jnp.sum(w**2)


@pytest.mark.slow
def test_functions_of_more_parameters_than_are_dense(wide):
    """Conjugate gradients against a dense solve of 2100 equations, for a linear and a quadratic function."""
    fit, w, _, _, rows = wide
    gradients = np.tanh(FEATURES.sum(axis=0)) - np.tanh(FEATURES[1]), 2 * w
    for i, value in enumerate(fit.influence(of=log_density_ratio)):
        expected = rows @ gradients[i]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    errors = [np.sum((rows @ g) ** 2) ** 0.5 for g in gradients]
    np.testing.assert_allclose(fit.stderr(of=log_density_ratio), errors, rtol=1e-6)


def test_diagonal_errors_of_many_parameters(wide):
    fit, _, hessian, rows, _ = wide
    expected = (ROWS * rows.var(axis=0, ddof=1)) ** 0.5 / np.diag(hessian)
    np.testing.assert_allclose(fit.stderr(diagonal=True)["w"], expected, rtol=1e-6)


def test_all_of_many_parameters_are_refused_with_what_to_ask_for(wide):
    for ask in (wide[0].stderr, wide[0].influence, wide[0].covariance):
        with pytest.raises(SandwichError, match=r"stops at 2000. Use stderr\(of=...\) .* or stderr\(diagonal=True\)"):
            ask()


def test_functions_away_from_the_minimum_are_warned_about(wide):
    """By how many standard errors, as for all parameters."""
    away = at(network, "w_auto_loc", wide[1] + 1.0)
    with pytest.warns(UserWarning, match=r"the minimum is .* standard errors away in site 'of'"):
        away.stderr(of=log_density_ratio)


@pytest.mark.parametrize("sign", [0.0, 1.0])
def test_conjugate_gradients_refuse_flat_and_downward_directions(sign):
    """The data see only Σ mu; the penalty bends the rest by nothing, or downwards."""

    def model(x):
        mu = numpyro.param("mu", jnp.zeros(WIDTH))
        numpyro.factor("reward", sign * jnp.sum(mu**2))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * (x - mu.sum()) ** 2)

    fit = at(model, "mu", np.zeros(WIDTH), x=data(ROWS) - data(ROWS).mean())
    with pytest.raises(SandwichError, match="not curved upwards at the estimates, as conjugate gradients found"):
        fit.stderr(of=lambda estimates: estimates["mu"][0])


def test_conjugate_gradients_say_when_they_do_not_converge(wide, monkeypatch):
    """Two steps are too few: the data see 40 directions."""
    monkeypatch.setattr(sys.modules["numpyro_score.uncertainty.influence"], "_MAX_STEPS", 2)
    with pytest.raises(SandwichError, match=r"left a relative residual of .* within 2 steps.* a tighter prior"):
        # One function: for the two above the steps are compiled already.
        wide[0].stderr(of=lambda estimates: log_density_ratio(estimates)[0])
