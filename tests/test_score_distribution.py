"""`ScoreDistribution` and latent codes, against normal laws and mixtures in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from benchmarks.mixtures import Mixture
from numpyro_score import (
    DSM,
    Energy,
    ScoreDistribution,
    ScoreMatching,
    compare,
    flow_decode,
    flow_encode,
    flow_interpolate,
)
from numpyro_score.diffusion.codes import great_circle

RANGE = (1e-3, 140.0)


def normal(x, variance, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * x**2 / (variance + sigma**2))


def energy(variance=1.0):
    """Of the normal law with this variance, an array, so that all variances share programs."""
    return Energy(normal, {}, jnp.array([-1.0, 1.0]) * variance**0.5, jnp.asarray(variance, float))


@pytest.fixture(scope="module")
def prior():
    return ScoreDistribution(energy(), noise_range=RANGE)


@pytest.mark.slow
def test_density_and_its_derivatives(prior):
    """Of any batch shape, under jit and vmap; the derivative by the score, and no derivative in parameters."""
    x = jnp.array([[0.0, -1.0], [2.0, 3.0]])
    exact = stats.norm.logpdf(x)
    for found in (prior.log_prob(x), jax.jit(jax.vmap(prior.log_prob))(x)):
        np.testing.assert_allclose(found, exact, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: prior.log_prob(x).sum()))(x), -x, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.hessian(prior.log_prob))(0.7), -1.0, atol=1e-4)
    assert prior.support(x).all() and prior.support.event_dim == 0 and prior.event_shape == ()
    leaves, treedef = jax.tree.flatten(prior.expand((2,)).to_event(1))
    again = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_allclose(again.log_prob(x), exact.sum(-1), atol=2e-4)

    with pytest.raises(TypeError, match="parameters of a ScoreDistribution are differentiated"):
        jax.grad(lambda p: p.log_prob(0.5))(prior)
    with pytest.raises(TypeError, match="energy with traced parameters"):
        jax.jit(lambda v: ScoreDistribution(energy(v), noise_range=RANGE).log_prob(0.5))(1.0)
    with pytest.raises(ValueError, match=r"has shape \(2, 1\): pass events of shape \(2,\)"):
        ScoreDistribution(Mixture(2, 2, 0).energy(), noise_range=RANGE).log_prob(x[:, :1])


def test_draws_are_of_the_law(prior):
    """Kolmogorov's test at a false-alarm rate of 1 in 1,000."""
    draws = np.asarray(prior.sample(jax.random.key(3), (20, 50)))
    assert draws.shape == (20, 50) and prior.sample(0, (0, 2)).shape == (0, 2)
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3


@pytest.mark.slow
def test_posterior_of_a_site_under_nuts(prior):
    """Exact in closed form: mean 0.8 y and variance 0.2, and the posterior of a scale beside it stays right."""

    def model(y):
        x = numpyro.sample("x", prior)
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + shift, 0.5), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), 1.0, extra_fields=("accept_prob", "diverging"))
    draws, fields = mcmc.get_samples(), mcmc.get_extra_fields()
    # x and shift given y = x + shift + e: mean y/2.25 each, variance 1 − 1/2.25, covariance −1/2.25.
    pair = np.stack([draws["x"], draws["shift"]])
    np.testing.assert_allclose(pair.mean(1), 1 / 2.25, atol=0.12)
    np.testing.assert_allclose(np.cov(pair), np.array([[1.25, -1.0], [-1.0, 1.25]]) / 2.25, atol=0.12)
    assert fields["accept_prob"].mean() > 0.75 and not fields["diverging"].any()


def test_variational_fit(prior):
    """The same law by SVI, with x in and out of an observed site."""

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    guide = AutoNormal(model)
    fit = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO(num_particles=8)).run(
        jax.random.key(0), 400, 1.0, progress_bar=False
    )
    assert fit.params["x_auto_loc"] == pytest.approx(0.8, abs=0.06)
    assert fit.params["x_auto_scale"] == pytest.approx(0.2**0.5, abs=0.06)


