"""Times the package beside torchebm and plain PyTorch and writes the figures: `python -m benchmarks.peers`.

Bounds are reported, not enforced: times depend on the machine and on what else runs there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import machine
from benchmarks.peers import in_jax, in_torch
from benchmarks.peers.common import SIGMA
from benchmarks.peers.report import Result, Slope, render
from benchmarks.problem import make_data
from benchmarks.report import Ratio

DIMS = (16, 64)
OUTPUT = Path(__file__).parents[1] / "PEERS.md"
PAUSE = 0.05  # seconds, many times as long as idle threads of either library wait for work
BATCHES = (100, 512, 8)  # of rows, for slopes

InChild = Callable[..., Any]  # calls a function of in_torch in the child process


class Effort(NamedTuple):
    rounds: int
    block: float  # seconds of steps of one contestant in one round


FULL, QUICK = Effort(rounds=15, block=0.3), Effort(rounds=3, block=0.05)


def peers_of(key: str) -> list[str]:
    """In the order of the rounds; torchebm has no variance-reduced form."""
    return ["torchebm", "torch", "compiled"] if key in in_torch.TORCHEBM else ["torch", "compiled"]


def measure_dim(dim: int, effort: Effort, in_child: InChild) -> list[Result]:
    x, weights = np.asarray(make_data(dim)), in_jax.weights(dim)
    contestants: dict[tuple[str, str], Callable[[float], float]] = {}
    for key in in_jax.LOSSES:
        contestants["package", key] = partial(in_jax.seconds_per_step, key, dim)
        for who in peers_of(key):
            contestants[who, key] = partial(in_child, in_torch.seconds_per_step, who, key, weights, x)

    progress(f"D = {dim}: first calls")
    for seconds in contestants.values():
        seconds(0.01)  # compiles
    progress(f"D = {dim}: steps")
    times: dict[tuple[str, str], list[float]] = {name: [] for name in contestants}
    for _ in range(effort.rounds):
        for name, seconds in contestants.items():
            time.sleep(PAUSE)
            times[name].append(seconds(effort.block))

    progress(f"D = {dim}: values")
    results = []
    for key in in_jax.LOSSES:
        package = np.array(times["package", key])
        for who in peers_of(key):
            differences = disagreement(partial(in_child, in_torch.value_and_grad, who), who, key, weights, x)
            results.append(Result(key, dim, who, Ratio(np.array(times[who, key]), package), *differences))
    return results


def disagreement(peer: Callable[..., Any], who: str, key: str, weights: Any, x: np.ndarray) -> tuple[float, float]:
    """Relative differences of the loss and of its gradient, on the same weights, rows and random numbers."""
    value, grads = in_jax.value_and_grad(key, weights, x)
    peer_value, peer_grads = peer(key, weights, x, in_jax.draw(key, x))
    if (who, key) == ("torchebm", "dsm"):
        peer_value -= x.shape[1] / (2 * SIGMA**2)  # the constant that torchebm leaves in
    flat, peer_flat = np.asarray(ravel_pytree(grads)[0]), np.asarray(ravel_pytree(peer_grads)[0])
    of_grads = np.linalg.norm(peer_flat - flat) / np.linalg.norm(flat)
    return abs(peer_value / value - 1), float(of_grads)


def measure_slopes(in_child: InChild) -> list[Slope]:
    batches = np.random.default_rng(0).normal(size=BATCHES)
    package, torchebm = in_jax.slopes_at_zero(batches), in_child(in_torch.slopes_at_zero, batches)
    return [Slope(name, BATCHES[-1], package.get(name), torchebm.get(name)) for name in {**package, **torchebm}]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short rounds, for trying")
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()
    effort, load = QUICK if options.quick else FULL, machine.load()

    # Each library has a process of its own, and waits while the other works: threads of both in one process would
    # get in each other's way.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:

        def in_child(function: Callable[..., Any], *args: Any) -> Any:
            return child.submit(function, *args).result()

        results = [result for dim in DIMS for result in measure_dim(dim, effort, in_child)]
        progress("slopes")
        text = render(results, measure_slopes(in_child), effort.rounds, load, in_child(in_torch.describe))
    print(text)
    if output := options.output or (None if options.quick else OUTPUT):
        output.write_text(text)


if __name__ == "__main__":
    main()
