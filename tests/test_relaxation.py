"""Discrete data stored as floats: ratios by derivatives where the density is a quadratic, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from discretes import discrete
from numpyro.distributions import constraints

from numpyro_score import (
    ISM,
    DiscreteFisher,
    Energy,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
    hyvarinen_score,
)

WEIGHTS = np.array([[0.5, -1.0, 0.3], [1.2, 0.4, -0.7], [-0.6, 0.8, 0.9]], np.float32)
CORNERS = {
    "abs": lambda x: jnp.abs(x - 1).sum(-1),
    "relu": lambda x: jax.nn.relu(x @ WEIGHTS).sum(-1),
    "maximum": lambda x: jnp.maximum(x[:, 0], 1.5 * x[:, 1]),
    "max": lambda x: x.max(-1),
    "clip": lambda x: jnp.clip(x, 0, 1).sum(-1),
    "sort": lambda x: jnp.sort(x, -1)[:, 0] * 2.0,
    "median": lambda x: jnp.median(x, axis=-1),
    "leaky": lambda x: jax.nn.leaky_relu(x @ WEIGHTS).sum(-1),
    "norm": lambda x: jnp.linalg.norm(x, ord=1, axis=-1),
    "where": lambda x: jnp.where(x > 1, 2.0 * x, x).sum(-1),
    "corner of a product": lambda x: jnp.abs(x[:, 0] * x[:, 1] - 1),
}
QUADRATIC = {
    "linear": lambda x: x @ WEIGHTS[0],
    "form": lambda x: jnp.einsum("ni,ij,nj->n", x, WEIGHTS, x),
    "squares": lambda x: ((x - 0.5) ** 2).sum(-1),
}


def energy_of(f, x):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(constraints.integer_interval(0, 2), 3), obs=x)
            numpyro.factor("energy", -1.0 * f(x))

    return Energy(model, {}, x)


@pytest.mark.parametrize("name", CORNERS)
def test_corners_are_no_quadratics(name):
    """Their second derivative is zero wherever there is one, and says nothing of the ratios."""
    assert not energy_of(CORNERS[name], jnp.ones((4, 3))).is_quadratic


@pytest.mark.parametrize("name", QUADRATIC)
def test_quadratics_are_known(name):
    assert energy_of(QUADRATIC[name], jnp.ones((4, 3))).is_quadratic


@pytest.mark.parametrize("loss", [PseudoLikelihood(), PairLikelihood(), DiscreteFisher("path")])
def test_floats_are_as_integers(loss):
    x = np.random.default_rng(0).integers(0, 3, (6, 3))
    for f in (CORNERS["abs"], CORNERS["relu"], QUADRATIC["form"]):
        whole, real = (loss(energy_of(f, jnp.asarray(x, t)), jax.random.key(0)) for t in (int, float))
        np.testing.assert_allclose(real, whole, rtol=1e-5)


def test_ratio_matching_of_a_network():
    """Σ_d σ(f(x with x_d turned) − f(x))² by hand [Hyvärinen 2007]."""
    x = np.random.default_rng(0).integers(0, 2, (5, 3))

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(constraints.boolean, 3), obs=x)
            numpyro.factor("energy", -CORNERS["relu"](x))

    def f(x):
        return -np.maximum(x @ WEIGHTS, 0).sum(-1)

    turned = [np.where(np.arange(3) == d, 1 - x, x) for d in range(3)]
    expected = sum(1 / (1 + np.exp(f(x) - f(y))) ** 2 for y in turned)
    np.testing.assert_allclose(
        RatioMatching()(Energy(model, {}, jnp.asarray(x, float)), jax.random.key(0)), expected, rtol=1e-5
    )


def test_what_needs_derivatives_is_named():
    """And losses in the wrong order."""
    with pytest.raises(TypeError, match=r"The Hyvärinen score needs derivatives .* compare"):
        hyvarinen_score(energy_of(QUADRATIC["linear"], jnp.ones((4, 3), int)))
    for losses in ((PseudoLikelihood(), ISM()), (ISM(), ISM()), (PseudoLikelihood(), PseudoLikelihood())):
        with pytest.raises(TypeError, match=r"as its (continuous|discrete) loss: write Mixed\(continuous, discrete\)"):
            Mixed(*losses)


def test_a_covariate_named_as_the_first_argument_of_at():
    """Any name of an argument will do."""

    def model(y, x):
        with numpyro.plate("rows", len(y)):
            y = numpyro.sample("y", discrete(constraints.boolean), obs=y)
            numpyro.factor("energy", 1.0 * x * y)

    energy = Energy(model, {}, jnp.array([0, 1]), x=jnp.array([1.0, 2.0]))
    ones = jnp.ones((2, 1))
    np.testing.assert_allclose(energy.at(ones, x=jnp.array([3.0, 4.0])).log_density(ones), [3.0, 4.0])
