"""Rows spread over devices give the numbers of rows on one device."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from models import two_devices
from numpyro.distributions import constraints

from numpyro_score import DSM, ISM, SSM, Energy, ScoreMatching
from numpyro_score.losses import total_loss

pytestmark = two_devices


def quartic_model(x):
    """A sum of quartic terms, so that no derivative is constant."""
    a = numpyro.sample("a", dist.LogNormal(-1.0, 1.0).expand([8]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, axis=-1) - 0.1 * jnp.sum(x, axis=-1) ** 2)


@pytest.fixture(scope="module")
def rows():
    """The same rows, on one device and over two."""
    devices = jax.devices()[:2]
    x = jax.random.normal(jax.random.key(0), (400, 8))
    return x, jax.device_put(x, NamedSharding(Mesh(np.array(devices), ("rows",)), PartitionSpec("rows")))


@pytest.mark.parametrize("loss", [ISM(), SSM(), DSM(0.3)], ids=repr)
def test_sharded_loss_and_gradient(loss, rows):
    """Loss and gradient of sharded data equal those of the same data on one device, ISM in chunks of rows too."""

    @jax.jit
    def value_and_grad(a, x):
        energy = Energy(quartic_model, {"a": a}, x)
        return jax.value_and_grad(lambda a: total_loss(loss, energy.with_params({"a": a}), jax.random.key(1)))(a)

    (one, one_grad), (two, two_grad) = (value_and_grad(0.3 * jnp.ones(8), x) for x in rows)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    np.testing.assert_allclose(two_grad, one_grad, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The loss was still falling")  # few steps tell as much
def test_sharded_fit(rows):
    """A fit of sharded data finds the estimates of the same data on one device."""
    fits = [ScoreMatching(quartic_model, num_steps=50).run(jax.random.key(2), x, progress_bar=False) for x in rows]
    np.testing.assert_allclose(fits[1].estimates["a"], fits[0].estimates["a"], rtol=1e-4)


@pytest.fixture(scope="module")
def explicit():
    """The same rows over two devices of a mesh as `jax.make_mesh` makes it, with explicit axes."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    return jax.device_put(jax.random.normal(jax.random.key(0), (400, 8)), NamedSharding(mesh, PartitionSpec("rows")))


@pytest.mark.parametrize("loss", [ISM(), SSM(), DSM(0.3)], ids=repr)
def test_explicit_axes_are_taken(loss, rows, explicit):
    """An energy of rows on a mesh with explicit axes has the losses of the same rows on a mesh without."""
    value = jax.jit(lambda energy: total_loss(loss, energy, jax.random.key(1)))
    auto, same = (value(Energy(quartic_model, {"a": 0.3 * jnp.ones(8)}, x)) for x in (rows[1], explicit))
    assert auto == same


def of_param(x):
    """With a param site alone, whose start has nothing to do with the data and their devices."""
    a = numpyro.param("a", 0.3 * jnp.ones(8), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, axis=-1))


@pytest.mark.filterwarnings("ignore:The loss was still falling")
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_steps_over_devices_compile_once(axes, rows, explicit, caplog):
    """The first state is laid out as all others, so that there is one program of the steps, on either mesh."""
    x = rows[1] if axes == "auto" else explicit
    sm = ScoreMatching(of_param, optim=optax.adam(0.01), num_steps=50)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fit = sm.run(jax.random.key(2), x, progress_bar=False)
        sm.run(jax.random.key(3), x, progress_bar=False)
    programs = [r for r in caplog.records if "Finished XLA compilation of jit(_advance_impl)" in r.getMessage()]
    assert len(programs) == 1
    one = ScoreMatching(of_param, optim=optax.adam(0.01), num_steps=50)
    expected = one.run(jax.random.key(2), rows[0], progress_bar=False)
    np.testing.assert_allclose(fit.params["a"], expected.params["a"], rtol=1e-4)


def test_bad_rows_are_named_on_any_device(rows):
    """The check counts rows where they are, and names them by their number among all."""
    x = jax.device_put(rows[0].at[390, 3].set(jnp.nan), rows[1].sharding)
    with pytest.raises(ValueError, match=r"have NaN or infinity in row 390 \(1 of 400\)"):
        ScoreMatching(quartic_model).run(jax.random.key(0), x)
