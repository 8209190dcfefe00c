"""Fits and MCMC runs as ArviZ data, with ArviZ 0.23 and 1.x alike."""

import inspect

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoNormal

import numpyro_score
from numpyro_score import SSM, ScoreMatching, generalized_bayes, to_arviz
from numpyro_score.generalized import LOSS_SITE

OLD = not hasattr(az, "convert_to_datatree")
KEY = jax.random.key(0)
N = 40


def real(*shape):
    return dist.ImproperUniform(constraints.real_vector, (), shape)


def names(data):
    """The groups, by either name of ArviZ's container."""
    return set(data.groups()) if OLD else set(data.children)


def variables(data):
    return {name for group in names(data) for name in data[group].variables}


def model(x, y):
    """Two data sites in one row, a picture and a number; sites of every kind among the parameters."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(2)))
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    numpyro.factor("penalty", -0.1 * mu[0] ** 2)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", real(8, 8), obs=x)
        y = numpyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
        numpyro.factor("pictures", -0.5 * tau * jnp.sum((x - mu[0]) ** 2, axis=(-2, -1)))
        numpyro.factor("numbers", -0.5 * (0.5 + weights[0]) * (y - mu[1]) ** 2)


X = np.random.default_rng(0).normal(size=(N, 8, 8)).astype(np.float32)
Y = X[:, 0, 0] + 1.0


def matcher(*args, **kwargs):
    return ScoreMatching(model, *args, optim=optax.adam(0.05), loss=SSM(), **kwargs)


@pytest.fixture(scope="module")
def fit():
    return matcher(learning_rate=0.7, num_steps=300).run(KEY, X, Y, progress_bar=False)


@pytest.fixture(scope="module")
def data(fit):
    return fit.to_arviz(jax.random.key(5), num_samples=600)


@pytest.fixture(scope="module")
def mcmc():
    """An MCMC run of two chains."""
    fields = ("potential_energy", "accept_prob", "num_steps", "diverging", "adapt_state.step_size")
    found = MCMC(
        NUTS(generalized_bayes(model, SSM())),
        num_warmup=100,
        num_samples=50,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    found.run(KEY, X, Y, extra_fields=(*fields, "z_grad"))
    return found


# -- fits -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_groups_of_a_fit(data):
    """Four groups at most: no log likelihood of an unnormalised density, and no group is empty."""
    assert names(data) == {"posterior", "observed_data", "score_matching"}
    assert isinstance(data, az.InferenceData if OLD else xr.DataTree)


def test_draws_of_a_fit(data, fit):
    """The posterior holds `sample_posterior`'s draws with the same key, 600 in four chains, in constrained space."""
    draws = fit.sample_posterior(jax.random.key(5), 600)
    assert set(data["posterior"].data_vars) == {"mu", "weights", "tau"}
    for name, value in draws.items():
        shape = np.shape(fit.estimates[name])
        array = data["posterior"][name]
        assert array.dims == ("chain", "draw", *(f"{name}_dim_{i}" for i in range(len(shape))))
        np.testing.assert_array_equal(array, np.reshape(value, (4, 150, *shape)))
        assert all((array.coords[d] == np.arange(array.sizes[d])).all() for d in array.dims)
    assert data["posterior"].attrs["draws"].startswith("normal with sandwich covariance")


def test_draws_that_do_not_divide_into_chains(fit):
    """Seven draws are one chain of seven."""
    assert fit.to_arviz(num_samples=7)["posterior"]["tau"].shape == (1, 7)


def test_losses_of_a_fit(data, fit):
    """The loss of each step, and of each row at the estimates by hand; signs see a diagonal Hessian exactly."""
    group, at = data["score_matching"], fit.estimates
    np.testing.assert_array_equal(group["loss"], fit.losses)
    assert group["loss"].dims == ("step",) and group["pointwise_loss"].dims == ("row",)
    s_x = -at["tau"] * (X - at["mu"][0])
    precision = 0.5 + at["weights"][0]
    s_y = -precision * (Y - at["mu"][1])
    expected = 0.5 * np.sum(s_x**2, axis=(1, 2)) + 0.5 * s_y**2 - 64 * at["tau"] - precision
    np.testing.assert_allclose(group["pointwise_loss"], expected, rtol=1e-4)
    np.testing.assert_array_equal(group["weight"], np.ones(N))
    assert group.attrs["loss_function"] == repr(SSM())
    assert group.attrs["learning_rate"] == 0.7


