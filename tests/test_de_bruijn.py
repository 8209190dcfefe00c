"""KL and Fisher along noise: de Bruijn's identity, its integral, and entropy from scores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, density, energy_of, improper
from scipy.integrate import quad
from scipy.special import logsumexp

from numpyro_score import Energy, de_bruijn, entropy_from_scores, score_factor
from numpyro_score.divergences.de_bruijn import _along, _heat
from numpyro_score.divergences.noised import noised_pair

KEY = jax.random.key(0)
TIMES = np.geomspace(0.02, 40.0, 10)
LONG = np.geomspace(0.002, 1000.0, 20)


def mixture(weights, means, sds):
    return dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array(weights)), dist.Normal(jnp.array(means), jnp.array(sds))
    )


def assert_within(found, expected, stderr, errors=5.0, slack=0.0):
    np.testing.assert_array_less(np.abs(np.asarray(found) - expected), errors * np.asarray(stderr) + slack)


# -- oracles on the line -----------------------------------------------------------------------------------------

LINE = np.linspace(-150.0, 150.0, 60_001)


def log_normals(law, t, x=LINE):
    """Log density and score at x of a mixture {weights, means, sds} with noise of variance t."""
    w, m, s = (np.asarray(v, float)[:, None] for v in law)
    variance = s**2 + t
    terms = np.log(w) - 0.5 * ((x - m) ** 2 / variance + np.log(2 * np.pi * variance))
    total = logsumexp(terms, axis=0)
    return total, np.sum(np.exp(terms - total) * (m - x) / variance, axis=0)


def divergences(p, q, t):
    """KL and D_F of two mixtures with noise, by the trapezoid rule."""
    (log_p, score_p), (log_q, score_q) = log_normals(p, t), log_normals(q, t)
    mass = np.exp(log_p) * (LINE[1] - LINE[0])
    return mass @ (log_p - log_q), mass @ (0.5 * (score_p - score_q) ** 2)


def normal_kl(p, q, scale, variance):
    """KL, and its derivatives in the scale and the variance of the process, of two normal laws (mean, sd)."""
    a, b = ((scale * m, scale**2 * s**2 + variance) for m, s in (p, q))
    return 0.5 * (a[1] / b[1] + (a[0] - b[0]) ** 2 / b[1] - 1 + math.log(b[1] / a[1]))


def normal_fisher(p, q, scale, variance):
    a, b = ((scale * m, scale**2 * s**2 + variance) for m, s in (p, q))
    return 0.5 * (a[1] * (1 / b[1] - 1 / a[1]) ** 2 + ((a[0] - b[0]) / b[1]) ** 2)


P, Q = (0.5, 1.0), (-1.0, 2.0)
TWO, ONE = ([0.3, 0.7], [-3.0, 3.0], [0.5, 1.0]), ([0.6, 0.4], [-2.0, 3.0], [1.0, 1.5])


def relax(t):
    """The process dX = −½ X dt + 0.8 dW."""
    return jnp.exp(-0.5 * t), -0.64 * jnp.expm1(-t)


# -- both sides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [_heat, relax])
def test_normal_laws_in_closed_form(process, x64):
    """With the expectation over (x, z) by Gauss–Hermite, all three are the closed forms to rounding."""
    node, weight = np.polynomial.hermite_e.hermegauss(8)
    u, z = (g.reshape(-1, 1) for g in np.meshgrid(node, node))
    weight = np.outer(weight, weight).ravel() / (2 * np.pi)
    p, q = (law.mixture for law in noised_pair(dist.Normal(*P), dist.Normal(*Q), KEY))
    kl, slope, fisher = (np.asarray(v) @ weight for v in _along(p, q, jnp.array(TIMES), P[0] + P[1] * u, z, process))
    for i, t in enumerate(TIMES):
        m, v = (float(c) for c in process(jnp.array(t)))
        np.testing.assert_allclose(kl[i], normal_kl(P, Q, m, v), rtol=1e-11, atol=1e-15)
        np.testing.assert_allclose(fisher[i], normal_fisher(P, Q, m, v), rtol=1e-11, atol=1e-20)
        beta2 = 1.0 if process is _heat else 0.64
        np.testing.assert_allclose(slope[i], beta2 * normal_fisher(P, Q, m, v), rtol=1e-10, atol=1e-15)


@functools.cache
def along(name):
    p, q, times, process = {
        "normal": (dist.Normal(*P), dist.Normal(*Q), LONG, None),
        "mixtures": (mixture(*TWO), mixture(*ONE), LONG, None),
        "relax": (mixture(*TWO), mixture(*ONE), np.geomspace(0.002, 10.0, 14), relax),
    }[name]
    with jax.enable_x64(True):
        return de_bruijn(p, q, times, KEY, process=process)


@pytest.mark.slow
def test_laws_in_other_dress():
    """A shifted and scaled normal law goes by a grid, and rows may be numbers."""
    shifted = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(1.0, 2.0))
    q, times = dist.Normal(0.0, 1.5), np.array([0.2, 0.5, 1.0])
    found = de_bruijn(shifted, q, times, KEY)
    for t, kl, error in zip(times, found.kl, found.kl_stderr, strict=True):
        s, r = 4.0 + t, 2.25 + t
        assert abs(kl - 0.5 * ((s + 1.0) / r - 1.0 - math.log(s / r))) < 5 * error < 0.1
    rows = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(de_bruijn(rows, q, times, KEY).kl, de_bruijn(rows[:, None], q, times, KEY).kl)


def test_mixtures_against_quadrature():
    """KL, D_F and the slope at every time; the paired difference of the two sides."""
    found = along("mixtures")
    kl, fisher = np.transpose([divergences(TWO, ONE, t) for t in LONG])
    assert_within(found.kl, kl, found.kl_stderr)
    assert_within(found.fisher, fisher, found.fisher_stderr)
    assert_within(found.slope, fisher, found.slope_stderr)
    assert_within(found.gap, 0.0, found.gap_stderr)
    np.testing.assert_allclose(found.gap, found.slope - found.fisher)


@pytest.mark.parametrize(
    ("name", "expected"), [("normal", normal_kl(P, Q, 1, 0)), ("mixtures", divergences(TWO, ONE, 0)[0])]
)
def test_integral_is_kl(name, expected):
    """Within its own errors, and these within 2%."""
    found = along(name)
    assert_within(found.integral, expected, found.integral_stderr, slack=found.integral_error)
    assert 5 * found.integral_stderr + found.integral_error < 0.1 * expected
    assert abs(found.integral / expected - 1) < 0.02


def test_relaxation_of_mixtures():
    """Along dX = −½ X dt + 0.8 dW: β² is found, the identity holds with it, and its integral is KL."""
    found = along("relax")
    np.testing.assert_allclose(found.diffusion, 0.64, rtol=1e-12)
    for i, t in enumerate(found.times):
        m, v = (float(c) for c in relax(t))
        kl, fisher = divergences(*((w, m * np.array(mu), m * np.array(sd)) for w, mu, sd in (TWO, ONE)), v)
        assert_within(found.kl[i], kl, found.kl_stderr[i], slack=1e-12)
        assert_within(found.fisher[i], fisher, found.fisher_stderr[i])
        assert_within(found.slope[i], 0.64 * fisher, found.slope_stderr[i])
    assert_within(found.gap, 0.0, found.gap_stderr)
    expected = divergences(TWO, ONE, 0)[0]
    assert_within(found.integral, expected, found.integral_stderr, slack=found.integral_error)
    assert abs(found.integral / expected - 1) < 0.02


def test_mixtures_in_the_plane(x64):
    """Densities with noise are NumPyro's with the covariance added; the two sides agree; times of their own give KL."""
    means = jnp.array([[-1.0, 0.0], [2.0, 1.0]])
    covariances = jnp.array([[[1.0, 0.6], [0.6, 0.5]], [[0.3, -0.1], [-0.1, 1.2]]])
    weights = dist.Categorical(probs=jnp.array([0.2, 0.8]))

    def law(t):
        return dist.MixtureSameFamily(weights, dist.MultivariateNormal(means, covariances + t * jnp.eye(2)))

    other = dist.Normal(jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0])).to_event(1)
    mixed, plain = noised_pair(law(0.0), other, KEY)
    x = jax.random.normal(KEY, (20, 2))
    one, t = jnp.ones(()), jnp.array(0.7)
    noisy = dist.Normal(other.mean, jnp.sqrt(other.variance + 0.7)).to_event(1)
    for mixture, expected in ((mixed.mixture, law(0.7)), (plain.mixture, noisy)):
        found = jax.jit(jax.vmap(lambda x, mixture=mixture: mixture.log_density(x, one, t)))(x)
        np.testing.assert_allclose(found, jax.jit(expected.log_prob)(x), rtol=1e-12)
    draws = np.asarray(mixed.mixture.sample(KEY, 20_000))
    second = np.einsum("k,kij->ij", [0.2, 0.8], covariances + means[:, :, None] * means[:, None])
    assert_mean(draws, np.array([0.2, 0.8]) @ means)
    assert_mean(draws[:, :, None] * draws[:, None], second)
    found = de_bruijn(law(0.0), other, None, KEY, num_samples=20_000)
    assert_within(found.gap, 0.0, found.gap_stderr)
    y = mixed.mixture.sample(jax.random.key(1), 20_000)
    none = jnp.zeros(())
    ratio = np.asarray(jax.jit(jax.vmap(lambda y: mixed.mixture.log_density(y, one, none) - other.log_prob(y)))(y))
    stderr = math.hypot(found.integral_stderr, ratio.std() / math.sqrt(len(ratio)))
    assert_within(found.integral, ratio.mean(), stderr, slack=found.integral_error)


