"""The kernel Stein discrepancy: its value, and the test's level and power."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from models import FAST_COMPILE, assert_mean, assert_variance, energy_of
from numpyro.distributions import constraints
from scipy import integrate, stats
from test_divergences import SCORE, chains, gaussian, on
from test_supports import sphere_points

from numpyro_score import Energy, kernel_stein_discrepancy
from numpyro_score.divergences.law import Draws, thin
from numpyro_score.divergences.pairs import median_distance
from numpyro_score.divergences.stein import _free_scores, _stein_kernel, stein_kernel, stein_statistic

FALSE_ALARM = 2e-5
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def double_well(theta, x):
    return theta * jnp.sum(x**2, -1) - 0.3 * jnp.sum(x**4, -1) - x[:, 0] * x[:, 1]


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def pairs(x, scores, length):
    """The Stein kernel of all pairs, from derivatives of the kernel by JAX."""

    def k(a, b):
        return (1 + jnp.sum((a - b) ** 2) / length**2) ** -0.5

    def h(a, s, b, t):
        mixed = jnp.trace(jax.jacfwd(jax.grad(k), argnums=1)(a, b))
        return s @ t * k(a, b) + s @ jax.grad(k, 1)(a, b) + t @ jax.grad(k)(a, b) + mixed

    return jax.vmap(jax.vmap(h, (None, None, 0, 0)), (0, 0, None, None))(x, scores, x, scores)


def obvious(x, log_density, length):
    """The mean over different rows, written out."""
    h = np.asarray(pairs(x, jax.jit(jax.vmap(jax.grad(log_density)))(x), length))
    n = len(h)
    return np.mean([h[i, j] for i in range(n) for j in range(n) if i != j])


def test_value_at_given_rows(x64):
    """Of an energy; the median distance is the default."""
    x = jnp.asarray(RNG.normal(size=(6, 2)))
    found = kernel_stein_discrepancy(x, energy_of(double_well, 1.2, x), KEY)
    length = np.median([np.linalg.norm(x[i] - x[j]) for i in range(6) for j in range(i)])
    assert found.bandwidth == pytest.approx(length)
    assert found.value == pytest.approx(obvious(x, lambda r: double_well(1.2, r[None])[0], length), rel=1e-9)


@pytest.mark.parametrize(
    ("law", "x"),
    [
        (dist.Gamma(2.5, 2.0).expand([2]).to_event(1), np.random.default_rng(1).gamma(2.5, 0.5, (6, 2))),
        (dist.Dirichlet(np.array([2.5, 2.0, 0.7])), np.random.default_rng(1).dirichlet([2.5, 2.0, 0.7], 6)),
    ],
    ids=["box", "simplex"],
)
def test_value_in_free_coordinates(law, x, x64):
    """Those of NumPyro's `biject_to`, whatever the rows of the energy are."""
    free = dist.biject_to(law.support)
    found = kernel_stein_discrepancy(x, law, KEY, bandwidth=0.7)

    def log_density(u):
        return law.log_prob(free(u)) + jnp.sum(free.log_abs_det_jacobian(u, free(u)))

    assert found.value == pytest.approx(obvious(jax.jit(lambda x: free.inv(x))(x), log_density, 0.7))


def test_closed_form_for_the_standard_normal():
    """KSD² of N(m, I) from N(0, I) is ‖m‖² E(1 + 2χ²_D/ℓ²)^{-1/2}, as their scores differ by m everywhere."""
    length, mean = 1.5, np.array([0.5, 0.3, 0.2])
    factor = integrate.quad(lambda r: stats.chi2(3).pdf(r) * (1 + 2 * r / length**2) ** -0.5, 0, np.inf)[0]
    q = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    found = kernel_stein_discrepancy(mean + RNG.normal(size=(3000, 3)), q, KEY, bandwidth=length, num_bootstrap=20)
    assert 0 < found.stderr < 0.1 * mean @ mean
    assert abs(found.value - mean @ mean * factor) < 5 * found.stderr


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def run_tests(rows, key):
    """Tests of many sets of rows against N(0, I), at the default bandwidth."""

    def one(given):
        x, key = given
        length = median_distance(x)
        return stein_statistic(stein_kernel("imq"), (x / length, -length * x), key, 200)

    return jax.lax.map(one, (rows, jax.random.split(key, len(rows))), batch_size=50)


