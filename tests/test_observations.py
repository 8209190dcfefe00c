"""What posteriors refuse of an observation, and what their numbers are worth where particles, runs or steps are few."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import counted_compilations, improper

from numpyro_score import VP, Energy, inpaint, posterior, simulation_ranks
from numpyro_score.diffusion.evidence import evidence_of
from numpyro_score.diffusion.observations import split_observation
from numpyro_score.diffusion.particles import Run, _ess, _normalised
from numpyro_score.diffusion.posteriors import Problem

KEY, RANGE = jax.random.key(0), (0.02, 20.0)
SETTINGS = {"noise_range": RANGE, "num_particles": 128, "num_runs": 4, "num_steps": 8}
MEANS, WEIGHTS, VARIANCE = np.array([-3.0, 0.0, 4.0]), np.array([0.3, 0.5, 0.2]), 0.2
DATA = np.random.default_rng(0).choice(MEANS, 500, p=WEIGHTS) + VARIANCE**0.5 * np.random.default_rng(1).normal(
    size=500
)
GRID = np.linspace(-6, 7, 6001)


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


def band(x, y):
    numpyro.sample("y", dist.Uniform(x - 0.5, x + 0.5), obs=y)


def exact(log_likelihood):
    """The log evidence by quadrature."""
    prior = np.exp(np.asarray(log_prior(jnp.asarray(GRID), RANGE[0]), float))
    return np.log(np.sum(prior * np.exp(np.asarray(log_likelihood, float))) / np.sum(prior))


@pytest.fixture(scope="module")
def source():
    return Energy(three_modes, {}, jnp.asarray(DATA, jnp.float32))


def test_weights_of_any_size():
    """Log weights that single precision holds and their sum's log does not; none at all."""
    for log_weights in (jnp.full(512, -3.3e11), jnp.full(512, 7e36)):
        relative, total = _normalised(log_weights)
        assert jnp.sum(jnp.exp(relative)) == pytest.approx(1.0, rel=1e-5) and total == log_weights[0]
        assert _ess(log_weights) == pytest.approx(1.0)
    assert _ess(jnp.array([0.0, -1e30, -jnp.inf])) == pytest.approx(1 / 3)
    assert _ess(jnp.full(3, -jnp.inf)) == 0


@pytest.mark.slow
def test_steps_and_distances(source):
    """Steps too long, an observation that leaves one particle, and one beyond single precision; one program for all.

    Numbers of Python and of NumPy do not need another.
    """
    with pytest.warns(UserWarning, match=r"From half the steps to 8 the log evidence moved by .* take more num_steps"):
        found = posterior(source, observed, KEY, 1.9, **SETTINGS)
    away = abs(found.log_evidence - exact(dist.Normal(GRID, 0.3).log_prob(1.9)))
    assert away > 5 * found.log_evidence_stderr and found.log_evidence_step_error > away / 2
    with counted_compilations() as compiled:
        with pytest.warns(UserWarning, match=r"128 particles counted as 1\.\d"):
            found = posterior(source, observed, KEY, np.float64(200.0), **SETTINGS)
        assert found.log_evidence_stderr == np.inf and found.ess >= 1
        assert np.exp(found.log_weights).sum() == pytest.approx(1.0)
        with pytest.raises(FloatingPointError, match=r"lost from noise 20 on, after 0 of 8 steps, in 4 of 4 runs"):
            posterior(source, observed, KEY, 1e6, **SETTINGS)
    assert sum(compiled) < 0.5  # seconds, of the checks' small operations; the particles take ten times that


def test_guidance_that_explodes(source):
    """Draws that are not finite are no draws, and those of which one would weigh all come with a warning."""
    settings = {**SETTINGS, "method": "guided", "twist": "plain"}
    with pytest.raises(FloatingPointError, match=r"from noise .* on, after \d of 8 steps, in \d of 4 runs"):
        posterior(source, observed, KEY, 5.0, 1e-4, **settings)
    with pytest.warns(UserWarning, match=r"128 particles counted as 1\.\d"):
        found = posterior(source, observed, KEY, 1.9, 0.3, **settings)
    assert found.biased and found.least_ess < 2 / 128


