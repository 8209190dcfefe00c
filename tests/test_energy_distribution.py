"""A fitted energy as a distribution: against NumPyro's own, and inside another model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, assert_variance, improper
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from scipy.stats import norm

from numpyro_score import Energy, EnergyDistribution, log_partition

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def on(support, f, *shape):
    def model(x):
        tau = numpyro.param("tau")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), shape), obs=x)
            numpyro.factor("energy", f(tau, x))

    return model


ALPHA = np.array([1.5, 2.0, 0.7])
NORMAL = on(constraints.real_vector, lambda t, x: -0.5 * t * jnp.sum(x**2, -1), 2)


def sphere(n):
    x = RNG.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


CASES = {
    "normal": (NORMAL, lambda n: RNG.normal(size=(n, 2)), dist.Normal(0, 0.5).expand([2]).to_event(1)),
    "gamma": (
        on(constraints.positive, lambda t, x: 1.5 * jnp.log(x) - t * x),
        lambda n: RNG.gamma(2.5, size=n),
        dist.Gamma(2.5, 4.0),
    ),
    "Dirichlet": (
        on(constraints.simplex, lambda t, x: jnp.log(x) @ (ALPHA - 1) + t, 3),
        lambda n: RNG.dirichlet(ALPHA, n),
        dist.Dirichlet(ALPHA),
    ),
    "projected normal": (
        on(constraints.sphere, lambda t, x: dist.ProjectedNormal(t * jnp.array([0.1, 0.2, 0.3])).log_prob(x) + 7.0, 3),
        sphere,
        dist.ProjectedNormal(4.0 * np.array([0.1, 0.2, 0.3])),
    ),
    "von Mises": (
        on(constraints.circular, lambda t, x: t * jnp.cos(x - 1)),
        lambda n: RNG.vonmises(1, 4, n),
        dist.VonMises(1.0, 4.0),
    ),
    "matrix": (
        on(constraints.real, lambda t, x: -0.5 * t * jnp.sum(x**2, (-2, -1)), 1, 2),
        lambda n: RNG.normal(size=(n, 1, 2)),
        dist.Normal(0, 0.5).expand([1, 2]).to_event(2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_log_prob_is_that_of_numpyro(case, x64):
    """Normalised by quadrature, in NumPyro's measure, over any batch of events, checked against the support."""
    model, data, expected = CASES[case]
    energy = Energy(model, {"tau": 4.0}, data(60))
    p = EnergyDistribution(energy, log_partition(energy), validate_args=True)
    x = data(6)
    assert p.event_shape == expected.event_shape and p.batch_shape == ()
    assert p.support.event_dim == expected.support.event_dim
    log_prob = np.asarray(jax.jit(expected.log_prob)(x))
    np.testing.assert_allclose(p.log_prob(x), log_prob, atol=1e-6)
    batch = x.reshape(2, 3, *expected.event_shape)
    np.testing.assert_allclose(p.log_prob(batch), log_prob.reshape(2, 3), atol=1e-6)
    assert 0 < p.log_partition_stderr < 1e-5


@pytest.mark.slow
def test_log_prob_on_a_support_that_is_mapped_to_the_line(x64):
    """An ordered pair of normal numbers has twice their density; the Jacobian of the map does not enter."""
    energy = Energy(
        on(constraints.ordered_vector, lambda t, x: -0.5 * t * jnp.sum(x**2, -1), 2),
        {"tau": 4.0},
        np.sort(RNG.normal(size=(60, 2))),
    )
    x = np.sort(RNG.normal(size=(5, 2)))
    found = EnergyDistribution(energy, log_partition(energy)).log_prob(x)
    np.testing.assert_allclose(found, np.log(2) + norm.logpdf(x, 0, 0.5).sum(-1), atol=1e-8)


@pytest.fixture(scope="module")
def normal():
    """N(0, ¼ I) in two dimensions."""
    return EnergyDistribution(Energy(NORMAL, {"tau": 4.0}, RNG.normal(size=(20, 2))), np.log(np.pi / 2))


