"""Continuous latent sites of rows, integrated by points: against closed forms and quadrature by SciPy."""

from __future__ import annotations

import functools
import re
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
import scipy.optimize
import scipy.stats
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


def normal_law(w: np.ndarray, s: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The law without the factor, by hand: log densities, scores and Laplacians."""
    k = np.linalg.inv(np.outer(w, w) + np.diag(s**2))
    score = -x @ k
    log_p = 0.5 * np.sum(x * score, axis=1) + 0.5 * np.linalg.slogdet(k / (2 * np.pi))[1]
    return log_p, score, np.full(len(x), -np.trace(k))


def row_losses(theta: np.ndarray) -> np.ndarray:
    _, score, laplacian = normal_law(theta[:3], theta[3:], rows().astype(np.float64))
    return 0.5 * np.sum(score**2, axis=1) + laplacian


def by_differences(f: Callable[[np.ndarray], Any], theta: np.ndarray, step: float = 1e-4) -> np.ndarray:
    return np.array([(f(theta + e) - f(theta - e)) / (2 * step) for e in step * np.eye(len(theta))])


@functools.cache
def exact() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The minimum of the law without the factor, and its sandwich errors."""
    theta = scipy.optimize.minimize(lambda theta: row_losses(theta).mean(), [*W, *S], tol=1e-10).x
    inverse = np.linalg.inv(by_differences(lambda t: by_differences(row_losses, t).mean(axis=1), theta))
    errors = np.sqrt(np.diag(inverse @ np.cov(by_differences(row_losses, theta)) @ inverse) / len(rows()))
    return {"w": theta[:3], "s": theta[3:]}, {"w": errors[:3], "s": errors[3:]}


@functools.cache
def rows(n: int = 600) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, 1)) * W + rng.normal(size=(n, 3)) * S).astype(np.float32)


def test_a_factor_is_a_covariance(x64: Any) -> None:
    """Density, score and Laplacian, and the gradient in the parameters; rows of any number."""
    x = rows(20).astype(np.float64)
    ours = Energy(one_factor, PARAMS, x, points=60)
    assert ours.resizable and ours.latents[0].integrated
    for got, expected in zip(ours.value_score_laplacian(x), normal_law(W, S, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.log_density(3 * x[:5]), normal_law(W, S, 3 * x[:5])[0], atol=1e-3)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(ours.with_params({"w": w}).log_density(x))))
    expected = by_differences(lambda w: normal_law(w, S, x)[0].sum(), W)
    np.testing.assert_allclose(gradient(W), expected, rtol=1e-5, atol=1e-5)


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
    law = scipy.stats.multivariate_normal
    expected = [law.logpdf(v, np.zeros(3), s**2 * a @ a.T + np.eye(3)) for v, s in zip(x, t, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


POINTS = {"quadrature": 24}


def test_beside_a_discrete_site(x64: Any) -> None:
    """A mixture of two factors; the components' probabilities are those of the closed form."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            c = numpyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = numpyro.sample("z", dist.Normal(2.0 * c, 1.0), infer={"quadrature": 40})
            numpyro.sample("x", dist.Normal(z[:, None] * W, 1.0).to_event(1), obs=x)

    x = rows(8).astype(np.float64)
    law = [scipy.stats.multivariate_normal(2.0 * c * W, np.outer(W, W) + np.eye(3)) for c in (0, 1)]
    joint = np.stack([np.log(p) + of.logpdf(x) for p, of in zip((0.7, 0.3), law, strict=True)], axis=-1)
    energy = Energy(model, {}, x)
    np.testing.assert_allclose(energy.log_density(x), np.logaddexp(*joint.T), atol=1e-5)
    found = energy.latent_probabilities(x)
    assert set(found) == {"c"}
    np.testing.assert_allclose(found["c"], np.exp(joint) / np.exp(joint).sum(-1, keepdims=True), atol=1e-5)


def matcher(points: int) -> ScoreMatching:
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 200))  # half the work to compile of a search along lines
    return ScoreMatching(functools.partial(one_factor, points=points), loss=ISM(), optim=adam, num_steps=200)


def test_a_fit_is_that_of_the_law_without_the_factor() -> None:
    fit, (estimates, errors) = matcher(32).run(KEY, rows(), progress_bar=False), exact()
    for name in "ws":
        assert np.abs((fit.estimates[name] - estimates[name]) / errors[name]).max() < 0.05
        np.testing.assert_allclose(fit.stderr()[name], errors[name], rtol=0.05)
    assert quadrature_error(fit.energy) < 0.01


def test_too_few_points_are_told() -> None:
    """Estimates make use of the dents between them; what the warning is about is seen."""
    with pytest.warns(UserWarning, match=r"integral over site 'z' by 6 points is off: .* infer={'quadrature': 12}"):
        fit = matcher(6).run(KEY, rows(), progress_bar=False)
    estimates, errors = exact()
    away = [np.abs((fit.estimates[k] - estimates[k]) / errors[k]).max() for k in "ws"]
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
