"""What do the parts of photographs look like, to a model that knows nothing about images?

An overcomplete product of experts, f(x) = -Σ_k α_k log cosh(w_k·x) with twice as many filters w_k as dimensions and a
normaliser that nobody can write down, on patches of the two photographs that come with scikit-learn. Fitted by score
matching, as first in Hyvärinen (2005), the filters come out like Gabor functions, waves under a bell: local, oriented
and tuned to a frequency, as are receptive fields in the visual cortex. A least-squares fit to each filter counts them.

Run it with `python examples/natural_image_filters.py`; results go to examples/results. With `--quick`, which takes
smaller patches and fewer steps, they go to examples/output.
"""

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints
from scipy.optimize import least_squares
from sklearn.datasets import load_sample_images

from numpyro_score import ISM, SSM, ScoreMatching


def model(x, num_experts, batch_size=None):
    """Whitened patches (n, d), of which each step takes a batch."""
    d = x.shape[-1]
    w = numpyro.param("w", lambda key: 0.1 * jax.random.normal(key, (d, num_experts)))
    alpha = numpyro.param("alpha", jnp.full(num_experts, 0.6), constraint=constraints.positive)
    with numpyro.plate("patches", len(x), subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=1)
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=batch)
        u = x @ w
        log_cosh = jax.nn.softplus(2 * u) - u - jnp.log(2.0)
        numpyro.factor("experts", -log_cosh @ alpha)


class Settings(NamedTuple):
    side: int  # pixels along a patch
    dim: int  # principal components kept; there are twice as many filters
    num_steps: int
    num_train: int = 30000
    num_test: int = 2000
    batch_size: int = 500
    step_size: float = 3e-3


FULL = Settings(side=12, dim=100, num_steps=5000)
QUICK = Settings(side=8, dim=30, num_steps=1000, num_train=10000, num_test=1000, batch_size=250, step_size=1e-2)


def photographs() -> list[np.ndarray]:
    """Log intensities at half the resolution, which averages out most of the blocks of the JPEG files."""
    grey = [image.mean(axis=-1)[:426] for image in load_sample_images().images]
    return [np.log(10 + g.reshape(213, 2, 320, 2).mean(axis=(1, 3))) for g in grey]


