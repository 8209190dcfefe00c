"""What the package takes on a GPU, in one page: `python -m benchmarks.gpu`. Writes GPU.md, in under eight minutes.

Steps of every loss at three sizes beside the same by hand in JAX, and beside `torch.compile` in TF32 and torchebm where
these are installed with CUDA; SGLD under MCMC beside a `lax.scan`; draws by diffusion beside a scan; the error of
FSM's gradient at its default step; the memory and time of ISM in chunks; and the whole of `examples/kl_vs_fisher.py
--quick`. What shares a table runs in turn, once in every round. Parts that would begin after `--minutes` are left out,
and named.

On a CPU it takes small sizes, so that it can be tried, and writes no file unless `--output` names one other than
GPU.md: its figures say nothing of a GPU. On two cores that takes six minutes, most of them compiling.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and the example have processes of their own

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from benchmarks import cases, diffusion, machine, samplers
from benchmarks.cases import CASES, Case, Step
from benchmarks.measure import compile_call, interleaved
from benchmarks.problem import HIDDEN, SITE, init_params, make_data, model
from benchmarks.report import Ratio, table
from benchmarks.run import call_of
from numpyro_score import FSM, ISM, SSM, Energy
from numpyro_score.losses import total_loss

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).with_name("GPU.md")
MOST_BY_HAND = 2**34  # bytes of the loss by hand, which takes all rows at once where they fit
AT_MOST = {"large": 1.05, "small": 1.15, "SGLD": 1.15, "FSM": 2e-2, "chunks": 1.1}
FULL_BATCH = 8192  # rows from which on a step is large


class Size(NamedTuple):
    rows: int
    width: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows, width {self.width:,}, D = {self.dim}"


class Effort(NamedTuple):
    """How much of everything; the size of ISM's chunks is the second of the sizes."""

    sizes: tuple[Size, Size, Size]
    chains: tuple[tuple[int, int], ...]  # with their steps
    draws: tuple[int, int]  # by diffusion, and steps
    precision: Size
    rounds: int
    block: float  # seconds of PyTorch's steps in one round


ON_GPU = Effort(
    (Size(512, 128, 16), Size(8192, 512, 64), Size(65_536, 1024, 64)),
    ((10_000, 1000), (200_000, 500)), (10_000, 32), Size(512, 128, 16), 9, 0.1,
)  # fmt: skip
ON_CPU = Effort(
    (Size(64, 16, 4), Size(256, 32, 8), Size(512, 64, 8)),
    ((500, 50),), (100, 16), Size(128, 32, 8), 3, 0.02,
)  # fmt: skip


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verdict(value: float, most: float) -> str:
    return f"{value:.2g} ≤ {most:g}: {'yes' if value <= most else '**no**'}"


# -- steps --------------------------------------------------------------------------------------


def energy_of(size: Size, x: Array) -> Energy:
    return Energy(model, {SITE: init_params(jax.random.key(0), size.dim, size.width)}, x, width=size.width)


def rows_by_hand(case: Case, size: Size, x: Array) -> int:
    """All, if these fit; else as many as the package takes, rounded down to what divides them."""
    most = getattr(case.loss, "rows_per_chunk", lambda _: None)(energy_of(size, x))
    if most is None or (jax.default_backend() != "cpu" and size.rows * 2**31 / most < MOST_BY_HAND):
        return size.rows
    return next(n for n in range(min(most, size.rows), 0, -1) if size.rows % n == 0)


def pair(case: Case, size: Size, x: Array) -> list[Callable[[], Any]]:
    package = cases.package_step(case, x, size.width)
    hand = cases.hand_step(case, x, size.width, rows_by_hand(case, size, x))
    return [call_of(package, x), call_of(hand, x)]


def prepared(size: Size) -> list[Callable[[], Any]]:
    """The steps of all losses, the package's and by hand in turn, compiled."""
    x = make_data(size.dim, size.rows)
    calls = [call for case in CASES for call in pair(case, size, x)]
    for call in calls:
        jax.block_until_ready(call())
    return calls


