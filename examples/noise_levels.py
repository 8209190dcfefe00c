"""Two far modes: what score matching cannot see, and what noise levels do about it.

Data from ⅕ N((-5, -5), I) + ⅘ N((5, 5), I). The score at the data says nothing about the weights ⅕ and ⅘, nor about
the score in the empty space between. So an energy network fitted at the data alone is wrong there, and Langevin
dynamics shares its draws between the modes by where it starts. Noise fills the space: the same network fitted at many
noise levels, and annealed from the largest to the smallest, gets the weights right [Song & Ermon 2019].

Run it with `python examples/noise_levels.py`; `--quick` takes few steps. Results go to examples/results, those of the
short run to examples/output.
"""

import argparse
import os
import platform
import time
from functools import partial
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
from flax import nnx
from matplotlib.colors import LinearSegmentedColormap
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints

from numpyro_score import DSM, ISM, Energy, ScoreMatching, geometric_levels


def model(x, sigma=0.0):
    """Rows (n, 2) with noise of standard deviation sigma, of each row or of all; 0 is the data themselves."""
    net = nnx_module("net", NETWORK)
    with numpyro.plate("rows", len(x), subsample_size=min(len(x), 500)):
        plane = dist.ImproperUniform(constraints.real_vector, (), (2,))
        x = numpyro.sample("x", plane, obs=numpyro.subsample(x, event_dim=1))
        spread = jnp.sqrt(1 + sigma**2) * jnp.ones(len(x))  # of one mode with noise
        u = x / spread[:, None]  # makes the score, like the true one, of the order of 1 / spread
        value = net(jnp.column_stack([u, jnp.log(spread)]))[:, 0]
        numpyro.factor("energy", value - 0.5 * jnp.sum(u**2, axis=-1))


WIDTH = 64
RNGS = nnx.Rngs(0)
NETWORK = nnx.Sequential(
    nnx.Linear(3, WIDTH, rngs=RNGS), nnx.swish, nnx.Linear(WIDTH, WIDTH, rngs=RNGS), nnx.swish,
    nnx.Linear(WIDTH, 1, rngs=RNGS),
)  # fmt: skip
LEVELS = geometric_levels(20.0, 0.3, 12)
ERROR = LinearSegmentedColormap.from_list("error", ["0.1", "tab:red", "orange"])
HALFWAY = 5  # the level of 3.0, at which the modes have just parted
WEIGHTS, CENTRES = np.array([0.2, 0.8]), np.array([[-5.0, -5.0], [5.0, 5.0]])


def mixture(x, sigma=0.0):
    """What the network is to find: the same model, with the density that the data really have at the noise sigma."""
    modes = dist.Normal(CENTRES, jnp.sqrt(1 + sigma**2)).to_event(1)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=WEIGHTS), modes), obs=x)


def draw(rng, n, sigma=0.0):
    """Rows (n, 2) of the mixture."""
    return jnp.asarray(CENTRES[rng.choice(2, n, p=WEIGHTS)] + rng.normal(size=(n, 2)) * (1 + sigma**2) ** 0.5, float)


@partial(jax.jit, static_argnames="num_steps")
def langevin(energy, x, key, sigmas, step_sizes, num_steps):
    """Rows x (n, 2) after x ← x + h s(x) + √(2h) z, `num_steps` times at each noise level in turn: (levels, n, 2)."""

    def at_level(x, level):
        key, sigma, h = level
        noisy = energy.bind(sigma=sigma)

        def step(x, key):
            return x + h * noisy.score(x) + jnp.sqrt(2 * h) * jax.random.normal(key, x.shape), None

        x, _ = jax.lax.scan(step, x, jax.random.split(key, num_steps))
        return x, x

    return jax.lax.scan(at_level, x, (jax.random.split(key, len(sigmas)), sigmas, step_sizes))[1]


