"""Adversarial dynamics embedding: maximum likelihood through the bound of a flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import FAST_COMPILE, assert_mean, counted_compilations, improper
from numpyro.distributions import constraints

from numpyro_score import AdversarialDynamicsEmbedding, HamiltonianFlow, LearnedFlow, score_factor
from numpyro_score.inference import NonFiniteLossError

KEY = jax.random.key(0)


def correlation(dim, rho=0.5):
    return np.array([[rho ** abs(i - j) for j in range(dim)] for i in range(dim)])


def draw(dim, n):
    return np.random.default_rng(0).multivariate_normal(np.zeros(dim), correlation(dim), n).astype(np.float32)


def normal(x):
    """Rows of unknown precision matrix."""
    dim = x.shape[-1]
    precision = numpyro.param("precision", jnp.eye(dim), constraint=constraints.positive_definite)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(dim), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x * (x @ precision), -1))


def scaled(x, size=None, rate=1.0):
    """One precision, latent, with a prior and subsampled rows."""
    tau = numpyro.sample("tau", dist.Exponential(rate))
    with numpyro.plate("rows", len(x), subsample_size=size):
        rows = numpyro.subsample(x, event_dim=1)
        rows = numpyro.sample("x", improper(x.shape[-1]), obs=rows)
        numpyro.factor("energy", -0.5 * tau * jnp.sum(rows**2, -1))


def mle_and_errors(x):
    """The maximum likelihood estimate of a precision with known mean zero, and its standard errors."""
    mle = np.linalg.inv(x.T @ x / len(x))
    variance = (np.outer(np.diag(mle), np.diag(mle)) + mle**2) / len(x)
    return mle, np.sqrt(variance)


@pytest.mark.slow
def test_recovers_a_precision_matrix():
    """The maximum of the likelihood is in closed form; the bound is within 0.1 of the fitted model's log Z."""
    dim, steps, rows, num_steps = 3, 4, 500, 600
    x = draw(dim, rows)
    ade = AdversarialDynamicsEmbedding(normal, LearnedFlow(dim, steps, annealed=True), num_steps=num_steps)
    fit = ade.run(KEY, x, progress_bar=False)
    found = np.asarray(fit.estimates["precision"])
    mle, stderr = mle_and_errors(x)
    assert np.abs((found - mle) / stderr).max() < 3
    log_z = 0.5 * dim * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(found)[1]
    weights = jax.jit(lambda flow, key: flow.log_weights(key, (20_000,)))(fit.flow, jax.random.key(1))
    bound, error = float(weights.mean()), float(weights.std()) / 20_000**0.5
    assert log_z - 0.1 < bound < log_z + 5 * error
    # The traces are of the same things: the loss holds no prior here, and the entropy is exact. Its log Z is of the
    # mean weight, at least the mean log weight, the bound.
    weighted = fit.losses / rows + fit.data_term
    assert np.all(weighted > fit.log_partition_bound - 1e-3 * np.abs(weighted))
    np.testing.assert_allclose(fit.data_term[-1], fit.energy.log_density(x).mean(), rtol=1e-3)
    np.testing.assert_allclose(fit.joint_entropy[-1], fit.flow.entropy(), rtol=1e-3)
    last = fit.log_partition_bound[-100:]
    spread = np.hypot(float(weights.std()) / (100 * ade.num_samples) ** 0.5, error)
    assert abs(last.mean() - bound) < 5 * spread + 0.01  # φ and θ still move a little over the last steps


def base_alone(log_density):
    """A flow that is hardly more than its base, whose law is far from a correlated one."""
    base = dist.Normal(numpyro.param("loc", jnp.zeros(2)), 1.3).to_event(1)
    return HamiltonianFlow(base, log_density, 0.01, 1)


@pytest.mark.slow
def test_weighted_draws_need_no_good_flow():
    """By their importance weights the draws of any flow are the model's: the maximum likelihood estimate again."""
    x = draw(2, 500)
    options = dict(num_samples=1000, num_steps=400)
    plain, weighted = (
        AdversarialDynamicsEmbedding(normal, base_alone, **options, importance_weighted=w).run(
            KEY, x, progress_bar=False
        )
        for w in (False, True)
    )
    mle, stderr = mle_and_errors(x)
    assert np.abs((weighted.estimates["precision"] - mle) / stderr).max() < 1
    assert np.abs((plain.estimates["precision"] - mle) / stderr).max() > 3
    log_z = np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(weighted.estimates["precision"])[1]
    np.testing.assert_allclose(weighted.losses[-100:].mean() / 500, (log_z - weighted.data_term[-1]), atol=0.05)


