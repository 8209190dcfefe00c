"""Rows with missing cells: against closed forms of normal laws, and where the density is a product of its columns."""

from __future__ import annotations

import functools
import html
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
from models import improper
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    DSM,
    FSM,
    ISM,
    NCE,
    SSM,
    Energy,
    MissingCells,
    ScoreMatching,
    ScoreMatchingResult,
    compare,
    generalized_bayes,
    hyvarinen_score,
    load,
    log_partition,
    plot_marginals,
    report,
    sample,
    windham,
)
from numpyro_score.losses import Loss, row_losses, total_loss
from numpyro_score.losses.missing import _most_dependent

KEY = jax.random.key(0)
PRECISION = np.array([[1.5, 0.6, -0.4], [0.6, 1.2, 0.0], [-0.4, 0.0, 1.0]])
PAIRS = np.triu_indices(3, 1)


def symmetric(d: Any, o: Any) -> Any:
    return jnp.array([[d[0], o[0], o[1]], [o[0], d[1], o[2]], [o[1], o[2], d[2]]])


def graph(x: Any) -> None:
    """A normal law with mean zero, by its precision."""
    k = symmetric(numpyro.param("d", jnp.ones(3)), numpyro.param("o", jnp.zeros(3)))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x))


def columns(x: Any, seen: Any = True) -> None:
    """Independent columns with tails of their own."""
    a, b = numpyro.param("a", jnp.ones(3)), numpyro.param("b", jnp.full(3, 0.3))
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=seen):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", jnp.sum(-0.5 * a * x**2 - b * x**4, axis=-1))


@functools.cache
def rows(n: int = 400, share: float = 0.25) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(np.zeros(3), np.linalg.inv(PRECISION), n)
    missing = rng.uniform(size=x.shape) < share
    missing[missing.all(axis=1), 0] = False
    return np.where(missing, np.nan, x).astype(np.float32)


def marginal_terms(x: np.ndarray, covariance: Any) -> Any:
    """½ s² + ∂s, summed over the cells that were seen of each row, whose covariance is that block: (N,)."""

    def of(row: Any, seen: Any) -> Any:
        block = jnp.where(seen[:, None] & seen, covariance, jnp.eye(3))
        k = jnp.where(seen[:, None] & seen, jnp.linalg.inv(block), 0.0)
        return 0.5 * jnp.sum((k @ jnp.where(seen, row, 0.0)) ** 2) - jnp.trace(k)

    return jax.vmap(of)(jnp.asarray(np.nan_to_num(x)), jnp.asarray(~np.isnan(x)))


def at(precision: np.ndarray) -> dict[str, Any]:
    return {"d": jnp.asarray(np.diag(precision)), "o": jnp.asarray(precision[PAIRS])}


@functools.cache
def fitted() -> ScoreMatchingResult:
    return ScoreMatching(graph, loss=MissingCells(ISM(), 16), num_steps=600).run(KEY, rows(), progress_bar=False)


@pytest.mark.parametrize("loss", [ISM(), SSM(), SSM(variance_reduced=False)])
def test_values_are_those_of_the_cells_that_were_seen(loss: Loss, x64: Any) -> None:
    """Of a normal law with many draws, ISM row by row and SSM over random directions; exact for rows that are whole."""
    x = rows(60).astype(np.float64)
    expected = np.asarray(marginal_terms(x, np.linalg.inv(PRECISION)))
    energy = Energy(graph, at(PRECISION), x)
    draws = 2000 if isinstance(loss, ISM) else 400
    evaluate = jax.jit(lambda key: row_losses(MissingCells(loss, draws), energy, key)[0])
    whole = ~np.isnan(x).any(axis=1)
    if isinstance(loss, ISM):
        values = np.asarray(evaluate(KEY))
        np.testing.assert_allclose(values[whole], expected[whole], rtol=1e-10)
        np.testing.assert_allclose(values, expected, atol=0.15)
        assert abs(np.mean(values - expected)) < 0.02
    else:
        found = np.stack([evaluate(key) for key in jax.random.split(KEY, 60)])
        error = found.std(axis=0, ddof=1) / 60**0.5
        assert (np.abs(found.mean(axis=0) - expected) < 4.5 * error + 0.02).all()


