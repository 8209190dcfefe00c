"""The normaliser: quadrature, sequential Monte Carlo, noise-contrastive estimation, flows against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, energy_of
from numpyro.distributions import constraints
from scipy.integrate import quad
from scipy.signal import lfilter
from scipy.special import gammaln, ive

from numpyro_score import Energy, log_partition, score_factor
from numpyro_score.normaliser.bridge import _bridge
from numpyro_score.normaliser.smc import Run, _summary

LOG_2PI = math.log(2 * math.pi)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def on(support, f, *shape):
    """A model of rows with a support of their own."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), shape), obs=x)
            numpyro.factor("energy", f(x))

    return model


# -- quadrature on the line ------------------------------------------------------------------------


def line(t, x):
    """Two normal modes, a power-law tail and a quartic, each with a coefficient, so that all compile once."""
    z = (x[:, None] - t["m"]) / t["s"]
    modes = jax.scipy.special.logsumexp(-0.5 * z**2 - jnp.log(t["s"]), axis=-1)
    quartic = jnp.where(t["quartic"] == 0, 0.0, -t["quartic"] * x**4)  # not 0 · ∞ far out
    return t["modes"] * modes - t["tail"] * jnp.log1p(z[:, 0] ** 2) + quartic + t["offset"]


def of_line(x, m=(0.0, 0.0), s=(1.0, 1.0), modes=0.0, tail=0.0, quartic=0.0, offset=0.0):
    theta = dict(m=np.array(m), s=np.array(s), modes=modes, tail=tail, quartic=quartic, offset=offset)
    return energy_of(line, theta, np.resize(np.asarray(x, float), 60))


def around(*places, scale=1.0):
    return np.concatenate([p + scale * RNG.normal(size=30) for p in places])


TWO = 0.5 * LOG_2PI + math.log(2)  # two modes, each with the mass of a normal law
LINES = {
    "normal": (of_line(around(0), modes=1.0), TWO),
    "narrow and far, data elsewhere": (of_line([0.0], (1e3, 1e3), (1e-3, 1e-3), modes=1.0), TWO),
    "wide": (of_line([0.0], s=(1e3, 1e3), modes=1.0), TWO),
    "modes 20 sd apart": (of_line(around(-10, 10), (-10, 10), modes=1.0), TWO),
    "modes 2000 sd apart": (of_line(around(-1e3, 1e3), (-1e3, 1e3), modes=1.0), TWO),
    "a spike in a broad mode": (
        of_line(np.append(around(0), 3.3 + 1e-3 * RNG.normal(size=30)), (0, 3.3), (1.0, 1e-3), modes=1.0),
        TWO,
    ),
    "Cauchy": (of_line(RNG.standard_cauchy(60), tail=1.0), math.log(math.pi)),
    "Cauchy far from the data": (of_line([0.0], (3e4, 0), (10, 1), tail=1.0), math.log(10 * math.pi)),
    "tail of power 1.5": (
        of_line(around(0), tail=0.75),
        0.5 * math.log(math.pi) + math.lgamma(0.25) - math.lgamma(0.75),
    ),
    "quartic": (of_line(around(0), quartic=1.0), math.log(2 * math.gamma(1.25))),
    "large offset": (of_line(around(0), modes=1.0, offset=1e4), TWO + 1e4),
}


@pytest.mark.parametrize("case", LINES)
def test_quadrature_on_the_line(case, x64):
    """Right to 1e-9, and within the error that it states."""
    energy, expected = LINES[case]
    result = log_partition(energy, "quadrature")
    assert abs(result.value - expected) < 1e-9 + 1e-15 * abs(expected)
    assert abs(result.value - expected) < 3 * result.stderr < 1e-6


@pytest.mark.parametrize("case", [c for c in LINES if "narrow" not in c])
def test_quadrature_in_single_precision(case):
    """Within the error that it states, which includes the rounding of f and x."""
    energy, expected = LINES[case]
    result = log_partition(energy, "quadrature")
    assert abs(result.value - expected) < result.stderr < 0.01


def test_what_single_precision_cannot_resolve():
    """At 1000 with scale 0.001 the floats are 0.06 standard deviations apart."""
    with pytest.raises(ValueError, match=r"rounding.*enable double precision"):
        log_partition(LINES["narrow and far, data elsewhere"][0], "quadrature")


