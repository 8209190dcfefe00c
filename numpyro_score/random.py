"""The random numbers of `jax.random`, the same ones for the same key, drawn in about half the time on CPUs.

On CPUs JAX runs its generator as a loop of five passes over whole arrays, which is half of the time that a Langevin
step of a small energy takes. Here it is one pass. Other platforms run JAX's own.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

__all__ = ["RUN", "Key", "as_key", "bits", "integer", "normal"]

RUN = "write run(jax.random.key(0), x), the model's arguments after the key"

Key = Array | int
"""What random numbers are drawn from: a key of `jax.random`, or an integer for `jax.random.key` of it."""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def as_key(rng_key: Any, call: str = "pass rng_key=jax.random.key(0)") -> Array:
    """One random key, from a key or from an integer, of which it is `jax.random.key`.

    Args:
        rng_key: what a user passed.
        call: what to write instead of anything else.

    Raises:
        TypeError: for anything else, several keys included.
    """
    seed = integer(rng_key)
    if seed is not None:
        return jax.random.key(seed)
    if isinstance(rng_key, jax.Array | np.ndarray):
        if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) and rng_key.ndim == 0:
            return jnp.asarray(rng_key)
        if rng_key.shape == (2,) and rng_key.dtype == np.uint32:
            return jnp.asarray(rng_key)
    shape = f" of shape {rng_key.shape}" if hasattr(rng_key, "shape") else ""
    raise TypeError(f"rng_key must be one random key or an integer, got {type(rng_key).__name__}{shape}: {call}.")


def integer(value: Any) -> int | None:
    """The integer that a value is, or that an array of no axes holds; None for anything else."""
    if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer):
        held = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
        return int(value) if held else None
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def bits(rng_key: Array, shape: tuple[Any, ...]) -> UInt32[Array, "..."]:
    """`jax.random.bits(rng_key, shape, jnp.uint32)`."""
    typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    key = jax.random.key_data(rng_key if typed else jax.random.wrap_key_data(rng_key))
    usual = key.shape == (2,) and jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    known = all(isinstance(n, int) for n in shape)  # a shape may be symbolic in jax.export
    if not usual or not known or math.prod(shape) >= 2**32:  # more numbers than one word counts
        return jax.random.bits(rng_key, shape, jnp.uint32)
    # XLA knows the platform, and keeps no branch. Elsewhere a loop costs more than it saves.
    return jax.lax.platform_dependent(
        key, cpu=lambda key: _one_pass(key, shape), default=lambda _: jax.random.bits(rng_key, shape, jnp.uint32)
    )


def _one_pass(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    count = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)

    def draw(_: Array, unused: Array) -> Array:
        first, second = _threefry(key, jnp.zeros_like(count), count)
        return first ^ second

    # XLA merges expressions into each of their uses, and would do all rounds again there. A loop keeps it from that, if
    # XLA cannot see that it ends after one pass. What it starts from varies over devices as the key does.
    return jax.lax.fori_loop(0, jax.lax.optimization_barrier(1), draw, jnp.broadcast_to(key[0], shape))


def normal(rng_key: Array, shape: tuple[Any, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """`jax.random.normal(rng_key, shape, dtype)`; equal to rounding in single precision."""
    if jnp.dtype(dtype) != jnp.float32:
        return jax.random.normal(rng_key, shape, dtype)
    one_to_two = jax.lax.bitcast_convert_type((bits(rng_key, shape) >> 9) | np.uint32(0x3F800000), jnp.float32)
    above = np.nextafter(np.float32(-1), np.float32(0))  # where erf⁻¹ is finite
    uniform = jnp.maximum(above, (one_to_two - 1) * (1 - above) + above)
    return np.float32(2**0.5) * jax.lax.erf_inv(uniform)


def _threefry(key: UInt32[Array, "2"], first: Array, second: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds [Salmon, Moraes, Dror & Shaw 2011], on each pair of words."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    first, second = first + keys[0], second + keys[1]
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            first = first + second
            second = first ^ ((second << rotation) | (second >> (32 - rotation)))
        first, second = first + keys[(i + 1) % 3], second + keys[(i + 2) % 3] + np.uint32(i + 1)
    return first, second
