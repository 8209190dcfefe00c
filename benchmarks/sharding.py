"""Steps whose rows lie over several devices: `python -m benchmarks.sharding`. Writes SHARDING.md.

What each device holds and what goes between them is read from the compiled program, for one to eight devices of the
host; of time only the gain by a second device is told, as the host has two cores. Elsewhere it takes the devices that
there are.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.machine import describe, load
from benchmarks.measure import interleaved
from benchmarks.problem import SITE, init_params, model
from numpyro_score import CD, DSM, FSM, ISM, MALA, NCE, PCD, SSM, Energy, KLContraction
from numpyro_score.losses import CHAINS_SITE, LOG_PARTITION_SITE, Loss, total_loss

DIM = 16
BYTES_ROWS, TIMED_ROWS = 8192, 65_536
KERNEL = MALA(step_size=0.1)
LOSSES: dict[str, Loss] = {
    "ISM": ISM(),
    "SSM": SSM(),
    "SSM, plain": SSM(variance_reduced=False),
    "DSM": DSM(0.3),
    "FSM": FSM(),
    "KL contraction": KLContraction(0.01),
    "CD-10": CD(10, kernel=KERNEL),
    "PCD, a chain for each row": PCD(BYTES_ROWS, kernel=KERNEL),
    "NCE": NCE(dist.Normal(0.0, 2.0).expand([DIM]).to_event(1)),
}


def step(loss: Loss, x: Array) -> tuple[Callable[..., Any], Any, Any]:
    """The loss of all rows and its gradient in the network's weights, and its arguments."""
    weights = init_params(jax.random.key(0), DIM)
    sites = {SITE: weights, LOG_PARTITION_SITE: np.float32(0.0), CHAINS_SITE: {"x": x}}
    own = {SITE} | ({LOG_PARTITION_SITE} if isinstance(loss, NCE) else set())
    own |= {CHAINS_SITE} if isinstance(loss, PCD) else set()
    energy = Energy(model, {k: v for k, v in sites.items() if k in own}, x)

    @jax.jit
    def run(weights: Any, energy: Energy) -> Any:
        def total(weights: Any) -> Array:
            return total_loss(loss, energy.with_params({SITE: weights}), jax.random.key(1))

        return jax.value_and_grad(total)(weights)

    return run, weights, energy


def rows_over(count: int, num_rows: int) -> Array:
    x = jax.random.normal(jax.random.key(2), (num_rows, DIM))
    if count == 1:
        return x
    return jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()[:count]), ("rows",)), PartitionSpec("rows")))


def moved(text: str) -> tuple[int, bool]:
    """Numbers that go between devices in a compiled program, and whether any of them are gathered."""
    lines = [line for line in text.splitlines() if re.search(r" (all-|collective-|reduce-scatter)[\w-]*\(", line)]
    shapes = [
        s for line in lines for s in re.findall(r"[a-z]\d+\[([\d,]*)\]", re.split(r" (?:all|coll|reduce-)", line)[0])
    ]
    sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]
    return sum(sizes), any(" all-gather" in line or " all-to-all" in line or " collective" in line for line in lines)


def bytes_table(counts: list[int]) -> Iterator[str]:
    yield "| loss | " + " | ".join(f"{n} devices" if n > 1 else "one device" for n in counts) + " | numbers between |"
    yield "|---|" + "--:|" * (len(counts) + 1)
    for name, loss in LOSSES.items():
        cells, between = [], ""
        for n in counts:
            run, weights, energy = step(loss, rows_over(n, BYTES_ROWS))
            compiled = run.lower(weights, energy).compile()
            held = compiled.memory_analysis()
            cells.append(f"{(held.argument_size_in_bytes + held.temp_size_in_bytes) / 2**20:.2f}")
            if n > 1:
                count, gathered = moved(compiled.as_text())
                between = f"{count:,}" + (", rows gathered" if gathered else "")
        yield f"| {name} | " + " | ".join(cells) + f" | {between} |"


def times_table(rounds: int, num_rows: int) -> Iterator[str]:
    yield "| loss | one device, ms | two devices, ms | gain | quartiles | cores at work, one | two | at most |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for name in ("ISM", "SSM", "SSM, plain", "DSM"):
        steps = [step(LOSSES[name], rows_over(n, num_rows)) for n in (1, 2)]
        calls = [lambda s=s: s[0](*s[1:]) for s in steps]
        one, two = interleaved(calls, rounds)
        cores = [cores_at_work(call) for call in calls]
        low, gain, high = np.quantile(one / two, [0.25, 0.5, 0.75])
        yield (
            f"| {name} | {1e3 * np.median(one):.0f} | {1e3 * np.median(two):.0f} | {gain:.2f} | "
            f"{low:.2f} to {high:.2f} | {cores[0]:.2f} | {cores[1]:.2f} | {(os.cpu_count() or 1) / cores[0]:.2f} |"
        )


def cores_at_work(call: Callable[[], Any], repeats: int = 4) -> float:
    """Processor time of all threads over time."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.process_time() - processor) / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=TIMED_ROWS, help="of the timed steps")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("SHARDING.md"))
    args = parser.parse_args()
    counts = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    weights = sum(w.size for w in jax.tree.leaves(init_params(jax.random.key(0), DIM)))
    before = load()
    times = list(times_table(args.rounds, args.rows)) if len(counts) > 1 else ["One device: no second to compare with."]
    text = f"""# Rows over devices

`python -m benchmarks.sharding`: the energy network of the other benchmarks, D = {DIM}, {weights:,} weights.

{describe()}
- Load before and after: {before}, {load()}

## What a device holds

MiB of arguments and temporary memory for each device, of a loss and its gradient on {BYTES_ROWS:,} rows; and how many
numbers go between {counts[-1]} devices: the sums of {weights:,} weights and of the loss, and what a loss needs of all
rows. The weights and what XLA holds for one chunk of rows are on each device.

{chr(10).join(bytes_table(counts))}

## A second device

The same on {args.rows:,} rows, {args.rounds} interleaved rounds, medians. One device uses more than one core of the
host, too, for the operations that XLA splits: cores at work are processor time over time. The gain that would fill all
cores is "at most", if the second device adds no work.

{chr(10).join(times)}
"""
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
