"""Networks scaled as EDM's, against the normal law and the published coefficients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import assert_mean, improper

from numpyro_score import ContinuousDSM, Energy, preconditioned_energy, preconditioned_score, score_factor

SIGMA_DATA = 1.7
SIGMA = np.geomspace(0.01, 100.0, 9)


def nothing(u, noise):
    return jnp.zeros_like(u)


def test_without_a_network_it_is_the_normal_law(x64):
    """Score and density of N(0, σ_d² + σ²), for rows of any shape."""
    x = np.random.default_rng(0).normal(size=(9, 2, 3))
    variance = (SIGMA_DATA**2 + SIGMA**2)[:, None, None]
    np.testing.assert_allclose(preconditioned_score(nothing, x, SIGMA, SIGMA_DATA), -x / variance)
    f = preconditioned_energy(lambda u, noise: jnp.zeros(len(u)), x, SIGMA, SIGMA_DATA)
    np.testing.assert_allclose(f, -0.5 * np.sum(x**2 / variance, (1, 2)))


def test_published_coefficients(x64):
    """The denoiser x + σ²s is c_skip x + c_out F(c_in x, c_noise) of EDM's table 1, where σ_d is ½."""

    def network(u, noise):
        return jnp.sin(u) + noise[:, None]

    x = np.random.default_rng(1).normal(size=(9, 2))
    s = SIGMA[:, None]
    skip, out, inner = 0.25 / (s**2 + 0.25), 0.5 * s / np.sqrt(s**2 + 0.25), 1 / np.sqrt(s**2 + 0.25)
    expected = skip * x + out * (np.sin(inner * x) + 0.25 * np.log(s / 0.5))
    np.testing.assert_allclose(x + s**2 * preconditioned_score(network, x, SIGMA, 0.5), expected)


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_inputs_and_targets_have_unit_variance(law, x64):
    """At every level. The target is the output that makes the score -ε/σ, which denoising aims at."""
    rng = np.random.default_rng(2)
    n = 50_000
    x = SIGMA_DATA * (rng.normal(size=(n, 1)) if law == "normal" else rng.uniform(-1, 1, (n, 1)) * np.sqrt(3))
    noise, seen = rng.normal(size=(n, 1)), []
    for sigma in SIGMA:
        noisy = x + sigma * noise
        base = preconditioned_score(lambda u, c: seen.append(u) or jnp.zeros_like(u), noisy, sigma, SIGMA_DATA)
        one = preconditioned_score(lambda u, c: jnp.ones_like(u), noisy, sigma, SIGMA_DATA)
        target = (-noise / sigma - base) / (one - base)
        assert_mean(target**2, 1.0)
        assert_mean(seen[-1] ** 2, 1.0)


def test_all_levels_weigh_the_same_in_edm(x64):
    """The value of a row is the squared error of the network, here of zeros, less a constant."""

    def model(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            score_factor("score", x, preconditioned_score(nothing, x, sigma, SIGMA_DATA))

    x = SIGMA_DATA * np.random.default_rng(3).normal(size=(50_000, 2))
    loss = ContinuousDSM(0.01, 100.0, "edm", stratified=False, sigma_data=SIGMA_DATA)
    values = np.asarray(loss(Energy(model, {}, x), jax.random.key(0)))
    constant = 2 * (1 + loss._mean_edm_ratio)
    errors = values + constant
    assert errors.min() > -1e-9 * constant
    assert_mean(errors, 2.0)
    sigma = loss.levels(jax.random.split(jax.random.key(0))[0], len(x), jnp.float64)
    for part in np.array_split(np.argsort(sigma), 4):
        assert_mean(errors[part], 2.0)


def test_energy_and_score_agree(x64):
    """The gradient of the energy is the score by the gradient of its network."""

    def g(u, noise):
        return jnp.sum(jnp.sin(u * (1 + noise[:, None])), -1)

    def gradient(u, noise):
        return jax.grad(lambda u: g(u, noise).sum())(u)

    x = jnp.asarray(np.random.default_rng(4).normal(size=(9, 2)))
    score = jax.grad(lambda x: preconditioned_energy(g, x, SIGMA, SIGMA_DATA).sum())(x)
    np.testing.assert_allclose(score, preconditioned_score(gradient, x, SIGMA, SIGMA_DATA), rtol=1e-10)


def test_shapes_that_are_refused():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"preconditioned_score needs.*\(4, 2\), and it returned \(4,\)"):
        preconditioned_score(lambda u, c: u[:, 0], x, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"preconditioned_energy needs.*shape \(4,\), and it returned \(4, 1\)"):
        preconditioned_energy(lambda u, c: u[:, :1], x, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"levels of shape \(3,\)"):
        preconditioned_score(nothing, x, np.ones(3), 1.0)
    with pytest.raises(ValueError, match="needs a positive sigma_data"):
        preconditioned_energy(nothing, x, 1.0, -1.0)
    for level in (0.0, -1.0, np.nan, np.array([1.0, 1.0, 0.0, 1.0])):
        for f in (preconditioned_score, preconditioned_energy):
            with pytest.raises(ValueError, match="needs positive noise levels as sigma, got"):
                f(nothing, x, level, 1.0)
    jax.jit(lambda level: preconditioned_score(nothing, x, level, 1.0))(0.5)  # of which nothing is known
