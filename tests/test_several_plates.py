"""Data in several plates, of rows of their own: against one stacked model, fits apart, and sums by hand."""

from __future__ import annotations

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    CD,
    DSM,
    ISM,
    MALA,
    PCD,
    SSM,
    Energy,
    ScoreMatching,
    compare,
    dependent_rows,
    fisher_divergence,
    generalized_bayes,
    load,
    log_partition,
    report,
    sample,
    to_arviz,
    windham,
)

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(1.0 + RNG.normal(size=120), jnp.float32)
Y = jnp.asarray(1.0 + 2.0 * RNG.normal(size=75), jnp.float32)


def parameters() -> tuple[Any, Any, Any]:
    return (
        numpyro.sample("mu", dist.Normal(0.0, 3.0)),
        numpyro.sample("tau_x", dist.LogNormal(0.0, 1.0)),
        numpyro.sample("tau_y", dist.LogNormal(0.0, 1.0)),
    )


def two(x: Any, y: Any, size: int | None = None) -> None:
    """A mean that two data sets share, each with its own precision."""
    mu, tau_x, tau_y = parameters()
    with numpyro.plate("xs", len(x), subsample_size=size) as index:
        x = numpyro.sample("x", FLAT, obs=x[index])
        numpyro.factor("of x", -0.5 * tau_x * (x - mu) ** 2)
    with numpyro.plate("ys", len(y)):
        y = numpyro.sample("y", FLAT, obs=y)
        numpyro.factor("of y", -0.5 * tau_y * (y - mu) ** 2)


def stacked(z: Any, is_x: Any) -> None:
    mu, tau_x, tau_y = parameters()
    with numpyro.plate("rows", len(z)):
        z = numpyro.sample("z", FLAT, obs=z)
        numpyro.factor("energy", -0.5 * jnp.where(is_x, tau_x, tau_y) * (z - mu) ** 2)


STACKED = jnp.append(X, Y), jnp.arange(195) < 120
LBFGS = dict(optim=optax.lbfgs(), num_steps=60)


def fitted(model: Any = two, *args: Any, **settings: Any) -> Any:
    return ScoreMatching(model, **{**LBFGS, **settings}).run(KEY, *(args or (X, Y)), progress_bar=False)


@pytest.fixture(scope="module")
def both() -> tuple[Any, Any]:
    return fitted(), fitted(stacked, *STACKED)


def test_a_fit_is_that_of_the_stacked_model(both: Any) -> None:
    """Estimates, errors, influence of every row, calibrated rate, and the posterior's density."""
    fit, other = both
    for site in ("mu", "tau_x", "tau_y"):
        np.testing.assert_allclose(fit.estimates[site], other.estimates[site], rtol=2e-5)
        np.testing.assert_allclose(fit.stderr()[site], other.stderr()[site], rtol=1e-4)
        np.testing.assert_allclose(fit.influence()[site], other.influence()[site], rtol=2e-2, atol=1e-5)
    np.testing.assert_allclose(fit.calibrated_learning_rate(), other.calibrated_learning_rate(), rtol=1e-3)
    densities = [
        numpyro.infer.util.log_density(generalized_bayes(m, ISM()), args, {}, {"mu": 0.5, "tau_x": 0.8, "tau_y": 0.3})[
            0
        ]
        for m, args in ((two, (X, Y)), (stacked, STACKED))
    ]
    np.testing.assert_allclose(*densities, rtol=1e-5)


def test_sums_are_over_the_plates() -> None:
    """The loss of a step, by hand: ½ τ²(x − μ)² − τ of each row."""

    def fixed(x: Any, y: Any) -> None:
        mu = numpyro.param("mu", 0.5)
        for name, value, tau in (("x", x, 2.0), ("y", y, 0.5)):
            with numpyro.plate(f"{name}s", len(value)):
                value = numpyro.sample(name, FLAT, obs=value)
                numpyro.factor(f"of {name}", -0.5 * tau * (value - mu) ** 2)

    sm = ScoreMatching(fixed, optim=optax.sgd(0.0), num_steps=1)
    expected = sum(np.sum(0.5 * tau**2 * (np.asarray(v, float) - 0.5) ** 2 - tau) for v, tau in ((X, 2.0), (Y, 0.5)))
    np.testing.assert_allclose(sm.run(KEY, X, Y, progress_bar=False).losses[0], expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [SSM(), DSM(0.3), CD(kernel=MALA(step_size=0.3))], ids=lambda v: type(v).__name__)
