import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from models import only_on_cpus

from numpyro_score import random

KEYS = {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(3), "rbg": jax.random.key(3, impl="rbg")}
normal = jax.jit(random.normal, static_argnums=(1, 2))


@pytest.mark.parametrize(
    ("key", "shape"),
    [("typed", ()), ("typed", (100_003,)), ("typed", (2, 3, 4)), ("typed", (4, 0)), ("raw", (5,)), ("rbg", (5,))],
)
def test_numbers_are_those_of_jax(key, shape):
    key = KEYS[key]
    words = jax.jit(random.bits, static_argnums=1)(key, shape)
    np.testing.assert_array_equal(words, jax.random.bits(key, shape, jnp.uint32), strict=True)
    expected = jax.random.normal(key, shape, jnp.float32)
    np.testing.assert_allclose(normal(key, shape, jnp.float32), expected, rtol=1e-6, atol=1e-7, strict=True)


def test_known_answers():
    """Those that Random123 publishes for Threefry-2x32 with 20 rounds: counter, key, words."""
    answers = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ]
    for counter, key, words in answers:
        pair = (jnp.uint32(count) for count in counter)
        assert tuple(int(w) for w in random._threefry(jnp.array(key, jnp.uint32), *pair)) == words


def test_double_precision_is_that_of_jax(x64):
    key = jax.random.key(0)
    np.testing.assert_array_equal(random.normal(key, (5, 3), jnp.float64), jax.random.normal(key, (5, 3), jnp.float64))


def test_other_layouts_and_shapes_are_those_of_jax():
    """JAX's older order of the words, sizes that are NumPy's numbers, and sizes yet unknown."""
    key = KEYS["typed"]
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(random.bits(key, (5, 3)), jax.random.bits(key, (5, 3), jnp.uint32))
    few = (np.int8(100), np.int8(100))
    np.testing.assert_array_equal(random.bits(key, few), jax.random.bits(key, few, jnp.uint32))
    rows = jax.ShapeDtypeStruct(export.symbolic_shape("n, 3"), jnp.float32)
    noise = export.export(jax.jit(lambda x: random.normal(key, x.shape, x.dtype)))(rows)
    expected = jax.random.normal(key, (7, 3))
    np.testing.assert_allclose(noise.call(np.zeros((7, 3), np.float32)), expected, rtol=1e-6, atol=1e-7)


def test_many_keys():
    keys = jax.random.split(jax.random.key(1), 4)
    one_by_one = np.stack([normal(key, (6,), jnp.float32) for key in keys])
    together = jax.vmap(lambda key: normal(key, (6,), jnp.float32))(keys)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6, atol=1e-7)


def test_a_key_on_each_device():
    """In `shard_map`, where the types of arrays say over which devices they vary."""
    mesh = Mesh(np.array(jax.devices()), ("chains",))
    of = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("chains"), out_specs=P("chains"))
    keys = jax.random.split(jax.random.key(1), mesh.size)
    apart = jax.jit(of(lambda key: random.normal(key[0], (6,), jnp.float32)))(keys)
    np.testing.assert_array_equal(apart, jnp.concatenate([normal(key, (6,), jnp.float32) for key in keys]))


@pytest.mark.parametrize(("word", "uniform"), [(0, -1 + 2**-24), (0xFFFFFFFF, 1 - 2**-22)])
def test_extreme_words_are_finite(monkeypatch, word, uniform):
    """They stand for the uniform numbers next to -1 and 1, where the normal quantile is infinite."""
    monkeypatch.setattr(random, "bits", lambda rng_key, shape: jnp.full(shape, word, jnp.uint32))
    quantile = float(2**0.5 * jax.scipy.special.erfinv(uniform))
    assert float(random.normal(KEYS["typed"], (), jnp.float32)) == pytest.approx(quantile, abs=0.1)


@only_on_cpus
def test_rounds_stay_in_a_loop_of_their_own():
    """Merged into what uses them they would be done again for each use, which takes XLA minutes to compile."""
    drawn = jax.jit(lambda key: random.normal(key, (8,), jnp.float32)).lower(KEYS["typed"]).compile()
    assert " while(" in drawn.as_text()
