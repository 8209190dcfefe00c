"""Standard errors where rows depend on each other: against least squares of statsmodels, and slow sums."""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
import statsmodels.api as sm
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

from numpyro_score import DSM, ISM, SandwichError, ScoreMatching, ScoreMatchingResult, dependent_rows, load, windham
from numpyro_score.inference import dependent, result
from numpyro_score.uncertainty import Dependence, jackknife, sandwich, spread_root

FLAT = dist.ImproperUniform(constraints.real, (), ())
GROUPS, EACH = 40, 5
N = GROUPS * EACH


def line(y: Any, z: Any) -> None:
    """Least squares: the gradient of the loss of a row is its residual times its covariates."""
    a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
    with numpyro.plate("rows", len(y)):
        y = numpyro.sample("y", FLAT, obs=y)
        numpyro.factor("energy", -0.5 * (y - a - b * z) ** 2)


def field(x: Any) -> None:
    """The mean of a field."""
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("row", x.shape[0], dim=-2), numpyro.plate("column", x.shape[1], dim=-1):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2)


def mixed_effects(y: Any, group: Any) -> None:
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("groups", GROUPS):
        mu = numpyro.sample("mu", dist.Normal(m, 1.0))
    with numpyro.plate("rows", len(y)):
        y = numpyro.sample("y", FLAT, obs=y)
        numpyro.factor("energy", -0.5 * (y - mu[group]) ** 2)


@functools.cache
def series() -> tuple[np.ndarray, np.ndarray]:
    """A response and a covariate whose products with the residual go on from row to row."""
    rng = np.random.default_rng(0)
    noise, z = rng.normal(size=(2, N))
    for t in range(1, N):
        noise[t] += 0.6 * noise[t - 1]
        z[t] += 0.6 * z[t - 1]
    return (1.0 + 0.5 * z + noise).astype(np.float32), z.astype(np.float32)


@functools.cache
def fitted() -> ScoreMatchingResult:
    y, z = series()
    return ScoreMatching(line).run(jax.random.key(0), jnp.asarray(y), jnp.asarray(z), progress_bar=False)


@functools.cache
def fitted_field() -> ScoreMatchingResult:
    x = np.random.default_rng(1).normal(size=(20, 15)).cumsum(axis=1)[:, 3:].astype(np.float32)
    return ScoreMatching(field).run(jax.random.key(0), jnp.asarray(x), progress_bar=False)


def least_squares(**how: Any) -> np.ndarray:
    y, z = (v.astype(np.float64) for v in series())
    return np.asarray(sm.OLS(y, sm.add_constant(z)).fit(use_t=False, **how).bse)


LABELS = np.random.default_rng(2).permutation(np.repeat(np.arange(GROUPS), EACH))


@pytest.mark.parametrize(
    "labels", [LABELS, [f"patient {k}" for k in LABELS], LABELS.astype(float), jnp.asarray(LABELS)]
)
def test_groups_are_those_of_least_squares(labels: Any) -> None:
    """The jackknife of least squares by statsmodels, each group left out in turn; labels of any kind."""
    errors = dependent_rows(fitted(), groups=labels).stderr()
    np.testing.assert_allclose([errors["a"], errors["b"]], left_out(LABELS), rtol=2e-4)
    of = dependent_rows(fitted(), groups=labels).stderr(of=lambda estimates: estimates["a"])
    np.testing.assert_allclose(of, errors["a"], rtol=1e-5)


def test_intervals_of_groups_are_of_the_t_law() -> None:
    """Of one degree of freedom less than there are groups, of windows by their number; of rows of their own normal."""
    groups = np.repeat(np.arange(GROUPS), EACH)
    for fit, t in (
        (dependent_rows(fitted(), groups=groups), scipy.stats.t.ppf(0.95, GROUPS - 1)),
        (dependent_rows(fitted(), lags=4), scipy.stats.t.ppf(0.95, 3 * N * 5 / (2 * 25 + 1))),
        (fitted(), scipy.stats.norm.ppf(0.95)),
    ):
        table, errors = fit.summary(level=0.9), fit.stderr()
        for name in "ab":
            expected = fit.estimates[name] + np.array([-t, t]) * errors[name]
            np.testing.assert_allclose(table.loc[name, ["5%", "95%"]].astype(float), expected, rtol=1e-5)


def left_out(labels: np.ndarray) -> np.ndarray:
    """Their spread over fits without one of the groups."""
    y, z = (v.astype(np.float64) for v in series())
    kept = [labels != k for k in np.unique(labels)]
    fits = np.array([sm.OLS(y[k], sm.add_constant(z[k])).fit().params for k in kept])
    return np.asarray(np.sqrt((len(fits) - 1) * fits.var(axis=0)))


