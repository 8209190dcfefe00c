"""R-hat beside the noise that it has for so many effective draws."""

import arviz as az
import numpy as np
import pytest
from scipy.signal import lfilter

from numpyro_score.arviz import dataset
from numpyro_score.normaliser.mixing import mixed, too_many_diverged


def diagnosed(rho, shift, seed):
    """R-hat and effective draws of four chains of 1,000 draws with this autocorrelation, the first moved."""
    z = np.random.default_rng(seed).normal(size=(4, 1100, 3))
    x = lfilter([(1 - rho**2) ** 0.5], [1, -rho], z, axis=1)[:, 100:]
    x[0] += shift
    draws = dataset({"x": x}, ("chain", "draw"))
    return az.rhat(draws), az.ess(draws)


def test_slow_chains_that_have_mixed_are_good():
    """Of 100 runs with 700 effective draws five at most are objected to, at a level of 0.01; R-hat alone does more."""
    found = [diagnosed(0.7, 0.0, seed) for seed in range(100)]
    assert sum(not mixed(r, e, 1.01, 4000) for r, e in found) <= 5  # P(more) = 5e-4
    assert sum(float(r["x"].max()) > 1.01 for r, _ in found) > 10


def test_chains_of_their_own_are_not():
    assert not any(mixed(*diagnosed(0.5, 0.5, seed), 1.01, 4000) for seed in range(20))


@pytest.mark.parametrize(
    ("r_hat", "ess", "draws", "good"),
    [
        (1.009, 100, 4000, True),
        (1.02, 399, 4000, False),
        (1.02, 400, 4000, True),
        (1.04, 400, 4000, False),
        (1.011, 4000, 4000, False),
        (1.03, 300, 400, True),  # few draws, but nearly independent
        (1.03, 99, 400, False),
        (1.2, 300, 400, False),
    ],
)
def test_limits(r_hat, ess, draws, good):
    """Of slow chains the usual limit holds; else what chance makes of their draws, where that is larger."""
    ess = dataset({"x": [float(ess)]}, ("one",))
    assert mixed(dataset({"x": [r_hat]}, ("one",)), ess, 1.01, draws) == good
    assert not mixed(dataset({"x": [np.nan]}, ("one",)), ess, 1.01, draws)


def test_few_draws_that_are_independent_are_good():
    """Of 200 runs of four chains of 100 independent draws six at most are objected to, at a level of 0.01."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        draws = dataset({"x": rng.normal(size=(4, 100, 2))}, ("chain", "draw"))
        found += not mixed(az.rhat(draws), az.ess(draws), 1.01, 400)
    assert found <= 6  # P(more) = 0.004


@pytest.mark.parametrize(("count", "bad"), [(0, False), (5, False), (20, False), (21, True)])
def test_a_few_divergences_are_good(count, bad):
    assert too_many_diverged(count, 4000) == bad
