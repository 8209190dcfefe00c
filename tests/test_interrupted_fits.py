"""Fits that go on, are interrupted or fail, and what `run` refuses and shows."""

import inspect
import signal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from models import assert_sites_close, gaussian, improper

import numpyro_score.inference.loop as module
from numpyro_score import ISM, SSM, NonFiniteLossError, ScoreMatching

# Short runs are enough here.
pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling")

KEY = jax.random.key(0)
NOISY = SSM(projection="gaussian")  # Rademacher signs have no variance for these models
X = jnp.asarray(np.random.default_rng(0).normal(1.5, 0.7, (300, 2)), dtype=float)


def run(sm, *args, **kwargs):
    return sm.run(KEY, *args, progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def noisy():
    sm = ScoreMatching(gaussian, optim=optax.adam(0.01), loss=NOISY, num_steps=50)
    return sm, run(sm, X)


def test_going_on_from_a_state_is_one_long_run(noisy):
    """30 steps and then 20 from there, by `num_steps`, are the 50 steps of one run, noise included."""
    sm, whole = noisy
    first = run(sm, X, num_steps=30)
    second = run(sm, X, num_steps=20, init_state=first.state)
    np.testing.assert_allclose([*first.losses, *second.losses], whole.losses, rtol=1e-6)
    assert_sites_close(second.params, whole.params, rtol=1e-6)


def location(x):
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))


class SometimesNaN:
    """ISM, except that it is NaN for some of the keys."""

    def __call__(self, energy, rng_key):
        return jnp.where(jax.random.bernoulli(rng_key, 0.3), jnp.nan, ISM()(energy, rng_key))


@pytest.mark.parametrize("optim", [optax.adam(0.05), numpyro.optim.Adam(0.05)], ids=type)
def test_stable_update_skips_steps_that_are_not_finite(optim):
    """The finite losses are those of a run without the bad steps, and the others are NaN."""
    clean = run(ScoreMatching(location, optim=optim, loss=ISM(), num_steps=60), X)
    sm = ScoreMatching(location, optim=optim, loss=SometimesNaN(), num_steps=60)
    fit = run(sm, X, stable_update=True)
    finite = np.isfinite(fit.losses)
    assert 0 < finite.sum() < 60 == len(fit.losses)
    # The loss crosses zero on its way down: float32 rounds it relative to its largest terms.
    expected = clean.losses[: finite.sum()]
    np.testing.assert_allclose(fit.losses[finite], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("power", "cause"),
    [(0.5, "the score is not finite in 1 of 300 rows, first row 2"), (1.5, "second derivatives")],
)
def test_first_loss_not_finite(power, cause):
    """|x|^½ has no slope at zero and |x|^(3/2) no curvature: the error says which, and in which row."""

    def model(x):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -jnp.sum(jnp.abs(x - mu) ** power, axis=-1))

    with pytest.raises(NonFiniteLossError, match=rf"at step 0: .*{cause}") as error:
        run(ScoreMatching(model, loss=ISM(allow_kinks=True), num_steps=5), X.at[2].set(0.0))
    assert error.value.step == 0
    assert len(error.value.losses) == 0
    assert error.value.params["mu"] == 0.0


@pytest.mark.parametrize(
    ("rate", "cause"),
    [(1e30, "the log density is not finite in 300 of 300 rows"), (np.inf, "site 'mu' is no longer")],
)
def test_later_loss_not_finite(rate, cause):
    """A rate that explodes before step 40, met at several places of the chunks that `run` takes.

    The error holds the last state with a finite loss, from which one can go on.
    """
    optim = optax.sgd(lambda count: jnp.where(count == 39, rate, 1e-4))
    sm = ScoreMatching(location, optim=optim)
    clean = run(sm, X, num_steps=40)
    for start in (0, 31, 35, 39):
        state = run(sm, X, num_steps=start).state if start else None
        step = 40 - start
        with pytest.raises(NonFiniteLossError, match=rf"at step {step}: {cause}") as error:
            run(sm, X, num_steps=60, init_state=state)
        assert error.value.step == step
        np.testing.assert_array_equal(error.value.losses, clean.losses[start:])
        assert_sites_close(error.value.params, sm.get_params(error.value.state), rtol=0)
        np.testing.assert_allclose(sm.evaluate(error.value.state, X), clean.losses[39], rtol=1e-6)
        again = run(sm, X, num_steps=1, init_state=error.value.state)
        np.testing.assert_array_equal(again.losses, clean.losses[39:])


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_returns_the_fit_so_far(noisy, monkeypatch, ctrl_c):
    """Ctrl-C in the third chunk gives a warning and the fit that a run of so many steps gives."""
    updates = []

    class Interrupted(module.tqdm):
        def update(self, n=1):
            updates.append(n)
            if len(updates) == 3:
                signal.raise_signal(signal.SIGINT)
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Interrupted)
    with pytest.warns(UserWarning, match=r"Interrupted after \d+ of 10000 steps"):
        fit = run(noisy[0], X, num_steps=10_000)
    monkeypatch.undo()
    assert len(fit.losses) == sum(updates) < 10_000
    whole = run(noisy[0], X, num_steps=len(fit.losses))
    np.testing.assert_array_equal(fit.losses, whole.losses)
    assert_sites_close(fit.params, whole.params, rtol=1e-6)


def test_interrupt_before_the_first_step_is_passed_on(noisy, monkeypatch, ctrl_c):
    """Ctrl-C while nothing has been fitted has no fit to return."""

    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(noisy[0], X)


@pytest.mark.parametrize("key", [X, np.asarray(X), 0.5, jax.random.split(KEY)])
def test_anything_else_in_place_of_the_key_is_refused(key):
    """`run(x)` says to write the key first; the run-time check of annotations, which users lack, is left out."""
    with pytest.raises(TypeError, match=r"write\s+run\(jax.random.key\(0\), x\)"):
        inspect.unwrap(ScoreMatching.run)(ScoreMatching(gaussian), key)


def test_old_style_keys_work(noisy):
    """A raw uint32 key is as good as a typed one."""
    fit = noisy[0].run(jax.random.PRNGKey(0), X, progress_bar=False)
    np.testing.assert_allclose(fit.losses, noisy[1].losses, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    """By the constructor and by `run` alike."""
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        ScoreMatching(gaussian, num_steps=steps)
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        ScoreMatching(gaussian).run(KEY, X, num_steps=steps)


def test_progress_bar_shows_the_losses(noisy, capsys):
    """The bar on stderr names the first loss and counts the steps; without a bar there is no output."""
    sm, fit = noisy
    sm.run(KEY, X)
    shown = capsys.readouterr()
    assert f"init loss: {fit.losses[0]:.4f}, loss: " in shown.err
    assert "50/50" in shown.err
    run(sm, X)
    assert capsys.readouterr() == (shown.out, "") == ("", "")