def test_losses_that_draw(loss: Any, both: Any) -> None:
    """In one dimension SSM is ISM; the others are near it. Keys of the plates differ, which the sums do not see."""
    fit = fitted(loss=loss, optim=optax.adam(0.03), num_steps=800)
    assert abs(fit.estimates["mu"] - both[0].estimates["mu"]) < 0.1  # a standard error is 0.085


def test_columns_in_a_loop() -> None:
    """One plate for each column, of columns with other lengths; the closed form finds it in one step."""
    columns = {"a": X, "b": Y, "c": X[:20] + 3.0}

    def model(**columns: Any) -> None:
        tau = numpyro.param("tau", 1.0)
        for name, value in columns.items():
            mean = numpyro.param(f"m_{name}", 0.0)
            with numpyro.plate(f"rows_{name}", len(value)):
                value = numpyro.sample(name, FLAT, obs=value)
                numpyro.factor(f"energy_{name}", mean * value - 0.5 * tau * value**2)

    fit = ScoreMatching(model).run(KEY, progress_bar=False, **columns)
    assert len(fit.losses) == 1
    within = sum(float(jnp.sum((v - v.mean()) ** 2)) for v in columns.values())
    np.testing.assert_allclose(fit.estimates["tau"], sum(map(len, columns.values())) / within, rtol=1e-4)
    np.testing.assert_allclose(fit.estimates["m_c"], fit.estimates["tau"] * columns["c"].mean(), rtol=1e-4)


def test_a_subsampled_plate_counts_for_all_its_rows() -> None:
    """Of a hundred steps with 20 of 120 rows the mean loss is that of all, within four standard errors."""
    sm = ScoreMatching(two, optim=optax.sgd(0.0), num_steps=200)
    fit = sm.run(KEY, X, Y, size=20, progress_bar=False)
    losses, (mu, *taus) = fit.losses, (float(fit.estimates[site]) for site in ("mu", "tau_x", "tau_y"))
    rows = sum(np.sum(0.5 * tau**2 * (np.asarray(v) - mu) ** 2 - tau) for v, tau in zip((X, Y), taus, strict=True))
    whole = rows - scipy.stats.norm.logpdf(mu, 0, 3) - scipy.stats.lognorm.logpdf(taus, 1.0).sum()
    assert abs(losses.mean() - whole) < 4 * losses.std() / 200**0.5 and losses.std() > 0


def test_several_sites_in_one_of_the_plates() -> None:
    """Vectors and angles in a plate beside another, with a mask: as three objectives by hand that share nothing."""
    angles = RNG.vonmises(0.5, 2.0, size=60)
    vectors = RNG.normal(size=(60, 2))
    keep = np.arange(60) < 50

    def model(v: Any, a: Any, y: Any) -> None:
        k, b, t = numpyro.param("k", 1.0), numpyro.param("b", 0.1), numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(v)), handlers.mask(mask=keep):
            v = numpyro.sample("v", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=v)
            a = numpyro.sample("a", dist.ImproperUniform(constraints.circular, (), ()), obs=a)
            numpyro.factor("e", -0.5 * k * (v**2).sum(-1) + b * jnp.cos(a))
        with numpyro.plate("ys", len(y)):
            y = numpyro.sample("y", FLAT, obs=y)
            numpyro.factor("f", -0.5 * t * y**2)

    fit = ScoreMatching(model).run(KEY, vectors, angles, Y, progress_bar=False)
    # ½ θ² q − θ c of each row
    terms = {
        "k": ((vectors[keep] ** 2).sum(axis=1), np.full(50, 2.0)),
        "b": (np.sin(angles[keep]) ** 2, np.cos(angles[keep])),
        "t": (np.asarray(Y, float) ** 2, np.ones(75)),
    }
    for site, (q, c) in terms.items():
        estimate = c.sum() / q.sum()
        np.testing.assert_allclose(fit.estimates[site], estimate, rtol=1e-4)
        error = np.sqrt(125 / 124 * np.sum((estimate * q - c) ** 2)) / q.sum()  # of all 125 rows that count
        np.testing.assert_allclose(fit.stderr()[site], error, rtol=1e-3)
    assert "60 rows, 50 of them with a weight of 3 numbers and 75 rows of 1 number" in fit.summary().lines[0]


