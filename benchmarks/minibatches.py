"""SGLD on minibatches against a closed-form posterior: `python -m benchmarks.minibatches`. Writes MINIBATCHES.md.

A linear regression on 100,000 rows, with 1000 in each step, by one long chain and by many vectorised short ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from benchmarks.machine import describe
from numpyro_score import SGLD

STEP_SIZE = 0.08  # over the number of rows, which is nearly the posterior precision
RUNS = [(1, 150_000), (200, 1000)]  # chains and draws of each


def regression(x: jax.Array, t: jax.Array) -> None:
    w = numpyro.sample("w", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=len(x) // 100):
        x, t = numpyro.subsample(x, event_dim=1), numpyro.subsample(t, event_dim=0)
        numpyro.sample("t", dist.Normal(x @ w, 1.0), obs=t)


def posterior(x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviations, in float64."""
    precision = x.T @ x + 0.01 * np.eye(3)
    return np.linalg.solve(precision, x.T @ t), np.sqrt(np.diag(np.linalg.inv(precision)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minibatches", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32).astype(float)
    t = (x @ [1.0, -0.5, 2.0] + rng.normal(size=rows)).astype(np.float32).astype(float)
    mean, sd = posterior(x, t)
    lines = []
    for chains, draws in RUNS:
        kernel = SGLD(regression, step_size=STEP_SIZE / rows, center={"w": mean})
        mcmc = MCMC(
            kernel, num_warmup=100, num_samples=draws, num_chains=chains, chain_method="vectorized",
            progress_bar=False, jit_model_args=True,
        )  # fmt: skip
        start = jnp.asarray(mean, jnp.float32) * jnp.ones((chains, 1))
        begin = time.perf_counter()
        mcmc.run(
            jax.random.key(0), jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32),
            init_params={"w": start if chains > 1 else start[0]},
        )  # fmt: skip
        w = np.asarray(mcmc.get_samples()["w"], float)
        seconds = time.perf_counter() - begin
        off = ", ".join(f"{100 * r:+.4f}%" for r in w.mean(0) / mean - 1)
        spread = ", ".join(f"{r:.3f}" for r in w.std(0) / sd)
        lines.append(f"| {chains} | {draws:,} | {off} | {spread} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    text = f"""# SGLD on minibatches of one hundredth

Written by `python -m benchmarks.minibatches`. A Bayesian linear regression with three coefficients, {rows:,} rows,
{rows // 100:,} drawn anew in each step; control variates at the posterior mean, step size {STEP_SIZE}/{rows:,},
float32. Without noise in the gradients the standard deviations would be 1/√(1 − {STEP_SIZE / 2:.2f}) =
{1 / np.sqrt(1 - STEP_SIZE / 2):.3f} times those of the posterior; they are known to about 0.6%.

| chains | draws of each | means, off by | standard deviations, over the posterior's | seconds |
|---|---|---|---|---|
{table}

{describe()}
"""
    (Path(__file__).parent / "MINIBATCHES.md").write_text(text)


if __name__ == "__main__":
    main()
