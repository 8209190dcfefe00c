"""Losses of density values alone: finite differences, and the KL contraction."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import assert_mean, energy_of, improper
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from numpyro_score import DSM, FSM, SSM, KLContraction, ScoreMatching

K = np.array([[2.0, 0.7, -0.4], [0.7, 1.5, 0.3], [-0.4, 0.3, 1.0]])
ROWS = np.random.default_rng(0).normal(size=(200, 3))
KEY = partial(jax.random.key, 5)


def quadratic(k, x):
    return -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x)


def rugged(k, x):
    return quadratic(k, x) - 0.2 * jnp.sum(x**4, -1) + jnp.sin(2 * x[:, 0] * x[:, -1])


@partial(jax.jit, static_argnums=(0, 1))
def compiled(loss, f, theta, x, key):
    return loss(energy_of(f, theta, x), key)


def values(loss, f, theta, x, key):
    """The loss of each row, in the precision that JAX is set to."""
    theta, x = jax.tree.map(jnp.asarray, (theta, x))
    return np.asarray(compiled(loss, f, theta, x, key))


def error_slope(errors, steps):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


# -- finite differences ----------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["rademacher", "gaussian", "sphere"])
def test_sliced_differences_tend_to_slices(projection, x64):
    """With the same directions the difference to plain SSM falls as ε², in value and in gradient."""

    @jax.jit
    def of(epsilon):
        loss = object.__new__(FSM)  # a traced step, so that one compilation serves all
        loss.__dict__.update(epsilon=epsilon, sigma=None, num_projections=2, projection=projection)

        def mean(theta):
            return loss(energy_of(rugged, theta, ROWS), KEY()).mean()

        return jax.value_and_grad(mean)(K)

    def sliced(theta):
        loss = SSM(2, projection, variance_reduced=False)
        return loss(energy_of(rugged, theta, ROWS), jax.random.split(KEY())[0]).mean()

    value, gradient = jax.jit(jax.value_and_grad(sliced))(K)
    steps = np.geomspace(0.03, 0.003, 4)
    found = [of(e) for e in steps]
    assert abs(error_slope([abs(v - value) for v, _ in found], steps) - 2) < 0.05
    assert abs(error_slope([jnp.linalg.norm(g - gradient) for _, g in found], steps) - 2) < 0.05


def test_denoising_differences_tend_to_denoising(x64):
    """In one dimension the direction is a sign, and the difference to plain DSM falls as ε²."""
    x = ROWS[:, :1]
    exact = values(DSM(0.5, control_variate=False), wave, 1.0, x, jax.random.split(KEY())[1])
    steps = np.array([0.1, 0.03, 0.01])
    errors = [np.abs(values(FSM(e, sigma=0.5), wave, 1.0, x, KEY()) - exact).mean() for e in steps]
    assert abs(error_slope(errors, steps) - 2) < 0.05


@pytest.mark.parametrize("num_projections", [1, 3])
def test_denoising_differences_are_unbiased(num_projections, x64):
    """For a quadratic f the differences are exact, and the mean is ½(1+σ²)‖K‖² - tr K on N(0, I) data."""
    x = np.random.default_rng(4).normal(size=(100_000, 3))
    expected = 0.5 * (1 + 0.7**2) * np.sum(K**2) - np.trace(K)
    assert_mean(values(FSM(0.1, 0.7, num_projections), quadratic, K, x, KEY()), expected)


def wave(k, x):
    return jnp.sin(2 * x[:, 0]) - 0.2 * x[:, 0] ** 4


def rescaled_rugged(t, x):
    k, scale = t
    return rugged(k, x / scale)


def rescaled_wave(scale, x):
    return wave(None, x / scale)


@pytest.mark.parametrize(("bits", "sliced", "denoising"), [(64, 1e-6, 1e-8), (32, 1e-2, 1e-3)])
def test_default_step(bits, sliced, denoising):
    """Without an epsilon the values are those of derivatives, as well as the precision allows, at any scale."""
    for scale in (1e-3, 1.0, 1e3):
        with jax.enable_x64(True):  # signs are the same in both precisions
            loss = SSM(variance_reduced=False)
            exact = values(loss, rescaled_rugged, (K, scale), ROWS * scale, jax.random.split(KEY())[0])
        with jax.enable_x64(bits == 64):
            found = values(FSM(), rescaled_rugged, (K, scale), ROWS * scale, KEY())
            error = np.abs(found - exact) * scale**2
            assert np.sqrt(np.mean(error**2)) < sliced * np.std(exact * scale**2), np.sqrt(np.mean(error**2))

            x = ROWS[:, :1] * scale
            loss = DSM(0.5 * scale, control_variate=False)
            exact = values(loss, rescaled_wave, scale, x, jax.random.split(KEY())[1])
            found = values(FSM(sigma=0.5 * scale), rescaled_wave, scale, x, KEY())
            error = np.abs(found - exact)
            assert np.sqrt(np.mean(error**2)) < denoising * np.std(exact), np.sqrt(np.mean(error**2))


def separable(a, x):
    return -jnp.sum(a * x**4, -1)


def test_default_step_on_columns_of_different_scales():
    """It follows the narrowest column, whose part of the loss is the largest."""
    scale, a = np.array([300.0, 1.0, 1.0]), np.array([1e-10, 0.1, 0.1])
    loss = SSM(variance_reduced=False)
    with jax.enable_x64(True):
        exact = values(loss, separable, a, ROWS * scale, jax.random.split(KEY())[0])
    found = values(FSM(), separable, a.astype(np.float32), (ROWS * scale).astype(np.float32), KEY())
    assert np.sqrt(np.mean((found - exact) ** 2)) < 1e-2 * np.std(exact)


def lifted(c, x):
    return c - 0.5 * jnp.sum(x**2, -1)


def test_constants_and_offsets_that_swallow_the_differences(x64):
    """The default step is looked at as well: an energy or data far from zero are refused in float32."""
    with jax.enable_x64(False):
        x = ROWS.astype(np.float32)
        FSM().check(energy_of(lifted, np.float32(10.0), x))
        FSM().check(energy_of(centred, np.float32(10.0), x + np.float32(10.0)))
        for energy in (
            energy_of(lifted, np.float32(1e6), x),
            energy_of(centred, np.float32(1e5), x + np.float32(1e5)),
        ):
            with pytest.raises(ValueError, match=r"loses everything to rounding.*centre the data, take constants"):
                FSM().check(energy)
    FSM().check(energy_of(lifted, 1e6, ROWS))


def centred(c, x):
    return -0.5 * jnp.sum((x - c) ** 2, -1)


def test_steps_lost_to_rounding_are_refused():
    """In float32 a step of 1e-4 leaves nothing of second differences; the message gives one that does."""
    x = ROWS.astype(np.float32)

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            # A copy: JAX 0.10 and 0.12 take a NumPy array that a program in float32 returned for float32 ever after,
            # and fail on it in double precision (`jax.jit(lambda: K)()`, then `jax.jit(jnp.sin)(K)` with x64).
            numpyro.factor("energy", rugged(numpyro.param("k", K.copy()), x))

    with pytest.raises(ValueError, match=r"FSM with epsilon=0.0001 in float32.*take epsilon of at least 0.0"):
        FSM(1e-4)(energy_of(rugged, K.astype(np.float32), x), KEY())
    with pytest.raises(ValueError, match="loses everything to rounding"):
        ScoreMatching(model, loss=FSM(1e-4)).run(KEY(), x, progress_bar=False)
    FSM(0.03).check(energy_of(rugged, K.astype(np.float32), x))
    FSM(1e-4, sigma=0.5).check(energy_of(rugged, K.astype(np.float32), x))
    with jax.enable_x64(True):
        FSM(1e-4).check(energy_of(rugged, K, ROWS))


@pytest.mark.parametrize("loss", [FSM(), FSM(sigma=0.5), KLContraction(0.1)])
def test_differences_multiply_in_full_precision(loss):
    """Forward and in the gradient, whatever the user's setting, which holds elsewhere."""

    def product(k, x):
        return -jnp.sum((x @ k) ** 2, -1)

    def text(loss):
        total = jax.grad(lambda k: jnp.sum(loss(energy_of(product, k, ROWS.astype(np.float32)), KEY())))
        with jax.default_matmul_precision("bfloat16"):
            return jax.jit(total).lower(np.eye(3, dtype=np.float32)).as_text()

    products = [line for line in text(loss).splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products), products
    assert "HIGHEST" not in text(SSM())


