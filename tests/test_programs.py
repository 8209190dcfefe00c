"""Programs that are compiled once for functions that trace to the same operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.programs import run_compiled

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
    weights = np.arange(3.0)  # of double precision, as NumPy has it
    for double in (True, False, True):
        with jax.enable_x64(double):
            x = jnp.asarray(weights)
            found = run_compiled(lambda x: x @ weights, x)
            assert found.dtype == x.dtype and float(found) == 5.0
    with jax.enable_x64(True):
        third = run_compiled(lambda x: x / 3.0, jnp.array(1.0))
        assert third.dtype == jnp.float64
        assert abs(float(third) - 1 / 3) < 1e-16
