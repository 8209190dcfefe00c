"""Flows along the score: leapfrog steps, densities, entropies, and bounds on normalisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial
from models import FAST_COMPILE, assert_mean, energy_of
from numpyro.infer import SVI, Trace_ELBO
from scipy.integrate import quad
from scipy.stats import norm

from numpyro_score import HamiltonianFlow, LangevinFlow, LearnedFlow, fit_flow
from numpyro_score.flows import Phase, Scaling, leapfrog, leapfrog_inverse, summarize_weights

D = 2


def coupled(x):
    """A quartic density of two coupled coordinates."""
    return -0.25 * jnp.sum(x**4, -1) - 0.5 * x[..., 0] * x[..., 1] - 0.1 * jnp.sum(x**2, -1)


def score(x):
    return jax.grad(lambda y: coupled(y).sum())(x)


def normal(scale, dim=D, loc=0.0):
    return dist.Normal(loc * jnp.ones(dim), scale).to_event(1)


# -- one step -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="inverse")
def step(step_size, x, v, inverse=False):
    move = leapfrog_inverse if inverse else leapfrog
    return move(score, lambda s: s, step_size, Phase(x, v, score(x)))[0]


@functools.partial(jax.jit, static_argnums=0)
def trajectory(n, step_size, x, v):
    """Position, velocity and the change of f − ½‖v‖² after n steps."""
    start = Phase(x, v, score(x))
    end = jax.lax.fori_loop(0, n, lambda _, p: leapfrog(score, lambda s: s, step_size, p)[0], start)
    hamiltonian = lambda p: coupled(p.x) - 0.5 * jnp.sum(p.v**2, -1)  # noqa: E731
    return end.x, end.v, hamiltonian(end) - hamiltonian(start)


def test_leapfrog_keeps_volume_and_is_reversible(x64):
    x, v = np.random.default_rng(0).normal(size=(2, 7, D))
    step_size = np.array([0.3, 0.2])

    def flat(z):
        return jnp.concatenate(step(step_size, z[:D], z[D:])[:2])

    jacobians = jax.jit(jax.vmap(jax.jacfwd(flat)))(np.concatenate([x, v], -1))
    np.testing.assert_allclose(np.linalg.det(jacobians), 1.0, atol=1e-10)
    there = trajectory(10, 0.2, x, v)
    back = trajectory(10, 0.2, there[0], -there[1])
    np.testing.assert_allclose(back[0], x, atol=1e-10)
    np.testing.assert_allclose(back[1], -v, atol=1e-10)
    ahead = step(step_size, x, v)
    np.testing.assert_allclose(np.stack(step(step_size, *ahead[:2], inverse=True)[:2]), [x, v], atol=1e-12)


def test_energy_error_is_of_second_order(x64):
    """Over a fixed time the error of f − ½‖v‖² falls as the square of the step size."""
    x, v = np.random.default_rng(1).normal(size=(2, 50, D))
    counts = np.array([16, 32, 64, 128])
    errors = [np.sqrt(np.mean(np.square(trajectory(int(n), 1.0 / n, x, v)[2]))) for n in counts]
    slope = np.polyfit(np.log(1.0 / counts), np.log(errors), 1)[0]
    assert abs(slope - 2.0) < 0.05


# -- densities ----------------------------------------------------------------------------------------------------

STEPS, BETA, SHARE, MOMENTUM = 3, np.array([0.3, 0.6, 1.0]), 0.4, 0.8


def net(params, *inputs):
    hidden = jnp.tanh(jnp.concatenate(inputs, -1) @ params[0])
    return 0.5 * jnp.tanh(hidden @ params[1])


def scaling(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = [(2 * D, 5), (5, D), (D, 5), (5, D)]
    weights = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
    return Scaling(Partial(net, weights[:2]), Partial(net, weights[2:]))


def step_sizes():
    return 0.1 * (1.0 + jnp.arange(STEPS * D).reshape(STEPS, D) / 6)


def by_hand(z, *, langevin=False, annealed=True, refreshed=True, nets=None):
    """The value of a flow as a function of what it draws, (1 + noises, D), in the most obvious way."""
    base, h = normal(1.3), step_sizes()
    x, v = z[0], MOMENTUM * z[1]
    noise, kept = list(z[1:] if langevin else z[2:]), []
    for k in range(STEPS):
        beta = BETA[k] if annealed else 1.0
        force = jax.grad(lambda y, beta=beta: beta * coupled(y) + (1 - beta) * base.log_prob(y))
        if langevin:
            kept.append(h[k] * force(x) + jnp.sqrt(2 * h[k]) * noise[k])
            x = x + kept[-1]
            continue
        if refreshed and k > 0:
            xi = noise[k - 1]
            v, xi = np.sqrt(1 - SHARE) * v + np.sqrt(SHARE) * xi, np.sqrt(1 - SHARE) * xi - np.sqrt(SHARE) * v
            kept.append(xi)
        scale = (lambda: jnp.exp(nets.velocity(x, force(x)))) if nets else (lambda: 1.0)  # noqa: B023
        v = v * scale() + 0.5 * h[k] * force(x)
        x = x * (jnp.exp(nets.position(v)) if nets else 1.0) + h[k] * v
        v = v * scale() + 0.5 * h[k] * force(x)
    return jnp.stack([x, *kept] if langevin else [x, v, *kept])


def flows():
    base, h, beta = normal(1.3), step_sizes(), jnp.asarray(BETA)
    made = functools.partial(HamiltonianFlow, base, coupled, h, STEPS, momentum_scale=MOMENTUM)
    return {
        "hamiltonian": (made(), dict(annealed=False, refreshed=False)),
        "refreshed": (made(annealing=beta, refreshment=SHARE), {}),
        "scaled": (made(scaling=scaling(), refreshment=SHARE), dict(annealed=False, nets=scaling())),
        "langevin": (LangevinFlow(base, coupled, h, STEPS, annealing=beta), dict(langevin=True)),
    }


@pytest.mark.parametrize("name", ["hamiltonian", "refreshed", "scaled", "langevin"])
def test_log_prob_is_the_change_of_variables(x64, name):
    flow, options = flows()[name]
    push = functools.partial(by_hand, **options)
    z = np.random.default_rng(4).normal(size=(5, *flow.event_shape))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def brute_force(z):
        size = z.size
        jacobian = jax.jacfwd(lambda u: push(u.reshape(z.shape)).ravel())(z.ravel()).reshape(size, size)
        start = normal(1.3).log_prob(z[0]) + dist.Normal(0, 1).log_prob(z[1:]).sum()
        return push(z), start - jnp.linalg.slogdet(jacobian)[1]

    value, expected = map(np.stack, zip(*map(brute_force, z), strict=True))
    np.testing.assert_allclose(log_prob(flow, value), expected, rtol=1e-10)


@functools.partial(jax.jit, static_argnums=2, compiler_options=FAST_COMPILE)
def simulate(flow, rng_key, shape):
    return flow.simulate(rng_key, shape)


@functools.partial(jax.jit, compiler_options=FAST_COMPILE)
def log_prob(flow, value):
    return flow.log_prob(value)


@pytest.mark.parametrize("name", ["hamiltonian", "refreshed", "scaled", "langevin"])
def test_draws_densities_and_weights_agree(x64, name):
    """What a simulation knows is what inversion finds; its weights are those of the stated target."""
    flow, _ = flows()[name]
    found = jax.device_get(simulate(flow, jax.random.key(5), (20_000,)))
    few = found.value[:50]
    np.testing.assert_allclose(log_prob(flow, few), found.log_prob[:50], atol=1e-10)
    np.testing.assert_allclose(found.log_density[:50], jax.jit(coupled)(few[:, 0]), rtol=1e-12)
    if name == "langevin":  # the same dynamics, run backwards
        h, x, expected = np.asarray(step_sizes()), few[:, 0], 0.0
        for k in reversed(range(STEPS)):
            force = BETA[k] * np.asarray(jax.jit(score)(x)) - (1 - BETA[k]) * x / 1.3**2
            expected += norm.logpdf(-few[:, 1 + k], h[k] * force, np.sqrt(2 * h[k])).sum(-1)
            x = x - few[:, 1 + k]
    else:
        expected = norm.logpdf(few[:, 1:]).sum((1, 2))
    np.testing.assert_allclose(found.log_auxiliary[:50], expected, rtol=1e-10)
    if name == "scaled":
        with pytest.raises(ValueError, match="pass a key"):
            flow.entropy()
    else:
        assert_mean(-found.log_prob, float(flow.entropy()))


def test_entropy_of_a_scaled_flow(x64):
    """Nets of constant output scale volume by a known amount."""
    nets = Scaling(lambda x, f: jnp.full_like(x, 0.1), lambda v: jnp.full_like(v, -0.05))
    plain = HamiltonianFlow(normal(1.3), coupled, 0.1, STEPS)
    scaled = HamiltonianFlow(normal(1.3), coupled, 0.1, STEPS, scaling=nets)
    found = simulate(scaled, jax.random.key(6), (20_000,))
    expected = plain.entropy() + STEPS * D * (2 * 0.1 - 0.05)
    assert_mean(-found.log_prob, float(expected))
    np.testing.assert_allclose(
        jax.jit(lambda key: scaled.entropy(key, 20_000))(jax.random.key(6)), -found.log_prob.mean(), rtol=1e-12
    )


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences(x64):
    """Of the bound, in the base, the steps and the refreshment, through `jit` with the flow as an argument."""

    def bound(settings):
        base = normal(settings["scale"], loc=settings["loc"])
        options = {k: settings[k] for k in ("annealing", "refreshment", "momentum_scale")}
        flow = HamiltonianFlow(base, coupled, settings["step_size"], STEPS, **options)
        return flow.log_weights(jax.random.key(7), (20,)).mean()

    at = dict(loc=0.2, scale=1.1, step_size=step_sizes(), annealing=jnp.asarray(BETA) * 0.9, refreshment=SHARE)
    at["momentum_scale"] = jnp.array([0.8, 1.1])
    at = jax.tree.map(np.asarray, at)
    value, grads = jax.jit(jax.value_and_grad(bound))(at)
    jitted = jax.jit(bound)
    np.testing.assert_allclose(jitted(at), value, rtol=1e-12)
    for name, grad in grads.items():
        grad = np.asarray(grad)
        for i in np.ndindex(grad.shape):
            one = np.zeros(grad.shape)
            one[i] = 1e-5
            up, down = (float(jitted({**at, name: at[name] + e})) for e in (one, -one))
            np.testing.assert_allclose(grad[i], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_as_a_guide(x64):
    """`numpyro.sample` takes a flow; the ELBO under the flow's own target is the bound."""
    flow = flows()["refreshed"][0]

    def model():
        value = numpyro.sample("xv", dist.ImproperUniform(flow.support, (), flow.event_shape))
        numpyro.factor("f", coupled(value[0]) + dist.Normal(0, 1).log_prob(value[1:]).sum())

    def guide():
        loc = numpyro.param("loc", jnp.zeros(D))
        made = functools.partial(HamiltonianFlow, normal(1.3, loc=loc), coupled, step_sizes(), STEPS)
        numpyro.sample("xv", made(momentum_scale=MOMENTUM, annealing=jnp.asarray(BETA), refreshment=SHARE))

    svi = SVI(model, guide, optax.sgd(1e-3), Trace_ELBO(num_particles=2000))
    elbo = -jax.jit(lambda key: svi.evaluate(svi.init(key)))(jax.random.key(8))
    log_weights = simulate(flow, jax.random.key(9), (20_000,)).log_weights
    spread = float(log_weights.std()) * (1 / 2000 + 1 / 20_000) ** 0.5
    assert abs(float(elbo - log_weights.mean())) < 5 * spread


