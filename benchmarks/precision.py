"""How much gradients lose where a density is computed in few bits: `python -m benchmarks.precision`.

The chain of the README, with each term of its density and their sum rounded to a number of bits; all else is float64,
so that the random numbers are the same. Errors are those of the gradient in the parameters, of the mean over 2,000
rows, root mean square over keys, relative to the float64 gradient: of FSM to that at its small
default step there, so that they hold the bias of a step too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
SIGMA, KEYS = 0.3, 5
PARAMS = {"w": np.array([0.6, -0.4]), "a": np.array([0.1, 0.2, 0.15])}


def rounded(x: Any, bits: int | None) -> Any:
    """To `bits` of mantissa."""
    return x if bits is None else jax.lax.reduce_precision(x, exponent_bits=11, mantissa_bits=bits)


def model(x: Any, bits: int | None = None, score: bool = False) -> None:
    """With `score` the derivative in x is rounded, too, as that of a function of x rounded."""
    x = rounded(x, bits) if score else x
    w, a = numpyro.param("w", PARAMS["w"]), numpyro.param("a", PARAMS["a"])
    terms = jnp.concatenate([w * x[..., :-1] * x[..., 1:], -a * x**4], axis=-1)
    numpyro.factor("energy", rounded(jnp.sum(rounded(terms, bits), axis=-1), bits))


def gradients(make: Callable[[Any], Any], settings: Sequence[float], x: Any, bits: int | None) -> np.ndarray:
    """Of the means of losses in the parameters, (settings, keys, P)."""

    def mean(params: Any, key: Any, setting: Any) -> Any:
        return jnp.mean(
            make(setting)(Energy(partial(model, bits=bits, score=isinstance(make(setting), ESM)), params, x), key)
        )

    of = jax.jit(jax.vmap(jax.grad(mean), (None, 0, None)))
    keys = jax.random.split(jax.random.key(0), KEYS)
    found = [jax.tree.leaves(of(PARAMS, keys, jnp.asarray(s))) for s in settings]
    return np.array([np.concatenate([np.asarray(v) for v in leaves], axis=1) for leaves in found])


def errors(make: Callable[[Any], Any], settings: Sequence[float], limit: Any, x: Any) -> np.ndarray:
    """Of the gradients of losses in each number of bits, (settings, bits), relative to those of a limit in float64."""
    right = gradients(limit or make, settings if limit is None else [0.0], x, None)
    found = []
    for bits in (*BITS.values(), None):
        away = np.linalg.norm(gradients(make, settings, x, bits) - right, axis=2) / np.linalg.norm(right, axis=2)
        found.append(np.sqrt(np.mean(away**2, axis=1)))
    return np.array(found).T


def table(first: str, names: Sequence[str], found: np.ndarray) -> list[str]:
    lines = [f"| {first} | {' | '.join(BITS)} | float64 |", "| --- " * (len(BITS) + 2) + "|"]
    return lines + [f"| {k} | {' | '.join(f'{e:.1e}' for e in es)} |" for k, es in zip(names, found, strict=True)]


def finite_differences(x: Any, sigma: float | None) -> list[str]:
    spread = float(jnp.min(x.std(axis=0))) / x.shape[1] ** 0.5
    default = float(FSM(sigma=sigma).step(jnp.asarray(x, jnp.float32)))
    steps = [*(s * spread for s in STEPS), default]
    found = errors(lambda e: FSM(epsilon=e, sigma=sigma), steps, lambda _: FSM(sigma=sigma), x)
    notes = []
    for name, column in zip(BITS, found.T, strict=False):
        best, chosen = int(column[:-1].argmin()), column[-1]
        factor = chosen / column[best]
        close = "near the best" if factor < 3 else f"{factor:.0f} times that of the best"
        at = f"{column[best]:.1e} at {STEPS[best]:g}"
        notes.append(f"- {name} bits: the error of the default is {chosen:.1e}, {close}, {at}.")
    names = [*(f"{s:g}" for s in STEPS), f"{default / spread:.2g}, the default in float32"]
    return [*table("step", names, found), "", *notes]


def render(x: Any) -> str:
    """The page but for the seconds that it took."""
    lines = ["# Gradients of densities in few bits", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += ["Written by `python -m benchmarks.precision` in SECONDS s.", "", machine.describe(), ""]
    lines += ["Steps are in units of the least standard deviation of a column over √D.", "", "## FSM, sliced", ""]
    lines += [*finite_differences(x, None), "", f"## FSM, denoising at σ = {SIGMA}", ""]
    lines += [*finite_differences(x, SIGMA), "", "## KLContraction", ""]
    lines += ["By its time over the variance of the data, against itself in float64.", ""]
    found = errors(lambda t: KLContraction(time=t), [t * float(x.var()) for t in TIMES], None, x)
    lines += [*table("time", [f"{t:g}" for t in TIMES], found), "", "## ESM", ""]
    lines += ["Against itself in float64; data, density and score have these bits.", ""]
    found = errors(lambda _: ESM(lambda x: -x), [0.0], None, x)
    return "\n".join([*lines, *table("target", ["standard normal law"], found)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()
    begin = time.perf_counter()
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(options.rows, 3)))
        text = render(x).replace("SECONDS", f"{time.perf_counter() - begin:.0f}")
    print(text)
    if output := options.output or (OUTPUT if options.rows == 2000 else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
