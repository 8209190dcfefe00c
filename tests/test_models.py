"""Models by name, beside closed forms, formulas by hand, and the laws that they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import DSM, ISM, Energy, ScoreMatching, models

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def fitted(model, x, **settings):
    return ScoreMatching(model, loss=ISM()).run(KEY, np.asarray(x, np.float32), progress_bar=False, **settings)


def minimum(quadratic, size):
    """Where a quadratic of that many numbers has its minimum."""
    gradient, hessian = jax.jit(lambda v: (jax.grad(quadratic)(v), jax.hessian(quadratic)(v)))(jnp.zeros(size))
    return -np.linalg.solve(hessian, gradient)


def matrix(estimates):
    return np.asarray(models.symmetric(estimates["diagonal"], estimates["coupling"]))


def test_gaussian_graph():
    """Maximum likelihood: K is the inverse covariance, and η = K x̄."""
    x = RNG.normal(size=(200, 3)) @ [[1, 0.5, 0], [0, 1, -0.3], [0, 0, 1]] + [1, -1, 0]
    found = fitted(models.gaussian_graph, x).estimates
    precision = np.linalg.inv(np.cov(x.T, ddof=0))
    np.testing.assert_allclose(matrix(found), precision, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["field"], precision @ x.mean(0), rtol=1e-3, atol=1e-3)


def test_power_graph(a=0.5, b=0.0):
    """The objective ½h s² + h ∂s + h's with h = min(x, 1) by hand, of one column; f = −k y² /2 + η z."""
    x = RNG.gamma(3.0, 0.4, 50)

    def by_hand(theta):
        def f(t):
            y, z = t**a / a**0.5 if a else jnp.log(t), t**b / b if b else jnp.log(t)
            return -0.5 * theta[0] * y**2 + theta[1] * z

        def one(t):
            s = jax.grad(f)
            h = jnp.minimum(t, 1.0)
            return 0.5 * h * s(t) ** 2 + h * jax.grad(s)(t) + jnp.where(t < 1, 1.0, 0.0) * s(t)

        return jnp.sum(jax.vmap(one)(jnp.asarray(x, jnp.float32)))

    exact = minimum(by_hand, 2)
    found = fitted(models.power_graph, x[:, None], a=a, b=b).estimates
    np.testing.assert_allclose([found["diagonal"][0], found["field"][0]], exact, rtol=1e-3)


def test_truncated_graph():
    """It is the a-b model with a = b = 1; with a = b = 0 a normal law of logarithms."""
    x = np.abs(RNG.normal(size=(5, 3))).astype(np.float32)
    params = {"diagonal": jnp.ones(3), "coupling": jnp.array([0.3, -0.2, 0.1]), "field": jnp.array([1.0, 0.0, 2.0])}
    k = matrix(params)
    expected = x @ params["field"] - 0.5 * np.einsum("ni,ij,nj->n", x, k, x)
    np.testing.assert_allclose(Energy(models.truncated_graph, params, x).log_density(x), expected, rtol=1e-5)
    y = np.log(x)
    expected = y @ params["field"] - 0.5 * np.einsum("ni,ij,nj->n", y, k, y)
    np.testing.assert_allclose(Energy(models.power_graph, params, x, 0.0, 0.0).log_density(x), expected, rtol=1e-4)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_von_mises_fisher():
    """θ = (d − 1) W⁻¹ x̄ with W the mean of I − xxᵀ [Mardia, Kent & Laha 2016]."""
    x = unit(RNG.normal([2, 0, 1, 0], size=(300, 4)))
    exact = np.linalg.solve(np.eye(4) - x.T @ x / len(x), 3 * x.mean(0))
    np.testing.assert_allclose(fitted(models.von_mises_fisher, x).estimates["direction"], exact, rtol=1e-3, atol=1e-3)


def test_fisher_bingham():
    """½‖P∇f‖² + Δf on the sphere, by hand: P(θ + 2Ax), and −(d−1)θ·x + 2 tr A − 2d xᵀAx with tr A = 0."""
    x = unit(RNG.normal(size=(200, 3)) * [2, 1, 0.5] + [0.5, 0, 0])

    def by_hand(v):
        a = models.symmetric(jnp.append(v[:2], -v[:2].sum()), v[2:5])
        theta = v[5:]
        slope = theta + 2 * x @ a
        tangent = slope - jnp.sum(slope * x, -1, keepdims=True) * x
        return jnp.sum(0.5 * tangent**2) + jnp.sum(-2 * x @ theta - 6 * jnp.sum((x @ a) * x, -1))

    found = fitted(models.fisher_bingham, x).estimates
    values = np.concatenate([found[k] for k in ("diagonal", "coupling", "direction")])
    np.testing.assert_allclose(values, minimum(by_hand, 8), rtol=1e-3, atol=1e-3)
    params = {"diagonal": found["diagonal"], "coupling": found["coupling"]}
    whole, part = (
        Energy(models.fisher_bingham, {**found, "direction": jnp.zeros(3)}, x),
        Energy(models.bingham, params, x),
    )
    np.testing.assert_allclose(part.log_density(part.data), whole.log_density(whole.data), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compositions():
    """On rows of a Dirichlet law both models find it, each number within 4.5 standard errors: 1 in 12,000 by chance."""
    alpha = np.array([2.0, 3.0, 1.5])
    x = RNG.dirichlet(alpha, 3000)
    plain, tilted = fitted(models.dirichlet, x), fitted(models.polynomially_tilted, x)
    truth = {"beta": alpha - 1, "linear": np.zeros(2), "diagonal": np.zeros(2), "coupling": np.zeros(1)}
    for fit, expected in ((plain, {"alpha": alpha}), (tilted, truth)):
        errors = fit.stderr()
        for site, value in expected.items():
            assert (np.abs(fit.estimates[site] - value) < 4.5 * errors[site]).all(), site


def test_energy_network():
    """A start of the right shapes, smooth, that falls off in all directions; one step of a fit runs."""
    x = RNG.normal(size=(20, 2)).astype(np.float32)
    fit = ScoreMatching(models.energy_network, loss=DSM(0.3), num_steps=1).run(KEY, x, progress_bar=False, width=8)
    assert [layer["w"].shape for layer in fit.estimates["layers"]] == [(2, 8), (8, 8), (8, 1)]
    far = fit.energy.log_density(1e3 * np.array([[1.0, 0], [0, -1], [-1, 1]], np.float32))
    assert (far < -1e4).all()