def test_what_a_fit_gives(both: Any, tmp_path: Any) -> None:
    """ArviZ data of both sites, a file, a pickle; densities, draws and log Z of one plate."""
    fit = both[0]
    idata = fit.to_arviz()
    assert idata["observed_data"]["x"].shape == (120,) and idata["observed_data"]["y"].shape == (75,)
    fit.save(tmp_path / "fit")
    for again in (load(tmp_path / "fit", two), pickle.loads(pickle.dumps(fit))):
        assert again.stderr()["mu"] == fit.stderr()["mu"]
    of_y = fit.energy["y"]
    assert isinstance(of_y, Energy) and of_y.num_rows == 75
    tau = float(fit.estimates["tau_y"])
    np.testing.assert_allclose(log_partition(of_y).value, 0.5 * np.log(2 * np.pi / tau), rtol=1e-3)
    assert abs(sample(of_y, KEY, 500)["posterior"]["y"].values.std() * tau**0.5 - 1) < 0.1
    np.testing.assert_allclose(of_y.score(jnp.array([1.0])), -tau * (1.0 - fit.estimates["mu"]), rtol=1e-4)


def test_under_nuts(both: Any) -> None:
    fit, model = both[0], generalized_bayes(two, ISM(), both[0].calibrated_learning_rate())
    mcmc = MCMC(NUTS(model, init_strategy=fit.init_strategy), num_warmup=200, num_samples=400, progress_bar=False)
    mcmc.run(KEY, X, Y)
    assert abs(mcmc.get_samples()["mu"].std() / fit.stderr()["mu"] - 1) < 0.25
    assert set(to_arviz(mcmc, X, Y)["observed_data"]) == {"x", "y"}


def crossing(x: Any, y: Any) -> None:
    """A term of y's rows that depends on x as a whole."""
    with numpyro.plate("xs", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("of x", -0.5 * x**2)
    with numpyro.plate("ys", len(y)):
        y = numpyro.sample("y", FLAT, obs=y)
        numpyro.factor("of y", -0.5 * (y - x.mean()) ** 2)


REFUSED = {
    "an energy": (lambda fit: Energy(two, fit.estimates, X, Y), ValueError, "and generalized_bayes fit all of them"),
    "draws": (lambda fit: sample(fit, KEY, 10), TypeError, "take the energy of one of them, e.g. fit.energy['x']"),
    "log Z": (log_partition, TypeError, "each with a density of its own"),
    "divergences": (lambda fit: fisher_divergence(fit, fit, KEY), TypeError, "each with a density of its own"),
    "comparisons": (lambda fit: compare({"a": fit, "b": fit}, X, rng_key=KEY), TypeError, "fit.energy['x']"),
    "a report": (lambda fit: report(fit, "fit.html"), AttributeError, "fit.energy['x']"),
    "a site": (lambda fit: fit.energy["z"], KeyError, "no data site 'z': these are ['x', 'y']"),
    "dependence": (lambda fit: dependent_rows(fit, lags=1), ValueError, "in several beside each other"),
    "windham": (lambda fit: windham(fit, 0.1), TypeError, "and these are in several"),
    "chains": (
        lambda fit: fitted(loss=PCD(kernel=MALA(step_size=0.1)), **LBFGS),
        NotImplementedError,
        "PCD has parameters or memory of its own for rows of one plate",
    ),
    "a term across": (lambda fit: fitted(crossing), ValueError, "a term of data in one plate cannot stand in another"),
    "batches": (
        lambda fit: ScoreMatching(two, optim=optax.adam(0.1)).run_batches(
            KEY, [(X, Y)], num_steps=2, progress_bar=False
        ),
        NotImplementedError,
        "run_batches reads rows of one plate, and the data stand in 2",
    ),
    "a bad row": (
        lambda fit: fitted(two, X, Y.at[3].set(jnp.nan)),
        ValueError,
        "Data 'y' have NaN or infinity in row 3 (1 of 75)",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_one_density_says_so(case: str, both: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call(both[0])
