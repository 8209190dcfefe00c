"""Rows spread over devices give the numbers of rows on one device."""

import functools
import logging
import pickle
import re

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

from numpyro_score import (
    CD,
    DSM,
    FSM,
    ISM,
    MALA,
    NCE,
    PCD,
    SSM,
    Energy,
    GradientSpread,
    KLContraction,
    ScoreMatching,
    generalized_bayes,
    sample,
)
from numpyro_score.losses import CHAINS_SITE, LOG_PARTITION_SITE, total_loss

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


A = np.full(8, 0.3, np.float32)


@functools.partial(jax.jit, static_argnums=0)
def gradient_at(loss, a, energy, rng_key):
    return jax.value_and_grad(lambda a: total_loss(loss, energy.with_params({"a": a}), rng_key))(a)


def value_and_gradient(loss, x, rng_key, sites=None):
    """The total of a loss, its gradient in the parameter, and the compiled program, as a fit takes them."""
    given = A, Energy(quartic_model, {"a": A, **(sites or {})}, x), rng_key
    return *gradient_at(loss, *given), gradient_at.lower(loss, *given).compile()


MALA_STEP = MALA(step_size=0.05)
LOSSES = [
    ISM(),
    SSM(),
    SSM(variance_reduced=False),
    DSM(0.3),
    FSM(epsilon=0.1),
    CD(2, kernel=MALA_STEP),
    KLContraction(0.05),
    NCE(dist.Normal(0.0, 2.0).expand([8]).to_event(1)),
]


def normaliser(loss):
    return {LOG_PARTITION_SITE: jnp.array(1.0)} if isinstance(loss, NCE) else None


@pytest.mark.parametrize("loss", LOSSES, ids=lambda v: f"{type(v).__name__}{getattr(v, 'variance_reduced', '')}")
def test_each_device_takes_its_own_rows(loss, rows):
    """Sharded, a loss is the sum of those of each device's rows, at keys folded from the one given; no row moves."""
    key = jax.random.key(1)
    value, gradient, program = value_and_gradient(loss, rows[1], key, normaliser(loss))
    parts = [
        value_and_gradient(loss, x, jax.random.fold_in(key, i), normaliser(loss))
        for i, x in enumerate(jnp.split(rows[0], 2))
    ]
    np.testing.assert_allclose(value, parts[0][0] + parts[1][0], rtol=1e-5)
    np.testing.assert_allclose(gradient, parts[0][1] + parts[1][1], rtol=1e-4, atol=1e-3)
    # Sums alone go between devices, of no more numbers than there are parameters.
    moved = re.findall(r"(all-gather|all-to-all|collective-permute|reduce-scatter)\(", program.as_text())
    sizes = [int(n) for n in re.findall(r"f32\[(\d+)\][^=]*? all-reduce", program.as_text())]
    assert not moved and max(sizes, default=0) <= 8
    one, each = (p.memory_analysis() for p in (parts[0][2], program))
    assert each.temp_size_in_bytes <= 1.15 * one.temp_size_in_bytes + 2**14
    assert each.argument_size_in_bytes <= 1.15 * one.argument_size_in_bytes + 2**10


def test_an_exact_loss_does_not_know_its_devices(rows):
    """Nothing is random in ISM: value and gradient are those of all rows on one device."""
    one, two = (value_and_gradient(ISM(), x, jax.random.key(1)) for x in rows)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(two[1], one[1], rtol=1e-4)


def test_default_step_is_that_of_all_rows(rows):
    """FSM's default step comes from the spread of all rows, on whatever device they are."""
    x = np.where(np.arange(400)[:, None] < 200, 2.0, 1.0) * np.asarray(rows[0])  # each device would find another
    step = float(jax.jit(FSM().step)(Energy(quartic_model, {"a": A}, jnp.asarray(x, np.float32))))
    spread = jax.device_put(x.astype(np.float32), rows[1].sharding)
    default, given = (value_and_gradient(loss, spread, jax.random.key(1)) for loss in (FSM(), FSM(epsilon=step)))
    np.testing.assert_allclose(default[0], given[0], rtol=1e-6)
    np.testing.assert_allclose(default[1], given[1], rtol=1e-5)


