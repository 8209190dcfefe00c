"""Measures draws and log densities by diffusion in milliseconds: `python -m benchmarks.diffusion_peers`.

Every method of `diffuse` and `flow_log_prob` for one score network, each once in every round, beside the same by hand
in PyTorch where that is installed (by `make bench-peers`, say), in a process of its own that waits while the package
works. Writes DIFFUSION_PEERS.md. Runs unchanged on a GPU, where PyTorch's part stays on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.diffusion import ENDS, HIDDEN, WIDTH, score_model
from numpyro_score import Energy, diffuse, flow_log_prob
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.methods import METHODS

OUTPUT = Path(__file__).parent / "DIFFUSION_PEERS.md"
LOG_PROBS: dict[str, dict[str, Any]] = {
    "exact, dopri8": {},
    "exact, tsit5": {"solver": "tsit5", "rtol": 1e-4, "atol": 1e-4},
    "hutchinson, 16 probes": {"divergence": "hutchinson", "rng_key": 0},
    "hutchinson, 2 probes, tsit5": {
        "divergence": "hutchinson", "rng_key": 0, "num_probes": 2, "solver": "tsit5", "rtol": 1e-4, "atol": 1e-4
    },
}  # fmt: skip
TORCH_TOLERANCE = 1e-4


def torch_methods() -> tuple[str, ...]:
    from benchmarks import diffusion_torch  # in the child process alone

    return tuple(diffusion_torch.SAMPLERS)


def torch_draw(*args: Any) -> tuple[float, np.ndarray]:
    from benchmarks import diffusion_torch

    return diffusion_torch.draw(*args)


def torch_log_prob(*args: Any) -> tuple[float, np.ndarray]:
    from benchmarks import diffusion_torch

    return diffusion_torch.log_prob(*args)


def timed(call: Callable[[], Any]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - begin, np.asarray(found)


Contestant = Callable[[], tuple[float, np.ndarray]]


def contestants(
    dim: int, chains: int, num_calls: int, child: ProcessPoolExecutor | None
) -> dict[str, dict[str, Contestant]]:
    """By what is asked for, then "package" and "torch"."""
    sizes = [dim + 1, *[WIDTH] * HIDDEN, dim]
    rng = np.random.default_rng(0)
    weights = [(0.5 * rng.normal(size=s) / s[0] ** 0.5).astype(np.float32) for s in itertools.pairwise(sizes)]
    x = rng.normal(size=(1000, dim)).astype(np.float32)
    source = Energy(score_model, {"weights": [jnp.asarray(w) for w in weights]}, jnp.asarray(x))
    start = (ENDS[1] * rng.normal(size=(chains, dim))).astype(np.float32)
    threads, by_hand = 1, child.submit(torch_methods).result() if child else ()
    if child:  # two threads on a busy machine can be many times slower than one

        def probe(n: int) -> float:
            return child.submit(torch_draw, "ddim", weights, start, np.geomspace(*ENDS[::-1], 20), n).result()[0]

        threads = min((1, 2), key=lambda n: min(probe(n) for _ in range(3)))
    found: dict[str, dict[str, Contestant]] = {}
    for name, method in METHODS.items():
        num_steps = max(num_calls // method.calls, 1)
        rho = levels_on(None, "karras", num_steps, ENDS).rho

        def package(name: str = name, num_steps: int = num_steps) -> Any:
            return diffuse(source, 0, chains, method=name, num_steps=num_steps, noise_range=ENDS).draws

        found[name] = {"package": lambda package=package: timed(package)}  # type: ignore[misc]
        if child and name in by_hand:
            args = (name, weights, start, rho, threads)
            found[name]["torch"] = lambda args=args: child.submit(torch_draw, *args).result()  # type: ignore[misc]
    for name, settings in LOG_PROBS.items():

        def value(settings: dict[str, Any] = settings) -> Any:
            return flow_log_prob(source, x[:chains], noise_range=ENDS, **settings).value

        found[name] = {"package": lambda value=value: timed(value)}  # type: ignore[misc]
    if child:
        args = (weights, x[:chains], ENDS, TORCH_TOLERANCE, threads)
        found["hutchinson, 2 probes, tsit5"]["torch"] = lambda: child.submit(torch_log_prob, *args).result()
    return found


def measured(dim: int, options: argparse.Namespace, child: ProcessPoolExecutor | None) -> list[str]:
    found = contestants(dim, options.rows, options.calls, child)
    values = {what: {who: call()[1] for who, call in calls.items()} for what, calls in found.items()}  # compiles
    rounds = [
        {what: {who: call()[0] for who, call in calls.items()} for what, calls in found.items()}
        for _ in range(options.rounds)
    ]
    lines = []
    for what, calls in found.items():
        package = 1e3 * np.array([r[what]["package"] for r in rounds])
        cells = [f"{np.median(package):.1f} ({np.quantile(package, 0.25):.1f}–{np.quantile(package, 0.75):.1f})"]
        if "torch" in calls:
            torch = 1e3 * np.array([r[what]["torch"] for r in rounds])
            cells += [f"{np.median(torch):.1f}", f"{np.median(torch / package):.1f}", alike(what, values[what])]
        else:
            cells += ["", "", ""]
        method = METHODS.get(what)
        steps = f"{max(options.calls // method.calls, 1) * method.calls}" if method else ""
        lines.append(f"| {what} | {dim} | {steps} | {' | '.join(cells)} |")
    return lines


def alike(what: str, values: dict[str, np.ndarray]) -> str:
    """That both contestants do the same: standard deviations of draws, means of log densities."""
    if what in LOG_PROBS:
        return ", ".join(f"{v.mean():.2f}" for v in values.values())
    return ", ".join(f"{v.std():.3f}" for v in values.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diffusion_peers", description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    load = machine.load()
    packages = [*machine.PACKAGES, "diffrax"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        child = pool if importlib.util.find_spec("torch") else None
        packages += ["torch"] if child else []
        lines = [line for dim in options.dims for line in measured(dim, options, child)]
    text = "\n".join([
        "# Diffusion in milliseconds", "",
        "Written by `python -m benchmarks.diffusion_peers`.", "",
        f"{options.rows:,} draws, and log densities of as many rows, of one score network of {HIDDEN} layers of "
        f"{WIDTH}, noise from {ENDS[1]:g} to {ENDS[0]:g}: milliseconds of a whole call in which nothing is compiled, "
        "median with quartiles. Beside it score_sde's recipe by hand in PyTorch on the CPU, eager, with the faster of "
        "one and two threads; its log densities are one Rademacher probe each, one step size for all rows (SciPy's "
        f"RK45), tolerance {TORCH_TOLERANCE:g}, N(0, ρ²I) at the end. Each contestant runs once in every round; the "
        "last columns are the median of ratios, and the deviations of draws or means of log densities of both.", "",
        "| what | D | calls | ms | PyTorch, ms | PyTorch over package | alike |", "|---|---|---|---|---|---|---|",
        *lines, "",
        machine.describe(packages),
        f"- Load before the run: {load}; {options.rounds} rounds", "",
    ])  # fmt: skip
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