@pytest.mark.parametrize("constraint", [constraints.positive, constraints.interval(0.0, 3.0)])
def test_constraints_change_no_errors_of_groups(constraint: Any) -> None:
    """Few groups that differ: the objective is quadratic in the precision, and so exact, and not in its logarithm."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=80) * (1 + 1.5 * rng.random(8)[np.repeat(np.arange(8), 10)])
    labels = np.repeat(np.arange(8), 10)

    def model(x: Any) -> None:
        tau = numpyro.param("tau", 1.0, constraint=constraint)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * tau * x**2)

    fit = ScoreMatching(model).run(jax.random.key(0), x.astype(np.float32), progress_bar=False)
    with pytest.warns(UserWarning, match="over 8 groups"):
        error = dependent_rows(fit, groups=labels).stderr()["tau"]
    without = np.array([1 / np.mean(x[labels != k] ** 2) for k in range(8)])
    np.testing.assert_allclose(error, np.sqrt(7 * without.var()), rtol=1e-4)


def test_many_parameters_have_the_sandwich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clustered errors of statsmodels, but for its G/(G − 1) alone, which is ours."""
    monkeypatch.setattr(jackknife, "MOST_PARAMETERS", 1)
    errors = dependent_rows(fitted(), groups=LABELS).stderr()
    expected = least_squares(cov_type="cluster", cov_kwds={"groups": LABELS, "use_correction": False})
    np.testing.assert_allclose([errors["a"], errors["b"]], expected * (GROUPS / (GROUPS - 1)) ** 0.5, rtol=2e-4)


def test_a_parameter_of_one_group_is_told() -> None:
    """Without that group there is nothing to tell it; the other parameter's errors are there."""
    y, _ = series()
    fit = ScoreMatching(line).run(jax.random.key(0), y, (LABELS == 3).astype(np.float32), progress_bar=False)
    with pytest.warns(UserWarning, match="site 'b' are determined by one group of rows alone"):
        clustered = dependent_rows(fit, groups=LABELS)
    mean = y[LABELS != 3].astype(np.float64)
    groups = np.array([mean[LABELS[LABELS != 3] != k].mean() for k in range(GROUPS) if k != 3])
    np.testing.assert_allclose(clustered.stderr()["a"], np.sqrt((len(groups) - 1) * groups.var()), rtol=0.03)


def share_of_mean(lags: int, n: int = N) -> float:
    """Of the spread of n rows, by Bartlett's weights of all pairs of them."""
    return sum((1 - abs(k) / (lags + 1)) * (n - abs(k)) for k in range(-lags, lags + 1)) / n**2