def test_flows_are_pytrees_that_vmap_and_do_not_compile_again(x64):
    energy = energy_of(lambda theta, x: -theta * jnp.sum(x**4, -1), 0.25, np.zeros((3, D)))
    calls = []

    @jax.jit
    def weights(flow, key):
        calls.append(1)
        return flow.log_weights(key, (4,))

    def made(theta, step_size, base_scale):  # f through the energy, whose parameter is a leaf of the flow
        return HamiltonianFlow(normal(base_scale), energy.with_params({"theta": theta}).log_density, step_size, 2)

    key = jax.random.key(0)
    one, two = (weights(made(jnp.asarray(t), s, b), key) for t, s, b in ((0.25, 0.1, 1.0), (0.5, 0.2, 1.5)))
    assert len(calls) == 1
    several = jax.jit(jax.vmap(lambda t, s, b: made(t, s, b).log_weights(key, (4,))))(
        jnp.array([0.25, 0.5]), jnp.array([0.1, 0.2]), jnp.array([1.0, 1.5])
    )
    np.testing.assert_allclose(several, jnp.stack([one, two]), rtol=1e-12)
    batched = HamiltonianFlow(dist.Normal(jnp.zeros((3, D)), 1.0).to_event(1), coupled, 0.1, 2)
    path = simulate(batched, key, (5,))
    assert batched.batch_shape == (3,) and path.value.shape == (5, 3, 2, D)
    np.testing.assert_allclose(log_prob(batched, path.value), path.log_prob, atol=1e-10)
    langevin = LangevinFlow(batched.base, coupled, 0.1, 4)
    path = simulate(langevin, key, (5,))
    np.testing.assert_allclose(log_prob(langevin, path.value), path.log_prob, atol=1e-10)


