"""What every loss must do, and the facts that hold for each.

Random comparisons allow 5 standard errors: each fails by chance in 6e-7 of runs, all together in
less than one run in ten thousand. float64 throughout.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import (
    FAST_COMPILE,
    RUGGED,
    K,
    Langevin,
    assert_mean,
    assert_variance,
    energy_of,
    improper,
    quadratic,
    rugged,
    values,
)
from numpyro.distributions import constraints

import numpyro_score.losses.ssm as ssm
from numpyro_score import (
    CD,
    DSM,
    ESM,
    FSM,
    ISM,
    NCE,
    PCD,
    SSM,
    ContinuousDSM,
    DiscreteFisher,
    Energy,
    KLContraction,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
    geometric_levels,
    parzen_score,
)
from numpyro_score.losses import CHAINS_SITE, LOG_PARTITION_SITE, Loss

pytestmark = pytest.mark.usefixtures("x64")

LAWS = ["rademacher", "gaussian", "sphere"]
LOSSES = {
    "ISM": ISM(),
    "SSM": SSM(),
    "SSM plain": SSM(variance_reduced=False),
    "SSM gaussian": SSM(3, "gaussian"),
    "SSM sphere plain": SSM(2, "sphere", variance_reduced=False),
    "DSM": DSM(0.3),
    "DSM plain": DSM(0.3, control_variate=False),
    "DSM antithetic": DSM(0.3, antithetic=True),
    "ESM": ESM(operator.neg),
    "FSM": FSM(0.1),
    "FSM denoising": FSM(0.1, sigma=0.3, num_projections=2, projection="gaussian"),
    "KL contraction": KLContraction(0.3, 4),
    "KL contraction stabilised": KLContraction(0.3, 4, stabiliser=1e-3),
}
LIKELIHOOD = {  # not on the scale of the Hyvärinen objective
    "CD": CD(3, kernel=Langevin(0.1)),
    "CD unadjusted": CD(1, kernel=Langevin(0.01, adjusted=False)),
    "PCD": PCD(4, 2, kernel=Langevin(0.1)),
    "NCE": NCE(dist.Normal(0.0, 2.0).expand([3]).to_event(1), 2),
}
LEVELS = {  # pass the model a noise level
    "DSM levels": DSM((0.2, 1.0)),
    "continuous DSM": ContinuousDSM(0.1, 5.0),
    "continuous DSM edm": ContinuousDSM(0.1, 5.0, "edm", stratified=False, sigma_data=1.0, antithetic=True),
    "continuous DSM own": ContinuousDSM(0.1, 5.0, jnp.sqrt),
}
DISCRETE = {  # of data in integers
    "pseudo-likelihood": PseudoLikelihood(),
    "pairs": PairLikelihood(),
    "ratio matching": RatioMatching(),
    "discrete Fisher": DiscreteFisher("path"),
    "mixed": Mixed(SSM(), PseudoLikelihood(), 0.5),
}
ALL = {**LOSSES, **LIKELIHOOD, **LEVELS, **DISCRETE}
# Those of which another with the same code and one setting more is there; their slopes are tested below.
PLAINER = {"SSM plain", "SSM gaussian", "DSM plain", "KL contraction", "continuous DSM own"}
KINDS = {name: loss for name, loss in ALL.items() if name not in PLAINER}
EXACT = (ISM, ESM, PseudoLikelihood, PairLikelihood, RatioMatching, DiscreteFisher)  # draw no random numbers
SLICED = {
    f"{law} {form}": SSM(projection=law, variance_reduced=form == "reduced")
    for law in LAWS
    for form in ("reduced", "plain")
}
SLOPES = LOSSES | {name: loss for name, loss in SLICED.items() if loss not in LOSSES.values()}
DENOISING = {
    "plain": {"control_variate": False},
    "control variate": {},
    "antithetic": {"antithetic": True},
}


def isotropic(a, x):
    return -0.5 * a * jnp.sum(x**2, -1)


ROWS = np.random.default_rng(0).normal(size=(5, 3))


def at_levels(x, sigma=1.0):
    """:func:`rugged`, wider where there is more noise."""
    theta = numpyro.param("theta")
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", rugged(theta, x) / (1 + sigma**2))


def in_integers(x, values, mixed):
    """:func:`rugged` of rows whose first numbers, or all, are integers."""
    theta, whole = numpyro.param("theta"), x[:, :2] if mixed else x
    whole = jnp.floor(2.6 * whole) % values - values // 2 + 1
    support = constraints.boolean if values == 2 else constraints.integer_interval(1 - values // 2, values // 2)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.ImproperUniform(support, (), whole.shape[1:]), obs=whole)
        if mixed:
            z = jnp.concatenate([z, numpyro.sample("x", improper(1), obs=x[:, 2:])], axis=-1)
        numpyro.factor("energy", 0.3 * rugged(theta, z))


def rugged_energy(loss, theta, x):
    """The energy of :func:`rugged`, with what PCD and NCE would declare in a fit."""
    if loss in DISCRETE.values():
        return Energy(
            in_integers, {"theta": theta}, x, 2 if isinstance(loss, RatioMatching) else 6, isinstance(loss, Mixed)
        )
    if loss in LEVELS.values():
        return Energy(at_levels, {"theta": theta}, x)
    chains = {"x": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
    return energy_of(rugged, theta, x).with_params({CHAINS_SITE: chains, LOG_PARTITION_SITE: jnp.array(0.3)})


@functools.partial(jax.jit, static_argnums=(0, 1))
def slope_at(loss, f, theta, x):
    """The derivative of each row's loss in a scalar theta."""
    return jax.jacfwd(lambda t: loss(energy_of(f, t, x), jax.random.key(0)))(theta)


