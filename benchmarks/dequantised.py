"""The digits of `examples/digits.py` with uniform noise in place of normal noise: bits of a mixture, a network, a flow.

    python -m benchmarks.dequantised

Integers plus uniform noise on (-1/2, 1/2) have a density whose cross entropy bounds that of the integers [Theis, van
den Oord & Bethge 2016], which is what papers on images report. The models are the example's, fitted anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from sklearn.mixture import GaussianMixture

from benchmarks import machine
from benchmarks.digits import DIGITS
from numpyro_score import ContinuousDSM, ScoreMatching, flow_log_prob

OUTPUT = Path(__file__).with_name("DEQUANTISED.md")
SMALLEST = 0.1  # of the network's noise, in grey levels: its density is that of the data seen through so much
COPIES = 16  # of each image with noise of its own, in the network's data
SIZES = (10, 20, 40)
CHECKED = 60  # images of which the flow is solved with the exact divergence, too


def uniform(rng: np.random.Generator, images: np.ndarray, copies: int = 1) -> np.ndarray:
    """Copies of images (n, 64), each with noise of its own."""
    return np.tile(images, (copies, 1)) + rng.uniform(-0.5, 0.5, (copies * len(images), DIGITS.DIM))


def network(key: jax.Array, x: Any, num_steps: int) -> Any:
    """As the example's fit, from a smaller noise on."""
    optim = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 4e-3, 100, num_steps), b2=0.99)
    loss = ContinuousDSM(SMALLEST / DIGITS.SCALE, DIGITS.LARGEST / DIGITS.SCALE)
    sm = ScoreMatching(DIGITS.model, optim=optim, loss=loss, average=0.999, num_steps=num_steps)
    return sm.run(key, x, progress_bar=False)


def bits(log_density: Any) -> tuple[float, float]:
    """Mean and standard error over images, of densities of images in grey levels."""
    values = -np.asarray(log_density, float) / DIGITS.DIM / np.log(2)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def of_split(
    split: int, num_steps: int, sizes: tuple[int, ...]
) -> tuple[dict[str, tuple[float, float]], float, np.ndarray]:
    """The bits of all models, the network's seconds of CPU, and what an exact flow gives less its bits, (CHECKED,)."""
    rng, keys = np.random.default_rng(split), jax.random.split(jax.random.key(split), 3)
    (train, _), (validation, _), (test, _) = DIGITS.load(split)
    mean, rows = train.mean(axis=0), uniform(rng, test)
    begin = time.process_time()
    found = network(keys[0], DIGITS.scaled(uniform(rng, train, COPIES), mean), num_steps)
    seconds = time.process_time() - begin
    x = DIGITS.scaled(rows, mean)
    of_flow = flow_log_prob(
        found, x, divergence="hutchinson", num_probes=8, rng_key=keys[1], solver="tsit5", rtol=1e-3, atol=1e-3
    )
    exact = flow_log_prob(found, x[:CHECKED], divergence="exact", solver="tsit5", rtol=1e-5, atol=1e-5)
    off = np.asarray(of_flow.value[:CHECKED] - exact.value, float) / DIGITS.DIM / np.log(2)
    mixed = DIGITS.mixture(rng, train, validation, sizes)
    table = {
        "normal law": bits(GaussianMixture(1, reg_covar=0.1).fit(uniform(rng, train, 4)).score_samples(rows)),
        "mixture of normal laws": bits(mixed.score_samples(rows)),
        "score network, by its probability flow": bits(np.asarray(of_flow.value) - DIGITS.DIM * np.log(DIGITS.SCALE)),
    }
    if importlib.util.find_spec("flowjax"):
        log_prob = DIGITS.spline_flow(keys[2], rng, train, validation, seconds)
        table["spline flow of flowjax"] = bits(log_prob(rows))
    return table, seconds, off


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dequantised", description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    begin, load = time.perf_counter(), machine.load()
    DIGITS.noisy = uniform  # type: ignore[attr-defined]  # what the example's mixture and flow are fitted to
    tables, seconds, off = [], [], []
    for split in range(options.splits):
        table, took, less = of_split(split, options.steps, SIZES)
        off.append(less)
        tables.append(table)
        seconds.append(took)
        print(split, f"{took:.0f} s", table, flush=True)
    mixed, net = ([t[name][0] for t in tables] for name in list(tables[0])[1:3])
    gap = ", ".join(f"{m - n:.3f}" for m, n in zip(mixed, net, strict=True))
    text = [
        "# Digits with uniform noise",
        "",
        f"Written by `python -m benchmarks.dequantised` in {time.perf_counter() - begin:.0f} s. Bits a pixel of "
        "held-out images, as in `examples/results/digits.md` but with uniform noise on (-1/2, 1/2) in place of normal "
        f"noise of {DIGITS.NOISE:g} grey level. The network is fitted from a noise of {SMALLEST:g} grey levels on, in "
        f"{options.steps} steps and {min(seconds):.0f} to {max(seconds):.0f} s of CPU, which the spline flow had as "
        "well; flow and mixture are the best on validation images. Errors are over images.",
        "",
        "| model |" + "".join(f" split {i} |" for i in range(options.splits)),
        "|---|" + "---|" * options.splits,
        *(f"| {k} |" + "".join(f" {t[k][0]:.3f} ± {t[k][1]:.3f} |" for t in tables) for k in tables[0]),
        "",
        f"The mixture less the network: {gap}. By exact divergences and tolerances of 1e-5, in place of 8 probes and "
        f"1e-3, the first {CHECKED} images of each split need {np.mean(off):+.4f} bits more, with a standard error of "
        f"{np.std(off) / np.size(off) ** 0.5:.4f}.",
        "",
        machine.describe((*machine.PACKAGES, "flax", "scikit-learn")),
        f"- Load before the run: {load}",
    ]
    options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
