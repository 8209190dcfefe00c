"""Programs that are compiled once for functions that trace to the same operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import ScoreMatching
from numpyro_score.programs import run_compiled, shared_jit

X = jnp.arange(1.0, 4.0)


@pytest.fixture
def compiled():
    """How many programs XLA has compiled."""
    count = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(count)
    jax.monitoring.unregister_event_duration_listener(listen)


def fold(f, x):
    return jax.lax.scan(lambda c, y: (f(c, y), c), 1.0, x)[0]


def power(exponent, x):
    return jnp.sum(jax.nn.softplus(x) ** exponent)


def test_new_functions_of_the_same_operations_compile_once(compiled):
    for _ in range(3):
        found = run_compiled(partial(power, 3.0), X)
        np.testing.assert_allclose(found, np.sum(np.log1p(np.exp(np.asarray(X))) ** 3), rtol=1e-6)
    before = compiled()
    run_compiled(lambda x: power(3.0, x), X)
    assert compiled() == before


def test_values_closed_over_are_inputs(compiled):
    """Other arrays of the same shape give other numbers without compiling; other shapes do compile."""

    def dot(w):
        return run_compiled(lambda x: {"dot": x @ w}, X)["dot"]

    jax.block_until_ready(dot(X))
    ones, twos = jnp.ones(3), 2 * jnp.ones(3)
    before = compiled()
    assert float(dot(ones)) == 6.0
    assert float(dot(twos)) == 12.0
    assert compiled() == before


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x[:2], lambda x: x[1:]),
        (lambda x: x.sum(), lambda x: x.max()),
        (lambda x: x - x[::-1], lambda x: x[::-1] - x),
        (lambda x: jnp.array([1.0, 2.0, 3.0]) * x, lambda x: jnp.array([1.0, 2.0, 4.0]) * x),
        (lambda x: np.array([1.0, 2.0, 3.0]) * x, lambda x: np.array([1.0, 2.0, 4.0]) * x),
        (partial(fold, jnp.add), partial(fold, jnp.multiply)),
        (lambda x: jax.pure_callback(np.sin, x, x), lambda x: jax.pure_callback(np.cos, x, x)),
        (lambda x: x.astype(jnp.int32), lambda x: x),
    ],
)
def test_other_operations_are_other_programs(one, two):
    for f in (one, two, one):
        found = run_compiled(f, X)
        np.testing.assert_array_equal(found, f(X))
        np.testing.assert_array_equal(np.signbit(found), np.signbit(f(X)))
        assert found.dtype == f(X).dtype


def test_transformations_and_precision():
    """Derivatives are those of the function, and double precision has programs of its own."""

    @jax.custom_jvp
    def odd(x):
        return x**2

    odd.defjvp(lambda p, t: (p[0] ** 2, 7.0 * t[0]))
    f = partial(run_compiled, lambda x: jnp.sum(odd(x)))
    assert float(f(X)) == 14.0
    np.testing.assert_array_equal(jax.grad(f)(X), 7.0)
    np.testing.assert_array_equal(jax.grad(lambda w: run_compiled(lambda x: jnp.sum(odd(w)), X))(X), 7.0)
    np.testing.assert_array_equal(jax.vmap(f)(X[:, None]), X**2)
    np.testing.assert_array_equal(jax.jit(f)(X), 14.0)
    for double in (True, False, True):
        weights = np.arange(3.0)  # of double precision, as NumPy has it
        with jax.enable_x64(double):
            x = jnp.asarray(weights)
            found = run_compiled(lambda x, w=weights: x @ w, x)
            assert found.dtype == x.dtype and float(found) == 5.0
    with jax.enable_x64(True):
        third = run_compiled(lambda x: x / 3.0, jnp.array(1.0))
        assert third.dtype == jnp.float64
        assert abs(float(third) - 1 / 3) < 1e-16


class Holder:
    """What has a compiled method, over a function of its own."""

    def __init__(self, f):
        self.f = f
        self.run = shared_jit(self._run, static_argnames=("n",))

    def _run(self, x, scale, *, n):
        return {"value": self.f(x) * scale, "n": jnp.full(n, scale)}


def test_objects_share_programs(compiled):
    """A second object traces its own function, and compiles nothing if that does the same to other values."""
    weights = [jnp.ones(3), 2.0 * jnp.ones(3)]
    one, two = (Holder(lambda x, w=w: jnp.tanh(x) @ w) for w in weights)
    expected = float(jax.block_until_ready(one.run(X, 2.0, n=2))["value"])
    before = compiled()
    found = two.run(X, scale=2.0, n=2)
    assert float(found["value"]) == 2 * expected
    assert compiled() == before
    assert one.run(X, 2.0, n=3)["n"].shape == (3,)
    assert float(Holder(lambda x: jnp.sinh(x) @ weights[0]).run(X, 2.0, n=2)["value"]) != expected


def test_programs_with_nan_are_shared(compiled):
    """NaN, which is not equal to itself, is the same in two programs; another number in its place is not."""

    def ends(other):
        return np.asarray(Holder(lambda x: jnp.where(x > 1, x, other)).run(X, 1.0, n=2)["value"])

    np.testing.assert_array_equal(ends(np.nan), [np.nan, 2.0, 3.0])
    before = compiled()
    np.testing.assert_array_equal(ends(np.nan), [np.nan, 2.0, 3.0])
    assert compiled() == before
    np.testing.assert_array_equal(ends(5.0), [5.0, 2.0, 3.0])


def test_numpy_arrays_closed_over(compiled):
    """As NumPyro's distributions have them: equal ones share a program, others and large ones have their own."""

    def dot(numbers):
        numbers = numbers.astype(np.float32)
        return float(Holder(lambda x: x @ numbers).run(X, 1.0, n=2)["value"])

    assert dot(np.arange(3.0)) == 8.0
    before = compiled()
    assert dot(np.arange(3.0)) == 8.0
    assert compiled() == before
    assert dot(2 * np.arange(3.0)) == 16.0
    large = np.ones(2**18 + 1, np.float32)
    for _ in range(2):
        before = compiled()
        assert float(Holder(lambda x: x[0] + large).run(X, 1.0, n=2)["value"][-1]) == 2.0
        assert compiled() > before


