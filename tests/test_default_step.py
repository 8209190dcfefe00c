"""The default step of finite differences: how coarse a density is, read from its operations, and what a step costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import energy_of

from numpyro_score import FSM
from numpyro_score.energy import coarsest_rounding, is_constant

KEYS = jax.random.split(jax.random.key(3), 2)
EPS = {dtype: float(jnp.finfo(dtype).eps) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)}
X = np.random.default_rng(0).normal(size=(2000, 3))


def cut(x, bits):
    return x if bits is None else jax.lax.reduce_precision(x, 8, bits)


def chain(bits, theta, x):
    terms = jnp.concatenate([theta[:2] * x[:, :-1] * x[:, 1:], -theta[2:] * x**4], axis=-1)
    return cut(jnp.sum(cut(terms, bits), axis=-1), bits)


def well(bits, theta, x):
    """The same kind with other numbers, ten standard deviations from zero and computed from x in these bits."""
    y = cut(cut(10 + x, bits) - theta[0], bits)
    return cut(-jnp.sum(theta[1:4] * cut(y**2, bits), -1) - theta[4] * cut(jnp.sum(y**4, -1), bits), bits)


CHAIN, WELL = np.array([0.6, -0.4, 0.1, 0.2, 0.15]), np.array([10.0, 0.5, 0.4, 0.3, 0.15])


def gradients(loss, f, theta, bits):
    """Of the mean in the parameters, (keys, P)."""

    def mean(theta, key):
        return jnp.mean(loss(energy_of(partial(f, bits), theta, jnp.asarray(X)), key))

    return np.asarray(jax.jit(jax.vmap(jax.grad(mean), (None, 0)))(jnp.asarray(theta), KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [None, 0.3])
@pytest.mark.parametrize(("f", "theta"), [(chain, CHAIN), (well, WELL)], ids=["chain", "well"])
def test_gradients_of_densities_in_few_bits(f, theta, sigma, x64):
    """Within 2% of double precision where operations have 10 bits, as of TF32, and within 5% where they have 7."""
    right = gradients(FSM(1e-4, sigma=sigma), f, theta, None)
    # By a step that no average shortens the error with 23 bits is 2.5e-4.
    for bits, most in (7, 0.05), (10, 0.02), (23, 2e-4):
        away = gradients(FSM(sigma=sigma), f, theta, bits) - right
        relative = np.linalg.norm(away, axis=1) / np.linalg.norm(right, axis=1)
        assert np.sqrt(np.mean(relative**2)) < most, (bits, relative)


def test_what_the_step_depends_on():
    """Rounding of means falls with the rows, and the step as its fourth or third root; parameters do not enter."""
    few, many = (energy_of(partial(chain, None), CHAIN, jnp.asarray(np.tile(X, (r, 1)), jnp.float32)) for r in (1, 64))
    for loss, power in ((FSM(), 1 / 8), (FSM(sigma=0.3), 1 / 6)):
        # Steps are cut to four bits, an eighth at most.
        assert abs(float(loss.step(few) / loss.step(many)) / 64**power - 1) < 0.13
        assert is_constant(lambda t, loss=loss: loss.step(energy_of(partial(chain, 7), t, jnp.asarray(X))), CHAIN)
    assert FSM(0.3).step(few) == 0.3


def test_steps_are_added_without_rounding():
    """By signs the same rounding would stand in every row, and be a bias: rows at 100 lost half of the digits."""
    for offset in (1.0, 10.0, 100.0):
        x = jnp.asarray(X + offset, jnp.float32)
        for loss in (FSM(), FSM(sigma=0.3)):
            step = loss.step(energy_of(partial(chain, None), CHAIN, x))
            # Exactly, but where the sum has one bit more.
            assert np.mean(np.asarray((x + step) - x == step)) > 0.9


# -- the coarsest operation --------------------------------------------------------------------------------------------


def half(x):
    return jnp.sin(x.astype(jnp.bfloat16)).astype(x.dtype)


def twice(x):
    return jax.lax.scan(lambda c, _: (half(c), None), x, None, length=2)[0]


W = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (jnp.sin, EPS[jnp.float32]),
        (half, EPS[jnp.bfloat16]),
        (jax.jit(half), EPS[jnp.bfloat16]),
        (twice, EPS[jnp.bfloat16]),
        (jax.checkpoint(lambda x: x.astype(jnp.float16).astype(x.dtype)), EPS[jnp.float16]),
        (lambda x: cut(x, 10) ** 2, 2.0**-10),
        # What is stored in few bits, and what is not used or not on the way, rounds nothing.
        (lambda x: x @ jnp.asarray(W, jnp.bfloat16).astype(x.dtype), EPS[jnp.float32]),
        (jax.jit(lambda x: (half(x), x)[1]), EPS[jnp.float32]),
        (lambda x: x + half(jnp.ones(3)), EPS[jnp.float32]),
    ],
)
def test_coarsest_operation(f, expected):
    assert coarsest_rounding(f, jnp.ones((4, 3), jnp.float32)) == expected


def test_single_precision_within_double(x64):
    def f(x):
        return jnp.sum(x.astype(jnp.float32) ** 2, -1).astype(x.dtype)

    assert coarsest_rounding(f, jnp.ones((4, 3))) == EPS[jnp.float32]
    assert coarsest_rounding(jnp.sin, jnp.ones(3)) == float(jnp.finfo(jnp.float64).eps)
