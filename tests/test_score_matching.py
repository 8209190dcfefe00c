"""Fitting by `ScoreMatching.run`: closed forms, NumPyro's own SVI, and what happens when a fit goes wrong."""

import inspect
import signal

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.example_libraries import optimizers
from models import counted_compilations
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal

import numpyro_score.inference.loop as module
from numpyro_score import ISM, SSM, NonFiniteLossError, ScoreMatching, generalized_bayes

N, D, BATCH = 300, 2, 50
KEY = jax.random.key(0)
NOISY = SSM(projection="gaussian")  # Rademacher signs have no variance for the models below


def real(*shape):
    return dist.ImproperUniform(constraints.real_vector, (), shape)


def gaussian(x, batch=None):
    """N(mu, I/tau), with a flat prior on mu. `batch` rows at a time, if given."""
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x = numpyro.sample("x", real(D), obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", -0.5 * tau * jnp.sum((x - mu) ** 2, axis=-1))


def closed_form(x):
    """The minimiser of the ISM loss of `gaussian`, which is the maximum likelihood estimate."""
    return {"mu": x.mean(), "tau": 1 / x.var()}


def conjugate(x):
    """Known precision 1: with ISM the generalised posterior is the ordinary conjugate one."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", real(D), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))


def conjugate_guide(x):
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    numpyro.sample("mu", dist.Normal(loc, scale))


def data(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1.5, 0.7, (N, D)), dtype=float)


X = data(0)


def run(sm, *args, **kwargs):
    return sm.run(KEY, *args, progress_bar=False, **kwargs)


def assert_sites_close(actual, expected, rtol):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=rtol, err_msg=name)


# -- closed forms -----------------------------------------------------------------------------------


def graphical_model(latent, mean):
    rows, cols = np.triu_indices(20, k=1)

    def site(name, start):
        shape = np.shape(start)
        return numpyro.sample(name, real(*shape)) if latent else numpyro.param(name, start)

    def model(x):
        diagonal, coupling = site("diagonal", np.ones(20)), site("coupling", np.zeros(len(rows)))
        k = jnp.diag(diagonal).at[rows, cols].set(coupling).at[cols, rows].set(coupling)
        mu = site("mu", np.zeros(20)) if mean else 0.0
        numpyro.deterministic("k", k)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(20), obs=x)
            numpyro.factor("energy", -0.5 * jnp.einsum("...i,ij,...j", x - mu, k, x - mu))

    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latent", "mean"), [(False, False), (True, True)], ids=["params", "flat priors, unknown mean"]
)
def test_gaussian_graphical_model_is_fitted_by_its_mle(x64, latent, mean):
    """ISM's minimiser is the MLE: the inverse of the second moments, and the mean [Hyvärinen 2005]."""
    rng = np.random.default_rng(1)
    root = np.eye(20) + 0.1 * rng.normal(size=(20, 20))
    x = rng.normal(size=(200, 20)) @ root + (rng.normal(size=20) if mean else 0.0)
    sm = ScoreMatching(graphical_model(latent, mean), optim=optax.lbfgs(), num_steps=150)
    fit = run(sm, jnp.asarray(x))
    expected = np.linalg.inv(np.cov(x.T, bias=True) if mean else x.T @ x / len(x))
    upper = np.triu_indices(20, k=1)
    np.testing.assert_allclose(fit.estimates["diagonal"], np.diag(expected), atol=1e-4)
    np.testing.assert_allclose(fit.estimates["coupling"], expected[upper], atol=1e-4)
    if mean:
        np.testing.assert_allclose(fit.estimates["mu"], x.mean(0), atol=1e-4)


@pytest.fixture(scope="module")
def default():
    sm = ScoreMatching(gaussian)
    return sm, run(sm, X)


def test_defaults_reach_the_closed_form(default):
    """The default guide, optimiser and number of steps reach the minimiser to 1e-3."""
    assert_sites_close(default[1].estimates, closed_form(X), rtol=1e-3)
    assert len(default[1].losses) == 2000


def test_last_loss_is_the_sum_over_rows(default):
    """The reported loss is Σ_n ½τ²‖x_n − μ‖² − Dτ, which is −½NDτ at the minimiser."""
    expected = -0.5 * N * D * closed_form(X)["tau"]
    np.testing.assert_allclose(default[1].losses[-1], expected, rtol=1e-4)


def test_run_needs_nothing_for_a_model_that_holds_its_data():
    """`ScoreMatching(model).run()` fits a model that closes over its data."""
    fit = ScoreMatching(lambda: gaussian(X)).run()
    assert_sites_close(fit.estimates, closed_form(X), rtol=1e-3)


OPTIMISERS = {
    "numpyro Adam": (lambda: numpyro.optim.Adam(0.02), 1500),
    "numpyro ClippedAdam": (lambda: numpyro.optim.ClippedAdam(0.02, clip_norm=1e3), 1500),
    "numpyro Minimize": (numpyro.optim.Minimize, 5),
    "optax adam": (lambda: optax.adam(0.02), 1500),
    "optax lbfgs": (optax.lbfgs, 30),
    "optax chain": (lambda: optax.chain(optax.clip(1e3), optax.adam(0.02)), 1500),
    "jax adam": (lambda: optimizers.adam(0.02), 1500),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_reach_the_closed_form(name):
    """Everything that SVI takes as an optimiser, and one with a line search.

    β = 1/N makes the loss a mean, so that Minimize's first step is not far too long; it restarts four times.
    """
    make, steps = OPTIMISERS[name]
    fit = run(ScoreMatching(gaussian, optim=make(), num_steps=steps, learning_rate=1 / N), X)
    assert_sites_close(fit.estimates, closed_form(X), rtol=1e-3)


def test_covariates_give_least_squares():
    """A linear mean with ISM is ordinary least squares, with precision 1/mean(residual²)."""

    def regression(y, z=None):
        beta = numpyro.param("beta", jnp.zeros(2))
        tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(y)):
            y = numpyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
            numpyro.factor("energy", -0.5 * tau * (y - z @ beta) ** 2)

    z, y = np.stack([np.ones(N), X[:, 0]], 1), np.asarray(X[:, 1] - 0.5 * X[:, 0])
    beta, residual = np.linalg.lstsq(z, y)[:2]
    fit = run(ScoreMatching(regression, optim=optax.lbfgs(), num_steps=60), y, z=z)
    np.testing.assert_allclose(fit.estimates["beta"], beta, rtol=1e-3)
    np.testing.assert_allclose(fit.estimates["tau"], N / residual[0], rtol=1e-3)


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.Dense(4)(x) ** 2)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x) ** 2)


