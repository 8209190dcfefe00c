"""What an update of adversarial dynamics embedding costs: `python -m benchmarks.adversarial`.

Five leapfrog steps, as many draws of the flow as rows of data, one step of the flow for each of the model. Writes
ADVERSARIAL.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from benchmarks.machine import describe, load
from benchmarks.measure import compile_call, flops, interleaved
from benchmarks.problem import HIDDEN, OPTIMIZER, ROWS, WIDTH, init_params, make_data, mean_energy_grad, model
from numpyro_score import AdversarialDynamicsEmbedding, LearnedFlow

STEPS, BOUND = 5, 12.0
FLOWS = {"annealed": True, "plain": False}


def measure(dim: int, rounds: int) -> list[str]:
    x, params = make_data(dim), init_params(jax.random.key(0), dim)
    fits = [
        AdversarialDynamicsEmbedding(
            model, LearnedFlow(dim, STEPS, annealed=annealed), OPTIMIZER, OPTIMIZER, num_samples=ROWS
        )
        for annealed in FLOWS.values()
    ]
    states = [fit.init(jax.random.key(0), x) for fit in fits]
    # XLA counts the body of a loop once, but so few steps are unrolled.
    compiled = [compile_call(fit.update, state, x) for fit, state in zip(fits, states, strict=True)]
    counts = [flops(c) for c in compiled]
    unit = flops(compile_call(mean_energy_grad, params, x))
    gradient = jax.jit(mean_energy_grad)
    calls = [lambda: gradient(params, x)]
    calls += [lambda f=f, s=s: f(s, x) for f, s in zip(compiled, states, strict=True)]
    times = interleaved(calls, rounds)
    rows = []
    for name, count, time in zip(FLOWS, counts, times[1:], strict=True):
        ratios = time / times[0]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(
            f"| {dim} | {name} | {count / unit:.1f} | {middle:.1f} ({low:.1f} to {high:.1f}) | "
            f"{1e3 * np.median(time):.1f} ms | {1e3 * np.median(times[0]):.2f} ms |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial", description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64], metavar="D")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    before = load()
    rows = [row for dim in options.dims for row in measure(dim, options.rounds)]
    table = "\n".join(rows)
    text = f"""# The cost of adversarial dynamics embedding

Written by `python -m benchmarks.adversarial`. One update: a simulation of {STEPS} leapfrog steps, whose draws serve
both players, a gradient step in the flow's settings and one in the model's parameters. The model is a network
with {HIDDEN} hidden layers of width {WIDTH}, swish; {ROWS} rows, as many draws of the flow, float32. Ratios are to
the gradient of the mean energy in the parameters; at most {BOUND:.0f} is asked for. Times are interleaved, medians
of {options.rounds} rounds with quartiles.

| D | flow | FLOPs | time | of an update | of the gradient |
|---|---|---|---|---|---|
{table}

{describe()}
- Processes that wanted a core before the run: {before}
"""
    (Path(__file__).parent / "ADVERSARIAL.md").write_text(text)


if __name__ == "__main__":
    main()
