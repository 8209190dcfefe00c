"""Ranks over simulated data sets: uniform where draws are right, and not where they are wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from models import counted_compilations, improper

from numpyro_score import Energy, simulation_ranks
from numpyro_score.diffusion.calibration import _joint_pvalue

SETTINGS = {"noise_range": (0.01, 20.0), "num_sets": 120, "num_particles": 64, "num_steps": 24}
MEANS = np.array([-2.0, 1.0])
DATA = np.random.default_rng(0).choice(MEANS, 200) + 0.3 * np.random.default_rng(1).normal(size=200)


def two_modes(x, sigma=1.0):
    """Of (N,) rows."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        spread = 0.09 + sigma**2
        numpyro.factor(
            "energy", jax.nn.logsumexp(-0.5 * (x - MEANS[:, None]) ** 2 / spread, axis=0) - 0.5 * jnp.log(spread)
        )


def observed(x, scale, y=None):
    with numpyro.plate("twice", 2):
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


@pytest.fixture(scope="module")
def source():
    return Energy(two_modes, {}, jnp.asarray(DATA, jnp.float32))


@pytest.mark.slow
def test_right_draws_pass(source):
    """Truths drawn by the package itself, two-dimensional data, quantities of the user's."""
    far = {"square": lambda x, y: x**2, "residual": lambda x, y: y[0] - x}
    found = simulation_ranks(source, observed, jax.random.key(0), 1.0, quantities=far, **SETTINGS)
    assert set(found.ranks) == {"log likelihood", "log joint", "square", "residual"}
    assert all(len(r) == 120 and r.min() >= 0 and r.max() <= 19 for r in found.ranks.values())
    assert min(found.pvalues().values()) > 1e-3 / 4 and found.joint_pvalue > 0.005


def test_more_data_sets_compile_nothing(source):
    """All that is done for one of them is in two programs; observed numbers are inputs of these."""

    def one(x, y=None):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    settings = {**SETTINGS, "num_sets": 3, "num_particles": 8, "num_steps": 4, "truths": DATA}
    with counted_compilations() as few:
        simulation_ranks(source, one, jax.random.key(0), **settings)
    with counted_compilations() as more:
        simulation_ranks(source, one, jax.random.key(0), **{**settings, "num_sets": 12})
    # The shapes of keys, truths and observed values alone are new.
    assert len(few) > 0 and len(more) <= 12


EIGHT = 3 * np.random.default_rng(7).normal(size=(8, 2))
WIDTH = 0.05**0.5


def eight_modes(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        spread = WIDTH**2 + jnp.broadcast_to(sigma, x.shape[:1]) ** 2
        squares = jnp.sum((x[:, None] - EIGHT) ** 2, axis=-1)
        numpyro.factor("energy", jax.nn.logsumexp(-0.5 * squares / spread[:, None], axis=1) - jnp.log(spread))


def one_number(x, y=None):
    numpyro.sample("y", dist.Normal(x[0] - 0.7 * x[1], 0.2), obs=y)


def truths_of(scale):
    rng = np.random.default_rng(5)
    return scale * (EIGHT[rng.integers(8, size=300)] + WIDTH * rng.normal(size=(300, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "scale"),
    [({"method": "guided", "twist": "isotropic"}, 1.0), ({}, 1 / 1.1)],
    ids=["guidance", "a prior 10% too wide"],
)
def test_wrong_draws_fail(settings, scale):
    """The log joint density says so, and the ranks of the data's own numbers do not."""
    source = Energy(eight_modes, {}, jnp.asarray(truths_of(1.0), jnp.float32))
    wrong = {**SETTINGS, "num_sets": 300, "num_particles": 128, **settings}
    found = simulation_ranks(source, one_number, jax.random.key(3), truths=truths_of(scale), **wrong)
    pvalues = found.pvalues()
    assert pvalues["log joint"] < 0.01 / 4
    assert min(pvalues["x[0]"], pvalues["x[1]"]) > 0.01
    if settings:  # pairs alone would need more data sets to see the prior
        assert found.joint_pvalue < 0.05


def normal_pairs(rng, n, shift):
    """Pairs for y ~ N(0, 2), x | y ~ N(y/2, 1/2), where the draws are off by `shift` with the sign of y."""
    x = rng.normal(size=(n, 1))
    y = x + rng.normal(size=(n, 1))
    draws = y / 2 + np.sqrt(0.5) * rng.normal(size=(n, 19)) + shift * np.sqrt(0.5) * np.sign(y)
    x = np.concatenate([x, draws], axis=1)
    return np.stack([x, np.broadcast_to(y, x.shape)], axis=-1)


@pytest.mark.slow
def test_pairs_have_one_law():
    """The test holds its level, and sees an error that cancels in the ranks of x."""
    rng = np.random.default_rng(0)
    level = [_joint_pvalue(normal_pairs(rng, 30, 0.0), rng) for _ in range(100)]
    assert scipy.stats.kstest(level, "uniform").pvalue > 1e-3
    wrong = [normal_pairs(rng, 200, 0.5) for _ in range(10)]
    assert np.mean([_joint_pvalue(pairs, rng) < 0.01 for pairs in wrong]) >= 0.8
    ranks = np.concatenate([np.sum(pairs[:, 1:, 0] < pairs[:, :1, 0], axis=1) for pairs in wrong])
    assert scipy.stats.chisquare(np.histogram(ranks[:400], 5)[0]).pvalue > 1e-3


def test_what_is_refused(source):
    """Observations that cannot be simulated and given, and too few truths."""

    def other_name(x, values=None):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=values)

    with pytest.raises(TypeError, match=r"no argument 'y'.*def observed\(x, y=None\) with obs=y"):
        simulation_ranks(source, other_name, jax.random.key(0), truths=DATA, **SETTINGS)
    with pytest.raises(ValueError, match="nothing to simulate"):
        simulation_ranks(source, observed, jax.random.key(0), 1.0, np.zeros(2), truths=DATA, **SETTINGS)
    with pytest.raises(ValueError, match=r"truths holds 3 data sets: give at least num_sets=120"):
        simulation_ranks(source, observed, jax.random.key(0), 1.0, truths=DATA[:3], **SETTINGS)
