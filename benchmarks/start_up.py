"""What comes before the first step: `python -m benchmarks.start_up`. Writes START_UP.md.

Three things, each in processes of their own, one after another: the first fit of the README's model; a second object of
the same model, as simulation studies make thousands; and the look that a fit takes at ten million rows beforehand.
Imports are left out. Tracing, lowering and compiling are what JAX itself reports; processor time counts all threads,
also those of XLA's compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import ISM, ScoreMatching

OUTPUT = Path(__file__).with_name("START_UP.md")
PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
ROWS, DIM = 10_000_000, 16


def make_model() -> Callable[..., None]:
    """A function of its own each time, as where a study defines it in a loop."""

    def model(x: Any = None, n: int = 1, d: int = 3) -> None:
        w = numpyro.sample("w", dist.Normal(0, 1).expand([d - 1]).to_event(1))
        a = numpyro.sample("a", dist.LogNormal(-2, 1).expand([d]).to_event(1))
        with numpyro.plate("rows", n if x is None else len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x)
            neighbours = jnp.sum(w * x[..., :-1] * x[..., 1:], axis=-1)
            numpyro.factor("energy", neighbours - jnp.sum(a * x**4, axis=-1))

    return model


def fits() -> dict[str, float]:
    """Seconds and programs of a first fit with its errors, and of a second by another object, of another model."""
    seen: Counter[str] = Counter()

    def count(event: str, seconds: float, **_: Any) -> None:
        if event in PARTS:
            seen[PARTS[event]] += seconds
            seen["programs"] += PARTS[event] == "compiling"

    jax.monitoring.register_event_duration_secs_listener(count)
    found: dict[str, float] = {}
    for i, which in enumerate(("first", "second")):
        x = jax.random.normal(jax.random.key(i), (500, 3)).block_until_ready()
        svi = ScoreMatching(make_model())
        for what, run in (("fit", lambda svi=svi, x=x: svi.run(1, x, progress_bar=False)), ("errors", None)):
            seen.clear()
            wall, cpu = time.perf_counter(), time.process_time()
            if run is not None:
                fit = run()
                jax.block_until_ready(fit.params)
            else:
                fit.stderr()
            spent = {"seconds": time.perf_counter() - wall, "processor": time.process_time() - cpu}
            spent |= {part: seen[part] for part in (*PARTS.values(), "programs")}
            found |= {f"{which} {what}: {k}": v for k, v in spent.items()}
    return found


def many_rows() -> dict[str, float]:
    """Of ten million rows: seconds of `init`, which looks at the data, and of a step, and the memory they take."""

    def model(x: Any) -> None:
        a = numpyro.param("a", 0.3 * jnp.ones(DIM), constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (DIM,)), obs=x)
            numpyro.factor("energy", -jnp.sum(a * x**4, -1) - jnp.sum(x, -1) ** 2)

    some = np.random.default_rng(0).normal(size=(1000, DIM)).astype(np.float32)
    x = jax.block_until_ready(jnp.tile(some, (ROWS // 1000, 1)))
    svi = ScoreMatching(model, loss=ISM(), optim=optax.adam(1e-3))
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    update = jax.jit(svi.update)
    found = {"data, MB": x.nbytes / 2**20}
    state = svi.init(jax.random.key(0), x)
    jax.block_until_ready(update(state, x))  # both are compiled now
    for name, run in (("init", lambda: svi.init(jax.random.key(1), x)), ("step", lambda: update(state, x))):
        time.sleep(1.0)  # what was held before is given back a little later
        before = peak[0] = resident()
        wall = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(run()))
        found |= {f"{name}: seconds": time.perf_counter() - wall, f"{name}: more memory, MB": peak[0] - before}
    stop.set()
    return found


def resident() -> float:
    """Megabytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


PIECES: dict[str, Callable[[], dict[str, float]]] = {"fits": fits, "rows": many_rows}


def measure(piece: str, processes: int) -> dict[str, list[float]]:
    call = [sys.executable, "-m", "benchmarks.start_up", "--piece", piece]
    runs = []
    for _ in range(processes):
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{piece}: {runs[-1]}", flush=True)
    return {name: [run[name] for run in runs] for name in runs[0]}


def cell(values: list[float], name: str) -> str:
    digits = 0 if name.endswith(("programs", "MB")) else 2
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f}" if low == high else f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def render(found: dict[str, dict[str, list[float]]]) -> str:
    rows, columns = ["seconds", "processor", *PARTS.values(), "programs"], ["fit", "errors"]
    heads = [f"{which} {what}" for which in ("first", "second") for what in columns]
    of_fits = "\n".join(
        f"| {row} | " + " | ".join(cell(found["fits"][f"{head}: {row}"], row) for head in heads) + " |" for row in rows
    )
    of_rows = "\n".join(f"| {name} | {cell(values, name)} |" for name, values in found["rows"].items())
    count = len(next(iter(found["fits"].values())))
    return f"""# Start-up

Written by `python -m benchmarks.start_up`: medians of {count} processes, and their range.

The README's model and data of its shape, 2,000 steps, then `stderr()`; the second time by another object, of another
model function, with other data. Programs are those that were compiled.

| | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{of_fits}

{ROWS:,} rows of {DIM} numbers under ISM, a cheap energy, once compiled. `init` looks at all rows: are they in the
support and finite, is the density finite and the rows' own? More memory is the most that the process held beyond what
it held before.

| | |
|---|---|
{of_rows}

{machine.describe()}
- Load average: {machine.load()} at the end
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.piece:
        print(json.dumps(PIECES[options.piece]()))
        return
    text = render({piece: measure(piece, options.processes) for piece in PIECES})
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
