"""Draws from fitted models, by goodness of fit at a false-alarm rate of 2e-5."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from models import counted_compilations, energy_of
from numpyro.distributions import constraints
from numpyro.infer import HMC, NUTS, BarkerMH
from scipy import stats
from scipy.special import gammaln

from numpyro_score import MALA, Energy, ScoreMatching, log_partition, sample

FALSE_ALARM = 2e-5
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
ALPHA = np.array([1.5, 2.0, 0.7])
KAPPA = 5.0
OLD = not hasattr(az, "convert_to_datatree")


def on(support, f, *shape):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), shape), obs=x)
            numpyro.factor("energy", f(x))

    return model


def fits(draws, cdf, thin=10):
    """Draws (chain, draw), thinned until they are all but independent, follow a law."""
    p = stats.kstest(np.asarray(draws)[:, ::thin].reshape(-1), cdf).pvalue
    assert p > FALSE_ALARM, p


@pytest.fixture(scope="module")
def compositions():
    energy = Energy(on(constraints.simplex, lambda x: jnp.log(x) @ (ALPHA - 1), 3), {}, RNG.dirichlet(ALPHA, 60))
    return energy, sample(energy, KEY, 2000)


@pytest.mark.slow
def test_dirichlet(compositions):
    """Each share follows its beta law, and the share of the first among the first two an independent one."""
    x = compositions[1]["posterior"]["x"].values
    assert x.shape == (4, 2000, 3)
    for i in range(3):
        fits(x[..., i], stats.beta(ALPHA[i], ALPHA.sum() - ALPHA[i]).cdf)
    fits(x[..., 0] / (x[..., 0] + x[..., 1]), stats.beta(ALPHA[0], ALPHA[1]).cdf)


def test_diagnostics_are_arviz(compositions):
    """R-hat and ESS of every number, as ArviZ computes them from the draws, and the kernel's statistics."""
    data = compositions[1]
    assert isinstance(data, az.InferenceData if OLD else xr.DataTree)
    np.testing.assert_allclose(
        data["r_hat"]["x"], az.rhat(data["posterior"].to_dataset() if not OLD else data.posterior)["x"]
    )
    assert data["r_hat"]["x"].shape == data["ess"]["x"].shape == (3,)
    assert set(data["sample_stats"].data_vars) == {"lp", "acceptance_rate", "n_steps", "diverging", "step_size"}
    assert data["observed_data"]["x"].shape == (60, 3)
    assert (data["ess"]["x"] > 1000).all()


def test_normaliser_from_the_draws(compositions):
    """Noise-contrastive log Z of the Dirichlet law, from these draws and from draws of its own."""
    energy, draws = compositions
    expected = np.sum(gammaln(ALPHA)) - gammaln(ALPHA.sum())
    for given in (draws, None):
        result = log_partition(energy, "nce", jax.random.key(1), draws=given)
        assert abs(result.value - expected) < 5 * result.stderr < 0.1


