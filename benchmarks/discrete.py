"""How often 90% intervals of discrete fits hold the truth, and how wide they are: `python -m benchmarks.discrete`.

Each data set is independent draws of an enumerated law. All are fitted side by side, by Newton steps on the package's
losses, with the sandwich of the same losses; the first is also fitted by `ScoreMatching` with `fit.stderr()`, and must
agree. Widths are beside those of maximum likelihood, whose information matrix is summed over all points.
"""

from __future__ import annotations

import argparse
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
import optax
import scipy.stats
from jax.flatten_util import ravel_pytree
from jax.scipy.special import gammaln
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import DiscreteFisher, Energy, PairLikelihood, PseudoLikelihood, RatioMatching, ScoreMatching
from numpyro_score.losses import Loss, row_losses

OUTPUT = Path(__file__).with_name("DISCRETE.md")
LEVEL, STEPS = 0.9, 8


@dataclass(frozen=True, eq=False)
class Case:
    """A law of rows, and how it is fitted."""

    name: str
    model: Callable[..., Any]
    truth: dict[str, float]
    points: np.ndarray  # of the support, all that have mass
    losses: dict[str, Loss]
    rows: int = 1000


def edges(rows: int, columns: int) -> np.ndarray:
    """Of a square lattice with open ends, (E, 2)."""
    index = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    return np.concatenate([np.stack([a.ravel(), b.ravel()], -1) for a, b in pairs])


def ising(x: Any) -> None:
    """Bits on a 4 × 4 lattice: f = h Σ x_i + j Σ x_i x_k over neighbours."""
    j, h = numpyro.param("j", 0.0), numpyro.param("h", 0.0)
    first, second = edges(4, 4).T
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), (16,)), obs=x)
        numpyro.factor("energy", h * x.sum(-1) + j * (x[:, first] * x[:, second]).sum(-1))


def potts(x: Any) -> None:
    """Three colours on a 3 × 3 lattice: f = h Σ 1[x_i = 0] + j Σ 1[x_i = x_k]."""
    j, h = numpyro.param("j", 0.0), numpyro.param("h", 0.0)
    first, second = edges(3, 3).T
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.integer_interval(0, 2), (), (9,)), obs=x)
        numpyro.factor("energy", h * (x == 0).sum(-1) + j * (x[:, first] == x[:, second]).sum(-1))


def com_poisson(x: Any) -> None:
    """Counts: f = x log λ − ν log x!."""
    log_rate, nu = numpyro.param("log_rate", 0.0), numpyro.param("nu", 1.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.nonnegative_integer, (), ()), obs=x)
        numpyro.factor("energy", x * log_rate - nu * gammaln(x + 1.0))


def negative_binomial(x: Any) -> None:
    """Counts with more spread than their mean, without their normaliser."""
    mean, size = numpyro.param("log_mean", 2.0), numpyro.param("log_size", 0.7)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.nonnegative_integer, (), ()), obs=x)
        f = gammaln(x + jnp.exp(size)) - gammaln(x + 1.0)
        numpyro.factor("energy", f + x * (mean - jnp.logaddexp(mean, size)))


def grid(size: int, dim: int) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(size**dim), (size,) * dim), axis=-1)


CASES = [
    Case(
        "Ising 4 × 4", ising, {"h": -0.5, "j": 0.6}, grid(2, 16),
        {"PseudoLikelihood": PseudoLikelihood(), "RatioMatching": RatioMatching(), "DiscreteFisher": DiscreteFisher()},
    ),
    Case(
        "Potts 3 × 3", potts, {"h": 0.3, "j": 0.4}, grid(3, 9),
        {
            "PseudoLikelihood": PseudoLikelihood(), "DiscreteFisher": DiscreteFisher(),
            "DiscreteFisher, path": DiscreteFisher("path"), "DiscreteFisher, complete": DiscreteFisher("complete"),
        },
    ),
    Case(
        "Conway–Maxwell–Poisson", com_poisson, {"log_rate": 1.0, "nu": 1.2}, np.arange(60),
        {
            "PseudoLikelihood, max_count=60": PseudoLikelihood(max_count=60), "PairLikelihood": PairLikelihood(),
            "DiscreteFisher": DiscreteFisher(),
        },
    ),
    Case(
        "negative binomial", negative_binomial, {"log_mean": 2.0, "log_size": 0.7}, np.arange(400),
        {"PairLikelihood": PairLikelihood(), "DiscreteFisher": DiscreteFisher()},
    ),
]  # fmt: skip