REPLICATIONS = RNG.normal(size=(600, 80, 2))


def test_level():
    """The p-value is uniform where p is q, and the value's mean zero. Its error is then too large, by less than √2."""
    value, stderr, pvalue = map(np.asarray, run_tests(REPLICATIONS, KEY))
    assert stats.kstest(pvalue, "uniform").pvalue > FALSE_ALARM
    assert_mean(value, 0.0)
    assert 1 < np.mean(stderr.astype(float) ** 2) / value.var() < 2


def test_power():
    """A mean of (0.35, 0.35) is found at level 0.05 by 80 rows with power 0.9 at least."""
    value, stderr, pvalue = map(np.asarray, run_tests(REPLICATIONS + 0.35, KEY))
    assert np.mean(pvalue <= 0.05) > 0.9
    assert_variance(value, np.mean(stderr.astype(float) ** 2))


def test_correlated_draws_are_thinned():
    """The p-value of thinned chains is uniform, too; that of all their draws is not."""
    draws = chains(KEY, 0.7, 200 * 8, 400, 2)["posterior"]["x"].values.reshape(200, 8, 400, 2)
    thinned = [np.asarray(thin(Draws(jnp.asarray(d), False)))[:80] for d in draws]
    assert stats.kstest(run_tests(np.stack(thinned), KEY)[2], "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(run_tests(draws[:, 0, :80], KEY)[2], "uniform").pvalue < FALSE_ALARM


@pytest.mark.slow
def test_an_energy_is_drawn_from():
    """Both sides are energies: the same one is not told apart, and another one is; chains are thinned."""
    p = gaussian(0, "draws of an energy")
    same = kernel_stein_discrepancy(p, gaussian(0, "energy"), KEY)
    other = kernel_stein_discrepancy(p, gaussian(1, "energy"), KEY)
    assert same.pvalue > 1e-3 >= other.pvalue and other.value > 5 * other.stderr
    assert same.num_rows < 4000


def test_score_terms():
    """A score network that is that of the standard normal law."""
    x = RNG.normal(size=(200, 2))
    found = kernel_stein_discrepancy(x, SCORE, KEY)
    normal = kernel_stein_discrepancy(x, dist.Normal(0.0, 1.0).expand([2]).to_event(1), KEY)
    np.testing.assert_allclose(found, normal, rtol=1e-4)


THETA = np.array([1.0, -2.0, 0.5])
SPHERE = Energy(on(constraints.sphere, lambda x: x @ THETA, 3), {}, np.eye(3))
CIRCLE = Energy(on(constraints.circular, lambda x: 2 * jnp.cos(x - 1)), {}, np.zeros(3))


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
@pytest.mark.parametrize("energy", [SPHERE, CIRCLE], ids=["sphere", "circle"])
def test_spheres(energy, kernel, x64):
    """Written out by projected derivatives, and with mean zero under the law itself, by quadrature."""
    angles = np.linspace(-np.pi, np.pi, 60, endpoint=False)
    nodes, weight = sphere_points(30) if energy is SPHERE else (angles, np.ones(60))
    points = nodes if energy is SPHERE else np.stack([np.cos(nodes), np.sin(nodes)], -1)
    theta, d, length = (THETA, 3, 0.9) if energy is SPHERE else (2 * np.array([np.cos(1), np.sin(1)]), 2, 0.9)
    u, b = _free_scores(energy, jnp.asarray(nodes.reshape(len(nodes), -1)), spheres=((0, d),))
    np.testing.assert_allclose(u, points, atol=1e-12)

    def k(x, y):
        squared = jnp.sum((x - y) ** 2) / length**2
        return (1 + squared) ** -0.5 if kernel == "imq" else jnp.exp(-0.5 * squared)

    def project(x):
        return jnp.eye(d) - jnp.outer(x, x)

    def written_out(x, y):
        b, c = project(x) @ theta - (d - 1) * x, project(y) @ theta - (d - 1) * y
        mixed = jnp.trace(project(x) @ jax.jacfwd(jax.grad(k), argnums=1)(x, y) @ project(y))
        return b @ c * k(x, y) + b @ project(y) @ jax.grad(k, 1)(x, y) + c @ project(x) @ jax.grad(k)(x, y) + mixed

    q, u, b = weight * np.exp(points @ theta), np.asarray(u), np.asarray(b)
    every = 97 if energy is SPHERE else 7
    some = np.concatenate([points[[3, 17]], points[::every]])
    expected = np.asarray(jax.jit(jax.vmap(jax.vmap(written_out, (None, 0)), (0, None)))(some, points))
    ours = jax.jit(functools.partial(_stein_kernel, kernel, ((0, d),)))
    for i, of_i in zip((3, 17), expected, strict=False):
        h = np.asarray(ours((u[i] / length, length * b[i]), (u / length, length * b))) / length**2
        np.testing.assert_allclose(h, of_i, rtol=1e-9, atol=1e-9)
        assert abs(q @ h) < 1e-8 * (q @ np.abs(h))
    found = kernel_stein_discrepancy(nodes[::every], energy, KEY, kernel=kernel, bandwidth=length, num_bootstrap=10)
    table = expected[2:, ::every]
    n = len(table)
    np.testing.assert_allclose(found.value, (table.sum() - np.trace(table)) / (n * (n - 1)), rtol=1e-9)


def test_gaussian_kernel_and_default_bandwidth():
    """For the standard normal law h = k (x·y − ‖x − y‖²/ℓ² + (D − ‖x − y‖²/ℓ²)/ℓ²)."""
    x = RNG.normal(size=(5, 2))
    q = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    found = kernel_stein_discrepancy(x, q, KEY, kernel="gaussian", num_bootstrap=10)
    length = float(median_distance(x))
    assert found.bandwidth == pytest.approx(length)
    u = x[:, None] - x
    squared = np.sum(u**2, -1) / length**2
    h = np.exp(-squared / 2) * (x @ x.T - squared + (2 - squared) / length**2)
    assert found.value == pytest.approx((h.sum() - np.trace(h)) / 20, rel=1e-4)


CUSP = Energy(on(constraints.real, lambda x: -jnp.sqrt(jnp.abs(x))), {}, np.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernel_stein_discrepancy(np.ones(5), CUSP, KEY, kernel="rbf"), ValueError, "has no kernel 'rbf'"),
        (
            lambda: kernel_stein_discrepancy(np.arange(5.0), CUSP, KEY),
            ValueError,
            "q is not finite at p's row 0",
        ),
        (lambda: kernel_stein_discrepancy(np.ones(5), CUSP, KEY), ValueError, "give kernel_stein_discrepancy a bandw"),
        (lambda: kernel_stein_discrepancy(np.arange(3.0), CUSP, KEY), ValueError, "at least four independent rows"),
        (lambda: kernel_stein_discrepancy(np.ones(5), CUSP, KEY, bandwidth=-1.0), ValueError, "positive bandwidth"),
        (lambda: kernel_stein_discrepancy(np.ones(5), CUSP, KEY, num_bootstrap=0), ValueError, "num_bootstrap of at"),
        (
            lambda: kernel_stein_discrepancy(np.array([0.0, 0.5, 1.0, 0.2]), dist.Uniform(0.0, 1.0), KEY),
            ValueError,
            "boundary of the support, is not finite at p's rows 0, 2",
        ),
    ],
)
def test_refused(call, error, message, unchecked):
    """Each with its site, argument or rows."""
    with pytest.raises(error, match=message):
        call()
