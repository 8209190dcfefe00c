"""Kernels on models with subsampled plates, against closed-form posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, assert_variance, counted_compilations, improper
from numpyro.infer import MCMC

from numpyro_score import ISM, MALA, SGHMC, SGLD, generalized_bayes
from numpyro_score.kernels.potential import MAX_SHARE_WITH_REPLACEMENT

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)

# -- gradient noise of known size ---------------------------------------------------------------------

N, CHAINS = 60, 5_000
Y = jnp.asarray(RNG.normal(1.0, 1.0, N))


def mean_model(y, size):
    """Posterior precision 1 + N. The noise of a subsample's gradient does not depend on the mean."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y), subsample_size=size):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=numpyro.subsample(y, event_dim=0))


def energy_model(y, size):
    """Gives the same posterior by score matching: J = ½(y − mu)² − 1."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y), subsample_size=size):
        y = numpyro.sample("y", improper(1), obs=numpyro.subsample(y[:, None], event_dim=1))
        numpyro.factor("energy", -0.5 * (y[:, 0] - mu) ** 2)


def noise_variance(size):
    """Of N times the mean of `size` rows: with replacement for a small share, else without."""
    if size <= MAX_SHARE_WITH_REPLACEMENT * N:
        return N**2 * np.var(Y) / size
    return N**2 * np.var(Y, ddof=1) / size * (1 - size / N)


STEPS = 15  # the slowest of the chains forgets half of the variance in one: 3e-5 of it are left


def chains_of(kernel, size, num_steps=STEPS):
    mcmc = MCMC(
        kernel, num_warmup=num_steps - 1, num_samples=1, num_chains=CHAINS, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    start = {"mu": jnp.full(CHAINS, float(np.sum(Y)) / (1 + N))}
    mcmc.run(KEY, Y, size, init_params=start, extra_fields=kernel.stats)
    return mcmc


@pytest.mark.slow
@pytest.mark.parametrize("what, size", [("SGLD", 6), ("SGLD", 30), ("SGHMC", 6), ("generalized", 6)])
def test_every_step_has_rows_of_its_own(what, size, x64):
    """(T + hV/2α) / (a (1 − ha/(4 − 2α))), of chains that draw their rows independently; α = 1 for SGLD."""
    h, a, friction = 0.3 / (1 + N), 1 + N, 0.5 if what == "SGHMC" else 1.0
    kernel = {
        "SGLD": lambda: SGLD(mean_model, step_size=h),
        "SGHMC": lambda: SGHMC(mean_model, step_size=h, friction=friction),
        "generalized": lambda: SGLD(generalized_bayes(energy_model, ISM()), step_size=h),
    }[what]()
    mcmc = chains_of(kernel, size)
    heat = (1 + h * noise_variance(size) / (2 * friction)) / (1 - h * a / (4 - 2 * friction))
    mu = mcmc.get_samples()["mu"]
    assert_mean(mu, np.sum(Y) / a)
    assert_variance(mu, heat / a)
    fields = mcmc.get_extra_fields()
    assert_mean(fields["effective_temperature"], heat)
    assert np.all(fields["minibatch_gradients"] == STEPS + 1)
    assert np.all(fields["full_gradients"] == 0)


def test_control_variates_take_the_noise_away(x64):
    """All of it here, where rows differ in their gradient but not in their curvature, whatever the centre."""
    h, a = 0.3 / (1 + N), 1 + N
    mcmc = chains_of(SGLD(mean_model, step_size=h, center={"mu": 0.9}), 6)
    mu, fields = mcmc.get_samples()["mu"], mcmc.get_extra_fields()
    assert_mean(mu, np.sum(Y) / a)
    assert_variance(mu, 1 / (a * (1 - 0.15)))
    assert_mean(fields["effective_temperature"], 1 / (1 - 0.15))
    assert np.all(fields["minibatch_gradients"] == 2 * (STEPS + 1))
    assert np.all(fields["full_gradients"] == 1)
    # The energy is corrected as well: exact, where its difference to the centre's is linear.
    exact = 0.5 * mu**2 + 0.5 * np.sum((mu[:, None] - Y) ** 2, axis=1) + 0.5 * (1 + N) * np.log(2 * np.pi)
    assert_mean(fields["potential_energy"] - exact, 0.0)


# -- a large regression -------------------------------------------------------------------------------

ROWS, BATCH = 20_000, 200  # benchmarks/minibatches.py has 100,000 and 1000
X = jnp.asarray(RNG.normal(size=(ROWS, 3)), jnp.float32)
T = X @ jnp.array([1.0, -0.5, 2.0]) + jnp.asarray(RNG.normal(size=ROWS), jnp.float32)


def regression(x, t):
    w = numpyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=BATCH):
        x, t = numpyro.subsample(x, event_dim=1), numpyro.subsample(t, event_dim=0)
        numpyro.sample("t", dist.Normal(x @ w, 1.0), obs=t)


PRECISION = np.asarray(X, np.float64).T @ np.asarray(X, np.float64) + 0.01 * np.eye(3)
MEAN = np.linalg.solve(PRECISION, np.asarray(X, np.float64).T @ np.asarray(T, np.float64))
SD = np.sqrt(np.diag(np.linalg.inv(PRECISION)))


@pytest.mark.slow
def test_regression_on_one_hundredth_of_the_rows(optimised):
    """Mean and standard deviation within 5% of the closed form, by many vectorised chains.

    The precision is N, nearly, so that h = 0.08/N makes the deviations 1/√(1 − 0.04) = 1.02 of what they should be.
    The noise that control variates leave, V of about 5N/n, adds hV/4 = 0.05%. The draws have autocorrelation 0.92, so
    that deviations are known to 1/√(2 · 200,000/12) = 0.55%: 5% is more than five standard errors away.
    """
    kernel = SGLD(regression, step_size=0.08 / ROWS, center={"w": MEAN})
    mcmc = MCMC(
        kernel, num_warmup=100, num_samples=1000, num_chains=200, chain_method="vectorized", progress_bar=False,
        jit_model_args=True,
    )  # fmt: skip
    mcmc.run(KEY, X, T, init_params={"w": np.tile(MEAN.astype(np.float32), (200, 1))})
    w = np.asarray(mcmc.get_samples()["w"], np.float64)
    np.testing.assert_allclose(w.mean(0), MEAN, rtol=0.05)
    np.testing.assert_allclose((w.mean(0) - MEAN) / SD, 0.0, atol=0.1)
    np.testing.assert_allclose(w.std(0), SD, rtol=0.05)


# -- what is refused ----------------------------------------------------------------------------------


def test_refused_models(x64, unchecked):
    y = jnp.zeros(20)

    def local(y=None):
        with numpyro.plate("rows", 20, subsample_size=5):
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def no_data(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 20, subsample_size=5):
            numpyro.deterministic("twice", 2 * mu)

    def discrete(y):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(k, 1.0), obs=y[0])

    def init(kernel, *args):
        return kernel.init(KEY, 0, None, args, {})

    with pytest.raises(ValueError, match="Latent site 'y' lies in the subsampled plate 'rows'"):
        init(SGLD(local, step_size=0.1))
    with pytest.raises(ValueError, match="does not depend on which rows the subsampled plate 'rows' draws"):
        init(SGLD(no_data, step_size=0.1), y)
    with pytest.raises(ValueError, match="no latent site"):
        init(SGLD(local, step_size=0.1), jnp.zeros(5))
    with pytest.raises(ValueError, match="'k' is discrete"):
        init(SGLD(discrete, step_size=0.1), y)
    with pytest.raises(ValueError, match="plate 'rows' is subsampled"):
        init(MALA(mean_model, step_size=0.1), y, 5)
    with pytest.raises(ValueError, match="center reduces the noise of subsampled plates, and the model has none"):
        init(SGLD(mean_model, step_size=0.1, center={"mu": 0.0}), y, None)
    with pytest.raises(ValueError, match="center has values for 'nu', and the model's latent sites are 'mu'"):
        init(SGLD(mean_model, step_size=0.1, center={"nu": 0.0}), y, 5)
    with pytest.raises(ValueError, match=r"center has shape \(2,\) for site 'mu', whose values have shape \(\)"):
        init(SGLD(mean_model, step_size=0.1, center={"mu": np.zeros(2)}), y, 5)
    with pytest.raises(ValueError, match="center has NaN or infinity for site 'mu'"):
        init(SGLD(mean_model, step_size=0.1, center={"mu": np.nan}), y, 5)
    with pytest.raises(TypeError, match="center must be a dict of values of the latent sites, got a float"):
        SGLD(mean_model, step_size=0.1, center=1.0)
    with pytest.raises(ValueError, match="center needs a model"):
        SGLD(potential_fn=jnp.sum, step_size=0.1, center={"mu": 0.0})


def test_params_and_random_numbers_of_the_model(x64):
    """Param sites stay; a random number of the model's own is new at every step of SGLD, and held fixed by MALA."""

    def model(y):
        offset = numpyro.param("offset", 2.0)
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        key = numpyro.prng_key()
        numpyro.factor("noisy", mu * jax.random.normal(key))
        numpyro.deterministic("shifted", mu + offset)

    def scores(kernel):
        state = kernel.init(KEY, 0, {"mu": jnp.array(0.0)}, (None,), {})
        found = [state.chain.score[0] + state.z["mu"]]
        step = jax.jit(lambda state: kernel.sample(state, (None,), {}))
        for _ in range(3):
            state = step(state)
            found.append(state.chain.score[0] + state.z["mu"])
        np.testing.assert_allclose(kernel.postprocess_fn((None,), {})(state.z)["shifted"], state.z["mu"] + 2)
        return np.array(found)

    assert len(np.unique(scores(SGLD(model, step_size=0.1)).round(6))) == 4
    assert np.ptp(scores(MALA(model, step_size=0.1))) < 1e-9


def test_a_kernel_starts_in_few_programs():
    """Energy and gradient at the start are one program, and not one for each operation of the model."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.factor("hills", jnp.cosh(jnp.sin(mu)) - jnp.arctan(mu) ** 3 + jnp.log1p(jnp.tanh(mu) ** 2))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = jnp.ones(3)
    numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(y)  # the sites are looked at once
    with counted_compilations() as compiled:
        MALA(model, step_size=0.1).init(KEY, 0, {"mu": jnp.array(0.5)}, (y,), {})
    assert len(compiled) <= 60
