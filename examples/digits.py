"""Handwritten digits: a score network of every noise level as sampler, density and prior of images.

The 8×8 digits of scikit-learn are integers from 0 to 16. Seen through normal noise they can be read back, up to some
bits, so that the smallest noise of the fit stands in for the usual uniform dequantisation: log densities of noisy
images give the bits that a pixel needs. The fit draws new images by every method, completes halves of held-out ones,
and stands beside a normal law, a mixture with full covariances and, where flowjax is installed, a spline flow fitted
for the same time to the same noisy images. A classifier reads the draws, and their nearest neighbours show that
nothing is copied.

Run it with `python examples/digits.py`; `--quick` takes few steps and one split. Results go to examples/results, those
of the short run to examples/output.
"""

import argparse
import importlib.util
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
from scipy.special import logsumexp
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from sklearn.svm import SVC

from numpyro_score import (
    ContinuousDSM,
    ScoreMatching,
    bits_by_noise,
    diffuse,
    flow_log_prob,
    inpaint,
    plot_bits_by_noise,
    preconditioned_score,
    score_factor,
)
from numpyro_score.diffusion.methods import METHODS

DIM, CHANNELS, WIDTH, NUM_BLOCKS = 64, 16, 48, 2
NOISE, LARGEST = 1.0, 100.0  # in grey levels
SCALE = 4.3  # a standard deviation, so that the network's numbers are of order one
FREQUENCIES = 2.0 ** jnp.arange(-1, 5)


