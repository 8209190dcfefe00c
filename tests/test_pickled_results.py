"""What the package returns goes through pickle and deepcopy, and is printed without the addresses of objects."""

import copy
import pickle

import cloudpickle
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import improper
from numpyro.contrib.module import eqx_module, flax_module
from numpyro.distributions import constraints

import numpyro_score as ns
from numpyro_score import DSM, ISM, NCE, PCD, ScoreMatching, generalized_bayes
from numpyro_score.inference.adversarial_result import AdversarialResult, AdversarialState
from numpyro_score.inference.calibration import CalibratedRate
from numpyro_score.inference.generator import GeneratorResult, GeneratorState

KEY = jax.random.key(0)
X = 0.3 * jax.random.normal(KEY, (60, 1))


def energy_of(f, x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(1), obs=x)
        numpyro.factor("energy", f(x) - 0.5 * jnp.sum(x**2, axis=-1))


def precision(x):
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    energy_of(lambda x: -tau * jnp.sum(x**2, axis=-1), x)


def sparse(x):
    tau = numpyro.sample("tau", dist.Laplace(0.0, 1.0))
    energy_of(lambda x: -tau * jnp.sum(x**2, axis=-1), x)


def many(x):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([300]).to_event(1))
    energy_of(lambda x: jnp.sum(x**2, axis=-1) * jnp.sum(theta), x)


def flax_net(x):
    net = flax_module("net", nn.Dense(1), input_shape=(1,))
    energy_of(lambda x: jax.nn.softplus(net(x))[:, 0], x)


def equinox_net(x):
    net = eqx_module("net", eqx.nn.Linear(1, "scalar", key=KEY))
    energy_of(lambda x: jax.nn.softplus(jax.vmap(net)(x)), x)


def moved(params, z):
    return z + params


def target_score(x):
    return -x


def potential(z):
    return 0.5 * z**2


def two(args, kwargs):
    return 2.0


ENERGY = ns.Energy(precision, {"tau": 0.25}, X)
LAW = generalized_bayes(precision, ISM())
BASE = dist.Normal(jnp.zeros(1), 1.0).to_event(1)


def quadratic(model):
    return ns.QuadraticLoss.of(generalized_bayes(model, ISM()), KEY, X)


def fitted(model, **options):
    return ScoreMatching(model, num_steps=2, **options).run(KEY, X, progress_bar=False)


def flow(kind=ns.HamiltonianFlow):
    return kind(BASE, ENERGY.log_density, 0.1, 2)