@pytest.mark.slow
def test_prior_and_likelihood_in_another_model(normal):
    """y ~ N(x, 1) with the prior x ~ N(0, ¼), and a latent scale of data: conjugate means and variances."""

    def model(y):
        x = numpyro.sample("x", normal)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        with numpyro.plate("rows", 3):
            numpyro.sample("z", normal, obs=jnp.ones((3, 2)))  # a constant

    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=4000, num_chains=1, thinning=4, progress_bar=False)
    mcmc.run(KEY, jnp.array([1.0, -2.0]), extra_fields=("potential_energy",))
    x = np.asarray(mcmc.get_samples()["x"])
    assert_mean(x, [0.2, -0.4])
    assert_variance(x, [0.2, 0.2])
    prior = norm(0, 0.5)
    log_joint = prior.logpdf(x).sum(-1) + norm.logpdf([1.0, -2.0], x).sum(-1) + prior.logpdf(np.ones(6)).sum()
    np.testing.assert_allclose(-mcmc.get_extra_fields()["potential_energy"], log_joint, atol=1e-4)


@pytest.mark.slow
def test_draws(normal):
    """Compiled, as an argument, over a batch of keys: independent chains, one for each draw, give independent draws."""
    normal = EnergyDistribution(normal.energy, normal.log_partition, num_warmup=100)  # enough for a normal law
    draw = jax.jit(jax.vmap(lambda p, key: p.sample(key, (2, 2)), in_axes=(None, 0)))
    x = draw(normal, jax.random.split(KEY, 100))
    assert x.shape == (100, 2, 2, 2)
    x = x.reshape(400, 2)
    assert_mean(x, 0.0)
    assert_variance(x, 0.25)
    assert_mean(x.reshape(100, 4, 2).mean(1) ** 2, 0.25 / 4)  # the draws of one key are independent, too
    assert normal.sample(KEY, (0, 3)).shape == (0, 3, 2)


def test_gradient_in_x_but_not_in_the_parameters(normal):
    """The score passes through jit; differentiating or tracing the parameters is refused."""
    slope = jax.jit(jax.grad(lambda x, p: p.log_prob(x)))(jnp.ones(2), normal)
    np.testing.assert_allclose(slope, [-4.0, -4.0], rtol=1e-6)
    with pytest.raises(TypeError, match="differentiated, but its log Z is a constant"):
        jax.grad(lambda p: p.log_prob(jnp.ones(2)), allow_int=True)(normal)

    def model(x):
        tau = numpyro.sample("tau", dist.Exponential())
        energy = Energy(NORMAL, {"tau": tau}, x)
        numpyro.sample("x", EnergyDistribution(energy, 0.0), obs=x)

    with pytest.raises(TypeError, match=r"traced parameters.*ScoreMatching or generalized_bayes"):
        MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False).run(KEY, np.ones((3, 2)))


def two_sites(x, y):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        y = numpyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
        numpyro.factor("energy", -(x**2) - y**2)


def test_refused(normal):
    """Without log Z, with one that is no number, of two sites; values of another shape or off the support."""
    energy = normal.energy
    with pytest.raises(ValueError, match=r"no log Z.*log_partition\(energy\)"):
        EnergyDistribution(energy).log_prob(jnp.ones(2))
    with pytest.raises(ValueError, match="finite number, got nan"):
        EnergyDistribution(energy, float("nan"))

    def outer(t):
        def model(x):
            with numpyro.plate("rows", len(x)):
                numpyro.factor("energy", -t * numpyro.sample("x", improper(1), obs=x)[:, 0] ** 2)

        return EnergyDistribution(Energy(model, {}, np.ones((3, 1))), 0.0).log_prob(jnp.ones(1))

    with pytest.raises(TypeError, match="uses a traced value that is none of its arguments or parameters"):
        jax.grad(outer)(1.0)
    with pytest.raises(TypeError, match=r"several sites, \['x', 'y'\]"):
        EnergyDistribution(Energy(two_sites, {}, np.ones(3), np.ones(3)), 0.0)
    with pytest.raises(ValueError, match=r"shape \(3,\): pass events of shape \(2,\)"):
        normal.log_prob(jnp.ones(3))
