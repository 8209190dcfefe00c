"""Fitting by `ScoreMatching.run`: closed forms, NumPyro's own SVI, and subsampled rows."""

import functools

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
from models import assert_sites_close, counted_compilations, gaussian
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.distributions import constraints
from numpyro.distributions.transforms import StickBreakingTransform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal

from numpyro_score import SSM, ScoreMatching, generalized_bayes
from numpyro_score.generalized import prior_model

N, D, BATCH = 300, 2, 50
KEY = jax.random.key(0)
NOISY = SSM(projection="gaussian")  # Rademacher signs have no variance for the models below


def real(*shape):
    return dist.ImproperUniform(constraints.real_vector, (), shape)


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
    return rng.normal(1.5, 0.7, (N, D)).astype(np.float32)


X = data(0)


def run(sm, *args, **kwargs):
    return sm.run(KEY, *args, progress_bar=False, **kwargs)


# -- closed forms -----------------------------------------------------------------------------------


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
    "numpyro Minimize": (numpyro.optim.Minimize, 5),
    "optax adam": (lambda: optax.adam(0.02), 1500),
    "optax lbfgs": (optax.lbfgs, 30),
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


@pytest.mark.slow
def test_network_energies_learn_the_score():
    """A network with one hidden layer of squares has a linear score: its best fit is −(x − x̄)/s², exactly.

    One of each library, each of a column of its own.
    """

    def model(x):
        nets = (
            flax_module("flax", Flax(), input_shape=(1, 1)),
            nnx_module("nnx", Nnx(nnx.Rngs(0))),
            eqx_module("eqx", Eqx(jax.random.key(0))),
        )
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(3), obs=x)
            numpyro.factor("energy", -sum(net(x[:, i : i + 1])[:, 0] for i, net in enumerate(nets)))

    x = np.column_stack([X, X[::-1, 0] + X[:, 1]])
    fit = run(ScoreMatching(model), x)
    points = np.linspace(-1.0, 4.0, 11, dtype=np.float32)[:, None].repeat(3, axis=1)
    expected = -(points - x.mean(0)) / x.var(0)
    np.testing.assert_allclose(fit.energy.score(points), expected, atol=0.02)


# -- as SVI -----------------------------------------------------------------------------------------


def test_steps_are_those_of_plain_svi():
    """`init`, `update`, `evaluate`, `get_params` equal SVI's over `generalized_bayes`, with the same keys."""
    ours = ScoreMatching(gaussian, AutoNormal, optax.adam(0.05), NOISY)
    model = generalized_bayes(gaussian, NOISY)
    svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    states = [jax.jit(i.init)(KEY, X) for i in (ours, svi)]
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


@pytest.mark.slow
def test_starts_where_numpyros_own_point_guide_does(monkeypatch):
    """At the prior's median, drawn anew until penalties are finite; that needs no density of a scalar prior."""
    evaluated, log_prob = [], dist.LogNormal.log_prob
    monkeypatch.setattr(dist.LogNormal, "log_prob", lambda *args: evaluated.append(args) or log_prob(*args))

    def model(x, least):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        logits = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        share = numpyro.sample("share", dist.TransformedDistribution(logits, StickBreakingTransform()))
        numpyro.factor("region", jnp.where(scale.sum() > least, 0.0, -jnp.inf))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(3), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(x**2 * scale * share, axis=-1))

    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)

    @jax.jit
    def numpyros(key, least):
        prior = prior_model(model)
        plain = SVI(prior, AutoDelta(prior), optax.adam(0.1), Trace_ELBO())
        return plain.get_params(plain.init(key, x, least))

    fitter = ScoreMatching(model)
    start = fitter.get_params(fitter.init(KEY, x, 5.0))
    assert not evaluated
    assert_sites_close(start, numpyros(KEY, 5.0), rtol=1e-6)
    assert evaluated
    # The medians of 15 draws have a sum of 3.2 ± 0.6, of which the penalty leaves few.
    assert np.sum(numpyros(KEY, 0.0)["scale_auto_loc"]) < 5 < np.sum(start["scale_auto_loc"])


def test_starts_where_other_priors_are_finite():
    """A prior that cannot be drawn from starts anywhere, and is asked; a Delta is refused by NumPyro."""

    class Wedge(dist.Distribution):
        support, reparametrized_params = constraints.real_vector, []

        def __init__(self):
            super().__init__((), (2,), validate_args=False)

        def log_prob(self, value):
            return jnp.where(value[..., 0] < value[..., 1], -0.5 * jnp.sum(value**2, -1), -jnp.inf)

        def sample(self, key, sample_shape=()):
            raise NotImplementedError

    def model(x, prior):
        place = numpyro.sample("place", prior)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum((x - place) ** 2, axis=-1))

    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    for seed in range(4):
        fitter = ScoreMatching(model)
        place = fitter.get_params(fitter.init(jax.random.key(seed), x, Wedge()))["place_auto_loc"]
        assert place[0] < place[1]
    with pytest.raises(ValueError, match="'place' has a delta distribution"):
        run(ScoreMatching(model), x, dist.Delta(2.0))


def test_laplace_guide_on_the_unnormalised_model_is_refused():
    """AutoLaplaceApproximation(model) would evaluate the density without its normaliser."""
    with pytest.raises(ValueError, match="pass the class, guide=AutoLaplaceApproximation"):
        ScoreMatching(conjugate, AutoLaplaceApproximation(conjugate))