# -- the two gradients --------------------------------------------------------------------------------------------


def exact(log_density):
    """A flow that draws from the model's own law, up to the square of a tiny step."""
    base = dist.MultivariateNormal(numpyro.param("loc", jnp.zeros(2)), correlation(2))
    return HamiltonianFlow(base, log_density, 1e-4, 1)


def test_model_gradient_has_mean_zero_at_the_truth(x64):
    """With a perfect sampler, over fresh data and draws."""
    cov = correlation(2)
    root = jnp.asarray(np.linalg.cholesky(cov))

    def model(x):
        precision = numpyro.param("precision", jnp.asarray(np.linalg.inv(cov)))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(x * (x @ precision), -1))

    ade = AdversarialDynamicsEmbedding(model, exact, optax.sgd(1.0), optax.sgd(0.0), num_samples=100)
    state = ade.init(KEY, jnp.zeros((100, 2)))

    def gradient(key):
        data_key, key = jax.random.split(key)
        x = jax.random.normal(data_key, (100, 2)) @ root.T
        new, terms = ade.update(state._replace(rng_key=key), x)
        return ade.get_params(state)["precision"] - ade.get_params(new)["precision"], terms

    gradients, terms = jax.jit(lambda keys: jax.lax.map(gradient, keys))(jax.random.split(KEY, 2000))
    assert_mean(gradients, 0.0)
    # Of 100 rows and 100 draws: 2 · 100 Var(½ xᵢxⱼ), known in closed form, so that the scale is right, too.
    variance = 50 * (np.outer(np.diag(cov), np.diag(cov)) + cov**2)
    np.testing.assert_allclose(gradients.var(0), variance, rtol=0.25)
    assert_mean(terms.data_term, -1.0)  # −½ E xᵀKx = −D/2
    np.testing.assert_allclose(terms.log_partition_bound, np.log(2 * np.pi) + 0.5 * np.log(0.75), atol=1e-3)


@pytest.mark.slow
def test_flow_gradient_is_that_of_the_bound(x64):
    """By finite differences at fixed θ and the step's own key."""
    x = jnp.asarray(draw(2, 50), jnp.float64)
    flow = LearnedFlow(2, 2, annealed=True, refreshed=True)
    ade = AdversarialDynamicsEmbedding(normal, flow, optax.sgd(0.0), optax.sgd(1.0), num_samples=20)
    state = ade.init(KEY, x)
    update = jax.jit(ade.update, compiler_options=FAST_COMPILE)
    gradient = jax.tree.map(jnp.subtract, update(state, x)[0].flow_params, state.flow_params)
    for name, value in state.flow_params.items():
        for i in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[i] = 1e-5
            moved = [
                update(state._replace(flow_params={**state.flow_params, name: np.asarray(value) + s}), x)[1]
                for s in (step, -step)
            ]
            difference = (moved[0].log_partition_bound - moved[1].log_partition_bound) / 2e-5
            np.testing.assert_allclose(gradient[name][i], difference, rtol=1e-5, atol=1e-7)


# -- the objective ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prior_subsampling_and_inner_steps(x64):
    """A posterior mode in closed form: τ̂ = (N D) / (Σ‖x‖² + 2 rate); subsampled rows count for all."""
    x = jnp.asarray(2.0 * np.random.default_rng(1).normal(size=(60, 2)))
    flow = LearnedFlow(2, 1)
    options = dict(flow_steps=2, num_samples=64, num_steps=500)
    ade = AdversarialDynamicsEmbedding(scaled, flow, **options)
    rate = 40.0
    fit = ade.run(KEY, x, rate=rate, progress_bar=False)
    expected = x.size / (float(jnp.sum(x**2)) + 2 * rate)
    np.testing.assert_allclose(fit.estimates["tau"], expected, rtol=0.03)
    # The gradient at one state, over subsamples and draws, is that on all rows.
    still = AdversarialDynamicsEmbedding(scaled, flow, optax.sgd(1.0), optax.sgd(0.0), num_samples=8)

    def gradients(size):
        state = still.init(KEY, x, size=size)

        def one(key):
            new = still.update(state._replace(rng_key=key), x, size=size)[0]
            before, after = (jax.tree.leaves(still._svi.optim.get_params(s.optim_state)) for s in (state, new))
            return before[0] - after[0]

        found = jax.jit(lambda keys: jax.lax.map(one, keys), compiler_options=FAST_COMPILE)
        return found(jax.random.split(KEY, 1500))

    whole, part = gradients(None), gradients(7)
    assert_mean(part - whole.mean(), 0.0, errors=5 * np.sqrt(1 + whole.var() / part.var()))


