"""The figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.measure import Cost, Times
from benchmarks.problem import HIDDEN, ROWS, WIDTH

# Asked of every loss. The last leaves room for matrix products in less than float32.
FLOPS, FIRST, AGREE = 1.03, 2.0, 1e-3
BAR = 1.05


@dataclass(frozen=True)
class Ratio:
    """Of two calls timed in the same rounds."""

    above: Times
    below: Times

    @property
    def of_medians(self) -> float:
        return float(np.median(self.above) / np.median(self.below))

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.above / self.below, [0.25, 0.5, 0.75])
        return f"**{self.of_medians:.2f}** | {middle:.2f} ({low:.2f}–{high:.2f})"


@dataclass(frozen=True)
class Measured:
    cost: Cost
    time: Times


@dataclass(frozen=True)
class Result:
    """One loss at one dimension: the package's step, the one by hand, and the unit of cost."""

    case: Case
    dim: int
    package: Measured
    hand: Measured
    unit: Measured
    first_step: Ratio
    first_run: Ratio
    disagreement: float

    @property
    def time_over_grad(self) -> Ratio:
        return Ratio(self.package.time, self.unit.time)

    @property
    def time_over_hand(self) -> Ratio:
        return Ratio(self.package.time, self.hand.time)

    @property
    def flops_over_grad(self) -> float:
        return self.package.cost.flops / self.unit.cost.flops

    @property
    def flops_over_hand(self) -> float:
        return self.package.cost.flops / self.hand.cost.flops


@dataclass(frozen=True)
class Bar:
    dim: int
    ratio: Ratio


def render(results: list[Result], bars: list[Bar], rounds: int, load: str) -> str:
    dims = sorted({r.dim for r in results})
    parts = [
        "# Benchmark results",
        f"Written by `make bench`. An energy network R^D → R with {HIDDEN} hidden layers of width "
        f"{WIDTH} and swish, {ROWS} rows, float32. The unit, **grad**, is the gradient in the "
        "parameters of the mean energy. **By hand** is the same loss and update written for this "
        "network in plain JAX, with the same random numbers, optimiser and algorithm. FLOPs are XLA's "
        "count of the compiled step, with loops over rows counted in full. The integer operations of "
        "the noise are in it: 119 for each number of the package's generator, and 47 for one by "
        "hand, as of the five passes of JAX's own XLA counts one.",
        machine.describe() + f"\n- Load average: {load} before, {machine.load()} after",
        "## Bounds",
        "Each figure, what it may be at most, and whether it is.",
        bounds_table(results, bars, dims),
        "## One step",
        f"Medians of {rounds} rounds that run all of one D in turn. Each ratio of times is given as "
        "**that of the medians**, and then as the median and quartiles of the rounds' own ratios.",
        *(step_part([r for r in results if r.dim == d]) for d in dims),
        "## First calls",
        "Seconds to trace, compile and run in a cleared cache: of one step; and of "
        "`ScoreMatching(...).run(..., num_steps=1)` beside the hand-written step with its own "
        "initialisation. Disagreement is the relative difference of the loss or the update of one "
        "step on the same random numbers, whichever is larger.",
        first_table(results),
        "## The progress bar",
        "Seconds of 200 updates of plain DSM through `run`, from a given state.",
        table(
            ["D", "with", "without", "ratio", "of rounds"],
            [[b.dim, *medians(b.ratio), b.ratio] for b in bars],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def bounds_table(results: list[Result], bars: list[Bar], dims: list[int]) -> str:
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for r in results:
        for figure, (measured, bound) in asked(r).items():
            cells.setdefault((r.case.name, figure), {})[r.dim] = verdict(measured, bound)
    for b in bars:
        at = cells.setdefault(("DSM, plain", "200 updates, with over without the bar"), {})
        at[b.dim] = verdict(b.ratio.of_medians, BAR)
    rows = [[*names, *(at.get(d, "") for d in dims)] for names, at in cells.items()]
    return table(["loss", "figure", *(f"D = {d}" for d in dims)], rows)


def asked(r: Result) -> dict[str, tuple[float, float | None]]:
    """What was measured, and what it may be at most."""
    bounds = r.case.bounds
    return {
        "time over grad": (r.time_over_grad.of_medians, bounds.time(r.dim)),
        "FLOPs over grad": (r.flops_over_grad, bounds.flops(r.dim)),
        "FLOPs over by hand": (r.flops_over_hand, FLOPS),
        "first step over by hand": (r.first_step.of_medians, FIRST),
        "disagreement": (r.disagreement, AGREE),
    }


def verdict(measured: float, bound: float | None) -> str:
    if bound is None:
        return f"{measured:.4g}"
    return f"{measured:.4g} ≤ {bound:g}: " + ("yes" if measured <= bound else "**no**")


def step_part(results: list[Result]) -> str:
    unit = results[0].unit
    head = ["loss", "MFLOP", "over grad", "over by hand", "ms", "over grad", "of rounds"]
    head += ["over by hand", "of rounds", "temporary MB", "by hand"]
    return (
        f"### D = {results[0].dim}\n\ngrad: {unit.cost.flops / 1e6:.1f} MFLOP, "
        f"{milliseconds(unit.time)} ms, {megabytes(unit.cost)} MB of temporary memory.\n\n"
    ) + table(head, map(step_row, results))


def step_row(r: Result) -> list[Any]:
    counted = [f"{r.package.cost.flops / 1e6:.1f}"]
    counted += [f"{r.flops_over_grad:.2f}", f"{r.flops_over_hand:.3f}"]
    timed = [milliseconds(r.package.time), r.time_over_grad, r.time_over_hand]
    return [r.case.name, *counted, *timed, megabytes(r.package.cost), megabytes(r.hand.cost)]


def first_table(results: list[Result]) -> str:
    head = ["loss", "D", "step", "by hand", "ratio", "of rounds"]
    head += ["run", "by hand", "ratio", "of rounds", "disagreement"]
    rows = []
    for r in results:
        times = [*medians(r.first_step), r.first_step, *medians(r.first_run), r.first_run]
        rows.append([r.case.name, r.dim, *times, f"{r.disagreement:.0e}"])
    return table(head, rows)


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def medians(ratio: Ratio) -> list[str]:
    return [f"{np.median(ratio.above):.2f}", f"{np.median(ratio.below):.2f}"]


def milliseconds(times: Times) -> str:
    return f"{np.median(times) * 1e3:.2f}"


def megabytes(cost: Cost) -> str:
    return f"{cost.bytes / 1e6:.1f}"
