"""Two surveys as discrete data: which answers hang together, and how many children a marriage has.

The American National Election Study of 1996, ten yes-or-no answers of 944 people: an Ising graph by pseudo-likelihood
with standard errors, beside its exact maximum likelihood, which ten bits allow, and beside the logistic regressions
with an ℓ₁ penalty, one for each answer, that are usual for such graphs [Ravikumar, Wainwright & Lafferty 2010].

The survey of Fair [1978], the children of 6,366 marriages: counts that vary less than a Poisson law lets them. The law
of Conway and Maxwell, λ^y/(y!)^ν with a log linear λ, has a normaliser for each row, which neither pseudo-likelihood
nor discrete Fisher needs. Beside them its maximum likelihood by adding up the series. Pseudo-likelihood is that here,
as a row is one number. Discrete Fisher is not to be used for such data: the ratio of λ from marriage to marriage, and
so of neighbours' probabilities, spans four orders of magnitude, and few marriages with more children than their law
expects decide it all.

Both surveys come with statsmodels. Run it with `python examples/survey.py`; `--quick` takes fewer people and steps.
Results go to examples/results, those of the short run to examples/output.
"""

import argparse
import itertools
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
import scipy.optimize
import statsmodels.api as sm
from jax.scipy.special import gammaln, logsumexp
from numpyro.distributions import constraints
from sklearn.linear_model import LogisticRegression

from numpyro_score import DiscreteFisher, PairLikelihood, PseudoLikelihood, ScoreMatching

# -- answers ------------------------------------------------------------------------------------

ANSWERS = {
    "in a city": lambda d: d.popul > d.popul.median(),
    "watches news": lambda d: d.TVnews >= 4,
    "is right": lambda d: d.selfLR > 4,
    "Clinton is left": lambda d: d.ClinLR <= 2,
    "Dole is right": lambda d: d.DoleLR >= 6,
    "Republican": lambda d: d.PID >= 4,
    "over 44": lambda d: d.age > 44,
    "has a degree": lambda d: d.educ >= 5,
    "earns more": lambda d: d.income > d.income.median(),
    "votes Dole": lambda d: d.vote == 1,
}
D = len(ANSWERS)
FIRST, SECOND = np.triu_indices(D, k=1)


def answers():
    """Ten bits of each person, (944, 10)."""
    table = sm.datasets.anes96.load_pandas().data
    return np.column_stack([np.asarray(of(table)) for of in ANSWERS.values()]).astype(int)


def pairs(x):
    return x[..., FIRST] * x[..., SECOND]


def ising(x):
    """A field for each answer, and a coupling for each pair: the log odds ratio given all other answers."""
    b, w = numpyro.param("b", jnp.zeros(D)), numpyro.param("w", jnp.zeros(len(FIRST)))
    with numpyro.plate("people", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), (D,)), obs=x)
        numpyro.factor("energy", x @ b + pairs(x) @ w)


def exact_ising(x):
    """Couplings of maximum likelihood and their errors, by the sum over all 1,024 states."""
    states = np.array(list(itertools.product((0, 1), repeat=D)))
    features, every = (np.concatenate([v, pairs(v)], -1).astype(np.float64) for v in (x, states))

    def loss(t):
        f = every @ t
        top = f.max()
        p = np.exp(f - top)
        return np.log(p.sum()) + top - features.mean(0) @ t, p @ every / p.sum() - features.mean(0)

    t = scipy.optimize.minimize(loss, np.zeros(features.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-6}).x
    p = np.exp(every @ t - np.logaddexp.reduce(every @ t))
    mean = p @ every
    covariance = np.linalg.inv((every.T * p) @ every - np.outer(mean, mean)) / len(x)
    return t[D:], np.sqrt(np.diag(covariance))[D:]


def by_regressions(x, strength=0.1):
    """Couplings by ℓ₁ logistic regressions of each answer on the others, the mean of the two of a pair."""
    found = np.zeros((D, D))
    for i in range(D):
        others = np.arange(D) != i
        model = LogisticRegression(l1_ratio=1.0, C=strength, solver="liblinear", max_iter=1000)
        found[i, others] = model.fit(x[:, others], x[:, i]).coef_[0]
    return (found + found.T)[FIRST, SECOND] / 2