@pytest.mark.slow
def test_likelihood_that_ends(source):
    """Where y is impossible at most particles on the way they go on; where it is so at all in the end, an error."""
    settings = {**SETTINGS, "method": "smc", "num_particles": 256}
    found = posterior(source, band, KEY, 0.4, **settings)
    truth = exact(np.where(np.abs(GRID - 0.4) < 0.5, 0.0, -np.inf))
    assert abs(found.log_evidence - truth) < 4 * found.log_evidence_stderr + 0.01
    assert np.all(np.abs(np.asarray(found.draws)[np.exp(found.log_weights) > 0] - 0.4) < 0.5)
    with pytest.raises(FloatingPointError, match=r"impossible at all particles, at noise 0\.02, in 4 of 4 runs"):
        posterior(source, band, KEY, 100.0, **settings)


def run_of(log_z, least_ess=0.5):
    log_z = np.asarray(log_z, np.float32)
    n = len(log_z)
    never = np.full(n, -1)
    log_weights = np.full((n, 64), -np.log(64), np.float32)
    least = np.full(n, least_ess, np.float32)
    return Run(np.zeros((n, 64, 1)), log_weights, log_z, least, np.zeros((n, 64)), never, never, np.zeros(n))


def test_errors_of_evidence():
    """The spread of runs is an error only where several of them and several particles count."""
    even, apart = run_of([0.0, 0.1, -0.1, 0.0]), run_of([0.0, -9.0, -20.0, -30.0])
    assert 0 < evidence_of(even, None, even, 8).stderr < 0.1
    with pytest.warns(UserWarning, match="One of the 4 runs holds most"):
        assert evidence_of(apart, even, None, 8).stderr == np.inf
    with pytest.warns(UserWarning, match="64 particles counted as 1.5"):
        assert evidence_of(run_of([0.0, 0.1], 1.5 / 64), even, None, 8).stderr == np.inf
    with pytest.warns(UserWarning, match=r"One run does not tell its error.*num_runs of 2"):
        assert np.isnan(evidence_of(run_of([0.0]), even, None, 8).stderr)
    with pytest.warns(UserWarning, match=r"One step does not tell its error.*num_steps of 2"):
        assert np.isnan(evidence_of(even, None, None, 1).step_error)
    with pytest.warns(UserWarning, match="moved by inf"):
        assert evidence_of(even, None, even._replace(failed=np.array([-1, 3, -1, -1])), 8).step_error == np.inf


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


def test_ranks_that_are_refused(source, unchecked):
    """Quantities that have no rank, and truths of another form, by name."""
    settings = {"noise_range": RANGE, "num_sets": 3, "num_steps": 4, "truths": DATA}

    def once(x, y=None):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    for quantities, error, message in (
        ([len], TypeError, r"functions by name as quantities, got \["),
        ({"both": lambda x, y: jnp.stack([x, y])}, ValueError, r"quantity 'both' has shape \(2,\), and only numbers"),
        (
            {"mine": lambda x: x},
            TypeError,
            r"quantity 'mine' cannot be called with x and \['y'\].*keyword argument 'y'",
        ),
    ):
        with pytest.raises(error, match=message):
            simulation_ranks(source, once, KEY, quantities=quantities, **settings)
    for truths, message in (
        (np.zeros((5, 2)), r"truths needs rows of the shapes"),
        (np.full(5, np.nan), "truths has NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            simulation_ranks(source, once, KEY, **{**settings, "truths": truths})
    with pytest.raises(ValueError, match=r"^simulation_ranks needs a num_steps"):
        simulation_ranks(source, once, KEY, **{**settings, "num_steps": 0})


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
