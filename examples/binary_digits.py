"""Handwritten digits in black and white: independent bits, an Ising graph and a restricted Boltzmann machine.

The 1,797 digits of scikit-learn, 8 × 8 pixels, each bit 1 where the pixel is darker than half. The Ising graph has a
coupling for each of 2,016 pairs and is fitted by pseudo-likelihood; the machine has hidden units that are summed out
and is fitted by persistent contrastive divergence with Gibbs steps. Their normalisers, sums over 2⁶⁴ states, are
estimated by annealed importance sampling, so that held-out digits have log likelihoods.

Run it with `python examples/binary_digits.py`; `--quick` takes fewer digits and steps. Results go to examples/results,
those of the short run to examples/output.
"""

import argparse
import os
import platform
import time
import warnings
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
from numpyro.distributions import constraints
from sklearn.datasets import load_digits

from numpyro_score import PCD, Gibbs, PseudoLikelihood, ScoreMatching, log_partition, sample

D = 64
FIRST, SECOND = np.triu_indices(D, k=1)


def bits(x):
    """The data site: rows of 64 bits, with a field b of each."""
    x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), (D,)), obs=x)
    return 1.0 * x


def independent(x):
    """Each pixel by itself."""
    b = numpyro.sample("b", dist.Normal(0.0, 3.0).expand([D]).to_event(1))
    with numpyro.plate("digits", len(x)):
        numpyro.factor("energy", bits(x) @ b)


def ising(x):
    """A coupling for each pair of pixels."""
    b = numpyro.sample("b", dist.Normal(0.0, 3.0).expand([D]).to_event(1))
    w = numpyro.sample("w", dist.Normal(0.0, 0.5).expand([len(FIRST)]).to_event(1))
    coupling = jnp.zeros((D, D)).at[FIRST, SECOND].set(w)
    with numpyro.plate("digits", len(x)):
        z = bits(x)
        numpyro.factor("energy", z @ b + jnp.einsum("ni,ij,nj->n", z, coupling, z))


def machine(x, hidden=64):
    """Hidden units, each of which is 0 or 1 and depends on all pixels, summed out."""
    start = 0.05 * np.random.default_rng(0).normal(size=(D, hidden))
    w = numpyro.param("w", jnp.asarray(start, float))
    b, c = numpyro.param("b", jnp.zeros(D)), numpyro.param("c", jnp.zeros(hidden))
    with numpyro.plate("digits", len(x)):
        z = bits(x)
        numpyro.factor("energy", z @ b + jax.nn.softplus(z @ w + c).sum(-1))


def load():
    """Digits for the fit and for its test, (N, 64) each."""
    x = load_digits().data >= 8
    order = np.random.default_rng(0).permutation(len(x))
    x = x[order].astype(int)
    cut = 4 * len(x) // 5
    return x[:cut], x[cut:]


def fit_all(x, quick=False):
    """The three fits, by name, and their seconds."""
    chains, pairs = 50 if quick else 500, 10 if quick else 200
    fitters = {
        "independent bits": ScoreMatching(independent, loss=PseudoLikelihood(), optim=optax.lbfgs(), num_steps=30),
        "Ising graph": ScoreMatching(ising, loss=PseudoLikelihood(), optim=optax.lbfgs(), num_steps=pairs),
        "Boltzmann machine": ScoreMatching(
            machine, loss=PCD(chains, kernel=Gibbs()), optim=optax.adam(optax.cosine_decay_schedule(5e-3, 4000)),
            num_steps=20 if quick else 4000,
        ),
    }  # fmt: skip
    fits, seconds = {}, {}
    for name, fitter in fitters.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if quick else "default")  # few steps do not arrive
            fits[name] = fitter.run(jax.random.key(0), x, progress_bar=False)
        seconds[name] = fits[name].cost.seconds
    return fits, seconds


def log_likelihoods(fits, new, quick=False):
    """Mean log likelihoods of new digits with their errors, and log Z with its error, by name."""
    found = {}
    for k, (name, fit) in enumerate(fits.items()):
        settings = dict(num_chains=64, num_levels=20) if quick else dict(num_chains=500, num_levels=2000)
        log_z = log_partition(fit, "ais", jax.random.key(k), **settings)
        values = np.asarray(fit.energy.log_density(1.0 * new)) - log_z.value
        error = np.hypot(values.std(ddof=1) / np.sqrt(len(values)), log_z.stderr)
        found[name] = values.mean(), error, log_z.value, log_z.stderr
    return found


def picture(x, fits, path, quick=False):
    """Digits, and the last draws of chains of each fit, which start at digits."""
    rows = {"digits": x[:16]}
    for name, fit in fits.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of R-hat, which four draws do not tell
            draws = sample(fit, jax.random.key(1), 4, num_chains=16, num_warmup=10 if quick else 2000)
        rows[name] = draws["posterior"]["x"].values[:, -1]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 1.1 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        padded = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)), constant_values=0)
        axis.imshow(np.concatenate(list(padded), axis=1), cmap="gray_r", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def this_machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer digits and steps")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    x, new = load()
    if quick:
        x, new = x[:200], new[:100]
    fits, seconds = fit_all(x, quick)
    table = log_likelihoods(fits, new, quick)
    picture(new, fits, output / "binary_digits.png", quick)
    lines = [
        "# Handwritten digits in black and white", "",
        f"`examples/binary_digits.py`. {len(x)} digits of 64 bits for the fit, {len(new)} for the test. Log "
        "likelihoods in nats for each test digit, with log Z by annealed importance sampling; their errors hold that "
        "of log Z.", "",
        "| fit | log likelihood | log Z | seconds |",
        "|---|---|---|---|",
        *(
            f"| {name} | {value:.2f} ± {error:.2f} | {z:.2f} ± {ez:.2f} | {seconds[name]:.0f} |"
            for name, (value, error, z, ez) in table.items()
        ), "",
        "![Digits, and draws of the three fits](binary_digits.png)", "",
        f"{time.perf_counter() - begin:.0f} seconds in all, on {this_machine()}.", "",
    ]  # fmt: skip
    (output / "binary_digits.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