def graph(x):
    """By pair: coupling and error by pseudo-likelihood and by maximum likelihood, and that of the regressions."""
    fit = ScoreMatching(ising, loss=PseudoLikelihood(), optim=optax.lbfgs(), num_steps=100).run(
        jax.random.key(0), x, progress_bar=False
    )
    exact, errors = exact_ising(x)
    columns = fit.estimates["w"], fit.stderr()["w"], exact, errors, by_regressions(x)
    return np.column_stack([np.asarray(c, np.float64) for c in columns])


# -- children -----------------------------------------------------------------------------------

COVARIATES = ["intercept", "log years married", "religious", "education"]


def marriages():
    """Covariates (6366, 4) and children (6366,); five stands for five and more."""
    table = sm.datasets.fair.load_pandas().data
    z = np.column_stack([np.log(table.yrs_married), table.religious, table.educ])
    z = (z - z.mean(0)) / z.std(0)
    return np.column_stack([np.ones(len(z)), z]).astype(np.float32), np.floor(table.children).to_numpy().astype(int)


def children(y, z):
    """Conway–Maxwell–Poisson: the larger ν, the less the counts vary; ν = 1 is Poisson's law."""
    beta = numpyro.param("beta", jnp.zeros(z.shape[1]))
    nu = numpyro.param("nu", 1.0, constraint=constraints.positive)
    with numpyro.plate("marriages", len(y)):
        y = numpyro.sample("y", dist.ImproperUniform(constraints.nonnegative_integer, (), ()), obs=y)
        numpyro.factor("energy", y * (z @ beta) - nu * gammaln(y + 1.0))


def regression(y, z, loss):
    """(β, ν) by a loss, and standard errors."""
    fitter = ScoreMatching(children, loss=loss, optim=optax.lbfgs(), num_steps=200)
    fit = fitter.run(jax.random.key(0), y, z, progress_bar=False)
    stderr = fit.stderr()
    return np.append(fit.estimates["beta"], fit.estimates["nu"]), np.append(stderr["beta"], stderr["nu"])


def log_law(t, z, most=60):
    """Log p of 0, …, `most` for each row, (N, most + 1), with the series added up; t is (β, ν)."""
    k = jnp.arange(most + 1)
    f = k * (z @ t[:-1])[:, None] - t[-1] * gammaln(k + 1.0)
    return f - logsumexp(f, axis=1, keepdims=True)


def exact_children(y, z, nu=None):
    """(β, ν) of maximum likelihood, their errors and the mean log likelihood; at a given ν, without errors of it."""
    free = z.shape[1] + (nu is None)

    @jax.jit
    def loss(t):
        t = t if nu is None else jnp.append(t, nu)
        return -jnp.mean(jnp.take_along_axis(log_law(t, z), y[:, None], axis=1))

    start = jnp.zeros(free).at[-1].set(1.0 if nu is None else 0.0)
    value_and_grad = jax.jit(jax.value_and_grad(loss))

    def at(t):
        value, slope = value_and_grad(jnp.asarray(t, z.dtype))
        return float(value), np.asarray(slope, np.float64)

    t = scipy.optimize.minimize(at, start, jac=True).x
    errors = np.sqrt(
        np.diag(np.linalg.inv(np.asarray(jax.jit(jax.hessian(loss))(jnp.asarray(t, z.dtype)), float))) / len(y)
    )
    return np.append(t, [] if nu is None else nu), errors, -float(loss(jnp.asarray(t, z.dtype)))


# -- the report ---------------------------------------------------------------------------------


