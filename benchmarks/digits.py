"""What each choice of `examples/digits.py` is worth: bits of held-out images with one of them changed.

    python -m benchmarks.digits

All fits see the same 1,297 images of the first split for as many steps, and are judged on the same held-out ones by
:func:`~numpyro_score.bits_by_noise`, whose noise is the same for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import ContinuousDSM, Energy, ScoreMatching, bits_by_noise, preconditioned_energy, score_factor
from numpyro_score.diffusion.source import NoisyModel

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "DIGITS.md"


def example() -> ModuleType:
    """examples/digits.py as a module."""
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DIGITS = example()


def rows(x: Any) -> Any:
    """Images (n, 64) in batches of 128."""
    image = dist.ImproperUniform(constraints.real_vector, (), (DIGITS.DIM,))
    return numpyro.sample("x", image, obs=numpyro.subsample(x, event_dim=1))


def plain_score(x: Any, sigma: Any = 1.0) -> None:
    """The network as the noise in its own unit, without EDM's scales: s = -F(x/τ, c)/σ."""
    net = nnx_module("net", DIGITS.NETWORK)
    with numpyro.plate("images", len(x), subsample_size=min(len(x), 128)):
        x = rows(x)
        sigma = jnp.broadcast_to(sigma, len(x))
        wide = jnp.sqrt(1 + sigma**2)[:, None]
        score_factor("score", x, -net(x / wide, 0.25 * jnp.log(sigma)) / sigma[:, None])