def load(rng: np.random.Generator, s: Settings) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Whitened patches (num_train, dim) and (num_test, dim), and the map (side², dim) that whitens pixels.

    Patches for testing come from two strips, a quarter of each photograph, that give none for training.
    """

    def cut(*strips: slice) -> np.ndarray:
        parts = [photograph[:, strip] for photograph in photographs() for strip in strips]
        windows = [np.lib.stride_tricks.sliding_window_view(part, (s.side, s.side)) for part in parts]
        x = np.concatenate([w.reshape(-1, s.side**2) for w in windows])
        return rng.permutation(x - x.mean(axis=1, keepdims=True))

    train, test = cut(slice(0, 120), slice(160, 280)), cut(slice(120, 160), slice(280, 320))
    center = train.mean(axis=0)
    variance, component = np.linalg.eigh(np.cov(train.T))
    whitening = (component[:, ::-1] / np.sqrt(np.maximum(variance[::-1], 1e-12)))[:, : s.dim]
    # Sky and blurred background are a sharp peak of the density at zero, which would get all of the filters: leave out
    # the half of the patches with the least contrast, and let the others differ less in it.
    least = np.median(np.mean(((train - center) @ whitening) ** 2, axis=1))

    def whiten(x: np.ndarray, n: int) -> jax.Array:
        z = (x - center) @ whitening
        contrast = np.mean(z**2, axis=1, keepdims=True)
        return jnp.asarray((z / np.sqrt(0.1 + contrast))[contrast[:, 0] > least][:n], dtype=float)

    return whiten(train, s.num_train), whiten(test, s.num_test), whitening


class Gabor(NamedTuple):
    """Numbers for one filter, or arrays for many."""

    r2: float
    row: float  # the middle of the envelope, pixels
    column: float
    angle: float  # in which the wave goes, radians from columns to rows
    omega: float  # radians per pixel
    width: float  # standard deviations of the envelope, along the wave
    length: float  # and across

    @property
    def share(self) -> float:
        return float(np.mean(self.r2 > 0.5))


def fit_gabor(image: np.ndarray) -> Gabor:
    """The least-squares fit of exp(-½(u²/width² + v²/length²)) (a cos ωu + b sin ωu), u and v turned and shifted.

    Width and length are at most a quarter of the side, so that a wave all over the patch is no Gabor function.
    """
    side = len(image)
    image = (image - image.mean()) / np.linalg.norm(image - image.mean())
    row, column = np.mgrid[:side, :side]

    def residual(q):
        y, x, angle, omega, width, length = q
        u = np.cos(angle) * (column - x) + np.sin(angle) * (row - y)
        v = np.cos(angle) * (row - y) - np.sin(angle) * (column - x)
        envelope = np.exp(-0.5 * (u / width) ** 2 - 0.5 * (v / length) ** 2)
        waves = np.stack([envelope * np.cos(omega * u), envelope * np.sin(omega * u)]).reshape(2, -1)
        # a and b are linear: solved for here. The small ridge is for ω = 0, where the sine vanishes.
        ab = np.linalg.solve(waves @ waves.T + 1e-9 * np.eye(2), waves @ image.ravel())
        return ab @ waves - image.ravel()

    power = np.abs(np.fft.fft2(image, (64, 64)))
    fy, fx = (2 * np.pi * np.fft.fftfreq(64)[i] for i in np.unravel_index(power.argmax(), power.shape))
    middle = [np.sum(image**2 * row), np.sum(image**2 * column)]
    bounds = [-1, -1, -np.inf, 0, 0.4, 0.4], [side, side, np.inf, 1.5 * np.pi, side / 4, side / 4]
    starts = [[*middle, np.arctan2(fy, fx), np.hypot(fy, fx), w, w] for w in (0.1 * side, 0.2 * side)]
    fits = [least_squares(residual, q, bounds=bounds, max_nfev=60, xtol=1e-4, ftol=1e-4) for q in starts]
    best = min(fits, key=lambda fit: fit.cost)
    return Gabor(1 - 2 * best.cost, *best.x)


def fit_gabors(filters: np.ndarray) -> Gabor:
    """Of every column (side²,) of the filters."""
    side = round(len(filters) ** 0.5)
    return Gabor(*np.array([fit_gabor(f.reshape(side, side)) for f in filters.T]).T)


def gaussian_objective(train: np.ndarray, test: np.ndarray) -> float:
    """The Hyvärinen objective of the Gaussian with the training data's moments, ½ E‖K(x - μ)‖² - tr K."""
    k = np.linalg.inv(np.cov(train.T))
    return float(0.5 * np.mean(np.sum(((test - train.mean(axis=0)) @ k) ** 2, axis=1)) - np.trace(k))


def experiment(s: Settings, seed: int = 0, progress_bar: bool = False) -> dict:
    """Fits the model; finds the Gabor functions among its filters, the principal components and random numbers."""
    train, test, whitening = load(np.random.default_rng(seed), s)
    noise_key, key = jax.random.split(jax.random.key(seed))
    optim = optax.adam(optax.cosine_decay_schedule(s.step_size, s.num_steps))
    score_matching = ScoreMatching(model, loss=SSM(), optim=optim, num_steps=s.num_steps)
    begin = time.perf_counter()
    fit = score_matching.run(key, train, 2 * s.dim, batch_size=s.batch_size, progress_bar=progress_bar)
    seconds = time.perf_counter() - begin

    w, alpha = np.asarray(fit.estimates["w"]), np.asarray(fit.estimates["alpha"])
    strongest = np.argsort(-alpha * np.linalg.norm(w, axis=0))
    filters = {  # of pixels: w·(Vᵀx) = (Vw)·x
        "learned filters": whitening @ w[:, strongest],
        "principal components": whitening,
        "random filters": whitening @ np.asarray(jax.random.normal(noise_key, w.shape)),
    }
    held_out = fit.energy.bind(batch_size=None).at(test)
    return {
        "filters": filters,
        "gabors": {name: fit_gabors(f) for name, f in filters.items()},
        "objective": float(jax.jit(lambda energy: ISM()(energy, key).mean())(held_out)) / s.dim,
        "gaussian": gaussian_objective(np.float64(train), np.float64(test)) / s.dim,
        "seconds": seconds,
    }