def gamma_law(a):
    rows = RNG.gamma(a, 1 / 3, 500).clip(1e-30).astype(np.float32)
    model = on(constraints.positive, lambda x: (a - 1) * jnp.log(x) - 3 * x)
    return Energy(model, {}, rows), gammaln(a) - a * math.log(3)


def test_mass_that_single_precision_cannot_reach():
    """Of a gamma law of shape a, the share P(x < 1.2e-38), about e^(−87a), is nearer to 0 than floats come."""
    energy, expected = gamma_law(0.1)
    result = log_partition(energy, "quadrature")
    assert 1e-4 < abs(result.value - expected) < result.stderr < 1e-2
    with pytest.raises(ValueError, match=r"rounding.*enable double precision"):
        log_partition(gamma_law(0.03)[0], "quadrature")


@pytest.mark.parametrize(
    "settings", [{}, {"tail": 0.5}, {"modes": -1.0}, {"quartic": -1.0}], ids=["flat", "1/|x|", "growing", "quartic"]
)
@pytest.mark.parametrize("method", ["quadrature", "smc", "nce", "flow"])
def test_improper_densities(method, settings):
    """Every method says so."""
    with pytest.raises(ValueError, match=r"not normalisable|grows without bound"):
        log_partition(of_line(around(0), **settings), method, KEY)


# -- quadrature elsewhere --------------------------------------------------------------------------

ALPHA = np.array([1.5, 2.0, 0.7])
K = np.array([[1.0, 0.95], [0.95, 1.0]])
DIRECTION = np.array([0.6, 0.0, 0.8])


def sphere(n, d):
    x = RNG.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_fisher(d, k):
    """log ∫ exp(k μ·x) over the sphere in R^d."""
    return d / 2 * LOG_2PI + math.log(ive(d / 2 - 1, k)) + k - (d / 2 - 1) * math.log(k)


ELSEWHERE = {
    "correlated normal": (
        on(constraints.real_vector, lambda x: -0.5 * jnp.sum(x * jnp.linalg.solve(K, x.T).T, -1), 2),
        lambda: RNG.multivariate_normal(np.zeros(2), K, 60),
        LOG_2PI + 0.5 * math.log(np.linalg.det(K)),
    ),
    "Student's t in 3 dimensions": (
        on(constraints.real_vector, lambda x: -3 * jnp.log1p(jnp.sum(x**2, -1) / 3), 3),
        lambda: RNG.normal(size=(60, 3)),
        math.lgamma(1.5) - math.lgamma(3) + 1.5 * math.log(3 * math.pi),
    ),
    "exponential": (
        on(constraints.positive, lambda x: -3 * x),
        lambda: RNG.exponential(size=60) / 3,
        -math.log(3),
    ),
    "truncated normal": (
        on(constraints.greater_than(2.0), lambda x: -0.5 * x**2),
        lambda: 2 + RNG.exponential(size=60) / 3,
        math.log(math.erfc(math.sqrt(2)) * math.sqrt(math.pi / 2)),
    ),
    "truncated above": (
        on(constraints.less_than(np.array([1.0, 2.0])), lambda x: jnp.sum(x, -1), 2),
        lambda: np.array([1.0, 2.0]) - RNG.exponential(size=(60, 2)),
        3.0,
    ),
    "beta": (
        on(constraints.unit_interval, lambda x: jnp.log(x) + 2 * jnp.log1p(-x)),
        lambda: RNG.beta(2, 3, 60),
        -math.log(12),
    ),
    "von Mises": (
        on(constraints.circular, lambda x: 4 * jnp.cos(x - 3)),
        lambda: RNG.vonmises(3, 4, 60),
        LOG_2PI + math.log(ive(0, 4)) + 4,
    ),
    "von Mises-Fisher": (
        on(constraints.sphere, lambda x: 20 * x @ DIRECTION, 3),
        lambda: sphere(60, 3),
        log_fisher(3, 20),
    ),
    "uniform on the sphere in R^4": (
        on(constraints.sphere, lambda x: 0 * x[:, 0], 4),
        lambda: sphere(60, 4),
        math.log(2 * math.pi**2),
    ),
    "Dirichlet": (
        on(constraints.simplex, lambda x: jnp.log(x) @ (ALPHA - 1), 3),
        lambda: RNG.dirichlet(ALPHA, 60),
        gammaln(ALPHA).sum() - gammaln(ALPHA.sum()),
    ),
    "ordered pair": (  # half of the plane
        on(constraints.ordered_vector, lambda x: -0.5 * jnp.sum(x**2, -1), 2),
        lambda: np.sort(RNG.normal(size=(60, 2))),
        LOG_2PI - math.log(2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ELSEWHERE)
def test_quadrature_elsewhere(case, x64):
    """Bounded supports, spheres, circles, simplices, other supports: the measure is that of NumPyro's densities."""
    model, data, expected = ELSEWHERE[case]
    result = log_partition(Energy(model, {}, data()))
    assert result.method == "quadrature"
    assert abs(result.value - expected) < max(3 * result.stderr, 1e-12) < 1e-6


def test_two_sites_in_a_row(x64):
    """A picture of one number and a positive number, which depends on it."""

    def model(x, y):
        with numpyro.plate("rows", len(y)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (1, 1)), obs=x)
            y = numpyro.sample("y", dist.ImproperUniform(constraints.positive, (), ()), obs=y)
            numpyro.factor("energy", -0.5 * x[:, 0, 0] ** 2 - y * (1 + x[:, 0, 0] ** 2))

    expected = quad(lambda x: math.exp(-0.5 * x**2) / (1 + x**2), -np.inf, np.inf)[0]
    result = log_partition(Energy(model, {}, RNG.normal(size=(40, 1, 1)), RNG.exponential(size=40)))
    np.testing.assert_allclose(result.value, math.log(expected), atol=1e-9)


def test_axes_have_spacings_of_their_own():
    """A row far out on one axis, where the density is sharp, asks for a fine grid along this axis alone."""

    def model(x, y):
        with numpyro.plate("rows", len(y)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            y = numpyro.sample("y", dist.ImproperUniform(constraints.positive, (), ()), obs=y)
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) - y - 0.2 * x[:, 0] * jnp.sqrt(y) - 0.1 * y**2)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 2)), np.append(rng.exponential(size=49), 9.0)
    expected = 2 * math.pi * quad(lambda y: math.exp(-y - 0.1 * y**2 + 0.02 * y), 0, np.inf)[0]
    result = log_partition(Energy(model, {}, x, y))
    assert abs(result.value - math.log(expected)) < 3 * result.stderr < 1e-3
    assert result.diagnostics["points"] < 300_000