def test_gradients_are_those_of_the_cells_that_were_seen(x64: Any) -> None:
    """The weights depend on the parameters, and are differentiated."""
    x = rows(200).astype(np.float64)
    energy = Energy(graph, at(PRECISION), x)

    def objective(o: Any) -> Any:
        return jnp.mean(marginal_terms(x, jnp.linalg.inv(symmetric(np.diag(PRECISION), o))))

    def loss(o: Any, key: Any) -> Any:
        return total_loss(MissingCells(ISM(), 200), energy.with_params({"o": o}), key) / len(x)

    expected = jax.jit(jax.grad(objective))(PRECISION[PAIRS])
    gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    found = gradient(energy.params["o"], jax.random.split(KEY, 8))
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=0.01)


@pytest.mark.parametrize("loss", [ISM(), DSM(0.3)])
def test_products_of_columns_are_exact(loss: Loss, x64: Any) -> None:
    """Two draws are as good as any: the loss of each column of its own rows."""
    x = rows(50).astype(np.float64)
    params = {"a": jnp.array([1.0, 0.5, 2.0]), "b": jnp.array([0.1, 0.2, 0.3])}
    energy = Energy(columns, params, x)
    values = np.asarray(row_losses(MissingCells(loss, 2), energy, KEY)[0])
    if isinstance(loss, ISM):
        score = -params["a"] * x - 4 * params["b"] * x**3
        expected = np.nansum(0.5 * score**2 - params["a"] - 12 * params["b"] * x**2, axis=1)
        np.testing.assert_allclose(values, expected, rtol=1e-10)
    else:  # the same noise, whatever stands in the place of missing cells
        gradient = jax.jit(
            jax.grad(lambda a, x: total_loss(MissingCells(loss, 2), energy.at(x).with_params({"a": a}), KEY))
        )
        together = gradient(params["a"], jnp.asarray(x))
        for j in range(3):
            alone = gradient(params["a"], jnp.asarray(np.where(np.arange(3) == j, x, np.nan)))
            np.testing.assert_allclose(alone[j], together[j], rtol=1e-8)


def test_a_fit_is_that_of_the_closed_form() -> None:
    """Against the minimiser of the exact objective, which uses rows that are whole and those that are not."""
    x = rows()

    def objective(theta: Any) -> Any:
        return jnp.mean(marginal_terms(x, jnp.linalg.inv(symmetric(theta[:3], theta[3:]))))

    start = np.concatenate([np.diag(PRECISION), PRECISION[PAIRS]])
    with jax.enable_x64(True):
        f = jax.jit(jax.value_and_grad(objective))
        exact = scipy.optimize.minimize(lambda t: [np.asarray(v, float) for v in f(t)], start, jac=True)
    fit, errors = fitted(), fitted().stderr()
    found = np.concatenate([fit.estimates[k] for k in "do"])
    errors = np.concatenate([errors[k] for k in "do"])
    assert np.abs((found - exact.x) / errors).max() < 0.25  # Monte Carlo of 16 draws a row
    assert (np.abs((found - start) / errors) < 3.5).all()


def test_what_a_fit_tells_and_gives(tmp_path: Any) -> None:
    fit = fitted()
    seen = int((~np.isnan(rows())).sum())
    assert f"400 rows of 3 numbers, {seen} of 1200 of which were seen." in fit.summary().lines[0]
    draws = sample(fit, KEY, 200)["posterior"]["x"].values.reshape(-1, 3)
    np.testing.assert_allclose(np.cov(draws.T), np.linalg.inv(PRECISION), atol=0.4)
    k = symmetric(fit.estimates["d"], fit.estimates["o"])
    log_z = 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(k)[1]
    assert abs(log_partition(fit, rng_key=KEY).value - log_z) < 0.02
    fit.save(tmp_path / "fit")
    again = load(tmp_path / "fit", graph)
    np.testing.assert_array_equal(again.estimates["d"], fit.estimates["d"])
    assert again.svi.score_loss == fit.svi.score_loss
    effective = fit.svi.score_loss.effective_draws(fit.energy, KEY)
    whole = ~np.isnan(rows()).any(axis=1)
    np.testing.assert_allclose(effective[whole], 16, rtol=1e-4)
    assert 4 < effective[~whole].min() < 15
    with pytest.raises(ValueError, match=r"Data 'x' have NaN .* or fit what was seen by MissingCells\(\)"):
        hyvarinen_score(fit, rows())