# -- normalisers --------------------------------------------------------------------------------------------------

COV = np.array([[0.4 ** abs(i - j) for j in range(10)] for i in range(10)])
PRECISION = np.linalg.inv(COV)


def gaussian(x):
    return -0.5 * jnp.sum(x * (x @ jnp.asarray(PRECISION, x.dtype)), -1)


def quartic(x):
    return -0.5 * jnp.sum(x**2, -1) - 0.1 * jnp.sum(x**4, -1)


def two_modes(x):
    left, right = (-0.5 * jnp.sum((x - m) ** 2, -1) for m in (-1.2, 1.2))
    return jnp.logaddexp(left, right + jnp.log(2.0))


def banana(x):
    return -0.5 * x[..., 0] ** 2 - 2.0 * (x[..., 1] - 0.5 * x[..., 0] ** 2) ** 2


def ring(x):
    return -2.0 * (jnp.sum(x**2, -1) - 1.0) ** 2


def student(x):
    return -3.0 * jnp.sum(jnp.log1p(x**2 / 5.0), -1)


def log_quad(f):
    return float(np.log(quad(lambda t: np.exp(float(f(t))), -12, 12)[0]))


QUARTIC = log_quad(lambda t: -0.5 * t**2 - 0.1 * t**4)
STUDENT = float(np.log(quad(lambda t: (1 + t * t / 5) ** -3.0, -np.inf, np.inf)[0]))
RING = float(np.log(np.pi * quad(lambda u: np.exp(-2 * (u - 1) ** 2), 0, 10)[0]))
NORMAL = 0.5 * np.log(2 * np.pi)
TARGETS = {  # density, base, true log Z
    "normal, D=1": (lambda x: -0.5 * jnp.sum((x - 0.5) ** 2, -1) / 0.49, normal(1.0, 1), NORMAL + np.log(0.7)),
    "correlated, D=10": (gaussian, normal(1.1, 10), 10 * NORMAL + 0.5 * np.linalg.slogdet(COV)[1]),
    "quartic, D=10": (quartic, normal(0.8, 10), 10 * QUARTIC),
    "two modes, D=1": (two_modes, normal(1.6, 1), NORMAL + np.log(3.0)),
    "banana, D=2": (banana, normal(1.2, 2, 0.3), 2 * NORMAL - np.log(2.0)),
    "ring, D=2": (ring, normal(0.8, 2), RING),
    "student, D=1": (student, dist.StudentT(4.0, jnp.zeros(1), 1.0).to_event(1), STUDENT),
}
RUNS, DRAWS = 400, 400


