"""Continuous latent sites of rows, integrated by points placed for each row: against closed forms and SciPy."""

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
from numpyro.distributions import constraints

from numpyro_score import DSM, FSM, ISM, SSM, Energy, MissingCells, ScoreMatching
from numpyro_score.energy import find_kink, quadrature_error
from numpyro_score.losses import total_loss

KEY = jax.random.key(0)


def loadings(m: int, d: int = 6) -> np.ndarray:
    return np.random.default_rng(m).normal(size=(m, d))


def factors(x: Any, a: Any, points: int, s: Any = 0.7) -> None:
    """M factors of a row, and how much of each."""
    m, _ = a.shape
    w = numpyro.param("w", jnp.ones(m), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), m]).to_event(1), infer={"laplace": points})
        numpyro.sample("x", dist.Normal((w * z) @ a, s).to_event(1), obs=x)


def without_the_factor(x: Any, a: Any) -> None:
    """The same law of one factor by its precision, but for the constant."""
    v = numpyro.param("w", jnp.ones(1), constraint=constraints.positive)[0] ** 2
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (a.shape[1],)), obs=x)
        share = v / (0.49 + v * jnp.sum(a**2))
        numpyro.factor("energy", -0.5 * (jnp.sum(x**2, axis=-1) - share * (x @ a[0]) ** 2) / 0.49)


def normal_law(w: Any, x: np.ndarray, a: np.ndarray, s: float = 0.7) -> tuple[np.ndarray, ...]:
    """The law of the rows in closed form: log densities, scores, Laplacians, and the gradients of ISM in w, (N, M)."""
    k = np.linalg.inv((a.T * w**2) @ a + s**2 * np.eye(a.shape[1]))
    score = -x @ k
    log_p = 0.5 * np.sum(x * score, axis=1) + 0.5 * np.linalg.slogdet(k / (2 * np.pi))[1]
    ka = a @ k  # the derivative of K in w_m is −2 w_m K a_m (K a_m)ᵀ
    gradients = 2 * w * ((score @ ka.T) * (x @ ka.T) + np.sum(ka**2, axis=1))
    return log_p, score, np.full(len(x), -np.trace(k)), gradients


def rows(m: int, n: int) -> np.ndarray:
    rng, a = np.random.default_rng(0), loadings(m)
    return rng.normal(size=(n, m)) @ a + 0.7 * rng.normal(size=(n, a.shape[1]))


@pytest.mark.parametrize(("m", "points"), [(1, 3), (3, 27), (4, 92)])
def test_normal_factors_are_exact(m: int, points: int, x64: Any) -> None:
    """Density, score, Laplacian and the gradient in the parameters, with rules of the degree 5."""
    x, a, w = rows(m, 15), loadings(m), np.linspace(0.5, 1.5, m)
    ours, (*exact, gradients) = Energy(factors, {"w": w}, x, a, points), normal_law(w, x, a)
    assert ours.resizable and ours.latents[0].placed and find_kink(ours) is None
    for got, expected in zip(ours.value_score_laplacian(x), exact, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.log_density(30 * x), normal_law(w, 30 * x, a)[0], rtol=1e-10)
    found = jax.jit(jax.grad(lambda w: total_loss(ISM(), ours.with_params({"w": w}), KEY)))(w)
    np.testing.assert_allclose(found, gradients.sum(axis=0), rtol=1e-9)


def test_factors_that_rows_determine_well(x64: Any) -> None:
    """In deviations of 0.01, where points that are shared by the rows fall between all of them."""
    x, a = rows(2, 10), loadings(2)
    found = Energy(factors, {"w": np.ones(2)}, x, a, 4, 0.01).score(x)
    np.testing.assert_allclose(found, normal_law(np.ones(2), x, a, 0.01)[1], rtol=1e-8)


