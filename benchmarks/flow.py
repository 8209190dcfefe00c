"""How exact log densities by the probability flow are: `python -m benchmarks.flow`.

Mixtures of four normal laws in closed form, standardised, with energies that know them up to a constant for each level.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.mixtures import Mixture
from numpyro_score import EDM, VE, VP, SubVP, flow_log_prob
from numpyro_score.diffusion import flow

OUTPUT = Path(__file__).with_name("FLOW.md")


def cells(error: np.ndarray) -> str:
    return " | ".join(f"{q:.1e}" for q in np.quantile(error, [0.5, 0.99, 1.0]))


def solutions(double: bool, rows: int, dims: tuple[int, ...]) -> Iterator[str]:
    """Errors against the closed form, with and without the smallest noise."""
    smallest = 3e-4 if double else 1e-3
    own = flow.end_law
    cases = [
        (VP(), "dopri8", 1e-5, True),
        (VP(), "dopri8", 1e-5, False),
        (VP(), "tsit5", 1e-6, True),
        (SubVP(), "dopri8", 1e-5, True),
        (VE(smallest, 140.0), "dopri8", 1e-5, True),
        (EDM(140.0), "dopri8", 1e-5, True),
    ]
    cases += [(VP(), "dopri8", 1e-8, True)] * double
    with jax.enable_x64(double):
        for dim in dims:
            mixture = Mixture(dim, 4, 0)
            x, energy = jnp.asarray(mixture.draw(rows, 1), float), mixture.energy()
            for sde, solver, tolerance, moments in cases:
                law = own if moments else lambda x, w, dtype: own(0.0 * x, w, dtype)
                with mock.patch.object(flow, "end_law", law):
                    options = dict(sde=sde, noise_range=(smallest, 140.0), solver=solver)
                    found = flow_log_prob(energy, x, **options, rtol=tolerance, atol=tolerance)
                wrong, noised = (np.abs(found.value - mixture.log_density(x, s)) for s in (0.0, smallest))
                covers = np.mean(noised <= found.solver_error + found.end_error)
                end = "data's moments" if moments else "N(0, ρ²I)"
                steps = f"{found.num_steps.mean():.1f}, {found.num_steps.max()}"
                yield (
                    f"| {'float64' if double else 'float32'} | {dim} | {type(sde).__name__} | {end} | {solver} "
                    f"| {tolerance:.0e} | {cells(wrong)} | {np.median(found.solver_error):.1e} "
                    f"| {np.median(found.end_error):.1e} | {covers:.3f} | {steps} |"
                )


def probes(rows: int, dims: tuple[int, ...]) -> Iterator[str]:
    """Standard errors of Hutchinson's estimate, and how often the truth is within two of them."""
    for dim in dims:
        mixture = Mixture(dim, 4, 0)
        x, energy = jnp.asarray(mixture.draw(rows, 1), float), mixture.energy()
        for num_probes in (n for n in (4, 16, 32) if n < dim):  # else the exact divergence is taken
            options = dict(noise_range=(1e-3, 140.0), rtol=1e-4, atol=1e-4, divergence="hutchinson", rng_key=0)
            found = flow_log_prob(energy, x, **options, num_probes=num_probes)
            off = np.asarray(found.value - mixture.log_density(x, 1e-3))
            within = np.mean(np.abs(off) <= 2 * found.stderr)
            yield f"| {dim} | {num_probes} | {np.std(off):.3f} | {found.stderr.mean():.3f} | {within:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow", description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    begin = time.perf_counter()
    lines = []
    for double in (False, True):
        for line in solutions(double, options.rows, tuple(options.dims)):
            print(line, flush=True)
            lines.append(line)
    calibration = list(probes(options.rows, (*options.dims, 64)))
    text = [
        "# Log densities by the probability flow",
        "",
        f"Written by `python -m benchmarks.flow` in {time.perf_counter() - begin:.0f} s: absolute errors, in nats, of "
        f"{options.rows} draws of a mixture of four normal laws of unit variance, against its density without noise. "
        "The smallest noise is 1e-3 in float32 and 3e-4 in float64, the largest 140.",
        "",
        machine.describe((*machine.PACKAGES, "diffrax")),
        "",
        "*Covers* is the share of rows whose error, against the density with the smallest noise, is at most the sum of "
        "`solver_error` and `end_error`, whose medians stand before it. Steps are mean and largest.",
        "",
        "| precision | D | SDE | law at the end | solver | tolerance | median | 99% | largest | solver_error "
        "| end_error | covers | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *lines,
        "",
        "Hutchinson's estimate of the divergence, VP, float32: the deviation over rows, the mean of `stderr`, and the "
        "share of rows whose truth is within two of it (0.954 for many probes, 0.936 for 16 of a normal law, 0.861 for "
        "4).",
        "",
        "| D | probes | deviation | stderr | within 2 |",
        "| --- | --- | --- | --- | --- |",
        *calibration,
    ]
    options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
