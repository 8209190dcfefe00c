"""Makes the pictures of diagnostics.md, in docs/images: python docs/pictures.py [NAME ...]."""

import functools
import io
import sys
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


PICTURES = {
    "losses": lambda: ns.plot_losses(fit_by_steps()),
    "influence": lambda: ns.plot_influence(fit()),
    "score_field": lambda: ns.plot_score_field(fit()),
    "density": lambda: ns.plot_density(fit()),
    "marginals": lambda: ns.plot_marginals(fit(), draws()),
}


def save(axes, path):
    """A small PNG: 128 colours are enough for plots."""
    buffer = io.BytesIO()
    np.ravel(axes)[0].figure.savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        save(PICTURES[name](), IMAGES / f"{name}.png")
        print(f"{name}.png, {(IMAGES / f'{name}.png').stat().st_size // 1000} kB")