# -- the KL contraction ----------------------------------------------------------------------------


def contraction_of_normals(t, tau2):
    """[E log q_t(x_t) - E log q(x)]/t for p = N(0, 1), q = N(0, τ²), and the normaliser of f left out on both sides."""
    return (0.5 * np.log(tau2 / (tau2 + t)) - (1 + t) / (2 * (tau2 + t)) + 1 / (2 * tau2)) / t


@pytest.mark.parametrize("t", [0.01, 1.0, 100.0])
def test_contraction_of_normals(t, x64, optimised):
    """The mean on N(0, 1) data is the closed form, at parameters away from the truth."""
    x, tau2 = np.random.default_rng(1).normal(size=(4000, 1)), 2.0
    draws = values(KLContraction(t, 1000), bell, 1 / tau2, x, KEY())
    # The bias of the logarithm, at most 3e-3/t, is less than half a standard error.
    assert_mean(draws, contraction_of_normals(t, tau2))


def bell(a, x):
    return -0.5 * a * x[:, 0] ** 2


def test_contraction_tends_to_the_hyvarinen_objective(x64):
    """On paper, and in the package with two samples only, whose pairs leave no bias at small t."""
    for tau2 in (0.5, 2.0):
        np.testing.assert_allclose(contraction_of_normals(1e-6, tau2), 0.5 / tau2**2 - 1 / tau2, atol=1e-5)
    x = np.random.default_rng(2).normal(size=(400_000, 1))
    draws = values(KLContraction(0.01, 2), bell, 0.5, x, KEY())
    assert_mean(draws, contraction_of_normals(0.01, 2.0))
    assert np.std(draws) / np.sqrt(len(draws)) < 0.01  # and the 1/M bias of independent samples would be 0.06