@functools.lru_cache
def log_weights(name, num_steps=16, refreshment=0.3, langevin=False, shape=(DRAWS, RUNS)):
    log_density, base, _ = TARGETS[name]
    step_size = {"ring, D=2": 0.12, "correlated, D=10": 0.4}.get(name, 0.25)
    beta = jnp.arange(1, num_steps + 1) / num_steps
    if langevin:
        flow = LangevinFlow(base, log_density, 0.15, num_steps, annealing=beta)
    else:
        options = dict(annealing=beta, refreshment=refreshment)
        flow = HamiltonianFlow(base, log_density, step_size, num_steps, **options)
    compiled = jax.jit(lambda key: flow.log_weights(key, shape))
    # It runs for longer than it compiles.
    lowered = compiled.lower(jax.random.key(0)).compile(compiler_options={"xla_backend_optimization_level": 1})
    return np.asarray(lowered(jax.random.key(10)), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_bounds_estimates_and_their_errors(name):
    """E[log w] ≤ log Z, E[w] = Z, and standard errors that are those of replications."""
    truth = TARGETS[name][2]
    found = log_weights(name)
    bound, stderr = found.mean(), found.std() / found.size**0.5
    assert bound < truth + 5 * stderr
    assert_mean(np.exp(found - truth).ravel(), 1.0)
    each = summarize_weights(jnp.asarray(found))
    for value, error in ((each.bound, each.bound_stderr), (each.log_partition, each.log_partition_stderr)):
        # The spread of 400 replications is known to about 4%; both bounds are five such errors away.
        assert 0.8 < np.sqrt(np.mean(np.square(error))) / np.std(value, ddof=1) < 1.25
    # Of 400 estimates about one is beyond 3 standard errors; more than ten would be by chance in 1e-8 of tests.
    assert np.sum(np.abs(each.log_partition - truth) > 3 * each.log_partition_stderr) <= 10


def gap(name, **options):
    """log Z − E[log w], and its standard error."""
    shape = {"shape": (20_000,)} if options else {}  # those of the test above are enough, too
    found = log_weights(name, **shape, **options)
    return TARGETS[name][2] - found.mean(), found.std() / found.size**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["correlated, D=10", "two modes, D=1"])
