"""Continuous latent sites of rows, integrated by points: against closed forms and quadrature by SciPy."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.integrate
from numpyro.distributions import constraints

from numpyro_score import ISM, Energy, ScoreMatching, log_partition
from numpyro_score.energy import quadrature_error

KEY = jax.random.key(0)
W, S = np.array([1.0, 0.7, -0.5]), np.array([0.8, 0.9, 1.0])
PARAMS = {"w": W, "s": S}


def one_factor(x: Any, points: int = 32) -> None:
    """A factor analysis with one factor."""
    w = numpyro.param("w", jnp.array([0.9, 0.6, -0.4]))
    s = numpyro.param("s", jnp.full(3, 0.7), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), infer={"quadrature": points})
        numpyro.sample("x", dist.Normal(z[:, None] * w, s).to_event(1), obs=x)


def by_covariance(x: Any) -> None:
    """The same law without the factor."""
    w = numpyro.param("w", jnp.array([0.9, 0.6, -0.4]))
    s = numpyro.param("s", jnp.full(3, 0.7), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(3), w[:, None] * w + jnp.diag(s**2)), obs=x)


@functools.cache
def rows(n: int = 600) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, 1)) * W + rng.normal(size=(n, 3)) * S).astype(np.float32)


@functools.cache
def fitted(model: Callable[..., Any], **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The integral over site")
        sm = ScoreMatching(functools.partial(model, **settings), loss=ISM(), optim=optax.lbfgs(), num_steps=60)
        return sm.run(KEY, rows(), progress_bar=False)


def test_a_factor_is_a_covariance(x64: Any) -> None:
    """Density, score and Laplacian, and the gradient in the parameters; rows of any number."""
    x = rows(20).astype(np.float64)
    ours, exact = Energy(one_factor, PARAMS, x, points=60), Energy(by_covariance, PARAMS, x)
    assert ours.resizable and ours.latents[0].integrated
    for got, expected in zip(ours.value_score_laplacian(x), exact.value_score_laplacian(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.log_density(3 * x[:5]), exact.log_density(3 * x[:5]), atol=1e-3)

    def gradient(energy: Energy) -> Any:
        return jax.grad(lambda w: jnp.sum(energy.with_params({"w": w}).log_density(x)))(jnp.asarray(W))

    np.testing.assert_allclose(gradient(ours), gradient(exact), rtol=1e-5, atol=1e-5)


LAWS: dict[str, tuple[Callable[[Any], Any], Callable[[float], float], tuple[float, float]]] = {
    "shifted normal": (
        lambda m: dist.Normal(m, 0.6), lambda z: np.exp(-0.5 * ((z - 0.4) / 0.6) ** 2), (-6.0, 6.0)
    ),
    "log-normal": (
        lambda m: dist.LogNormal(m, 0.5), lambda z: np.exp(-0.5 * ((np.log(z) - 0.4) / 0.5) ** 2) / z, (1e-9, 30.0)
    ),
    "uniform": (lambda m: dist.Uniform(m - 1, m + 2), lambda z: 1.0, (-0.6, 2.4)),
    "exponential": (lambda m: dist.Exponential(m), lambda z: np.exp(-0.4 * z), (0.0, 80.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_laws(name: str, x64: Any) -> None:
    """An unnormalised density of x given z, against SciPy's integral; the law of z has a parameter."""
    law, density, ends = LAWS[name]

    def model(x: Any) -> None:
        m = numpyro.param("m", 0.4)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", law(m), infer={"quadrature": 64})
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - jnp.sin(z)) ** 2 - 0.1 * z**2)

    x = np.array([-1.0, 0.3, 2.0])
    found = Energy(model, {"m": 0.4}, x).log_density(x[:, None])

    def integral(f: Callable[[float], float]) -> float:
        return float(scipy.integrate.quad(f, *ends, limit=200)[0])

    def joint(z: float, x: float) -> float:
        return float(density(z) * np.exp(-0.5 * (x - np.sin(z)) ** 2 - 0.1 * z**2))

    expected = [np.log(integral(functools.partial(joint, x=v)) / integral(density)) for v in x]
    np.testing.assert_allclose(found, expected, atol=2e-3 if name == "exponential" else 1e-5)


def test_two_numbers_of_one_site_and_covariates(x64: Any) -> None:
    """A grid of 24² points; the scale of the latent law differs by row."""
    a = np.array([[1.0, 0.3], [0.5, -0.8], [0.2, 0.9]])

    def model(x: Any, t: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, t[:, None]).expand([len(x), 2]).to_event(1), infer=POINTS)
            numpyro.sample("x", dist.Normal(z @ a.T, 1.0).to_event(1), obs=x)

    x, t = rows(6).astype(np.float64), np.linspace(0.5, 1.2, 6)
    found = Energy(model, {}, x, t).log_density(x)
    expected = [dist.MultivariateNormal(0.0, s**2 * a @ a.T + np.eye(3)).log_prob(v) for v, s in zip(x, t, strict=True)]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-4)