def steps(
    size: Size, calls: list[Callable[[], Any]], effort: Effort, torch: Torch | None
) -> tuple[list[str], list[str]]:
    """The table of one size, and what is claimed of it."""
    times = interleaved(calls, effort.rounds)
    peers = torch.steps(size, dict(zip([c.key for c in CASES], calls[::2], strict=True)), effort) if torch else {}
    rows = []
    for case, package, hand in zip(CASES, times[::2], times[1::2], strict=True):
        ratio = Ratio(package, hand)
        beside = [peers.get((who, case.key), "") for who in ("compiled", "torchebm")]
        rows.append([case.name, f"{1e3 * np.median(package):.3f}", f"{1e3 * np.median(hand):.3f}", ratio, *beside])
    large = size.rows >= FULL_BATCH
    worst = max(Ratio(a, b).of_medians for a, b in zip(times[::2], times[1::2], strict=True))
    head = ["loss", "ms", "by hand", "over by hand", "of rounds", "torch.compile over package", "torchebm over package"]
    claim = f"steps, {size}, the most over by hand: {verdict(worst, AT_MOST['large' if large else 'small'])}"
    return [f"### {size}", "", table(head, rows), ""], [claim]


@dataclass
class Torch:
    """PyTorch in a process of its own, which compiles while JAX does, and from then on waits while JAX works."""

    child: ProcessPoolExecutor
    name: str
    ready: dict[tuple[Size, str, str], Future[float]]
    with_torchebm: bool

    @classmethod
    def start(cls, child: ProcessPoolExecutor, effort: Effort) -> Torch | None:
        """None where there is no PyTorch with CUDA; compiles from here on."""
        if not importlib.util.find_spec("torch"):
            return None
        from benchmarks.peers import in_torch

        if not (name := child.submit(in_torch.use_gpu).result()):
            return None
        torch = cls(child, name, {}, bool(importlib.util.find_spec("torchebm")))
        for size in effort.sizes:
            for who in ("compiled", "torchebm") if torch.with_torchebm else ("compiled",):
                for key in ("dsm", "ssm", "ssm-vr"):
                    if who == "compiled" or key != "ssm-vr":
                        torch.ready[size, who, key] = torch.submit(size, who, key, effort.block)
        return torch

    def submit(self, size: Size, who: str, key: str, block: float) -> Future[float]:
        from benchmarks.peers import in_torch

        weights = jax.tree.map(np.asarray, init_params(jax.random.key(0), size.dim, size.width))
        x = np.asarray(make_data(size.dim, size.rows))
        return self.child.submit(in_torch.seconds_per_step, who, key, weights, x, block)

    def wait(self, seconds: float) -> None:
        """Until all is compiled; what is not by then is left out."""
        for future in wait(self.ready.values(), timeout=max(seconds, 0)).not_done:
            future.cancel()

    def steps(self, size: Size, package: dict[str, Callable[[], Any]], effort: Effort) -> dict[tuple[str, str], str]:
        """Of each peer and loss its time over the package's, in rounds of their own."""
        found = {}
        for (_, who, key), first in [(k, v) for k, v in self.ready.items() if k[0] == size]:
            try:
                first.result(timeout=0)
                ours, theirs = [], []
                for _ in range(effort.rounds):
                    ours.append(interleaved([package[key]], 1)[0][0])
                    theirs.append(self.submit(size, who, key, effort.block).result())
                low, middle, high = np.quantile(np.array(theirs) / np.array(ours), [0.25, 0.5, 0.75])
                found[who, key] = f"{middle:.2f} ({low:.2f}–{high:.2f})"
            except (Exception, CancelledError) as error:  # of versions, memory and time: that is a result, too
                found[who, key] = f"failed: {type(error).__name__}"
        return found


# -- other parts --------------------------------------------------------------------------------


def chains(effort: Effort, torch: Torch | None) -> tuple[list[str], list[str]]:
    rows, claims = [], []
    for num_chains, num_steps in effort.chains:
        hand, package = (jax.jit(make(num_chains, num_steps)) for make in (samplers.by_hand, samplers.by_package))
        key = jax.random.key(0)
        times = interleaved([partial(package, key), partial(hand, key)], effort.rounds)
        ratio, beside = Ratio(*times), ""
        if torch and torch.with_torchebm:
            try:
                args = (num_chains, num_steps, 1)
                seconds = [torch.child.submit(samplers.torchebm, *args).result()[0] for _ in range(2)][-1]
                beside = f"{seconds / np.median(times[0]):.1f}"
            except Exception as error:
                beside = f"failed: {type(error).__name__}"
        rows.append([f"{num_chains:,} × {num_steps:,}", *(f"{1e3 * np.median(t):.1f}" for t in times), ratio, beside])
        claims.append(f"SGLD, {num_chains:,} chains, over by hand: {verdict(ratio.of_medians, AT_MOST['SGLD'])}")
    head = ["chains × steps", "ms", "by hand", "over by hand", "of rounds", "torchebm over package"]
    return ["## SGLD under MCMC, vectorised", "", table(head, rows), ""], claims


