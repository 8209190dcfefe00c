"""Rows with weights in the maximum mean discrepancy and the Stein test."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper

from numpyro_score import Energy, kernel_stein_discrepancy, mmd
from numpyro_score.divergences.mmd import weighted_mmd_statistic
from numpyro_score.divergences.stein import stein_kernel, weighted_stein_statistic

KEY = jax.random.key(0)
NORMAL = dist.Normal(0.0, 1.0)


def importance(rng, n):
    """Rows of N(0, 1.5²) and what makes N(0, 1) of them, up to a factor."""
    x = 1.5 * rng.normal(size=n)
    return x, 7.0 * np.exp(-0.5 * x**2 * (1 - 1 / 1.5**2))


def test_equal_weights_are_none():
    x, y = np.random.default_rng(0).normal(size=(2, 60))
    one, other = mmd(x, y + 0.5, bandwidth=1.0), mmd(x, y + 0.5, bandwidth=1.0, weights_p=np.full(60, 3.0))
    np.testing.assert_allclose(tuple(other), tuple(one), rtol=1e-4)
    one, other = (kernel_stein_discrepancy(x, NORMAL, KEY, weights=w) for w in (None, np.full(60, 0.2)))
    np.testing.assert_allclose(tuple(other), tuple(one), rtol=1e-4)


def test_values_at_given_rows(x64):
    """By hand: Σ w w' k over Σ w w', over pairs of different rows; rows of weight zero are none."""
    rng = np.random.default_rng(1)
    x, y, w, v = rng.normal(size=20), rng.normal(size=30), rng.exponential(size=20), rng.exponential(size=30)
    w[3] = 0.0

    def gaussian(a, b):
        return np.exp(-0.5 * (a[:, None] - b) ** 2 / 0.49)

    def mean(weights, values):
        return np.sum(weights * values) / weights.sum()

    apart = [np.outer(u, u) * (1 - np.eye(len(u))) for u in (w, v)]
    expected = (
        mean(apart[0], gaussian(x, x)) + mean(apart[1], gaussian(y, y)) - 2 * mean(np.outer(w, v), gaussian(x, y))
    )
    found = mmd(x, y, bandwidth=0.7, weights_p=w, weights_q=v)
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    np.testing.assert_allclose(found.ess, min(w.sum() ** 2 / (w**2).sum(), v.sum() ** 2 / (v**2).sum()))

    u = x[:, None] - x
    k = (1 + u**2 / 0.49) ** -0.5
    first, second = -0.5 * k**3 / 0.49, 0.75 * k**5 / 0.49**2  # in ‖u‖²
    h = np.outer(x, x) * k + 2 * first * u * (x[:, None] - x) - 2 * first - 4 * second * u**2
    found = kernel_stein_discrepancy(x, NORMAL, KEY, bandwidth=0.7, weights=w)
    np.testing.assert_allclose(found.value, mean(apart[0], h), rtol=1e-9)
    assert found.num_rows == 19


@pytest.mark.slow
def test_weighted_rows_stand_for_their_law(optimised):
    """Against N(0.5, 1) the mean of MMD² is right, and its errors are; the Stein test against N(0, 1) has its level.

    Of 600 data sets the variance has a relative error of 6%, and shares of 0.05 one of 0.009. A ratio of means is off
    by a few hundredths at 150 rows.
    """
    rng, n, count = np.random.default_rng(2), 150, 600
    drawn = [importance(rng, n) for _ in range(count)]
    x, w = (jnp.asarray(np.stack(v), float) for v in zip(*drawn, strict=True))
    w /= w.mean(1, keepdims=True)
    y = jnp.asarray(rng.normal(size=(count, n)) + 0.5, float)
    statistic = jax.jit(jax.vmap(lambda x, y, w: weighted_mmd_statistic(x, y, w, jnp.ones(n), 1.0)))
    values, errors = map(np.asarray, statistic(x[..., None], y[..., None], w))
    exact = 2 * 3**-0.5 * (1 - np.exp(-(0.5**2) / 6))
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(count) + 0.04 * exact
    assert 0.8 < np.mean(errors**2) / values.var() < 1.4

    @jax.jit
    @jax.vmap
    def pvalue(x, w, key):
        return weighted_stein_statistic(stein_kernel("imq"), (x, -x), w, key, 200)[2]

    def pvalues(w):
        return np.asarray(pvalue(x[..., None], w, jax.random.split(KEY, count)))

    assert abs(np.mean(pvalues(w) <= 0.05) - 0.05) < 0.03
    assert np.mean(pvalues(jnp.ones_like(w)) <= 0.05) > 0.5


def test_discrete_rows():
    """Counts of a table in place of its rows: each of the four values once, with how often it was seen."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(numpyro.distributions.constraints.boolean, (), (2,)), obs=x)
            numpyro.factor("energy", x[:, 0] * x[:, 1] * 1.0)

    rng = np.random.default_rng(3)
    x = rng.integers(0, 2, (200, 2))
    w = np.exp(x[:, 0] * x[:, 1] * 1.0)
    energy = Energy(model, {}, jnp.asarray(x))
    assert kernel_stein_discrepancy(x, energy, KEY, weights=w).pvalue > 0.05
    assert kernel_stein_discrepancy(x, energy, KEY).pvalue < 0.01


def plain(x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(9), ValueError, r"weights has shape \(9,\): pass one weight for each row of p, \(10,\)"),
        (-np.ones(10), ValueError, "weights is negative or not finite in rows 0, 1"),
        (np.where(np.arange(10) == 4, np.nan, 1.0), ValueError, "weights is negative or not finite in row 4"),
        ((np.arange(10) < 3) * 1.0, ValueError, "needs at least four independent rows of p, got 3"),
    ],
)
def test_refused(weights, error, message, unchecked):
    x = np.linspace(-1, 1, 10)
    with pytest.raises(error, match=message):
        kernel_stein_discrepancy(x, NORMAL, KEY, weights=weights)


def test_weights_are_of_rows():
    with pytest.raises(TypeError, match="weights_q of mmd are of rows of data: leave them out for laws"):
        mmd(np.ones(10), NORMAL, KEY, weights_q=np.ones(10))
    with pytest.raises(TypeError, match="weights of kernel_stein_discrepancy are of rows"):
        kernel_stein_discrepancy(Energy(plain, {}, jnp.ones((10, 1))), NORMAL, KEY, weights=np.ones(10))
