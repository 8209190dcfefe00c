"""Bias, spread and coverage of fits of rows with missing cells: `python -m benchmarks.missing_cells`."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import ISM, MissingCells, PseudoLikelihood, SandwichError, ScoreMatching
from numpyro_score.losses import Loss

OUTPUT = Path(__file__).with_name("MISSING_CELLS.md")
FULL = 50
DIM, ROWS, SHARE = 5, 500, 0.2
Z = scipy.stats.norm.ppf(0.95)
PAIRS = np.triu_indices(DIM, 1)


def truth() -> np.ndarray:
    """The precision of a chain of five normal columns, with one edge across."""
    k = 1.5 * np.eye(DIM) + 0.5 * (np.eye(DIM, k=1) + np.eye(DIM, k=-1))
    k[0, 3] = k[3, 0] = -0.4
    return k


def graph(x: Any, used: Any, tails: float = 0.0, support: Any = constraints.real_vector) -> None:
    """A normal law, with tails x⁴ of a given weight in each column, or a part of it; of spins a pairwise law."""
    d, o = numpyro.param("d", jnp.ones(DIM)), numpyro.param("o", jnp.zeros(len(PAIRS[0])))
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=used):
        x = numpyro.sample("x", dist.ImproperUniform(support, (), (DIM,)), obs=x)
        pairs = x[:, PAIRS[0]] * x[:, PAIRS[1]]
        numpyro.factor("energy", -0.5 * x**2 @ d - pairs @ o - tails * jnp.sum(x**4, axis=-1))


def normal_rows(rng: np.random.Generator, n: int = ROWS) -> np.ndarray:
    return rng.multivariate_normal(np.zeros(DIM), np.linalg.inv(truth()), n)


def rows_with_tails(rng: np.random.Generator) -> np.ndarray:
    """By rejection from the normal law."""
    x = normal_rows(rng, 40 * ROWS)
    return x[rng.uniform(size=len(x)) < np.exp(-0.1 * np.sum(x**4, axis=1))][:ROWS]


def positive_rows(rng: np.random.Generator) -> np.ndarray:
    """Likewise, where all numbers are positive: about one in a hundred."""
    x = normal_rows(rng, 400 * ROWS)
    return x[(x > 0).all(axis=1)][:ROWS]


def spin_rows(rng: np.random.Generator) -> np.ndarray:
    """By all states."""
    states = np.array(list(itertools.product([0.0, 1.0], repeat=DIM)))
    weight = np.exp(-0.5 * np.einsum("ni,ij,nj->n", states, truth(), states))
    return states[rng.choice(len(states), ROWS, p=weight / weight.sum())]


class Law(NamedTuple):
    """What the data are of."""

    model: Any
    rows: Any
    loss: Loss = ISM()


LAWS = {
    "normal graph": Law(graph, normal_rows),
    "graph with quartic tails": Law(partial(graph, tails=0.1), rows_with_tails),
    "normal graph, positive numbers": Law(
        partial(graph, support=constraints.independent(constraints.positive, 1)), positive_rows
    ),
    "five spins": Law(partial(graph, support=constraints.boolean), spin_rows, PseudoLikelihood()),
}
MOST = 32
ALL, WHOLE, SEEN = "all cells", "whole rows alone", "MissingCells, {} draws"


def study(law: Law, replications: int) -> dict[str, np.ndarray]:
    """Estimates and errors, (R, 2, P), by way of fitting."""
    losses = {ALL: law.loss, WHOLE: law.loss, **{SEEN.format(k): MissingCells(law.loss, k) for k in (8, MOST)}}
    rng, found = np.random.default_rng(3), {k: [] for k in losses}
    fitters = {k: ScoreMatching(law.model, loss=loss, num_steps=300) for k, loss in losses.items()}
    for _ in range(replications):
        x = law.rows(rng)
        missing = rng.uniform(size=x.shape) < SHARE
        missing[missing.all(axis=1), 0] = False
        holes, everywhere = np.where(missing, np.nan, x), np.full(ROWS, True)
        for name, sm in fitters.items():
            given = {ALL: (x, everywhere), WHOLE: (x, ~missing.any(axis=1))}.get(name, (holes, everywhere))
            fit = sm.run(jax.random.key(0), jnp.asarray(given[0], jnp.float32), given[1], progress_bar=False)
            try:
                errors = fit.stderr()
            except SandwichError:  # not curved upwards at the draws of one key
                errors = jax.tree.map(lambda v: np.full(np.shape(v), np.nan), dict(fit.estimates))
            found[name].append([np.concatenate([v["d"], v["o"]]) for v in (fit.estimates, errors)])
    return {k: np.array(v) for k, v in found.items()}


def render(results: dict[str, dict[str, np.ndarray]], replications: int, seconds: float) -> str:
    theta = np.concatenate([np.diag(truth()), truth()[PAIRS]])
    lines = [
        "# Rows with missing cells",
        "",
        f"{ROWS} rows of {DIM} columns, a fifth of whose cells are missing at random, in {replications} data sets: the "
        f"{len(theta)} numbers of the precision, by the root mean square over them. The spread is over that of the fit "
        "to all cells. The bias is in standard errors, and as large as the noise of its estimate, "
        f"{replications**-0.5:.2f}, where there is none; beside it that of the difference from {MOST} draws, whose "
        "noise is far smaller. Coverage is of 90% intervals, where there are errors. Written by "
        f"`python -m benchmarks.missing_cells` in {seconds:.0f} s.",
        "",
        machine.describe(),
        "",
        "| law | fit | spread | bias | beside the most draws | coverage | no errors |",
        "| --- " * 7 + "|",
    ]
    for law, found in results.items():
        best = found[ALL][:, 0].std(axis=0, ddof=1)
        many = found[SEEN.format(MOST)][:, 0]
        for name, values in found.items():
            estimates, errors = values[:, 0], values[:, 1]
            spread = estimates.std(axis=0, ddof=1)
            bias = (estimates.mean(axis=0) - theta) / spread
            beside = (estimates - many).mean(axis=0) / spread
            known = np.isfinite(errors).all(axis=1)
            covered = (np.abs(estimates - theta) < Z * errors)[known]
            of_draws = f"{_rms(beside):.3f}" if name not in (ALL, WHOLE) else "–"
            lines.append(
                f"| {law} | {name} | {_rms(spread / best):.2f} | {_rms(bias):.2f} | {of_draws} | {covered.mean():.3f} "
                f"| {int((~known).sum())} |"
            )
    return "\n".join(lines) + "\n"


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.missing_cells", description=__doc__)
    parser.add_argument("--replications", type=int, default=FULL)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", message="The loss was still falling")
    begin, results = time.perf_counter(), {}
    for name, law in LAWS.items():
        print(name, file=sys.stderr, flush=True)
        results[name] = study(law, options.replications)
    text = render(results, options.replications, time.perf_counter() - begin)
    print(text)
    if output := options.output or (OUTPUT if options.replications == FULL else None):
        output.write_text(text)


if __name__ == "__main__":
    main()
