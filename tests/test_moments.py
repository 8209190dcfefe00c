"""Moments of data beside those of draws: sizes, level, and what is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints

from numpyro_score import Energy
from numpyro_score.arviz import dataset
from numpyro_score.divergences.moments import moment_test, permutation_test

KEY = jax.random.key(0)
PAIRED = np.triu_indices(2, 1)


def energy(x, support=constraints.real_vector, weights=1.0):
    """Whatever its density: the test sees data and draws alone."""

    def model(x):
        with numpyro.plate("rows", len(x)), handlers.scale(scale=jnp.asarray(weights)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), x.shape[1:]), obs=x)
            numpyro.factor("energy", -0.5 * (x**2).reshape(len(x), -1).sum(-1))

    return Energy(model, {}, jnp.asarray(x))


def draws(x):
    return {"posterior": dataset({"x": np.asarray(x)}, ("chain", "draw"))}


def test_statistics_by_numpy():
    """Without far rows; differences of means are those of a pooled t-test."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (300, 2)), rng.uniform(-1, 1, (4, 100, 2))
    x[:, 0], y[..., 0] = x[:, 0] + 5e4, y[..., 0] + 5e4 + 0.5
    found = moment_test(energy(np.float32(x)), draws(y), KEY)
    assert found.names[:3] == ["mean of x[0]", "mean of x[1]", "variance of x[0]"]
    assert found.names[4:] == ["skewness of x[0]", "skewness of x[1]", "correlation of x[0] and x[1]"]
    x = np.float64(np.float32(x))
    expected = [*x.mean(0), *x.var(0), *(((x - x.mean(0)) / x.std(0)) ** 3).mean(0), np.corrcoef(x.T)[0, 1]]
    np.testing.assert_allclose(found.data, expected, rtol=1e-5, atol=1e-5)
    both = np.concatenate([x, y.reshape(-1, 2)])[:, 0]
    if found.num_draws == 400:
        z = (y[..., 0].mean() - x[:, 0].mean()) / both.std() / (1 / 300 + 1 / 400) ** 0.5
        np.testing.assert_allclose(found.z[0], z, rtol=1e-2)
    assert found.furthest == 0 and found.pvalue < 0.002 and found.z[0] > 6


@pytest.mark.slow
@pytest.mark.parametrize("law", ["normal", "t", "lognormal"])
def test_level(law):
    """Of 400 pairs of samples of one law, a share near that of the level is below it, whatever the tails."""
    rng = np.random.default_rng(0)
    sampler = {
        "normal": lambda n: rng.normal(size=(n, 2)),
        "t": lambda n: rng.standard_t(2.5, (n, 2)),
        "lognormal": lambda n: np.exp(rng.normal(size=(n, 2))),
    }[law]
    found = [permutation_test(sampler(60), sampler(200), PAIRED, rng, 99)[1].min() for _ in range(400)]
    for level in (0.05, 0.5):
        assert abs(np.mean(np.less_equal(found, level + 1e-9)) - level) < 4 * (level * (1 - level) / 400) ** 0.5


def test_weighted_rows_are_of_the_weighted_law():
    """Weights e^x move a standard normal law to mean one."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 1))
    weights = np.exp(np.minimum(x[:, 0], 3.0))
    y = rng.normal(1.0, 1.0, (4, 250, 1))
    assert moment_test(energy(x, weights=weights), draws(y), KEY).pvalue > 0.01
    assert moment_test(energy(x), draws(y), KEY).pvalue < 0.002


def test_angles_are_compared_on_the_circle():
    """Angles about π, where those at both ends are neighbours."""
    rng = np.random.default_rng(2)
    x, y = (np.angle(np.exp(1j * rng.normal(np.pi, 0.5, size))) for size in (400, (4, 250)))
    found = moment_test(energy(x, constraints.circular), draws(y), KEY)
    assert found.names[:2] == ["mean of cos x", "mean of sin x"] and found.pvalue > 0.01
    assert moment_test(energy(x, constraints.circular), draws(-y + 1.0), KEY).pvalue < 0.002


def test_columns_that_do_not_vary_and_too_few():
    x = np.random.default_rng(3).normal(size=(1400, 2))
    x[:, 1] = 3.0
    y = np.random.default_rng(4).normal([0.0, 3.0], [1.0, 0.1], (4, 100, 2))
    found = moment_test(energy(x), draws(y), KEY)
    assert np.isfinite(found.z).all() and "x[1]" in found.names[found.furthest] and found.pvalue < 0.01
    with pytest.raises(ValueError, match="at least 10 rows, and there are 9"):
        moment_test(energy(x[:9]), draws(y), KEY)
    with pytest.raises(ValueError, match="at least 50 independent draws, and there are 40"):
        moment_test(energy(x), draws(y[:, :10]), KEY)