@pytest.mark.slow
def test_codes_are_standard_normal_and_decode_to_the_data(x64):
    mixture = Mixture(2, 4, 0)
    energy, options = mixture.energy(), dict(noise_range=(1e-3, 140.0), rtol=1e-7, atol=1e-7)
    x = mixture.draw(400, 1)
    z = flow_encode(energy, x, **options)
    np.testing.assert_allclose(flow_decode(energy, z, **options), x, atol=1e-5)
    radii = np.sum(np.asarray(z) ** 2, axis=1)
    assert stats.kstest(radii, stats.chi2(2).cdf).pvalue > 1e-3
    between = flow_interpolate(energy, x[0], x[1], 400, **options)  # as many rows: one program
    np.testing.assert_allclose(np.asarray(between)[[0, -1]], x[:2], atol=1e-5)
    codes = np.asarray(flow_encode(energy, between, **options))
    sizes = np.linalg.norm(codes, axis=1)
    np.testing.assert_allclose(sizes, np.linspace(sizes[0], sizes[-1], 400), atol=1e-4)
    turned = np.arccos(np.sum(codes[1:] * codes[:-1], axis=1) / (sizes[1:] * sizes[:-1]))
    np.testing.assert_allclose(turned, turned.mean(), rtol=1e-3)


@pytest.mark.parametrize(
    "a, b",
    [
        ([1.0, 0.0, 0.0], [-1.0, 1e-6, 1e-7]),
        ([0.6, 0.8], [-0.6, -0.8]),
        ([3.0, 4.0], [3.0, 4.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1.0, 2.0, 3.0], [-2.0, 0.5, 1.0]),
    ],
)
def test_great_circles(a, b):
    """Even turns at radii between those of the ends, in single precision, also between opposite codes."""
    a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
    z = np.asarray(great_circle(a, b, jnp.linspace(0.0, 1.0, 9, dtype=jnp.float32)), np.float64)
    np.testing.assert_allclose(z[[0, -1]], [a, b], atol=1e-5)
    sizes = np.linalg.norm(z, axis=1)
    np.testing.assert_allclose(sizes, np.linspace(sizes[0], sizes[-1], 9), atol=1e-6)
    if sizes[0] > 0:
        between = np.sum(z[1:] * z[:-1], axis=1) / (sizes[1:] * sizes[:-1])
        np.testing.assert_allclose(between, between.mean(), atol=1e-5)


def test_one_number_has_no_circle():
    """Codes of both signs are on a line."""
    found = great_circle(jnp.array([-1.0]), jnp.array([2.0]), jnp.linspace(0.0, 1.0, 4))
    np.testing.assert_allclose(found[:, 0], [-1.0, 0.0, 1.0, 2.0], atol=1e-6)


def test_events_that_are_refused(unchecked):
    """No event has no log density; a shape of draws has no negative numbers; text and few digits are named."""
    p = ScoreDistribution(energy(), noise_range=RANGE)
    assert p.log_prob(jnp.ones((0,))).shape == (0,) and p.log_prob(jnp.ones((3, 0))).shape == (3, 0)
    with pytest.raises(ValueError, match=r"ScoreDistribution\.sample needs a sample_shape of no negative numbers"):
        p.sample(0, (-1,))
    with pytest.raises(TypeError, match="'value' holds float16 values"):
        p.log_prob(jnp.ones(2, jnp.float16))
    wide = Energy(normal_columns, {}, jnp.ones((2, 2)))
    assert ScoreDistribution(wide, noise_range=RANGE).log_prob(jnp.ones((0, 2))).shape == (0,)


def normal_columns(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, axis=-1) / (1 + sigma**2))


