"""Models that hold NumPy's arrays: a second fit is as the first."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from models import improper
from numpyro.distributions import constraints

from numpyro_score import ScoreMatching


def test_a_second_fit_of_a_model_with_numpy_arrays():
    """As the start of a param, an argument of a prior, a bound and a deterministic value."""

    def model(x):
        b = numpyro.param("b", np.zeros(3, np.float32))
        c = numpyro.param("c", np.zeros(3, np.float32), constraint=constraints.interval(-np.ones(3), np.ones(3)))
        a = numpyro.sample("a", dist.Normal(np.zeros(3), 1.0).to_event(1))
        numpyro.deterministic("d", np.ones(3))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", -0.5 * ((x - a - b) ** 2).sum(-1) + (c * x).sum(-1))

    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    first, second = (
        ScoreMatching(model, num_steps=5, optim=optax.sgd(1e-4)).run(jax.random.key(0), x, progress_bar=False).estimates
        for _ in range(2)
    )
    for site, value in first.items():
        np.testing.assert_array_equal(second[site], value)
