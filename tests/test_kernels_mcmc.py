"""What every kernel must do under NumPyro's MCMC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_mean, assert_variance, two_devices
from numpyro.infer import MCMC

from numpyro_score import MALA, SGHMC, SGLD, to_arviz
from numpyro_score.kernels import KernelState

KEY = jax.random.key(0)
NUM = 40


def model(scale):
    """Of two sites, log s and w / scale are standard normal in unconstrained space."""
    s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
    numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.deterministic("scaled", scale * s)


SCALE = jnp.array(3.0)
KERNELS = {
    "SGLD": functools.partial(SGLD, step_size=0.5),
    "MALA": functools.partial(MALA, step_size=0.5),
    "SGHMC": functools.partial(SGHMC, step_size=0.5, friction=0.5),
}
VARIANCES = {"SGLD": 1 / (1 - 0.25), "MALA": 1.0, "SGHMC": 1 / (1 - 0.5 / 3)}  # on a standard normal
every_kernel = pytest.mark.parametrize("name", KERNELS)


def run(name, *, num_warmup=0, num_samples=NUM, num_chains=2, progress_bar=False, init_params=None, **settings):
    mcmc = MCMC(
        KERNELS[name](model), num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains,
        progress_bar=progress_bar, **settings,
    )  # fmt: skip
    mcmc.progress_bar = progress_bar  # which pytest-xdist turns off
    mcmc.run(KEY, SCALE, init_params=init_params, extra_fields=("potential_energy", "z.w"))
    return mcmc


def draws(mcmc):
    return {**mcmc.get_samples(group_by_chain=True), **mcmc.get_extra_fields(group_by_chain=True)}


@functools.cache
def reference(name):
    """Two chains of 40 draws, one after the other."""
    return run(name, chain_method="sequential")


def assert_equal(found, expected, select):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value[:, select], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.slow
@every_kernel
def test_chain_methods_agree(name):
    """The same draws under `vmap`."""
    expected = draws(reference(name))
    np.testing.assert_allclose(expected["scaled"], 3 * expected["s"], rtol=1e-6)
    np.testing.assert_allclose(expected["w"], expected["z.w"])
    energy = 0.5 * np.log(expected["s"]) ** 2 + 0.5 * np.sum(expected["w"] ** 2, -1) + 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(expected["potential_energy"], energy, rtol=1e-4)
    assert_equal(draws(run(name, chain_method=jax.vmap)), expected, slice(None))


@pytest.mark.slow
@two_devices
def test_chains_in_parallel_agree():
    """The same draws on two devices, thinned, of the kernel whose state has most in it."""
    found = draws(run("SGHMC", chain_method="parallel", thinning=4))
    assert_equal(found, draws(reference("SGHMC")), slice(3, None, 4))


@every_kernel
def test_warm_restart_goes_on(name):
    """In two parts, collected in warm-up and with a bar, the chain is the one in one go."""
    expected = draws(reference(name))
    mcmc = MCMC(
        KERNELS[name](model), num_warmup=NUM - 10, num_samples=10, num_chains=2, chain_method="sequential",
        progress_bar=False, jit_model_args=True,
    )  # fmt: skip
    mcmc.progress_bar = True
    fields = ("potential_energy", "z.w")
    mcmc.warmup(KEY, SCALE, collect_warmup=True, extra_fields=fields)
    assert_equal(draws(mcmc), expected, slice(0, NUM - 10))
    mcmc.run(mcmc.last_state.rng_key, SCALE, extra_fields=fields)
    assert_equal(draws(mcmc), expected, slice(NUM - 10, None))
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), SCALE, extra_fields=fields)
    np.testing.assert_array_equal(mcmc.last_state.i, NUM + 10)


@every_kernel
def test_warm_restart_of_a_potential_needs_no_start(name):
    kernel = KERNELS[name](potential_fn=lambda x: 0.5 * jnp.sum(x**2))
    mcmc = MCMC(kernel, num_warmup=0, num_samples=5, progress_bar=False)
    mcmc.run(KEY, init_params=jnp.zeros(3))
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key)
    assert mcmc.last_state.i == 10


@every_kernel
def test_vectorized_chains_have_the_law(name):
    """In one batch, from given positions and by raw keys; the chains are independent."""
    chains = 10_000
    init_params = {"s": np.zeros(chains, np.float32), "w": np.zeros((chains, 2), np.float32)}
    mcmc = MCMC(
        KERNELS[name](model), num_warmup=30, num_samples=1, num_chains=chains, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.PRNGKey(3), SCALE, init_params=init_params)
    last = mcmc.get_samples()
    z = np.column_stack([np.log(last["s"]), last["w"]])
    assert_mean(z, 0.0)
    assert_variance(z, VARIANCES[name])
    assert_mean(z[:, 0] * z[:, 1], 0.0)
    assert_mean(z[1:] * z[:-1], 0.0)  # neighbouring chains


@every_kernel
def test_init_leaves_no_trace(name):
    """The same state before and after the kernel met other data, and a state for each of a batch of keys."""
    kernel = KERNELS[name](model)
    first = kernel.init(KEY, 0, None, (SCALE,), {})
    kernel.init(jax.random.key(1), 0, {"s": jnp.ones(()), "w": jnp.ones(2)}, (jnp.ones((5, 1)),), {})
    again = kernel.init(KEY, 0, None, (SCALE,), {})
    jax.tree.map(np.testing.assert_array_equal, first._replace(rng_key=0), again._replace(rng_key=0))
    assert isinstance(first, KernelState)
    batch = kernel.init(jax.random.split(KEY, 3), 0, None, (SCALE,), {})
    stepped = jax.jit(lambda state: kernel.sample(state, (SCALE,), {}))(batch)
    for state in (batch, stepped):
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda a: (3, *jnp.shape(a)), first)
    assert jax.tree.map(jnp.result_type, batch) == jax.tree.map(jnp.result_type, stepped)
    assert np.all(np.diff(batch.z["w"], axis=0) != 0)  # starts of their own


@every_kernel
def test_init_params_are_the_start(name):
    """Unconstrained values, of a model's sites or of a potential's own pytree."""
    kernel = KERNELS[name](potential_fn=lambda z: 0.5 * z["a"] ** 2)
    assert kernel.init(KEY, 0, {"a": jnp.array(0.7)}).potential_energy == pytest.approx(0.245)
    state = KERNELS[name](model).init(KEY, 0, {"s": 1, "w": np.array([2.0, 3.0])}, (SCALE,), {})
    np.testing.assert_allclose([state.z["s"], *state.z["w"]], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="needs init_params"):
        kernel.init(KEY, 0)
    with pytest.raises(ValueError, match="init_params has values for 's'"):
        KERNELS[name](model).init(KEY, 0, {"s": 1.0}, (SCALE,), {})


@every_kernel
def test_chains_are_the_kernels_own(name):
    """`chains` and MCMC take the same step from the same key."""
    kernel = KERNELS[name](potential_fn=lambda x: jnp.sum(x**4) / 4)
    state = kernel.init(jax.random.split(KEY, 4), 0, np.arange(8, dtype=np.float32).reshape(4, 2) / 4)
    chains = kernel.chains(lambda x: -jnp.sum(x**4, -1) / 4)
    step = jax.jit(lambda key, x: chains.step(jax.random.fold_in(key, 0), chains.init(x)))
    expected, found = step(state.rng_key[0], state.z), jax.jit(lambda state: kernel.sample(state, (), {}).chain)(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


@every_kernel
def test_bad_settings(name, unchecked):
    kernel = KERNELS[name]
    for bad in (0.0, -0.1, np.nan, np.inf, np.ones(3)):
        with pytest.raises(ValueError, match="step_size must be one positive number"):
            kernel(model, step_size=bad)
    with pytest.raises(ValueError, match="either `model` or `potential_fn`"):
        kernel(model, potential_fn=model)
    with pytest.raises(ValueError, match="nothing to sample"):
        kernel().init(KEY, 0)
    with pytest.raises(ValueError, match="got a schedule"):
        kernel(step_size=lambda t: 0.1).chains(jnp.sum)
    if name != "MALA":
        with pytest.raises(ValueError, match="temperature must be one non-negative number"):
            kernel(model, temperature=-1.0)
    with pytest.raises(ValueError, match="friction must be"):
        SGHMC(model, step_size=0.1, friction=1.5)
    with pytest.raises(ValueError, match="preconditioner must be None or 'rmsprop'"):
        SGLD(model, step_size=0.1, preconditioner="adam")
    with pytest.raises(ValueError, match="leave preconditioner out"):
        SGLD(step_size=0.1, preconditioner="rmsprop").chains(jnp.sum)
    with pytest.raises(ValueError, match="positive num_warmup"):
        SGLD(model, step_size=0.1, preconditioner="rmsprop").init(KEY, 0, None, (SCALE,), {})


@every_kernel
def test_an_energy_that_is_not_finite_at_the_start(name):
    def broken(y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.factor("term", w * jnp.log(y))

    with pytest.raises(ValueError, match="potential energy of site 'term' is nan at the start"):
        KERNELS[name](broken).init(KEY, 0, None, (jnp.array(-1.0),), {})
    with pytest.raises(ValueError, match="potential energy is nan at the start of chain 1"):
        KERNELS[name](potential_fn=jnp.log).init(jax.random.split(KEY, 2), 0, jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="gradient of the potential energy is not finite"):
        KERNELS[name](potential_fn=jnp.sqrt).init(KEY, 0, jnp.array(0.0))


def test_statistics_reach_arviz():
    kernel = SGHMC(model, step_size=0.5, friction=0.5, temperature=2.0)
    mcmc = MCMC(kernel, num_warmup=5, num_samples=10, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, SCALE, extra_fields=kernel.stats)
    stats = to_arviz(mcmc)["sample_stats"]
    expected = {
        "lp", "acceptance_rate", "n_steps", "diverging", "step_size", "temperature", "effective_temperature",
        "minibatch_gradients", "full_gradients",
    }  # fmt: skip
    assert set(stats.data_vars) == expected
    assert np.all(stats["step_size"] == 0.5)
    assert np.all(stats["temperature"] == 2.0)
    assert np.all(stats["n_steps"] == 1)
    np.testing.assert_array_equal(stats["full_gradients"], np.tile(np.arange(7, 17), (2, 1)))
    np.testing.assert_array_equal(stats["minibatch_gradients"], 0)
    potential = mcmc.get_extra_fields(group_by_chain=True)["potential_energy"]
    np.testing.assert_allclose(stats["lp"], -potential)