@pytest.mark.slow
def test_columns_keep_their_shape():
    """Events of shape (2, 1), whose support and draws are those of the site."""

    def model(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2, 1), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(x**2, axis=(-1, -2)) / (1 + sigma**2))

    data = jnp.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])[..., None]
    p = ScoreDistribution(Energy(model, {}, data), noise_range=RANGE, solver="heun", rtol=1e-3, atol=1e-3)
    assert p.event_shape == (2, 1) and p.sample(0, (3,)).shape == (3, 2, 1)
    exact = stats.norm.logpdf(data).sum((-1, -2))
    np.testing.assert_allclose(p.log_prob(data), exact, atol=0.02)


@pytest.mark.slow
def test_compared_with_a_fit_that_has_log_z():
    """The same law by the probability flow and by log Z, beside one that is too wide."""
    x = np.random.default_rng(5).normal(size=100)
    options = dict(noise_range=RANGE, solver="tsit5")
    fits = {
        "flow": ScoreDistribution(energy(), **options),
        "wide": ScoreDistribution(energy(4.0), **options),
        "log Z": Energy(normal, {}, jnp.array([-1.0, 1.0]), 1.0, sigma=1e-3),
    }
    found = compare(fits, x, rng_key=0, log_partition={"log Z": 0.5 * float(np.log(2 * np.pi))}, num_samples=1000)
    likelihood = found.table["log_likelihood"]
    assert likelihood["flow"] == pytest.approx(likelihood["log Z"], abs=0.02)
    assert likelihood["wide"] == pytest.approx(stats.norm(0, 2).logpdf(x).sum(), abs=0.02)
    assert found.order_kl[-1] == found.order_fisher[-1] == "wide"
    assert abs(found.table["mmd"]["flow"]) < 4 * found.table["mmd_stderr"]["flow"]


def learned(x, sigma=1.0):
    variance = numpyro.param("variance", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * x**2 / (variance + sigma**2))


@pytest.mark.slow
def test_log_likelihood_for_arviz(prior):
    """At each draw of a fit, and of an observed site of another model as NumPyro has it: normalised, for `az.loo`."""
    # Quantiles: their mean is that of the model, as the end's is then, and none is far out.
    x = 1.5 * stats.norm.ppf((np.arange(50) + 0.5) / 50)
    levels = tuple(np.geomspace(0.01, 100.0, 12))
    fit = ScoreMatching(learned, loss=DSM(levels), num_steps=300).run(jax.random.key(1), x, progress_bar=False)
    with pytest.raises(TypeError, match=r"Fit 'a' is of many noise levels.* pass ScoreDistribution\(fit\)"):
        compare({"a": fit, "b": fit}, x, rng_key=0)
    data = fit.to_arviz(0, 40, ScoreDistribution(fit, solver="tsit5"))
    variance = np.asarray(data["posterior"]["variance"])[..., None]
    exact = stats.norm(0, np.sqrt(variance + 1e-4)).logpdf(x)
    np.testing.assert_allclose(np.asarray(data["log_likelihood"]["x"]), exact, atol=2e-3)
    assert data["log_likelihood"].attrs["smallest_sigma"] == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"of another model than the fit's: pass ScoreDistribution\(fit\)"):
        fit.to_arviz(0, 40, prior)
    other = ScoreDistribution(Energy(learned, {"variance": 9.0}, 3 * x), noise_range=RANGE)
    with pytest.raises(ValueError, match=r"of another fit, whose 'variance' is another: pass ScoreDistribution\(fit\)"):
        fit.to_arviz(0, 40, other)

    def model(x):
        shift = numpyro.sample("shift", dist.Normal(0, 1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.TransformedDistribution(prior, AffineTransform(shift, 1.0)), obs=x)

    shifts = np.array([0.0, 0.5])
    found = log_likelihood(model, {"shift": shifts}, x)["x"]
    np.testing.assert_allclose(found, stats.norm(shifts[:, None]).logpdf(x), atol=1e-3)