LAWS: dict[str, tuple[Any, Callable[[float], float], tuple[float, float]]] = {
    "normal": (dist.Normal(0.4, 0.6), lambda z: np.exp(-0.5 * ((z - 0.4) / 0.6) ** 2), (-6.0, 6.0)),
    "log-normal": (
        dist.LogNormal(0.4, 0.5), lambda z: np.exp(-0.5 * ((np.log(z) - 0.4) / 0.5) ** 2) / z, (1e-9, 30.0)
    ),
    "uniform": (dist.Uniform(-0.6, 2.4), lambda z: 1.0, (-0.6, 2.4)),
    "exponential": (dist.Exponential(0.4), lambda z: np.exp(-0.4 * z), (0.0, 80.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_laws(name: str, x64: Any) -> None:
    """An unnormalised density of x given z that is no normal law, against SciPy's integral."""
    law, density, ends = LAWS[name]

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", law, infer={"laplace": 32})
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - jnp.exp(z)) ** 2 / 0.3)

    x = np.array([-0.5, 0.3, 2.0])

    def integral(f: Callable[[float], float]) -> float:
        return float(scipy.integrate.quad(f, *ends, limit=200)[0])

    def joint(z: float, x: float) -> float:
        return float(density(z) * np.exp(-0.5 * (x - np.exp(z)) ** 2 / 0.3))

    expected = [np.log(integral(functools.partial(joint, x=v)) / integral(density)) for v in x]
    np.testing.assert_allclose(Energy(model, {}, x).log_density(x[:, None]), expected, atol=2e-3)


def test_sites_that_depend_on_each_other_and_a_component(x64: Any) -> None:
    """A scale of each row, another number about the first, and a binary one: beside 400 x 400 points of the plane."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            c = numpyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = numpyro.sample("z", dist.Normal(2.0 * c, 1.0), infer={"laplace": 100})
            y = numpyro.sample("y", dist.LogNormal(0.2 * z, 0.3), infer={"laplace": 100})
            numpyro.sample("x", dist.Normal(z[:, None] * jnp.array([1.0, -0.5]), 1 + y[:, None]).to_event(1), obs=x)

    x = np.random.default_rng(0).normal(size=(6, 2))
    grid, step = np.linspace(-7, 7, 400, retstep=True)
    u, v = np.meshgrid(grid, grid, indexing="ij")
    log_joint = []
    for c, p in ((0, 0.7), (1, 0.3)):
        z = 2.0 * c + u
        scale = 1 + np.exp(0.2 * z + 0.3 * v)
        means = z[..., None] * np.array([1.0, -0.5])
        log_x = -0.5 * (((x[:, None, None] - means) / scale[..., None]) ** 2).sum(-1) - 2 * np.log(scale)
        weights = p * np.exp(-0.5 * (u**2 + v**2)) * step**2 / (2 * np.pi) ** 2
        log_joint.append(np.log((np.exp(log_x) * weights).sum((1, 2))))
    energy = Energy(model, {}, x)
    np.testing.assert_allclose(energy.log_density(x), np.logaddexp(*log_joint), atol=2e-5)
    first = np.exp(log_joint[1] - np.logaddexp(*log_joint))
    np.testing.assert_allclose(energy.latent_probabilities(x)["c"][:, 1], first, atol=2e-5)


def test_rows_in_two_plates(x64: Any) -> None:
    """Latent numbers in two axes of rows, each in its place."""
    t = np.linspace(0.5, 1.5, 12).reshape(3, 4)

    def model(x: Any) -> None:
        with numpyro.plate("a", 3, dim=-2), numpyro.plate("b", 4, dim=-1):
            z = numpyro.sample("z", dist.Normal(t, 1.0).expand([3, 4]), infer={"laplace": 4})
            numpyro.sample("x", dist.Normal(z * t, 0.5), obs=x)

    x = np.random.default_rng(0).normal(size=(3, 4))
    found = Energy(model, {}, x).log_density(x.reshape(12, 1))
    np.testing.assert_allclose(found, dist.Normal(t**2, np.sqrt(t**2 + 0.25)).log_prob(x).reshape(12), rtol=1e-10)


def test_few_points_are_exact_in_the_data(x64: Any) -> None:
    """Twice the numbers of a row: density, score and Laplacian, but not the parameters' gradient."""
    x, a, w = rows(6, 10), loadings(6), np.linspace(0.5, 1.5, 6)
    exact = normal_law(w, x, a)[:3]
    for got, expected in zip(Energy(factors, {"w": w}, x, a, 12).value_score_laplacian(x), exact, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10)


LOSSES = {"SSM": SSM(), "DSM": DSM(0.3), "FSM": FSM(), "missing": MissingCells(ISM(), 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, x64: Any) -> None:
    """The value and the gradient in the parameter are those of the law without the factor."""
    x, a = rows(1, 20), loadings(1)
    if name == "missing":
        x[::4, 1] = np.nan

    def value(w: Any, model: Any, settings: Any) -> Any:
        return jnp.sum(LOSSES[name](Energy(model, {"w": w}, x, a, *settings), KEY))  # in one chunk: of the same draws

    w = jnp.array([0.8])
    ours, exact = (
        jax.jit(jax.value_and_grad(functools.partial(value, model=model, settings=settings)))(w)
        for model, settings in ((factors, (5,)), (without_the_factor, ()))
    )
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], exact[1], rtol=1e-5)


def test_a_fit_is_that_of_the_law_without_the_factors() -> None:
    """Four factors, whose points are quasi-random; errors too, and no warning."""
    x, a = rows(4, 120).astype(np.float32), loadings(4).astype(np.float32)
    adam = optax.adam(optax.cosine_decay_schedule(0.2, 150))  # half the work to compile of a search along lines
    fit = ScoreMatching(factors, optim=adam, num_steps=150).run(KEY, x, a, 92, progress_bar=False)

    def equations(w: Any) -> np.ndarray:
        return normal_law(w, x.astype(np.float64), a)[3].mean(axis=0)

    exact = scipy.optimize.root(equations, np.ones(4)).x
    hessian = scipy.optimize.approx_fprime(exact, equations, 1e-6)
    inverse = np.linalg.inv(hessian)
    errors = np.sqrt(np.diag(inverse @ np.cov(normal_law(exact, x, a)[3].T) @ inverse.T) / len(x))
    assert np.abs((fit.estimates["w"] - exact) / errors).max() < 0.02
    np.testing.assert_allclose(fit.stderr()["w"], errors, rtol=0.02)