# -- what every loss must do -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_is_a_loss(loss):
    """A loss is a frozen, hashable value that follows the Protocol."""
    assert isinstance(loss, Loss)
    assert dataclasses.replace(loss) == loss
    assert hash(dataclasses.replace(loss)) == hash(loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.sigma = 2.0


@pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)
def test_is_pointwise_and_transformable(loss):
    """Each row's value is its own; jit and vmap change nothing; new values compile nothing."""
    traces = []

    def plain(theta, x, key):
        traces.append(None)
        return loss(rugged_energy(loss, theta, x), key)

    of = jax.jit(plain, compiler_options=FAST_COMPILE)
    key, others = jax.random.key(1), ROWS + np.arange(5)[:, None] - 2
    value, moved = of(RUGGED, ROWS, key), of(RUGGED, others, key)
    assert value.shape == (5,)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(moved[2], value[2], rtol=1e-12)
    assert (np.abs(moved - value)[[0, 1, 3, 4]] > 1e-3).all()

    scales = np.array([0.5, 1.0, 2.0])
    one_by_one = [of({k: s * v for k, v in RUGGED.items()}, ROWS, key) for s in scales]
    assert len(traces) == 1
    scaled = jax.tree.map(lambda v: np.multiply.outer(scales, v), RUGGED)
    mapped = jax.jit(jax.vmap(plain, (0, None, None)), compiler_options=FAST_COMPILE)
    np.testing.assert_allclose(mapped(scaled, ROWS, key), np.stack(one_by_one), rtol=1e-10)

    with jax.enable_x64(False):
        singles = jax.tree.map(np.float32, RUGGED), np.float32(ROWS), jax.random.key(1)
        assert jax.eval_shape(plain, *singles).dtype == jnp.float32
        if isinstance(loss, EXACT):  # the others draw other numbers in float32
            np.testing.assert_allclose(of(*singles), value, rtol=1e-4)