def mosaic(filters: np.ndarray, columns: int) -> np.ndarray:
    """The filters (side², n) in rows of `columns`, each with its own grey scale, zero in the middle."""
    side = round(len(filters) ** 0.5)
    tiles = (filters / np.abs(filters).max(axis=0)).T.reshape(-1, columns, side, side)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=np.nan)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, columns * (side + 1))


def picture(result: dict, path: Path) -> None:
    filters, gabors = result["filters"], result["gabors"]
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 15})
    figure = plt.figure(figsize=(16, 11.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1.15, 1])
    tops = ("principal components", "", 1, grid[0, 0]), ("learned filters", ", strongest first", 2, grid[0, 1:])
    for name, order, width, place in tops:
        ax, shown = figure.add_subplot(place), filters[name]
        columns = width * max(1, round((shown.shape[1] / width) ** 0.5))
        ax.imshow(mosaic(shown, columns), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(f"{shown.shape[1]} {name}{order}\nGabor functions: {gabors[name].share:.1%}")
        ax.axis("off")

    left = figure.add_subplot(grid[1, :2])
    for (name, g), color in zip(gabors.items(), ("tab:blue", "tab:orange", "0.5"), strict=True):
        above = 1 - np.arange(len(g.r2) + 1) / len(g.r2)
        left.step([0, *np.sort(g.r2)], above, where="post", color=color, lw=2.5, label=name)
    left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="$R^2$ of the best Gabor function", ylabel="share of filters above")
    left.legend(frameon=False, loc="upper right")
    left.spines[["top", "right"]].set_visible(False)

    right, learned = figure.add_subplot(grid[1, 2]), gabors["learned filters"]
    g = Gabor(*np.stack(learned)[:, learned.r2 > 0.5])
    stripe = g.angle + np.pi / 2
    ends = 0.5 * np.array([[-1], [1]]) * g.length
    right.set_prop_cycle(color=plt.get_cmap("hsv")(stripe / np.pi % 1))
    right.plot(g.column + ends * np.cos(stripe), g.row + ends * np.sin(stripe), lw=3, alpha=0.8)
    right.set(aspect="equal", xticks=[], yticks=[])
    right.invert_yaxis()
    right.set_title("Where in the patch these Gabor functions\nlie, and the direction of their stripes")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def report(result: dict, s: Settings) -> str:
    gabors = result["gabors"].items()
    table = "\n".join(f"| {k} | {len(g.r2)} | {g.share:.1%} | {np.median(g.r2):.2f} |" for k, g in gabors)
    packages = [f"{p} {version(p)}" for p in ("jax", "jaxlib", "numpyro", "optax", "scikit-learn", "scipy")]
    return f"""# Filters of natural images

What `examples/natural_image_filters.py` found: {2 * s.dim} experts on patches of {s.side}×{s.side} pixels in {s.dim}
whitened dimensions, fitted by SSM in {s.num_steps} steps of Adam on {s.batch_size} of {s.num_train} patches.

![The filters, how well Gabor functions fit them, and where these lie](natural_image_filters.png)

A filter counts as a Gabor function if the best one, its bell's standard deviations at most a quarter of the side, has
R² > 0.5.

| filters | number | Gabor functions | median R² |
|---|---|---|---|
{table}

On {s.num_test} patches from other parts of the photographs, the model's exact Hyvärinen objective per
dimension is {result["objective"]:.2f}, and the best Gaussian's is {result["gaussian"]:.2f} (less is better).

- The fit took {result["seconds"]:.0f} seconds, compilation included, at a load of {os.getloadavg()[0]:.1f} processes.
- {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, {platform.system()}
- Python {platform.python_version()}, {", ".join(packages)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Gabor filters from photographs, by score matching.")
    parser.add_argument("--quick", action="store_true", help="small patches and few steps, results in examples/output")
    quick = parser.parse_args().quick
    settings, folder = (QUICK, "output") if quick else (FULL, "results")
    output = Path(__file__).parent / folder
    output.mkdir(exist_ok=True)
    result = experiment(settings, progress_bar=True)
    text = report(result, settings)
    picture(result, output / "natural_image_filters.png")
    (output / "natural_image_filters.md").write_text(text)
    print(f"{text}\nWritten to {output}")


if __name__ == "__main__":
    main()
