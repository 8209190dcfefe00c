"""Two moons: one energy network of every noise level as sampler, density and prior.

Rows are uniform on two half circles, with normal noise: their density is an integral over the arcs, known to any
accuracy. The network is fitted once by denoising at levels drawn from a whole range. Afterwards a diffusion is chosen,
and the fit draws new rows, gives the log density of held-out rows by the probability flow, and is the prior of a row of
which only a noisy first coordinate is seen.

Run it with `python examples/two_moons.py`; `--quick` takes few steps. Results go to examples/results, those of the
short run to examples/output.
"""

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints

from numpyro_score import ContinuousDSM, ScoreMatching, diffuse, flow_log_prob, posterior, preconditioned_energy

NOISE, SCALE = 0.1, 0.7  # of the rows around the arcs; of all numbers
SMALLEST, LARGEST = 0.02, 20.0
SEEN, SEEN_NOISE = 0.3, 0.1  # the first coordinate
WIDTH = 128
RNGS = nnx.Rngs(0)
NETWORK = nnx.Sequential(
    nnx.Linear(3, WIDTH, rngs=RNGS), nnx.swish, nnx.Linear(WIDTH, WIDTH, rngs=RNGS), nnx.swish,
    nnx.Linear(WIDTH, WIDTH, rngs=RNGS), nnx.swish, nnx.Linear(WIDTH, 1, rngs=RNGS),
)  # fmt: skip