class Eqx(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.first, self.second = eqx.nn.Linear(1, 4, key=a), eqx.nn.Linear(4, 1, key=b)

    def __call__(self, x):
        return jax.vmap(lambda row: self.second(self.first(row) ** 2))(x)


MODULES = {
    "flax": lambda: flax_module("net", Flax(), input_shape=(1, 1)),
    "nnx": lambda: nnx_module("net", Nnx(nnx.Rngs(0))),
    "eqx": lambda: eqx_module("net", Eqx(jax.random.key(0))),
}


@pytest.mark.parametrize("name", MODULES)
def test_network_energies_learn_the_score(name):
    """A network with one hidden layer of squares has a linear score: its best fit is −(x − x̄)/s², exactly."""

    def model(x):
        net = MODULES[name]()
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(1), obs=x)
            numpyro.factor("energy", -net(x)[:, 0])

    x = X[:, :1]
    fit = run(ScoreMatching(model), x)
    points = jnp.linspace(-1.0, 4.0, 11)[:, None]
    expected = -(points - x.mean()) / x.var()
    np.testing.assert_allclose(fit.energy.score(points), expected, atol=0.02)


# -- as SVI -----------------------------------------------------------------------------------------


def test_steps_are_those_of_plain_svi():
    """`init`, `update`, `evaluate`, `get_params` equal SVI's over `generalized_bayes`, with the same keys."""
    ours = ScoreMatching(gaussian, AutoNormal, optax.adam(0.05), NOISY)
    model = generalized_bayes(gaussian, NOISY)
    svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    states = ours.init(KEY, X), svi.init(KEY, X)
    steps = [jax.jit(lambda s, i=i: (i.evaluate(s, X), i.update(s, X))) for i in (ours, svi)]
    for _ in range(4):
        (evaluated, (mine, loss)), (_, (plain, plain_loss)) = (
            step(state) for step, state in zip(steps, states, strict=True)
        )
        states = mine, plain
        np.testing.assert_allclose([evaluated, loss], [plain_loss, plain_loss], rtol=1e-5)
        assert_sites_close(ours.get_params(mine), svi.get_params(plain), rtol=1e-5)


GUIDES = {
    "AutoNormal": lambda: AutoNormal,
    "AutoNormal on the model": lambda: AutoNormal(conjugate),
    "AutoLaplaceApproximation": lambda: AutoLaplaceApproximation,
    "AutoDelta": lambda: AutoDelta,
    "a function": lambda: conjugate_guide,
}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_find_the_conjugate_posterior(name):
    """Mean and sd of Normal(Σx/(ND + ¼), 1/√(ND + ¼)), on few rows.

    Over many keys the optimiser, the estimates' 1000 draws and the 4000 draws below leave 0.07 sd in the mean, and 3%
    of bias and noise each in the sd: with 5 times the noise, false alarms at 6e-7.
    """
    x = X[:30]
    fit = run(ScoreMatching(conjugate, GUIDES[name]()), x)
    mean, sd = x.sum() / (x.size + 0.25), (x.size + 0.25) ** -0.5
    assert abs(fit.estimates["mu"] - mean) < 0.35 * sd
    if name != "AutoDelta":  # a point: its spread is the sandwich's, see test_sandwich.py
        draws = fit.sample_posterior(jax.random.key(1), 4000)["mu"]
        assert draws.shape == (4000,)
        assert abs(draws.std() / sd - 1) < 0.2