@pytest.mark.slow
def test_von_mises_fisher():
    """The height along the mean direction, and the longitude, which is uniform."""
    x = RNG.normal(size=(20, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    draws = sample(Energy(on(constraints.sphere, lambda x: KAPPA * x[:, 2], 3), {}, x), KEY, 2000, kernel=careful)
    x = draws["posterior"]["x"].values
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, rtol=1e-5)
    fits(x[..., 2], lambda h: np.expm1(KAPPA * (np.clip(h, -1, 1) + 1)) / np.expm1(2 * KAPPA))
    fits(np.arctan2(x[..., 1], x[..., 0]), stats.uniform(-np.pi, 2 * np.pi).cdf)


def test_several_sites():
    """A picture and a bounded number keep their shapes and names; HMC is made by a function."""

    def model(image, y, t):
        with numpyro.plate("rows", len(y)):
            image = numpyro.sample("image", dist.ImproperUniform(constraints.real, (), (3, 2)), obs=image)
            y = numpyro.sample("y", dist.ImproperUniform(constraints.interval(1.0, 3.0), (), ()), obs=y)
            numpyro.factor("energy", -0.5 * jnp.sum((image - 1) ** 2, (-2, -1)) - t * y)

    energy = Energy(model, {}, RNG.normal(size=(9, 3, 2)), RNG.uniform(1, 3, size=9), np.array(2.0))
    draws = sample(energy, KEY, 2000, kernel=hmc, num_chains=2)["posterior"]
    assert draws["image"].shape == (2, 2000, 3, 2)
    fits(draws["image"].values[..., 2, 1], stats.norm(1).cdf)
    fits(draws["y"].values, stats.truncexpon(4.0, loc=1.0, scale=0.5).cdf)


def test_kernels_of_the_package():
    """Both exact and unadjusted ones, from a function that makes them."""
    energy = energy_of(modes, 0.0, RNG.normal(size=(20, 1)))  # one mode
    draws = sample(energy, KEY, 2000, kernel=mala)
    assert 0.5 < draws["sample_stats"]["acceptance_rate"].mean() < 1
    assert abs(float(draws["posterior"]["x"].var()) - 1) < 0.1


def test_a_kernel_is_no_function_that_makes_one(unchecked):
    energy = energy_of(normal, 1.0, RNG.normal(size=(20, 1)))
    with pytest.raises(TypeError, match=r"needs a function that makes a kernel, got MALA.*functools.partial\(MALA"):
        sample(energy, KEY, 10, kernel=MALA(step_size=0.5))


def mala(potential_fn):
    return MALA(potential_fn=potential_fn, step_size=1.0)


def careful(potential_fn):
    return NUTS(potential_fn=potential_fn, target_accept_prob=0.95)


def hmc(potential_fn):
    return HMC(potential_fn=potential_fn, trajectory_length=1.5)


def normal(t, x):
    return -0.5 * t * jnp.sum(x**2, axis=-1)


@pytest.mark.filterwarnings("ignore:The largest R-hat")  # one short chain of a simple kernel
def test_a_fit_and_no_second_compilation():
    """A fit is sampled at its estimates, and other data or parameters of the same shapes compile nothing."""

    def model(x):
        tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            numpyro.factor("energy", normal(tau, x))

    x = 0.5 * RNG.normal(size=(200, 2))
    fit = ScoreMatching(model).run(KEY, x, progress_bar=False)
    draws = sample(fit, KEY, 500, kernel=BarkerMH, num_chains=1)
    fits(draws["posterior"]["x"].values[..., 0], stats.norm(0, fit.estimates["tau"] ** -0.5).cdf, thin=50)
    other = Energy(fit.energy.model, {"tau": jnp.asarray(4.0)}, 2 * x)
    sample(other, KEY, 500, kernel=BarkerMH, num_chains=1)
    with counted_compilations() as compiled:
        run = sample(
            other.with_params({"tau": jnp.asarray(9.0)}), jax.random.key(2), 500, kernel=BarkerMH, num_chains=1
        )
    assert len(compiled) < 3  # what looks at the values outside of the chains
    fits(run["posterior"]["x"].values[..., 0], stats.norm(0, 1 / 3).cdf, thin=50)


def modes(t, x):
    return jnp.logaddexp(-0.5 * jnp.sum((x - t) ** 2, -1), -0.5 * jnp.sum((x + t) ** 2, -1))


def test_chains_that_have_not_mixed():
    """Chains that stay at their own mode are reported."""
    x = np.repeat([[-30.0], [30.0]], 10, axis=0)
    with pytest.warns(UserWarning, match="largest R-hat is .*, and the chains stay in places"):
        sample(energy_of(modes, 30.0, x), KEY, 2000, kernel=mala)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_samples": 0}, "num_samples of at least 1, got 0"), ({"num_chains": 0}, "num_chains of at least 1, got 0")],
)
def test_refused(settings, message):
    """No draws, no chains."""
    settings = {"num_samples": 10, **settings}
    with pytest.raises(ValueError, match=message):
        sample(energy_of(normal, 1.0, RNG.normal(size=(9, 2))), KEY, **settings)


def test_rows_that_differ_are_refused():
    """Which row should be drawn?"""

    def model(x, z):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - z) ** 2)

    with pytest.raises(ValueError, match="rows may differ"):
        sample(Energy(model, {}, np.zeros(5), np.ones(5)), KEY, 10, kernel=NUTS)
