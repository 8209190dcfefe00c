"""The bits that a model of every noise level needs for data with noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from scipy import integrate, stats

from numpyro_score import ContinuousDSM, Energy, ScoreMatching, bits_by_noise, score_factor

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
RANGE = (0.05, 50.0)


def normal(x, sigma=1.0, scale=(1.0, 3.0)):
    """Two independent normal numbers, of these standard deviations, with noise."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        variance = jnp.stack([jnp.asarray(s) ** 2 for s in scale]) + jnp.broadcast_to(sigma, len(x))[:, None] ** 2
        numpyro.factor("energy", -0.5 * jnp.sum(x**2 / variance, axis=-1))


def sign(x, sigma=1.0):
    """−1 or 1 with noise: the mean given x is tanh(x/σ²)."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()), obs=x)
        score_factor("score", x, (jnp.tanh(x / sigma**2) - x) / sigma**2, event_dim=0)


NORMAL = jnp.asarray(RNG.normal(size=(4000, 2)) * [1.0, 3.0], jnp.float32)


def within_errors(found, exact):
    """Monte Carlo errors and that of the integral."""
    return np.all(np.abs(found.bits - exact) < 4 * found.bits_stderr + 1e-4)


def test_normal_data_have_their_mutual_information():
    """½ log₂(1 + s²/ρ²) of each number, at all levels, and an error of s²/(s² + ρ²)."""
    found = bits_by_noise(Energy(normal, {}, NORMAL), NORMAL, KEY, noise_range=RANGE)
    ratio = np.array([1.0, 9.0]) / found.noise[:, None] ** 2
    assert within_errors(found, 0.5 * np.log2(1 + ratio).mean(axis=1))
    exact = (ratio / (1 + ratio)).mean(axis=1)
    assert np.all(np.abs(found.error - exact) < 4.5 * found.error_stderr)
    assert np.all(np.diff(found.bits) < 0) and found.bits_stderr[0] < 0.02
    assert repr(found).startswith(f"NoiseBits: {found.bits[0]:.4g} ± ")


def test_a_wrong_model_needs_the_kullback_leibler_divergence_more():
    """The bits are a cross entropy: those of the truth and KL(p_ρ‖q_ρ)/(D ln 2), here of normal laws."""
    rho = RANGE[0]
    right, wrong = (
        bits_by_noise(Energy(model, {}, NORMAL), NORMAL, KEY, noise_range=RANGE)
        for model in (normal, lambda x, sigma=1.0: normal(x, sigma, (2.0, 3.0)))
    )
    ratio = (1 + rho**2) / (4 + rho**2)
    kl = 0.5 * (ratio - 1 - np.log(ratio)) / 2 / np.log(2)
    more = wrong.bits[0] - right.bits[0]  # by the same noise
    assert abs(more - kl) < 0.03 * kl + 4 * abs(wrong.bits_stderr[0] - right.bits_stderr[0])


def test_signs_are_one_bit_and_not_more():
    """Mutual information of a sign and its noisy view by quadrature; one bit once it can be read back."""

    def information(rho):
        def lost(z):
            return stats.norm.pdf(z) * np.logaddexp2(0, -2 * (1 + rho * z) / rho**2 / np.log(2))

        return 1 - integrate.quad(lost, -10, 10)[0]

    x = jnp.asarray(RNG.choice([-1.0, 1.0], size=4000), jnp.float32)
    found = bits_by_noise(Energy(sign, {}, x), x, KEY, noise_range=(0.15, 50.0), num_draws=2)
    assert within_errors(found, [information(rho) for rho in found.noise])
    assert abs(found.bits[0] - 1) < 4 * found.bits_stderr[0] < 0.05


def scaled(x, sigma=1.0):
    normal(x, sigma, (numpyro.param("first", 1.0), 3.0))


def test_a_fit_knows_its_levels_and_other_rows_are_told_apart():
    fit = ScoreMatching(scaled, loss=ContinuousDSM(*RANGE), num_steps=1).run(KEY, NORMAL[:50], progress_bar=False)
    found = bits_by_noise(fit, NORMAL, KEY)
    assert (found.noise[0], found.noise[-1]) == pytest.approx(RANGE)
    assert bits_by_noise(fit, 3 * NORMAL, KEY).bits[0] > found.bits[0] + 1


def test_double_precision(x64):
    x = np.asarray(NORMAL, np.float64)
    found = bits_by_noise(Energy(normal, {}, x), x, KEY, noise_range=(1e-6, 50.0), num_levels=128)
    assert within_errors(found, 0.5 * np.log2(1 + np.array([1.0, 9.0]) / found.noise[:, None] ** 2).mean(axis=1))


def cliff(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        score_factor("score", x, jnp.where(jnp.abs(x) < 20, -x, jnp.nan))


def test_errors():
    energy = Energy(normal, {}, NORMAL)
    with pytest.raises(TypeError, match="cannot see at which noise levels"):
        bits_by_noise(energy, NORMAL, KEY)
    with pytest.raises(ValueError, match="num_levels must be 3 or more, got 1"):
        bits_by_noise(energy, NORMAL, KEY, noise_range=RANGE, num_levels=1)
    with pytest.raises(ValueError, match=r"got 1 row\."):
        bits_by_noise(energy, NORMAL[:1], KEY, noise_range=RANGE)
    with pytest.raises(ValueError, match=r"row 3 \(1 of 4000\) with NaN"):
        bits_by_noise(energy, NORMAL.at[3, 0].set(jnp.nan), KEY, noise_range=RANGE)
    with pytest.raises(TypeError, match=r"got traced values.*outside of jit"):
        jax.jit(lambda x: bits_by_noise(energy, x, KEY, noise_range=RANGE).bits)(NORMAL)
    with pytest.raises(FloatingPointError, match=r"score at noise .* is not finite in row"):
        bits_by_noise(Energy(cliff, {}, NORMAL), NORMAL, KEY, noise_range=RANGE)


def test_levels_at_which_the_data_are_not_normal_yet():
    with pytest.warns(UserWarning, match="largest noise level of bits_by_noise, 1, is less than twice"):
        bits_by_noise(Energy(normal, {}, NORMAL), NORMAL, KEY, noise_range=(0.05, 1.0))