@pytest.mark.slow
@pytest.mark.parametrize("source", ["fit", "mcmc"])
def test_observed_data_have_the_sites_own_shapes(source, data, mcmc):
    """Pictures stay pictures."""
    data = data if source == "fit" else to_arviz(mcmc, X, Y)
    np.testing.assert_array_equal(data["observed_data"]["x"], X)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    assert data["observed_data"]["x"].shape == (N, 8, 8)


@pytest.mark.slow
def test_draws_of_another_guide(fit):
    """Draws come from the guide itself, and model params stay at their estimates."""
    sm = matcher(AutoNormal, num_steps=20)
    other = sm.run(KEY, X, Y, progress_bar=False)
    posterior = other.to_arviz(jax.random.key(5), num_samples=20)["posterior"]
    draws = sm.guide.sample_posterior(jax.random.key(5), other.params, X, Y, sample_shape=(20,))
    np.testing.assert_array_equal(posterior["mu"], draws["mu"].reshape(4, 5, 2))
    np.testing.assert_array_equal(posterior["tau"], np.full((4, 5), other.params["tau"]))
    assert posterior.attrs["draws"] == "from the guide AutoNormal"


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.first, self.second = nnx.Linear(1, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.swish(self.first(x)))


def network_fit(width):
    def energy(x):
        net = nnx_module("net", Net(width, nnx.Rngs(0)))
        mu = numpyro.sample("mu", dist.Normal(0.0, 0.1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(1), obs=x)
            numpyro.factor("energy", -net(x)[:, 0] - 0.5 * jnp.sum((x - mu) ** 2, axis=-1))

    sm = ScoreMatching(energy, optim=optax.adam(0.01), num_steps=20)
    return sm.run(KEY, Y[:, None], progress_bar=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss was still falling")  # few steps are enough to be refused
@pytest.mark.parametrize(("width", "reason"), [(1, "not curved upwards"), (700, "2102 parameters: it stops at 2000")])
def test_no_posterior_is_made_up(width, reason):
    """A fit without a sandwich, by its flat objective or its size, says why it has no posterior group."""
    data = to_arviz(network_fit(width))
    assert names(data) == {"observed_data", "score_matching"}
    assert reason in data["score_matching"].attrs["no_posterior"]


class Polynomial(nnx.Module):
    def __init__(self, rngs):
        self.square = nnx.Linear(1, 1, use_bias=False, rngs=rngs)
        self.fourth = nnx.Linear(1, 1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.square(x**2) + self.fourth(x**4)


def test_network_weights_are_one_variable_per_leaf():
    """A site that holds a pytree becomes variables of the path to each leaf, with the leaf's draws."""

    def model(x):
        net = nnx_module("net", Polynomial(nnx.Rngs(0)))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", real(1), obs=x)
            numpyro.factor("energy", -net(x)[:, 0])

    sm = ScoreMatching(model, optim=optax.lbfgs(), num_steps=30)
    fit = sm.run(KEY, Y[:, None], progress_bar=False)
    posterior = fit.to_arviz(KEY, num_samples=8)["posterior"]
    draws = fit.sample_posterior(KEY, 8)["net$params"]
    assert set(posterior.data_vars) == {"net$params.square.kernel", "net$params.fourth.kernel"}
    for name, leaf in draws.items():
        array = posterior[f"net$params.{name}.kernel"]
        np.testing.assert_array_equal(array, leaf["kernel"].reshape(4, 2, 1, 1))


# -- MCMC -------------------------------------------------------------------------------------------


def test_groups_of_an_mcmc_run(mcmc):
    """Draws by chain, equal to MCMC's own, and statistics under ArviZ's names and signs."""
    data = to_arviz(mcmc)
    assert names(data) == {"posterior", "sample_stats"}
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(data["posterior"].data_vars) == {"mu", "weights"}
    for name, value in draws.items():
        np.testing.assert_array_equal(data["posterior"][name], value)
    assert data["posterior"]["weights"].dims == ("chain", "draw", "weights_dim_0")
    fields = mcmc.get_extra_fields(group_by_chain=True)
    stats = data["sample_stats"]
    assert set(stats.data_vars) == {"lp", "acceptance_rate", "n_steps", "diverging", "step_size"}
    np.testing.assert_array_equal(stats["lp"], -fields["potential_energy"])
    np.testing.assert_array_equal(stats["n_steps"], fields["num_steps"])
    np.testing.assert_array_equal(stats["step_size"], fields["adapt_state.step_size"])
    assert stats["lp"].shape == (2, 50)


def test_data_of_another_mcmc_run_are_refused():
    """Without the generalised model the data are not known; one chain is a run like any other."""

    def plain():
        numpyro.sample("z", dist.Normal())

    mcmc = MCMC(NUTS(plain), num_warmup=10, num_samples=10, progress_bar=False)
    mcmc.run(KEY, extra_fields=("potential_energy",))
    data = to_arviz(mcmc)
    assert names(data) == {"posterior", "sample_stats"}
    assert set(data["sample_stats"].data_vars) == {"lp", "diverging"}  # NumPyro records divergences
    np.testing.assert_array_equal(data["posterior"]["z"], mcmc.get_samples()["z"][None])
    np.testing.assert_array_equal(data["sample_stats"]["lp"], -mcmc.get_extra_fields()["potential_energy"][None])
    with pytest.raises(TypeError, match="leave the model's arguments out"):
        to_arviz(mcmc, X)


# -- both -------------------------------------------------------------------------------------------


@pytest.fixture(params=["fit", "mcmc"])
def either(request, data, mcmc):
    return data if request.param == "fit" else to_arviz(mcmc, X, Y)


def test_factors_are_left_out(either):
    """Neither the loss's factor nor the user's own are variables, and there is no log likelihood."""
    factors = {LOSS_SITE, "penalty", "pictures", "numbers"}
    assert not factors & variables(either)
    assert "log_likelihood" not in names(either)


def test_loo_of_an_unnormalised_density_is_refused(either):
    """By our message, in ArviZ's own functions of both generations; everything else works as before."""
    with pytest.raises(TypeError, match=r"the density is unnormalised.*hyvarinen_loo"):
        az.loo(either)
    assert not hasattr(either, "something_else")


def test_log_partition_of_an_mcmc_run_is_refused(mcmc, unchecked):
    """It has no estimates."""
    with pytest.raises(TypeError, match="an MCMC run has none"):
        to_arviz(mcmc, log_partition=0.0)


def test_library_is_named(either):
    """In the attributes of the whole and of every group."""
    for group in (either, *(either[name] for name in names(either))):
        assert group.attrs["inference_library"] == "numpyro_score"
        assert group.attrs["inference_library_version"] == numpyro_score.__version__


def test_summary_and_trace_plot(either):
    """ArviZ's summary has one row for each number, with its mean; the trace plot has one panel for each."""
    summary = az.summary(either)
    draws = either["posterior"]
    labels = [f"{k}[{i}]" if v.ndim > 2 else k for k, v in draws.items() for i in range(v[0, 0].size)]
    assert sorted(summary.index) == sorted(labels)
    np.testing.assert_allclose(np.float64(summary.loc["mu[1]", "mean"]), draws["mu"][..., 1].mean(), atol=0.06)
    plot = az.plot_trace if OLD else az.plot_trace_dist
    plot(either, compact=False)
    panels = [axes for figure in map(plt.figure, plt.get_fignums()) for axes in figure.axes]
    plt.close("all")
    assert len(panels) == 2 * len(labels)


def test_netcdf_file_gives_back_everything(either, tmp_path):
    """Groups, values and attributes survive a file."""
    path = str(tmp_path / "fit.nc")
    either.to_netcdf(path)
    back = az.from_netcdf(path)
    assert names(back) == names(either)
    for name in names(either):
        ours, theirs = either[name], back[name]
        assert set(ours.variables) == set(theirs.variables)
        for k, v in ours.variables.items():
            np.testing.assert_array_equal(v, theirs[k])
        for k, v in ours.attrs.items():
            assert theirs.attrs[k] == v


def test_anything_else_is_refused():
    """A result of another library, say."""
    with pytest.raises(TypeError, match=r"a ScoreMatchingResult or a numpyro.infer.MCMC, got dict"):
        inspect.unwrap(to_arviz)({"mu": X})  # without the check of annotations, which users lack