def test_gap_shrinks_with_steps_and_refreshment(name):
    """More steps bring the bound nearer, of either flow, and so do new velocities on a long way through ten scales."""

    def smaller(first, second):
        assert first[0] + 5 * np.hypot(first[1], second[1]) < second[0]

    smaller(gap(name), gap(name, num_steps=4))
    if name == "correlated, D=10":
        smaller(gap(name, num_steps=48), gap(name))
        smaller(gap(name, num_steps=48), gap(name, num_steps=48, refreshment=None))
    else:
        smaller(gap(name, num_steps=16, langevin=True), gap(name, num_steps=4, langevin=True))


# -- fitting ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fit_finds_the_normaliser():
    """A diagonal normal is within the family: its bound is exact. The fitted base does not matter to E[w] = Z."""
    mean, sd = jnp.array([1.0, -2.0, 0.0]), jnp.array([0.5, 1.0, 2.0])

    def log_density(x):
        return -0.5 * jnp.sum(((x - mean) / sd) ** 2, -1)

    truth = 3 * NORMAL + float(jnp.log(sd).sum())
    fit = fit_flow(LearnedFlow(3, 3, annealed=True, refreshed=True), log_density, jax.random.key(0), num_steps=600)
    assert fit.bounds.shape == (600,) and fit.params["flow_step_size"].shape == (3, 3)
    log_weights = np.asarray(jax.jit(lambda key: fit.flow.log_weights(key, (4000,)))(jax.random.key(1)), np.float64)
    assert -0.05 < log_weights.mean() - truth < 5 * log_weights.std() / 4000**0.5
    assert_mean(np.exp(log_weights - truth), 1.0)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_what_flows_refuse(unchecked):
    base = normal(1.0)

    def made(message, *args, error=ValueError, flow=HamiltonianFlow, **options):
        with pytest.raises(error, match=message):
            flow(*args, **options)

    made("positive, got 0", base, coupled, 0.0, 3)
    made("positive, got", base, coupled, jnp.array([0.1, -0.1]), 3, flow=LangevinFlow)
    made("positive, got nan", base, coupled, jnp.nan, 3)
    made(r"step_size of shape \(\), \(2,\)", base, coupled, jnp.ones(5), 3)
    made("positive integer as num_steps, got 0", base, coupled, 0.1, 0)
    made("one event dimension", dist.Normal(0, 1), coupled, 0.1, 3)
    for narrow in (dist.Gamma(2.0, 1.0), dist.Uniform(0, 1), dist.Delta(0.0), dist.Poisson(1.0)):
        made("a density on all of R", narrow.expand([2]).to_event(1), coupled, 0.1, 3)
    made("function of rows", base, 3.0, 0.1, 3, error=TypeError)
    made("momentum_scale positive", base, coupled, 0.1, 3, momentum_scale=-1.0)
    made(r"annealing of shape \(3,\)", base, coupled, 0.1, 3, annealing=0.5)
    made("annealing between 0 and 1", base, coupled, 0.1, 1, annealing=[1.5])
    made("refreshment between 0 and 1", base, coupled, 0.1, 3, refreshment=2.0)
    with pytest.raises(ValueError, match="one value for each row"):
        jax.eval_shape(HamiltonianFlow(base, lambda x: -(x**2), 0.1, 1).sample, jax.random.key(0))
    energy = energy_of(lambda theta, x: -theta * jnp.sum(x**2, -1), 0.5, np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="a row has 3 numbers"):
        jax.eval_shape(HamiltonianFlow(base, energy.log_density, 0.1, 1).sample, jax.random.key(0))
    with pytest.raises(ValueError, match="two weights or more"):
        summarize_weights(jnp.zeros(1))


def test_what_fits_refuse():
    key = jax.random.key(0)
    with pytest.raises(FloatingPointError, match="at step"):
        fit_flow(LearnedFlow(1, 2), lambda x: jnp.exp(x[..., 0] ** 2), key, num_steps=50)
    with pytest.raises(ValueError, match=r"no numpyro.param"):
        fit_flow(lambda f: HamiltonianFlow(normal(1.0), f, 0.1, 1), coupled, key)

    def mixture(f, learned):
        loc = jnp.zeros((2, D)) + (numpyro.param("offset", 0.0) if learned else 0.0)
        base = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(loc, 1.0).to_event(1))
        return HamiltonianFlow(base, f, numpyro.param("step_size", 0.1), 1)

    with pytest.raises(ValueError, match="pass no gradients"):
        fit_flow(functools.partial(mixture, learned=True), coupled, key)
    # Draws of a base that is not learned need no gradients.
    assert np.isfinite(fit_flow(functools.partial(mixture, learned=False), coupled, key, num_steps=2).bounds).all()
