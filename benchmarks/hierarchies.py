"""How often 90% intervals hold the hyperparameters of groups: `python -m benchmarks.hierarchies`.

Rows are normal around their group's effect, effects around `m` with deviation `s`. Effects and rows are drawn anew for
each data set, which the package fits as a user would.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import scipy.stats
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import SandwichError, ScoreMatching

OUTPUT = Path(__file__).with_name("HIERARCHIES.md")
LEVEL, M, S = 0.9, 0.5, 0.7
CASES = [(8, 100), (20, 100), (40, 100), (40, 10)]  # groups, and rows of each


def model(x: Any, group: Any, num_groups: int) -> None:
    """A loss that is the negative log likelihood, so that only the groups make standard errors hard."""
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    log_s = numpyro.sample("log_s", dist.Normal(0.0, 10.0))
    with numpyro.plate("groups", num_groups):
        mu = numpyro.sample("mu", dist.Normal(m, jnp.exp(log_s)))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * (x - mu[group]) ** 2)


def coverage(num_groups: int, size: int, num_sets: int) -> list[str]:
    """A line of the table."""
    sm = ScoreMatching(model, optim=optax.lbfgs(), num_steps=60)
    group = np.repeat(np.arange(num_groups), size)
    rng = np.random.default_rng([num_groups, size])
    z, held, refused = scipy.stats.norm.ppf(0.5 + LEVEL / 2), [], 0
    for i in range(num_sets):
        x = (M + S * rng.normal(size=num_groups))[group] + rng.normal(size=len(group))
        fit = sm.run(jax.random.key(i), x, group, num_groups=num_groups, progress_bar=False)
        try:
            errors = fit.stderr()
        except SandwichError:  # the scale has collapsed: there is no joint mode
            refused += 1
            continue
        away = {"m": M, "log_s": np.log(S)}
        held.append([abs(float(fit.estimates[k]) - v) <= z * float(errors[k]) for k, v in away.items()])
    shares = np.mean(held, axis=0)
    return [str(num_groups), str(size), f"{shares[0]:.3f}", f"{shares[1]:.3f}", f"{refused / num_sets:.3f}"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-sets", type=int, default=500)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    start, head = time.perf_counter(), ["groups", "rows of each", "m", "log s", "refused"]
    rows = [coverage(*case, options.num_sets) for case in CASES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    options.output.write_text(f"""# Intervals of hyperparameters

How often 90% intervals, estimate ± 1.645 `fit.stderr()`, hold the mean `m` and the log of the scale `s` of groups, over
{options.num_sets} data sets; one standard error of a share is {np.sqrt(0.09 / options.num_sets):.3f}. *Refused* is the
share of data sets without a joint mode, of which the package gives no error; the others are those counted. Written by
`python -m benchmarks.hierarchies` in {time.perf_counter() - start:.0f} s.

{machine.describe()}

{table}
""")


if __name__ == "__main__":
    main(sys.argv[1:])