def law(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of all points, and standard errors of maximum likelihood for the parameters in order."""
    flat, unravel = ravel_pytree({k: jnp.asarray(v) for k, v in case.truth.items()})
    rows = jnp.asarray(case.points, float).reshape(len(case.points), -1)

    @jax.jit
    def of(flat: Any, points: Any, rows: Any) -> Any:  # arguments, as XLA would work out what is constant
        return Energy(case.model, unravel(flat), points).log_density(rows)

    arguments = flat, case.points, rows
    f, slope = (np.asarray(v, np.float64) for v in (of(*arguments), jax.jacfwd(of)(*arguments)))
    p = np.exp(f - f.max())
    p /= p.sum()
    centred = slope - p @ slope
    information = centred.T @ (p[:, None] * centred)
    return p, np.sqrt(np.diag(np.linalg.inv(information)) / case.rows)


def run(case: Case, loss: Loss, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates and standard errors of data sets, (num, parameters) each."""
    p, _ = law(case)
    flat, unravel = ravel_pytree({k: jnp.asarray(v) for k, v in case.truth.items()})

    def fit(rows: Any) -> Any:
        def losses(theta: Any) -> Any:
            return row_losses(loss, Energy(case.model, unravel(theta), rows), jax.random.key(0))[0]

        def total(theta: Any) -> Any:
            return losses(theta).sum()

        def step(_: int, theta: Any) -> Any:
            return theta - jnp.linalg.solve(jax.hessian(total)(theta), jax.grad(total)(theta))

        theta = jax.lax.fori_loop(0, STEPS, step, flat)  # from nearby, as Newton's method needs it
        g = jax.jacfwd(losses)(theta)
        half = jnp.linalg.solve(jax.hessian(total)(theta), (g - g.mean(0)).T)
        return theta, jnp.sqrt(jnp.diag(half @ half.T) * len(rows) / (len(rows) - 1))

    at = np.stack([np.random.default_rng(seed).choice(len(p), case.rows, p=p) for seed in range(num)])
    rows = jnp.asarray(case.points)[at]
    found = jax.jit(lambda rows: jax.lax.map(fit, rows, batch_size=10))(rows)
    estimates, errors = (np.asarray(v, np.float64) for v in found)
    first = ScoreMatching(case.model, loss=loss, optim=optax.lbfgs(), num_steps=60).run(
        None, rows[0], progress_bar=False
    )
    stderr = first.stderr()
    for k, name in enumerate(sorted(case.truth)):
        assert abs(first.estimates[name] - estimates[0, k]) < 0.05 * errors[0, k]
        assert abs(stderr[name] / errors[0, k] - 1) < 0.02
    return estimates, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-sets", type=int, default=500)
    parser.add_argument("--laws", nargs="+", choices=[c.name for c in CASES], help="others stay as OUTPUT has them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    begin, lines = time.perf_counter(), []
    quantile = scipy.stats.norm.ppf(0.5 + LEVEL / 2)
    known = arguments.output.read_text().splitlines() if arguments.laws and arguments.output.exists() else []
    for case in CASES:
        if arguments.laws and case.name not in arguments.laws:
            lines += [line for line in known if line.startswith(f"| {case.name} |")]
            continue
        _, best = law(case)
        for name, loss in case.losses.items():
            estimates, errors = run(case, loss, arguments.data_sets)
            for k, parameter in enumerate(sorted(case.truth)):
                away = estimates[:, k] - case.truth[parameter]
                covered = np.mean(np.abs(away) < quantile * errors[:, k])
                bias = away.mean() / away.std() * np.sqrt(len(away))
                lines.append(
                    f"| {case.name} | {name} | {parameter} | {covered:.3f} | {away.std() / best[k]:.2f} | "
                    f"{np.sqrt(np.mean(errors[:, k] ** 2)) / away.std():.2f} | {bias:.1f} |"
                )
                print(lines[-1], flush=True)
    seconds = time.perf_counter() - begin
    chance = np.sqrt(LEVEL * (1 - LEVEL) / arguments.data_sets)
    header = [
        "# Discrete fits",
        "",
        f"How often 90% intervals, estimate ± 1.645 standard errors, hold the truth over {arguments.data_sets} data "
        f"sets of 1,000 independent rows. An exact method has 0.9 ± {chance:.3f} by chance (one standard error). "
        f"Written by `python -m benchmarks.discrete` in {seconds:.0f} s"
        + (f", for {', '.join(arguments.laws)}; the others are of an earlier run." if arguments.laws else "."),
        "",
        "- Fits are Newton steps on the package's losses, and errors the sandwich of these; the first data set of each "
        "line is fitted by `ScoreMatching` too, and agrees with `fit.stderr()`.",
        "- *spread*: standard deviation of the estimates, over that of maximum likelihood by its information matrix.",
        "- *reported*: root mean square of the standard errors, over the standard deviation of the estimates.",
        "- *bias*: the mean error, in standard errors of this mean.",
        "",
        machine.describe(),
        "",
        "| law | loss | parameter | coverage | spread | reported | bias |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    arguments.output.write_text("\n".join([*header, *lines]) + "\n")


if __name__ == "__main__":
    main()
