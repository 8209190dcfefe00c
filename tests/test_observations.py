"""What posteriors refuse of an observation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper

from numpyro_score import VP, Energy, inpaint, posterior
from numpyro_score.diffusion.observations import split_observation
from numpyro_score.diffusion.posteriors import Problem

KEY, RANGE = jax.random.key(0), (0.02, 20.0)
SETTINGS = {"noise_range": RANGE, "num_particles": 128, "num_runs": 4, "num_steps": 8}
MEANS, WEIGHTS, VARIANCE = np.array([-3.0, 0.0, 4.0]), np.array([0.3, 0.5, 0.2]), 0.2
DATA = np.random.default_rng(0).choice(MEANS, 500, p=WEIGHTS) + VARIANCE**0.5 * np.random.default_rng(1).normal(
    size=500
)


def three_modes(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", log_prior(x, sigma))


def log_prior(x, sigma):
    spread = VARIANCE + sigma**2
    return jax.nn.logsumexp(
        jnp.log(WEIGHTS[:, None]) - 0.5 * (x - MEANS[:, None]) ** 2 / spread - 0.5 * jnp.log(spread), axis=0
    )


def observed(x, y, scale=0.3):
    numpyro.sample("y", dist.Normal(x, scale), obs=y)


@pytest.fixture(scope="module")
def source():
    return Energy(three_modes, {}, jnp.asarray(DATA, jnp.float32))


def plate_of_three(x, y):
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def subsampled(x, y):
    with numpyro.plate("rows", 3, subsample_size=2):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def with_key(x, y):
    numpyro.sample("y", dist.Normal(x + jax.random.normal(numpyro.prng_key()), 1.0), obs=y)


def coin(x, y):
    numpyro.sample("y", dist.Bernoulli(logits=x), obs=y)


@pytest.mark.parametrize(
    ("model", "y", "error", "message"),
    [
        (observed, np.nan, ValueError, r"site 'y' is NaN or outside .* 1 of 1 places, first nan,"),
        (plate_of_three, np.array([0.0, np.inf, 1.0]), ValueError, r"site 'y' .* 1 of 3 places, first inf at \[1\]"),
        (plate_of_three, np.zeros(4), ValueError, r"site 'y' has shape \(4,\), and its law \(3,\)"),
        (coin, 3, ValueError, r"site 'y' .* first 3, which no x"),
        (subsampled, 0.0, ValueError, r"plate 'rows' .* takes 2 of 3, .* observe all rows"),
        (with_key, 0.0, TypeError, r"random key by numpyro\.prng_key"),
        (observed, "a", TypeError, r"site 'y' is 'a': give a number"),
        ("observed", 0.0, TypeError, r"needs a NumPyro model as observation_model, got 'observed'"),
    ],
)
def test_observations_that_are_refused(source, model, y, error, message, recwarn, unchecked):
    """With the site's name, once, and before anything is compiled for it."""
    with pytest.raises(error, match=message):
        posterior(source, model, KEY, y, **SETTINGS)
    assert not recwarn.list


def test_calls_that_are_refused(source):
    """Unknown arguments, by the name of the function called, and transformations of the whole."""
    with pytest.raises(TypeError, match=r"posterior cannot call the observation model observed .* argument 'foo'"):
        posterior(source, observed, KEY, 1.0, foo=3, **SETTINGS)
    with pytest.raises(TypeError, match=r"posterior takes no sde"):
        posterior(source, observed, KEY, 1.0, sde=VP(), **SETTINGS)
    with pytest.raises(ValueError, match=r"^posterior has no grid 'x'"):
        posterior(source, observed, KEY, 1.0, grid="x", **SETTINGS)
    with pytest.raises(ValueError, match=r"^posterior needs a num_steps"):
        posterior(source, observed, KEY, 1.0, **{**SETTINGS, "num_steps": 0})
    for transform, y in ((jax.jit, 1.0), (jax.vmap, jnp.ones(2))):
        with pytest.raises(TypeError, match=r"^posterior .* outside of jax\.jit, jax\.vmap"):
            transform(lambda y: posterior(source, observed, KEY, y, **SETTINGS).log_evidence)(y)
    with pytest.raises(TypeError, match=r"^inpaint .* outside of jax\.jit"):
        jax.jit(lambda x: inpaint(source, x, np.array(True), KEY, **SETTINGS).log_evidence)(1.0)
    with pytest.raises(TypeError, match=r"inpaint has no setting 'foo': it takes those of posterior, method,"):
        inpaint(source, 1.0, np.array(True), KEY, foo=3, **SETTINGS)
    with pytest.raises(TypeError, match="inpaint needs numbers as x"):
        inpaint(source, "a", np.array(True), KEY, **SETTINGS)


def test_numbers_that_models_use_as_such(source):
    """A size and a switch stay what they are."""

    def sized(x, n, sharp, y):
        with numpyro.plate("rows", n):
            numpyro.sample("y", dist.Normal(x, 0.5 if sharp > 1 else 1.0), obs=y)

    field = Problem.of(source, sized, "tds", 8, 1, 2, "plain", "karras", RANGE).field
    for model, args, num_arrays in (
        (sized, (2, 1.5, np.zeros(2)), 1),
        (observed, (1, 0.5), 2),
        (observed, (1.0, True), 1),
    ):
        assert len(split_observation(model, field, args, {})[0]) == num_arrays

    def plate_of(x, n, y):
        with numpyro.plate("rows", n):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    assert len(split_observation(plate_of, field, (2, 0.5), {})[0]) == 1  # of y
