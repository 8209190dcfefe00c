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
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints

from numpyro_score import DSM, ISM, ScoreMatching, geometric_levels


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