# -- laws on a grid, and data --------------------------------------------------------------------------------------


def double_well(theta, x):
    return -theta * (x**2 - 4) ** 2


def with_noise(log_density, t):
    """Log density of a law on the line with noise, up to a constant, and its score, at points x."""
    nodes = np.linspace(-60, 60, 4001)
    log_mass = log_density(nodes)
    log_mass = log_mass - logsumexp(log_mass)

    def at(x):
        terms = log_mass - 0.5 * (x[:, None] - nodes) ** 2 / t
        total = logsumexp(terms, axis=-1)
        mean = np.exp(terms - total[:, None]) @ nodes
        return total - 0.5 * math.log(2 * math.pi * t), (mean - x) / t

    return at


@pytest.mark.slow
def test_energies_and_other_laws_on_the_line(optimised):
    """A double well against the logistic law: both sides, and their integral against KL by quadrature."""
    well = energy_of(double_well, 0.2, np.linspace(-2.5, 2.5, 50))
    wide = dist.Logistic(0.5, 1.5)
    log_well, log_wide = (lambda x: -0.2 * (x**2 - 4) ** 2), (lambda x: np.asarray(wide.log_prob(x)))
    z = quad(lambda x: math.exp(log_well(x)), -6, 6)[0]
    expected = quad(lambda x: math.exp(log_well(x)) / z * (log_well(x) - math.log(z) - log_wide(x)), -6, 6)[0]
    found = de_bruijn(well, wide, None, KEY, num_samples=4000)
    assert_within(found.gap, 0.0, found.gap_stderr, slack=1e-5)
    assert_within(found.integral, expected, found.integral_stderr, slack=found.integral_error)
    assert 5 * found.integral_stderr + found.integral_error < 0.1 * expected
    x = np.linspace(-40, 40, 801)
    for i in (0, 5, 10):
        (log_p, score_p), (log_q, score_q) = (with_noise(f, found.times[i])(x) for f in (log_well, log_wide))
        mass = np.exp(log_p) * (x[1] - x[0])
        assert_within(found.kl[i], mass @ (log_p - log_q), found.kl_stderr[i], slack=1e-5)
        assert_within(found.fisher[i], mass @ (0.5 * (score_p - score_q) ** 2), found.fisher_stderr[i], slack=1e-5)


