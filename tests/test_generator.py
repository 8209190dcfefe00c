"""Denoising density estimation, and generators fitted to it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import DSM, DenoisingGenerator, Energy, ScoreMatching

SIGMA = 0.6
COV = np.array([[1.0, 0.6], [0.6, 0.8]], np.float32)
MEAN = np.array([1.5, -0.5], np.float32)
BASE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def normal(x):
    mean = numpyro.param("mean", jnp.zeros(2))
    root = numpyro.param("root", jnp.eye(2))
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", -0.5 * jnp.sum(((x - mean) @ root) ** 2, -1))


def affine(params, z):
    return params["shift"] + z @ params["map"].T


START = {"shift": np.zeros(2, np.float32), "map": 0.5 * np.eye(2, dtype=np.float32)}


@pytest.mark.slow
def test_denoising_energy_is_the_blurred_log_density(optimised):
    """DSM on a scalar energy gives log p_σ up to a constant: for normal data N(m, C + σ²I)."""
    x = np.random.default_rng(0).multivariate_normal(MEAN, COV, 4000).astype(np.float32)
    fit = ScoreMatching(normal, loss=DSM(SIGMA)).run(jax.random.key(0), x, progress_bar=False)
    blurred = np.cov(x.T, bias=True) + SIGMA**2 * np.eye(2)
    points = x[:50]
    away = points - x.mean(0)
    expected = -0.5 * np.einsum("ni,ij,nj->n", away, np.linalg.inv(blurred), away)
    found = np.asarray(fit.energy.log_density(points))
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=0.15)


@pytest.fixture(scope="module")
def fitted():
    precision = np.linalg.inv(COV + SIGMA**2 * np.eye(2))
    root = np.linalg.cholesky(precision).astype(np.float32)
    target = Energy(normal, {"mean": MEAN, "root": root}, np.zeros((1, 2), np.float32))
    generator = DenoisingGenerator(
        normal, affine, SIGMA, BASE, optim=optax.adam(optax.cosine_decay_schedule(0.02, 600)), batch_size=256
    )
    return generator, target, generator.run(jax.random.key(1), target, START, num_steps=600, progress_bar=False)


def test_generator_finds_the_law_without_the_noise(fitted):
    """From p_σ = N(m, C + σ²I) the generator learns N(m, C), and the divergence vanishes."""
    _, _, fit = fitted
    np.testing.assert_allclose(fit.params["shift"], MEAN, atol=0.05)
    np.testing.assert_allclose(fit.params["map"] @ fit.params["map"].T, COV, atol=0.05)
    assert fit.divergences.shape == (600,)
    assert fit.divergences[-100:].mean() < 0.01 * fit.divergences[:10].mean()


def test_gradient_is_that_of_kl(fitted):
    """With a critic that is exact, and stays so, a step goes down the closed-form KL of the blurred normals."""
    start = {
        "shift": np.zeros(2, np.float32),
        "map": np.sqrt(1 - SIGMA**2) * np.eye(2, dtype=np.float32),
    }  # blurred, N(0, I): the critic's start

    def kl(params):
        cov = params["map"] @ params["map"].T + SIGMA**2 * jnp.eye(2)
        goal = jnp.asarray(COV) + SIGMA**2 * jnp.eye(2)
        gap = params["shift"] - MEAN
        inner = jnp.trace(jnp.linalg.solve(goal, cov)) + gap @ jnp.linalg.solve(goal, gap)
        return 0.5 * (inner - jnp.linalg.slogdet(cov)[1])

    frozen = DenoisingGenerator(
        normal,
        affine,
        SIGMA,
        BASE,
        optim=optax.sgd(1.0),
        critic_optim=optax.sgd(0.0),
        critic_steps=1,
        batch_size=200_000,
    )
    state, divergence = jax.jit(frozen.update)(frozen.init(jax.random.key(2), start), fitted[1])
    step = jax.tree.map(np.subtract, start, jax.device_get(state.params))
    # Five standard errors of 200,000 draws: the summands have standard deviations below 2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.022), step, jax.jit(jax.grad(kl))(start))
    precision = np.linalg.inv(COV + SIGMA**2 * np.eye(2))
    gap = np.eye(2) - precision
    expected = 0.5 * (np.sum(gap**2) + np.sum((precision @ MEAN) ** 2))
    np.testing.assert_allclose(divergence, expected, rtol=0.03)


def test_what_is_refused(fitted):
    generator, target, fit = fitted
    with pytest.raises(ValueError, match="one event dimension"):
        DenoisingGenerator(normal, affine, SIGMA, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="critic_steps of at least 1"):
        DenoisingGenerator(normal, affine, SIGMA, BASE, critic_steps=0)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        broken = target.with_params({"mean": np.full(2, np.nan, np.float32)})
        generator.run(jax.random.key(1), broken, START, num_steps=600, progress_bar=False)
    more = generator.run(jax.random.key(1), target, START, num_steps=600, progress_bar=False, init_state=fit.state)
    assert more.divergences.mean() < 0.02 * fit.divergences[:10].mean()


def bounded(x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(x, -1))


def test_samples_that_the_target_cannot_have(unchecked):
    """A generator's samples are real vectors of the target's width."""
    make = lambda model, generator=affine: DenoisingGenerator(model, generator, SIGMA, BASE)  # noqa: E731
    key, x = jax.random.key(0), np.ones((3, 2), np.float32)
    target = Energy(normal, {"mean": MEAN, "root": COV}, x)
    with pytest.raises(NotImplementedError, match="site 'x' of the target is not"):
        make(normal).run(key, Energy(bounded, {}, x), START)
    with pytest.raises(NotImplementedError, match="site 'x' of the critic is not"):
        make(bounded).run(key, target, START)
    with pytest.raises(ValueError, match=r"samples of shape \(256, 1\), but the target's rows have 2"):
        make(normal, lambda p, z: z[:, :1]).run(key, target, START)
    with pytest.raises(TypeError, match=r"must be an Energy, such as fit.energy, got function"):
        make(normal).run(key, normal, START)
    with pytest.raises(ValueError, match="batch_size of at least 2, got 1"):
        DenoisingGenerator(normal, affine, SIGMA, BASE, batch_size=1)
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        make(normal).run(key, target, START, num_steps=0)
