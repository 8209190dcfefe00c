"""Steps of convolutional energies on images, beside hand-written JAX: `python -m benchmarks.images`.

The package flattens an image to a row and back. Reshapes cost XLA nothing as long as it makes no copy; this counts
FLOPs and bytes of the compiled steps, and times them in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from benchmarks import by_hand, machine
from benchmarks.measure import compile_call, flops, interleaved
from benchmarks.problem import OPTIMIZER
from numpyro_score import DSM, SSM, ContinuousDSM, ScoreMatching
from numpyro_score.losses.ssm import draw_directions

OUTPUT = Path(__file__).with_name("IMAGES.md")
CHANNELS = (32, 64, 64)
SIGMA, LOWEST, HIGHEST = 0.3, 0.02, 10.0
SHAPES = ((28, 28, 1), (64, 64, 3))
Params = Any


def init_params(rng_key: Array, channels: int) -> Params:
    sizes = (channels, *CHANNELS)
    keys = jax.random.split(rng_key, len(CHANNELS) + 1)
    kernels = [
        (jax.random.normal(k, (3, 3, m, n)) / (9 * m) ** 0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]
    return kernels, jax.random.normal(keys[-1], (CHANNELS[-1],)) / CHANNELS[-1] ** 0.5


def network(params: Params, x: Array) -> Array:
    """The log density of images (N, H, W, C), (N,): three convolutions, each of stride 2."""
    kernels, last = params
    for kernel, bias in kernels:
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.swish(x + bias)
    return x.sum((1, 2)) @ last


def model(x: Array) -> None:
    at_levels(x, sigma=None)


def at_levels(x: Array, sigma: Any = 1.0) -> None:
    params = numpyro.param("network", lambda rng_key: init_params(rng_key, x.shape[-1]))
    with numpyro.plate("images", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), x.shape[1:]), obs=x)
        y = x if sigma is None else x / jnp.reshape(sigma, (-1, 1, 1, 1))
        numpyro.factor("energy", network(params, y))


# -- by hand ------------------------------------------------------------------------------------------


def score(params: Params, x: Array) -> Array:
    return jax.grad(lambda y: network(params, y).sum())(x)


def ssm_plain(params: Params, x: Array, rng_key: Array) -> Array:
    v = draw_directions("rademacher", rng_key, x.shape, x.dtype)

    def slope(y: Array) -> Array:
        return jax.jvp(lambda z: network(params, z), (y,), (v,))[1]

    first, second = jax.jvp(slope, (x,), (v,))
    return jnp.sum(0.5 * first**2 + second)


def ssm_variance_reduced(params: Params, x: Array, rng_key: Array) -> Array:
    v = draw_directions("rademacher", rng_key, x.shape, x.dtype)
    s, along = jax.jvp(lambda y: score(params, y), (x,), (v,))
    return jnp.sum(0.5 * s**2 + v * along)


def dsm(params: Params, x: Array, rng_key: Array) -> Array:
    noise = jax.random.normal(rng_key, x.shape)
    return 0.5 * jnp.sum((score(params, x + SIGMA * noise) + noise / SIGMA) ** 2)


def every_level(params: Params, x: Array, rng_key: Array) -> Array:
    level_key, noise_key = jax.random.split(rng_key)
    place = (jnp.arange(len(x)) + jax.random.uniform(level_key)) / len(x)
    sigma = (LOWEST * (HIGHEST / LOWEST) ** place)[:, None, None, None]
    noise = jax.random.normal(noise_key, x.shape)

    def density(y: Array) -> Array:
        return network(params, y / sigma).sum()

    return 0.5 * jnp.sum((sigma * jax.grad(density)(x + sigma * noise) + noise) ** 2)


@dataclass(frozen=True)
class Case:
    name: str
    loss: Any
    by_hand: Callable[[Params, Array, Array], Array]
    model: Callable[..., None] = model


CASES = (
    Case("SSM, plain", SSM(variance_reduced=False), ssm_plain),
    Case("SSM, variance-reduced", SSM(), ssm_variance_reduced),
    Case("DSM, plain", DSM(SIGMA, control_variate=False), dsm),
    Case("ContinuousDSM", ContinuousDSM(LOWEST, HIGHEST), every_level, at_levels),
)


def measure(case: Case, shape: tuple[int, ...], rows: int, rounds: int) -> str:
    x = jax.random.normal(jax.random.key(1), (rows, *shape))
    fit = ScoreMatching(case.model, optim=OPTIMIZER, loss=case.loss)
    state, hand = fit.init(jax.random.key(0), x), by_hand.make_step(jax.value_and_grad(case.by_hand))
    at = by_hand.start(init_params(jax.random.key(0), shape[-1]), jax.random.key(0))
    ours, theirs = compile_call(fit.update, state, x), compile_call(hand, at, x)
    times = [np.median(t) for t in interleaved([lambda: ours(state, x), lambda: theirs(at, x)], rounds)]
    held = [c.memory_analysis().temp_size_in_bytes for c in (ours, theirs)]
    ratio = flops(ours) / flops(theirs)
    return (
        f"| {' × '.join(map(str, shape))} | {case.name} | {ratio:.3f} | {held[0] / held[1]:.3f} "
        f"| {1e3 * times[1]:.0f} ms | {times[0] / times[1]:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()
    lines = [
        "# Convolutional energies on images",
        "",
        f"A training step on {options.rows} images with three convolutions, of {CHANNELS} channels: the package over "
        "the same loss written by hand in JAX, in FLOPs, in memory beside inputs and outputs, and in time "
        f"(medians of {options.rounds} rounds in turn). Written by `python -m benchmarks.images`.",
        "",
        machine.describe(),
        "",
        "| image | loss | FLOPs | memory | by hand | time |",
        "| --- " * 6 + "|",
        *(measure(case, shape, options.rows, options.rounds) for shape in SHAPES for case in CASES),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if output := options.output or (OUTPUT if (options.rows, options.rounds) == (128, 15) else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
