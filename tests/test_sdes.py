"""Linear diffusions: their drift and noise follow from their marginals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import EDM, SDE, VE, VP, LinearSDE, SubVP
from numpyro_score.diffusion.end import end_law
from numpyro_score.diffusion.sde import drift_and_diffusion, noise_at, time_at

T = np.linspace(0.05, 0.95, 7)


def beta(t):
    return 0.1 + 19.9 * t


def integral(t):
    return 0.1 * t + 9.95 * t**2


@pytest.mark.parametrize(
    "sde, f, g2",
    [
        (VP(), lambda t: -0.5 * beta(t), beta),
        (SubVP(), lambda t: -0.5 * beta(t), lambda t: beta(t) * (1 - np.exp(-2 * integral(t)))),
        (VE(0.02, 10.0), np.zeros_like, lambda t: (0.02 * 500**t) ** 2 * 2 * np.log(500)),
        (EDM(1.0), np.zeros_like, lambda t: 2 * t),
        # An Ornstein-Uhlenbeck process, dx = -x dt + 2 dw.
        (
            LinearSDE(lambda t: jnp.exp(-t), lambda t: jnp.sqrt(-2 * jnp.expm1(-2 * t))),
            lambda t: -np.ones_like(t),
            lambda t: 4 * np.ones_like(t),
        ),
    ],
)
def test_equations_as_published(sde, f, g2, x64):
    """f and g² of Song et al. [2021] and of a process with a known equation; ρ is inverted to the last digits."""
    found = drift_and_diffusion(sde, T)
    np.testing.assert_allclose(found[0], f(T), atol=1e-12, rtol=1e-9)
    np.testing.assert_allclose(found[1], g2(T), rtol=1e-9)
    np.testing.assert_allclose(time_at(sde, noise_at(sde, jnp.asarray(T))), T, rtol=1e-12)
    assert isinstance(sde, SDE)


def test_times_of_noise_in_single_precision():
    """Also where alpha is far below sigma, and outside of the range the ends are given."""
    sde = VP()
    t = jnp.linspace(0.01, 1.0, 50)
    np.testing.assert_allclose(time_at(sde, noise_at(sde, t)), t, rtol=1e-5)
    assert time_at(sde, jnp.array(1e9)) == pytest.approx(1.0)


def test_noise_that_falls_is_refused(unchecked):
    """Time runs from the data to noise."""
    with pytest.raises(ValueError, match=r"needs sigma/alpha that grows with t.*write time from the data"):
        LinearSDE(lambda t: jnp.ones_like(t), lambda t: 1 - t)
    with pytest.raises(ValueError, match=r"VE needs largest > smallest, got 0.1 and 1"):
        VE(1.0, 0.1)
    with pytest.raises(ValueError, match=r"SubVP needs beta_max > beta_min, got 1 and 5"):
        SubVP(5, 1)
    with pytest.raises(TypeError, match=r"LinearSDE needs a function of t as alpha, got 1"):
        LinearSDE(1, 2)
    with pytest.raises(ValueError, match=r"alpha gave shape \(\) for times of shape \(1000,\).*jnp.ones_like\(t\)"):
        LinearSDE(lambda t: 1.0, lambda t: t)


def test_end_law_is_that_of_noised_data(x64):
    """For normal data in any direction: mean, covariance and density with noise."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + [1, 2, 3], rng.uniform(size=50)
    law = end_law(x, weights, jnp.float64)
    covariance = np.cov(x.T, aweights=weights, ddof=0) + 4 * np.eye(3)
    u = rng.normal(size=(5, 3))
    away = u - np.average(x, axis=0, weights=weights)
    expected = -0.5 * (
        np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    np.testing.assert_allclose(law.log_prob(u, 2.0), expected)
    score = jax.grad(lambda u: law.log_prob(u, 2.0).sum())(jnp.asarray(u))
    np.testing.assert_allclose(law.score(u, 2.0), score)
    draws = law.sample(jax.random.key(0), 100_000, 2.0)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.15)
    alone = end_law(x[:1], weights[:1], jnp.float64)
    np.testing.assert_allclose(alone.score(u, 2.0), (x[0] - u) / 4)


