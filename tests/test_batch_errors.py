"""Standard errors summed over batches, beside those of all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, MALA, PCD, SSM, ScoreMatching
from numpyro_score.uncertainty import SandwichError

X = np.random.default_rng(0).normal(size=(240, 2)).astype(np.float32)
BATCHES = [X[:100], X[100:140], X[140:]]  # not all of one size
EQUAL = list(X.reshape(6, 40, 2))


def quartic(x):
    """Quartic tails, a prior of the weight and a parameter without."""
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    b = numpyro.param("b", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, -1) - b * jnp.sum(x, -1) ** 2)


@pytest.fixture(scope="module")
def whole():
    return ScoreMatching(quartic, loss=ISM(), optim=optax.lbfgs(), num_steps=60).run(0, X, progress_bar=False)


@pytest.fixture(scope="module")
def summed(whole):
    return whole.over_batches(BATCHES)


def close(one, other, rtol=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), one, other)


@pytest.mark.slow
def test_sums_are_those_of_all_rows(whole, summed):
    """Covariance, errors of sites and functions, learning rate and draws, from any cut of the rows."""
    found = summed
    close(found.covariance(), whole.covariance(), 1e-3)
    close(found.stderr(), whole.stderr())

    def ratio(estimates):
        return {"ratio": estimates["a"] / estimates["b"]}

    close(found.stderr(of=ratio), whole.stderr(of=ratio), 1e-3)
    assert found.calibrated_learning_rate() == pytest.approx(whole.calibrated_learning_rate(), rel=1e-3)
    draws = found.sample_posterior(jax.random.key(1), 4000)["a"]
    np.testing.assert_allclose(draws.std(0) / draws.mean(0), whole.stderr()["a"] / whole.estimates["a"], rtol=0.3)
    close(whole.over_batches(X[None]).stderr(), whole.stderr())


def test_rows_that_stand_for_more(whole):
    """Errors of ten times as many rows are those of a data set that holds each ten times."""
    tenfold = ScoreMatching(quartic, loss=ISM(), optim=optax.lbfgs(), num_steps=60)
    tenfold = tenfold.run(0, np.tile(X, (10, 1)), progress_bar=False)
    found = tenfold.over_batches(BATCHES, num_rows=2400)
    close(found.stderr(), tenfold.stderr(), 3e-3)  # of N − 1 rows and of 10 (N − 1)


def test_masked_rows_are_no_rows():
    """As in fits of all rows."""

    def masked(x):
        a = numpyro.param("a", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=jnp.isfinite(x).all(-1)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            numpyro.factor("energy", -a * jnp.sum(x**4, -1))

    x = X.copy()
    x[::7] = np.nan
    fit = ScoreMatching(masked).run(0, x, progress_bar=False)
    close(fit.over_batches([x[:120], x[120:]]).stderr(), fit.stderr())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss was still falling", "ignore:The fit has not converged")
@pytest.mark.parametrize(
    "loss", [SSM(variance_reduced=False), PCD(200, kernel=MALA(step_size=0.1))], ids=["SSM", "PCD"]
)
def test_losses_that_draw(loss):
    """Each batch has random numbers of its own, so that errors agree as far as one draw of them does."""
    sm = ScoreMatching(quartic, loss=loss, optim=optax.adam(1e-2), num_steps=600)
    fit = sm.run_batches(0, EQUAL, num_rows=len(X), num_steps=600, progress_bar=False)
    whole = ScoreMatching(quartic, loss=loss, optim=optax.adam(1e-2), num_steps=1)
    whole = whole.run(0, X, init_state=fit.state, progress_bar=False)
    close(fit.over_batches(EQUAL).stderr(), whole.stderr(), 0.3)


def test_a_fit_that_has_not_arrived(whole):
    """The gradient is that of all batches."""
    early = ScoreMatching(quartic, loss=ISM(), optim=optax.adam(1e-3), num_steps=3).run(0, X, progress_bar=False)
    with pytest.warns(UserWarning, match="has not converged"):
        early.over_batches(BATCHES)


def grouped(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 4):
        u = numpyro.sample("u", dist.Normal(mu, 1.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - u[:2]) ** 2, -1))


def test_what_is_refused(whole, summed):
    for call in (summed.influence, lambda: summed.stderr(diagonal=True)):
        with pytest.raises(SandwichError, match="rows in memory: take the fit that over_batches or windham was given"):
            call()
    with pytest.raises(ValueError, match="batches has none"):
        whole.over_batches(iter(()))
    with pytest.raises(ValueError, match="num_rows=100 is less than the 240 rows"):
        whole.over_batches(BATCHES, num_rows=100)
    with pytest.raises(SandwichError, match="the batches have 1"):
        whole.over_batches([X[:1]])
    hierarchy = ScoreMatching(grouped, optim=optax.adam(1e-2), num_steps=1).run(0, X, progress_bar=False)
    with pytest.raises(SandwichError, match="batches do not show whole groups"):
        hierarchy.over_batches(BATCHES)