def fit_both(key, x, num_steps):
    """The energies fitted at the data alone and at many levels, by the same number of steps."""
    losses = {"data alone": ISM(), "many levels": DSM(LEVELS, antithetic=True)}
    return {
        name: ScoreMatching(model, loss=loss, num_steps=num_steps).run(key, x, progress_bar=False).energy
        for name, loss in losses.items()
    }


@jax.jit
def relative_error(energy, truth, x, sigma):
    """Root mean square of the score's error at the rows x, over that of the true score."""
    expected = truth.bind(sigma=sigma).score(x)
    return jnp.sqrt(jnp.mean((energy.bind(sigma=sigma).score(x) - expected) ** 2) / jnp.mean(expected**2))


def errors_by_level(rng, energies, truth) -> list[str]:
    """Lines of Markdown: relative errors of the scores where the noisy data lie, and between the modes."""
    between = jnp.asarray(rng.uniform(-3.0, 3.0, (2000, 2)), float)
    lines = ["| fit | noise σ | at the data with this noise | between the modes |", "|---|---|---|---|"]
    for name, sigmas in {"data alone": (0.0,), "many levels": LEVELS[::2] + LEVELS[-1:]}.items():
        for sigma in sigmas:
            at_data, elsewhere = (
                relative_error(energies[name], truth, x, jnp.array(sigma)) for x in (draw(rng, 2000, sigma), between)
            )
            lines.append(f"| {name} | {sigma:.2f} | {at_data:.3f} | {elsewhere:.3f} |")
    return lines


def sample(rng, key, energies, truth, n, num_steps):
    """Draws (levels, n, 2) by each way."""
    wide = jnp.asarray(rng.uniform(-8.0, 8.0, (n, 2)), float)
    noise = LEVELS[0] * jax.random.normal(key, (n, 2))
    # Plain dynamics take as many steps as all levels together.
    plain = dict(sigmas=jnp.zeros(len(LEVELS)), step_sizes=jnp.full(len(LEVELS), 0.05), num_steps=num_steps)
    annealed = dict(sigmas=jnp.array(LEVELS), step_sizes=0.1 * jnp.array(LEVELS) ** 2, num_steps=num_steps)
    return {
        "Langevin, fit at the data alone": langevin(energies["data alone"], wide, key, **plain),
        "Langevin, exact score": langevin(truth, wide, key, **plain),
        "annealed, fit at many levels": langevin(energies["many levels"], noise, key, **annealed),
        "annealed, exact scores": langevin(truth, noise, key, **annealed),
    }


def shares(x, sigma=0.0) -> np.ndarray:
    """The shares of rows that belong to the lesser mode, to the greater, and to none: more than 4 spreads from both."""
    distance = np.linalg.norm(np.asarray(x)[:, None] - CENTRES, axis=-1)
    owner = np.where(distance.min(axis=1) > 4 * (1 + sigma**2) ** 0.5, 2, distance.argmin(axis=1))
    return np.bincount(owner, minlength=3) / len(x)