@functools.cache
def small():
    return AdversarialDynamicsEmbedding(normal, LearnedFlow(2, 1), num_steps=20)


@pytest.mark.slow
def test_second_run_compiles_nothing_and_goes_on():
    x = draw(2, 50)
    ade = small()
    first = ade.run(KEY, x, progress_bar=False)
    with counted_compilations() as compiled:
        second = ade.run(jax.random.key(1), x + 1.0, init_state=first.state, progress_bar=False)
    assert len(compiled) == 0
    assert int(second.state.optim_state[0]) == 40 and second.losses.shape == (20,)


def test_estimates_as_a_table():
    """Every number by name, without errors, and sentences that say of what and why."""
    fit = small().run(KEY, draw(2, 50), progress_bar=False)
    table = fit.summary()
    numbers = {k: np.ravel(v) for k, v in fit.estimates.items()}
    np.testing.assert_allclose(table["estimate"], np.concatenate([numbers[k] for k in numbers]))
    assert "by adversarial dynamics embedding on 50 rows of" in repr(table) and "No standard errors" in repr(table)
    assert list(table.columns) == ["estimate"] and "</table>" in table._repr_html_()


def test_interrupted_run_keeps_what_there_is(monkeypatch):
    ade = small()
    real, calls = ade._advance, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ade, "_advance", interrupted)
    with pytest.warns(UserWarning, match="Interrupted after 9 of 20"):
        fit = ade.run(KEY, draw(2, 50), progress_bar=False)
    assert fit.interrupted and len(fit.losses) == 9


# -- what is refused ----------------------------------------------------------------------------------------------


def run(model, x, *args, error=ValueError, match="", num_steps=200, **options):
    ade = AdversarialDynamicsEmbedding(model, *args, num_steps=num_steps, **options)
    with pytest.raises(error, match=match) as caught:
        ade.run(KEY, x, progress_bar=False)
    return caught.value


def test_what_is_refused():
    x = draw(2, 20)
    run(normal, x, LearnedFlow(3), match="base has 3 dimensions, but a row of the data has 2")

    def bounded(x):
        with numpyro.plate("rows", len(x)):
            tau = numpyro.param("tau", 1.0)
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), (2,)), obs=x)
            numpyro.factor("energy", -tau * x.sum(-1))

    run(bounded, np.abs(x), error=NotImplementedError, match="would move the data off the support of site 'x'")

    def score_only(x):
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            score_factor("net", x, -tau * x)

    run(score_only, x, error=TypeError, match="'net' is a score_factor")

    def covariates(x):
        z = np.arange(20.0, dtype=np.float32)
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", -0.5 * tau * jnp.sum((x - z[:, None]) ** 2, -1))

    run(covariates, x, match="takes no others")


def test_settings_that_are_refused(unchecked):
    with pytest.raises(ValueError, match="positive flow_steps"):
        AdversarialDynamicsEmbedding(normal, flow_steps=0)
    with pytest.raises(TypeError, match="function from a log density"):
        AdversarialDynamicsEmbedding(normal, flow=3)


@pytest.mark.slow
def test_a_flow_that_runs_away_stops_the_fit():
    """An energy without a normaliser: the error names the step, and holds a state to go on from."""

    def unnormalisable(x):
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", tau * jnp.sum(x**4, -1))

    x = draw(2, 20)
    found = run(unnormalisable, x, error=NonFiniteLossError, match=r"at step \d+: the flow ran away")
    assert len(found.losses) == found.step and np.isfinite(found.losses).all()
    assert isinstance(found.params["tau"], jax.Array) and np.isfinite(found.params["tau"])