class Potential(nnx.Module):
    """A number for each image: its product with what the example's network gives, and so about as much arithmetic."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.net = DIGITS.Network(rngs)

    def __call__(self, u: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.sum(u * self.net(u, noise), axis=-1)


POTENTIAL = Potential(nnx.Rngs(0))


def energy(x: Any, sigma: Any = 1.0) -> None:
    """The gradient of a network in place of a network."""
    net = nnx_module("net", POTENTIAL)
    with numpyro.plate("images", len(x), subsample_size=min(len(x), 128)):
        x = rows(x)
        numpyro.factor("energy", preconditioned_energy(net, x, sigma, 1.0))


@dataclass(frozen=True)
class AtQuantiles(ContinuousDSM):
    """Likelihood weighting with levels of another law: ln σ uniform between neighbours of `knots`, each as likely.

    The estimate stays unbiased, as each row is weighed by one over the density of its level.
    """

    knots: tuple[float, ...] = ()  # of ln σ

    def __call__(self, at: Energy, rng_key: jax.Array) -> jax.Array:
        """The values of log-uniform levels, times the density of those over that of these."""
        knots = jnp.asarray(self.knots)
        sigma = self.levels(jax.random.split(rng_key)[0], at.num_rows, at.data.dtype)
        width = jnp.diff(knots)[jnp.clip(jnp.searchsorted(knots, jnp.log(sigma)) - 1, 0, len(knots) - 2)]
        total = math.log(self.largest / self.smallest)
        return super().__call__(at, rng_key) * width * (len(knots) - 1) / total

    def levels(self, rng_key: jax.Array, num_rows: int, dtype: Any) -> jax.Array:
        """The log-uniform levels by their quantiles, at these quantiles of the other law."""
        sigma = super().levels(rng_key, num_rows, dtype)
        quantile = jnp.log(sigma / self.smallest) / math.log(self.largest / self.smallest)
        return jnp.exp(jnp.interp(quantile, jnp.linspace(0, 1, len(self.knots)), jnp.asarray(self.knots)))


def knots_of_least_variance(fit: Any, x: jax.Array, loss: ContinuousDSM, num_levels: int = 24) -> tuple[float, ...]:
    """Quantiles of ln σ with a density as the root of the mean square of a row's gradient at each level.

    Of all laws of levels it gives the gradient of the likelihood-weighted objective the least variance.
    """
    ends = np.linspace(math.log(loss.smallest), math.log(loss.largest), num_levels + 1)
    flat, unravel = ravel_pytree(fit.params)

    @jax.jit
    def mean_square(low: jax.Array, high: jax.Array, keys: jax.Array) -> jax.Array:
        def of_row(row_and_key: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, key = row_and_key
            level_key, noise_key = jax.random.split(key)
            sigma = jnp.exp(jax.random.uniform(level_key, minval=low, maxval=high))
            noise = jax.random.normal(noise_key, row.shape)

            def error(vector: jax.Array) -> jax.Array:
                score = NoisyModel(fit.energy.with_params(unravel(vector))).score((row + sigma * noise)[None], sigma)
                return jnp.sum((sigma * score[0] + noise) ** 2)

            return jnp.sum(jax.grad(error)(flat) ** 2)

        return jnp.mean(jax.lax.map(of_row, (x, keys)))

    keys = jax.random.split(jax.random.key(5), (num_levels, len(x)))
    roots = np.sqrt([float(mean_square(*given)) for given in zip(ends, ends[1:], keys, strict=False)])
    share = np.append(0.0, np.cumsum(roots))
    return tuple(np.interp(np.linspace(0, share[-1], num_levels + 1), share, ends))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    begin = time.perf_counter()

    (train, _), _, (test, _) = DIGITS.load(0)
    mean = train.mean(axis=0)
    x, held_out = (DIGITS.scaled(v, mean) for v in (train, test))
    reading = DIGITS.reading_bits(np.random.default_rng(0), test, train).mean()
    smallest, largest = DIGITS.NOISE / DIGITS.SCALE, DIGITS.LARGEST / DIGITS.SCALE
    likelihood = ContinuousDSM(smallest, largest)
    lines = []

    def fitted(name: str, model: Any = DIGITS.model, loss: ContinuousDSM = likelihood, average: Any = 0.999) -> Any:
        """As the example fits, and a line of the table."""
        start = time.process_time()
        rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, min(100, options.steps // 2), options.steps)
        sm = ScoreMatching(model, optim=optax.adam(rate, b2=0.99), loss=loss, average=average, num_steps=options.steps)
        fit = sm.run(jax.random.split(jax.random.key(0), 3)[0], x, progress_bar=False)
        seconds = time.process_time() - start
        found = [bits_by_noise(fit, v, jax.random.key(1), num_draws=4) for v in (held_out, x)]
        own, fitted_rows = (b.bits[0] + reading for b in found)
        lines.append(f"| {name} | {own:.3f} ± {found[0].bits_stderr[0]:.3f} | {fitted_rows:.3f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        return fit

    fit = fitted("the example")
    fitted("no average of the parameters", average=None)
    fitted("the network without EDM's scales", plain_score)
    fitted('weighting="uniform"', loss=ContinuousDSM(smallest, largest, "uniform"))
    fitted('weighting="edm"', loss=ContinuousDSM(smallest, largest, "edm", sigma_data=1.0))
    fitted("levels drawn by themselves", loss=ContinuousDSM(smallest, largest, stratified=False))
    fitted("antithetic noise, two scores a step", loss=ContinuousDSM(smallest, largest, antithetic=True))
    knots = knots_of_least_variance(fit, x[:256], likelihood)
    fitted("levels of least variance", loss=AtQuantiles(smallest, largest, knots=knots))
    fitted("an energy in place of a score", energy)
    median = DIGITS.SCALE * math.exp(knots[len(knots) // 2])
    text = [
        "# Choices for digits",
        "",
        f"Written by `python -m benchmarks.digits` in {time.perf_counter() - begin:.0f} s: the fit of "
        f"`examples/digits.py` to {len(x)} images in {options.steps} steps, and the same with one choice changed. Bits "
        f"a pixel by `bits_by_noise`, of {len(held_out)} held-out images and of the fitted ones, from the same noise "
        "for all; errors are over images, which all fits share, so that differences are known better. Seconds are of "
        "CPU, for the fit alone. "
        f"Levels of least variance have their median at {median:.1f} grey levels; log-uniform ones at "
        f"{(DIGITS.NOISE * DIGITS.LARGEST) ** 0.5:.1f}.",
        "",
        "| fit | held out | fitted | seconds |",
        "|---|---|---|---|",
        *lines,
        "",
        machine.describe((*machine.PACKAGES, "flax", "scikit-learn")),
        f"- Load before the run: {load}",
    ]
    options.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    load = machine.load()
    main()