def diffusions(effort: Effort) -> tuple[list[str], list[str]]:
    rows, (num_chains, num_steps) = [], effort.draws
    for method in ("dpm++2m", "euler_maruyama"):
        for kind in ("energy", "score"):
            # In TF32 the two round differently.
            found = diffusion.contest(kind, 16, num_chains, num_steps, effort.rounds, method, most_apart=0.5)
            times = [f"{1e3 * np.median(t):.2f}" for t in (found.program, found.hand)]
            ratio = Ratio(found.program, found.hand)
            overhead = f"{1e3 * np.median(found.call - found.program):.1f}"
            rows.append([method, kind, *times, ratio, overhead, f"{found.apart:.1e}"])
    head = ["method", "network", "ms", "by hand", "over by hand", "of rounds", "call, ms more", "apart"]
    title = f"## Diffusion, {num_chains:,} draws of 16 numbers in {num_steps} steps"
    return [title, "", table(head, rows), ""], []


def precision(effort: Effort) -> tuple[list[str], list[str]]:
    """Of gradients of losses whose random numbers are the same in double precision."""
    size = effort.precision
    losses = {"FSM at its default step": FSM(), "SSM": SSM(), "ISM": ISM()}
    params = jax.tree.map(np.asarray, init_params(jax.random.key(0), size.dim, size.width))
    x = np.asarray(make_data(size.dim, size.rows))

    def gradients(dtype: Any) -> dict[str, np.ndarray]:
        def of(loss: Any) -> np.ndarray:
            def mean(weights: Any) -> Array:
                energy = Energy(model, {SITE: weights}, jnp.asarray(x, dtype), width=size.width)
                return total_loss(loss, energy, jax.random.key(2)) / size.rows

            found = jax.jit(jax.grad(mean))(jax.tree.map(lambda w: jnp.asarray(w, dtype), params))
            return np.asarray(ravel_pytree(found)[0], np.float64)

        return {name: of(loss) for name, loss in losses.items()}

    found = gradients(np.float32)
    with jax.enable_x64(True):
        right = gradients(np.float64)
    errors = {k: float(np.linalg.norm(found[k] - right[k]) / np.linalg.norm(right[k])) for k in losses}
    lines = table(["loss", "relative error of the gradient"], [[k, f"{e:.1e}"] for k, e in errors.items()])
    title = f"## Float32 as multiplied by default, against float64: {size}"
    claim = f"FSM's gradient at the default step: {verdict(errors['FSM at its default step'], AT_MOST['FSM'])}"
    return [title, "", lines, ""], [claim]


@dataclass(frozen=True)
class AllAtOnce:
    """ISM, which asks for no chunks."""

    def __call__(self, energy: Energy, rng_key: Array) -> Array:
        return ISM()(energy, rng_key)


def memory(effort: Effort) -> tuple[list[str], list[str]]:
    size = effort.sizes[1]
    x = make_data(size.dim, size.rows)
    found: dict[str, Step] = {}
    for name, loss in {"in chunks": ISM(), "all at once": AllAtOnce()}.items():
        fit = cases.package_fit(loss, size.width)
        found[name] = Step(fit.update, fit.init(jax.random.key(0), x))
    taken = {
        name: compile_call(s.call, s.state, x).memory_analysis().temp_size_in_bytes / 2**30 for name, s in found.items()
    }
    times = dict(zip(found, interleaved([call_of(s, x) for s in found.values()], effort.rounds), strict=True))
    rows = [[name, f"{taken[name]:.3f}", f"{1e3 * np.median(times[name]):.2f}"] for name in found]
    ratio = Ratio(times["in chunks"], times["all at once"])
    at_once = ISM().rows_per_chunk(energy_of(size, x))
    lines = [f"## ISM in chunks: {size}", "", table(["rows", "GiB", "ms"], rows), ""]
    lines += [f"At most {at_once:,} rows at once; the ratio of times is {ratio.of_medians:.3f}.", ""]
    return lines, [f"ISM in chunks, time over all at once: {verdict(ratio.of_medians, AT_MOST['chunks'])}"]