CASES = {
    "ScoreMatching": lambda: ScoreMatching(sparse, loss=ns.ESM(target_score), learning_rate="calibrated"),
    "ScoreMatching with a line search": lambda: ScoreMatching(sparse, optim=optax.lbfgs()),
    "network of flax": lambda: fitted(flax_net),
    "network of equinox": lambda: fitted(equinox_net),
    "many numbers": lambda: fitted(many, optim=optax.adam(0.01)),
    "closed form of DSM": lambda: fitted(precision, loss=DSM(0.5)),
    "NCE": lambda: fitted(precision, loss=NCE(BASE)),
    "PCD": lambda: fitted(precision, loss=PCD(kernel=ns.MALA(step_size=0.1))),
    "AdversarialDynamicsEmbedding": lambda: ns.AdversarialDynamicsEmbedding(precision),
    "AdversarialResult": lambda: AdversarialResult(
        {}, AdversarialState(None, {}, None, KEY), *[np.ones(3)] * 4, ENERGY, flow()
    ),
    "DenoisingGenerator": lambda: ns.DenoisingGenerator(precision, moved, 0.5, BASE),
    "GeneratorResult": lambda: GeneratorResult(jnp.zeros(1), GeneratorState(jnp.zeros(1), None, None, KEY), np.ones(3)),
    "QuadraticLoss": lambda: quadratic(precision),
    "QuadraticFit": lambda: quadratic(precision).solve(),
    "SparsePath": lambda: ns.sparse_path(quadratic(sparse)),
    "GradientSpread": lambda: ns.GradientSpread.of(LAW, {"tau": jnp.asarray(0.25)}, KEY, X),
    "LogPartition": lambda: ns.log_partition(ENERGY),
    "HyvarinenScore": lambda: ns.hyvarinen_score(ENERGY),
    "Divergence": lambda: ns.mmd(X, X[:30]),
    "SteinTest": lambda: ns.kernel_stein_discrepancy(X, ENERGY, KEY),
    "Audit": lambda: ns.audit(precision, [ISM(), ns.ESM(target_score)], X, num_rows=5, num_draws=2),
    "LearnedFlow": lambda: ns.LearnedFlow(2, loc=jnp.ones(2)),
    "HamiltonianFlow": flow,
    "LangevinFlow": lambda: flow(ns.LangevinFlow),
    "FlowFit": lambda: ns.fit_flow(ns.LearnedFlow(1, 1), ENERGY.log_density, KEY, num_steps=2),
    "EnergyDistribution": lambda: ns.EnergyDistribution(ENERGY, 1.0),
    "GeneralizedModel": lambda: generalized_bayes(sparse, ISM(), "calibrated"),
    "SGLD": lambda: ns.SGLD(potential_fn=potential, step_size=ns.polynomial_schedule(0.1, 1.0, 0.5)),
    "MALA": lambda: ns.MALA(LAW, step_size=0.1),
    "SGHMC": lambda: ns.SGHMC(LAW, step_size=0.1),
    "parzen_score": lambda: ns.ESM(ns.parzen_score(X, 0.5)),
}


@jax.jit
def score(energy):
    return energy.score(X)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_printed_forms(name):
    value = CASES[name]()
    text = repr(value)
    assert " at 0x" not in text and len(text) < 1000
    for found in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert type(found) is type(value) and repr(found) == text
        if isinstance(value, ns.ScoreMatchingResult):
            jax.tree.map(np.testing.assert_array_equal, value.estimates, found.estimates)
            np.testing.assert_array_equal(score(value.energy), score(found.energy))


def test_a_model_made_in_a_function_goes_through_cloudpickle():
    def local(x):
        precision(x)

    fit = fitted(local)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        pickle.dumps(fit)
    found = cloudpickle.loads(cloudpickle.dumps(fit))
    jax.tree.map(np.testing.assert_array_equal, fit.stderr(), found.stderr())


def test_own_optimisers_go_on_after_pickle():
    made = ns.DenoisingGenerator(precision, moved, 0.5, BASE, batch_size=4), ns.AdversarialDynamicsEmbedding(precision)
    generator, adversarial = pickle.loads(pickle.dumps(made))
    state = made[0].optim.init(jnp.zeros(1))
    for a, b in [(made[0].optim, generator.optim), (made[0].critic.optim, generator.critic.optim)]:
        jax.tree.map(np.testing.assert_array_equal, a.init(jnp.ones(1)), b.init(jnp.ones(1)))
    np.testing.assert_array_equal(
        generator.optim.update(jnp.ones(1), state)[0], made[0].optim.update(jnp.ones(1), state)[0]
    )
    assert adversarial._svi.optim.init({"tau": 1.0}) is not None


class Pair:
    """A pytree of the user's own, whose structure JAX does not pickle."""

    def __init__(self, x):
        self.x = x


jax.tree_util.register_pytree_node(Pair, lambda p: ((p.x,), None), lambda _, children: Pair(*children))


def test_a_calibrated_rate_is_remembered_through_pickle():
    rate = CalibratedRate(two)
    rate((Pair(np.asarray(X)),), {}, lambda: np.asarray(X))
    found = pickle.loads(pickle.dumps(rate))
    found.fit = None  # which would fail if it were called
    assert found((Pair(np.asarray(X)),), {}, lambda: np.asarray(X)) == 2.0
