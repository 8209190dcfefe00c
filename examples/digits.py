"""Handwritten digits: a score network of every noise level as sampler, density and prior of images.

The 8×8 digits of scikit-learn are integers from 0 to 16. Seen through normal noise of a third they can be read back,
so that the smallest noise of the fit stands in for the usual uniform dequantisation: log densities of noisy images give
the bits that a pixel needs. The fit draws new images by every method, completes halves of held-out ones, and stands
beside a normal law, a mixture with full covariances and, where flowjax is installed, a spline flow fitted for the same
time to the same noisy images. A classifier reads the draws, and their nearest neighbours show that nothing is copied.

Run it with `python examples/digits.py`; `--quick` takes few steps. Results go to examples/results, those of the short
run to examples/output.
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

DIM, WIDTH, NUM_BLOCKS = 64, 256, 3
NOISE, LARGEST = 0.33, 100.0  # in grey levels
SCALE = 4.3  # a standard deviation, so that the network's numbers are of order one
FREQUENCIES = 2.0 ** jnp.arange(-1, 5)


class Network(nnx.Module):
    """Residual blocks, in each of which the noise scales and shifts what comes in."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        noise = 2 * len(FREQUENCIES)
        self.first = nnx.Linear(DIM, WIDTH, rngs=rngs)
        self.scales = nnx.List([nnx.Linear(noise, 2 * WIDTH, rngs=rngs) for _ in range(NUM_BLOCKS)])
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(NUM_BLOCKS)])
        self.inner = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(NUM_BLOCKS)])
        self.outer = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(NUM_BLOCKS)])
        self.last = nnx.Linear(WIDTH, DIM, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, u, noise):
        angles = noise[:, None] * FREQUENCIES
        noise = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        h = self.first(u)
        for scale, norm, inner, outer in zip(self.scales, self.norms, self.inner, self.outer, strict=True):
            wide, shift = jnp.split(scale(noise), 2, axis=-1)
            h = h + outer(nnx.swish(inner(nnx.swish(norm(h) * (1 + wide) + shift))))
        return self.last(nnx.swish(h))


NETWORK = Network(nnx.Rngs(0))


def model(x, sigma=1.0):
    """Images (n, 64) less their mean, in units of SCALE, with noise."""
    net = nnx_module("net", NETWORK)
    with numpyro.plate("images", len(x), subsample_size=min(len(x), 256)):
        image = dist.ImproperUniform(constraints.real_vector, (), (DIM,))
        x = numpyro.sample("x", image, obs=numpyro.subsample(x, event_dim=1))
        score_factor("score", x, preconditioned_score(net, x, sigma, 1.0))


def load(split):
    """Images to fit, to validate choices and to test, (n, 64) each, integers from 0 to 16, and their labels."""
    digits = load_digits()
    order = np.random.default_rng(split).permutation(len(digits.data))
    parts = np.split(order, [1297, 1437])
    return [(digits.data[i], digits.target[i]) for i in parts]


def fit(key, x, num_steps, weight_decay):
    """An average over steps, since the last ones scatter; decay of the weights, since images are few."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 200, num_steps)
    optim = optax.adamw(rate, b2=0.99, weight_decay=weight_decay)
    loss = ContinuousDSM(NOISE / SCALE, LARGEST / SCALE)
    return ScoreMatching(model, optim=optim, loss=loss, average=0.999, num_steps=num_steps).run(
        key, x, progress_bar=False
    )


# -- bits -----------------------------------------------------------------------------------------


def reading_bits(rng, images, num_draws=4):
    """What is lost when integers are read from under the noise: −E log₂ r(x|x + noise), by pixel, for each image.

    With p the density of noisy images and r ∝ N(· ; x, NOISE²) over the 17 grey levels, log P(x) ≥ E[log p(x + noise) −
    log N(noise) + log r(x|x + noise)], whatever p.
    """
    noisy = images + NOISE * rng.normal(size=(num_draws, *images.shape))
    logits = -0.5 * ((noisy[..., None] - np.arange(17)) / NOISE) ** 2
    own = -0.5 * ((noisy - images) / NOISE) ** 2
    return (logsumexp(logits, axis=-1) - own).mean(axis=(0, 2)) / np.log(2)


NOISE_BITS = 0.5 * np.log2(2 * np.pi * np.e * NOISE**2)


def bits(log_density, reading):
    """Mean and standard error over images of the bits that a pixel needs, from log densities of noisy images."""
    values = -np.asarray(log_density) / DIM / np.log(2) - NOISE_BITS + reading
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


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
    """flowjax's masked autoregressive spline flow, for some time, at its best step on the validation images."""
    import equinox as eqx
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

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

    held_out, state, best, begin, i = standard(noisy(rng, validation, 4)), optim.init(params), None, time.time(), 0
    evaluate = jax.jit(loss)
    while time.time() - begin < seconds:
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