# -- sequential Monte Carlo ------------------------------------------------------------------------

D = 50
ROOT = RNG.normal(size=(D, D)) / math.sqrt(D)
SIGMA = ROOT @ ROOT.T + 0.1 * np.eye(D)
SHIFT = np.full(D, 3 / math.sqrt(D))


def many(t, x):
    """Two normal modes at ±m and a quartic."""

    def squares(y):
        return jnp.sum((y @ t["precision"]) * y, axis=-1)

    modes = jnp.logaddexp(-0.5 * squares(x - t["m"]), -0.5 * squares(x + t["m"]))
    return modes - t["quartic"] * jnp.sum(x**4, axis=-1)


def of_many(x, precision, m=0.0, quartic=0.0):
    return energy_of(many, dict(precision=precision, m=np.full(D, m) if np.ndim(m) == 0 else m, quartic=quartic), x)


def quartic_draws(n):
    return RNG.gamma(0.25, 1.0, size=(n, D)) ** 0.25 * RNG.choice([-1, 1], (n, D))


LOG_TWO_NORMALS = D / 2 * LOG_2PI + math.log(2)
MANY = {
    "correlated normal": lambda n: (
        of_many(RNG.multivariate_normal(np.zeros(D), SIGMA, n), np.linalg.inv(SIGMA)),
        LOG_TWO_NORMALS + 0.5 * np.linalg.slogdet(SIGMA)[1],
    ),
    "two modes": lambda n: (
        of_many(RNG.normal(size=(n, D)) + SHIFT * RNG.choice([-1, 1], (n, 1)), np.eye(D), SHIFT),
        LOG_TWO_NORMALS,
    ),
    "quartic": lambda n: (
        of_many(quartic_draws(n), np.zeros((D, D)), quartic=1.0),
        D * math.log(2 * math.gamma(1.25)) + math.log(2),
    ),
}