@matplotlib.rc_context({"font.size": 12})
def picture(table, y, z, laws, path):
    """The graph of the couplings that are clear, and children of long marriages beside both laws."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    turn = 2 * np.pi * np.arange(D) / D
    place = np.column_stack([np.cos(turn), np.sin(turn)])
    clear = np.abs(table[:, 0]) > 3 * table[:, 1]
    for i, j, w in zip(FIRST[clear], SECOND[clear], table[clear, 0], strict=True):
        left.plot(*place[[i, j]].T, color="#0072B2" if w > 0 else "#D55E00", linewidth=0.5 + 2 * abs(w), zorder=1)
    left.plot(*place.T, "o", color="white", markeredgecolor="black", markersize=9, zorder=2)
    for (a, b), name in zip(1.14 * place, ANSWERS, strict=True):
        left.text(a, b, name, ha="center" if abs(a) < 0.5 else ("left" if a > 0 else "right"), va="center")
    left.set(xlim=(-2.0, 2.0), ylim=(-1.35, 1.35), aspect="equal")
    left.set_title("Answers: couplings beyond three standard errors\nblue: go together, red: exclude each other")
    left.axis("off")
    chosen, k = z[:, 1] > np.quantile(z[:, 1], 0.75), np.arange(9)
    right.bar(k, [np.mean(y[chosen] == i) for i in k], color="0.8", label="seen (5: five and more)")
    for (name, t), style in zip(laws.items(), ("o-", "s--"), strict=True):
        right.plot(k, np.exp(log_law(jnp.asarray(t, z.dtype), z[chosen])).mean(0)[: len(k)], style, label=name)
    right.set(xlabel="children", ylabel="share of marriages", ylim=(0, 0.42))
    right.set_title("The longest quarter of the marriages")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def this_machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "statsmodels"))
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer people")
    quick = parser.parse_args().quick
    begin = time.perf_counter()
    output = Path(__file__).parent / ("output" if quick else "results")
    output.mkdir(exist_ok=True)
    x, (z, y) = answers(), marriages()
    if quick:
        z, y = z[:1000], y[:1000]
    table = graph(x)
    ours, our_errors = regression(y, z, PseudoLikelihood(max_count=30))
    pairs, pair_errors = regression(y, z, PairLikelihood())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ν goes to the end of its range, which errors say
        ratios, ratio_errors = regression(y, z, DiscreteFisher())
    exact, errors, value = exact_children(y, z)
    poisson, _, poisson_value = exact_children(y, z, nu=1.0)
    laws = {f"Conway–Maxwell–Poisson, ν = {ours[-1]:.2f}": ours, "Poisson": poisson}
    picture(table, y, z, laws, output / "survey.png")
    names = list(ANSWERS)
    order = np.argsort(-np.abs(table[:, 2]))
    clear = np.abs(table[:, 0]) > 3 * table[:, 1]
    lines = [
        "# Two surveys", "",
        f"`examples/survey.py`. The answers of {len(x)} people: of {len(FIRST)} couplings {clear.sum()} are beyond "
        "three standard errors of pseudo-likelihood. Its couplings differ from those of maximum likelihood by "
        f"{np.max(np.abs(table[:, 0] - table[:, 2]) / table[:, 3]):.2f} standard errors at most, and their errors are "
        f"{np.min(table[:, 1] / table[:, 3]):.2f} to {np.max(table[:, 1] / table[:, 3]):.2f} times as large.", "",
        "## The twelve largest couplings", "",
        "| answers | pseudo-likelihood | maximum likelihood | ℓ₁ regressions |",
        "|---|---|---|---|",
        *(
            f"| {names[FIRST[e]]} – {names[SECOND[e]]} | {table[e, 0]:+.2f} ± {table[e, 1]:.2f} "
            f"| {table[e, 2]:+.2f} ± {table[e, 3]:.2f} | {table[e, 4]:+.2f} |"
            for e in order[:12]
        ), "",
        "## Children", "",
        f"{len(y)} marriages. Per marriage the log likelihood is {value:.4f}, and with Poisson's law "
        f"{poisson_value:.4f}.", "",
        "| | maximum likelihood | pseudo-likelihood | pairs, the default | discrete Fisher |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {exact[i]:+.3f} ± {errors[i]:.3f} | {ours[i]:+.3f} ± {our_errors[i]:.3f} "
            f"| {pairs[i]:+.3f} ± {pair_errors[i]:.3f} | {ratios[i]:+.3f} ± {ratio_errors[i]:.3f} |"
            for i, name in enumerate([*COVARIATES, "ν"])
        ), "",
        "![The graph of the answers, and children of long marriages](survey.png)", "",
        f"{time.perf_counter() - begin:.0f} seconds in all, on {this_machine()}.", "",
    ]  # fmt: skip
    (output / "survey.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
