"""Which of twelve positive quantities depend on each other directly?

A pairwise graph on the positive orthant: f(x) = -½ xᵀKx + ηᵀx for x > 0, a truncated Gaussian whose normaliser is an
integral over the orthant that nobody can write down. An edge is a coupling K_ij that is not zero. Score matching needs
to be told the support and no more. Declared on the whole space, the same model is the ordinary Gaussian graph, and gets
the strengths wrong. Both are fitted to 20 data sets whose truth is known.

Run it with `python examples/truncated_graph.py`; `--quick` takes two data sets. Results go to examples/results, those
of the short run to examples/output.
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
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from scipy.special import log_ndtr, ndtri_exp

from numpyro_score import ScoreMatching

M = 12
ROWS, COLS = np.triu_indices(M, k=1)


def model(x=None, n=1, support=constraints.positive):
    """Rows (n, 12), or `n` new ones to sample when x is None; with `support=constraints.real` the Gaussian graph."""
    diagonal = numpyro.param("diagonal", jnp.ones(M), constraint=constraints.positive)
    coupling = numpyro.param("coupling", jnp.zeros(len(ROWS)))
    field = numpyro.param("field", jnp.zeros(M))
    k = jnp.diag(diagonal).at[ROWS, COLS].set(coupling).at[COLS, ROWS].set(coupling)
    with numpyro.plate("rows", n if x is None else len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(support, (), (M,)), obs=x)
        numpyro.factor("energy", x @ field - 0.5 * jnp.einsum("...i,ij,...j->...", x, k, x))


SUPPORTS = {"positive support": constraints.positive, "support ignored": constraints.real}
HALF = 1.645  # standard errors in half of a 90% interval
# Neighbours on a ring compete (1.5) and attract (-0.4) in turn, and four chords do. No Gaussian has this K, which has
# negative eigenvalues. On x > 0 it is proper: without the competition K would be diagonally dominant.
RING = {(i, (i + 1) % M): -0.4 if i % 2 else 1.5 for i in range(M)}
CHORDS = {(0, 6): 1.5, (4, 11): 1.5, (2, 9): -0.4, (3, 8): -0.4}


def truth() -> dict[str, np.ndarray]:
    """The parameters that the data are drawn from: 16 edges of 66 pairs."""
    k = np.zeros((M, M))
    for (i, j), value in (RING | CHORDS).items():
        k[i, j] = k[j, i] = value
    return {"diagonal": np.ones(M), "coupling": k[ROWS, COLS], "field": np.ones(M)}


def interactions(params) -> np.ndarray:
    """K, (12, 12)."""
    k = np.diag(np.asarray(params["diagonal"], float))
    k[ROWS, COLS] = k[COLS, ROWS] = params["coupling"]
    return k


def gibbs(rng, k, field, n, sweeps=100):
    """`n` independent draws (n, m) from exp(-½ xᵀKx + ηᵀx) on x > 0, each the end of a Gibbs chain of its own."""
    x = np.ones((n, len(k)))
    for _ in range(sweeps):
        for i in range(len(k)):
            sd = k[i, i] ** -0.5
            mean = (field[i] - x @ k[i] + k[i, i] * x[:, i]) * sd**2
            # By the upper tail and in logs: P(X > x) = u P(X > 0), exact however far below zero the mean is.
            x[:, i] = mean - sd * ndtri_exp(np.log(rng.uniform(size=n)) + log_ndtr(mean / sd))
    return x


def fit_all(data, support):
    """A fit to each data set, all of one shape: the first compiles, the others do not."""
    matching = ScoreMatching(model, optim=optax.lbfgs(), num_steps=100)
    fits = [matching.run(jax.random.key(0), x, support=support, progress_bar=False) for x in data]
    return [(fit, fit.estimates, fit.stderr()) for fit in fits]


def judge(estimates, errors) -> dict[str, float]:
    """How one fit compares with the truth."""
    true, edge = truth(), truth()["coupling"] != 0
    inside = {k: np.abs(estimates[k] - v) < HALF * errors[k] for k, v in true.items()}
    seen = np.abs(estimates["coupling"]) > HALF * errors["coupling"]
    return {
        "edges found, of 16": seen[edge].sum(),
        "false edges, of 50": seen[~edge].sum(),
        "RMSE of K": np.sqrt(np.mean((interactions(estimates) - interactions(true)) ** 2)),
        "coverage of all 90 parameters": np.concatenate(list(inside.values())).mean(),
        "coverage of the 12 diagonal entries": inside["diagonal"].mean(),
        "coverage of the 16 edges": inside["coupling"][edge].mean(),
        "coverage of the 50 absent edges": inside["coupling"][~edge].mean(),
    }


def table(results) -> list[str]:
    """Lines of Markdown: the mean over data sets, and its standard error."""
    lines = [f"| | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    columns = [[judge(*fit[1:]) for fit in fits] for fits in results.values()]
    for name in columns[0][0]:
        values = [np.array([one[name] for one in column]) for column in columns]
        cells = [f"{v.mean():.3f} ± {v.std(ddof=1) / len(v) ** 0.5:.3f}" for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def strongest(estimates, errors, top=8) -> list[str]:
    """Lines of Markdown: the couplings of one fit that are furthest from zero, in standard errors."""
    lines = ["| edge | estimate | standard error | truth |", "|---|---|---|---|"]
    value, error = estimates["coupling"], errors["coupling"]
    for e in np.argsort(-np.abs(value) / error)[:top]:
        lines.append(f"| {ROWS[e]} – {COLS[e]} | {value[e]:+.3f} | {error[e]:.3f} | {truth()['coupling'][e]:+.1f} |")
    return lines


def new_rows(key, estimates, num_samples):
    """Draws (4 · num_samples, 12) from the fitted model, by NumPyro's NUTS on the same function without data."""
    kernel = NUTS(handlers.substitute(model, data=estimates))
    mcmc = MCMC(kernel, num_warmup=500, num_samples=num_samples, num_chains=4, chain_method="vectorized")
    mcmc.run(key)
    return np.asarray(mcmc.get_samples()["x"].reshape(-1, M))


