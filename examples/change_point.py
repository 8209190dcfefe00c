"""A change point seen through a blur: posteriors with a diffusion as prior, beside the exact one.

A signal of 16 numbers has one level up to a point and another after it, and some texture. Of its moving average every
second number is seen, with noise. Given the point the signal is normal, so that the law of signals, their posterior and
the evidence are mixtures of 15 normal laws in closed form. A score network is fitted to draws of the law, and is then
the prior of `posterior`, by weighted particles and by guidance alone. Ranks over simulated data sets say which of the
two can be believed; the exact posterior says whether that is so.

Run it with `python examples/change_point.py`; `--quick` takes few steps. Results go to examples/results, those of the
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
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from numpyro_score import (
    ContinuousDSM,
    Energy,
    ScoreMatching,
    plot_simulation_ranks,
    posterior,
    preconditioned_score,
    score_factor,
    simulation_ranks,
)

DIM, TEXTURE, SEEN_NOISE = 16, 0.2, 0.2
SMALLEST, LARGEST = 0.05, 50.0
WIDTH = 256
RNGS = nnx.Rngs(0)
NETWORK = nnx.Sequential(
    nnx.Linear(DIM + 1, WIDTH, rngs=RNGS), nnx.swish, nnx.Linear(WIDTH, WIDTH, rngs=RNGS), nnx.swish,
    nnx.Linear(WIDTH, WIDTH, rngs=RNGS), nnx.swish, nnx.Linear(WIDTH, DIM, rngs=RNGS),
)  # fmt: skip

# Rows of the blur: the mean of five neighbours, fewer at the ends; of every second number.
NEAR = np.abs(np.arange(DIM)[:, None] - np.arange(DIM)) <= 2
BLUR = (NEAR / NEAR.sum(axis=1, keepdims=True))[::2]
BEFORE = np.arange(DIM) < np.arange(1, DIM)[:, None]  # the point, then the signal
COVARIANCES = np.array([np.outer(b, b) + np.outer(~b, ~b) for b in BEFORE], float) + TEXTURE**2 * np.eye(DIM)
AXES = np.linalg.eigh(COVARIANCES)


def network(x, sigma=1.0):
    """Signals with noise, by their score."""
    net = nnx_module("net", NETWORK)

    def at(u, noise):
        return net(jnp.column_stack([u, noise]))

    with numpyro.plate("signals", len(x), subsample_size=min(len(x), 512)):
        signal = dist.ImproperUniform(constraints.real_vector, (), (DIM,))
        x = numpyro.sample("x", signal, obs=numpyro.subsample(x, event_dim=1))
        score_factor("score", x, preconditioned_score(at, x, sigma, 1.0))


def law(x, sigma=1.0):
    """Signals with noise, by their density itself."""
    variances, axes = (jnp.asarray(v, x.dtype) for v in AXES)
    spread = variances + jnp.broadcast_to(sigma, len(x))[:, None, None] ** 2
    with numpyro.plate("signals", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (DIM,)), obs=x)
        along = jnp.einsum("nd,kde->nke", x, axes)
        numpyro.factor("energy", jax.nn.logsumexp(-0.5 * jnp.sum(along**2 / spread + jnp.log(spread), -1), axis=-1))


def observed(x, y=None):
    """What is seen of one signal."""
    numpyro.sample("y", dist.Normal(jnp.asarray(BLUR, x.dtype) @ x, SEEN_NOISE).to_event(1), obs=y)


def draw(rng, n):
    """Signals (n, 16)."""
    levels, point = rng.normal(size=(2, n, 1)), rng.integers(1, DIM, size=(n, 1))
    signal = np.where(np.arange(DIM) < point, *levels)
    return jnp.asarray(signal + TEXTURE * rng.normal(size=(n, DIM)), float)


def exact(y):
    """Of signals with the noise SMALLEST given y: weights (15,), means (15, 16), covariances and the log evidence."""
    joint = COVARIANCES + SMALLEST**2 * np.eye(DIM)
    seen = BLUR @ joint @ BLUR.T + SEEN_NOISE**2 * np.eye(len(BLUR))
    log_weights = [multivariate_normal(cov=s).logpdf(y) for s in seen]
    gain = np.linalg.solve(seen, BLUR @ joint).transpose(0, 2, 1)
    evidence = logsumexp(log_weights)
    return np.exp(log_weights - evidence), gain @ y, joint - gain @ BLUR @ joint, evidence - np.log(len(seen))


def exact_draws(rng, y, n):
    """Signals (n, 16) with the noise SMALLEST given y."""
    weights, means, covariances, _ = exact(y)
    k = rng.choice(len(weights), n, p=weights)
    return means[k] + np.einsum("nij,nj->ni", np.linalg.cholesky(covariances)[k], rng.normal(size=(n, DIM)))


def point_weights(x):
    """The mean over signals (n, 16), with the noise SMALLEST, of the probabilities of the 15 points."""
    spread = AXES[0] + SMALLEST**2
    along = np.einsum("nd,kde->nke", np.asarray(x, float), AXES[1])
    log_density = -0.5 * np.sum(along**2 / spread + np.log(spread), axis=-1)
    return np.exp(log_density - logsumexp(log_density, axis=1, keepdims=True)).mean(axis=0)


def distance(rng, x, z, num_directions=200):
    """The sliced Wasserstein distance: of quantiles along random directions, root mean square."""
    v = rng.normal(size=(DIM, num_directions))
    v /= np.linalg.norm(v, axis=0)
    quantiles = (np.arange(500) + 0.5) / 500
    x, z = (np.quantile(np.asarray(a, float) @ v, quantiles, axis=0) for a in (x, z))
    return float(np.sqrt(np.mean((x - z) ** 2)))


def fit(key, x, num_steps):
    optim = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    return ScoreMatching(
        network, optim=optim, loss=ContinuousDSM(SMALLEST, LARGEST), average=0.999, num_steps=num_steps
    ).run(key, x, progress_bar=False)


def one_posterior(rng, source, method, key, y, n):
    """A row of the table and draws of the posterior."""
    found = posterior(
        source,
        observed,
        key,
        jnp.asarray(y, float),
        method=method,
        num_particles=n,
        noise_range=(SMALLEST, LARGEST),  # the fit knows them, the law has to be told
    )
    draws = found.resample(jax.random.fold_in(key, 1), 4000)
    truth, others = exact_draws(rng, y, 4000), exact_draws(rng, y, round(found.ess))
    floor = distance(rng, others, truth)
    points = 0.5 * np.abs(point_weights(draws) - point_weights(truth)).sum()
    evidence = "" if found.biased else f"{found.log_evidence:.2f} ± {found.log_evidence_stderr:.2f}"
    cells = f"{evidence} | {distance(rng, draws, truth) / floor:.1f} | {points:.2f} | {found.ess:.0f}"
    return cells, draws


@matplotlib.rc_context({"font.size": 12})
def picture(x, y, panels, ranks, path):
    """The posteriors' signals, and the ranks of the two methods."""
    figure, axes = plt.subplots(1, 5, figsize=(21, 4.2), layout="constrained")
    for a, (title, draws) in zip(axes, panels.items(), strict=False):
        a.plot(np.asarray(draws)[:60].T, color="tab:blue", linewidth=0.6, alpha=0.4)
        a.plot(np.asarray(x), color="black", linewidth=2, label="the signal")
        a.plot(np.arange(0, DIM, 2), y, "o", color="tab:orange", label="seen of its blur")
        a.set(title=title, xlabel="place", ylim=(-2.2, 2.2))
    axes[0].legend(fontsize="small")
    for a, (name, found) in zip(axes[3:], ranks.items(), strict=True):
        plot_simulation_ranks(found, ax=a)
        a.set_title(f"{name}: p = {found.joint_pvalue:.3f}, {len(found.ranks['log likelihood'])} sets")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "flax"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few steps, data sets and particles")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    num_steps, n, num_sets = (500, 64, 20) if quick else (10_000, 512, 200)
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 8)
    x = draw(rng, 50_000)
    found = fit(keys[0], x, num_steps)
    fitted = time.perf_counter() - begin

    signal = draw(rng, 1)[0]
    y = BLUR @ np.asarray(signal) + SEEN_NOISE * rng.normal(size=len(BLUR))
    panels = {"exact posterior": exact_draws(rng, y, 4000)}
    table = [
        "| prior | method | log evidence | distance, floors | points | effective draws |", "|---|---|---|---|---|---|",
        f"| the law | exact | {exact(y)[3]:.2f} | 1 | 0 | |",
    ]  # fmt: skip
    energy = Energy(law, {}, x[:2000])
    for prior, source, method, key in (
        ("the law", energy, "smc", keys[1]),
        ("the law", energy, "tds", keys[2]),
        ("network", found, "tds", keys[3]),
        ("network", found, "guided", keys[4]),
    ):
        cells, draws = one_posterior(rng, source, method, key, y, n)
        table.append(f"| {prior} | {method} | {cells} |")
        if prior == "network":
            panels[f"network, {method}"] = draws

    truths = draw(rng, num_sets) + SMALLEST * jnp.asarray(rng.normal(size=(num_sets, DIM)), float)
    ranks = {}
    for method, key in (("tds", keys[5]), ("guided", keys[6])):
        ranks[method] = simulation_ranks(
            found, observed, key, num_sets=num_sets, truths=truths, method=method, num_particles=max(n // 2, 32)
        )
    calibration = [
        "| method | smallest p of coordinates' ranks | p of the log likelihood's ranks | p of pairs |",
        "|---|---|---|---|",
    ]
    for method, result in ranks.items():
        p = result.pvalues()
        coordinates = min(v for k, v in p.items() if not k.startswith("log "))
        calibration.append(f"| {method} | {coordinates:.3f} | {p['log likelihood']:.2g} | {result.joint_pvalue:.3f} |")

    picture(signal, y, panels, ranks, output / "change_point.png")
    lines = [
        "# A change point seen through a blur", "",
        f"`examples/change_point.py`: a score network fitted to {len(x)} signals in {num_steps} steps, {fitted:.0f} "
        "seconds. Sliced Wasserstein distances from 4,000 exact draws, in units of that of as many exact draws as are "
        "effective; half the sum of absolute differences in the probabilities of the 15 points.", "",
        *table, "",
        f"Ranks over {num_sets} simulated data sets, with signals drawn from the law itself:", "",
        *calibration, "",
        "![Posteriors and ranks](change_point.png)", "",
        f"{time.perf_counter() - begin:.0f} seconds in all, on {machine()}.", "",
    ]  # fmt: skip
    (output / "change_point.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
