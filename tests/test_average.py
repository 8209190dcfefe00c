"""The exponential moving average of the parameters that a fit keeps, against one taken by hand over `update`."""

import pickle
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import assert_sites_close, gaussian, improper
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

import numpyro_score.inference.loop as loop
from numpyro_score import ISM, SSM, NonFiniteLossError, ScoreMatching
from numpyro_score.inference.arrival import warn_if_average_lags

# Short runs are enough here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The loss was still falling"),
    pytest.mark.filterwarnings("ignore:The average of the parameters"),
]

KEY = jax.random.key(0)
NOISY = SSM(projection="gaussian")
X = jnp.asarray(np.random.default_rng(0).normal(1.5, 0.7, (300, 2)), dtype=float)


def run(sm, *args, **kwargs):
    return sm.run(KEY, *args, progress_bar=False, **kwargs)


def by_hand(sm, decay, steps, *args):
    """The last state of plain steps, and the weighted mean of the unconstrained parameters after each."""
    step = jax.jit(lambda state: sm.update(state, *args))
    state, seen = sm.init(KEY, *args), []
    for _ in range(steps):
        state = step(state)[0]
        seen.append(sm.optim.get_params(state.optim_state))
    weight = decay ** np.arange(steps)[::-1]
    mean = jax.tree.map(lambda *v: np.tensordot(weight / weight.sum(), np.stack(v), 1), *seen)
    return state, sm.constrain_fn(mean)


@pytest.fixture(scope="module")
def fits():
    adam = optax.adam(0.05)
    plain = ScoreMatching(gaussian, optim=adam, loss=NOISY, num_steps=40)
    averaging = ScoreMatching(gaussian, optim=adam, loss=NOISY, num_steps=40, average=0.9)
    return plain, averaging, run(averaging, X)


@pytest.mark.slow
def test_estimates_are_the_average(fits):
    """Not those of the last step, whose losses stay; everything that a result gives is at the average."""
    plain, averaging, fit = fits
    state, mean = by_hand(plain, 0.9, 40, X)
    assert_sites_close(fit.params, mean, rtol=1e-5)
    assert_sites_close(fit.estimates, {"mu": mean["mu_auto_loc"], "tau": mean["tau"]}, rtol=1e-5)
    last = plain.get_params(state)
    assert abs(last["tau"] - mean["tau"]) > 0.01
    np.testing.assert_allclose(fit.energy.params["tau"], mean["tau"], rtol=1e-5)
    np.testing.assert_array_equal(fit.losses, run(plain, X).losses)
    assert_sites_close(averaging.get_params(fit.state), fit.params)
    exact = ScoreMatching(gaussian, optim=optax.adam(0.05), loss=ISM(), average=0.9)
    at_mean = exact.evaluate(exact.init(KEY, X, init_params=fit.params), X)
    np.testing.assert_allclose(exact.evaluate(fit.state, X), at_mean, rtol=1e-5)
    assert "average=0.9" in repr(averaging)


@pytest.mark.parametrize("steps", [1, 3])
def test_short_runs_are_not_biased_to_zero(steps, fits):
    plain, averaging, _ = fits
    assert_sites_close(run(averaging, X, num_steps=steps).params, by_hand(plain, 0.9, steps, X)[1], rtol=1e-5)


def test_going_on_is_one_long_run(fits):
    """From a state the average goes on; another decay weighs the steps before by its own powers of what they had."""
    _, averaging, whole = fits
    first = run(averaging, X, num_steps=25)
    second = run(averaging, X, num_steps=15, init_state=first.state)
    assert_sites_close(second.params, whole.params, rtol=1e-5)
    slower = ScoreMatching(gaussian, optim=optax.adam(0.05), loss=NOISY, average=0.99)
    both = run(slower, X, num_steps=15, init_state=first.state)
    plain, seen = fits[0], []
    state, step = plain.init(KEY, X), jax.jit(lambda state: plain.update(state, X)[0])
    for _ in range(40):
        state = step(state)
        seen.append(float(plain.get_params(state)["mu_auto_loc"]))
    weight = np.concatenate([0.1 * 0.9 ** np.arange(25)[::-1] * 0.99**15, 0.01 * 0.99 ** np.arange(15)[::-1]])
    np.testing.assert_allclose(both.params["mu_auto_loc"], np.average(seen, weights=weight), rtol=1e-5)


@pytest.mark.slow
def test_standard_errors_and_guides(fits):
    """The default optimiser, with a guide that is no point; and the sandwich at an average that has arrived."""
    fit = run(ScoreMatching(gaussian, AutoNormal, loss=NOISY, num_steps=30, average=0.8), X)
    plain = ScoreMatching(gaussian, AutoNormal, loss=NOISY, num_steps=30)
    assert_sites_close(fit.params, by_hand(plain, 0.8, 30, X)[1], rtol=1e-5)
    fit = run(ScoreMatching(gaussian, optim=optax.adam(0.02), loss=ISM(), num_steps=1500, average=0.95), X)
    np.testing.assert_allclose(fit.estimates["tau"], 1 / X.var(), rtol=1e-4)
    np.testing.assert_allclose(fit.stderr()["tau"], fit.estimates["tau"] * np.sqrt(2 / X.size), rtol=0.15)