POINTS = {"quadrature": 24}


def test_beside_a_discrete_site(x64: Any) -> None:
    """A mixture of two factors; the components' probabilities are those of the closed form."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            c = numpyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = numpyro.sample("z", dist.Normal(2.0 * c, 1.0), infer={"quadrature": 40})
            numpyro.sample("x", dist.Normal(z[:, None] * W, 1.0).to_event(1), obs=x)

    x = rows(8).astype(np.float64)
    law = [dist.MultivariateNormal(2.0 * c * W, np.outer(W, W) + np.eye(3)) for c in (0, 1)]
    joint = np.stack([np.log(p) + np.asarray(of.log_prob(x)) for p, of in zip((0.7, 0.3), law, strict=True)], axis=-1)
    energy = Energy(model, {}, x)
    np.testing.assert_allclose(energy.log_density(x), np.logaddexp(*joint.T), atol=1e-5)
    found = energy.latent_probabilities(x)
    assert set(found) == {"c"}
    np.testing.assert_allclose(found["c"], np.exp(joint) / np.exp(joint).sum(-1, keepdims=True), atol=1e-5)


def test_a_fit_is_that_of_the_law_without_the_factor() -> None:
    fit, exact = fitted(one_factor, points=32), fitted(by_covariance)
    errors = exact.stderr()
    for name in "ws":
        away = (fit.estimates[name] - exact.estimates[name]) / errors[name]
        assert np.abs(away).max() < 0.05
        np.testing.assert_allclose(fit.stderr()[name], errors[name], rtol=0.05)
    assert quadrature_error(fit.energy) < 0.01


def test_too_few_points_are_told() -> None:
    """Estimates make use of the dents between them; what the warning is about is seen."""
    with pytest.warns(UserWarning, match=r"integral over site 'z' by 6 points is off: .* infer={'quadrature': 12}"):
        sm = ScoreMatching(functools.partial(one_factor, points=6), loss=ISM(), optim=optax.lbfgs(), num_steps=60)
        fit = sm.run(KEY, rows(), progress_bar=False)
    exact = fitted(by_covariance)
    away = [np.abs((fit.estimates[k] - exact.estimates[k]) / exact.stderr()[k]).max() for k in "ws"]
    assert max(away) > 0.5


def test_its_normaliser_is_one() -> None:
    """Every part of the model is a law of NumPyro's, and so is the integral."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Uniform(0.5, 2.0), infer={"quadrature": 16})
            numpyro.sample("x", dist.Normal(0.0, z), obs=x)

    found = log_partition(Energy(model, {}, rows()[:, 0]))
    assert abs(found.value) < 1e-3


def with_site(law: Any, infer: dict[str, Any] | None, inside: bool = True) -> Callable[[Any], None]:
    def model(x: Any) -> None:
        if not inside:
            z = numpyro.sample("z", law, infer=infer)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", law, infer=infer) if inside else z
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - jnp.sum(z)) ** 2)

    return model


REFUSED = {
    "no number": (with_site(dist.Normal(0, 1), {"quadrature": "many"}), "integrated by 'many' points: write a number"),
    "one": (with_site(dist.Normal(0, 1), {"quadrature": 1}), "by 1 points: write a number from 2 to 256"),
    "discrete": (with_site(dist.Poisson(2.0), {"quadrature": 8}), "Poisson is no law of single continuous numbers"),
    "no quantiles": (with_site(dist.Weibull(1.0, 2.0), {"quadrature": 8}), "Weibull has no quantiles in NumPyro: use"),
    "simplex": (
        with_site(dist.Dirichlet(jnp.ones(3)), {"quadrature": 8}), "Dirichlet is no law of single continuous numbers"
    ),
    "too many": (
        with_site(dist.Normal(0, 1).expand([4]).to_event(1), {"quadrature": 16}), "take fewer points of continuous ones"
    ),
    "outside": (with_site(dist.Normal(0, 1), {"quadrature": 8}, False), "stands outside of the plate 'rows'"),
    "unmarked": (
        with_site(dist.Normal(0, 1), None), "write infer={'laplace': 16} to have it integrated out by 16 points"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreMatching(model, num_steps=1).run(KEY, np.zeros(5, np.float32), progress_bar=False)