def table_of_shares(draws, x) -> list[str]:
    """Lines of Markdown: where the draws are, with standard errors."""
    lines = ["| draws | lesser mode | greater mode | elsewhere |", "|---|---|---|---|", "| truth | 0.200 | 0.800 | 0 |"]
    for name, rows in {"the data": x, **{name: levels[-1] for name, levels in draws.items()}}.items():
        cells = [f"{p:.3f} ± {(p * (1 - p) / len(rows)) ** 0.5:.3f}" for p in shares(rows)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def field(axes, energy, truth, sigma, title):
    """Directions of the score on a grid, coloured by its relative error, over the density."""
    side = np.linspace(-11, 11, 141)
    fine = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1), float)
    grid = fine[5::10, 5::10]
    truth, energy = truth.bind(sigma=jnp.array(sigma)), energy.bind(sigma=jnp.array(sigma))
    density = jnp.exp(truth.log_density(fine))
    axes.contourf(side, side, density / density.max(), levels=np.linspace(0.02, 1.0, 12), cmap="Blues", alpha=0.7)
    expected, found = truth.score(grid), energy.score(grid)
    error = jnp.linalg.norm(found - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    unit = found / jnp.linalg.norm(found, axis=-1, keepdims=True)
    arrows = axes.quiver(
        grid[..., 0], grid[..., 1], unit[..., 0], unit[..., 1], error, cmap=ERROR, clim=(0, 1), pivot="mid",
        scale=19, width=0.006,
    )  # fmt: skip
    axes.set_title(title)
    return arrows


@matplotlib.rc_context({"font.size": 12})
def picture(energies, truth, draws, x, path):
    """Above the score fields, below the draws."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 8.8), sharex=True, sharey=True, layout="constrained")
    many, halfway, last = energies["many levels"], LEVELS[HALFWAY], LEVELS[-1]
    for a, energy, sigma, title in zip(
        axes[0],
        (truth, energies["data alone"], many, many),
        (0.0, 0.0, halfway, last),
        ("the true score", "fitted at the data alone", *(f"many levels, at σ = {s:.1f}" for s in (halfway, last))),
        strict=True,
    ):
        arrows = field(a, energy, truth, sigma, title)
    figure.colorbar(arrows, ax=axes, extend="max", label="relative error of the score", aspect=40)
    plain, annealed = draws["Langevin, fit at the data alone"], draws["annealed, fit at many levels"]
    for a, rows, sigma, title in zip(
        axes[1],
        (x, plain[-1], annealed[HALFWAY], annealed[-1]),
        (0.0, 0.0, halfway, last),
        ("data", "Langevin from a wide start", f"annealed, at σ = {halfway:.1f}", f"annealed to σ = {last:.1f}"),
        strict=True,
    ):
        a.scatter(*rows[:2000].T, s=4, alpha=0.35, color="tab:green", linewidths=0)
        a.set(title=title, xlim=(-11, 11), ylim=(-11, 11), aspect="equal")
        *modes, elsewhere = shares(rows, sigma)
        for sign, p in zip((-1, 1), modes, strict=True):
            a.text(8.8 * sign, 1.2 * sign, f"{p:.2f}", ha="center", va="center", fontsize=16)
        if elsewhere > 0.01:
            a.text(-10.3, 9.5, f"elsewhere {elsewhere:.2f}", va="center", fontsize=16)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "flax"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    fit_steps, level_steps, n = (800, 50, 1000) if quick else (8000, 500, 10_000)
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0))
    x = draw(rng, 20_000)
    print(f"{len(x)} rows, {len(LEVELS)} levels; device {jax.devices()[0].device_kind}", flush=True)

    truth = Energy(mixture, {}, x)
    energies = fit_both(keys[0], x, fit_steps)
    draws = sample(rng, keys[1], energies, truth, n, level_steps)
    lines = [
        "# Two far modes and many noise levels", "",
        f"`examples/noise_levels.py`: {len(x)} rows of ⅕ N((−5, −5), I) + ⅘ N((5, 5), I), {fit_steps} steps of 500 "
        f"rows for each fit, {len(LEVELS)} × {level_steps} steps of {n} Langevin chains.", "",
        "Error of the fitted score, relative to the true score of the data with that noise. Between the modes is the "
        "square |x₁|, |x₂| < 3. A level can be trusted where data with its noise lie: the large ones between the "
        "modes, the small ones only near them.", "",
        *errors_by_level(rng, energies, truth), "",
        "Where the draws end. Plain Langevin starts uniformly on (−8, 8)² and ends in the mode of the basin it starts "
        "in: with the exact score in either by half, and with the fitted one also wherever it made up a mode.", "",
        *table_of_shares(draws, x), "",
        "![Score fields and draws](noise_levels.png)", "",
    ]  # fmt: skip
    picture(energies, truth, draws, x, output / "noise_levels.png")
    lines += [f"{time.perf_counter() - begin:.0f} seconds in all, on {machine()}.", ""]
    (output / "noise_levels.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