def test_stable_updates_leave_bad_steps_out():
    class SometimesNaN:
        def __call__(self, energy, rng_key):
            return jnp.where(jax.random.bernoulli(rng_key, 0.3), jnp.nan, ISM()(energy, rng_key))

    sm = ScoreMatching(gaussian, optim=optax.adam(0.05), loss=SometimesNaN(), num_steps=40, average=0.9)
    fit = run(sm, X, stable_update=True)
    taken = int(np.isfinite(fit.losses).sum())
    assert 0 < taken < 40
    clean = ScoreMatching(gaussian, optim=optax.adam(0.05), loss=ISM())
    assert_sites_close(fit.params, by_hand(clean, 0.9, taken, X)[1], rtol=1e-5)


def test_interrupted_and_failing_fits(monkeypatch):
    """Ctrl-C gives the average so far; the error of a loss that is not finite looks at the step, not at the average."""
    sm = ScoreMatching(gaussian, optim=optax.adam(0.05), loss=ISM(), num_steps=50, average=0.9)
    size = loop.next_size
    monkeypatch.setattr(loop, "next_size", lambda *a: signal.raise_signal(signal.SIGINT) or size(*a))
    with pytest.warns(UserWarning, match="Interrupted after"):
        fit = run(sm, X)
    assert fit.interrupted
    monkeypatch.undo()
    assert_sites_close(fit.params, run(sm, X, num_steps=len(fit.losses)).params, rtol=1e-6)

    def location(x):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))

    explodes = optax.sgd(lambda count: jnp.where(count == 9, np.inf, 1e-4))
    sm = ScoreMatching(location, optim=explodes, loss=ISM(), num_steps=20, average=0.9)
    with pytest.raises(NonFiniteLossError, match="at step 10: site 'mu' is no longer finite") as error:
        run(sm, X)
    before = by_hand(ScoreMatching(location, optim=explodes, loss=ISM()), 0.9, 9, X)[1]
    assert_sites_close(error.value.params, before, rtol=1e-5)


def test_pickled_fits_keep_their_average():
    def start(x):
        return run(ScoreMatching(gaussian, loss=NOISY, num_steps=5, average=0.5), x)

    fit = start(X)
    again = pickle.loads(pickle.dumps(fit))
    assert_sites_close(again.svi.get_params(again.state), fit.params)


@pytest.mark.parametrize(("steps", "average", "told"), [(300, 0.999, True), (300, 0.9, False), (3000, 0.999, False)])
def test_an_average_over_the_way_there_is_told(steps, average, told):
    """Losses that fall by 2,000 over 60 steps, and are noise from then on."""
    away = 2000 * np.exp(-np.arange(steps) / 30)
    for seed in range(20):
        losses = 500 + away + np.random.default_rng(seed).normal(size=steps)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warn_if_average_lags(losses, 500, average, steps)
        assert [str(w.message).startswith("The average of the parameters seems") for w in found] == [True] * told


def test_noise_alone_is_no_lag():
    """Whatever its size, and in runs that go on."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        losses = 500 + 10.0 ** rng.uniform(-3, 3) * rng.normal(size=400)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_if_average_lags(losses, 500, 0.999, 400 + 1000 * (seed % 2))


def quadratic(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(tau * x**2, -1) + mu * x.sum(-1))


def test_what_has_no_average_is_refused(fits, unchecked):
    plain, averaging, fit = fits
    with pytest.raises(ValueError, match="solved at once, without steps to average: leave out average"):
        run(ScoreMatching(quadratic, average=0.9), X)
    with pytest.raises(NotImplementedError, match=r"searches along a line.*average=0.9.*optax.adam"):
        run(ScoreMatching(gaussian, optim=optax.lbfgs(), loss=ISM(), average=0.9), X)
    with pytest.raises(TypeError, match=r"average needs an optimiser of Optax, got _NumPyroOptim|got Adam"):
        ScoreMatching(gaussian, optim=numpyro.optim.Adam(0.1), average=0.9)
    for average, error in ((1.0, ValueError), (0, ValueError), ("0.9", TypeError), (True, TypeError)):
        with pytest.raises(error, match="average must be"):
            ScoreMatching(gaussian, average=average)
    with pytest.raises(ValueError, match="init_state has no average"):
        run(averaging, X, init_state=run(plain, X, num_steps=2).state)
    with pytest.raises(ValueError, match="init_state has an average"):
        run(plain, X, init_state=fit.state)
