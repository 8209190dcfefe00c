"""Which chemical measurements of a wine depend on each other directly?

A pairwise graphical model with quartic tails, f(x) = -½ xᵀKx - Σ aᵢ xᵢ⁴ with aᵢ > 0, whose normaliser nobody can
write down, on the wine data that come with scikit-learn (178 wines, 13 measurements). An edge of the graph is a
coupling K_ij that is not zero. The same model function is fitted, given a posterior, and sampled from.

Run it with `make demo`, or `python examples/quickstart.py`. Results go to examples/output.
"""

import time
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import load_wine

from numpyro_score import ISM, ScoreMatching, generalized_bayes, to_arviz

OUTPUT = Path(__file__).parent / "output"
D = 13
ROWS, COLS = np.triu_indices(D, k=1)


def model(x=None, n=1, quartic=True):
    """Wines (n, 13), or `n` new ones to sample when x is None; `quartic=False` is the Gaussian model."""
    diagonal = numpyro.sample("diagonal", dist.LogNormal(0.0, 1.0).expand([D]).to_event(1))
    # Most pairs of measurements have little to do with each other: shrink their couplings.
    coupling = numpyro.sample("coupling", dist.Normal(0.0, 0.3).expand([len(ROWS)]).to_event(1))
    k = jnp.diag(diagonal).at[ROWS, COLS].set(coupling).at[COLS, ROWS].set(coupling)
    tail = 0.0
    if quartic:
        tail = numpyro.sample("tail", dist.LogNormal(-3.0, 1.0).expand([D]).to_event(1))

    with numpyro.plate("wines", n if x is None else len(x)):
        flat = dist.ImproperUniform(constraints.real_vector, (), (D,))
        x = numpyro.sample("x", flat, obs=x)
        energy = 0.5 * jnp.einsum("...i,ij,...j->...", x, k, x) + jnp.sum(tail * x**4, axis=-1)
        numpyro.factor("energy", -energy)


def load() -> tuple[jax.Array, list[str]]:
    """Log-scaled, standardised measurements (178, 13), and their names."""
    wine = load_wine()
    x = np.log(wine.data)
    names = [name.replace("_", " ") for name in wine.feature_names]
    names[names.index("od280/od315 of diluted wines")] = "od280/od315"
    return jnp.asarray((x - x.mean(0)) / x.std(0), dtype=float), names


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def fit_and_print(key, x, names):
    heading("(a) Score matching: strongest couplings, with sandwich standard errors")
    fit = ScoreMatching(model).run(key, x)
    estimate, error = fit.estimates["coupling"], fit.stderr()["coupling"]
    for e in np.argsort(-np.abs(estimate))[:8]:
        pair = f"{names[ROWS[e]]} - {names[COLS[e]]}"
        print(f"  {pair:<50} {estimate[e]:+.3f} ± {error[e]:.3f}")
    return fit


def posterior(key, fit, x):
    heading("(b) NUTS on the generalised posterior")
    kernel = NUTS(generalized_bayes(model, ISM()), init_strategy=fit.init_strategy)
    mcmc = MCMC(kernel, num_warmup=300, num_samples=300, num_chains=2, chain_method="vectorized")
    mcmc.run(key, x, extra_fields=("potential_energy", "accept_prob", "num_steps", "diverging"))
    idata = to_arviz(mcmc, x)
    print(az.summary(idata, var_names=["diagonal", "tail"]).to_string())
    print("β = 1 is not calibrated: compare the widths with the sandwich errors, in the picture.")
    return idata