@pytest.mark.slow
def test_energies_in_the_plane(optimised):
    """A normal energy against its closed form, in single precision; log Z plays no part."""
    k = np.array([[2.0, 0.8], [0.8, 1.0]], np.float32)
    rows = np.linalg.solve(np.linalg.cholesky(k).T, np.random.default_rng(0).normal(size=(2, 60))).T
    energy = energy_of(lambda k, x: 7.0 - 0.5 * jnp.einsum("ni,ij,nj->n", x, k, x), k, rows)
    p = dist.Normal(jnp.array([0.5, 0.0]), 1.0).to_event(1)
    expected = 0.5 * (np.trace(k) + 0.25 * k[0, 0] - 2 - np.log(np.linalg.det(k)))
    times = np.geomspace(0.04, 300, 12)
    found = de_bruijn(p, energy, times, KEY, num_samples=1000)
    assert_within(found.integral, expected, found.integral_stderr, slack=found.integral_error)
    for i, t in enumerate(times):
        a, b = np.eye(2) * (1 + t), np.linalg.inv(k) + t * np.eye(2)
        inverse, mean = np.linalg.inv(b), np.array([0.5, 0.0])
        kl = 0.5 * (np.trace(inverse @ a) + mean @ inverse @ mean - 2 + np.log(np.linalg.det(b) / np.linalg.det(a)))
        assert_within(found.kl[i], kl, found.kl_stderr[i], slack=1e-5)
    with pytest.raises(ValueError, match=r"resolves noise of variance .* begin later"):
        de_bruijn(p, energy, [1e-6, 1e-3, 1.0], KEY)


