"""Discrete data: the losses are right where everything can be enumerated."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from discretes import BINARY, THREE, com_poisson, discrete, draw, ising, potts, probabilities, states
from models import FAST_COMPILE
from numpyro.distributions import constraints

from numpyro_score import (
    DiscreteFisher,
    Energy,
    PseudoLikelihood,
    RatioMatching,
    ScoreMatching,
)
from numpyro_score.energy import evaluations

RNG = np.random.default_rng(0)
COUPLINGS = RNG.normal(size=(4, 4))
LBFGS = dict(optim=optax.lbfgs(), num_steps=60)


def pairs(constraint, kernel):
    """A model of four numbers with a coupling of neighbours, which is `kernel` of them, and a field of each."""

    def model(x):
        w, b = numpyro.param("w"), numpyro.param("b")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(constraint, 4), obs=x)
            numpyro.factor("energy", x @ b + kernel(x) @ w)

    return model


def products(x):
    return jnp.concatenate([x[:, :-1] * x[:, 1:], x[:, :1] * x[:, 2:3] * x[:, 3:]], -1)  # and one of three


def squares(x):
    return jnp.concatenate([x[:, :-1] * x[:, 1:], x[:, :1] ** 2], -1)


WHOLE = constraints.integer_interval(np.array([0, 0, 1, 0]), np.array([2, 1, 3, 2]))
MODELS = {
    "binary": (pairs(BINARY, products), states(2, 2, 2, 2)),
    "binary, quadratic": (pairs(BINARY, squares), states(2, 2, 2, 2)),
    "levels": (pairs(THREE, products), states(3, 3, 3, 3)),
    "levels of several sizes": (pairs(WHOLE, squares), states(3, 2, 3, 3) + np.array([0, 0, 1, 0])),
}
THETA = {"w": np.array([0.5, -0.4, 0.3, -0.2]), "b": np.array([0.1, -0.3, 0.2, -0.1])}
LOSSES = {
    "pseudo-likelihood": PseudoLikelihood(),
    "ratio matching": RatioMatching(),
    "Fisher": DiscreteFisher(),
    "Fisher on a path": DiscreteFisher("path"),
    "Fisher on all": DiscreteFisher("complete"),
}
CASES = [(m, k) for m in MODELS for k in LOSSES if k != "ratio matching" or m.startswith("binary")]


def mean_gradient(loss, model, theta, x, weights):
    """The gradient of the mean loss under exact probabilities of all states."""

    @jax.jit
    def of(theta):
        def mean(theta):
            return jnp.vdot(weights, loss(Energy(model, theta, x), jax.random.key(0)))

        return jax.value_and_grad(mean)(theta)

    return of(theta)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("model", "loss"), CASES)
def test_the_truth_is_the_minimum(model, loss):
    """With the exact law of all states for data the gradient vanishes at its parameters, and off them it is higher."""
    model, x = MODELS[model]
    weights = probabilities(model, THETA, x)
    value, slope = mean_gradient(LOSSES[loss], model, THETA, x, weights)
    np.testing.assert_allclose(np.concatenate(list(slope.values())), 0.0, atol=1e-12)
    off, _ = mean_gradient(LOSSES[loss], model, {k: v + 0.1 for k, v in THETA.items()}, x, weights)
    assert off > value + 1e-5


@pytest.mark.usefixtures("x64")
def test_counts_without_end():
    """Of a Conway–Maxwell–Poisson law, summed to where nothing is left."""
    theta, x = {"rate": 2.0, "nu": 0.8}, np.arange(80)
    weights = probabilities(com_poisson, theta, x)
    for loss in (DiscreteFisher(), PseudoLikelihood(max_count=120)):
        _, slope = mean_gradient(loss, com_poisson, theta, x, weights)
        np.testing.assert_allclose([*slope.values()], 0.0, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [bool, int, float])
def test_values_by_hand(dtype):
    """Each loss of each row, from densities of the flipped rows; and the same by derivatives where these are exact."""

    def model(x, square=True):
        with numpyro.plate("rows", len(x)):
            x = 1.0 * numpyro.sample("x", discrete(BINARY, 4), obs=x)
            f = jnp.einsum("ni,ij,nj->n", x, COUPLINGS, x)
            numpyro.factor("energy", f if square else jnp.log(jnp.exp(f)))

    x = states(2, 2, 2, 2).astype(dtype)
    f = np.einsum("ni,ij,nj->n", x, COUPLINGS, x)
    at = {tuple(row): value for row, value in zip(x.astype(int), f, strict=True)}
    flipped = [[at[tuple(np.where(np.arange(4) == d, 1 - row, row))] for d in range(4)] for row in x.astype(int)]
    u = np.exp(np.array(flipped) - f[:, None])
    expected = {
        PseudoLikelihood(): np.log1p(u).sum(1),
        RatioMatching(): ((u / (1 + u)) ** 2).sum(1),
        DiscreteFisher(): (u**2 - 2 / u).sum(1),
        DiscreteFisher("path"): np.where(x == 1, u**2, -2 / u).sum(1),
    }
    energies = Energy(model, {}, x), Energy(model, {}, x, square=False)
    assert [evaluations(e, 1) for e in energies] == [3, 5]
    for loss, values in expected.items():
        for energy in energies:
            found = jax.jit(loss, compiler_options=FAST_COMPILE)(energy, jax.random.key(0))
            np.testing.assert_allclose(found, values, rtol=1e-10)


FITS = {
    "Ising": (ising, {"j": 0.6, "h": -0.5}, states(*[2] * 16)),
    "Potts": (potts, {"j": 0.4, "h": 0.3}, states(*[3] * 9)),
}


@pytest.mark.parametrize(
    ("case", "loss"),
    [("Ising", k) for k in ("pseudo-likelihood", "ratio matching", "Fisher")]
    + [("Potts", k) for k in ("pseudo-likelihood", "Fisher", "Fisher on a path")],
)
def test_lattices_against_enumeration(case, loss):
    """Fits of independent rows are within three standard errors of the truth."""
    model, truth, x = FITS[case]
    rows = draw(model, truth, x, 500, seed=1)
    fit = ScoreMatching(model, loss=LOSSES[loss], **LBFGS).run(None, rows, progress_bar=False)
    error = fit.stderr()
    for name, value in truth.items():
        assert 0.01 < error[name] < 0.3
        assert abs(fit.estimates[name] - value) < 3 * error[name]
