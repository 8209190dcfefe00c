"""Densities that depend on where a row stands, and state outside of a model, are not mistaken."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from numpyro import handlers

from numpyro_score import DSM, ISM, SSM, Energy, generalized_bayes
from numpyro_score.losses import total_loss

N = 1500  # more than one chunk
Z = np.linspace(-1.0, 2.0, N)


def regression(offset):
    """x ~ N(b offset(...), 1), where the offset is had in different ways."""

    def model(x, z):
        b = numpyro.sample("b", dist.Normal(0, 10))
        with numpyro.plate("rows", len(x)) as i:
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * (x - b * offset(x, z, i)) ** 2)

    return model


# Each gives row n the offset Z[n].
OFFSETS = {
    "covariate": lambda x, z, i: z,
    "indexed covariate": lambda x, z, i: z[i],
    "subsampled covariate": lambda x, z, i: numpyro.subsample(z, event_dim=0),
    "indexed closure": lambda x, z, i: jnp.asarray(Z)[i],
    "trend over the indices": lambda x, z, i: -1 + 3 * i / (N - 1),
    "trend over the rows": lambda x, z, i: -1 + 3 * jnp.arange(len(x)) / (N - 1),
    "trend by NumPy": lambda x, z, i: np.linspace(-1.0, 2.0, len(x)),
    "trend by the length": lambda x, z, i: -1 + 3 * i / (len(x) - 1),
    "running count": lambda x, z, i: jnp.cumsum(jnp.full(len(x), 3 / (N - 1))) - 1 - 3 / (N - 1),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_stay_with_their_rows(name, x64):
    """The total of ISM, in chunks or not, is the closed form Σ ½(x - bz)² - N, whatever way the offset is had."""
    x = np.random.default_rng(0).normal(size=N)
    energy = Energy(regression(OFFSETS[name]), {"b": 0.7}, x, Z)
    expected = 0.5 * np.sum((x - 0.7 * Z) ** 2) - N
    np.testing.assert_allclose(total_loss(ISM(), energy, jax.random.key(0)), expected, rtol=1e-9)
    np.testing.assert_allclose(energy.score(x[:, None])[:, 0], 0.7 * Z - x, atol=1e-9)


def test_length_in_the_density(x64):
    """A density that divides by the number of rows does so by that of all rows."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * x**2 / len(x))

    x = np.random.default_rng(1).normal(size=N)
    expected = 0.5 * np.sum((x / N) ** 2) - 1
    np.testing.assert_allclose(total_loss(ISM(), Energy(model, {}, x), jax.random.key(0)), expected, rtol=1e-9)


@pytest.mark.parametrize("loss", [ISM(), SSM(), DSM(0.5)], ids=repr)
def test_subsampled_rows_keep_their_covariates(loss, x64):
    """With `numpyro.subsample` of the data and `z[i]`, each drawn row meets its own covariate."""

    def model(x, z):
        b = numpyro.sample("b", dist.Normal(0, 10))
        with numpyro.plate("rows", len(x), subsample_size=50) as i:
            xb = numpyro.sample("x", improper(), obs=numpyro.subsample(x, event_dim=0))
            numpyro.factor("energy", -0.5 * (xb - b * z[i]) ** 2)

    # The data are the covariate, so with b = 1 every residual vanishes, and the score with it.
    tracing = handlers.trace(handlers.seed(generalized_bayes(model, loss), 0))
    with handlers.substitute(data={"b": 1.0}):
        log_loss = tracing.get_trace(Z, Z)["generalized_bayes_loss"]["fn"].log_factor
    if isinstance(loss, DSM):  # s(x + σε) = -σε, s(x) = 0: the mean is ½σ² - 1, with its sampling error
        assert abs(-log_loss / N - (0.5 * loss.sigma**2 - 1)) < 5 * np.sqrt(2 / 50) * abs(0.5 * loss.sigma**2 - 1)
    else:
        np.testing.assert_allclose(-log_loss, -N, rtol=1e-9)


def test_plain_energies_take_any_rows():
    """A density that treats all rows alike is evaluated on any number of them."""
    energy = Energy(regression(lambda x, z, i: 1.0), {"b": 0.7}, np.zeros(5), Z)
    np.testing.assert_allclose(energy.score(np.zeros((7, 1))), 0.7, rtol=1e-6)


def test_what_a_model_closes_over_is_read_anew():
    """A new generalised model sees what its function closes over as it is then."""
    state = {"x": np.zeros(20)}

    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        with numpyro.plate("rows", 20):
            x = numpyro.sample("x", improper(), obs=state["x"])
            numpyro.factor("energy", -0.5 * (x - mu) ** 2)

    def loss():
        tracing = handlers.trace(handlers.seed(generalized_bayes(model, ISM()), 0))
        with handlers.substitute(data={"mu": 0.0}):
            return tracing.get_trace()["generalized_bayes_loss"]["fn"].log_factor

    np.testing.assert_allclose(loss(), 20)
    state["x"] = np.full(20, 2.0)
    np.testing.assert_allclose(loss(), 20 - 0.5 * 4 * 20)


def test_attributes_of_a_model_are_its_own():
    """A model that is an object with fields named as ours does not change the generalised model."""

    class Model:
        loss, learning_rate, data, rng_key, model = DSM(0.5), 0.01, np.zeros(3), 7, None

        def __init__(self):
            self.learning_rate, self.loss, self.data, self.model = 0.01, DSM(0.5), np.zeros(3), None

        def __call__(self, x):
            with numpyro.plate("rows", len(x)):
                x = numpyro.sample("x", improper(), obs=x)
                numpyro.factor("energy", -0.5 * x**2)

    x = np.array([1.0, 2.0])
    sites = handlers.trace(handlers.seed(generalized_bayes(Model(), ISM()), 0)).get_trace(x)
    np.testing.assert_allclose(sites["generalized_bayes_loss"]["fn"].log_factor, 2 - 2.5)


def test_groups_may_have_latents():
    """A latent site in a plate of groups, around the plate of rows, is a parameter of its group."""

    def model(x):
        with numpyro.plate("groups", 3, dim=-1):
            mu = numpyro.sample("mu", dist.Normal(0, 1))
            with numpyro.plate("rows", len(x), dim=-2):
                x = numpyro.sample("x", improper(), obs=x)
                numpyro.factor("energy", -0.5 * (x - mu) ** 2)

    mu, x = np.array([1.0, 2.0, 3.0]), np.random.default_rng(2).normal(size=(4, 3))
    energy = Energy(model, {"mu": mu}, x)
    np.testing.assert_allclose(energy.score(energy.data)[:, 0], (mu - x).reshape(-1), rtol=1e-6)


def test_losses_give_one_value_per_row():
    """A loss of another shape is refused, not broadcast."""

    def loss(energy, rng_key):
        return jnp.zeros((energy.num_rows, 1))

    energy = Energy(regression(lambda x, z, i: 1.0), {"b": 0.7}, np.zeros(5), Z)
    with pytest.raises(ValueError, match=r"shape \(5, 1\) for 5 rows.*one value per row"):
        total_loss(loss, energy, jax.random.key(0))
