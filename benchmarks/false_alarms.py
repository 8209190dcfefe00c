"""How often each check of a report objects to good fits, and to bad ones: `python -m benchmarks.false_alarms`.

Fits are made in closed form where a check can be asked without the package's fit around it: that of a normal law by
score matching has the mean and the inverse covariance of the data, and its draws are those of that law.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.signal
from numpyro.distributions import constraints

from benchmarks import machine
from benchmarks.false_alarms_beside import comparisons, leave_one_out, weights_of_log_z
from benchmarks.good_fits import (
    Found,
    Rows,
    chain_terms,
    heavy,
    normal,
    normal_terms,
    outlier,
    quartic,
    skew,
    twins,
)
from numpyro_score import ScoreMatching
from numpyro_score.arviz import dataset
from numpyro_score.divergences.moments import permutation_test
from numpyro_score.divergences.pairs import median_distance
from numpyro_score.divergences.stein import stein_kernel, stein_statistic
from numpyro_score.inference import default_optimizer
from numpyro_score.normaliser.mixing import mixed
from numpyro_score.reporting import checks

OUTPUT = Path(__file__).with_name("FALSE_ALARMS.md")
# -- influences and the sandwich: fits that are quadratic in the parameters -----------------------------


def influences(terms: Any, x: np.ndarray) -> np.ndarray:
    """Of rows on the estimates by score matching, (N, P)."""
    score, laplacian = terms(x)
    flat = score.reshape(-1, score.shape[2])
    hessian = flat.T @ flat
    estimates = -np.linalg.solve(hessian, laplacian.sum(axis=0))
    gradients = np.einsum("ndp,nd->np", score, score @ estimates) + laplacian
    return np.linalg.solve(hessian, (gradients - gradients.mean(axis=0)).T).T


def by_influences(terms: Any, rows: Rows, n: int, runs: int, seed: int) -> tuple[list[str], list[str]]:
    """Verdicts on the row of most influence, and on the sandwich."""
    rng, most, sandwich = np.random.default_rng(seed), [], []
    for _ in range(runs):
        values = influences(terms, rows(rng, (n, 3)))
        shares = np.abs(values) / np.linalg.norm(values, axis=0)
        most.append(checks.row_verdict(values[:, shares.max(axis=0).argmax()])[0])
        fit: Any = SimpleNamespace(curvature=SimpleNamespace(covariance=values.T @ values))
        sandwich.append(checks._sandwich(fit)[1])
    return most, sandwich


def most_influence(scale: float) -> Iterator[Found]:
    cases = [
        ("normal law, 100 rows", True, normal_terms, normal, 100, 2_000),
        ("normal law, 400 rows", True, normal_terms, normal, 400, 10_000),
        ("chain with quartic tails, 400 rows of it", True, chain_terms, quartic, 400, 1_000),
        ("the same chain, 400 normal rows", True, chain_terms, normal, 400, 1_000),
        ("normal law, 400 rows, one of 8 standard deviations", False, normal_terms, outlier, 400, 300),
        ("normal law, 400 rows, two columns that correlate 0.9998", False, normal_terms, twins, 400, 100),
    ]
    for seed, (case, good, terms, rows, n, runs) in enumerate(cases):
        most, sandwich = by_influences(terms, rows, n, max(int(runs * scale), 20), seed)
        if rows is not twins:
            yield Found("row of most influence", case, good, most)
        if rows is not outlier:
            yield Found("sandwich eigenvalues", case, good, sandwich)


# -- the Stein test and moments: laws fitted to rows, and draws of them ---------------------------------


@jax.jit
def stein_pvalues(x: Any, spread: Any, keys: Any) -> Any:
    """Of batches of rows against the normal laws fitted to them, with covariances multiplied by `spread`."""

    def one(of: Any) -> Any:
        x, key = of
        away = x - x.mean(axis=0)
        scores = -jnp.linalg.solve(spread * jnp.cov(x.T), away.T).T
        length = median_distance(x)
        return stein_statistic(stein_kernel("imq"), (x / length, length * scores), key, 200)[2]

    return jax.lax.map(one, (x, keys))


def fitted_draws(rng: np.random.Generator, x: np.ndarray, m: int, spread: float, shift: float) -> np.ndarray:
    """Of the normal law with mean and covariance of x, stretched, and the first column moved."""
    draws = x.mean(axis=0) + spread**0.5 * rng.normal(size=(m, 3)) @ np.linalg.cholesky(np.cov(x.T)).T
    draws[:, 0] += shift * x[:, 0].std()
    return draws


def quartic_draws(rng: np.random.Generator, x: np.ndarray, m: int) -> np.ndarray:
    """Of exp(−a x⁴ − ½τ x²) fitted by score matching, by the inverse of its distribution function on a grid."""
    slopes = np.stack([-4 * x[:, 0] ** 3, -x[:, 0]], axis=1)
    a, tau = np.linalg.solve(slopes.T @ slopes, [12 * np.sum(x**2), float(len(x))])
    grid = np.linspace(-6.0, 6.0, 4001) if a > 0 else np.linspace(x.min(), x.max(), 4001)
    log_density = -a * grid**4 - 0.5 * tau * grid**2
    density = np.exp(log_density - log_density.max())
    below = np.cumsum(density) - 0.5 * density
    return np.interp(rng.uniform(size=(m, 1)), below / density.sum(), grid)


def tests_of_rows(scale: float) -> Iterator[Found]:
    cases: list[tuple[str, bool, Rows, int, float, int]] = [
        ("normal law fitted to 100 rows", True, normal, 100, 1.0, 5_000),
        ("normal law fitted to 100 rows, with 1.5 of its variances", False, normal, 100, 1.5, 300),
        ("normal law fitted to 400 rows, with 1.5 of its variances", False, normal, 400, 1.5, 100),
        ("normal law fitted to 400 rows of skewness 1", False, skew, 400, 1.0, 100),
    ]
    rng = np.random.default_rng(0)
    for case, good, rows, n, spread, runs in cases:
        runs = max(int(runs * scale), 20)
        x = jnp.asarray(rows(rng, (runs, n, 3)))
        found = np.asarray(stein_pvalues(x, spread, jax.random.split(jax.random.key(runs), runs)))
        yield Found("data against model (KSD)", case, good, ["good" if p >= 0.01 else "look" for p in found])


def tests_of_moments(scale: float) -> Iterator[Found]:
    cases: list[tuple[str, bool, Rows, int, float | None, float, int]] = [
        ("normal law fitted to 100 rows", True, normal, 100, 1.0, 0.0, 5_000),
        ("the law of 100 normal rows, not fitted", True, normal, 100, None, 0.0, 2_000),
        ("the law of 100 rows of Student's t₃, not fitted", True, heavy, 100, None, 0.0, 1_000),
        ("the law of 100 rows of skewness 1, not fitted", True, skew, 100, None, 0.0, 1_000),
        ("normal law fitted to 100 rows, with 1.5 of its variances", False, normal, 100, 1.5, 0.0, 300),
        ("normal law fitted to 400 rows, with 1.5 of its variances", False, normal, 400, 1.5, 0.0, 100),
        ("normal law fitted to 100 rows of skewness 1", False, skew, 100, 1.0, 0.0, 300),
        ("normal law fitted to 400 rows of skewness 1", False, skew, 400, 1.0, 0.0, 100),
        ("normal law fitted to 442 rows, one mean 0.25 σ off", False, normal, 442, 1.0, 0.25, 100),
    ]
    rng, paired = np.random.default_rng(0), np.triu_indices(3, 1)
    verdicts = []
    for _ in range(max(int(1_000 * scale), 20)):
        x = quartic(rng, (100, 1))
        pvalue = permutation_test(x, quartic_draws(rng, x, 300), np.triu_indices(1, 1), rng, 200)[1].min()
        verdicts.append("good" if pvalue >= 0.01 else "look")
    yield Found("moments of data and draws", "−ax⁴ − τx²/2 fitted to 100 rows of it, 300 draws", True, verdicts)
    for case, good, rows, n, spread, shift, runs in cases:
        m, verdicts = (300 if n == 100 else 1000), []
        for _ in range(max(int(runs * scale), 20)):
            x = rows(rng, (n, 3))
            draws = rows(rng, (m, 3)) if spread is None else fitted_draws(rng, x, m, spread, shift)
            pvalue = permutation_test(x, draws, paired, rng, 200)[1].min()
            verdicts.append("good" if pvalue >= 0.01 else "look")
        yield Found("moments of data and draws", f"{case}, {m} draws", good, verdicts)


# -- the end of the fit, the chains and the gradient ------------------------------------------------------


def trend(scale: float) -> Iterator[Found]:
    rng = np.random.default_rng(0)
    for steps, left, good in ((40, 0.0, True), (400, 0.0, True), (400, 0.02, False)):
        verdicts = []
        for _ in range(max(int((10_000 if good else 1_000) * scale), 20)):
            t = np.arange(steps) / steps
            losses = np.exp(-20 * t) + rng.normal(0, 0.005, steps) - left * np.maximum(t - 0.8, 0) / 0.1
            verdicts.append(checks.trend_verdict(losses)[1])
        what = "settled, with noise" if good else "falling by 2% of the whole over the last tenth"
        yield Found("end of the fit", f"{steps} steps, {what}", good, verdicts)


def mixing(scale: float) -> Iterator[Found]:
    rng = np.random.default_rng(0)
    cases = [(0.0, 0.0, True), (0.5, 0.0, True), (0.7, 0.0, True), (0.8, 0.0, True), (0.5, 0.5, False)]
    for rho, shift, good in cases:
        verdicts, warnings = [], []
        for _ in range(max(int((1_000 if good else 100) * scale), 5)):
            x = scipy.signal.lfilter([(1 - rho**2) ** 0.5], [1, -rho], rng.normal(size=(4, 1100, 3)), axis=1)[:, 100:]
            x[0] += shift
            draws = dataset({"x": x}, ("chain", "draw"))
            groups = {"r_hat": az.rhat(draws), "ess": az.ess(draws), "sample_stats": {}}
            verdicts.append(checks._mixing(groups)[1])
            warnings.append("good" if mixed(groups["r_hat"], groups["ess"], 1.01) else "look")
        what = f"4 chains of 1,000 draws, autocorrelation {rho}" + (f", one moved by {shift} σ" if shift else "")
        yield Found("draws of the model", what, good, verdicts)
        yield Found("R-hat of `sample`, as a warning", what, good, warnings)


def gradient(scale: float) -> Iterator[Found]:
    """Fits of the package by Adam, after many steps and after few."""

    def model(x: Any) -> None:
        k = numpyro.param("k", jnp.ones(3), constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (3,)), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(k * x**2, axis=-1))

    rng = np.random.default_rng(0)
    for steps, good in ((4000, True), (10, False)):
        sm, verdicts = ScoreMatching(model, optim=default_optimizer(steps), num_steps=steps), []
        for _ in range(max(int(30 * scale), 3)):
            x = 3 * rng.normal(size=(400, 3)).astype(np.float32)
            fit = sm.run(jax.random.key(0), x, progress_bar=False)
            verdicts.append(checks._gradient_check(fit)[1])
        yield Found("gradient at the end", f"normal law, 400 rows, {steps} steps of Adam", good, verdicts)


def render(found: list[Found], seconds: float) -> str:
    lines = [
        "# False alarms of the checks, and what they miss",
        "",
        "How often each check of `report` and `compare`, and some warnings, say something else than *good*, by "
        "simulation. For good fits these are false alarms; for bad ones the rest are misses. The tests of rows and "
        "moments have a level of 0.01; orders are beyond three standard errors. Chains of autocorrelation 0.8 have 440 "
        "effective draws, and are objected to where they seem to have less than 400. "
        f"Written by `python -m benchmarks.false_alarms` in {seconds:.0f} s.",
        "",
        machine.describe(),
        "",
        "| check | case | fit | runs | not good | ± | bad |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in sorted(found, key=lambda f: f.check):
        n, other = len(f.verdicts), float(np.mean([v != "good" for v in f.verdicts]))
        error, worst = (other * (1 - other) / n) ** 0.5, float(np.mean([v == "bad" for v in f.verdicts]))
        cells = f"{other:.4f} | {error:.4f} | {worst:.4f}"
        lines.append(f"| {f.check} | {f.case} | {'good' if f.good else 'bad'} | {n} | {cells} |")
    return "\n".join(lines) + "\n"


STUDIES = (
    trend,
    most_influence,
    mixing,
    gradient,
    tests_of_rows,
    tests_of_moments,
    leave_one_out,
    weights_of_log_z,
    comparisons,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_alarms", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="a share of all runs")
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()

    begin, found = time.perf_counter(), []
    for study in STUDIES:
        print(study.__name__, f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        found += list(study(options.scale))
    text = render(found, time.perf_counter() - begin)
    print(text)
    if output := options.output or (OUTPUT if options.scale == 1 else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
