"""Models that declare a score and no energy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import FAST_COMPILE, density, improper
from numpyro import handlers

from numpyro_score import (
    DSM,
    ESM,
    FSM,
    ISM,
    SSM,
    Energy,
    KLContraction,
    ScoreMatching,
    curl,
    score_factor,
)

X = np.random.default_rng(0).normal(size=(40, 3))
K = np.array([[2.0, 0.7, -0.4], [0.7, 1.5, 0.3], [-0.4, 0.3, 1.0]])
TURN = np.array([[0.0, 1.0, -0.5], [-1.0, 0.0, 2.0], [0.5, -2.0, 0.0]])


def rugged(k, x):
    return -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x) + jnp.sin(2 * x[:, 0] * x[:, -1]) - 0.1 * jnp.sum(x**4, -1)


def of_score(score):
    def model(x):
        theta = numpyro.param("theta", K)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            score_factor("score", x, score(theta, x))

    return model


def gradient(k, x):
    return jax.grad(lambda y: rugged(k, y).sum())(x)


@pytest.mark.parametrize(
    "loss",
    [ISM(), SSM(), SSM(2, "gaussian", False), DSM(0.3, antithetic=True), ESM(jnp.negative)],
    ids=repr,
)
def test_scores_of_an_energy_are_as_good_as_the_energy(loss, x64):
    """With s = ∇f every loss has the value and the gradient in the parameters that it has for f."""

    def mean(model):
        def of(theta):
            return loss(Energy(model, {"theta": theta}, X), jax.random.key(1)).mean()

        return jax.jit(jax.value_and_grad(of), compiler_options=FAST_COMPILE)(K)

    value, slope = mean(of_score(gradient))
    expected, expected_slope = mean(density(rugged))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-9, atol=1e-12)


def linear(b, x):
    return -x @ b.T


def test_score_that_is_no_gradient(x64):
    """For s = -Bx the loss is ½‖Bx‖² - tr B and the curl ‖B - Bᵀ‖, for any matrix B."""
    b = K + TURN
    energy = Energy(of_score(linear), {"theta": b}, X)
    expected = 0.5 * np.sum((X @ b.T) ** 2, -1) - np.trace(b)
    np.testing.assert_allclose(jax.jit(ISM())(energy, jax.random.key(0)), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(curl)(energy, X), np.full(40, np.linalg.norm(2 * TURN)), rtol=1e-12)
    np.testing.assert_allclose(curl(energy, X[0]), np.linalg.norm(2 * TURN), rtol=1e-12)
    gradient_field = Energy(density(rugged), {"theta": K}, X)
    np.testing.assert_allclose(jax.jit(curl)(gradient_field, X), np.zeros(40), atol=1e-10)


def test_terms_add_up(x64):
    """A score term, a factor and a data density of its own add their scores."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([3]).to_event(1), obs=x)
            score_factor("score", x, linear(K + TURN, x))
            numpyro.factor("energy", -0.25 * jnp.sum(x**4, -1))

    energy = Energy(model, {}, X)
    score, laplacian = jax.jit(lambda e: (e.score(X), e.laplacian(X)))(energy)
    np.testing.assert_allclose(score, -X / 4 - X @ (K + TURN).T - X**3, rtol=1e-12)
    np.testing.assert_allclose(laplacian, -0.75 - np.trace(K) - 3 * np.sum(X**2, -1), rtol=1e-12)


def test_fit_of_a_score(x64):
    """For s = -Bx with a free matrix the fit is B = S⁻¹, S the second moments: symmetric by itself."""
    rows = np.random.default_rng(1).normal(size=(500, 3)) @ np.linalg.cholesky(np.linalg.inv(K)).T
    fit = ScoreMatching(of_score(linear), loss=ISM()).run(jax.random.key(0), rows, progress_bar=False)
    np.testing.assert_allclose(fit.estimates["theta"], np.linalg.inv(rows.T @ rows / 500), atol=1e-3)
    assert curl(fit.energy, rows[:5]).max() < 2e-3


def test_what_needs_the_density_refuses(unchecked):
    """Values are refused by name; on the raw model the term is NaN, so that no sampler runs on it."""
    energy = Energy(of_score(linear), {"theta": K}, X)
    assert not energy.has_density
    for of in (
        lambda: energy.log_density(X),
        *(lambda v=v: v(energy, jax.random.key(0)) for v in (FSM(0.1), KLContraction(1.0))),
    ):
        with pytest.raises(TypeError, match=r"'score' is a score_factor.*numpyro\.factor"):
            of()
    trace = handlers.trace(handlers.substitute(of_score(linear), {"theta": K})).get_trace(X)
    assert np.isnan(trace["score"]["fn"].log_prob(trace["score"]["value"])).all()
    with pytest.raises(ValueError, match=r"'bad' got data of shape \(4, 3\) and a score of shape \(4,\)"):
        score_factor("bad", X[:4], X[:4, 0])


def test_scores_are_checked():
    """A score that is NaN, or that mixes rows, is refused with the rows."""

    def undefined(theta, x):
        return jnp.where(x[:, :1] > np.sort(X[:, 0])[-2] + 1e-6, jnp.sqrt(-1 - x**2), -x)

    with pytest.raises(ValueError, match=f"score of 'x' is not finite in row {X[:, 0].argmax()} "):
        Energy(of_score(undefined), {"theta": K}, X).check()
    with pytest.raises(ValueError, match="Rows of 'x' interact"):
        Energy(of_score(lambda theta, x: x.mean(0) - x), {"theta": K}, X).check()


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_scores_of_numbers_and_of_images(shape, x64):
    """`event_dim` says how many dimensions a row has; s = −ax has the loss ½a²‖x‖² − aD."""

    def model(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(*shape), obs=x)
            score_factor("score", x, -a * x, event_dim=len(shape))

    x = np.random.default_rng(2).normal(size=(5, *shape))
    found = jax.jit(ISM())(Energy(model, {"a": 2.0}, x), jax.random.key(0))
    expected = 2.0 * np.sum(x.reshape(5, -1) ** 2, -1) - 2.0 * np.prod(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=f"event_dim={len(shape) + 2}: give both the same shape"):
        score_factor("score", x, x, event_dim=len(shape) + 2)
