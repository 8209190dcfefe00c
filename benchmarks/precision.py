"""How much gradients lose where a density is computed in few bits: `python -m benchmarks.precision`.

Each operation of the densities is rounded to a number of bits; all else is float64, so that the random numbers are the
same. The densities: the chain of the README, Student's t of three columns, columns whose standard deviations
are a thousandth, one and a thousand, columns ten standard deviations away from zero, and a network of two layers of 128
with swish in 16 dimensions. Errors are those of the gradient in the parameters, of the mean over 2,000 rows (512 of
the network's), root mean square over keys, relative to the float64 gradient: of FSM to that at its small default step
there, so that they hold the bias of a step too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from benchmarks import machine
from numpyro_score import ESM, FSM, Energy, KLContraction

OUTPUT = Path(__file__).with_name("PRECISION.md")
BITS = {"bfloat16, 7": 7, "half or TF32, 10": 10, "float32, 23": 23}
STEPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
TIMES = (0.001, 0.01, 0.1, 1.0)
SIGMA, KEYS = 0.3, 3
SCALES = np.array([1e-3, 1.0, 1e3])


class Density(NamedTuple):
    """A log density of rows whose operations are rounded by the last argument, its parameters, and data."""

    of: Callable[[Any, Any, Callable[[Any], Any]], Any]
    params: dict[str, Any]
    x: np.ndarray


def chain(p: Any, x: Any, cut: Any) -> Any:
    terms = jnp.concatenate([p["w"] * x[..., :-1] * x[..., 1:], -p["a"] * x**4], axis=-1)
    return cut(jnp.sum(cut(terms), axis=-1))


def student(p: Any, x: Any, cut: Any) -> Any:
    return cut(jnp.sum(cut(-p["a"] * cut(jnp.log1p(cut(x**2 / p["b"])))), axis=-1))


def quartic(p: Any, y: Any, cut: Any) -> Any:
    return cut(jnp.sum(cut(jnp.concatenate([-p["k"] * y**2, -p["a"] * y**4], axis=-1)), axis=-1))


def scaled(p: Any, x: Any, cut: Any) -> Any:
    return quartic(p, cut(x / SCALES), cut)


def far(p: Any, x: Any, cut: Any) -> Any:
    return quartic(p, cut(cut(x) - p["m"]), cut)


def network(p: Any, x: Any, cut: Any) -> Any:
    h = cut(x)
    for w, b in zip(p["w"], p["b"], strict=True):
        h = cut(jax.nn.swish(cut(h @ w + b)))
    return cut(cut(h @ p["out"]) - 0.5 * jnp.sum(x**2, axis=-1))


def densities(n: int) -> dict[str, Density]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3))
    a = np.array([0.1, 0.2, 0.15])
    curved = {"k": np.array([0.5, 0.4, 0.3]), "a": a}
    layers = {
        "w": [rng.normal(size=(m, 128)) * (2 / m) ** 0.5 for m in (16, 128)],
        "b": [0.1 * rng.normal(size=128) for _ in range(2)],
        "out": 2 * rng.normal(size=128) / 128**0.5,
    }
    return {
        "the chain": Density(chain, {"w": np.array([0.6, -0.4]), "a": a}, x),
        "Student's t": Density(
            student, {"a": np.array([2.0, 1.5, 2.5]), "b": np.array([3.0, 2.0, 4.0])}, rng.standard_t(3, size=(n, 3))
        ),
        "columns of three scales": Density(scaled, curved, x * SCALES),
        "far from zero": Density(far, {**curved, "m": np.full(3, 10.0)}, 10 + x),
        "a network": Density(network, layers, rng.normal(size=(min(n, 512), 16))),
    }


def rounded(x: Any, bits: int | None) -> Any:
    """To `bits` of mantissa."""
    return x if bits is None else jax.lax.reduce_precision(x, exponent_bits=11, mantissa_bits=bits)


def energy_of(density: Density, params: Any, bits: int | None = None, score: bool = False) -> Energy:
    """With `score` the derivative in x is rounded, too, as that of a function of x rounded."""

    def model(x: Any) -> None:
        x = rounded(x, bits) if score else x
        p = {k: numpyro.param(k, v) for k, v in params.items()}
        numpyro.factor("energy", density.of(p, x, partial(rounded, bits=bits)))

    return Energy(model, params, jnp.asarray(density.x))


def gradients(make: Callable[[Any], Any], settings: Sequence[Any], density: Density, bits: int | None) -> np.ndarray:
    """Of the means of losses in the parameters, (settings, keys, P)."""

    def mean(params: Any, key: Any, setting: Any) -> Any:
        loss = make(setting)
        return jnp.mean(loss(energy_of(density, params, bits, isinstance(loss, ESM)), key))

    of = jax.jit(jax.vmap(jax.grad(mean), (None, 0, None)))
    keys = jax.random.split(jax.random.key(0), KEYS)
    found = [jax.tree.leaves(of(density.params, keys, jnp.asarray(s))) for s in settings]
    return np.array([np.concatenate([np.asarray(v).reshape(KEYS, -1) for v in leaves], axis=1) for leaves in found])


def errors(
    make: Callable[[Any], Any], settings: Callable[[int | None], Sequence[Any]], right: np.ndarray, density: Density
) -> np.ndarray:
    """Of the gradients of losses in each number of bits, (settings, bits), relative to the right ones."""
    found = []
    for bits in (*BITS.values(), None):
        away = np.linalg.norm(gradients(make, settings(bits), density, bits) - right, axis=2)
        found.append(np.sqrt(np.mean((away / np.linalg.norm(right, axis=2)) ** 2, axis=1)))
    return np.array(found).T


def table(first: str, names: Sequence[str], found: np.ndarray) -> list[str]:
    lines = [f"| {first} | {' | '.join(BITS)} | float64 |", "| --- " * (len(BITS) + 2) + "|"]
    return lines + [f"| {k} | {' | '.join(f'{e:.1e}' for e in es)} |" for k, es in zip(names, found, strict=True)]


def finite_differences(density: Density, relative: float | None) -> list[str]:
    spread = float(density.x.std(axis=0).min())
    unit, sigma = spread / density.x.shape[1] ** 0.5, None if relative is None else relative * spread

    def default(bits: int | None) -> float:
        return float(FSM(sigma=sigma).step(energy_of(density, density.params, bits)))

    def make(step: Any) -> FSM:
        return FSM(epsilon=step, sigma=sigma)

    right = gradients(make, [default(None)], density, None)
    steps = [s * unit for s in STEPS]
    found = errors(make, lambda bits: [*steps, default(bits)], right, density)
    notes = []
    for (name, bits), column in zip(BITS.items(), found.T, strict=False):
        best, chosen = int(column[:-1].argmin()), column[-1]
        notes.append(
            f"- {name} bits: {chosen:.1e} at the default, {default(bits) / unit:.2g}, "
            f"{chosen / column[best]:.1f} times that of the best, {column[best]:.1e} at {STEPS[best]:g}."
        )
    return [*table("step", [*(f"{s:g}" for s in STEPS), "the default"], found), "", *notes, ""]


def render(rows: int) -> str:
    """The page but for the seconds that it took."""
    lines = ["# Gradients of densities in few bits", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += ["Written by `python -m benchmarks.precision` in SECONDS s.", "", machine.describe(), ""]
    lines += ["Steps are in units of the least standard deviation of a column over √D.", ""]
    found = densities(rows)
    for form, sigma in (("sliced", None), (f"denoising at σ = {SIGMA} of that deviation", SIGMA)):
        for name, density in found.items():
            lines += [f"## FSM, {form}: {name}", "", *finite_differences(density, sigma)]
    density = found["the chain"]
    times = [t * float(density.x.var()) for t in TIMES]
    right = gradients(lambda t: KLContraction(time=t), times, density, None)
    of = errors(lambda t: KLContraction(time=t), lambda _: times, right, density)
    lines += [
        "## KLContraction: the chain",
        "",
        "By its time over the variance of the data, against itself in float64.",
    ]
    lines += ["", *table("time", [f"{t:g}" for t in TIMES], of), "", "## ESM: the chain", ""]
    lines += ["Against itself in float64; data, density and score have these bits.", ""]

    def esm(_: Any) -> ESM:
        return ESM(lambda x: -x)

    of = errors(esm, lambda _: [0.0], gradients(esm, [0.0], density, None), density)
    return "\n".join([*lines, *table("target", ["standard normal law"], of)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()
    begin = time.perf_counter()
    with jax.enable_x64(True):
        text = render(options.rows).replace("SECONDS", f"{time.perf_counter() - begin:.0f}")
    print(text)
    if output := options.output or (OUTPUT if options.rows == 2000 else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