def test_init_params_are_where_the_fit_starts():
    """`init_params` set params of model and guide: the first loss is the closed form there."""
    start = {"tau": np.float32(0.3), "mu_auto_loc": np.float32(-2.0)}
    fit = run(ScoreMatching(gaussian, optim=optax.sgd(0.0), num_steps=1), X, init_params=start)
    expected = 0.5 * 0.3**2 * np.sum((X + 2) ** 2) - 0.3 * N * D
    np.testing.assert_allclose(fit.losses, [expected], rtol=1e-5)
    assert_sites_close(fit.estimates, {"tau": 0.3, "mu": -2.0}, rtol=1e-6)


@pytest.mark.parametrize("penalised", [False, True])
def test_a_fit_starts_in_few_programs(penalised):
    """The guide, the rest of the start and the check of the data are one program each; others make keys and zeros."""

    def model(x):
        if penalised:
            numpyro.factor("penalty", -jnp.sum(numpyro.sample("shift", dist.Normal(0.0, 1.0).expand([3])) ** 4))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 2.0).expand([3]).to_event(1))
        mu = numpyro.param("mu", lambda key: jax.random.normal(key, (3,)))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(3), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(tau * jnp.tanh(x - mu) ** 2, axis=-1))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    with counted_compilations() as compiled:
        ScoreMatching(model).init(KEY, x)
    assert len(compiled) <= 6
    with counted_compilations() as compiled:
        fit = run(ScoreMatching(model, num_steps=1), x)
        fit.estimates  # noqa: B018
    assert len(compiled) <= 14


def test_a_penalty_that_is_never_finite():
    """NumPyro says so, as of any other model: of values traced by JAX it would not."""

    def model(x):
        place = numpyro.sample("place", dist.Normal(0.0, 1.0))
        numpyro.factor("region", jnp.where(place > 99.0, 0.0, -jnp.inf))
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", -0.5 * (x - place) ** 2)

    with pytest.raises(RuntimeError, match="Cannot find valid initial parameters"):
        run(ScoreMatching(model), X[:, 0])


@pytest.mark.filterwarnings("ignore:The loss was still falling")  # the first run is a short one
def test_second_run_compiles_nothing(default):
    """Data are inputs of the compiled step: new values need no compilation, and are fitted."""
    sm, new = default[0], data(7) + 1.0
    run(sm, X, num_steps=20)
    with counted_compilations() as compiled:
        fit = run(sm, new)
    assert not compiled
    assert_sites_close(fit.estimates, closed_form(new), rtol=1e-3)


def test_a_second_run_of_other_shapes():
    """Other rows are fine; other latent numbers are not, as the guide's would be indexed past their end."""

    def model(x, group, num_groups):
        with numpyro.plate("groups", num_groups):
            mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - mu[group]) ** 2)

    fitter = ScoreMatching(model)
    for each in (2, 3):
        x = np.random.default_rng(0).normal(size=each * 4)
        fit = fitter.run(None, x, np.repeat(np.arange(4), each), 4, progress_bar=False)
        assert fit.estimates["mu"].shape == (4,)
    with pytest.raises(ValueError, match=r"Site 'mu' has shape \(6,\) and had shape \(4,\) in the first run"):
        fitter.run(None, x, np.repeat(np.arange(6), 2), 6, progress_bar=False)


def test_loss_changes_from_exact_to_sliced_above_64_dimensions():
    """f = −½τ(Σx)² has ½τ²D(Σx)² − τD as its ISM loss; SSM sees its trace with noise."""

    def model(x):
        tau = numpyro.param("tau", 0.1)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(x.shape[-1]), obs=x)
            numpyro.factor("energy", -0.5 * tau * jnp.sum(x, axis=-1) ** 2)

    for d in (64, 65):
        x = np.random.default_rng(d).normal(size=(3, d)).astype(np.float32)
        exact = np.sum(0.5 * 0.01 * d * x.sum(-1) ** 2 - 0.1 * d)
        loss = {}
        for name, given in {"default": None, "SSM": SSM()}.items():
            sm = ScoreMatching(model, loss=given)
            loss[name] = jax.jit(sm.evaluate)(sm.init(KEY, x), x)
        np.testing.assert_allclose(loss["default"], exact if d == 64 else loss["SSM"], rtol=1e-4)
        assert abs(loss["SSM"] / exact - 1) > 1e-3


# -- subsampling ------------------------------------------------------------------------------------


def test_subsampled_gradient_is_unbiased():
    """Mean over 4000 keys against the gradient on all rows: 5 standard errors, false alarms at 1e-6."""
    sm = ScoreMatching(gaussian)
    params = sm.get_params(sm.init(KEY, X))

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.vmap, in_axes=(0, None))
    def gradient(key, batch):
        loss = lambda p: sm.loss.loss(key, p, sm.model, sm.guide, X, batch)  # noqa: E731
        return jax.grad(loss)(params)

    keys = jax.random.split(jax.random.key(1), 4000)
    parts = {name: np.asarray(v) for name, v in gradient(keys, BATCH).items()}
    for name, whole in gradient(keys[:1], None).items():
        error = parts[name].std() / len(keys) ** 0.5
        assert 0 < error < abs(whole)
        assert abs(parts[name].mean() - whole) < 5 * error


@pytest.mark.slow
def test_subsampled_fit_agrees_with_the_full_fit(default):
    """With 200 rows a step and a rate that falls to zero: within a quarter of a standard error.

    Over many keys the distance is 0.05 standard errors: five times that is a false alarm at 1e-6. The errors
    themselves are those of all rows, not of the last 200.
    """
    fit, errors = run(default[0], X, batch=200), default[1].stderr()
    for name, value in default[1].estimates.items():
        assert abs(fit.estimates[name] - value) < 0.25 * errors[name]
    assert_sites_close(fit.stderr(), errors, rtol=0.1)
