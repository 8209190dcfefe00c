"""How often 90% intervals hold the truth where rows depend on each other, and of robust fits:
`python -m benchmarks.other_errors`.
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
import optax
import scipy.signal
import scipy.stats
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import ISM, SandwichError, ScoreMatching, ScoreMatchingResult, dependent_rows, windham
from numpyro_score.losses import Loss

OUTPUT = Path(__file__).with_name("OTHER_ERRORS.md")
LEVEL = 0.9
FLAT = dist.ImproperUniform(constraints.real, (), ())
Change = Callable[[ScoreMatchingResult], ScoreMatchingResult]


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table for each parameter."""

    name: str
    model: Callable[..., Any]
    truth: dict[str, float]
    data: Callable[[np.random.Generator], tuple[np.ndarray, ...]]  # the model's arguments
    change: Change
    how: str
    loss: Loss | None = None


def normal(x: Any) -> None:
    """N(m/τ, 1/τ)."""
    m, tau = numpyro.param("m", 0.0), numpyro.param("tau", 1.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", m * x - 0.5 * tau * x**2)


def quartic(x: Any) -> None:
    """The law of a row alone, e^(m x − a x⁴)."""
    m, a = numpyro.param("m", 0.0), numpyro.param("a", 1.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", m * x - a * x**4)


def given_two(x: Any, before: Any, earlier: Any) -> None:
    """An autoregression of second order, each row given its past."""
    a, b, tau = (numpyro.param(k, v) for k, v in (("a", 0.0), ("b", 0.0), ("tau", 1.0)))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", x * (a * before + b * earlier) - 0.5 * tau * x**2)


def given_one(x: Any, before: Any) -> None:
    """One of first order, which the data are not."""
    a, tau = numpyro.param("a", 0.0), numpyro.param("tau", 1.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", a * x * before - 0.5 * tau * x**2)


def given_neighbours(x: Any, neighbours: Any) -> None:
    """A Gaussian field with precision τ(I − κ/4 · neighbours), each cell given those beside it."""
    k, tau = numpyro.param("k", 0.0), numpyro.param("tau", 1.0)
    with numpyro.plate("row", x.shape[0], dim=-2), numpyro.plate("column", x.shape[1], dim=-1):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", k * x * neighbours - 0.5 * tau * x**2)


def patients(groups: int) -> np.ndarray:
    """Five visits each."""
    return np.repeat(np.arange(groups), 5)


def visits(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, ...]:
    """Half of the variance is the patient's."""
    return ((rng.normal(size=groups)[patients(groups)] + rng.normal(size=5 * groups)) / 2**0.5,)


def quartic_visits(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, ...]:
    """Gaussian ranks that depend on each other, each with the law e^(−x⁴)."""
    grid = np.linspace(-2.5, 2.5, 4001)
    density = np.exp(-(grid**4))
    below = np.cumsum(density) - 0.5 * density
    return (np.interp(scipy.stats.norm.cdf(visits(rng, groups)[0]), below / density.sum(), grid),)


PHI = (0.5, -0.3)
VARIANCE = (1 - PHI[1]) / ((1 + PHI[1]) * ((1 - PHI[1]) ** 2 - PHI[0] ** 2))  # of the series
RHO = PHI[0] / (1 - PHI[1])  # its correlation with the row before


def series(rng: np.random.Generator, length: int, lags: int) -> tuple[np.ndarray, ...]:
    x = scipy.signal.lfilter([1.0], [1.0, -PHI[0], -PHI[1]], rng.normal(size=length + 200))[200 - lags :]
    return tuple(x[lags - i : len(x) - i] for i in range(lags + 1))


def in_a_scan(x: Any) -> None:
    """An autoregression of first order as one point, whose first value is from N(0, 1/τ)."""
    # Beyond 1 lies a law that is all but the same, with 1/a, run backwards.
    a = numpyro.param("a", 0.1, constraint=constraints.interval(-1.0, 1.0))
    tau = numpyro.param("tau", 1.0)

    def step(before: Any, value: Any) -> Any:
        value = numpyro.sample("x", FLAT, obs=value)
        numpyro.factor("energy", -0.5 * tau * (value - a * before) ** 2)
        return value, None

    scan(step, 0.0, x)


def from_zero(rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
    return (scipy.signal.lfilter([1.0], [1.0, -0.6], rng.normal(size=length)),)


KAPPA = 0.7


def torus(rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
    """By Fourier's transform of noise, exactly."""
    angles = 2 * np.pi * np.fft.fftfreq(size)
    precision = 1 - KAPPA / 2 * (np.cos(angles)[:, None] + np.cos(angles))
    x = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) / precision**0.5).real
    return x, sum(np.roll(x, shift, axis) for shift in (-1, 1) for axis in (0, 1)) / 4


def spoiled(rng: np.random.Generator, share: float) -> tuple[np.ndarray, ...]:
    """Standard normal rows, some of which are errors of measurement."""
    x = rng.normal(size=500)
    x[: int(share * len(x))] = 8.0 + rng.normal(size=int(share * len(x)))
    return (x,)


def robust(c: float) -> Change:
    return lambda fit: windham(fit, c)


def by_patient(groups: int) -> Change:
    return lambda fit: dependent_rows(fit, groups=patients(groups))


def by_lags(lags: Any) -> Change:
    return lambda fit: dependent_rows(fit, lags=lags)


STANDARD = {"m": 0.0, "tau": 1.0}
CASES = [
    *(
        Case(f"{n} groups of 5, {name}", model, truth, partial(data, groups=n), by_patient(n), "groups")
        for n, name, model, truth, data in (
            (60, "normal", normal, STANDARD, visits),
            (300, "normal", normal, STANDARD, visits),
            (60, "quartic", quartic, {"m": 0.0, "a": 1.0}, quartic_visits),
            (300, "quartic", quartic, {"m": 0.0, "a": 1.0}, quartic_visits),
        )
    ),
    Case(
        "AR(2), 500 rows, normal law of a row", normal, {"m": 0.0, "tau": 1 / VARIANCE},
        partial(series, length=500, lags=0), by_lags("auto"), "lags, chosen",
    ),
    Case(
        "AR(2), 2,000 rows, normal law of a row", normal, {"m": 0.0, "tau": 1 / VARIANCE},
        partial(series, length=2000, lags=0), by_lags("auto"), "lags, chosen",
    ),
    Case(
        "AR(2), 500 rows, given two rows", given_two, {"a": PHI[0], "b": PHI[1], "tau": 1.0},
        partial(series, length=500, lags=2), by_lags("auto"), "lags, chosen",
    ),
    Case(
        "AR(2), 500 rows, given one row", given_one,
        {"a": RHO / (VARIANCE * (1 - RHO**2)), "tau": 1 / (VARIANCE * (1 - RHO**2))},
        partial(series, length=500, lags=1), by_lags("auto"), "lags, chosen",
    ),
    Case(
        "AR(1), one point of 200 numbers in a scan", in_a_scan, {"a": 0.6, "tau": 1.0},
        partial(from_zero, length=200), by_lags("auto"), "lags, chosen", ISM(),
    ),
    Case(
        "Gaussian field, 64 × 64, given neighbours", given_neighbours, {"k": KAPPA, "tau": 1.0},
        partial(torus, size=64), by_lags({"row": 6, "column": 6}), "lags of 6",
    ),
    Case("normal, 500 rows", normal, STANDARD, partial(spoiled, share=0.0), robust(0.1), "windham, c = 0.1"),
    Case("normal, 500 rows", normal, STANDARD, partial(spoiled, share=0.0), robust(0.5), "windham, c = 0.5"),
    Case("normal, 500 rows, 2% at 8", normal, STANDARD, partial(spoiled, share=0.02), robust(0.5), "windham, c = 0.5"),
]  # fmt: skip


def study(case: Case, replications: int) -> dict[str, np.ndarray]:
    """By parameter: whether intervals hold the truth, without the change and with it, and the mean errors."""
    rng = np.random.default_rng([1, CASES.index(case)])
    optim = optax.lbfgs() if case.loss else None  # in a scan the objective is no quadratic
    sm = ScoreMatching(case.model, optim=optim, loss=case.loss, num_steps=30 if case.loss else 2000)
    z = scipy.stats.norm.ppf(0.5 + LEVEL / 2)
    found: dict[str, list[list[float]]] = {k: [] for k in case.truth}
    for _ in range(replications):
        fit = sm.run(jax.random.key(0), *map(jnp.asarray, case.data(rng)), progress_bar=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The errors are from the spread over")  # of series that end early
            try:
                fits = fit, case.change(fit)
            except SandwichError:  # at the end of a constraint
                continue
            se, table = fits[1].stderr(), fits[1].summary(level=LEVEL)
            ordinary = se if case.loss else fit.stderr()  # one point has no ordinary ones
        low, high = table.columns[3:5]
        for k, truth in case.truth.items():
            plain = abs(float(fit.estimates[k]) - truth) < z * float(ordinary[k])
            within = table.loc[k, low] < truth < table.loc[k, high]
            found[k].append([plain, within, float(se[k]), float(fits[1].estimates[k])])
    return {k: np.array(v) for k, v in found.items()}


def render(results: dict[Case, dict[str, np.ndarray]], replications: int, seconds: float) -> str:
    error = (LEVEL * (1 - LEVEL) / replications) ** 0.5
    lines = [
        "# Errors of rows that depend on each other, and of robust fits",
        "",
        f"How often {LEVEL:.0%} intervals hold the truth, over {replications} data sets ({LEVEL} ± {error:.3f} for an "
        "exact method), with the ordinary sandwich and with the errors named, the intervals of `summary`; and these "
        f"errors over the spread of the estimates. Written by `python -m benchmarks.other_errors` in {seconds:.0f} s.",
        "",
        "Fits at the end of a constraint, which have no errors, are left out: "
        f"{sum(replications - len(next(iter(r.values()))) for r in results.values())} of all. "
        "Each row given its past by the right model has gradients that are uncorrelated: nothing is lost or gained by "
        "lags. All else needs them.",
        "",
        machine.describe(),
        "",
        "| data and model | parameter | sandwich | errors | their coverage | over the spread |",
        "| --- " * 6 + "|",
    ]
    for case, by_site in results.items():
        for site, found in by_site.items():
            plain, changed, se, estimate = found.T
            ordinary = "–" if case.loss else f"{plain.mean():.3f}"
            lines.append(
                f"| {case.name} | {site} | {ordinary} | {case.how} | {changed.mean():.3f} "
                f"| {se.mean() / estimate.std(ddof=1):.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_errors", description=__doc__)
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