def compare_rows(new, x, ignored, rng) -> list[str]:
    """Sentences about the draws `new`, the data `x`, and draws of the fit that ignores the support."""
    z = (new.mean(0) - x.mean(0)) / x.std(0)
    correlation = np.abs(np.corrcoef(new.T) - np.corrcoef(x.T))[ROWS, COLS]
    covariance = np.linalg.inv(interactions(ignored))
    gaussian = rng.multivariate_normal(covariance @ np.asarray(ignored["field"]), covariance, 20_000)
    return [
        f"- Means differ from the data's by {np.abs(z).max():.3f} standard deviations at most "
        f"(the data's own standard error is {len(x) ** -0.5:.3f}).",
        f"- Correlations differ by {correlation.mean():.3f} on average and {correlation.max():.3f} at most.",
        f"- All draws are positive: {(new > 0).all()}. The Gaussian graph, which has the data's means and correlations "
        f"by construction, puts {np.mean((gaussian < 0).any(1)):.0%} of its rows outside of the support.",
    ]


def graph(axes, estimates, errors, title):
    """The edges whose interval excludes zero, as wide as the partial correlation; grey and dashed if false."""
    k, true = interactions(estimates), truth()["coupling"]
    seen = true != 0 if errors is None else np.abs(estimates["coupling"]) > HALF * errors["coupling"]
    angle = np.pi / 2 - 2 * np.pi * np.arange(M) / M
    nodes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for e in np.flatnonzero(seen):
        i, j = ROWS[e], COLS[e]
        width = 6 * abs(k[i, j]) / np.sqrt(k[i, i] * k[j, j])
        style = dict(color="tab:red" if k[i, j] > 0 else "tab:blue", alpha=0.75)
        if true[e] == 0:
            style = dict(color="0.45", ls=(0, (2, 1.5)))
        axes.plot(*nodes[[i, j]].T, lw=max(width, 1.2), zorder=1 if true[e] == 0 else 2, **style)
    axes.scatter(*nodes.T, s=260, color="0.2", zorder=3)
    for i, (px, py) in enumerate(nodes):
        axes.text(px, py, i, color="white", ha="center", va="center", fontsize=9, zorder=4)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    axes.axis("off")
    axes.set_title(title)