@matplotlib.rc_context({"font.size": 12})
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few steps and draws")
    parser.add_argument("--split", type=int, default=0, help="which images are held out")
    options = parser.parse_args()
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if options.quick else "results")
    output.mkdir(exist_ok=True)
    num_steps, n, num_rows = (300, 50, 20) if options.quick else (12_000, 1000, 360)
    rng, keys = np.random.default_rng(options.split), jax.random.split(jax.random.key(options.split), 40)
    (train, labels), (validation, _), (test, test_labels) = load(options.split)
    mean = train.mean(axis=0)

    def scaled(images):
        return jnp.asarray((images - mean) / SCALE, float)

    def images(x):
        return np.asarray(x, float) * SCALE + mean

    found = fit(keys[0], scaled(train), num_steps, 0.1)
    seconds = time.perf_counter() - begin

    # Bits.
    reading, to_pixels = reading_bits(rng, test), -DIM * np.log(SCALE)
    by_noise = {
        name: bits_by_noise(found, scaled(x), keys[1], num_draws=4)
        for name, x in (("fitted", train), ("held out", test))
    }
    rows = noisy(rng, test[:num_rows])
    value = flow_log_prob(found, scaled(rows), solver="tsit5", rtol=1e-3, atol=1e-3)
    normal = GaussianMixture(1, reg_covar=0.1).fit(noisy(rng, train, 4))
    best = mixture(rng, train, validation, (5,) if options.quick else (10, 20, 40))
    bound = by_noise["held out"]
    table = [
        "| model | bits a pixel of held-out images |", "|---|---|",
        f"| normal law | {bits(normal.score_samples(noisy(rng, test)), reading)} |",
        f"| mixture of {best.n_components} normal laws | {bits(best.score_samples(noisy(rng, test)), reading)} |",
        f"| score network, by its probability flow | {bits(np.asarray(value.value) + to_pixels, reading[:num_rows])} |",
        f"| score network, by `bits_by_noise` | {bound.bits[0] + reading.mean():.3f} ± {bound.bits_stderr[0]:.3f} |",
    ]  # fmt: skip
    if importlib.util.find_spec("flowjax"):
        log_prob = spline_flow(keys[2], rng, train, validation, 5 if options.quick else seconds)
        table.append(f"| spline flow of flowjax, for the same time | {bits(log_prob(noisy(rng, test)), reading)} |")

    # Draws by every method, read by a classifier.
    classifier = SVC(gamma=0.002, C=10, probability=True, random_state=0).fit(train, labels)
    score = classifier.score(test, test_labels)
    sure = [
        "| images | calls | read with certainty | shares of the ten digits | nearest fitted image |",
        "|---|---|---|---|---|",
        f"| held out | | {read(classifier, test)} | {np.median(nearest(test, train)[0]):.1f} |",
    ]  # fmt: skip
    shown = {}
    for key, (name, method) in zip(keys[3:], METHODS.items(), strict=False):
        steps = max((320 if name == "annealed_langevin" else 64) // method.calls, 1)
        drawn = diffuse(found, key, n, method=name, num_steps=steps, denoise=True)
        shown[name] = images(drawn.draws)
        away = np.median(nearest(shown[name], train)[0])
        sure.append(f"| {name} | {drawn.num_calls} | {read(classifier, shown[name])} | {away:.1f} |")

    # The lower halves of held-out images.
    mask = np.arange(DIM) < DIM // 2
    halves = [
        inpaint(found, scaled(test[i]), jnp.asarray(mask), key, num_particles=16 if options.quick else 64, num_runs=4)
        for i, key in enumerate(keys[20 : 20 + (2 if options.quick else 6)])
    ]
    filled = [images(h.resample(keys[39], 8)) for h in halves]

    figure, axes = plt.subplots(1, 4, figsize=(21, 5), layout="constrained", width_ratios=[1, 1, 1, 1.6])
    show(axes[0], np.stack(list(shown.values()))[:, :10])
    axes[0].set_title("draws, a method in each row")
    some = shown["dpm++2m"][:10]
    show(axes[1], np.stack([some, train[nearest(some, train)[1]]], axis=1))
    axes[1].set_title("draws, and the nearest fitted image")
    show(axes[2], np.stack([np.vstack([test[i], np.where(mask, test[i], 8), f]) for i, f in enumerate(filled)]))
    axes[2].set_title("held out, what is seen, completed")
    axes[3].set_axis_off()
    inner = axes[3].inset_axes([0.08, 0.12, 0.4, 0.8]), axes[3].inset_axes([0.6, 0.12, 0.4, 0.8])
    plot_bits_by_noise(by_noise, ax=np.array(inner))
    figure.savefig(output / "digits.png", dpi=110)
    plt.close(figure)
    lines = [
        "# Digits", "",
        f"`examples/digits.py`: {len(train)} images fitted in {num_steps} steps, {seconds:.0f} seconds; "
        f"{len(test)} held out, split {options.split}. Bits are upper bounds on the cross entropy of the integers, "
        f"with normal noise of {NOISE} grey levels in place of uniform dequantisation, for all models alike; errors "
        "are over images.", "",
        *table, "",
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