def comparison(seconds_left: float) -> tuple[list[str], list[str]]:
    """The example as users run it, and its part on the wines."""
    title = "## `examples/kl_vs_fisher.py --quick`"
    missing = [m for m in ("matplotlib", "sklearn", "scipy") if not importlib.util.find_spec(m)]
    if missing:
        return [title, "", f"Left out, as {', '.join(missing)} is not installed.", ""], []
    begin = time.perf_counter()
    command = [sys.executable, "examples/kl_vs_fisher.py", "--quick"]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True, timeout=max(seconds_left, 1)
        )
    except subprocess.TimeoutExpired:
        return [title, "", "Stopped, as the time was over.", ""], []
    if done.returncode:
        return [title, "", f"Failed: {done.stderr.strip().splitlines()[-1]}", ""], []
    wines = re.search(r"^## Wines\n\n(.*?)(?=^!\[)", done.stdout, re.MULTILINE | re.DOTALL)
    took = f"{time.perf_counter() - begin:.0f} seconds in a process of its own, with its imports and compilation."
    return [title, "", took, "", *(wines.group(1).strip().splitlines() if wines else []), ""], []


# -- the page -----------------------------------------------------------------------------------


def parts(effort: Effort, torch: Torch | None, left: Callable[[], float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, the most important first."""
    calls = {}
    if torch:  # both compile at the same time, before anything is timed
        calls = {size: prepared(size) for size in effort.sizes}
        torch.wait(left() / 2)

    def steps_of(size: Size) -> tuple[str, Callable[[], Any]]:
        return f"steps, {size}", lambda: steps(size, calls.get(size) or prepared(size), effort, torch)

    yield from map(steps_of, effort.sizes[:2])
    yield "memory", partial(memory, effort)
    yield "precision", partial(precision, effort)
    yield "SGLD", partial(chains, effort, torch)
    yield "diffusion", partial(diffusions, effort)
    yield "the comparison", lambda: comparison(left())
    yield steps_of(effort.sizes[2])


def output_of(backend: str, given: Path | None) -> Path | None:
    """Where the page goes; raises SystemExit for GPU.md where there is no GPU."""
    if backend != "cpu":
        return given or OUTPUT
    if given is not None and given.resolve() == OUTPUT:
        raise SystemExit(f"{OUTPUT.name} is for figures of a GPU, and JAX has none here: name another --output.")
    return given


def render(lines: list[str], claims: list[str], left_out: list[str], name: str, seconds: float, load: str) -> str:
    trial = jax.default_backend() == "cpu"
    return "\n".join([
        "# A trial on a CPU, whose figures say nothing of a GPU" if trial else "# On a GPU", "",
        f"Written by `python -m benchmarks.gpu` in {seconds / 60:.1f} minutes.", "",
        machine.describe(),
        *([f"- {name}"] if name else ["- No PyTorch with CUDA"]),
        f"- Load before the run: {load}", "",
        *[f"- {claim}" for claim in claims],
        *[f"- Left out, as the time was over: {part}" for part in left_out], "",
        f"An energy network of {HIDDEN} hidden layers and swish, float32 as JAX multiplies it by default, Adam. Ratios "
        "of times are those of medians, then median and quartiles of the rounds' own. By hand is the same in plain "
        "JAX, with all rows at once where they fit 16 GiB. PyTorch runs in TF32, in a process of its own.", "",
        *lines,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.5, help="after which no part begins")
    parser.add_argument("--rounds", type=int, help="of each measurement")
    parser.add_argument("--output", type=Path, help=f"a Markdown file; on a GPU {OUTPUT.name}")
    options = parser.parse_args()
    backend = jax.default_backend()
    output = output_of(backend, options.output)
    effort = ON_CPU if backend == "cpu" else ON_GPU
    effort = effort if options.rounds is None else effort._replace(rounds=options.rounds)
    begin, load = time.perf_counter(), machine.load()
    lines: list[str] = []
    claims: list[str] = []
    left_out: list[str] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        torch = Torch.start(child, effort)

        def left() -> float:
            return 60 * options.minutes - (time.perf_counter() - begin)

        for name, measure in parts(effort, torch, left):
            progress(f"{name}: {left():.0f} seconds left")
            if left() <= 0:
                left_out.append(name)
                continue
            try:
                more, claimed = measure()
            except Exception as error:  # the other parts have taken minutes
                traceback.print_exc()
                more, claimed = [], [f"**Failed**: {name}, {type(error).__name__}"]
            lines += more
            claims += claimed
        child.shutdown(wait=False, cancel_futures=True)
    text = render(lines, claims, left_out, torch.name if torch else "", time.perf_counter() - begin, load)
    print(text)
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