@pytest.mark.parametrize("num_chains", [30, 31])
def test_chains_over_devices(num_chains, rows):
    """PCD's value, gradient and Hessian at given chains are those of one device, also of chains in unequal shares."""
    chains = {CHAINS_SITE: {"x": jax.random.normal(jax.random.key(5), (num_chains, 8))}}
    loss = PCD(num_chains, kernel=MALA_STEP)

    @jax.jit
    def second(a, energy):
        def total(a):
            return total_loss(loss, energy.with_params({"a": a}), jax.random.key(1))

        return total(a), jax.grad(total)(a), jax.hessian(total)(a)

    a = 0.3 * jnp.ones(8)
    one, two = (second(a, Energy(quartic_model, {"a": a, **chains}, x)) for x in rows)
    for expected, found in zip(one, two, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


def pcd_fit(x, num_chains, restart=0.0):
    sm = ScoreMatching(
        of_param,
        optim=optax.adam(0.01),
        loss=PCD(num_chains, kernel=MALA_STEP, restart=restart),
        num_steps=50,
    )
    return sm.run(jax.random.key(2), x, progress_bar=False)


@pytest.mark.filterwarnings("ignore:The loss was still falling")
def test_fit_with_chains_over_devices(rows, caplog):
    """Chains stay on the devices that move them, in one program; their paths are independent of each other."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fit = pcd_fit(rows[1], 200, restart=0.1)
    programs = [r for r in caplog.records if "Finished XLA compilation of jit(_advance_impl)" in r.getMessage()]
    chains = fit.state.mutable_state[CHAINS_SITE]["x"]
    assert len(programs) == 1
    assert [s.data.shape for s in chains.addressable_shards] == [(100, 8), (100, 8)]
    assert len(np.unique(np.asarray(chains)[:, 0])) == 200
    expected = pcd_fit(rows[0], 200, restart=0.1).params["a"]
    np.testing.assert_allclose(fit.params["a"], expected, rtol=0.2)  # of other chains
    assert pcd_fit(rows[1], 31).state.mutable_state[CHAINS_SITE]["x"].shape == (31, 8)


def masked_model(x):
    """Rows of NaN are no rows: what fills up shares that would be unequal."""
    a = numpyro.param("a", 0.3 * jnp.ones(8), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=jnp.isfinite(x).all(-1)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, axis=-1))


def test_fits_over_devices_are_pickled(rows):
    """Nothing in them knows its devices; rows come back on one."""
    fit = ScoreMatching(of_param).run(jax.random.key(0), rows[1], progress_bar=False)
    back = pickle.loads(pickle.dumps(fit))
    np.testing.assert_array_equal(back.estimates["a"], fit.estimates["a"])
    np.testing.assert_allclose(back.stderr()["a"], fit.stderr()["a"], rtol=1e-4)


def test_unequal_shares_are_filled_up(rows):
    """150 rows over two devices, filled up by 250 masked ones of NaN, which are all that the second has."""
    x = np.pad(np.asarray(rows[0])[:150], ((0, 250), (0, 0)), constant_values=np.nan)
    sm = ScoreMatching(masked_model)
    fit = sm.run(jax.random.key(0), jax.device_put(x, rows[1].sharding), progress_bar=False)
    expected = ScoreMatching(of_param).run(jax.random.key(0), x[:150], progress_bar=False)
    np.testing.assert_allclose(fit.estimates["a"], expected.estimates["a"], rtol=1e-4)
    np.testing.assert_allclose(fit.stderr()["a"], expected.stderr()["a"], rtol=1e-3)
    influence = fit.influence()["a"]
    np.testing.assert_allclose(influence[:150], expected.influence()["a"], rtol=1e-3, atol=1e-4)
    assert not np.asarray(influence[150:]).any()


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
    jax.clear_caches()  # of the program that both share
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
    x = np.array(rows[0])
    x[390, 3] = np.nan
    x = jax.device_put(x, rows[1].sharding)
    with pytest.raises(ValueError, match=r"have NaN or infinity in row 390 \(1 of 400\)"):
        ScoreMatching(quartic_model).run(jax.random.key(0), x)


def graph_model(x):
    """A normal law with a precision of 36 numbers: enough that its Gram matrix comes from the sparse Jacobian."""
    precision = numpyro.param("precision", jnp.eye(8))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("...i,ij,...j", x, 0.5 * (precision + precision.T), x))
    numpyro.factor("ridge", -0.5 * jnp.sum((precision - precision.T) ** 2))


def test_closed_forms_over_devices(rows):
    """Sums of squares of the Jacobian and of gradients are those of all rows, summed on each device."""
    one, two = (ScoreMatching(graph_model).run(jax.random.key(0), x, progress_bar=False) for x in rows)
    assert len(one.losses) == len(two.losses) == 1  # solved at once
    np.testing.assert_allclose(two.estimates["precision"], one.estimates["precision"], rtol=1e-3, atol=1e-5)
    target = generalized_bayes(of_param, ISM())
    estimates = {"a": 0.04 * jnp.ones(8)}
    spreads = [GradientSpread.of(target, estimates, jax.random.key(0), x) for x in rows]
    np.testing.assert_allclose(spreads[1].outer, spreads[0].outer, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(spreads[1].total, spreads[0].total, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:The largest R-hat", "ignore:.*transitions diverged")
def test_chains_of_sample_over_devices(rows, unchecked):
    """Split over devices, with data on one or several, each chain draws what it draws beside the others."""
    place = NamedSharding(rows[1].sharding.mesh, PartitionSpec("rows"))
    one, *others = (
        sample(Energy(of_param, {"a": 0.3 * jnp.ones(8)}, x), jax.random.key(1), 20, num_warmup=20, sharding=to)
        for x, to in ((rows[0], None), (rows[0], place), (rows[1], place))
    )
    for other in others:
        np.testing.assert_allclose(other["posterior"]["x"], one["posterior"]["x"], rtol=1e-4, atol=1e-5)
    for place_of, message in (
        (NamedSharding(place.mesh, PartitionSpec(None, "rows")), "split the chains alone"),
        (2, "needs a sharding such as NamedSharding"),
        (jax.sharding.SingleDeviceSharding(jax.devices()[0]), "needs a sharding such as NamedSharding"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            sample(Energy(of_param, {"a": 0.3 * jnp.ones(8)}, rows[0]), 0, 20, sharding=place_of)
    with pytest.raises(ValueError, match="num_chains=3 chains evenly over the 2 devices"):
        sample(Energy(of_param, {"a": 0.3 * jnp.ones(8)}, rows[0]), 0, 20, num_chains=3, sharding=place)
    with pytest.raises(ValueError, match="no progress bar"):
        sample(Energy(of_param, {"a": 0.3 * jnp.ones(8)}, rows[0]), 0, 20, sharding=place, progress_bar=True)


def regression(x, z):
    """Rows with densities of their own."""
    b = numpyro.param("b", jnp.ones(8))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", -jnp.sum((x - b * z) ** 4, axis=-1))


def test_covariates_stay_with_their_rows(rows):
    """With covariates the compiler lays out all: the random numbers are those of one device, and no row moves."""
    z = [jax.device_put(rows[0] + 1.0, x.sharding) for x in rows]

    @jax.jit
    def run(b, energy):
        return jax.value_and_grad(lambda b: total_loss(DSM(0.3), energy.with_params({"b": b}), jax.random.key(1)))(b)

    b = 0.5 * jnp.ones(8)
    energies = [Energy(regression, {"b": b}, *arguments) for arguments in zip(rows, z, strict=True)]
    one, two = (run(b, energy) for energy in energies)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(two[1], one[1], rtol=1e-4)
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", run.lower(b, energies[1]).compile().as_text())


def network_model(x):
    """A network with a hidden layer."""

    def start(rng_key):
        return {"in": jax.random.normal(rng_key, (8, 16)) / 3.0, "out": jnp.ones(16) / 4.0}

    weights = numpyro.param("network", start)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (8,)), obs=x)
        numpyro.factor("energy", jax.nn.swish(x @ weights["in"]) @ weights["out"])


@pytest.mark.filterwarnings("ignore:The loss was still falling")
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_weights_stay_spread(axes, rows, explicit, caplog):
    """Weights that are spread over the devices stay so, with the optimiser's numbers, in one program of the steps."""
    x = rows[1] if axes == "auto" else explicit
    mesh = x.sharding.mesh
    start = {"in": jax.random.normal(jax.random.key(3), (8, 16)) / 3.0, "out": jnp.ones(16) / 4.0}
    places = {"in": PartitionSpec(None, "rows"), "out": PartitionSpec("rows")}
    spread = {k: jax.device_put(v, NamedSharding(mesh, places[k])) for k, v in start.items()}

    def fit(x, network):
        sm = ScoreMatching(network_model, optim=optax.adam(1e-3), num_steps=20)
        return sm.run(jax.random.key(0), x, init_params={"network": network}, progress_bar=False)

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = fit(x, spread)
    programs = [r for r in caplog.records if "Finished XLA compilation of jit(_advance_impl)" in r.getMessage()]
    assert len(programs) <= 1  # the other axes may have compiled it
    for tree in (found.params["network"], found.state.optim_state[1][1][0].mu["network"]):
        assert [tree[k].addressable_shards[0].data.shape for k in ("in", "out")] == [(8, 8), (8,)]
    expected = fit(rows[0], start).params["network"]
    for k in start:
        np.testing.assert_allclose(found.params["network"][k], expected[k], atol=1e-6)
