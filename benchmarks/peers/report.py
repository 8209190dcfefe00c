"""The comparison as Markdown."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from benchmarks import machine
from benchmarks.peers.common import SIGMA
from benchmarks.problem import HIDDEN, ROWS, WIDTH
from benchmarks.report import AGREE, Ratio, milliseconds, table

LOSSES = {"dsm": "DSM, plain", "ssm": "SSM, plain", "ssm-vr": "SSM, variance-reduced", "ism": "ISM"}
PEERS = {"torchebm": "torchebm", "torch": "PyTorch by hand", "compiled": "by hand, `torch.compile`"}
FASTER = 1.8
BUSY = 1.5  # load average before the run. At 7, PyTorch's steps took a hundred times as long or more.
# How many times the package's time a step of a peer is to take, at least.
BOUNDS = {("dsm", "torchebm"): 1.0} | {
    (loss, peer): FASTER for loss in ("ssm", "ssm-vr", "ism") for peer in ("torchebm", "torch")
}


@dataclass(frozen=True)
class Result:
    """One loss at one dimension: the peer's time over the package's, and how far their values are apart."""

    loss: str
    dim: int
    peer: str
    time: Ratio
    value: float
    gradient: float

    @property
    def over_package(self) -> float:
        """The median of the rounds' ratios."""
        return float(np.median(self.time.above / self.time.below))


@dataclass(frozen=True)
class Slope:
    """dJ/da at a = 0 of one loss, for each batch of rows; None of a library without the loss."""

    loss: str
    dim: int
    package: np.ndarray | None
    torchebm: np.ndarray | None


def render(results: list[Result], slopes: list[Slope], rounds: int, load: str, torch_threads: str) -> str:
    parts = [
        "# The package beside torchebm and PyTorch",
        "Written by `make bench-peers`. A step is the random numbers, the loss, its gradient and Adam's update, for "
        f"an energy network R^D → R with {HIDDEN} hidden layers of width {WIDTH} and swish, {ROWS} rows, float32. "
        "The package's step is `jax.jit(ScoreMatching(...).update)`. **By hand** is the shortest double backward "
        "in `torch.autograd`; compiled it is reverse over reverse in `torch.func`, as `torch.compile` refuses the "
        "first. All in PyTorch use its fused Adam. The result of each step is waited for.",
        f"JAX has one process and PyTorch another. In each of {rounds} rounds all contestants of one D take their "
        "turn: a pause, one step that is not counted, and then a block of steps, while the other process sleeps. "
        "Both use all cores. Anything else that runs slows PyTorch more than the package, as its threads wait for each "
        "other at every operation: only figures of a quiet machine compare the two.",
        machine.describe((*machine.PACKAGES, "torch", "torchebm"))
        + f"\n- Threads: XLA {os.cpu_count()}, {torch_threads}"
        + f"\n- Load average: {load} before, {machine.load()} after",
        "## Bounds",
        *bounds_part(results, load),
        "## One step",
        "Medians. The ratio of the peer's time to the package's is given as **that of the medians**, and then as "
        "the median and quartiles of the rounds' own ratios.",
        table(["loss", "D", "peer", "ms", "package", "peer over package", "of rounds"], map(step_row, results)),
        "## Values",
        "With the same weights, rows and random numbers: the relative difference from the package of the mean loss, "
        f"and of its gradient in all weights in Euclidean norm. Each is to be at most {AGREE:g}. The constant that "
        "torchebm leaves in DSM is taken off first; DSM's "
        "value is what large terms leave, so that it is the least exact.",
        table(["loss", "D", "peer", "loss differs by", "gradient"], map(value_row, results)),
        "## Signs and scales",
        f"For f(x) = −½a‖x‖² the slope dJ/da at a = 0 is −D, here −{slopes[0].dim}, whatever the rows: the mean over "
        f"batches of normal rows in float64, and its standard error. DSM has σ = {SIGMA}.",
        table(["loss", "package", "torchebm"], map(slope_row, slopes)),
        CONVENTIONS,
    ]
    return "\n\n".join(parts) + "\n"


CONVENTIONS = """\
As torchebm's source has it:

- Its losses are means over rows. The package's are sums, as NumPyro's log densities are.
- DSM is ½‖s(x̃) + ε/σ‖², without the package's −D/(2σ²): it is larger by this constant, has the same gradient, and its
  values at two σ cannot be compared with each other or with those of other losses. There is no control variate.
- Its `compute_score` returns ∇E, the negative of the score. DSM subtracts ε/σ from that, so its sign is right.
- SSM is the plain form, ½(v·s)² + v·∇s v, of 5 directions by default (1 here). There is no variance-reduced form. All
  three laws of v have E[vvᵀ] = I, as in the package.
- `ScoreMatching(hessian_method="exact")` is ISM. `hessian_method="approx"` divides its estimate of the trace by D, so
  that it does not estimate ISM unless D = 1; its slope above is −1."""


def bounds_part(results: list[Result], load: str) -> list[str]:
    if float(load) > BUSY:
        return [f"**The machine was busy (load {load}), so that the times compare nothing** and no bound is judged."]
    faster = [r for r in results if r.over_package < 1]
    return [
        "The peer's time over the package's, the median of the rounds' ratios: what it is to be at least, and "
        "whether it is.",
        bounds_table(results),
        "Faster than the package: " + "; ".join(map(faster_by, faster)) + "."
        if faster
        else "No contestant is faster than the package.",
    ]


def bounds_table(results: list[Result]) -> str:
    dims = sorted({r.dim for r in results})
    by_key = {(r.loss, r.peer, r.dim): r for r in results}
    rows = [
        [LOSSES[loss], PEERS[peer], *(bound_cell(by_key[loss, peer, dim]) for dim in dims)]
        for loss, peer in dict.fromkeys((r.loss, r.peer) for r in results)
    ]
    return table(["loss", "peer", *(f"D = {dim}" for dim in dims)], rows)


def bound_cell(result: Result) -> str:
    ratio, bound = result.over_package, BOUNDS.get((result.loss, result.peer))
    if bound is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} ≥ {bound:g}: " + ("yes" if ratio >= bound else "**no**")


def faster_by(result: Result) -> str:
    name = f"{PEERS[result.peer]}, {LOSSES[result.loss]}, D = {result.dim}"
    return f"{name} ({result.over_package:.2f} of its time)"


def step_row(result: Result) -> list[object]:
    times = [milliseconds(result.time.above), milliseconds(result.time.below)]
    return [LOSSES[result.loss], result.dim, PEERS[result.peer], *times, result.time]


def value_row(result: Result) -> list[object]:
    differences = [f"{d:.0e}" + ("" if d <= AGREE else " **no**") for d in (result.value, result.gradient)]
    return [LOSSES[result.loss], result.dim, PEERS[result.peer], *differences]


def slope_row(slope: Slope) -> list[str]:
    return [slope.loss, *(slope_cell(values, -slope.dim) for values in (slope.package, slope.torchebm))]


def slope_cell(values: np.ndarray | None, expected: float) -> str:
    if values is None:
        return "none"
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    right = abs(mean - expected) <= 5 * error + 1e-9 * abs(expected)
    return f"{mean:.3f} ± {error:.3f}: " + ("right" if right else "**wrong**")
