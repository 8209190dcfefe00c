"""What the first fit of the README's model takes in a fresh process: `python -m benchmarks.first_fit`.

Processes run one after another. Imports are left out. Tracing, lowering and compiling are what JAX itself reports;
processor time counts all threads, also those of XLA's compiler.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_score import ScoreMatching

PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


def model(x: Any = None, n: int = 1, d: int = 3) -> None:
    w = numpyro.sample("w", dist.Normal(0, 1).expand([d - 1]).to_event(1))
    a = numpyro.sample("a", dist.LogNormal(-2, 1).expand([d]).to_event(1))
    with numpyro.plate("rows", n if x is None else len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x)
        neighbours = jnp.sum(w * x[..., :-1] * x[..., 1:], axis=-1)
        numpyro.factor("energy", neighbours - jnp.sum(a * x**4, axis=-1))


def once() -> dict[str, float]:
    """Seconds of one fit in this process, by part, and the number of programs."""
    found: Counter[str] = Counter()

    def count(event: str, seconds: float, **_: Any) -> None:
        if event in PARTS:
            found[PARTS[event]] += seconds
            found["programs"] += PARTS[event] == "compiling"

    x = jax.random.normal(jax.random.key(0), (500, 3)).block_until_ready()
    jax.monitoring.register_event_duration_secs_listener(count)
    wall, cpu = time.perf_counter(), time.process_time()
    fit = ScoreMatching(model).run(jax.random.key(1), x, progress_bar=False)
    jax.block_until_ready(fit.params)
    return {"seconds": time.perf_counter() - wall, "processor": time.process_time() - cpu, **found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_fit", description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="in this process, as JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once()))
        return
    call = [sys.executable, "-m", "benchmarks.first_fit", "--once"]
    runs = [
        json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        for _ in range(options.processes)
    ]
    for part in runs[0]:
        values = [run[part] for run in runs]
        print(f"{part:10}  median {np.median(values):6.2f}  of", ", ".join(f"{v:.2f}" for v in values))


if __name__ == "__main__":
    main()
