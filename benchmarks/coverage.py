"""How often 90% intervals hold the truth, over many data sets: `python -m benchmarks.coverage`.

A case is a model, the law of its data and the parameters of that law. Each data set is fitted by the package as a user
would; the generalised posterior is integrated by importance sampling from a normal on quasi-random points, which shares
nothing with the package but the density of `generalized_bayes`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from numpyro.distributions import constraints
from numpyro.infer.util import potential_energy

from benchmarks import machine
from numpyro_score import ISM, ScoreMatching, adjust_draws, generalized_bayes
from numpyro_score.losses import Loss

OUTPUT = Path(__file__).with_name("COVERAGE.md")
LEVEL, POINTS = 0.9, 1024
METHODS = ("sandwich", "calibrated β", "calibrated β, adjusted draws", "β = 1")
Interval = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table for each number in `truth`."""

    name: str
    model: Callable[..., Any]  # of the data, with all parameters sampled from wide priors
    truth: dict[str, Any]  # by site: of the data's law, or nearest to it
    sample: Callable[[np.random.Generator, int], np.ndarray]  # that many rows
    rows: int = 2000
    loss: Loss = ISM()  # noqa: RUF009 - frozen


# -- the cases ----------------------------------------------------------------------------------

FLAT = dist.ImproperUniform(constraints.real, (), ())
A, B = 0.2, 0.5


def quartic(x: Any, tau: float | None = None) -> None:
    """f = −a x⁴ − ½τ x², with τ estimated or given."""
    # Not positive by constraint: with few rows the estimate may be negative, and would lie on the boundary.
    a = numpyro.sample("a", dist.Normal(0.0, 10.0))
    tau = numpyro.sample("tau", dist.Normal(0.0, 10.0)) if tau is None else tau
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * tau * x**2)


def quartic_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    """By the inverse of the distribution function, on a grid."""
    grid = np.linspace(-5.0, 5.0, 20_001)
    density = np.exp(-A * grid**4 - 0.5 * B * grid**2)
    below = np.cumsum(density) - 0.5 * density
    return np.interp(rng.uniform(size=n), below / density.sum(), grid)


def quartic_tail(x: Any) -> None:
    quartic(x, B)