def model(x, sigma=1.0):
    """Rows (n, 2), each with noise of its own standard deviation."""
    net = nnx_module("net", NETWORK)

    def network(u, noise):
        return net(jnp.column_stack([u, noise]))[:, 0]

    with numpyro.plate("rows", len(x), subsample_size=min(len(x), 500)):
        plane = dist.ImproperUniform(constraints.real_vector, (), (2,))
        x = numpyro.sample("x", plane, obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", preconditioned_energy(network, x, sigma, SCALE))


def first_coordinate(x, y=None):
    """What is seen of a row."""
    numpyro.sample("y", dist.Normal(x[0], SEEN_NOISE), obs=y)


def arcs(angle):
    """Points on both half circles, (2, n, 2), around the origin."""
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.stack([upper, np.array([1.0, 0.5]) - upper]) - np.array([0.5, 0.25])


def draw(rng, n):
    """Rows (n, 2)."""
    on_arc = arcs(np.pi * rng.uniform(size=n))[rng.integers(2, size=n), np.arange(n)]
    return jnp.asarray(on_arc + NOISE * rng.normal(size=(n, 2)), float)


@jax.jit
def log_density(x, sigma=SMALLEST):
    """Of the law of the rows with noise sigma: the mean over 2,000 points on the arcs, by the midpoint rule."""
    points = jnp.asarray(arcs((np.arange(1000) + 0.5) / 1000 * np.pi).reshape(-1, 2), float)
    variance = NOISE**2 + sigma**2

    def one(row):
        terms = -0.5 * jnp.sum((row - points) ** 2, axis=-1) / variance
        return jax.nn.logsumexp(terms) - jnp.log(2 * jnp.pi * variance * len(points))

    return jax.lax.map(one, x, batch_size=256)


def fit(key, x, num_steps):
    """The energy network, with an average of its parameters."""
    optim = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    loss = ContinuousDSM(SMALLEST, LARGEST, antithetic=True)
    return ScoreMatching(model, optim=optim, loss=loss, average=0.995, num_steps=num_steps).run(
        key, x, progress_bar=False
    )


def seen_exactly(rng, n):
    """Draws (n, 2) of a row given its first coordinate, from the law of the rows itself."""
    points = arcs((np.arange(1000) + 0.5) / 1000 * np.pi).reshape(-1, 2)
    variance = NOISE**2 + SMALLEST**2
    weights = np.exp(-0.5 * (SEEN - points[:, 0]) ** 2 / (variance + SEEN_NOISE**2))
    chosen = points[rng.choice(len(points), n, p=weights / weights.sum())]
    share = variance / (variance + SEEN_NOISE**2)
    first = chosen[:, 0] + share * (SEEN - chosen[:, 0]) + np.sqrt(share) * SEEN_NOISE * rng.normal(size=n)
    return np.stack([first, chosen[:, 1] + np.sqrt(variance) * rng.normal(size=n)], axis=-1)


def upper(x):
    """Which rows (n, 2) are nearer to the upper arc."""
    x = np.asarray(x)
    circles = [abs(np.hypot(x[:, 0] - sign * 0.5, x[:, 1] - sign * 0.25) - 1) for sign in (-1, 1)]
    return circles[0] < circles[1]


def log_evidence():
    """Of the first coordinate, exactly."""
    points = arcs((np.arange(1000) + 0.5) / 1000 * np.pi).reshape(-1, 2)
    spread = np.sqrt(NOISE**2 + SMALLEST**2 + SEEN_NOISE**2)
    return float(np.log(np.mean(np.exp(dist.Normal(points[:, 0], spread).log_prob(SEEN)))))


@matplotlib.rc_context({"font.size": 12})
def picture(x, found, draws, given, path, num_points):
    """Data, draws, both densities, and the posterior."""
    figure, axes = plt.subplots(1, 5, figsize=(20, 3.9), sharex=True, sharey=True, layout="constrained")
    across, up = np.linspace(-2, 2, num_points), np.linspace(-1.4, 1.4, num_points)
    grid = jnp.asarray(np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2), float)
    for a, rows, title in ((axes[0], x, "data"), (axes[1], draws, "drawn in 32 calls")):
        a.scatter(*np.asarray(rows)[:3000].T, s=3, alpha=0.4, color="tab:green", linewidths=0)
        a.set_title(title)
    for a, value, title in (
        (axes[2], log_density(grid), "density"),
        (axes[3], flow_log_prob(found, grid).value, "density by the flow"),
    ):
        a.pcolormesh(across, up, np.exp(np.asarray(value)).reshape(num_points, -1), cmap="Blues", vmin=0, vmax=0.85)
        a.set_title(title)
    axes[4].axvspan(SEEN - 2 * SEEN_NOISE, SEEN + 2 * SEEN_NOISE, color="tab:orange", alpha=0.25, linewidth=0)
    axes[4].scatter(*np.asarray(given)[:3000].T, s=3, alpha=0.4, color="tab:green", linewidths=0)
    axes[4].set_title(f"given a first coordinate of {SEEN} ± {SEEN_NOISE}")
    for a in axes:
        a.set(xlim=(-2, 2), ylim=(-1.4, 1.4), aspect="equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "flax", "diffrax"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    num_steps, n, num_points = (1000, 500, 30) if quick else (10_000, 2000, 100)
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 6)
    x, held_out = draw(rng, 20_000), draw(rng, n)
    found = fit(keys[0], x, num_steps)
    fitted = time.perf_counter() - begin

    truth, by_flow = log_density(held_out), flow_log_prob(found, held_out)
    behind = np.asarray(truth - by_flow.value)
    draws = diffuse(found, keys[1], 5000).draws
    table = ["| posterior by | log evidence | share of the upper arc | effective draws |", "|---|---|---|---|"]
    on_upper = upper(seen_exactly(rng, 100_000)).mean()
    table.append(f"| the law itself | {log_evidence():.3f} | {on_upper:.3f} | |")
    shown = None
    for method, key in zip(("tds", "smc", "guided"), keys[3:], strict=True):
        seen = posterior(found, first_coordinate, key, jnp.array(SEEN), method=method)
        evidence = "" if seen.biased else f"{seen.log_evidence:.3f} ± {seen.log_evidence_stderr:.3f}"
        share = np.exp(seen.log_weights) @ upper(seen.draws)
        table.append(f"| {method} | {evidence} | {share:.3f} | {seen.ess:.0f} of {len(seen.log_weights)} |")
        shown = seen if shown is None else shown
    given = shown.resample(keys[2], 3000)
    gap = f"{behind.mean():.3f} ± {behind.std(ddof=1) / n**0.5:.3f}"
    values = {"the law itself": truth, "the fit by its probability flow": by_flow.value}
    means = ", ".join(f"{name} {float(value.mean()):.3f}" for name, value in values.items())
    lines = [
        "# Two moons", "",
        f"`examples/two_moons.py`: {len(x)} rows, {num_steps} steps of 500 rows by "
        f"`ContinuousDSM({SMALLEST}, {LARGEST})`, {fitted:.0f} seconds.", "",
        f"Log density of {n} held-out rows with noise {SMALLEST}, in nats: {means}, behind by {gap}; largest estimated "
        f"error of the solver {float(by_flow.solver_error.max()):.1g}.", "",
        f"Log density of 5,000 draws in 32 calls under the law itself: {float(log_density(draws).mean()):.3f}.", "",
        f"Rows given a first coordinate of {SEEN} ± {SEEN_NOISE}. Smoothing by little noise does not tell a score what "
        "the two arcs weigh, so that the energy's own density, which \"smc\" has as its target, has them wrong; what "
        "the sampler draws, the target of \"tds\", has their weights from more noise.", "",
        *table, "",
        "![Data, draws, densities and a posterior](two_moons.png)", "",
    ]  # fmt: skip
    picture(x, found, draws, given, output / "two_moons.png", num_points)
    lines += [f"{time.perf_counter() - begin:.0f} seconds in all, on {machine()}.", ""]
    (output / "two_moons.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