def held_out(key, x):
    heading("(c) Held-out Hyvärinen score, 20% of the wines (smaller is better)")
    shuffled = jax.random.permutation(key, x)
    test, train = shuffled[: len(x) // 5], shuffled[len(x) // 5 :]
    scores = {}
    for label, quartic in (("quartic", True), ("gaussian", False)):
        fit = ScoreMatching(model).run(key, train, quartic=quartic, progress_bar=False)
        scores[label] = ISM()(fit.energy.at(test), key)
        print(f"  {label:<9} {scores[label].mean():8.3f}")
    gain = scores["gaussian"] - scores["quartic"]
    error = gain.std(ddof=1) / len(gain) ** 0.5
    print(f"  gaussian - quartic, paired: {gain.mean():.3f} ± {error:.3f}")


def sample(key, fit, x):
    heading("(d) New wines from the fitted model, by NumPyro's NUTS on the same function")
    fitted = handlers.condition(model, fit.estimates)
    mcmc = MCMC(NUTS(fitted), num_warmup=500, num_samples=1000, num_chains=4, chain_method="vectorized")
    mcmc.run(key)
    new = mcmc.get_samples()["x"].reshape(-1, D)
    off = np.triu_indices(D, k=1)
    correlation = np.abs(np.corrcoef(new.T) - np.corrcoef(x.T))[off]
    kurtosis = [jnp.mean(v**4, axis=0) / jnp.mean(v**2, axis=0) ** 2 for v in (x, new)]
    print(f"  mean:        0 in the data, largest |mean| of a sample {jnp.abs(new.mean(0)).max():.3f}")
    print(f"  sd:          1 in the data, {new.std(0).min():.3f} to {new.std(0).max():.3f} in the sample")
    print(f"  correlation: differs by {correlation.mean():.3f} on average, {correlation.max():.3f} at most")
    print(f"  kurtosis:    {kurtosis[0].mean():.2f} in the data, {kurtosis[1].mean():.2f} in the sample, on average")


def picture(fit, idata, names, path, top=20):
    """The graph, and the strongest couplings with the intervals of both methods."""
    estimate = np.asarray(fit.estimates["coupling"])
    error = np.asarray(fit.stderr()["coupling"])
    draws = idata["posterior"]["coupling"].values.reshape(-1, len(ROWS))
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    sure = np.abs(estimate) > 1.645 * error

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 7.5), width_ratios=[1.25, 1])
    angle = np.pi / 2 - 2 * np.pi * np.arange(D) / D
    nodes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for e in np.flatnonzero(sure):
        ends = nodes[[ROWS[e], COLS[e]]]
        color = "tab:blue" if estimate[e] < 0 else "tab:red"
        left.plot(*ends.T, color=color, lw=9 * abs(estimate[e]), alpha=0.6, solid_capstyle="round")
    left.scatter(*nodes.T, s=140, color="0.2", zorder=3)
    for (px, py), name in zip(nodes, names, strict=True):
        side = "center" if abs(px) < 0.1 else ("left" if px > 0 else "right")
        left.text(1.1 * px, 1.1 * py, name, ha=side, va="center", fontsize=10)
    left.set(xlim=(-1.75, 1.75), ylim=(-1.2, 1.2), aspect="equal")
    left.axis("off")
    left.set_title("Couplings whose 90% interval excludes zero\nblue: rise together, red: opposed")

    order = np.argsort(-np.abs(estimate))[:top][::-1]
    y = np.arange(top)
    right.axvline(0, color="0.7", lw=1)
    right.errorbar(
        estimate[order], y + 0.14, xerr=1.645 * error[order], fmt="o", color="tab:green",
        label="score matching, sandwich",
    )  # fmt: skip
    middle = draws.mean(axis=0)[order]
    right.errorbar(
        middle, y - 0.14, xerr=[middle - low[order], high[order] - middle], fmt="s", color="tab:purple",
        markersize=4, label="NUTS, generalised posterior (β = 1)",
    )  # fmt: skip
    right.set_yticks(y, [f"{names[ROWS[e]]} – {names[COLS[e]]}" for e in order])
    right.set_xlabel("coupling $K_{ij}$, with 90% intervals")
    right.set_title(f"The {top} strongest of {len(ROWS)} couplings")
    right.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    begin = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    x, names = load()
    keys = jax.random.split(jax.random.key(0), 4)
    print(f"{len(x)} wines, {D} measurements, {len(ROWS)} possible edges; device {jax.devices()[0].device_kind}")

    fit = fit_and_print(keys[0], x, names)
    idata = posterior(keys[1], fit, x)
    held_out(keys[2], x)
    sample(keys[3], fit, x)

    heading("(e) Files")
    idata.to_netcdf(OUTPUT / "wine_posterior.nc")
    picture(fit, idata, names, OUTPUT / "wine_edges.png")
    print(f"  {OUTPUT / 'wine_posterior.nc'}\n  {OUTPUT / 'wine_edges.png'}")
    print(f"\n{time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
