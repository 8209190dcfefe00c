"""Times CD-10 beside torchebm's ContrastiveDivergence: `python -m benchmarks.contrastive`, in the environment of peers.

Writes CONTRASTIVE.md.

One step is ten unadjusted Langevin steps from each row, the loss, its gradient and Adam's update, for the network and
the rows of `benchmarks.problem` in float32. Each library has a process of its own. In each round both take their turn
and wait while the other works. On a busy machine the threads of PyTorch wait for each other: OMP_NUM_THREADS=1 then
compares better.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from benchmarks.peers.common import seconds_per_call
from benchmarks.problem import HIDDEN, OPTIMIZER, ROWS, WIDTH, make_data, mean_energy_grad, model
from benchmarks.report import table
from numpyro_score import CD, SGLD, ScoreMatching

DIMS = (2, 16, 64)
STEPS, STEP_SIZE = 10, 0.01
PAUSE, BLOCK = 0.05, 0.3  # seconds between turns, and of one turn


@cache
def package_step(dim: int) -> tuple[Any, Any]:
    fit = ScoreMatching(model, optim=OPTIMIZER, loss=CD(STEPS, kernel=SGLD(step_size=STEP_SIZE)))
    return jax.jit(fit.update), fit.init(jax.random.key(0), make_data(dim))


def package_seconds(dim: int) -> float:
    (update, state), x = package_step(dim), make_data(dim)

    def step() -> float:
        nonlocal state
        state, loss = update(state, x)
        return float(loss)

    return seconds_per_call(step, BLOCK)


def gradient_seconds(dim: int) -> float:
    """Of the unit of cost, the gradient of the mean energy."""
    _, state = package_step(dim)
    params, x = state.optim_state[1][0]["network"], make_data(dim)
    return seconds_per_call(lambda: jax.block_until_ready(_gradient(params, x)), BLOCK)


_gradient = jax.jit(mean_energy_grad)


@cache
def torchebm_step(dim: int) -> Any:
    import torch
    from torch import nn
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import LangevinDynamics

    from benchmarks.peers.in_torch import Energy

    sizes = (dim, *[WIDTH] * HIDDEN, 1)
    layers = [part for m, n in pairwise(sizes) for part in (nn.Linear(m, n), nn.SiLU())]
    energy = Energy(nn.Sequential(*layers[:-1], nn.Flatten(0)))
    sampler = LangevinDynamics(energy, step_size=STEP_SIZE)
    loss = ContrastiveDivergence(energy, sampler, k_steps=STEPS, energy_reg_weight=0.0)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, fused=True)
    x = torch.tensor(np.asarray(make_data(dim)))

    def step() -> float:
        optimizer.zero_grad()
        value, _ = loss(x)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def torchebm_seconds(dim: int) -> float:
    return seconds_per_call(torchebm_step(dim), BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contrastive", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    load, rows = machine.load(), []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        for dim in DIMS:
            contestants = {
                "package": lambda d=dim: package_seconds(d),
                "gradient": lambda d=dim: gradient_seconds(d),
                "torchebm": lambda d=dim: child.submit(torchebm_seconds, d).result(),
            }
            times: dict[str, list[float]] = {name: [] for name in contestants}
            for seconds in contestants.values():
                seconds()  # compiles
            for _ in range(rounds):
                for name, seconds in contestants.items():
                    time.sleep(PAUSE)
                    times[name].append(seconds())
            package, gradient, peer = (np.array(times[k]) for k in ("package", "gradient", "torchebm"))
            ratios = np.quantile(peer / package, [0.5, 0.25, 0.75])
            cells = [f"{1e3 * np.median(v):.2f}" for v in (package, peer)]
            spread = f"**{ratios[0]:.2f}** ({ratios[1]:.2f} to {ratios[2]:.2f})"
            rows.append([str(dim), *cells, spread, f"{np.median(package / gradient):.1f}"])
    text = f"""# CD-{STEPS}, timed

Written by `python -m benchmarks.contrastive`. One step: {STEPS} unadjusted Langevin steps from each of {ROWS} rows, the
loss, its gradient and Adam's update, for a network with {HIDDEN} hidden layers of width {WIDTH}, swish, float32.
Medians of {rounds} rounds in which both take turns, with quartiles in brackets.

{table(["D", "package, ms", "torchebm, ms", "torchebm over package", "package in energy gradients"], rows)}

{machine.describe((*machine.PACKAGES, "torch", "torchebm"))}
- Load average before the run {load}, after it {machine.load()}
"""
    print(text)
    (Path(__file__).parent / "CONTRASTIVE.md").write_text(text)


if __name__ == "__main__":
    main()