def test_laplace_guide_on_the_unnormalised_model_is_refused():
    """AutoLaplaceApproximation(model) would evaluate the density without its normaliser."""
    with pytest.raises(ValueError, match="pass the class, guide=AutoLaplaceApproximation"):
        ScoreMatching(conjugate, AutoLaplaceApproximation(conjugate))


def test_init_params_are_where_the_fit_starts():
    """`init_params` set params of model and guide: the first loss is the closed form there."""
    start = {"tau": jnp.array(0.3), "mu_auto_loc": jnp.array(-2.0)}
    fit = run(ScoreMatching(gaussian, optim=optax.sgd(0.0), num_steps=1), X, init_params=start)
    expected = 0.5 * 0.3**2 * jnp.sum((X + 2) ** 2) - 0.3 * N * D
    np.testing.assert_allclose(fit.losses, [expected], rtol=1e-5)
    assert_sites_close(fit.estimates, {"tau": 0.3, "mu": -2.0}, rtol=1e-6)


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


def test_second_run_compiles_nothing(default):
    """Data are inputs of the compiled step: new values need no compilation, and are fitted."""
    sm, new = default[0], data(7) + 1.0
    run(sm, X, num_steps=20)
    with counted_compilations() as compiled:
        fit = run(sm, new)
    assert not compiled
    assert_sites_close(fit.estimates, closed_form(new), rtol=1e-3)


def test_loss_changes_from_exact_to_sliced_above_64_dimensions():
    """f = −½τ(Σx)² has ½τ²D(Σx)² − τD as its ISM loss; SSM sees its trace with noise."""

    def model(x):
        tau = numpyro.param("tau", 0.1)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(x.shape[-1]), obs=x)
            numpyro.factor("energy", -0.5 * tau * jnp.sum(x, axis=-1) ** 2)

    for d in (64, 65):
        x = jnp.asarray(np.random.default_rng(d).normal(size=(3, d)), dtype=float)
        exact = jnp.sum(0.5 * 0.01 * d * x.sum(-1) ** 2 - 0.1 * d)
        loss = {}
        for name, given in {"default": None, "SSM": SSM()}.items():
            sm = ScoreMatching(model, loss=given)
            loss[name] = sm.evaluate(sm.init(KEY, x), x)
        np.testing.assert_allclose(loss["default"], exact if d == 64 else loss["SSM"], rtol=1e-4)
        assert abs(loss["SSM"] / exact - 1) > 1e-3


# -- subsampling ------------------------------------------------------------------------------------


def test_subsampled_gradient_is_unbiased():
    """Mean over 4000 keys against the gradient on all rows: 5 standard errors, false alarms at 1e-6."""
    sm = ScoreMatching(gaussian)
    params = sm.get_params(sm.init(KEY, X))

    def gradient(key, batch):
        loss = lambda p: sm.loss.loss(key, p, sm.model, sm.guide, X, batch)  # noqa: E731
        return jax.grad(loss)(params)

    keys = jax.random.split(jax.random.key(1), 4000)
    parts = jax.jit(jax.vmap(lambda key: gradient(key, BATCH)))(keys)
    for name, whole in gradient(KEY, None).items():
        error = parts[name].std() / len(keys) ** 0.5
        assert 0 < error < abs(whole)
        assert abs(parts[name].mean() - whole) < 5 * error


def test_subsampled_fit_agrees_with_the_full_fit(default):
    """With 200 rows a step and a rate that falls to zero: within a quarter of a standard error.

    Over many keys the distance is 0.05 standard errors: five times that is a false alarm at 1e-6. The errors
    themselves are those of all rows, not of the last 200.
    """
    fit, errors = run(default[0], X, batch=200), default[1].stderr()
    for name, value in default[1].estimates.items():
        assert abs(fit.estimates[name] - value) < 0.25 * errors[name]
        np.testing.assert_allclose(fit.stderr()[name], errors[name], rtol=0.1)


# -- when something goes wrong ------------------------------------------------------------------------


def location(x):
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", real(D), obs=x)
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
            x = numpyro.sample("x", real(D), obs=x)
            numpyro.factor("energy", -jnp.sum(jnp.abs(x - mu) ** power, axis=-1))

    with pytest.raises(NonFiniteLossError, match=rf"at step 0: .*{cause}") as error:
        run(ScoreMatching(model, num_steps=5), X.at[2].set(0.0))
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


@pytest.mark.parametrize("key", [X, np.asarray(X), 0, jax.random.split(KEY)])
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
