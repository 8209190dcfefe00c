"""Posteriors with a diffusion prior, against mixtures of normals, whose posteriors are mixtures, and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper

from numpyro_score import Energy, inpaint, posterior, score_factor

KEY = jax.random.key(0)
RANGE = (0.01, 20.0)
MEANS = np.array([[-2.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
VARIANCES = np.array([[0.3, 0.1], [0.2, 0.4], [0.1, 0.1]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
A, NOISE = np.array([[1.0, -0.7]]), 0.3
DATA = jnp.asarray(np.random.default_rng(0).choice(MEANS, 300, p=WEIGHTS), jnp.float32)


def log_mixture(x, sigma):
    """Of the mixture with noise, at rows and their levels, with a constant that depends on the level."""
    spread = VARIANCES + jnp.broadcast_to(sigma, x.shape[:1])[:, None, None] ** 2
    terms = -0.5 * jnp.sum((x[:, None] - MEANS) ** 2 / spread + jnp.log(spread), -1)
    return jax.nn.logsumexp(jnp.log(WEIGHTS) + terms, axis=-1)


def energy(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        # Levels have constants of their own, which no fit determines.
        numpyro.factor("energy", log_mixture(x, sigma) + 3 * jnp.cos(jnp.broadcast_to(sigma, x.shape[:1])))


def score(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        score_factor("score", x, jax.grad(lambda x: log_mixture(x, sigma).sum())(x))


def observed(x, y):
    numpyro.sample("y", dist.Normal(A @ x, NOISE).to_event(1), obs=y)


def exact(y):
    """Log evidence, and weights, means and covariances of the components given y."""
    covariances = np.array([np.diag(v + RANGE[0] ** 2) for v in VARIANCES])
    spread = np.array([A @ c @ A.T + NOISE**2 for c in covariances])[:, 0, 0]
    away = y - MEANS @ A[0]
    logs = np.log(WEIGHTS) - 0.5 * (away**2 / spread + np.log(2 * np.pi * spread))
    gain = np.array([c @ A[0] / s for c, s in zip(covariances, spread, strict=True)])
    means = MEANS + gain * away[:, None]
    given = np.array([c - np.outer(g, A[0] @ c) for c, g in zip(covariances, gain, strict=True)])
    total = np.logaddexp.reduce(logs)
    return total, np.exp(logs - total), means, given


def sliced_distance(a, b, num=50):
    """The Wasserstein distance of order 2 between equally many points, over projections."""
    directions = np.random.default_rng(0).normal(size=(num, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.sqrt(np.mean((np.sort(a @ directions.T, axis=0) - np.sort(b @ directions.T, axis=0)) ** 2))


def draws_of_mixture(rng, weights, means, covariances, n):
    k = rng.choice(len(weights), n, p=weights)
    roots = np.linalg.cholesky(covariances)
    return means[k] + np.einsum("nij,nj->ni", roots[k], rng.normal(size=(n, 2)))


def standardised(found, law):
    """The weighted mean's distance from the exact one, in standard errors at the effective number of draws."""
    weights, x = np.exp(found.log_weights), np.asarray(found.draws)
    variances = weights @ (x - weights @ x) ** 2
    return (weights @ x - law[0] @ law[1]) / np.sqrt(variances / found.ess)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), [(energy, "smc"), (score, "tds")])
def test_mixtures(model, method):
    """Draws and evidence are those of the exact posterior, over ten observations; guidance alone is far off."""
    source, settings = Energy(model, {}, DATA), {"noise_range": RANGE, "num_particles": 256, "num_runs": 4}
    rng, errors, away, guided, distances, floors = np.random.default_rng(1), [], [], [], [], []
    for i in range(10):
        x = draws_of_mixture(rng, WEIGHTS, MEANS, np.array([np.diag(v) for v in VARIANCES]), 1)[0]
        y = A @ x + NOISE * rng.normal(size=1)
        found = posterior(source, observed, jax.random.key(i), y, method=method, **settings)
        assert not found.biased and 0 < found.least_ess <= 1 and 500 < found.unique_ancestors <= 1024
        log_evidence, *law = exact(y[0])
        errors.append((found.log_evidence - log_evidence, found.log_evidence_stderr))
        away.append(standardised(found, law))
        draws = [draws_of_mixture(rng, *law, 1024) for _ in range(10)]
        floors.append(np.mean([sliced_distance(a, b) for a, b in zip(draws[:5], draws[5:], strict=True)]))
        ours = [np.asarray(found.resample(jax.random.key(j), 1024)) for j in range(5)]
        distances.append(np.mean([sliced_distance(a, b) for a, b in zip(ours, draws, strict=False)]))
        if method == "tds" and i < 5:
            alone = posterior(source, observed, jax.random.key(i), y, method="guided", **settings)
            assert alone.biased and alone.log_evidence is None
            guided.append(standardised(alone, law))
    errors, stderr = np.array(errors).T
    assert np.mean(np.abs(errors)) < 0.05
    assert np.mean(np.abs(errors) < 3 * stderr + 0.01) >= 0.8
    assert np.sqrt(np.mean(np.square(away))) < 1.6  # 1 for independent draws
    assert np.mean(distances) < 1.5 * np.mean(floors)
    assert method == "smc" or np.sqrt(np.mean(np.square(guided))) > 3