class Scaled(nnx.Module):
    """Channels of unit variance in each pixel, scaled and shifted by the noise."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(CHANNELS, use_bias=False, use_scale=False, rngs=rngs)
        self.scale = nnx.Linear(2 * len(FREQUENCIES), 2 * CHANNELS, rngs=rngs)

    def __call__(self, h, noise):
        angles = noise[:, None] * FREQUENCIES
        waves = self.scale(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        wide, shift = jnp.split(waves[:, None], 2, axis=-1)
        return self.norm(h) * (1 + wide) + shift


class Block(nnx.Module):
    """Each pixel sees its neighbours, the same way everywhere; then all pixels see WIDTH sums over the image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.near, self.far = Scaled(rngs), Scaled(rngs)
        self.inner = nnx.Linear(9 * CHANNELS, WIDTH, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, CHANNELS, rngs=rngs)
        self.gather = nnx.Linear(DIM, DIM // 2, rngs=rngs)
        self.spread = nnx.Linear(DIM // 2, DIM, rngs=rngs)

    def __call__(self, h, noise):
        padded = jnp.pad(self.near(h, noise).reshape(-1, 8, 8, CHANNELS), ((0, 0), (1, 1), (1, 1), (0, 0)))
        around = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]  # faster than a convolution here
        h = h + self.outer(nnx.swish(self.inner(jnp.concatenate(around, axis=-1)))).reshape(h.shape)
        pixels_last = self.far(h, noise).swapaxes(1, 2)
        return h + self.spread(nnx.swish(self.gather(pixels_last))).swapaxes(1, 2)


class Network(nnx.Module):
    """Images (n, 64) and their noise (n,) to images."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(1, CHANNELS, rngs=rngs)
        self.place = nnx.Param(0.5 * jax.random.normal(rngs.params(), (DIM, CHANNELS)))
        self.blocks = nnx.List([Block(rngs) for _ in range(NUM_BLOCKS)])
        self.norm = nnx.LayerNorm(CHANNELS, rngs=rngs)
        self.last = nnx.Linear(CHANNELS, 1, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, u, noise):
        h = self.first(u[..., None]) + self.place[...]
        for block in self.blocks:
            h = block(h, noise)
        return self.last(nnx.swish(self.norm(h)))[..., 0]


NETWORK = Network(nnx.Rngs(0))


def model(x, sigma=1.0):
    """Images (n, 64) less their mean, in units of SCALE, with noise."""
    net = nnx_module("net", NETWORK)
    with numpyro.plate("images", len(x), subsample_size=min(len(x), 128)):
        image = dist.ImproperUniform(constraints.real_vector, (), (DIM,))
        x = numpyro.sample("x", image, obs=numpyro.subsample(x, event_dim=1))
        score_factor("score", x, preconditioned_score(net, x, sigma, 1.0))


def load(split):
    """Images to fit, to validate choices and to test, (n, 64) each, integers from 0 to 16, and their labels."""
    digits = load_digits()
    order = np.random.default_rng(split).permutation(len(digits.data))
    parts = np.split(order, [1297, 1437])
    return [(digits.data[i], digits.target[i]) for i in parts]


def fit(key, x, num_steps):
    """A mean of the parameters over the last thousand steps or so, since each of them scatters."""
    optim = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 4e-3, 100, num_steps), b2=0.99)
    loss = ContinuousDSM(NOISE / SCALE, LARGEST / SCALE)
    return ScoreMatching(model, optim=optim, loss=loss, average=0.999, num_steps=num_steps).run(
        key, x, progress_bar=False
    )


# -- bits -----------------------------------------------------------------------------------------


def reading_bits(rng, images, train, num_draws=4):
    """What is lost when integers are read from under the noise: −E log₂ r(x|x + noise), by pixel, for each image.

    With p the density of noisy images and r any law of x, log P(x) ≥ E[log p(x + noise) − log N(noise) + log r(x|x +
    noise)]. Here r(x|y) ∝ π(x) N(y; x, NOISE²) in each pixel, with π how often it has which of the 17 grey levels.
    """
    noisy = images + NOISE * rng.normal(size=(num_draws, *images.shape))
    often = (train[..., None] == np.arange(17)).sum(axis=0) + 0.1
    log_prior = np.log(often / often.sum(axis=-1, keepdims=True))
    logits = log_prior - 0.5 * ((noisy[..., None] - np.arange(17)) / NOISE) ** 2
    own = np.take_along_axis(logits, images.astype(int)[None, ..., None], axis=-1)[..., 0]
    return (logsumexp(logits, axis=-1) - own).mean(axis=(0, 2)) / np.log(2)


NOISE_BITS = 0.5 * np.log2(2 * np.pi * np.e * NOISE**2)


def bits(log_density, reading):
    """Mean and standard error over images of the bits that a pixel needs, from log densities of noisy images."""
    values = -np.asarray(log_density) / DIM / np.log(2) - NOISE_BITS + reading
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def scaled(images, mean):
    return jnp.asarray((images - mean) / SCALE, float)


def noisy(rng, images, copies=1):
    return np.tile(images, (copies, 1)) + NOISE * rng.normal(size=(copies * len(images), DIM))


def mixture(rng, train, validation, sizes):
    """The mixture of normal laws that is best on the validation images, among these sizes and several ridges."""
    x, held_out = noisy(rng, train, 4), noisy(rng, validation, 4)
    found = [
        GaussianMixture(k, reg_covar=ridge, random_state=0, max_iter=50).fit(x)
        for k in sizes
        for ridge in (0.1, 0.3, 1.0)
    ]
    return max(found, key=lambda m: m.score(held_out))


def spline_flow(key, rng, train, validation, seconds):
    """flowjax's masked autoregressive spline flow, for some CPU seconds, at its best step on the validation images."""
    import equinox as eqx
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    begin = time.process_time()
    mean, scale = train.mean(axis=0), np.sqrt(train.var(axis=0) + NOISE**2)

    def standard(images):
        return jnp.asarray((images - mean) / scale, jnp.float32)

    flow = masked_autoregressive_flow(
        key,
        base_dist=Normal(jnp.zeros(DIM)),
        transformer=RationalQuadraticSpline(knots=8, interval=5),
        flow_layers=4,
        nn_width=128,
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optim = optax.adam(1e-3)

    def loss(params, x):
        return -jnp.mean(eqx.combine(params, static).log_prob(x))

    @jax.jit
    def step(params, state, x):
        value, grad = jax.value_and_grad(loss)(params, x)
        change, state = optim.update(grad, state)
        return optax.apply_updates(params, change), state, value

    held_out, state, best, i = standard(noisy(rng, validation, 4)), optim.init(params), None, 0
    evaluate = jax.jit(loss)
    while time.process_time() - begin < seconds:
        rows = train[rng.choice(len(train), 256)]
        params, state, _ = step(params, state, standard(noisy(rng, rows)))
        if (i := i + 1) % 50 == 0 and (best is None or evaluate(params, held_out) < best[0]):
            best = (evaluate(params, held_out), params)
    chosen = eqx.combine(params if best is None else best[1], static)
    return lambda images: np.asarray(chosen.log_prob(standard(images)), float) - np.log(scale).sum()


# -- draws ----------------------------------------------------------------------------------------


def read(classifier, images):
    """The share of images that the classifier is sure of, and how unequal its ten classes are among them."""
    probabilities = classifier.predict_proba(images)
    counts = np.bincount(probabilities.argmax(axis=1), minlength=10) / len(images)
    return f"{np.mean(probabilities.max(axis=1) > 0.9):.2f} | {counts.min():.2f} to {counts.max():.2f}"


def nearest(images, others, same=False):
    """Of each image the distance to the nearest other, and which."""
    squared = (images**2).sum(1)[:, None] - 2 * images @ others.T + (others**2).sum(1)
    if same:
        np.fill_diagonal(squared, np.inf)
    return np.sqrt(np.maximum(squared.min(axis=1), 0)), squared.argmin(axis=1)


def show(axes, rows):
    """Rows of images (r, c, 64)."""
    r, c = rows.shape[:2]
    tiles = np.pad(rows.reshape(r, c, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=8)
    axes.imshow(tiles.transpose(0, 2, 1, 3).reshape(r * 10, c * 10), cmap="gray_r", vmin=0, vmax=16)
    axes.set_axis_off()


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "flax", "diffrax", "scikit-learn"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def compare_bits(split, num_steps, sizes):
    """The fit of a split, its seconds of CPU, what `bits_by_noise` says of it, and the bits of all models."""
    rng, keys = np.random.default_rng(split), jax.random.split(jax.random.key(split), 3)
    (train, _), (validation, _), (test, _) = load(split)
    mean = train.mean(axis=0)
    begin = time.process_time()
    found = fit(keys[0], scaled(train, mean), num_steps)
    seconds = time.process_time() - begin
    reading, to_pixels = reading_bits(rng, test, train), -DIM * np.log(SCALE)
    by_noise = {
        name: bits_by_noise(found, scaled(x, mean), keys[1], num_draws=4)
        for name, x in (("fitted", train), ("held out", test))
    }
    bound = by_noise["held out"]
    rows = noisy(rng, test)
    flow = flow_log_prob(
        found,
        scaled(rows, mean),
        divergence="hutchinson",
        num_probes=8,
        rng_key=keys[1],
        solver="tsit5",
        rtol=1e-3,
        atol=1e-3,
    )
    mixed = mixture(rng, train, validation, sizes)
    normal = GaussianMixture(1, reg_covar=0.1).fit(noisy(rng, train, 4))
    table = {
        "normal law": bits(normal.score_samples(rows), reading),
        "mixture of normal laws": bits(mixed.score_samples(rows), reading),
        "score network, by its probability flow": bits(np.asarray(flow.value) + to_pixels, reading),
        "score network, by `bits_by_noise`": f"{bound.bits[0] + reading.mean():.3f} ± {bound.bits_stderr[0]:.3f}",
    }
    if importlib.util.find_spec("flowjax"):
        log_prob = spline_flow(keys[2], rng, train, validation, seconds)
        table["spline flow of flowjax"] = bits(log_prob(rows), reading)
    return found, seconds, by_noise, table


def picture(shown, train, held_out, bits_found, path):
    """Draws by method, some with their neighbours, completed images and bits by noise."""
    figure = plt.figure(figsize=(15, 9.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    draws = left.subplots()
    show(draws, np.stack(list(shown.values()))[:, :14])
    draws.set_axis_on()
    draws.set_xticks([])
    draws.set_yticks(10 * np.arange(len(shown)) + 4.5, list(shown), fontsize=11)
    draws.tick_params(length=0)
    draws.set_title("draws, a method in each row")
    top, middle, bottom = right.subfigures(3, 1, height_ratios=[1, 2.6, 2])
    some = shown["dpm++2m"][:12]
    axes = top.subplots()
    show(axes, np.stack([some, train[nearest(some, train)[1]]]))
    axes.set_title("draws, and below each the nearest fitted image")
    axes = middle.subplots()
    show(axes, held_out)
    axes.set_title("held out, what is seen of it, and completed")
    plot_bits_by_noise(bits_found, ax=np.asarray(bottom.subplots(1, 2)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


@matplotlib.rc_context({"font.size": 12})
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few steps and draws, one split")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    num_steps, n, splits, sizes = (200, 32, 1, (5,)) if quick else (3_000, 500, 3, (10, 20, 40))
    (found, seconds, by_noise, table), *others = (compare_bits(i, num_steps, sizes) for i in range(splits))
    keys = jax.random.split(jax.random.key(9), 40)
    (train, labels), _, (test, test_labels) = load(0)
    mean = train.mean(axis=0)

    def images(x):
        return np.asarray(x, float) * SCALE + mean

    # Draws by every method, read by a classifier.
    classifier = CalibratedClassifierCV(SVC(gamma=0.002, C=10), ensemble=False).fit(train, labels)
    score = classifier.score(test, test_labels)
    sure = [
        "| images | calls | read with certainty | shares of the ten digits | nearest fitted image |",
        "|---|---|---|---|---|",
        f"| held out | | {read(classifier, test)} | {np.median(nearest(test, train)[0]):.1f} |",
    ]  # fmt: skip
    shown = {}
    for key, name in zip(keys, ("dpm++2m", "ddpm_covariance") if quick else METHODS, strict=False):
        steps = (320 if name == "annealed_langevin" else 64) // METHODS[name].calls
        drawn = diffuse(found, key, n, method=name, num_steps=steps, denoise=True)
        shown[name] = images(drawn.draws)
        away = np.median(nearest(shown[name], train)[0])
        sure.append(f"| {name} | {drawn.num_calls} | {read(classifier, shown[name])} | {away:.1f} |")

    # The lower halves of held-out images.
    mask = np.arange(DIM) < DIM // 2
    halves = [
        inpaint(found, scaled(x, mean), jnp.asarray(mask), key, num_particles=16 if quick else 64, num_runs=4)
        for x, key in zip(test, keys[20 : 20 + (2 if quick else 6)], strict=False)
    ]
    completed = [
        np.vstack([x, np.where(mask, x, 8), images(h.resample(keys[39], 10))])
        for x, h in zip(test, halves, strict=False)
    ]
    picture(shown, train, np.stack(completed), by_noise, output / "digits.png")

    columns = [table] + [other[-1] for other in others]
    lines = [
        "# Digits", "",
        f"`examples/digits.py`: {len(train)} images fitted in {num_steps} steps, {seconds:.0f} seconds of CPU on "
        f"{os.cpu_count()} cores, and {len(test)} held out. Numbers are bits a pixel of held-out images: upper bounds "
        f"on the cross entropy of the integers, with normal noise of {NOISE:g} grey level in place of uniform "
        "dequantisation, for all models alike. Errors are over images. Mixture (number of laws, ridge) and spline flow "
        "(step) are the best on 140 further images, and the flow had the CPU time of the network.", "",
        "| model |" + "".join(f" split {i} |" for i in range(splits)),
        "|---|" + "---|" * splits,
        *(f"| {name} |" + "".join(f" {column[name]} |" for column in columns) for name in table), "",
        f"Draws, {n} by each method, and what a classifier that is right on {score:.3f} of held-out images says of "
        "them: the share that it is sure of (above 0.9), and the rarest and the most frequent digit. The last column "
        "is the median distance to the nearest fitted image, in grey levels.", "",
        *sure, "",
        f"Lower halves of {len(halves)} held-out images given the upper ones: effective draws "
        + ", ".join(f"{h.ess:.0f}" for h in halves) + ".", "",
        "![Draws, neighbours, completed images and bits by noise](digits.png)", "",
        f"{time.perf_counter() - begin:.0f} seconds in all, on {machine()}.", "",
    ]  # fmt: skip
    (output / "digits.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
