"""A pairwise model of 50 variables on a million rows, streamed: `python -m benchmarks.closed_form`.

f(x) = −½ xᵀKx with a symmetric K of 1,275 free elements, and data of a known K. The rows are made in batches from a
key, so that they never are in memory together. Writes CLOSED_FORM.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from benchmarks.machine import describe, load
from numpyro_score import ISM, GradientSpread, QuadraticLoss, generalized_bayes

D = 50
ROWS, COLS = np.tril_indices(D)


def model(x):
    k = numpyro.param("k", jnp.zeros(len(ROWS)))
    matrix = jnp.zeros((D, D)).at[ROWS, COLS].set(k).at[COLS, ROWS].set(k)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (D,)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x * (x @ matrix), axis=-1))


def truth() -> np.ndarray:
    """A sparse precision: each variable with its two neighbours and one further away; diagonally dominant."""
    k = 2.0 * np.eye(D)
    for i in range(D):
        for step, value in ((1, 0.5), (7, -0.3)):
            j = (i + step) % D
            k[i, j] = k[j, i] = value
    return k


@jax.jit
def draw(key: jax.Array, root: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(key, like.shape) @ root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=50_000)
    options = parser.parse_args()
    n, size, before = options.rows // options.batch, options.batch, load()
    k = truth()
    root = jnp.asarray(np.linalg.cholesky(np.linalg.inv(k)).T, jnp.float32)
    target, like, key = generalized_bayes(model, ISM()), jnp.zeros((size, D)), jax.random.key(0)

    def batches():
        return (draw(jax.random.fold_in(key, i), root, like) for i in range(n))

    start = time.perf_counter()
    quadratic = sum(QuadraticLoss.of(target, key, x) for x in batches())
    first = time.perf_counter() - start
    fit = quadratic.solve()
    solved = time.perf_counter() - start - first
    spread = sum(GradientSpread.of(target, fit.estimates, key, x) for x in batches())
    errors = quadratic.stderr(spread)["k"]
    second = time.perf_counter() - start - first - solved
    # `ru_maxrss` is in kilobytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    expected = f"1 ± {1 / np.sqrt(2 * len(ROWS)):.2f}"
    z = np.asarray((fit.estimates["k"] - k[ROWS, COLS]) / errors)
    text = f"""# A closed-form fit of a million rows

Written by `python -m benchmarks.closed_form`. Pairwise Gaussian model, D = {D}, {len(ROWS):,} parameters, ISM, float32;
{n * size:,} rows in {n} batches of {size:,}, made by key and never in memory together.

| | |
|---|---|
| first pass, the quadratic (with compilation and making the data) | {first:.1f} s |
| linear solve | {solved:.2f} s |
| second pass, the sandwich | {second:.1f} s |
| peak resident memory of the process | {peak:.2f} GiB |
| root mean square error of K̂ against the true K, in sandwich standard errors ({expected} expected) | \
{np.sqrt(np.mean(z**2)):.3f} |
| largest error, in sandwich standard errors ({len(z):,} elements) | {np.abs(z).max():.2f} |

{describe()}
- Processes that wanted a core before the run: {before}
"""
    (Path(__file__).parent / "CLOSED_FORM.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
