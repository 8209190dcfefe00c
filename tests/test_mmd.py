"""The maximum mean discrepancy against closed forms and the spread of replications."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import FAST_COMPILE, assert_mean, assert_variance
from test_divergences import KEY, M1, M2, RNG, S1, S2, close, gaussian

from numpyro_score import mmd
from numpyro_score.arviz import as_arviz, dataset
from numpyro_score.divergences.mmd import mmd_statistic


def gaussian_kernel_mean(gap, covariance, length):
    scale = covariance / length**2 + np.eye(len(gap))
    return np.exp(-0.5 * gap @ np.linalg.solve(scale, gap) / length**2) / np.sqrt(np.linalg.det(scale))


def mmd_exact(first, second, length):
    (a, s), (b, t) = first, second
    zero = np.zeros_like(a)
    means = [gaussian_kernel_mean(*args, length) for args in ((zero, 2 * s), (zero, 2 * t), (a - b, s + t))]
    return means[0] + means[1] - 2 * means[2]


@pytest.mark.slow
def test_mmd_of_gaussians():
    """In closed form, of laws, rows, and unequal numbers of them."""
    expected = mmd_exact((M1, S1), (M2, S2), 1.3)
    x, y = gaussian(0, "data")[:1500], gaussian(1, "data")
    close(mmd(x, y, bandwidth=1.3), expected, 0.01)
    rows = RNG.multivariate_normal(M1, S1, (4, 1000))
    draws = as_arviz({"posterior": dataset({"x": rows}, ("chain", "draw"))})
    close(mmd((gaussian(0, "energy"), draws), gaussian(1, "distribution"), KEY, bandwidth=1.3), expected, 0.02)


def test_mmd_is_the_statistic():
    """Against all pairs, written out; the bandwidth is the median distance."""
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3)) + 1
    pooled = np.concatenate([x, y])
    distances = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(12) for j in range(i)]

    def k(a, b):
        return np.exp(-0.5 * np.sum((a - b) ** 2) / np.median(distances) ** 2)

    within = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert mmd(x, y).value == pytest.approx(sum(within) - 2 * across, abs=1e-6)


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def replicated_mmd(keys, shift):
    def one(key):
        rows = jax.random.normal(key, (150, 2)).at[:60].add(shift)
        return mmd_statistic(rows[:60], rows[60:], jnp.asarray(1.3))

    return jax.lax.map(one, keys, batch_size=100)


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_mmd_unbiased_and_its_error(shift):
    """Mean and spread of replications: where both orders of the error matter, far apart, and at p = q."""
    value, stderr = map(np.asarray, replicated_mmd(jax.random.split(KEY, 1000), shift))
    law = np.full(2, shift), np.eye(2)
    assert_mean(value, mmd_exact(law, (np.zeros(2), np.eye(2)), 1.3))
    if shift:
        assert_variance(value, np.mean(stderr.astype(float) ** 2))
    else:  # the noise of the first order, which is nil, is cut off below
        assert 1 < np.mean(stderr.astype(float) ** 2) / value.var() < 2
