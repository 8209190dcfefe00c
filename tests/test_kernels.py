"""The laws of Langevin and Hamiltonian chains, against closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FAST_COMPILE, assert_mean, assert_variance
from numpyro.infer import MCMC
from scipy import stats

from numpyro_score import MALA, SGHMC, SGLD, cyclical_schedule, polynomial_schedule
from numpyro_score.kernels import langevin_chains, mala_chains, sghmc_chains

KEY = jax.random.key(0)


def iterate(chains, x, num_steps, key=KEY):
    def run(key, x):
        return jax.lax.scan(lambda s, k: (chains.step(k, s), None), chains.init(x), jax.random.split(key, num_steps))[0]

    return jax.jit(run)(key, x)


def gaussian(x):
    return -0.5 * jnp.sum(x**2, axis=-1)


def quartic(x):
    return -0.25 * jnp.sum(x**4, axis=-1)


LOGISTIC = stats.logistic(scale=0.5)


def logistic(x):
    """The logistic law, cosh(x)^-2: not a Gaussian, and with a bounded gradient."""
    return -2.0 * jnp.logaddexp(x, -x)[..., 0]


def logistic_draws(n):
    return np.random.default_rng(3).logistic(scale=0.5, size=n)


# -- unadjusted Langevin --------------------------------------------------------------------------


def last_states(kernel, x, num_steps, key=KEY):
    """The state of vectorised chains from the rows x, after some steps of MCMC."""
    mcmc = MCMC(
        kernel, num_warmup=num_steps - 1, num_samples=1, num_chains=len(x), chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(key, init_params=x)
    return mcmc.last_state


def test_variance_of_sgld_on_a_gaussian(x64):
    """1/(1 − h/2) for N(0, 1), and the effective temperature is that variance; one program serves all step sizes."""

    @jax.jit
    def run(key, h):
        kernel = SGLD(potential_fn=lambda x: 0.5 * x**2, step_size=h)
        return last_states(kernel, jax.random.normal(KEY, (50_000,)), 60, key)

    for i, h in enumerate((0.1, 0.5, 1.5)):  # 60 steps are enough for each: (1 − h)^120 < 4e-6
        state = run(jax.random.key(i + 1), h)
        assert_mean(state.z, 0.0)
        assert_variance(state.z, 1 / (1 - h / 2))
        assert_mean(state.effective_temperature, 1 / (1 - h / 2))
    assert run._cache_size() == 1


def test_temperature_scales_the_variance(x64):
    state = iterate(langevin_chains(gaussian, 0.5, 3.0), jnp.zeros((50_000, 1)), 40)
    assert_variance(state.x[:, 0], 3 / (1 - 0.25))


def test_bias_is_of_first_order_in_the_step(x64):
    """On exp(−x⁴/4), by the exact transition of the package's own step on a grid.

    At temperature 0 the step is its own mean m(x); what temperature 1 adds is √(2h) times a normal draw.
    """
    x = np.linspace(-4.0, 4.0, 401)
    exact = np.exp(-(x**4) / 4)
    second_moment = np.sum(x**2 * exact) / np.sum(exact)
    steps, biases = np.array([0.04, 0.02, 0.01]), []
    for h in steps:
        chains = langevin_chains(quartic, h, 0.0)
        mean = np.asarray(jax.jit(lambda x, c=chains: c.step(KEY, c.init(x)).x)(x[:, None]))[:, 0]
        transition = stats.norm.pdf(x[None, :], mean[:, None], np.sqrt(2 * h))
        transition /= transition.sum(1, keepdims=True)
        law = np.linalg.solve((transition.T - np.eye(len(x)))[:-1, :-1], -transition.T[:-1, -1])
        law = np.append(law, 1.0)
        biases.append(np.sum(x**2 * law) / law.sum() - second_moment)
    slopes = np.diff(np.log(np.abs(biases))) / np.diff(np.log(steps))
    np.testing.assert_allclose(slopes, 1.0, atol=0.05)
    assert abs(slopes[1] - 1) < abs(slopes[0] - 1)

    rows = np.zeros((20_000, 1))
    cold, warm = (iterate(langevin_chains(quartic, 0.01, t), rows, 1).x for t in (0.0, 1.0))
    assert stats.kstest(np.ravel(warm - cold) / np.sqrt(0.02), "norm").pvalue > 2e-5


def test_cold_chains_end_at_the_mode(x64):
    """The two modes of (x² − 1)²/4 at temperature 0, each start in its own valley."""

    def potential(x):
        return (x**2 - 1) ** 2 / 4

    starts = jnp.array([-1.5, -0.2, 0.1, 1.3])
    settings = dict(potential_fn=potential, step_size=0.1, temperature=0.0)
    for kernel in (SGLD(**settings), SGHMC(**settings, friction=0.5)):
        state = last_states(kernel, starts, 400)
        np.testing.assert_allclose(state.z, jnp.sign(starts), rtol=1e-9)


# -- with momentum ----------------------------------------------------------------------------------


def test_law_of_sghmc_on_a_gaussian(x64):
    """The closed form of the docstring, for curvatures 1 and 4 in one chain."""
    curvature, h, friction, temperature = np.array([1.0, 4.0]), 0.3, 0.4, 1.5
    kernel = SGHMC(
        potential_fn=lambda x: 0.5 * jnp.sum(curvature * x**2), step_size=h, friction=friction, temperature=temperature
    )
    state = jax.device_get(last_states(kernel, np.zeros((50_000, 2)), 40))  # friction leaves 0.6 at each step
    for j, a in enumerate(curvature):
        x, r = state.z[:, j], state.chain.momentum[:, j]
        variance = temperature / (a * (1 - h * a / (4 - 2 * friction)))
        of_momentum = 2 * a / (2 - friction) * variance
        assert_variance(x, variance)
        assert_variance(r, of_momentum)
        assert_mean(x * r, 0.5 * np.sqrt(h) * of_momentum)
    heat = np.mean([temperature / (1 - h * a / (4 - 2 * friction)) for a in curvature])
    assert_mean(state.effective_temperature, heat)
    assert_mean(np.mean(curvature * state.z**2, axis=-1), heat)  # E[x·∇U]/D


def test_effective_temperature_beyond_quadratics(x64):
    """What is recorded has the mean of x·∇U(x)/D, for any energy."""
    settings = dict(potential_fn=lambda x: -logistic(x[None]), step_size=0.5)
    for kernel in (SGLD(**settings), SGHMC(**settings, friction=0.5)):
        state = jax.device_get(last_states(kernel, logistic_draws(50_000), 60))
        assert_mean(-state.z * state.chain.score[:, 0] - state.effective_temperature, 0.0)
        assert np.mean(state.effective_temperature) > 1.05


def test_full_friction_is_sgld(x64):
    x = jax.random.normal(KEY, (100, 3))
    plain = iterate(langevin_chains(quartic, 0.1, 0.7), x, 20)
    damped = iterate(sghmc_chains(quartic, 0.1, 1.0, 0.7), x, 20)
    np.testing.assert_allclose(damped.x, plain.x, rtol=1e-9)


# -- Metropolis-adjusted ------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.3, 1.5])
def test_mala_leaves_its_law_alone(h, x64):
    """Exact draws stay exact at any step, and the unadjusted chain fails the same test."""
    x = logistic_draws(40_000)[:, None]
    state = iterate(mala_chains(logistic, h), x, 10)
    assert stats.kstest(np.ravel(state.x), LOGISTIC.cdf).pvalue > 2e-5
    assert not np.any(state.diverging)
    unadjusted = iterate(langevin_chains(logistic, h), x, 10)
    assert stats.kstest(np.ravel(unadjusted.x), LOGISTIC.cdf).pvalue < 2e-5


def test_acceptance_of_mala_is_that_of_detailed_balance(x64):
    """min{1, π(y) q(y, x) / (π(x) q(x, y))} for the proposals that were accepted, and as often as it says."""
    h = 0.4
    x = jax.random.normal(KEY, (20_000, 2))
    chains = mala_chains(quartic, h)
    new = jax.jit(lambda x: chains.step(KEY, chains.init(x)))(x)
    moved = np.any(new.x != x, axis=-1)
    old, y = np.asarray(x)[moved], np.asarray(new.x)[moved]

    def log_flow(a, b):
        return (-(a**4) / 4 + stats.norm.logpdf(b, a - h * a**3, np.sqrt(2 * h))).sum(-1)

    ratio = np.exp(np.minimum(log_flow(y, old) - log_flow(old, y), 0.0))
    np.testing.assert_allclose(new.accept_prob[moved], ratio, rtol=1e-9)
    assert_mean(moved - np.asarray(new.accept_prob), 0.0)


def test_mala_kernel_is_exact_under_mcmc(x64):
    state = last_states(MALA(potential_fn=lambda x: -logistic(x[None]), step_size=0.8), logistic_draws(20_000), 10)
    assert stats.kstest(np.asarray(state.z), LOGISTIC.cdf).pvalue > 2e-5


# -- settings -----------------------------------------------------------------------------------------


def test_schedules(x64):
    """At temperature 0 on U = x, a chain moves by −h_t at step t."""
    t = np.arange(12)
    for schedule, expected in (
        (polynomial_schedule(0.5, 2.0, 0.75), 0.5 / (2.0 + t) ** 0.75),
        (cyclical_schedule(0.2, 5), 0.1 * (1 + np.cos(np.pi * (t % 5) / 5))),
    ):
        kernel = SGLD(potential_fn=lambda x: x, step_size=schedule, temperature=0.0)
        mcmc = MCMC(kernel, num_warmup=2, num_samples=10, progress_bar=False)
        mcmc.run(KEY, init_params=jnp.array(0.0), extra_fields=("step_size",))
        np.testing.assert_allclose(mcmc.get_samples(), -np.cumsum(expected)[2:], rtol=1e-12)
        np.testing.assert_allclose(mcmc.get_extra_fields()["step_size"], expected[2:], rtol=1e-12)
    with pytest.raises(ValueError, match="gamma in"):
        polynomial_schedule(0.5, 2.0, 0.0)
    with pytest.raises(ValueError, match="positive initial step size"):
        cyclical_schedule(-0.2, 5)


def test_preconditioner_is_learned_in_warm_up_and_held(x64):
    """Each chain then has the law of a fixed step h G on each coordinate, which the curvatures 1 and 400 need."""
    curvature, h = np.array([1.0, 400.0]), 0.03
    kernel = SGLD(potential_fn=lambda x: 0.5 * jnp.sum(curvature * x**2), step_size=h, preconditioner="rmsprop")
    mcmc = MCMC(
        kernel, num_warmup=400, num_samples=200, num_chains=5000, chain_method="vectorized", progress_bar=False,
        thinning=200,
    )  # fmt: skip
    run = jax.jit(lambda x: (mcmc.run(KEY, init_params=x), mcmc.last_state)[1], compiler_options=FAST_COMPILE)
    state = run(np.random.default_rng(0).normal(size=(5000, 2)) / np.sqrt(curvature))
    root = np.sqrt(state.preconditioner.second_moment)  # about √a at temperature 1
    np.testing.assert_allclose(root.mean(0), np.sqrt(curvature), rtol=0.2)
    exact = curvature * (1 - h * curvature / (1e-5 + root) / 2)
    assert_variance(state.z * np.sqrt(exact), 1.0)
    assert_mean(state.effective_temperature - np.mean(curvature * np.asarray(state.z) ** 2, axis=-1), 0.0)


def test_preconditioner_of_chains_that_start_at_the_mode(x64):
    """Where the score is zero, the first steps are still of the size of the law."""
    curvature, h = np.array([1.0, 100.0]), 0.02
    kernel = SGLD(potential_fn=lambda x: 0.5 * jnp.sum(curvature * x**2), step_size=h, preconditioner="rmsprop")
    mcmc = MCMC(
        kernel, num_warmup=500, num_samples=200, num_chains=5000, chain_method="vectorized", progress_bar=False,
        thinning=200,
    )  # fmt: skip
    run = jax.jit(lambda x: (mcmc.run(KEY, init_params=x), mcmc.last_state)[1], compiler_options=FAST_COMPILE)
    state = run(jnp.zeros((5000, 2)))
    root = np.sqrt(state.preconditioner.second_moment)
    assert_variance(state.z * np.sqrt(curvature * (1 - h * curvature / (1e-5 + root) / 2)), 1.0)
    assert np.all(state.full_gradients == 702)


# -- chains that run away --------------------------------------------------------------------------------


def test_a_chain_that_runs_away_is_flagged_and_gives_no_number():
    """An energy without a normaliser, and steps beyond 2/a: once not finite, never a number again."""
    without = SGLD(potential_fn=lambda x: -0.5 * x**2, step_size=0.5)
    beyond = SGHMC(potential_fn=lambda x: 0.5 * x**2, step_size=5.0)
    for kernel in (without, beyond):
        mcmc = MCMC(kernel, num_warmup=0, num_samples=1000, progress_bar=False)
        mcmc.run(KEY, init_params=np.float32(1.0))
        draws, diverging = np.asarray(mcmc.get_samples()), np.asarray(mcmc.get_extra_fields()["diverging"])
        first = int(np.argmax(diverging))
        assert 0 < first < 900
        assert np.all(diverging[first:])
        assert np.isfinite(draws[:first]).all()
        assert np.isnan(draws[first + 1 :]).all()


@pytest.mark.parametrize(
    "potential",
    [lambda x: -0.5 * jnp.sum(x**2), lambda x: jnp.sum(x**3), lambda x: x[0] ** 2 - x[1] ** 4, lambda x: -jnp.sum(x)],
    ids=["normal", "cubic", "saddle", "exponential"],
)
def test_mala_refuses_a_density_without_a_normaliser(potential):
    """Its chains would drift until nearly all steps are refused, and never be other than finite."""
    with pytest.raises(ValueError, match=r"falls without bound.*no normaliser"):
        MALA(potential_fn=potential, step_size=0.1).init(KEY, 0, jnp.ones(2))


def test_mala_refuses_a_proposal_that_is_not_finite(x64):
    """The exponential law on x > 0, NaN elsewhere: refused and flagged, and the law is right."""

    def f(x):
        return jnp.where(x > 0, -x, jnp.nan)[..., 0]

    x = jax.random.exponential(KEY, (20_000, 1))
    chains = mala_chains(f, 0.5)
    state = iterate(chains, x, 10)
    assert stats.kstest(np.ravel(state.x), "expon").pvalue > 2e-5
    assert np.any(state.diverging)
    assert np.all(np.asarray(state.accept_prob)[np.asarray(state.diverging)] == 0)
