"""Times 10,000 Langevin chains on a two-dimensional mixture: `python -m benchmarks.samplers`. Writes SAMPLERS.md.

SGLD under `MCMC(..., chain_method="vectorized")` beside a `lax.scan` written by hand and, where torchebm is installed
(`make bench-peers` does it in an environment of its own), its LangevinDynamics, each once in every round. All keep all
draws. Times are of compiled calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import MCMC

from benchmarks import machine
from numpyro_score import SGLD

STEP_SIZE = 0.05
CENTERS = np.array([[3 * np.cos(a), 3 * np.sin(a)] for a in 2 * np.pi * np.arange(8) / 8], np.float32)
HALF = 0.5 * np.sum(CENTERS**2, axis=-1)
OUTPUT = Path(__file__).parent / "SAMPLERS.md"
BY_HAND, BY_CHAIN = "lax.scan by hand", "lax.scan by hand, draws by chain"
PACKAGE, TWO_DEVICES, TORCHEBM = "SGLD", "SGLD, two host devices", "torchebm"


def potential(x: jax.Array) -> jax.Array:
    """−log of an equal mixture of eight unit normals, of rows (..., 2), with the distances as a matrix product."""
    return 0.5 * jnp.sum(x**2, axis=-1) - jax.nn.logsumexp(x @ CENTERS.T - HALF, axis=-1)


def by_hand(num_chains: int, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    def run(rng_key: jax.Array) -> jax.Array:
        def step(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            gradient = jax.grad(lambda x: jnp.sum(potential(x)))(x)
            x = x - STEP_SIZE * gradient + jnp.sqrt(2 * STEP_SIZE) * jax.random.normal(key, x.shape)
            return x, x

        return jax.lax.scan(step, jnp.zeros((num_chains, 2)), jax.random.split(rng_key, num_steps))[1]

    return run


def by_package(num_chains: int, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    def run(rng_key: jax.Array) -> jax.Array:
        mcmc = MCMC(
            SGLD(potential_fn=potential, step_size=STEP_SIZE), num_warmup=0, num_samples=num_steps,
            num_chains=num_chains, chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.run(rng_key, init_params=jnp.zeros((num_chains, 2)))
        return mcmc.get_samples(group_by_chain=True)

    return run


def torchebm(num_chains: int, num_steps: int, threads: int) -> tuple[float, np.ndarray]:
    from benchmarks import samplers_torch  # in the child process alone

    return samplers_torch.seconds(CENTERS, num_chains, num_steps, STEP_SIZE, threads)


def timed(call: Callable[[], Any], last: Callable[[Any], Any]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    draws = jax.block_until_ready(call())
    return time.perf_counter() - begin, np.var(np.asarray(last(draws)), axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--chains", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    numpyro.set_host_device_count(2)
    chains, steps, load, key = options.chains, options.steps, machine.load(), jax.random.key(0)

    hand, package = jax.jit(by_hand(chains, steps)), jax.jit(by_package(chains, steps))
    swapped = jax.jit(lambda key: jnp.swapaxes(by_hand(chains, steps)(key), 0, 1))
    halves = jax.pmap(by_package(chains // 2, steps))
    contestants: dict[str, Callable[[], tuple[float, np.ndarray]]] = {
        BY_HAND: lambda: timed(lambda: hand(key), lambda x: x[-1]),
        BY_CHAIN: lambda: timed(lambda: swapped(key), lambda x: x[:, -1]),
        PACKAGE: lambda: timed(lambda: package(key), lambda x: x[:, -1]),
        TWO_DEVICES: lambda: timed(lambda: halves(jax.random.split(key)), lambda x: x[:, :, -1].reshape(-1, 2)),
    }
    # Each library has a process of its own, and waits while the other works.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        if importlib.util.find_spec("torchebm"):
            # Two threads on a busy machine can be many times slower than one.
            threads = min((1, 2), key=lambda n: child.submit(torchebm, chains, steps // 10, n).result()[0])
            contestants[TORCHEBM] = lambda: child.submit(torchebm, chains, steps, threads).result()
        variances = {name: call()[1] for name, call in contestants.items()}  # compiles
        rounds = [{name: call()[0] for name, call in contestants.items()} for _ in range(options.rounds)]
    text = render(chains, steps, load, variances, {name: np.array([r[name] for r in rounds]) for name in contestants})
    print(text)
    options.output.write_text(text)


def render(chains: int, steps: int, load: str, variances: dict[str, np.ndarray], times: dict[str, np.ndarray]) -> str:
    lines = []
    for name, t in times.items():
        low, middle, high = np.quantile(t / times[BY_HAND], [0.25, 0.5, 0.75])
        spread = ", ".join(f"{v:.2f}" for v in variances[name])
        lines.append(f"| {name} | {np.median(t):.3f} | {middle:.2f} ({low:.2f}–{high:.2f}) | {spread} |")
    one, same = (np.median(times[PACKAGE] / times[name]) for name in (BY_HAND, BY_CHAIN))
    claims = [f"- MCMC over the loop by hand: {one:.2f}; with draws by chain: {same:.2f}; at most 1.15 is asked."]
    versions = ""
    if TORCHEBM in times:
        package = np.minimum(times[PACKAGE], times[TWO_DEVICES])
        claims.append(
            f"- torchebm over the faster of the package's: {np.median(times[TORCHEBM] / package):.1f}; at least 3."
        )
        versions = f", torch {version('torch')}, torchebm {version('torchebm')}"
    return "\n".join([
        "# Langevin chains, timed", "",
        f"Written by `python -m benchmarks.samplers`: {chains:,} chains of {steps:,} steps on a mixture of eight "
        "equal normals in the plane, float32, all draws kept. MCMC returns draws by chain, which is a transposition. "
        "torchebm has one or two threads, whichever is faster. Each contestant runs once in every round; medians, with "
        "quartiles in brackets.", "",
        "| contestant | seconds | over the loop by hand | variances at the end |", "|---|---|---|---|", *lines, "",
        *claims, "",
        machine.describe() + versions,
        f"- Load before the run: {load}; {len(times[BY_HAND])} rounds", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
