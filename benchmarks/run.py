"""Measures what a step costs and writes the figures: `python -m benchmarks.run`.

Bounds are reported, not enforced: times depend on the machine and on what else runs there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array

from benchmarks import by_hand, cases, machine
from benchmarks.cases import CASES, Case, Step
from benchmarks.measure import interleaved, interleaved_first, step_cost
from benchmarks.problem import ROWS, init_params, make_data, mean_energy_grad
from benchmarks.report import Bar, Measured, Ratio, Result, render
from numpyro_score import DSM

BAR_DIMS = (2, 16)
OUTPUT = Path(__file__).with_name("RESULTS.md")


class Rounds(NamedTuple):
    step: int
    first: int
    bar: int


FULL, QUICK = Rounds(step=25, first=5, bar=9), Rounds(step=3, first=1, bar=3)


def measure_dim(dim: int, chosen: list[Case], rounds: Rounds) -> list[Result]:
    x = make_data(dim)
    progress(f"D = {dim}: first calls")
    firsts = [first_calls(case, x, rounds.first) for case in chosen]

    progress(f"D = {dim}: steps")
    contestants = [(Step(mean_energy_grad, init_params(jax.random.key(0), dim)), ROWS)]
    for case in chosen:
        rows = cases.rows_per_chunk(case, dim)
        contestants += [(cases.package_step(case, x), rows), (cases.hand_step(case, x), rows)]
    times = interleaved([call_of(step, x) for step, _ in contestants], rounds.step)
    costs = [step_cost(step, x, rows) for step, rows in contestants]

    unit, *measured = map(Measured, costs, times)
    return [
        Result(case, dim, package, hand, unit, *first, cases.disagreement(case, x))
        for case, package, hand, first in zip(chosen, measured[::2], measured[1::2], firsts, strict=True)
    ]


def call_of(step: Step, x: Array) -> Any:
    """The same step again and again, so that each timing does the same work."""
    jitted = jax.jit(step.call)
    return lambda: jitted(step.state, x)


def first_calls(case: Case, x: Array, rounds: int) -> tuple[Ratio, Ratio]:
    """Of the step, and of a whole run of one step."""
    key, dim = jax.random.key(0), x.shape[1]
    package, hand = cases.package_step(case, x), cases.hand_step(case, x)

    def run() -> Any:
        fit = cases.package_fit(case.loss)
        return fit.run(key, x, num_steps=1, progress_bar=False).state

    calls = [
        lambda: jax.jit(package.call)(package.state, x),
        lambda: jax.jit(hand.call)(hand.state, x),
        run,
        lambda: jax.jit(hand.call)(by_hand.init(key, dim), x),
    ]
    step, hand_step, run_, hand_run = interleaved_first(calls, rounds)
    return Ratio(step, hand_step), Ratio(run_, hand_run)


def measure_bar(dim: int, rounds: int) -> Bar:
    x, key = make_data(dim), jax.random.key(0)
    fit = cases.package_fit(DSM(cases.SIGMA, control_variate=False))
    state = fit.init(key, x)

    def updates(progress_bar: bool) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            options = dict(num_steps=200, progress_bar=progress_bar, init_state=state)
            return fit.run(key, x, **options).state

    return Bar(dim, Ratio(*interleaved([lambda: updates(True), lambda: updates(False)], rounds)))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    keys = [case.key for case in CASES]
    parser.add_argument("--quick", action="store_true", help="a few rounds, for trying")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64], metavar="D")
    parser.add_argument("--losses", nargs="+", choices=keys, default=keys)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)  # first calls are to compile
    rounds, load = QUICK if options.quick else FULL, machine.load()
    chosen = [case for case in CASES if case.key in options.losses]
    results = [r for dim in options.dims for r in measure_dim(dim, chosen, rounds)]
    progress("progress bar")
    bars = [measure_bar(dim, rounds.bar) for dim in BAR_DIMS]
    text = render(results, bars, rounds.step, load)
    print(text)

    is_full = not options.quick and options.losses == keys and options.dims == [2, 16, 64]
    if output := options.output or (OUTPUT if is_full else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
