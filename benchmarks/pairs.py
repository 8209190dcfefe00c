"""The information of pairs of counts, beside that of the likelihood: `python -m benchmarks.pairs`.

Nothing of the package is used: the objective of :class:`~numpyro_score.PairLikelihood` is written out with NumPy in
double precision, and the variance of its estimates follows from exact probabilities.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import gammaln, logsumexp

OUTPUT = Path(__file__).with_name("PAIRS.md")
COUNTS = np.arange(6001)
STEP = 1e-4  # of differences
Density = Callable[[np.ndarray], np.ndarray]


def poisson(t: np.ndarray) -> np.ndarray:
    return COUNTS * t[0] - gammaln(COUNTS + 1)


def com_poisson(t: np.ndarray) -> np.ndarray:
    return COUNTS * t[0] - t[1] * gammaln(COUNTS + 1)


def negative_binomial(t: np.ndarray) -> np.ndarray:
    return gammaln(COUNTS + np.exp(t[1])) - gammaln(COUNTS + 1) + COUNTS * (t[0] - np.logaddexp(t[0], t[1]))


def geometric(t: np.ndarray) -> np.ndarray:
    return -COUNTS * np.exp(t[0])


LAWS: dict[str, tuple[Density, list[float]]] = {
    "Poisson, mean 0.3": (poisson, [np.log(0.3)]),
    "Poisson, mean 5": (poisson, [np.log(5.0)]),
    "Poisson, mean 50": (poisson, [np.log(50.0)]),
    "Conway–Maxwell–Poisson, ν = 2": (com_poisson, [2 * np.log(6.0), 2.0]),
    "Conway–Maxwell–Poisson, ν = 0.5": (com_poisson, [0.5 * np.log(4.0), 0.5]),
    "negative binomial, mean 5, size 2": (negative_binomial, [np.log(5.0), np.log(2.0)]),
    "negative binomial, mean 50, size 0.5": (negative_binomial, [np.log(50.0), np.log(0.5)]),
    "geometric, mean 10": (geometric, [np.log(0.1)]),
    "geometric, mean 100": (geometric, [np.log(0.01)]),
}


def pairs(f: np.ndarray, num_distances: int) -> np.ndarray:
    """The value for each count, from log densities of all."""
    value = np.zeros(len(f))
    for s in 2 ** np.arange(num_distances):
        value[:-s] += np.logaddexp(0, f[s:] - f[:-s])
        value[s:] += np.logaddexp(0, f[:-s] - f[s:])
    return value


def variances(density: Density, theta: np.ndarray, objective: Density) -> np.ndarray:
    """Of the estimates, from one row."""
    p = np.exp(density(theta) - logsumexp(density(theta)))
    unit = STEP * np.eye(len(theta))
    gradient = np.array([(objective(theta + e) - objective(theta - e)) / (2 * STEP) for e in unit])

    def second(a: np.ndarray, b: np.ndarray) -> float:
        far = objective(theta + a + b) - objective(theta + a - b) - objective(theta - a + b) + objective(theta - a - b)
        return float(p @ far) / (4 * STEP**2)

    half = np.linalg.solve([[second(a, b) for a in unit] for b in unit], gradient - (gradient @ p)[:, None])
    return np.diag(half * p @ half.T)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    lines = []
    for name, (density, start) in LAWS.items():
        theta = np.array(start)

        def log_likelihood(t: np.ndarray, density: Density = density) -> np.ndarray:
            return logsumexp(density(t)) - density(t)

        best = variances(density, theta, log_likelihood)
        cells = []
        for num in (1, 4, 11):

            def of_pairs(t: np.ndarray, density: Density = density, num: int = num) -> np.ndarray:
                return pairs(density(t), num)

            cells.append(", ".join(f"{v:.2f}" for v in best / variances(density, theta, of_pairs)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = [
        "# Information of pairs",
        "",
        "The variance of maximum likelihood over that of `PairLikelihood(num_distances)`, for each parameter, by sums "
        "over the counts up to 6,000. Written by `python -m benchmarks.pairs`.",
        "",
        "| law | 1 distance | 4 | 11, the default |",
        "|---|---|---|---|",
        *lines,
    ]
    options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