def test_data_are_points_of_equal_weight(x64):
    """Rows as p are the mixture of zero width; no density, so infinitely far at t = 0."""
    rows = np.random.default_rng(0).normal(size=(7, 1))
    found = de_bruijn(rows, mixture(*ONE), TIMES, KEY)
    points = (np.full(7, 1 / 7), rows[:, 0], np.zeros(7))
    kl, fisher = np.transpose([divergences(points, ONE, t) for t in TIMES])
    assert_within(found.kl, kl, found.kl_stderr)
    assert_within(found.fisher, fisher, found.fisher_stderr)
    assert_within(found.gap, 0.0, found.gap_stderr)
    assert found.integral == found.before == math.inf and found.beyond == found.kl[-1]


# -- entropy -------------------------------------------------------------------------------------------------------


def noisy_mixture(x, sigma=1.0):
    """The law TWO, and its exact density at each noise level."""
    w, m, s = (jnp.array(v) for v in TWO)
    law = dist.Normal(m, jnp.sqrt(s**2 + jnp.asarray(sigma)[..., None] ** 2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", 3.0 + jax.nn.logsumexp(jnp.log(w) + law.log_prob(x), axis=-1))


def noisy_normal(x, sigma=1.0):
    """The law Q, and its density at each noise level."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * (x[:, 0] - Q[0]) ** 2 / (Q[1] ** 2 + sigma**2))


def draws_of_two(n):
    rng = np.random.default_rng(1)
    k = rng.choice(2, n, p=TWO[0])
    return (np.array(TWO[1])[k] + np.array(TWO[2])[k] * rng.normal(size=n))[:, None]


def test_entropy_from_exact_scores(x64):
    """The entropy of a mixture, and its growth at every time, which is ½ E‖∇log p_t‖²."""
    x = draws_of_two(20_000)
    found = entropy_from_scores(x, Energy(noisy_mixture, {}, x), LONG, KEY)
    log_p, _ = log_normals(TWO, 0.0)
    entropy = -np.exp(log_p) @ log_p * (LINE[1] - LINE[0])
    assert_within(found.value, entropy, found.stderr, slack=found.integral_error)
    assert 5 * found.stderr + found.integral_error < 0.05
    for t, rate, stderr in zip(LONG, found.production, found.production_stderr, strict=True):
        log_p, score = log_normals(TWO, t)
        assert_within(rate, np.exp(log_p) @ (0.5 * score**2) * (LINE[1] - LINE[0]), stderr)


def test_scores_of_another_law_give_the_cross_entropy(x64):
    """−E log q, without log Z: the bound lies KL(p‖q) above the entropy."""
    x = draws_of_two(20_000)
    found = entropy_from_scores(x, Energy(noisy_normal, {}, x), LONG, KEY)
    expected = -np.mean(-0.5 * ((x - Q[0]) / Q[1]) ** 2 - math.log(Q[1]) - 0.5 * math.log(2 * math.pi))
    rows = 0.5 * ((x - Q[0]) / Q[1]) ** 2
    stderr = math.hypot(found.stderr, rows.std() / math.sqrt(len(rows)))
    assert_within(found.value, expected, stderr, slack=found.integral_error)


def slow_parzen(x, z, times, h):
    """The estimate of a fixed sample, row by row."""
    mean, variance, total = x.mean(), x.var(ddof=1), 0.0
    steps = np.diff(np.log(times))
    for i in range(len(x)):
        others = np.delete(x, i)

        def values(t, others=others, i=i):
            def parzen(y):
                weight = np.exp(-0.5 * (y - others) ** 2 / max(t, h**2))
                return weight @ (others - y) / max(t, h**2) / weight.sum()

            def normal(y):
                return (mean - y) / (variance + t)

            ends = x[i] + math.sqrt(t) * z[i], x[i] - math.sqrt(t) * z[i]
            of = [
                0.25 * (s(ends[0]) ** 2 + s(ends[1]) ** 2) + z[i] * (s(ends[0]) - s(ends[1])) / (2 * math.sqrt(t))
                for s in (normal, parzen)
            ]
            return of[0] - of[1]

        d = np.array([values(t) for t in times])
        slope = (d[1] - d[0]) / (times[1] - times[0])
        before = times[0] * (d[0] - 0.5 * slope * times[0])
        within = np.sum(0.5 * steps * (times[1:] * d[1:] + times[:-1] * d[:-1]))
        total += 0.5 * (x[i] - mean) ** 2 / variance + 0.5 * math.log(2 * math.pi * variance) - before - within
    return total / len(x)


def test_parzen_score_against_the_slow_way(x64):
    x = np.random.default_rng(0).normal(size=(25, 1))
    found = entropy_from_scores(x, None, TIMES, KEY, bandwidth=0.5)
    z = np.asarray(jax.random.normal(KEY, (25, 1)))[:, 0]
    np.testing.assert_allclose(found.value, slow_parzen(x[:, 0], z, TIMES, 0.5), rtol=1e-10)


@pytest.mark.slow
def test_parzen_bound_of_a_normal_law(optimised):
    """In two dimensions: above the entropy, and closer with more rows, at the default bandwidth."""
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]])
    entropy = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * covariance))
    x = np.random.default_rng(0).multivariate_normal([1.0, 0.0], covariance, 3000)
    few, many = (entropy_from_scores(rows, None, None, KEY) for rows in (x[:200], x))
    for found in (few, many):
        assert found.value > entropy - 5 * found.stderr - found.integral_error
    assert abs(many.value - entropy) < 5 * many.stderr + 0.05
    exact = 0.5 * np.trace(np.linalg.inv(covariance + many.times[:, None, None] * np.eye(2)), axis1=1, axis2=2)
    assert_within(many.production[-5:], exact[-5:], many.production_stderr[-5:])


# -- refusals ------------------------------------------------------------------------------------------------------


def only_score(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        score_factor("score", x, -x)


NORMAL, ROWS = dist.Normal(0.0, 1.0), np.linspace(-1, 1, 9)[:, None]
REFUSED = {
    "two laws at once": ((dist.Normal(jnp.zeros(2), 1.0), NORMAL), r"batch shape \(2,\).*to_event", ValueError),
    "unequal": ((NORMAL, NORMAL.expand([2]).to_event(1)), "p has 1 dimensions and q has 2", ValueError),
    "positive": ((NORMAL, dist.Gamma(2.0, 1.0)), "off its support", NotImplementedError),
    "many dimensions": (
        (dist.StudentT(3.0).expand([3]).to_event(1), NORMAL.expand([3]).to_event(1)),
        "3 dimensions.*up to 2",
        NotImplementedError,
    ),
    "Cauchy": ((NORMAL, dist.Cauchy(0.0, 1.0)), "No grid", ValueError),
    "NaN in data": ((np.array([[np.nan]]), NORMAL), "finite rows", ValueError),
    "cubes": ((np.zeros((5, 1, 1)), NORMAL), r"finite rows .* shape \(5, 1, 1\)", ValueError),
    "a score alone": ((Energy(only_score, {}, ROWS), NORMAL), "score_factor", TypeError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_laws(case):
    laws, message, error = REFUSED[case]
    with pytest.raises(error, match=message):
        de_bruijn(*laws, TIMES, KEY)


@pytest.mark.parametrize("times", [[0.0, 1.0, 2.0], [1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, np.inf], [[1.0, 2.0, 3.0]]])
def test_refused_times(times):
    with pytest.raises(ValueError, match="three or more increasing positive"):
        de_bruijn(NORMAL, NORMAL, times, KEY)
    with pytest.raises(ValueError, match="three or more increasing positive"):
        entropy_from_scores(ROWS, None, times, KEY)


def test_refused_settings():
    with pytest.raises(ValueError, match="give times"):
        de_bruijn(ROWS, NORMAL, None, KEY)
    with pytest.raises(ValueError, match="give times with a process"):
        de_bruijn(NORMAL, NORMAL, None, KEY, process=relax)
    with pytest.raises(ValueError, match="must not fall"):
        de_bruijn(NORMAL, dist.Normal(1.0, 1.0), TIMES, KEY, process=lambda t: (1.0, 1 / t))
    with pytest.raises(ValueError, match="num_samples"):
        de_bruijn(NORMAL, NORMAL, TIMES, KEY, num_samples=1)
    with pytest.raises(ValueError, match="fewer dimensions"):
        entropy_from_scores(np.repeat(ROWS, 2, axis=1), None, TIMES, KEY)
    with pytest.raises(ValueError, match="N > D"):
        entropy_from_scores(ROWS[:2], None, TIMES, KEY)
    with pytest.raises(ValueError, match="bandwidth"):
        entropy_from_scores(ROWS, None, TIMES, KEY, bandwidth=-1.0)
    noisy = Energy(noisy_normal, {}, ROWS)
    with pytest.raises(ValueError, match="Parzen"):
        entropy_from_scores(ROWS, noisy, TIMES, KEY, bandwidth=1.0)
    with pytest.raises(ValueError, match="squares"):
        entropy_from_scores(ROWS, noisy, None, KEY)
    with pytest.raises(TypeError, match="leave it out"):
        entropy_from_scores(ROWS, noisy.bind(sigma=1.0), TIMES, KEY)
    with pytest.raises(TypeError, match="no keyword 'sigma'"):
        entropy_from_scores(ROWS, Energy(density(double_well), {"theta": 1.0}, ROWS[:, 0]), TIMES, KEY)
