"""Makes the pictures of diagnostics.md, and the small ones of gallery.md: python docs/pictures.py [NAME ...].

That of the report needs Chromium. The small ones, NAME "thumbs", are cut from examples/results.
"""

import functools
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints
from PIL import Image

import numpyro_score as ns

IMAGES = Path(__file__).parent / "images"
KEY = jax.random.key(0)


def boomerang(rng, n):
    """x with the density exp(1.5x² − x⁴), and y = x² + 0.7 noise."""
    grid = np.linspace(-2.5, 2.5, 5001)
    mass = np.exp(1.5 * grid**2 - grid**4)
    x = rng.choice(grid, n, p=mass / mass.sum())
    return jnp.asarray(np.column_stack([x, x**2 + 0.7 * rng.normal(size=n)]), float)


def model(x):
    """The same family: f is affine in its four coefficients, and exp f has no known normaliser."""
    c = numpyro.param("c", jnp.ones(4))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        u, v = x[:, 0], x[:, 1]
        numpyro.factor("energy", c[0] * u**2 - c[1] * u**4 - c[2] * v**2 + c[3] * u**2 * v)


DATA = boomerang(np.random.default_rng(0), 1500)


@functools.cache
def fit():
    return ns.ScoreMatching(model).run(KEY, DATA, progress_bar=False)


@functools.cache
def fit_by_steps():
    adam = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    return ns.ScoreMatching(model, optim=adam, loss=ns.SSM(), num_steps=600).run(KEY, DATA, progress_bar=False)


@functools.cache
def draws():
    return ns.sample(fit(), KEY, 1000)


@functools.cache
def noised():
    """A narrow mixture of two modes against a normal law."""
    modes = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-2.0, 1.0]), 0.6))
    return ns.de_bruijn(modes, dist.Normal(0.0, 1.5), jnp.geomspace(0.01, 30.0, 12), KEY, num_samples=4000)


@functools.cache
def left_out():
    """Of 60 rows, the first made an outlier."""
    return ns.hyvarinen_loo(ns.ScoreMatching(model).run(KEY, DATA[:60].at[0].set(jnp.array([1.9, 2.0]))))


def normal(x):
    """A normal law for each column, which cannot bend."""
    k = numpyro.param("k", jnp.ones(2))
    m = numpyro.param("m", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", jnp.sum(m * x - 0.5 * k * x**2, axis=-1))


@functools.cache
def compared():
    fits = {
        "quartic, ISM": fit(),
        "quartic, SSM": fit_by_steps(),
        "normal, ISM": ns.ScoreMatching(normal).run(KEY, DATA),
    }
    return ns.compare(fits, boomerang(np.random.default_rng(1), 500), rng_key=KEY, num_samples=500)


PICTURES = {
    "losses": lambda: ns.plot_losses(fit_by_steps()),
    "influence": lambda: ns.plot_influence(fit()),
    "score_field": lambda: ns.plot_score_field(fit()),
    "density": lambda: ns.plot_density(fit()),
    "marginals": lambda: ns.plot_marginals(fit(), draws()),
    "de_bruijn": lambda: ns.plot_de_bruijn(noised()),
    "khat": lambda: ns.plot_khat(left_out()),
    "comparison": lambda: ns.plot_comparison(compared()),
}


def save(axes, path):
    """A plot as a small PNG."""
    buffer = io.BytesIO()
    np.ravel(axes)[0].figure.savefig(buffer, dpi=100)
    shrink(buffer, path)


def save_report(path):
    """The first screen of a report, as Chromium shows it."""
    with tempfile.TemporaryDirectory() as folder:
        page, shot = ns.report(fit_by_steps(), Path(folder) / "fit.html"), Path(folder) / "shot.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,800"]
        options += [f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run(["chromium", *options, page.as_uri()], check=True, capture_output=True, timeout=120)
        shrink(shot, path)


# Of the pictures of examples, the part to show: left, top, right, bottom, in shares of the whole.
THUMBS = {
    "binary_digits": (0, 0, 0.7, 1),
    "change_point": (0, 0, 0.41, 1),
    "digits": (0.02, 0.17, 0.5, 0.55),
    "kl_vs_fisher": (0.08, 0, 0.51, 0.58),
    "langevin_gaussian": (0.36, 0, 1, 1),
    "natural_image_filters": (0.33, 0, 0.67, 0.5),
    "noise_levels": (0, 0, 0.57, 0.5),
    "quickstart": (0.02, 0.05, 0.46, 0.8),
    "survey": (0, 0, 0.47, 1),
    "toy_densities": (0, 0.575, 1, 0.718),
    "truncated_graph": (0, 0, 0.66, 0.46),
    "two_moons": (0, 0, 0.6, 1),
}


def save_thumbs():
    """Pictures of 480 by 300 pixels, white where the part has another shape."""
    folder = IMAGES / "thumbs"
    folder.mkdir(exist_ok=True)
    for name, part in THUMBS.items():
        whole = Image.open(IMAGES.parent.parent / "examples" / "results" / f"{name}.png").convert("RGB")
        cut = whole.crop([round(share * size) for share, size in zip(part, 2 * whole.size, strict=True)])
        cut.thumbnail((480, 300))
        canvas = Image.new("RGB", (480, 300), "white")
        canvas.paste(cut, ((480 - cut.width) // 2, (300 - cut.height) // 2))
        canvas.quantize(128).save(folder / f"{name}.png", optimize=True)


def shrink(source, path):
    """128 colours are enough for plots and text."""
    Image.open(source).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [*PICTURES, "report", "thumbs"]:
        if name == "thumbs":
            save_thumbs()
            continue
        path = IMAGES / f"{name}.png"
        if name == "report":
            save_report(path)
        else:
            save(PICTURES[name](), path)
        print(f"{name}.png, {path.stat().st_size // 1000} kB")