def test_rows_without_weight_may_be_empty() -> None:
    """They are no rows: the same as without them."""
    x = np.concatenate([rows(100), np.full((20, 3), np.nan, np.float32)])
    seen = np.arange(120) < 100
    loss, params = MissingCells(ISM(), 16), {"a": jnp.ones(3), "b": jnp.full(3, 0.2)}
    whole = total_loss(loss, Energy(columns, params, rows(100)), KEY)
    np.testing.assert_allclose(total_loss(loss, Energy(columns, params, x, seen), KEY), whole, rtol=1e-5)


def test_chunks_share_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few rows draw from the law of all: the value is that of one chunk but for Monte Carlo error."""
    energy, loss = Energy(graph, at(PRECISION), rows()), MissingCells(ISM(), 400)
    cut = np.asarray(jax.jit(lambda e: row_losses(loss, e, KEY)[0])(energy))
    monkeypatch.setattr(MissingCells, "rows_per_chunk", lambda *_: None)
    whole = np.asarray(jax.jit(lambda e: row_losses(loss, e, KEY)[0])(energy))
    assert not np.array_equal(cut, whole)
    np.testing.assert_allclose(cut, whole, atol=0.5)
    assert abs(np.mean(cut - whole)) < 0.01


def test_nuts_draws_from_the_generalised_posterior() -> None:
    """Its model takes the rows as they are, under `jit` too."""

    def model(x: Any) -> None:
        a = numpyro.sample("a", dist.HalfNormal(2.0).expand([3]).to_event(1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(a * x**2, axis=-1))

    target = generalized_bayes(model, MissingCells(ISM(), 2))
    mcmc = MCMC(NUTS(target), num_warmup=100, num_samples=200, progress_bar=False)
    mcmc.run(KEY, rows())
    expected = 1 / np.nanmean(rows() ** 2, axis=0)  # of its products, which are exact
    np.testing.assert_allclose(mcmc.get_samples()["a"].mean(axis=0), expected, rtol=0.05)


def test_false_alarms_and_misses_of_the_mask() -> None:
    """At a level of 0.001: none of 300 masks at random is told of, and nearly all that depend on another column."""
    rng = np.random.default_rng(1)
    alarms = found = spread = 0
    for _ in range(300):
        x = rng.standard_t(3.0, size=(300, 4))
        alarms += _most_dependent(np.where(rng.uniform(size=x.shape) < 0.2, np.nan, x)) is not None
    assert alarms <= 3
    for _ in range(50):
        x = rng.normal(size=(300, 3))
        shifted, far = x.copy(), x.copy()
        shifted[rng.uniform(size=300) < 1 / (1 + np.exp(2 - 1.5 * x[:, 1])), 0] = np.nan
        far[rng.uniform(size=300) < 0.5 * (np.abs(x[:, 2]) > 1), 0] = np.nan
        found += _most_dependent(shifted) == (0, 1, "large")
        spread += _most_dependent(far) == (0, 2, "far from their middle")
    assert found >= 45 and spread >= 45


def test_cells_that_are_not_missing_at_random_are_told() -> None:
    """And those at random are not, nor are empty rows that have no weight."""
    sm = ScoreMatching(columns, loss=MissingCells(ISM(), 16), num_steps=2)
    x = np.random.default_rng(2).normal(size=(400, 3)).astype(np.float32)
    x[x[:, 1] > 0.5, 0] = np.nan
    with pytest.warns(UserWarning, match=r"Cells of x\[0\] are missing where those of x\[1\] are large"):
        sm.run(KEY, x, np.full(400, True), progress_bar=False)
    seen = np.arange(400) < 380
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sm.run(KEY, np.where(seen[:, None], rows(), np.nan), seen, progress_bar=False)


def kinked(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", -numpyro.param("a", 1.0) * jnp.sum(jnp.abs(x), axis=-1))


def run(x: Any, model: Any = columns) -> None:
    ScoreMatching(model, loss=MissingCells(ISM(), 2), num_steps=1).run(KEY, x, progress_bar=False)


def partly_observed(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(numpyro.param("a", 0.0), 1.0), obs=x, obs_mask=np.arange(len(x)) > 3)


def changed(value: float, *at: Any) -> np.ndarray:
    x = rows().copy()
    x[at] = value
    return x


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "loss": (lambda: MissingCells(FSM()), TypeError, "MissingCells takes ISM, SSM, DSM(sigma) with one number"),
    "levels": (lambda: MissingCells(DSM((0.1, 0.2))), TypeError, "got DSM(sigma=(0.1, 0.2)"),
    "noise": (lambda: MissingCells(NCE(dist.Normal(0, 1))), TypeError, "other losses need whole rows"),
    "odd": (lambda: MissingCells(ISM(), 3), ValueError, "draws pairs, got num_draws = 3"),
    "none": (lambda: MissingCells(ISM(), 0), ValueError, "num_draws of at least 1, got 0"),
    "infinity": (
        lambda: run(changed(np.inf, 7, 1)),
        ValueError,
        "are infinite in row 7 (1 of 400): correct them",
    ),
    "row": (lambda: run(changed(np.nan, [3, 9])), ValueError, "no cell that was seen in rows 3, 9"),
    "column": (lambda: run(changed(np.nan, slice(1, None), 2)), ValueError, "Column x[2] of the data has fewer than"),
    "obs_mask": (lambda: run(rows()[:, 0], partly_observed), ValueError, "obs_mask leaves site 'x' without a value"),
    "kink": (lambda: run(rows(), kinked), ValueError, "passes the data through 'abs'"),
    "plain": (
        lambda: ScoreMatching(columns).run(KEY, rows(), progress_bar=False),
        ValueError,
        "or fit what was seen by MissingCells()",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_compared_on_new_rows() -> None:
    """By both objectives, as an energy at these rows is."""
    fit, x = fitted(), rows()[~np.isnan(rows()).any(axis=1)]
    log_z = log_partition(fit, rng_key=KEY)
    fits = {"holes": fit, "alone": Energy(graph, {k: 1.3 * fit.estimates[k] for k in "do"}, x)}
    found = compare(fits, x, rng_key=KEY, num_samples=0, log_partition={"holes": log_z})
    assert found.order_kl == found.order_fisher == ("holes", "alone")
    with pytest.raises(TypeError, match="windham weighs whole rows"):
        windham(fit, 0.1)


def test_draws_that_are_worth_little_are_told() -> None:
    """Columns of a chain with correlation 0.95, half the cells missing: few of eight draws count."""
    rng = np.random.default_rng(7)
    x = np.empty((300, 4))
    x[:, 0] = rng.normal(size=300)
    for j in range(1, 4):
        x[:, j] = 0.97 * x[:, j - 1] + 0.24 * rng.normal(size=300)
    missing = rng.uniform(size=x.shape) < 0.5
    missing[missing.all(axis=1), 0] = False

    def chain(x: Any) -> None:
        a = numpyro.param("a", 8.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(4), obs=x)
            steps = x[:, 1:] - 0.97 * x[:, :-1]
            numpyro.factor("energy", -0.5 * x[:, 0] ** 2 - a * jnp.sum(steps**2, axis=-1))

    sm, seen = ScoreMatching(chain, loss=MissingCells(ISM(), 4), num_steps=3), np.where(missing, np.nan, x)
    said = r"The 4 draws of missing cells are worth 1\.\d or fewer in one of twenty rows"
    with pytest.warns(UserWarning, match=said) as caught:
        sm.run(KEY, seen, progress_bar=False)
        sm.run_batches(KEY, [seen] * 3, progress_bar=False)
    assert sum(bool(re.match(said, str(w.message))) for w in caught) == 2


def test_report_and_pictures_are_of_whole_rows(tmp_path: Any) -> None:
    """Which are as good a sample as all: the Stein test and moments are made, and their number is told."""
    fit, whole = fitted(), ~np.isnan(rows()).any(axis=1)
    page = report(fit, tmp_path / "fit.html", num_samples=200).read_text()
    text = html.unescape(re.sub("<[^>]*>", " ", page))
    assert f"checks and pictures of rows are of the {whole.sum()} without missing cells" in text
    assert "not known" not in text and "nan" not in re.sub(r"data:image\S*", "", text)
    axes = plot_marginals(fit, rows()[whole], columns=[0, 1])
    np.testing.assert_allclose(axes[1, 0].collections[-1].get_offsets(), rows()[whole][:, :2])
    plt.close(axes[0, 0].figure)