@pytest.mark.slow
def test_normal_prior_is_exact():
    """One component: evidence within 1e-2, and equal weights."""

    def normal(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            spread = VARIANCES[0] + jnp.broadcast_to(sigma, x.shape[:1])[:, None] ** 2
            numpyro.factor("energy", -0.5 * jnp.sum((x - MEANS[0]) ** 2 / spread, -1))

    rows = np.random.default_rng(2).normal(size=(2000, 2)) * VARIANCES[0] ** 0.5 + MEANS[0]
    source, y = Energy(normal, {}, jnp.asarray(rows)), np.array([-1.0])
    found = posterior(source, observed, KEY, y, method="smc", noise_range=RANGE, num_particles=128, num_runs=4)
    spread = A[0] ** 2 @ (VARIANCES[0] + RANGE[0] ** 2) + NOISE**2
    truth = dist.Normal(A[0] @ MEANS[0], spread**0.5).log_prob(y[0])
    assert abs(found.log_evidence - truth) < 1e-2
    assert found.ess > 0.9 * 512


def counts(x, y):
    with numpyro.plate("counts", 3):
        numpyro.sample("y", dist.Poisson(jnp.exp(1 + 0.8 * x)), obs=y)


def bimodal(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", log_bimodal(x, sigma))


def log_bimodal(x, sigma):
    spread = 0.2**2 + sigma**2
    return jnp.logaddexp(-0.5 * (x - 1) ** 2 / spread, -0.5 * (x + 1) ** 2 / spread) - 0.5 * jnp.log(spread)


@pytest.mark.slow
def test_counts_of_a_scalar():
    """An observation that is not normal, against quadrature; rows that are numbers."""
    source = Energy(bimodal, {}, jnp.array([-1.0, 1.0, 0.9]))
    y = np.array([2, 1, 3])
    found = posterior(source, counts, KEY, y, method="smc", noise_range=(0.01, 5.0), num_particles=512, num_runs=8)
    grid = np.linspace(-3, 3, 4001)
    prior = np.exp(np.asarray(log_bimodal(grid, 0.01)))
    likelihood = np.exp(dist.Poisson(np.exp(1 + 0.8 * grid[:, None])).log_prob(y).sum(-1))
    weights = np.exp(found.log_weights)
    assert found.draws.shape == (4096,)
    mean, square = (np.sum(grid**k * prior * likelihood) / np.sum(prior * likelihood) for k in (1, 2))
    assert abs(weights @ found.draws - mean) < 5 * np.sqrt((square - mean**2) / found.ess)
    truth = np.log(np.sum(prior * likelihood) / np.sum(prior))
    assert abs(found.log_evidence - truth) < 4 * found.log_evidence_stderr + 5e-3


@pytest.mark.slow
def test_observation_with_two_modes():
    """A square, which says nothing of the sign: where it is flat Newton's steps would lead anywhere."""

    def square(x, y):
        numpyro.sample("y", dist.Normal(x**2, 1.0), obs=y)

    source = Energy(bimodal, {}, jnp.array([-1.0, 1.0, 0.9]))
    settings = {"noise_range": (0.01, 5.0), "num_runs": 8, "num_particles": 512}
    found = posterior(source, square, KEY, 4.0, method="smc", **settings)
    grid = np.linspace(-3, 3, 4001)
    prior = np.exp(np.asarray(log_bimodal(grid, 0.01)))
    truth = np.log(np.sum(prior * np.exp(dist.Normal(grid**2, 1.0).log_prob(4.0))) / np.sum(prior))
    # A few particles find the second mode early and weigh much, so that the spread of runs says too little; over ten
    # keys the standard deviation is 0.04.
    assert abs(found.log_evidence - truth) < 0.15
    assert abs(np.exp(found.log_weights) @ (found.draws > 0) - 0.5) < 3 / np.sqrt(found.ess)
    with pytest.warns(UserWarning, match=r"512 particles counted as \d"):  # none of them is near ±10
        posterior(source, square, KEY, 100.0, method="smc", **settings)


def test_inpainting():
    """One coordinate given the other: components by their weight there."""
    source = Energy(energy, {}, DATA)
    settings = {"noise_range": RANGE, "num_particles": 256, "num_runs": 4}
    found = inpaint(source, np.array([np.nan, 0.6]), np.array([False, True]), KEY, **settings)
    weights = np.exp(found.log_weights)
    np.testing.assert_allclose(weights @ np.asarray(found.draws)[:, 1], 0.6, atol=0.02)
    spread = VARIANCES[:, 1] + 2 * RANGE[0] ** 2
    logs = np.log(WEIGHTS) - 0.5 * ((0.6 - MEANS[:, 1]) ** 2 / spread + np.log(spread))
    share = np.exp(logs - np.logaddexp.reduce(logs))
    assert abs(weights @ (np.asarray(found.draws)[:, 0] > 0) - share[1]) < 5 * np.sqrt(share[1] / found.ess)
    with pytest.raises(ValueError, match=r"NaN or infinity where mask says"):
        inpaint(source, np.array([np.nan, 0.6]), np.array([True, True]), KEY, **settings)
    with pytest.raises(ValueError, match=r"boolean mask of one row's shape \(2,\)"):
        inpaint(source, np.zeros((3, 2)), np.array([True, True]), KEY, **settings)


def test_what_is_refused(unchecked):
    """Latent sites, no observation, an unknown method or twist, densities asked of scores, NaN in the likelihood."""
    source, settings = Energy(energy, {}, DATA), {"noise_range": RANGE, "num_particles": 8, "num_runs": 2}

    def latent(x, y):
        numpyro.sample("y", dist.Normal(x.sum(), numpyro.sample("scale", dist.HalfNormal())), obs=y)

    with pytest.raises(TypeError, match=r"latent site 'scale'"):
        posterior(source, latent, KEY, 0.0, **settings)
    with pytest.raises(ValueError, match="observes nothing"):
        posterior(source, lambda x: None, KEY, **settings)
    with pytest.raises(ValueError, match=r"no method 'dps': use 'smc', 'tds' or 'guided'"):
        posterior(source, observed, KEY, np.zeros(1), method="dps", **settings)
    with pytest.raises(ValueError, match=r"no twist 'exact': use"):
        posterior(source, observed, KEY, np.zeros(1), twist="exact", **settings)
    with pytest.raises(TypeError, match=r"'smc' needs the density.*use 'tds'"):
        posterior(Energy(score, {}, DATA), observed, KEY, np.zeros(1), method="smc", **settings)

    with pytest.raises(TypeError, match=r"'y' holds float16 values"):
        posterior(source, observed, KEY, np.zeros(1, np.float16), **settings)
    with pytest.raises(TypeError, match=r"'x' holds float16 values"):
        inpaint(source, np.zeros(2, np.float16), np.array([True, True]), KEY, **settings)

    def broken(x, y):
        numpyro.factor("e", jnp.log(x[0] - 1e3))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)

    with pytest.raises(FloatingPointError, match=r"weights are NaN or infinite from noise 20 on, after 0 of 32 steps"):
        posterior(source, broken, KEY, 0.0, **settings)


@pytest.mark.filterwarnings("ignore:At some noise level", "ignore:The 2 runs", "ignore:One run")
@pytest.mark.parametrize("method", ["tds", "guided"])
def test_levels_at_which_the_prior_is_not_normal_yet(method):
    settings = {"noise_range": (0.02, 0.5), "num_particles": 64, "num_runs": 2, "method": method}
    with pytest.warns(UserWarning, match="largest noise level of posterior, 0.5, is less than twice"):
        posterior(Energy(energy, {}, DATA), observed, KEY, np.zeros(1), **settings)


@pytest.mark.slow
def test_wide_rows():
    """Fifty normal numbers, of which half are seen: decompositions of many wide matrices may run at once."""
    scale = np.linspace(0.5, 1.5, 50)

    def normal(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(50), obs=x)
            variance = jnp.asarray(scale, x.dtype) ** 2 + jnp.broadcast_to(sigma, len(x))[:, None] ** 2
            numpyro.factor("energy", -0.5 * jnp.sum(x**2 / variance + jnp.log(variance), axis=-1))

    columns = np.column_stack([np.ones(60), np.random.default_rng(0).normal(size=(60, 50))])
    x = np.linalg.qr(columns)[0][:, 1:] * np.sqrt(60) * scale  # with the model's own mean and covariance
    mask = np.arange(50) < 25
    source, settings = Energy(normal, {}, jnp.asarray(x, jnp.float32)), {"noise_range": (0.5, 20.0), "num_steps": 4}
    found = inpaint(source, x[0], mask, KEY, method="smc", num_particles=64, num_runs=2, **settings)
    truth = dist.Normal(0.0, np.sqrt(scale**2 + 2 * 0.5**2)[:25]).log_prob(x[0, :25]).sum()
    assert found.log_evidence == pytest.approx(float(truth), abs=0.06) and found.least_ess > 0.95
