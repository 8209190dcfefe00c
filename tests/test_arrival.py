"""What a fit that has not arrived says, and that good fits stay quiet."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper

from numpyro_score import ISM, SSM, ScoreMatching
from numpyro_score.inference.arrival import warn_if_still_falling

KEY = jax.random.key(1)
X = jax.random.normal(jax.random.key(0), (500, 3))


def chain(x):
    """That of the README."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    a = numpyro.sample("a", dist.LogNormal(-2, 1).expand([3]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", jnp.sum(w * x[..., :-1] * x[..., 1:], axis=-1) - jnp.sum(a * x**4, axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "few", "many"), [(ISM(), 20, 2000), (SSM(), 100, 2000)])
def test_fits_that_have_not_arrived_say_so(loss, few, many):
    """At the end of the run and by stderr, where 2,000 steps are enough; a loss with random projections too.

    At one draw of these the minimum of a good fit is about one standard error away.
    """
    sm = ScoreMatching(chain, loss=loss)
    with pytest.warns(UserWarning, match="The loss was still falling when the run ended"):
        short = sm.run(KEY, X, num_steps=few, progress_bar=False)
    with pytest.warns(UserWarning, match=r"the minimum is [1-9].* standard errors away in site"):
        short.stderr()
    fit = sm.run(KEY, X, num_steps=many, progress_bar=False)  # warnings are errors
    fit.stderr()
    assert np.max(fit.curvature.distance) <= 0.1 < np.max(short.curvature.distance)


def test_less_than_half_a_standard_error_is_seen():
    """A mean that Adam is still on its way to, by an exact loss, at a third of a standard error."""

    def location(x):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * (x - mu) ** 2)

    x = np.random.default_rng(0).normal(size=400)
    x = (x - x.mean()) / x.std(ddof=1)
    sm = ScoreMatching(location, num_steps=1)
    for away, told in ((0.08, False), (0.33, True)):
        fit = sm.run(KEY, jnp.asarray(x + away / 20), progress_bar=False)  # solved at once, whatever the start
        free = {k: v + away / 20 for k, v in fit.params.items()}
        moved = sm.init(KEY, jnp.asarray(x + away / 20), init_params=free)
        fit = type(fit)(sm.get_params(moved), moved, fit.losses, sm, fit.args, fit.kwargs)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            np.testing.assert_allclose(fit.stderr()["mu"], 0.05, rtol=1e-4)
        assert [str(w.message).startswith("The fit has not converged") for w in found] == [True] * told
        np.testing.assert_allclose(fit.curvature.distance, [away], rtol=1e-2)


@pytest.mark.parametrize("steps", [20, 200, 2000])
def test_settled_losses_are_quiet(steps):
    """Of noise as large as the loss of a run's rows: less than one of 300 runs is told, at a level of 1 in 1,000."""
    rng, told = np.random.default_rng(0), 0
    for _ in range(2000):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warn_if_still_falling(500.0 * rng.normal(size=steps) - 480.0, 500)
        told += len(found)
    assert told <= 7


@pytest.mark.parametrize(("steps", "told"), [(20, True), (60, True), (400, False)])
def test_falling_losses_are_told(steps, told):
    """Of a loss that falls by a third every ten steps, with noise of one row's loss; at the end it has settled."""
    noise = np.random.default_rng(0).normal(size=steps)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_if_still_falling(2000.0 * np.exp(-np.arange(steps) / 25) - 480.0 + noise, 500)
    assert len(found) == told