def test_end_law_of_many_coordinates():
    """Beyond 1,024 it knows the directions of much variance, and those of white noise for no more than they are."""
    rng = np.random.default_rng(0)
    n, dim = 600, 1100
    directions = np.linalg.qr(rng.normal(size=(dim, 2)))[0]
    x = 3.0 + rng.normal(size=(n, dim)) + (rng.normal(size=(n, 2)) * [30.0, 10.0]) @ directions.T
    law = end_law(x, np.ones(n))
    np.testing.assert_allclose(law.mean, x.mean(axis=0), rtol=1e-5)
    largest = np.argsort(law.variances)[-2:]
    np.testing.assert_allclose(law.variances[largest], [101.0, 901.0], rtol=0.3)  # four standard errors
    np.testing.assert_allclose(np.abs(law.axes[:, largest].T @ directions), [[0, 1], [1, 0]], atol=0.15)
    others = np.delete(law.variances, largest)
    assert others.mean() == pytest.approx(1.0, abs=0.06)  # in the rows they were sought in, they have more than 4
    assert law.rest == pytest.approx(1.0, abs=0.01)
    assert law.per_coordinate == pytest.approx(1.0 + 1000 / dim, rel=0.2)

    axes = np.asarray(law.axes, np.float64)
    covariance = axes @ np.diag(law.variances) @ axes.T + float(law.rest) * (np.eye(dim) - axes @ axes.T)
    noised = covariance + 4 * np.eye(dim)
    u = rng.normal(size=(3, dim)) * 5
    away = u - np.asarray(law.mean)
    inverse = np.linalg.inv(noised)
    expected = -0.5 * (np.einsum("ni,ij,nj->n", away, inverse, away) + np.linalg.slogdet(2 * np.pi * noised)[1])
    np.testing.assert_allclose(law.log_prob(u, 2.0), expected, rtol=1e-4)
    np.testing.assert_allclose(law.score(u, 2.0), -away @ inverse, atol=1e-4)
    draws = np.asarray(law.sample(jax.random.key(0), 4000, 2.0)) - np.asarray(law.mean)
    np.testing.assert_allclose(np.cov((draws @ directions).T), directions.T @ noised @ directions, rtol=0.1, atol=20)
    assert np.mean(draws**2) == pytest.approx(np.trace(noised) / dim, rel=0.02)
    np.testing.assert_allclose(law.from_code(law.code(u, 2.0), 2.0), u, atol=1e-3)


def test_end_law_of_few_rows_of_many_coordinates():
    """No axis seems to have more variance than the others, as that between the means of two halves would."""
    x = np.random.default_rng(0).normal(size=(64, 1500))
    law = end_law(x, np.ones(64))
    assert law.largest < 3
    assert law.per_coordinate == pytest.approx(1.0, abs=0.02)
    for n in (1, 2, 3):
        assert np.isfinite(end_law(x[:n], np.ones(n)).log_prob(x, 1.0)).all()


@pytest.mark.parametrize("sde", [LinearSDE(jnp.ones_like, jnp.sqrt, 1e4), EDM(1e5), VP()], ids=["root", "EDM", "VP"])
def test_small_levels_have_times_of_their_own(sde):
    """To the last digits of the noise, also where it is a tiny part of the largest."""
    rho = jnp.asarray([1e-4, 1e-3, 1e-2, 1.0, 90.0], jnp.float32)
    np.testing.assert_allclose(noise_at(sde, jax.jit(time_at, static_argnums=0)(sde, rho)), rho, rtol=2e-6)


def test_an_alpha_that_is_not_positive():
    with pytest.raises(ValueError, match=r"needs an alpha above zero.*turn the signs"):
        LinearSDE(lambda t: -jnp.ones_like(t), lambda t: -t, 100.0)