# The chains of CD move with the parameters, and its gradient leaves that out.
@pytest.mark.parametrize(
    "loss", [v for v in KINDS.values() if not isinstance(v, CD)], ids=[k for k in KINDS if "CD" != k[:2]]
)
def test_gradient_is_that_of_finite_differences(loss):
    """The gradient in the parameters is right in reverse and in forward mode."""

    def mean(theta):
        return loss(rugged_energy(loss, theta, ROWS), jax.random.key(2)).mean()

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def of(theta, step):
        return *jax.jvp(mean, (theta,), (step,)), jax.grad(mean)(theta)

    rng = np.random.default_rng(7)
    step = {k: 1e-5 * rng.normal(size=v.shape) for k, v in RUGGED.items()}
    ahead, behind = (of({k: v + sign * step[k] for k, v in RUGGED.items()}, step)[0] for sign in (1, -1))
    _, forward, gradient = of(RUGGED, step)
    reverse = sum(np.vdot(gradient[k], step[k]) for k in step)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)
    np.testing.assert_allclose((ahead - behind) / 2, reverse, rtol=1e-6)


# -- the Hyvärinen objective -----------------------------------------------------------------------


def test_ism_of_the_standard_normal():
    """J of N(0, I) on itself is -D/2: exactly, by Gauss-Hermite quadrature over the data."""
    node, weight = np.polynomial.hermite_e.hermegauss(5)
    x = np.stack(np.meshgrid(node, node, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(weight, weight).reshape(-1) / (2 * np.pi)
    np.testing.assert_allclose(weight @ values(ISM(), isotropic, 1.0, x), -1.0, rtol=1e-12)


def test_worked_example(monkeypatch):
    """For s(x) = x², x = (2, 7), v = (1, 1): 1226.5 exact and variance-reduced, 1422.5 plain."""

    def f(t, x):
        return t * jnp.sum(x**3, -1) / 3

    def draw(law, key, shape, dtype):
        return jnp.ones(shape, dtype)

    monkeypatch.setattr(ssm, "draw_directions", draw)
    x = np.array([[2.0, 7.0]])
    for loss, expected in ((ISM(), 1226.5), (SSM(), 1226.5), (SLICED["sphere plain"], 1422.5)):
        np.testing.assert_allclose(values(loss, f, 1.0, x), [expected], rtol=1e-12)


def test_worked_denoising_example(monkeypatch):
    """For s(x) = x², x = (2, 7), ε = (1, -1), σ = ½: 840.0625 plain, 930.0625 with the variate."""

    def f(t, x):
        return t * jnp.sum(x**3, -1) / 3

    def normal(key, shape, dtype=float):
        return jnp.broadcast_to(jnp.array([1.0, -1.0], dtype), shape)

    monkeypatch.setattr(jax.random, "normal", normal)
    x = np.array([[2.0, 7.0]])
    # s(2.5, 6.5) = (6.25, 42.25): ½(8.25² + 40.25²) - 4, and ½(6.25² + 42.25²) + 2(2.25 + 6.75)
    np.testing.assert_allclose(values(DSM(0.5, False), f, 1.0, x), [840.0625], rtol=1e-12)
    np.testing.assert_allclose(values(DSM(0.5), f, 1.0, x), [930.0625], rtol=1e-12)
    # s(1.5, 7.5) = (2.25, 56.25): ¼(6.25² + 42.25² + 2.25² + 56.25²) + (6.25 - 2.25) - (42.25 - 56.25)
    expected = 0.25 * (6.25**2 + 42.25**2 + 2.25**2 + 56.25**2) + 4 + 14
    np.testing.assert_allclose(values(DSM(0.5, antithetic=True), f, 1.0, x), [expected], rtol=1e-12)


@pytest.mark.parametrize("loss", SLOPES.values(), ids=SLOPES)
def test_slope_at_the_flat_density(loss):
    """For f = -½a‖x‖² at a = 0, dJ/da = -D: every term has its sign."""
    slope = slope_at(loss, isotropic, 0.0, np.random.default_rng(3).normal(size=(40_000, 3)))
    assert_mean(slope, -3.0)
    assert np.std(slope) < 15  # so that 5 standard errors are less than 0.4


# -- slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SLICED.values(), ids=SLICED)
def test_slices_are_unbiased(loss):
    """The mean over directions is the exact value of the same row."""
    copies = np.repeat(ROWS, 20_000, axis=0)
    draws = values(loss, rugged, RUGGED, copies).reshape(5, -1)
    assert_mean(draws.T, values(ISM(), rugged, RUGGED, ROWS))


@pytest.mark.parametrize("loss", SLICED.values(), ids=SLICED)
def test_variance_of_slices(loss):
    """Where the score is zero the variance is that of v·Kv over M = 4, known for each law."""
    squares, d = np.sum(K**2), len(K)
    variance = {
        "rademacher": 2 * (squares - np.sum(np.diag(K) ** 2)),
        "gaussian": 2 * squares,
        "sphere": 2 * d / (d + 2) * (squares - np.trace(K) ** 2 / d),
    }[loss.projection]
    loss = dataclasses.replace(loss, num_projections=4)
    draws = values(loss, quadratic, K, np.zeros((40_000, 3)))
    assert_mean(draws, -np.trace(K))
    assert_variance(draws, variance / 4)


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", DENOISING)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_dsm_is_the_objective_of_noisy_data(sigma, form):
    """On N(0, I) data and f = -½xᵀKx the mean is J of N(0, (1+σ²)I): ½(1+σ²)‖K‖² - tr K."""
    x = np.random.default_rng(4).normal(size=(100_000, 3))
    expected = 0.5 * (1 + sigma**2) * np.sum(K**2) - np.trace(K)
    assert_mean(values(DSM(sigma, **DENOISING[form]), quadratic, K, x), expected)


@pytest.mark.parametrize("form", DENOISING)
def test_dsm_is_ism_of_the_noisy_row(form):
    """At a fixed row the mean over noise is that of ISM at x + σε, here by quadrature."""

    def f(t, x):
        return t * jnp.sum(jnp.sin(2 * x) - x**4 / 4, -1)

    node, weight = np.polynomial.hermite_e.hermegauss(60)
    noisy = values(ISM(), f, 1.0, 0.4 + 0.6 * node[:, None])
    draws = values(DSM(0.6, **DENOISING[form]), f, 1.0, np.full((100_000, 1), 0.4))
    assert_mean(draws, weight @ noisy / np.sqrt(2 * np.pi))


def variances(loss, of):
    """The variance over noise at one row, at σ = 0.1 and 0.001, and its slope in log σ."""
    x = np.tile([0.7, -1.1, 0.4], (50_000, 1))
    sigmas = np.array([0.1, 0.001])
    found = [np.var(of(dataclasses.replace(loss, sigma=s), x)) for s in sigmas]
    return np.array(found), np.polyfit(np.log(sigmas), np.log(found), 1)[0]


def test_variance_of_dsm_as_noise_vanishes():
    """Plain, the value's variance grows as D/(2σ⁴); with the control variate it tends to 2‖K‖²."""

    def value(loss, x):
        return values(loss, quadratic, K, x)

    # Five standard errors are at most 8 % of the variance of 50,000 draws and 0.03 of the slope; at
    # σ = 0.1 lower orders add 2 %.
    found, slope = variances(DSM(1.0, False), value)
    np.testing.assert_allclose(slope, -4, atol=0.1)
    np.testing.assert_allclose(found[-1], 1.5e12, rtol=0.1)
    for loss in (DSM(1.0), DSM(1.0, antithetic=True)):
        found, slope = variances(loss, value)
        np.testing.assert_allclose(slope, 0, atol=0.1)
        np.testing.assert_allclose(found[-1], 2 * np.sum(K**2), rtol=0.1)


def test_variance_of_the_gradient_of_dsm_as_noise_vanishes():
    """Plain, the gradient's variance grows as ‖x‖²/σ²; with the control variate it tends to 2D."""

    def slope_in_a(loss, x):
        return slope_at(loss, isotropic, 1.3, x)

    found, slope = variances(DSM(1.0, False), slope_in_a)
    np.testing.assert_allclose(slope, -2, atol=0.1)
    np.testing.assert_allclose(found[-1], 1.86e6, rtol=0.1)
    for loss in (DSM(1.0), DSM(1.0, antithetic=True)):
        found, slope = variances(loss, slope_in_a)
        np.testing.assert_allclose(slope, 0, atol=0.1)
        np.testing.assert_allclose(found[-1], 6, rtol=0.1)


@pytest.mark.parametrize("form", DENOISING)
def test_optimum_of_dsm(form, sigma=1.5):
    """On N(0, I) data the best N(0, τ²I) has τ² = 1 + σ²: there the slope is zero, on average."""
    x = np.random.default_rng(5).normal(size=(100_000, 3))
    optimum = 1 / (1 + sigma**2)
    slope = functools.partial(slope_at, DSM(sigma, **DENOISING[form]), isotropic, x=x)
    assert_mean(slope(optimum), 0.0)
    # Curvature in a is E‖x̃‖² = 3(1+σ²): ten per cent off, the slope is 0.3 up or down.
    assert_mean(slope(1.1 * optimum), 0.3)
    assert_mean(slope(0.9 * optimum), -0.3)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSM(num_projections=0), "num_projections of at least 1, got 0"),
        (lambda: SSM(num_projections=-3), "num_projections of at least 1, got -3"),
        (lambda: SSM(projection="normal"), "'normal'.*'rademacher', 'gaussian' or 'sphere'"),
        (lambda: DSM(sigma=()), r"one noise level or a sequence.*shape \(0,\)"),
        (lambda: DSM(sigma=((0.1, 0.2),)), r"one noise level or a sequence.*shape \(1, 2\)"),
        (lambda: DSM(sigma=(1.0, 0.0)), "positive sigma.*got 0"),
        (lambda: DSM(sigma=(1.0, 0.5), levels="each"), "'each'.*'sampled' or 'all'"),
        (lambda: geometric_levels(0.1, 1.0, 5), "largest > smallest"),
        (lambda: geometric_levels(1.0, 0.1, 1), "at least two levels"),
        (lambda: FSM(epsilon=0.0), "positive epsilon, got 0"),
        (lambda: FSM(sigma=-1.0), "positive sigma, got -1"),
        (lambda: FSM(num_projections=0), "num_projections of at least 1, got 0"),
        (lambda: KLContraction(time=0.0), "positive time, got 0"),
        (lambda: KLContraction(1.0, num_samples=0), "num_samples of at least 1, got 0"),
        (lambda: KLContraction(1.0, stabiliser=-1.0), "stabiliser of at least 0, got -1"),
        (lambda: parzen_score(np.zeros((0, 2)), 1.0), r"\(B, D\), got \(0, 2\)"),
        (lambda: parzen_score(np.full((3, 2), np.nan), 1.0), "NaN or infinity"),
        (lambda: DSM(sigma=0.0), "positive sigma.*got 0"),
        (lambda: DSM(sigma=-1.0), "positive sigma.*got -1"),
        (lambda: DSM(sigma=float("nan")), "positive sigma.*got nan"),
        (lambda: DSM(sigma=float("inf")), "positive sigma.*got inf"),
    ],
)
def test_settings_out_of_range(make, message, unchecked):
    """A setting that makes no sense is refused when the loss is made, with what would."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SSM(2.5),
        lambda: SSM(True),
        lambda: DSM("1"),
        lambda: DSM(None),
        lambda: FSM(epsilon="small"),
        lambda: KLContraction([1.0]),
        lambda: KLContraction(1.0, 2.5),
        lambda: KLContraction(1.0, True),
        lambda: ESM(2.0),
    ],
)
def test_settings_of_the_wrong_type(make, unchecked):
    """A setting of the wrong type is refused with the loss's name and what was given."""
    with pytest.raises(TypeError, match=r"(SSM|DSM|FSM|KLContraction|ESM) needs .* got"):
        make()