def test_shared_programs_under_transformations():
    """Inside of a transformation it is the function itself, options of the compiler included."""
    f = shared_jit(lambda x: jnp.sum(jnp.sin(x)), xla_backend_optimization_level=0)
    np.testing.assert_allclose(f(X), np.sin(np.asarray(X)).sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(f)(X), np.cos(np.asarray(X)), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(X[:, None]), np.sin(np.asarray(X)), rtol=1e-6)
    with jax.enable_x64(True):
        assert f(jnp.arange(3.0)).dtype == jnp.float64


@pytest.mark.filterwarnings("ignore:The loss was still falling")
@pytest.mark.parametrize("optim", [None, optax.adam(1e-2)], ids=["solved", "adam"])
def test_a_second_fit_of_the_same_compiles_nothing(compiled, optim):
    """As in a simulation, where each data set has an object of its own: fit, standard errors and draws of them."""

    def fit(seed):
        def model(x):  # a new function each time
            mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
            with numpyro.plate("rows", len(x)):
                x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
                numpyro.factor("energy", -0.5 * (x - mu) ** 2)

        x = 1.0 + jax.random.normal(jax.random.key(seed), (50,))
        sm = ScoreMatching(model, optim=optim, num_steps=2000)
        found = sm.run(jax.random.key(0), x, progress_bar=False)
        return float(x.mean()), found, jax.block_until_ready((found.stderr(), found.energy.data))

    fit(0)
    before = compiled()
    mean, found, _ = fit(1)
    assert compiled() == before
    np.testing.assert_allclose(found.estimates["mu"], mean * 50 / 51, rtol=1e-3)
