"""Quadratic objectives whose minimum violates a constraint: the minimum within, and what errors mean there."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
from numpyro.distributions import constraints

from numpyro_score import ScoreMatching, ScoreMatchingResult, load
from numpyro_score.closed_form import Quadratic
from numpyro_score.closed_form.coordinates import Coordinates

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_t(8, 300).astype(np.float32)  # lighter tails than normal would need b > 0
BEYOND = r"The minimum is beyond the constraint of site 'b'"
AT_AN_END = r"Numbers of 'b' are at the end of their constraint, where errors mean nothing"


def tails(x: Any) -> None:
    """A normal law with quartic tails, which the data do not have."""
    a, b = numpyro.param("a", 0.5), numpyro.param("b", 0.1, constraint=constraints.positive)
    without(x, a)
    numpyro.factor("tails", -b * x**4)


def without(x: Any, a: Any = None) -> None:
    a = numpyro.param("a", 0.5) if a is None else a
    m = numpyro.param("m", 0.0)
    numpyro.factor("energy", m * x - 0.5 * a * x**2)


def at_an_end(model: Any = tails, x: Any = X, match: str = BEYOND, **settings: Any) -> ScoreMatchingResult:
    with pytest.warns(UserWarning, match=match):
        return ScoreMatching(model, **settings).run(KEY, x, progress_bar=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_quadratic_between_bounds(seed: int) -> None:
    """Against the best of all 3⁴ choices of who is at which bound that are inside."""
    rng = np.random.default_rng(seed)
    root, linear = rng.normal(size=(4, 6)), 2 * rng.normal(size=4)
    scale = 10.0 ** rng.integers(-3, 4, 4)  # of units
    f = Quadratic(scale[:, None] * (root @ root.T) * scale, scale * linear, 0.0)
    lower, upper = np.array([0.0, -np.inf, -0.1, -np.inf]) / scale, np.array([np.inf, 0.0, 0.2, np.inf]) / scale
    best, expected = np.inf, np.zeros(4)
    for at in itertools.product((-1, 0, 1), repeat=4):
        theta, free = np.select([np.array(at) < 0, np.array(at) > 0], [lower, upper], 0.0), np.array(at) == 0
        if not np.isfinite(theta).all():
            continue
        theta[free] = np.linalg.solve(f.hessian[np.ix_(free, free)], -f.gradient(theta)[free])
        if (theta >= lower - 1e-9 / scale).all() and (theta <= upper + 1e-9 / scale).all() and f(theta) < best:
            best, expected = f(theta), theta
    found, side = f.within(lower, upper)
    np.testing.assert_allclose(found * scale, expected * scale, atol=1e-8)
    np.testing.assert_array_equal(side, np.select([found == lower, found == upper], [-1, 1], 0))


def test_what_stays_is_the_fit_without_the_term() -> None:
    fit, other = at_an_end(), ScoreMatching(without).run(KEY, X, progress_bar=False)
    assert len(fit.losses) == 1 and 0 < fit.estimates["b"] < 1e-12
    np.testing.assert_allclose(fit.losses, other.losses, rtol=1e-5)
    with pytest.warns(UserWarning, match=AT_AN_END):
        errors = fit.stderr()
    for name in "am":
        np.testing.assert_allclose(fit.estimates[name], other.estimates[name], rtol=1e-5)
        np.testing.assert_allclose(errors[name], other.stderr()[name], rtol=1e-3)
    assert fit.curvature.distance.max() < 0.01


def test_summary_leaves_its_errors_out() -> None:
    table = at_an_end().summary()
    assert np.isnan(table.loc["b", ["stderr", "z", "2.5%", "97.5%"]].to_numpy(float)).all()
    assert np.isfinite(table.loc[["a", "m"]].to_numpy(float)).all()
    assert [line.split(":")[0] for line in table.lines][1:3] == [
        "Converged",
        "Numbers of 'b' are at the end of their constraint, where errors mean nothing",
    ]


def test_a_minimum_within_is_as_before() -> None:
    """No warning, and the ordinary minimum."""
    x = np.random.default_rng(0).uniform(-1, 1, 300)
    fit = ScoreMatching(tails).run(KEY, x, progress_bar=False)
    assert len(fit.losses) == 1 and fit.estimates["b"] > 0.1 and not fit.curvature.at_an_end.any()


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("support", "end"), [((1.0, 2.0), 1.0), ((-3.0, 0.2), 0.2), ((0.0, 0.5), 0.5)])
def test_both_ends_of_intervals(support: tuple[float, float], end: float, x64: bool) -> None:
    """Rows have the precision 0.85, which none of these holds: the estimate is inside, beside the end."""

    def affine(x: Any) -> None:
        b = numpyro.param("b", np.mean(support), constraint=constraints.interval(*support))
        numpyro.factor("energy", numpyro.param("m", 0.0) * x - 0.5 * b * x**2)

    with jax.enable_x64(x64):
        x = jnp.asarray(X)
        fit = at_an_end(affine, x)
        value = np.asarray(fit.estimates["b"])
        assert support[0] < value < support[1] and abs(value - end) <= 2e-6
        np.testing.assert_allclose(fit.estimates["m"], end * np.mean(X), rtol=1e-4)
        assert fit.coordinates.at_an_end().tolist() == [True, False]


def test_many_parameters_are_those_of_non_negative_least_squares() -> None:
    """Of the objective ½ Σ_n (∂_x θ·t)² + θ·∂²_x t with features t: least squares after whitening."""
    x = np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)

    def model(x: Any) -> None:
        b = numpyro.param("b", jnp.ones(6), constraint=constraints.positive)
        w = numpyro.param("w", 0.1 * jnp.ones(5), constraint=constraints.nonnegative)
        numpyro.factor("energy", -0.5 * x**2 @ b + (x[:, 1:] * x[:, :-1]) @ w)

    with jax.enable_x64(True):
        fit = at_an_end(model, x.astype(np.float64), r"beyond the constraint of site 'w'")
        covariance = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
        # θ = (b, w): the score is Gθ with G from −x_d e_d and (x_{d+1} at d, x_d at d + 1).
        gram, linear = np.zeros((11, 11)), np.concatenate([-np.ones(6), np.zeros(5)])
        of = [{d: -x[:, d].astype(np.float64)} for d in range(6)]
        of += [{d: x[:, d + 1].astype(np.float64), d + 1: x[:, d].astype(np.float64)} for d in range(5)]
        for i, j in itertools.product(range(11), repeat=2):
            gram[i, j] = sum(np.mean(of[i][d] * of[j][d]) for d in of[i].keys() & of[j].keys())
        root = np.linalg.cholesky(gram).T
        expected = scipy.optimize.nnls(root, -np.linalg.solve(root.T, linear))[0]
        assert np.isclose(gram[0, 0], covariance[0, 0]) and (expected[6:] == 0).any() and (expected[6:] > 0).any()
        np.testing.assert_allclose(np.concatenate([fit.estimates["b"], fit.estimates["w"]]), expected, atol=1e-9)
        assert (fit.coordinates.at_an_end()[6:] == (expected[6:] == 0)).all()


def test_a_latent_site_with_a_prior() -> None:
    """Its prior counts: at the end of HalfNormal the objective is that of the fit without, plus the prior there."""

    def model(x: Any) -> None:
        b = numpyro.sample("b", dist.HalfNormal(1.0))
        without(x)
        numpyro.factor("tails", -b * x**4)

    fit, other = at_an_end(model), ScoreMatching(without).run(KEY, X, progress_bar=False)
    np.testing.assert_allclose(fit.losses, other.losses - np.log(np.sqrt(2 / np.pi)), rtol=1e-5)
    np.testing.assert_allclose(fit.estimates["a"], other.estimates["a"], rtol=1e-5)


def test_calibration_leaves_it_out() -> None:
    def fitted(model: Any) -> float:
        return float(ScoreMatching(model).run(KEY, X, progress_bar=False).calibrated_learning_rate())

    with pytest.warns(UserWarning, match=AT_AN_END), pytest.warns(UserWarning, match=BEYOND):
        beta = fitted(tails)
    np.testing.assert_allclose(beta, fitted(without), rtol=1e-3)


def test_it_is_kept_in_files(tmp_path: Any) -> None:
    fit = at_an_end()
    fit.save(tmp_path / "fit")
    again = load(tmp_path / "fit", tails)
    assert again.estimates["b"] == fit.estimates["b"] and again.coordinates.at_an_end().any()


def test_bounds_of_coordinates() -> None:
    sites = {
        "a": {"type": "param", "kwargs": {"constraint": constraints.interval(-1.0, 2.0)}, "value": jnp.zeros((2, 1))},
        "b": {"type": "sample", "is_observed": False, "fn": dist.HalfNormal(1.0).expand([2]), "value": jnp.ones(2)},
        "c": {"type": "param", "kwargs": {}, "value": jnp.float32(0.0)},
    }
    lower, upper = Coordinates.of_sites(sites).ends()
    np.testing.assert_array_equal(lower, [-1, -1, 0, 0, -np.inf])
    np.testing.assert_array_equal(upper, [2, 2, np.inf, np.inf, np.inf])