def optimum_by_quadrature(t):
    """The best a of f = -a x⁴ for the KL contraction on N(0, 1) data."""
    far = 8 * np.sqrt(1 + t)
    start, y = np.linspace(-far, far, 601), np.linspace(-8, 8, 801)
    kernel = -0.5 * (start[:, None] - y) ** 2 / t + np.log((y[1] - y[0]) / np.sqrt(2 * np.pi * t))
    weight = np.exp(-0.5 * start**2 / (1 + t))

    def objective(a):
        return weight @ logsumexp(kernel - a * y**4, axis=1) / weight.sum() + 3 * a

    return minimize_scalar(objective, bounds=(0.03, 0.12), method="bounded", options={"xatol": 1e-7}).x


@pytest.mark.slow
def test_contraction_runs_from_fisher_to_likelihood(x64, optimised):
    """For f = -a x⁴ on N(0, 1) data score matching has its optimum at 1/20 and maximum likelihood at 1/12."""
    optima = {t: optimum_by_quadrature(t) for t in (0.003, 0.3, 3.0, 1000.0)}
    assert abs(optima[0.003] - 1 / 20) < 5e-4
    assert abs(optima[1000.0] - 1 / 12) < 5e-4

    def f(a, x):
        return -a * x[:, 0] ** 4

    for t in (0.3, 3.0):
        assert 0.055 < optima[t] < 0.083

        @jax.jit
        def slopes(a, x, t=t):
            return jax.jacfwd(lambda a: KLContraction(t, 200)(energy_of(f, a, x), KEY()))(a)

        x = np.random.default_rng(3).normal(size=(40_000, 1))
        assert_mean(slopes(optima[t], x), 0.0)
        away = np.asarray(slopes(0.7 * optima[t], x))
        assert away.mean() < -8 * away.std() / np.sqrt(len(x))


def test_stabiliser_by_hand(x64):
    """The value is log(w/M + mean of exp) / t on the loss's own samples, and never below -log(M/w)/t."""
    seen = []

    def f(k, x):
        out = rugged(k, x)
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), out)
        return out

    found = KLContraction(2.0, 5, stabiliser=0.3)(energy_of(f, 9 * K, ROWS), KEY())
    jax.effects_barrier()
    by_sample = next(v for v in seen if v.size == 6 * len(ROWS)).reshape(6, -1)
    contrasts = np.concatenate([by_sample[1:] - by_sample[0], np.full((1, len(ROWS)), np.log(0.3))])
    np.testing.assert_allclose(found, (logsumexp(contrasts, axis=0) - np.log(5)) / 2.0, rtol=1e-10)
    assert (np.asarray(found) >= np.log(0.3 / 5) / 2.0).all()
    assert (np.asarray(found) < np.log(0.3 / 5) / 2.0 + 1e-3).any()