@pytest.mark.slow
def test_smc_in_fifty_dimensions(optimised):
    """Within 5 standard errors, which fails by chance in 2e-4 of cases with 16 replicates, and to 0.1 nat.

    All cases in one test, as they share a program that takes longer to compile than to run.
    """
    for case, make in MANY.items():
        energy, expected = make(1000)
        result = log_partition(energy, "smc", KEY, num_particles=64)
        assert abs(result.value - expected) < 5 * result.stderr < 0.25, case


@pytest.mark.slow
def test_smc_states_its_spread():
    """Over 250 estimates of 8 replicates: mean right, spread at most 1.25 of what is stated.

    If the stated variance is right, that of the estimates is more than 1.5625 times as large in 3e-8 of cases.
    """
    x = RNG.normal(size=(60, 2)) * [1.0, 0.5] + [2.0, 0.0]

    def f(t, x):
        return -0.25 * (x[:, 0] - 2) ** 4 - 2 * x[:, 1] ** 2

    energy = energy_of(f, 0.0, x)
    result = log_partition(energy, "smc", KEY, num_particles=64, num_replicates=2000, num_mcmc_steps=2)
    of_each = [
        _summary(Run(g, np.ones(8), np.ones(8), np.ones(8))) for g in result.diagnostics["replicates"].reshape(-1, 8)
    ]
    values, errors = np.array([v[:2] for v in of_each]).T
    expected = math.log(2 * math.gamma(1.25) * math.sqrt(2)) + 0.5 * math.log(math.pi / 2)
    assert values.var(ddof=1) < 1.25**2 * np.mean(errors**2)
    assert np.mean(errors**2) < 1.5 * values.var(ddof=1)
    assert abs(result.value - expected) < 5 * result.stderr
    assert_mean(values, expected)


# -- noise-contrastive estimation ------------------------------------------------------------------


def chain(rng, chains, draws, rho):
    """An autoregression with the standard normal law, stationary after 100 draws."""
    noise = rng.normal(size=(chains, draws + 100))
    return lfilter([math.sqrt(1 - rho**2)], [1.0, -rho], noise)[:, 100:]


def log_ratio(x):
    """Of exp(−x²/2) to the density of N(0.5, 1.5²)."""
    return -0.5 * x**2 + 0.5 * ((x - 0.5) / 1.5) ** 2 + math.log(1.5) + 0.5 * LOG_2PI


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_nce_states_its_spread(rho):
    """Over 400 estimates from independent and from correlated draws: as for SMC."""
    rng = np.random.default_rng(1)
    of_each = [
        _bridge(log_ratio(chain(rng, 4, 500, rho)), log_ratio(0.5 + 1.5 * rng.normal(size=1000))) for _ in range(400)
    ]
    values, errors = np.array([v[:2] for v in of_each]).T
    assert values.var(ddof=1) < 1.25**2 * np.mean(errors**2)
    assert np.mean(errors**2) < 1.5 * values.var(ddof=1)
    assert_mean(values, 0.5 * LOG_2PI)


def test_nce_in_fifty_dimensions():
    """Exact draws of a quartic law against fitted normal noise: within 5 standard errors."""
    energy, expected = MANY["quartic"](1000)
    draws = {"x": quartic_draws(4000).reshape(4, 1000, D)}
    result = log_partition(energy, "nce", KEY, draws=draws)
    assert abs(result.value - expected) < 5 * result.stderr < 0.25
    assert 0 < result.diagnostics["overlap"] < 1


def falling(x):
    return -2.0 * x[:, 0] - 0.5 * (x[:, 1] - 0.9 * x[:, 2]) ** 2 - 0.5 * x[:, 2] ** 2


@pytest.mark.slow
def test_flow_of_mapped_and_correlated_rows():
    """An exponential beside a correlated normal law: log Z = log ½ + log 2π, within the error and above the bound."""

    def model(x, y):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            y = numpyro.sample("y", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=y)
            numpyro.factor("energy", falling(jnp.column_stack([x, y])))

    z = RNG.normal(size=(200, 2))
    y = np.column_stack([z[:, 0] + 0.9 * z[:, 1], z[:, 1]])
    result = log_partition(Energy(model, {}, RNG.exponential(0.5, 200), y), "flow", KEY, num_steps=400)
    expected = math.log(0.5) + LOG_2PI
    assert abs(result.value - expected) < 5 * result.stderr < 0.05
    bound, error = (result.diagnostics[k] for k in ("bound", "bound_stderr"))
    assert expected - 0.3 < bound < expected + 5 * error
    assert 2000 < result.diagnostics["ess"] < 20_000