@pytest.mark.parametrize("lags", [1, 4])
def test_lags_are_those_of_least_squares(lags: int) -> None:
    """Newey and West's of statsmodels, without the share that the mean of the rows takes away."""
    errors = dependent_rows(fitted(), lags=lags).stderr()
    expected = least_squares(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": False})
    np.testing.assert_allclose([errors["a"], errors["b"]], expected / (1 - share_of_mean(lags)) ** 0.5, rtol=2e-4)


def test_lags_in_a_field_are_products() -> None:
    """Against the double sum over pairs of cells, with weights (1 − |i|/3)(1 − |j|/5) of lags 2 and 4."""
    fit = fitted_field()
    x = np.asarray(fit.args[0], np.float64)
    centred = x - x.mean()
    rows, columns = x.shape
    total = share = 0.0
    for i in range(-2, 3):
        for j in range(-4, 5):
            weight = (1 - abs(i) / 3) * (1 - abs(j) / 5)
            there = centred[max(i, 0) : rows + min(i, 0), max(j, 0) : columns + min(j, 0)]
            here = centred[max(-i, 0) : rows + min(-i, 0), max(-j, 0) : columns + min(-j, 0)]
            total += weight * np.sum(here * there)
            share += weight * here.size / x.size**2
    expected = (total / (1 - share)) ** 0.5 / x.size
    with pytest.warns(UserWarning, match="windows that fit 16 times into the rows"):
        error = dependent_rows(fit, lags={"row": 2, "column": 4}).stderr()["mu"]
    np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_a_plate_names_groups() -> None:
    """Each row of the field on its own: the same as labels."""
    fit = fitted_field()
    with pytest.warns(UserWarning, match="over 20 groups: with fewer than 30 they come out too small"):
        named = dependent_rows(fit, groups="row").stderr()["mu"]
    with pytest.warns(UserWarning, match="over 20 groups"):
        labels = dependent_rows(fit, groups=np.repeat(np.arange(20), 12)).stderr()["mu"]
    assert named == labels
    assert named > 2 * fit.stderr()["mu"]


def test_lags_along_one_plate_leave_the_other_independent() -> None:
    """All lags along a row of the field, at weights near one, are the sums of rows."""
    fit = fitted_field()
    with pytest.warns(UserWarning, match="over 20 groups"):
        groups = dependent_rows(fit, groups="row").stderr()["mu"]
    with pytest.warns(UserWarning, match="windows that fit"):
        lags = dependent_rows(fit, lags={"column": 11}).stderr()["mu"]
    assert 0.6 * groups < lags < groups  # Bartlett's weights fall off


def test_automatic_lags_follow_the_dependence() -> None:
    """Andrews' choice by hand of each coordinate's first autocorrelation; none where rows are independent."""
    y, z = (v.astype(np.float64) for v in series())
    residual = y - sm.OLS(y, sm.add_constant(z)).fit().fittedvalues
    gradients = np.stack([residual, residual * z], axis=-1)
    gradients -= gradients.mean(axis=0)
    rho = (gradients[1:] * gradients[:-1]).sum(axis=0) / (gradients**2).sum(axis=0)
    window = np.ceil(1.1447 * (N * np.mean(4 * rho**2 / ((1 - rho) ** 2 * (1 + rho) ** 2))) ** (1 / 3))
    with pytest.warns(UserWarning, match="windows that fit"):
        automatic = dependent_rows(fitted(), lags="auto")
        assert f"up to {window - 1:.0f} apart" in automatic.summary().lines[1]
    noise = jax.random.normal(jax.random.key(3), (N,))
    white = ScoreMatching(line).run(
        jax.random.key(0), noise, jnp.asarray(z[::-1].copy(), jnp.float32), progress_bar=False
    )
    assert dependent_rows(white, lags="auto").stderr()["a"] < 1.3 * white.stderr()["a"]


def test_a_row_of_its_own_is_independent() -> None:
    """Groups of one row give the ordinary errors, of functions and robust fits, too."""
    fit = fitted()
    own = dependent_rows(fit, groups=np.arange(N))
    np.testing.assert_allclose(own.covariance(), fit.covariance(), rtol=1e-5)

    def ratio(estimates: dict[str, Any]) -> Any:
        return {"ratio": estimates["a"] / estimates["b"], "both": jnp.stack([estimates["a"], estimates["b"]])}

    for got, expected in zip(jax.tree.leaves(own.stderr(of=ratio)), jax.tree.leaves(fit.stderr(of=ratio)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    np.testing.assert_allclose(windham(own, 0.1).stderr()["b"], windham(fit, 0.1).stderr()["b"], rtol=1e-4)


def test_functions_and_files_keep_the_dependence(tmp_path: Any) -> None:
    fit = dependent_rows(fitted(), groups=LABELS)
    np.testing.assert_allclose(fit.stderr(of=lambda e: 2 * e["b"]), 2 * fit.stderr()["b"], rtol=1e-4)
    fit.save(tmp_path / "fit")
    for again in (load(tmp_path / "fit", line), pickle.loads(pickle.dumps(fit))):
        assert again.stderr()["b"] == fit.stderr()["b"]
        assert "rows of one of 40 groups depend on each other" in again.summary().lines[1]


def test_rows_without_weight_are_in_no_group() -> None:
    """Masked rows: as the fit without them."""
    y, z = map(jnp.asarray, series())

    def masked(y: Any, z: Any, keep: Any) -> None:
        with numpyro.handlers.mask(mask=keep):
            line(y, z)

    keep = jnp.asarray(LABELS >= 5)
    fit = ScoreMatching(masked).run(jax.random.key(0), y, z, keep, progress_bar=False)
    fewer = ScoreMatching(line).run(jax.random.key(0), y[keep], z[keep], progress_bar=False)
    got = dependent_rows(fit, groups=LABELS).stderr()
    expected = dependent_rows(fewer, groups=LABELS[keep]).stderr()
    np.testing.assert_allclose([got["a"], got["b"]], [expected["a"], expected["b"]], rtol=1e-4)


def in_a_scan(x: Any) -> None:
    """An autoregression of first order, whose first value is from N(0, 1/τ)."""
    a, tau = numpyro.param("a", 0.1), numpyro.param("tau", 1.0)

    def step(before: Any, value: Any) -> Any:
        value = numpyro.sample("x", FLAT, obs=value)
        numpyro.factor("energy", -0.5 * tau * (value - a * before) ** 2)
        return value, None

    scan(step, 0.0, x)


def as_one_site(x: Any) -> None:
    a, tau = numpyro.param("a", 0.1), numpyro.param("tau", 1.0)
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (len(x),)), obs=x)
    numpyro.factor("energy", -0.5 * tau * jnp.sum((x - a * jnp.append(0.0, x[:-1])) ** 2))


def parts_by_hand(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """½ s_t² + ∂_t s_t of the autoregression: s = −τQx, with Q tridiagonal."""
    a, tau = theta
    residual = x - a * np.append(0.0, x[:-1])
    score = -tau * (residual - a * np.append(residual[1:], 0.0))
    return 0.5 * score**2 - tau * np.where(np.arange(len(x)) < len(x) - 1, 1 + a**2, 1.0)


@pytest.mark.parametrize("model", [in_a_scan, as_one_site])
def test_a_series_of_one_point(model: Any) -> None:
    """The sandwich of its parts, from derivatives by differences in double precision: windows of four."""
    x = series()[1][:120]
    fit = ScoreMatching(model, loss=ISM(), optim=optax.lbfgs(), num_steps=50)
    fit = fit.run(jax.random.key(0), jnp.asarray(x), progress_bar=False)
    assert fit.energy.num_rows == 1
    with pytest.raises(SandwichError, match="the data are one row"):
        fit.stderr()
    theta, steps, parts = np.array([float(fit.estimates[k]) for k in ("a", "tau")]), 1e-4 * np.eye(2), []
    at = partial(parts_by_hand, x=x.astype(np.float64))
    for e in steps:
        parts.append((at(theta + e) - at(theta - e)) / 2e-4)
    hessian = [
        [np.sum(at(theta + d + e) - at(theta + d - e) - at(theta - d + e) + at(theta - d - e)) for d in steps]
        for e in steps
    ]
    g = np.transpose(parts)
    g = g - g.mean(axis=0)
    n, spread = len(x), np.zeros((2, 2))
    for k in range(-3, 4):
        spread += (1 - abs(k) / 4) * g[max(k, 0) : n + min(k, 0)].T @ g[max(-k, 0) : n + min(-k, 0)]
    inverse = np.linalg.inv(np.array(hessian) / 4e-8)
    expected = np.sqrt(np.diag(inverse @ spread @ inverse) / (1 - share_of_mean(3, n)))
    errors = dependent_rows(fit, lags=3).stderr()
    np.testing.assert_allclose([errors["a"], errors["tau"]], expected, rtol=2e-3)


def test_automatic_lags_of_one_point() -> None:
    """By SSM, the default of a long series; one lag more or less than of ISM's parts is chance."""
    fit = ScoreMatching(in_a_scan, optim=optax.lbfgs(), num_steps=50)
    fit = dependent_rows(fit.run(jax.random.key(0), jnp.asarray(series()[1]), progress_bar=False), lags="auto")
    assert 0.03 < fit.stderr()["a"] < 0.2  # √((1 − a²)/N) = 0.057 by likelihood
    assert "apart along the series depend on each other" in fit.summary().lines[-1]


def few(fit: Callable[[], ScoreMatchingResult], **how: Any) -> Callable[[], Any]:
    return lambda: dependent_rows(fit(), **how).stderr()


REFUSED = {
    "neither": (few(fitted), ValueError, "takes groups=... or lags=..., one of them"),
    "both": (few(fitted, groups=LABELS, lags=1), ValueError, "one of them"),
    "not a fit": (lambda: dependent_rows({"a": 0.0}, lags=1), TypeError, "takes a fit of ScoreMatching, got dict"),
    "unknown plate": (few(fitted, groups="schools"), ValueError, "'schools' is no plate of rows, which are ['rows']"),
    "another length": (few(fitted, groups=LABELS[1:]), ValueError, "shape (199,), and the data have 200 rows"),
    "missing labels": (few(fitted, groups=[None, *LABELS[1:]]), ValueError, "no label for rows [0]"),
    "nan": (few(fitted, groups=np.where(LABELS == 3, np.nan, LABELS)), ValueError, "no label for rows"),
    "one group": (few(fitted, groups=np.zeros(N)), SandwichError, "and these are 1: give smaller groups"),
    "too many lags": (few(fitted, lags=N), ValueError, "reaches beyond the 200 rows of rows"),
    "no lag": (few(fitted, lags=0), ValueError, "a lags of at least 1"),
    "half a lag": (few(fitted, lags=1.5), TypeError, "an integer as lags"),
    "a word": (few(fitted, lags="some"), ValueError, "lags must be a number, 'auto'"),
    "which plate": (few(fitted_field, lags=2), ValueError, "write lags={'column': 2}"),
    "no such plate": (few(fitted_field, lags={"time": 2}), ValueError, "names 'time', which is no plate of rows"),
    "one point by another loss": (
        lambda: dependent_rows(
            ScoreMatching(as_one_site, loss=DSM(0.1), num_steps=2).run(
                jax.random.key(0), jnp.asarray(series()[0]), progress_bar=False
            ),
            lags=1,
        ),
        SandwichError,
        "need the loss as a sum over its numbers",
    ),
    "diagonal": (
        lambda: dependent_rows(fitted(), lags=1).stderr(diagonal=True),
        SandwichError,
        "takes rows as independent",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_effects_of_groups_are_counted_once() -> None:
    """A hierarchy says already how the rows of a group depend on each other."""
    group = np.repeat(np.arange(GROUPS), EACH)
    y = jnp.asarray(np.random.default_rng(3).normal(size=GROUPS)[group], jnp.float32) + jnp.asarray(series()[0])
    fit = ScoreMatching(mixed_effects).run(jax.random.key(0), y, jnp.asarray(group), progress_bar=False)
    with pytest.raises(SandwichError, match="prior of site 'mu' says how rows of a group depend on each other"):
        dependent_rows(fit, groups=group)


MOST = 50  # parameters with a dense sandwich, in place of 2,000


@pytest.fixture
def few_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sandwich, result, dependent):
        monkeypatch.setattr(module, "MAX_PARAMETERS", MOST)


@pytest.mark.usefixtures("few_are_dense")
def test_effects_of_groups_are_counted_once_among_many_parameters() -> None:
    """Where the sandwich is not formed the same is said by stderr(of=...)."""

    def model(y: Any, z: Any) -> None:
        numpyro.sample("b", dist.Normal(0.0, 1.0).expand([MOST + 1]).to_event(1))
        mixed_effects(y, z)

    group = np.repeat(np.arange(GROUPS), EACH)
    fit = ScoreMatching(model, num_steps=50).run(
        jax.random.key(0), jnp.asarray(series()[0]), jnp.asarray(group), progress_bar=False
    )
    with pytest.raises(SandwichError, match="prior of site 'mu' says how rows of a group depend on each other"):
        dependent_rows(fit, groups=group).stderr(of=lambda estimates: estimates["m"])


@pytest.mark.usefixtures("few_are_dense")
def test_groups_among_many_parameters() -> None:
    """The sandwich is not formed: errors of a function are clustered as those of the mean of a column are."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(GROUPS, MOST + 1))[LABELS] + rng.normal(size=(N, MOST + 1))).astype("f4")

    def model(x: Any) -> None:
        mu = numpyro.param("mu", jnp.asarray(x.mean(axis=0)))
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))

    fit = ScoreMatching(model, num_steps=1).run(jax.random.key(0), x, progress_bar=False)
    with pytest.raises(SandwichError, match=f"has {MOST + 1} parameters"):
        fit.covariance()
    error = dependent_rows(fit, groups=LABELS).stderr(of=lambda estimates: estimates["mu"][0])
    sums = np.bincount(LABELS, x[:, 0].astype(np.float64) - x[:, 0].mean(dtype=np.float64))
    np.testing.assert_allclose(error, (np.sum(sums**2) * GROUPS / (GROUPS - 1)) ** 0.5 / N, rtol=1e-4)


def test_intervals_cover_in_a_field() -> None:
    """Of 90%, where cells depend on their neighbours alone: lags several times as far are needed, and do."""
    rng = np.random.default_rng(0)
    used = np.ones(900, bool)
    covered = {1: 0, 6: 0}
    for _ in range(600):
        noise = rng.normal(size=(31, 31))
        x = (noise[1:, 1:] + noise[1:, :-1] + noise[:-1, 1:] + noise[:-1, :-1]) / 2
        gradients = (x - x.mean()).reshape(-1, 1)
        for lags in covered:
            windows = Dependence.of_windows((30, 30), {0: lags + 1, 1: lags + 1}, ["row", "column"])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The errors are from the spread over windows")
                error = abs(spread_root(gradients, used, windows)[0, 0]) / 900
            covered[lags] += abs(x.mean()) < scipy.stats.t.ppf(0.95, windows.degrees(used)) * error
    assert 0.84 < covered[6] / 600 < 0.92
    assert covered[1] / 600 < 0.83
