"""Discrete latent sites of rows, summed out: against NumPyro's mixtures, sums written by hand, and enumeration."""

from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
import scipy.special
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from numpyro_score import ISM, Energy, PseudoLikelihood, ScoreMatching, generalized_bayes, log_partition, score_factor

FLAT = dist.ImproperUniform(constraints.real, (), ())
SUM = {"enumerate": "parallel"}
PARAMS = {"w": jnp.array([0.3, 0.7]), "mu": jnp.array([-1.0, 1.5]), "scale": 0.7}


def mixture(x: Any) -> None:
    """Two normal laws, with all parts normalised by NumPyro."""
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Categorical(w), infer=SUM)
        numpyro.sample("x", dist.Normal(mu[z], scale), obs=x)


def summed(x: Any) -> None:
    """The same by NumPyro's own sum."""
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        law = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, scale))
        numpyro.sample("x", law, obs=x)


def rows(n: int = 400) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(np.where(rng.uniform(size=n) < 0.3, -1.0, 1.5) + 0.7 * rng.normal(size=n), jnp.float32)


def test_a_mixture_is_numpyros() -> None:
    """Density, score and Laplacian; and rows of any number."""
    x = rows()
    ours, numpyros = Energy(mixture, PARAMS, x), Energy(summed, PARAMS, x)
    assert ours.resizable
    for got, expected in zip(
        ours.value_score_laplacian(ours.data), numpyros.value_score_laplacian(ours.data), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
    more = jnp.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(ours.log_density(more), numpyros.log_density(more), rtol=1e-5)


def test_which_component_a_row_is_of() -> None:
    """Bayes' rule."""
    x = np.asarray(rows(), np.float64)
    got = Energy(mixture, PARAMS, rows()).latent_probabilities(rows()[:, None])["z"]
    joint = np.array([0.3, 0.7]) * np.exp(-0.5 * ((x[:, None] - [-1.0, 1.5]) / 0.7) ** 2)
    np.testing.assert_allclose(got, joint / joint.sum(axis=1, keepdims=True), atol=1e-5)


def objective(free: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The loss of each row at (logit of w₀, means, log scale), from derivatives of the mixture by hand."""
    logit, mu, scale = free[0], free[1:3], np.exp(free[3])
    log_w = -np.logaddexp(0.0, [-logit, logit])
    slopes = -(x[:, None] - mu) / scale**2
    share = scipy.special.softmax(log_w + 0.5 * scale**2 * -(slopes**2), axis=1)
    score = np.sum(share * slopes, axis=1)
    return 0.5 * score**2 + np.sum(share * slopes**2, axis=1) - score**2 - scale**-2


def penalty(free: np.ndarray) -> float:
    return float(np.sum(free[1:3] ** 2) / 50 + 0.5 * free[3] ** 2 + free[3])


def by_differences(f: Any, free: np.ndarray, step: float = 1e-4) -> np.ndarray:
    return np.array([(f(free + e) - f(free - e)) / (2 * step) for e in step * np.eye(len(free))])


def test_fits_and_posteriors_are_those_of_the_sum() -> None:
    """Against the minimum and the sandwich of the sum by hand; the latent sites are seen by no guide and no kernel."""
    x = rows()
    fit, numbers = ScoreMatching(mixture).run(jax.random.key(0), x, progress_bar=False), np.asarray(x, np.float64)

    def total(free: np.ndarray) -> float:
        return float(objective(free, numbers).sum() + penalty(free))

    start = np.array([np.log(0.3 / 0.7), -1.0, 1.5, np.log(0.7)])
    if fit.estimates["mu"][0] > fit.estimates["mu"][1]:  # the components are in the order in which they were found
        start = start[[0, 2, 1, 3]] * [-1, 1, 1, 1]
    best = scipy.optimize.minimize(total, start, tol=1e-10).x
    hessian = by_differences(lambda free: by_differences(total, free), best)
    gradients = by_differences(lambda free: objective(free, numbers), best)
    inverse = np.linalg.inv(hessian)
    errors = np.sqrt(np.diag(inverse @ np.cov(gradients) @ inverse) * len(numbers))
    w, scale = 1 / (1 + np.exp(-best[0])), np.exp(best[3])
    expected = {"w": ([w, 1 - w], w * (1 - w) * errors[0]), "mu": (best[1:3], errors[1:3])}
    for site, (value, error) in {**expected, "scale": (scale, scale * errors[3])}.items():
        np.testing.assert_allclose(fit.estimates[site], value, rtol=1e-3)
        np.testing.assert_allclose(fit.stderr()[site], np.broadcast_to(error, np.shape(value)), rtol=1e-2)
    kernel = NUTS(generalized_bayes(mixture, ISM()), init_strategy=fit.init_strategy)
    mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
    mcmc.run(jax.random.key(1), x)
    assert set(mcmc.get_samples()) == {"w", "mu", "scale"}


VISIBLE, HIDDEN = 5, 6
COUPLING = np.random.default_rng(1).normal(size=(VISIBLE, HIDDEN))
BIAS = np.random.default_rng(2).normal(size=HIDDEN)
STATES = np.array(list(itertools.product([0, 1], repeat=VISIBLE)))


def machine(v: Any) -> None:
    """A restricted Boltzmann machine; 0.5 to each h is a law that all values share, which is no part of the energy."""
    w = numpyro.param("w", jnp.asarray(COUPLING))
    bias = numpyro.param("b", jnp.asarray(BIAS))
    with numpyro.plate("rows", len(v)):
        v = numpyro.sample("v", dist.ImproperUniform(constraints.boolean, (), (VISIBLE,)), obs=v)
        h = numpyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1), infer=SUM)
        numpyro.factor("energy", jnp.sum((v @ w + bias) * h, axis=-1))


def softplus_sum(v: np.ndarray) -> np.ndarray:
    return np.sum(np.logaddexp(0.0, v @ COUPLING + BIAS) - np.log(2.0), axis=-1)


def test_a_boltzmann_machine_is_a_sum_of_softplus() -> None:
    """64 values of six units in a vector; log Z against all 2¹¹ states; laws of units given the visible ones."""
    params = {"w": jnp.asarray(COUPLING, jnp.float32), "b": jnp.asarray(BIAS, jnp.float32)}
    energy = Energy(machine, params, jnp.asarray(STATES[:9]))
    np.testing.assert_allclose(
        energy.log_density(STATES.astype(np.float32)), softplus_sum(STATES), rtol=1e-4, atol=1e-4
    )
    expected = np.log(np.exp(softplus_sum(STATES)).sum())
    np.testing.assert_allclose(log_partition(energy).value, expected, rtol=1e-5)
    units = energy.latent_probabilities(STATES.astype(np.float32))["h"]
    assert units.shape == (32, HIDDEN, 2)
    np.testing.assert_allclose(units[..., 1], 1 / (1 + np.exp(-(STATES @ COUPLING + BIAS))), atol=1e-5)


def test_a_boltzmann_machine_is_fitted() -> None:
    """By pseudo-likelihood, equal rows by their weight: the data are as likely as under the truth, or more."""
    rng = np.random.default_rng(3)
    probabilities = np.exp(softplus_sum(STATES))
    probabilities /= probabilities.sum()
    counts = rng.multinomial(2000, probabilities)

    def weighted(v: Any, weight: Any) -> None:
        with handlers.scale(scale=weight):
            machine(v)

    start = {"w": jnp.asarray(0.3 * rng.normal(size=COUPLING.shape), jnp.float32)}
    fit = ScoreMatching(weighted, optim=optax.lbfgs(), loss=PseudoLikelihood(), num_steps=200).run(
        jax.random.key(0), jnp.asarray(STATES), jnp.asarray(counts, float), progress_bar=False, init_params=start
    )
    found = np.asarray(fit.energy.log_density(STATES.astype(np.float32)), np.float64)
    found -= np.log(np.exp(found).sum())
    gain = np.sum(counts * (found - np.log(probabilities)))
    assert gain > 0  # a fit by likelihood, with more parameters than states, gains 31/2 ± 4


def test_units_of_a_plate_within_each_row() -> None:
    def model(x: Any) -> None:
        a = numpyro.param("a", jnp.array([1.0, -0.5, 0.25]))
        with numpyro.plate("rows", len(x), dim=-2):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            with numpyro.plate("units", 3, dim=-1):
                h = numpyro.sample("h", dist.DiscreteUniform(-1, 1), infer=SUM)
            numpyro.factor("energy", jnp.sum(a * h * x, axis=-1, keepdims=True) - 0.5 * x**2)

    x = jnp.linspace(-2, 2, 9)[:, None]
    energy = Energy(model, {"a": jnp.array([1.0, -0.5, 0.25])}, x)
    expected = -0.5 * np.asarray(x[:, 0]) ** 2 + np.sum(
        np.log((1 + 2 * np.cosh(np.asarray(x) * np.array([1.0, -0.5, 0.25]))) / 3), axis=-1
    )
    np.testing.assert_allclose(energy.log_density(energy.data), expected, rtol=1e-4, atol=1e-5)
    assert energy.latent_probabilities(energy.data)["h"].shape == (9, 3, 3)


def test_two_sites_and_covariates() -> None:
    """A gate that a covariate opens, and a sign: four values together, in a subsampled plate and under a mask, too."""

    def model(x: Any, gate: Any, size: int | None = None) -> None:
        tau = numpyro.param("tau", 1.0)
        with numpyro.plate("rows", len(x), subsample_size=size) as index:
            y, g = x[index], gate[index]
            is_open = numpyro.sample("open", dist.Bernoulli(logits=g), infer=SUM)
            sign = numpyro.sample("sign", dist.Bernoulli(0.25), infer=SUM)
            y = numpyro.sample("x", FLAT, obs=y)
            numpyro.factor("energy", -0.5 * tau * (y - is_open * (2 * sign - 1)) ** 2)

    x, gate = rows(60), jnp.linspace(-2, 2, 60)
    energy = Energy(model, {"tau": 2.0}, x, gate)
    p = 1 / (1 + np.exp(-np.asarray(gate)))
    parts = [(1 - p, 0.0), (0.25 * p, 1.0), (0.75 * p, -1.0)]
    expected = np.log(sum(q * np.exp(-((np.asarray(x) - at) ** 2)) for q, at in parts))
    np.testing.assert_allclose(energy.log_density(energy.data), expected, rtol=1e-4, atol=1e-5)
    fit = ScoreMatching(model, num_steps=50).run(jax.random.key(0), x, gate, size=20, progress_bar=False)
    assert np.isfinite(fit.losses).all()


def outside(x: Any) -> None:
    with numpyro.plate("other", 3):
        numpyro.sample("z", dist.Bernoulli(0.5), infer=SUM)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -(x**2))


def many(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        h = numpyro.sample("h", dist.Bernoulli(0.5).expand([13]).to_event(1), infer=SUM)
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -((x - h.sum(-1)) ** 2))


def with_law(law: Any, **infer: str) -> Any:
    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", law, infer=infer)
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -((x - z) ** 2))

    return model


def with_score(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Bernoulli(0.5), infer=SUM)
        x = numpyro.sample("x", FLAT, obs=x)
        score_factor("force", x, -x)


def kinked(x: Any) -> None:
    mu = numpyro.param("mu", 0.3)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.5), infer=SUM)
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -jnp.where(z == 1, jnp.abs(x - mu), (x + 1) ** 2))


def weighed(how: Any) -> Any:
    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.3), infer=SUM)
            x = numpyro.sample("x", FLAT, obs=x)
            with how(z):
                numpyro.factor("energy", -(x**2))

    return model


REFUSED = {
    "a mask": (
        weighed(lambda z: handlers.mask(mask=z == 1)),
        "depends on the latent site 'z', and weighs rows, not values",
    ),
    "a scale": (weighed(lambda z: handlers.scale(scale=1.0 + z)), "write jnp.where(z == 1, ..., 0.0) in the factor"),
    "outside of the plate": (outside, "outside of the plate 'rows' that numbers the rows"),
    "too many": (many, "'h' (2^13), take 8192 values together, and at most 4096 are summed"),
    "counts": (with_law(dist.Poisson(1.0), **SUM), "Poisson has no fixed set of values"),
    "not marked": (with_law(dist.Bernoulli(0.5)), "write infer={'enumerate': 'parallel'} to have the density summed"),
    "continuous": (with_law(dist.Normal(), **SUM), "Normal has no fixed set of values"),
    "a score": (with_score, "'force' is a score_factor, whose density is unknown, so that none can be summed"),
    "a kink in one part": (kinked, "passes the data through 'abs'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_summed_is_refused(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoreMatching(model, num_steps=1).run(jax.random.key(0), rows(), progress_bar=False)


def test_laws_of_latent_sites_need_some() -> None:
    energy = Energy(summed, PARAMS, rows())
    with pytest.raises(ValueError, match="has no latent site of rows that is summed"):
        energy.latent_probabilities(energy.data)


def test_masked_rows_do_not_count() -> None:
    x = rows(50)

    def masked(x: Any, keep: Any) -> None:
        with handlers.mask(mask=keep):
            mixture(x)

    keep = jnp.arange(50) < 30
    energy = Energy(masked, PARAMS, jnp.where(keep, x, jnp.nan), keep)
    assert energy.weights.tolist() == keep.astype(float).tolist()
    np.testing.assert_allclose(
        energy.log_density(energy.data)[:30], Energy(summed, PARAMS, x).log_density(x[:, None])[:30], rtol=1e-5
    )


def test_a_factor_of_latent_sites_alone() -> None:
    """As the hidden biases of a machine are written: part of the density by way of the sum."""

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer=SUM)
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("bias", 0.7 * z)
            numpyro.factor("energy", -(x**2) * (1 + z))

    x = np.array([0.5, 2.0], np.float32)
    expected = np.log(0.5 * np.exp(-(x**2)) + 0.5 * np.exp(0.7 - 2 * x**2))
    np.testing.assert_allclose(Energy(model, {}, x).log_density(x[:, None]), expected, rtol=1e-5, atol=1e-6)
