"""How often 90% intervals hold the truth where few rows bend the objective, and how often that is said:
`python -m benchmarks.narrow_bends`.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import ISM, SandwichError, ScoreMatching

OUTPUT = Path(__file__).with_name("NARROW_BENDS.md")
FULL = 200
Z = scipy.stats.norm.ppf(0.95)


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table: all data are of the model, with `mu` at 0."""

    name: str
    model: Callable[..., Any]
    data: Callable[[np.random.Generator], tuple[np.ndarray, ...]]  # the model's arguments
    good: bool = True  # whether the density bends over the width of many rows


def location(start: float = 0.1) -> tuple[Any, Any]:
    return numpyro.param("mu", start), numpyro.param("scale", 1.0, constraint=constraints.positive)


def rounded(x: Any, eps: float) -> None:
    """A Laplace law with a round tip."""
    mu, scale = location()
    numpyro.factor("energy", -jnp.sqrt((x - mu) ** 2 + eps) / scale)


def cauchy(x: Any) -> None:
    numpyro.sample("x", dist.Cauchy(*location()), obs=x)


def student(x: Any) -> None:
    numpyro.sample("x", dist.StudentT(4.0, *location()), obs=x)


def logistic(x: Any) -> None:
    numpyro.sample("x", dist.Logistic(*location()), obs=x)


def mixture(x: Any) -> None:
    """Two humps around ±2, whose middle and width are sought."""
    mu, scale = location()
    at = jnp.stack([x - mu - 2.0, x - mu + 2.0])
    numpyro.factor("energy", jax.nn.logsumexp(-0.5 * (at / scale) ** 2, axis=0))


def angles(x: Any) -> None:
    numpyro.sample("x", dist.VonMises(*location()), obs=x)


def regression(y: Any, z: Any) -> None:
    """The first of eight slopes is called `mu`."""
    mu, scale = location()
    rest = numpyro.param("rest", jnp.zeros(7))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.StudentT(5.0, mu * z[:, 0] + z[:, 1:] @ rest, scale), obs=y)


def rounded_rows(rng: np.random.Generator, eps: float, n: int) -> tuple[np.ndarray]:
    """By rejection from the law with a sharp tip."""
    x = rng.laplace(size=8 * n)
    kept = x[rng.uniform(size=8 * n) < np.exp(np.abs(x) - np.sqrt(x**2 + eps))]
    return (kept[:n],)


def two_humps(rng: np.random.Generator, n: int) -> tuple[np.ndarray]:
    return (rng.normal(rng.choice([-2.0, 2.0], n)),)


def lines(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    return rng.standard_t(5.0, n), rng.normal(size=(n, 8))


CASES = [
    *(
        Case(f"Laplace with a tip of width √{eps:g}, {n:,} rows", partial(rounded, eps=eps),
             partial(rounded_rows, eps=eps, n=n), good=eps > 0.2)
        for eps, n in ((1e-4, 1_000), (1e-3, 1_000), (1e-3, 10_000), (1e-2, 1_000), (0.1, 1_000), (0.3, 1_000))
    ),
    *(Case(f"Cauchy, {n:,} rows", cauchy, lambda rng, n=n: (rng.standard_cauchy(n),)) for n in (50, 200, 1_000)),
    *(Case(f"Student's t₄, {n} rows", student, lambda rng, n=n: (rng.standard_t(4.0, n),)) for n in (50, 200)),
    *(Case(f"logistic, {n} rows", logistic, lambda rng, n=n: (rng.logistic(size=n),)) for n in (50, 200)),
    *(Case(f"two humps, {n} rows", mixture, partial(two_humps, n=n)) for n in (50, 200)),
    *(Case(f"von Mises, {n} rows", angles, lambda rng, n=n: (rng.vonmises(0.0, 1.0, n),)) for n in (50, 200)),
    *(Case(f"regression with t₅, 8 slopes, {n} rows", regression, partial(lines, n=n)) for n in (100, 300)),
]  # fmt: skip


def study(case: Case, replications: int) -> np.ndarray:
    """Whether each data set was warned of, and whether its interval holds the truth; without those refused."""
    rng = np.random.default_rng([2, CASES.index(case)])
    sm, found = ScoreMatching(case.model, loss=ISM(), num_steps=1500), []
    for _ in range(replications):
        fit = sm.run(jax.random.key(0), *map(jnp.asarray, case.data(rng)), progress_bar=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                error = float(fit.stderr()["mu"])
            except SandwichError:  # not curved upwards
                continue
        said = any("rows bend the objective" in str(w.message) for w in caught)
        found.append([said, abs(float(fit.estimates["mu"])) < Z * error])
    return np.array(found)


def render(results: dict[Case, np.ndarray], replications: int, seconds: float) -> str:
    lines = [
        "# Where few rows bend the objective",
        "",
        f"Fits by ISM from a start at 0.1, with the truth at 0, in {replications} data sets each: how many `stderr` "
        "refuses, how many of the others it warns of because few rows bend the objective, and how often 90% intervals "
        "for the location hold the truth, where it warns and where not. Where the density bends over few rows warnings "
        f"are right, else they are false alarms. Written by `python -m benchmarks.narrow_bends` in {seconds:.0f} s.",
        "",
        machine.describe(),
        "",
        "| law | bends over | refused | warned | coverage, warned | coverage, not warned |",
        "| --- " * 6 + "|",
    ]
    for case, found in results.items():
        said = found[:, 0] == 1
        covered = [f"{f[:, 1].mean():.2f}" if len(f) > 4 else "–" for f in (found[said], found[~said])]
        width = "many rows" if case.good else "few"
        lines.append(
            f"| {case.name} | {width} | {1 - len(found) / replications:.3f} | {said.mean():.3f} | {covered[0]} "
            f"| {covered[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.narrow_bends", description=__doc__)
    parser.add_argument("--replications", type=int, default=FULL)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", message="The loss was still falling")
    begin, results = time.perf_counter(), {}
    for case in CASES:
        print(case.name, file=sys.stderr, flush=True)
        results[case] = study(case, options.replications)
    text = render(results, options.replications, time.perf_counter() - begin)
    print(text)
    if output := options.output or (OUTPUT if options.replications == FULL else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