def sums(x: Any, law: Callable[[Any], Any]) -> None:
    """Data near to a latent number."""
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", law(a), infer={"laplace": 16})
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -2.0 * (x - z) ** 2)


def test_the_median_of_a_law_with_a_kink_is_no_mode(x64: Any) -> None:
    """JAX gives the quantiles of a Laplace law the slope 0 at the median, where a search would end as it began."""
    x, z = np.array([4.0, 30.0, -1.0]), np.linspace(-10, 40, 200_001)
    joint = np.exp(-np.abs(z) - 2 * (x[:, None] - z) ** 2)
    expected = np.sum(-4 * (x[:, None] - z) * joint, axis=1) / joint.sum(axis=1)
    found = Energy(sums, {"a": 1.0}, x, functools.partial(dist.Laplace, 0.0)).score(x[:, None])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=5e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_placing_is_taken_for_no_kink(seed: int, x64: Any) -> None:
    """The points of an exponential law end at its end, and their sum is smooth."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=100) + 0.5 * rng.normal(size=100)
    assert find_kink(Energy(sums, {"a": 1.0}, x, dist.Exponential)) is None


def test_a_kink_in_the_data_is_found() -> None:
    def model(x: Any) -> None:
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0), infer={"laplace": 16})
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", z * x - a * jnp.abs(x) - x**2)

    kink = find_kink(Energy(model, {"a": 1.0}, np.random.default_rng(0).normal(size=100).astype(np.float32)))
    assert kink is not None and kink.operation == "abs"


def curved(x: Any, infer: dict[str, int], bend: float) -> None:
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), infer=infer)
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * (x - bend * z**2 - 0.3 * z) ** 2 / 0.1**2)


def test_several_modes_are_told(x64: Any) -> None:
    """Where a row's law of the latent number has two of them the points see one; where it has one, no alarm."""
    x = np.random.default_rng(0).uniform(1.5, 3.0, size=40)
    assert quadrature_error(Energy(curved, {}, x, {"laplace": 16}, 1.0)) > 0.05
    assert quadrature_error(Energy(curved, {}, 0.3 * x, {"laplace": 16}, 0.0)) < 1e-8
    scores = [
        np.asarray(Energy(curved, {}, x, infer, 1.0).score(x[:, None])) for infer in ({"laplace": 16}, EVERYWHERE)
    ]
    assert np.abs(scores[0] - scores[1]).max() > 0.05 * np.abs(scores[1]).max()  # what the alarm is about


EVERYWHERE = {"quadrature": 200}


@pytest.mark.parametrize("infer", [{"laplace": 4}, {"quadrature": 8}])
def test_the_check_leaves_the_model_as_it_is(infer: dict[str, int]) -> None:
    """The dict that a site was given may be one that all calls of the model share."""
    before = dict(infer)

    def model(x: Any) -> None:  # which closes over it: arguments are copied
        curved(x, infer, 0.0)

    quadrature_error(Energy(model, {}, np.ones(5, np.float32)))
    assert infer == before


def site(*laws: tuple[Any, dict[str, Any]]) -> Callable[[Any], None]:
    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = sum(jnp.sum(numpyro.sample(f"z{i}", law, infer=infer)) for i, (law, infer) in enumerate(laws))
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - z) ** 2)

    return model


NORMAL, FIVE = dist.Normal(0, 1), dist.Normal(0, 1).expand([5]).to_event(1)
REFUSED = {
    "no number": (site((NORMAL, {"laplace": 0.5})), "integrated by 0.5 points: write a number from 2 to 4096"),
    "both": (site((NORMAL, {"laplace": 8, "quadrature": 8})), "has both 'laplace' and 'quadrature' in its infer"),
    "few": (
        site((FIVE, {"laplace": 8})), "8 points for the 5 numbers of a row that site 'z0' has are too few: write at "
        "least infer={'laplace': 10}, better 40."
    ),
    "unlike": (
        site((NORMAL, {"laplace": 8}), (NORMAL, {"laplace": 9})), "one has infer={'laplace': 8} and the other 9: write"
    ),
    "no quantiles": (site((dist.Weibull(1.0, 2.0), {"laplace": 8})), "Weibull has no quantiles in NumPyro: use"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreMatching(model, num_steps=1).run(KEY, np.zeros(5, np.float32), progress_bar=False)