def test_bridge_by_hand():
    """The root of the score equation, with as many draws as noise: where the two mean misclassifications agree."""
    draws, noise = np.random.default_rng(2).normal(size=(2, 1, 500))
    c, _, found = _bridge(draws + 1.0, noise[0])
    share = found["ess"] / (found["ess"] + 500)
    wrong_draws = np.mean(1 / (1 + share / (1 - share) * np.exp(draws + 1.0 - c)))
    wrong_noise = np.mean(1 / (1 + (1 - share) / share * np.exp(c - noise)))
    np.testing.assert_allclose(share * wrong_draws, (1 - share) * wrong_noise, rtol=1e-8)


# -- bad input -------------------------------------------------------------------------------------


def plain(t, x):
    return -0.5 * t * jnp.sum(x.reshape(len(x), -1) ** 2, -1)


def with_covariate(x, z):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * (x - z) ** 2)


def scored(x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        score_factor("score", x, -x)


FOUR = RNG.normal(size=(40, 4))


@pytest.mark.parametrize(
    ("energy", "settings", "error", "message"),
    [
        (Energy(scored, {}, FOUR[:, :2]), {}, TypeError, "'score' is a score_factor"),
        (Energy(with_covariate, {}, FOUR[:, 0], FOUR[:, 1]), {}, ValueError, r"40 rows may differ.*one row"),
        (energy_of(plain, 1.0, FOUR), {"method": "quadrature"}, ValueError, "up to 3 dimensions, and a row has 4"),
        (
            energy_of(plain, 1.0, FOUR),
            {"method": "annealed"},
            ValueError,
            "no method 'annealed': use one of 'quadrature'",
        ),
        (energy_of(plain, 1.0, FOUR), {}, TypeError, "'smc' draws at random: pass rng_key"),
        (energy_of(plain, 1.0, FOUR[:2]), {"rng_key": KEY}, ValueError, r"2 rows in 4 dimensions.*give base="),
        (energy_of(plain, 1.0, FOUR), {"rng_key": KEY, "num_replicates": 9}, ValueError, "even num_replicates"),
        (energy_of(plain, 1.0, FOUR), {"rng_key": KEY, "base": dist.Normal(0, 1)}, ValueError, r"event shape \(4,\)"),
        (energy_of(plain, np.nan, FOUR), {"rng_key": KEY}, ValueError, "not finite in rows"),
        ({"x": FOUR}, {}, TypeError, "Expected an Energy or a fit, got dict"),
    ],
    ids=["score", "covariates", "4 dimensions", "method", "key", "few rows", "replicates", "base", "nan", "dict"],
)
def test_refused(energy, settings, error, message, unchecked):
    """One sentence that says what to do."""
    with pytest.raises(error, match=message):
        log_partition(energy, **settings)


def test_one_row_of_a_model_with_covariates(x64):
    """Bound to one row, it has one normaliser."""
    result = log_partition(Energy(with_covariate, {}, FOUR[:1, 0], FOUR[:1, 1]))
    np.testing.assert_allclose(result.value, 0.5 * LOG_2PI, atol=1e-9)


def test_a_density_that_is_not_a_number():
    """log x on the whole line."""
    with pytest.raises(ValueError, match="log density is nan at the free coordinates"):
        log_partition(energy_of(lambda t, x: jnp.log(x) - x**2, 1.0, np.abs(FOUR[:, 0])))


@pytest.mark.slow
def test_flow_along_a_banana():
    """Single draws that nearly run away along the bend do not end the fit."""
    x = RNG.normal(size=(400, 6))
    x[:, 1] = x[:, 0] ** 2 + 0.5 * x[:, 1]

    def f(t, x):
        return -0.5 * x[..., 0] ** 2 - 2 * (x[..., 1] - x[..., 0] ** 2) ** 2 - 0.5 * jnp.sum(x[..., 2:] ** 2, -1)

    result = log_partition(energy_of(f, 0.0, x.astype(np.float32)), "flow", KEY, num_steps=300)
    expected = 3 * math.log(2 * math.pi) + math.log(0.5)
    assert abs(result.value - expected) < 5 * result.stderr < 0.1
    assert result.diagnostics["bound"] < expected