def against_truth(axes, estimates, errors, title):
    """Entries of K, with 90% intervals, against what they should be; equal truths are set side by side."""
    true = truth()
    for name, label, color in (("coupling", "couplings", "tab:green"), ("diagonal", "diagonal", "tab:purple")):
        for value in np.unique(true[name]):
            these = true[name] == value
            x = value + np.linspace(-0.15, 0.15, these.sum())
            y, bars = estimates[name][these], HALF * errors[name][these]
            axes.errorbar(x, y, yerr=bars, fmt="o", ms=4, lw=1.2, color=color, label=label if value >= 1 else None)
            axes.plot(x[[0, -1]], [value, value], color="0.1", lw=2.5, zorder=3)
    axes.plot([], [], color="0.1", lw=2.5, label="truth")
    axes.set(xlabel="true entry of $K$", title=title, xticks=[-0.4, 0, 1, 1.5])
    axes.spines[["top", "right"]].set_visible(False)


@matplotlib.rc_context({"font.size": 12})
def picture(fits, new, x, path):
    """The graphs of the truth and two fits, the fits' entries against the truth, and the draws against the data."""
    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(15, 10.5))
    titles = ("score matching on $x > 0$", "Gaussian graph, support ignored")
    graph(a, truth(), None, "truth\nred competes, blue attracts, width: strength")
    for axes, fit, title in zip((b, c), fits, titles, strict=True):
        found, false, *_ = judge(*fit[1:]).values()
        graph(axes, *fit[1:], f"{title}\n{found} of 16 edges, {false} of 50 false (dashed)")
    for axes, fit, title in zip((d, e), fits, titles, strict=True):
        against_truth(axes, *fit[1:], title)
    d.set_ylabel("estimate, with 90% interval")
    d.sharey(e)
    e.legend(frameon=False, loc="upper left")
    f.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
    f.scatter(np.corrcoef(x.T)[ROWS, COLS], np.corrcoef(new.T)[ROWS, COLS], s=22, color="tab:green")
    f.set(xlabel="correlation in the data", ylabel="in draws from the fitted model", title="NUTS on the fitted model")
    f.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "optax"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two data sets of 500 rows")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    sets, n = (2, 500) if quick else (20, 2000)
    rng = np.random.default_rng(0)
    data = gibbs(rng, interactions(truth()), truth()["field"], sets * n).astype(np.float32).reshape(sets, n, M)
    print(f"{sets} data sets of {n} rows, {M} variables; device {jax.devices()[0].device_kind}", flush=True)

    results = {name: fit_all(data, support) for name, support in SUPPORTS.items()}
    first = [fits[0] for fits in results.values()]
    new = new_rows(jax.random.key(1), first[0][1], 200 if quick else 1000)
    lines = [
        "# A pairwise graph on the positive orthant", "",
        f"`examples/truncated_graph.py`: {sets} data sets of {n} rows. Mean over data sets ± its standard error; "
        "intervals are 90%, from sandwich standard errors. By their nature they find 5 of 50 absent edges.", "",
        *table(results), "",
        "The surest edges in the first data set, by score matching on x > 0:", "",
        *strongest(*first[0][1:]), "",
        "Draws from that fit by NUTS, on the same model without data:", "",
        *compare_rows(new, data[0], first[1][1], rng),
    ]  # fmt: skip
    picture(first, new, data[0], output / "truncated_graph.png")
    lines += ["", "![The graphs, the estimates and the draws](truncated_graph.png)", ""]
    lines += [f"{time.perf_counter() - begin:.0f} seconds in all, on {machine()}.", ""]
    (output / "truncated_graph.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