def gaussian(x: Any) -> None:
    """N(0, 1/τ)."""
    tau = numpyro.sample("tau", dist.HalfNormal(10.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2)


def half_normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.abs(rng.normal(size=n))


def truncated_mean(x: Any) -> None:
    """N(μ, 1) truncated to the half-line."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2)


def truncated_precision(x: Any) -> None:
    """N(0, 1/τ) truncated to the half-line."""
    tau = numpyro.sample("tau", dist.HalfNormal(10.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * tau * x**2)


THETA = np.array([1.5, -1.0, 2.0])


def von_mises_fisher(x: Any) -> None:
    """f = θ·x on the 2-sphere."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 20.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.sphere, (), (3,)), obs=x)
        numpyro.factor("energy", x @ theta)


def von_mises_fisher_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    size = float(np.linalg.norm(THETA))
    return scipy.stats.vonmises_fisher(THETA / size, size).rvs(n, random_state=rng)


CASES = [
    Case("quartic, τ known", quartic_tail, {"a": A}, quartic_rows, rows=500),
    Case("quartic, τ known", quartic_tail, {"a": A}, quartic_rows),
    Case("quartic", quartic, {"a": A, "tau": B}, quartic_rows),
    Case("truncated normal, mean", truncated_mean, {"mu": 0.0}, half_normal),
    Case("truncated normal, precision", truncated_precision, {"tau": 1.0}, half_normal),
    Case("von Mises-Fisher", von_mises_fisher, {"theta": THETA}, von_mises_fisher_rows),
    # The model is wrong: the τ nearest to Laplace data of scale 0.6 is 1/E x² = 1/(2·0.6²).
    Case("Gaussian, Laplace data", gaussian, {"tau": 1 / 0.72}, lambda rng, n: rng.laplace(0.0, 0.6, n)),
]


# -- intervals ----------------------------------------------------------------------------------


@functools.cache
def log_density(case: Case) -> Callable[..., Any]:
    """Of the generalised posterior in unconstrained space, at many points, for any data and β."""

    @functools.partial(jax.jit, static_argnames="unravel")
    def evaluate(points: Any, beta: Any, x: Any, unravel: Any) -> Any:
        model = generalized_bayes(case.model, case.loss, beta)
        return jax.vmap(lambda u: -potential_energy(model, (x,), {}, unravel(u)))(points)

    return evaluate


@functools.cache
def normal_points(p: int) -> np.ndarray:
    return scipy.stats.norm.ppf(scipy.stats.qmc.Sobol(p, seed=0).random(POINTS))


def weighted_draws(case: Case, fit: Any, x: Any, beta: float) -> tuple[dict[str, Any], np.ndarray]:
    """Draws of the posterior at β by site, and their weights."""
    curvature, coordinates = fit.curvature, fit.coordinates
    hessian = curvature.hessian + (beta - float(fit.learning_rate)) * curvature.loss_hessian
    z = normal_points(len(hessian))
    # Wider than the posterior, so that the weights are bounded.
    root = 1.3 * np.linalg.inv(np.linalg.cholesky(hessian)).T
    points = jnp.asarray(np.asarray(coordinates.position) + z @ root.T)
    log_weights = np.asarray(log_density(case)(points, beta, x, coordinates.unravel)) + 0.5 * np.sum(z**2, axis=1)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    if 1 / np.sum(weights**2) < 0.25 * POINTS:
        raise RuntimeError(f"{case.name}: {1 / np.sum(weights**2):.0f} effective draws of {POINTS} are too few.")
    return jax.vmap(coordinates.constrain)(points), weights


def central(draws: dict[str, Any], weights: np.ndarray) -> dict[str, Interval]:
    """Equal tails, for each number of each site."""

    def quantiles(column: np.ndarray) -> np.ndarray:
        order = np.argsort(column)
        below = np.cumsum(weights[order]) - 0.5 * weights[order]
        return np.interp([0.5 - LEVEL / 2, 0.5 + LEVEL / 2], below, column[order])

    def interval(values: Any) -> Interval:
        values = np.asarray(values)
        ends = np.apply_along_axis(quantiles, 0, values.reshape(POINTS, -1))
        return ends[0].reshape(values.shape[1:]), ends[1].reshape(values.shape[1:])

    return {k: interval(v) for k, v in draws.items()}


def intervals(case: Case, sm: ScoreMatching, x: Any) -> dict[str, dict[str, Interval]]:
    """By method, then by site."""
    fit = sm.run(jax.random.key(0), x, progress_bar=False)
    errors, z = fit.stderr(), scipy.stats.norm.ppf(0.5 + LEVEL / 2)
    sandwich = {k: (np.asarray(v - z * errors[k]), np.asarray(v + z * errors[k])) for k, v in fit.estimates.items()}
    draws, weights = weighted_draws(case, fit, x, float(fit.learning_rate))
    adjusted = adjust_draws(draws, fit)
    return dict(
        zip(
            METHODS,
            (
                sandwich,
                central(draws, weights),
                central(adjusted, weights),
                central(*weighted_draws(case, fit, x, 1.0)),
            ),
            strict=True,
        )
    )


def study(case: Case, replications: int) -> dict[str, dict[str, np.ndarray]]:
    """By site, then by method: whether each interval holds the truth, (replications, ...)."""
    rng = np.random.default_rng([0, CASES.index(case)])  # data of its own for each case
    sm = ScoreMatching(case.model, loss=case.loss, learning_rate="calibrated")  # solved in closed form
    held: dict[str, dict[str, list[Any]]] = {k: {m: [] for m in METHODS} for k in case.truth}
    for _ in range(replications):
        found = intervals(case, sm, jnp.asarray(case.sample(rng, case.rows)))
        for site, truth in case.truth.items():
            for method in METHODS:
                low, high = found[method][site]
                held[site][method].append((low < truth) & (truth < high))
    return {k: {m: np.array(v) for m, v in by.items()} for k, by in held.items()}


def render(results: dict[Case, dict[str, dict[str, np.ndarray]]], replications: int, seconds: float) -> str:
    error = (LEVEL * (1 - LEVEL) / replications) ** 0.5
    lines = [
        "# Coverage of intervals",
        "",
        f"How often {LEVEL:.0%} intervals hold the truth, over {replications} data sets. An exact method has {LEVEL} ± "
        f"{error:.3f} by chance (one standard error). Written by `python -m benchmarks.coverage` in {seconds:.0f} s.",
        "",
        '- *sandwich*: estimate ± 1.645 `fit.stderr()`, from `ScoreMatching(..., learning_rate="calibrated")`.',
        "- *calibrated β*: central interval of `generalized_bayes(model, loss, fit.learning_rate)`.",
        "- *adjusted draws*: the same after `adjust_draws`. With one parameter it changes little: β has done it.",
        "- *β = 1*: what an uncalibrated posterior gives.",
        "",
        "The calibrated β matches one number, the trace of the precision, and need not be right for each of several "
        "parameters; the adjusted draws are as good as the sandwich for each.",
        "",
        "The sandwich is a formula for many rows: with few, it is a little too narrow, as the first two lines show.",
        "",
        machine.describe(),
        "",
        "| model | rows | parameter | " + " | ".join(METHODS) + " |",
        "| --- " * (3 + len(METHODS)) + "|",
    ]
    for case, held in results.items():
        for site, by_method in held.items():
            columns = [by_method[m].reshape(replications, -1).mean(axis=0) for m in METHODS]
            for i in range(len(columns[0])):
                name = site if len(columns[0]) == 1 else f"{site}[{i}]"
                cells = " | ".join(f"{c[i]:.3f}" for c in columns)
                lines.append(f"| {case.name} | {case.rows} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    begin, results = time.perf_counter(), {}
    for case in CASES:
        print(case.name, file=sys.stderr, flush=True)
        results[case] = study(case, options.replications)
    text = render(results, options.replications, time.perf_counter() - begin)
    print(text)
    if output := options.output or (OUTPUT if options.replications == 500 else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
