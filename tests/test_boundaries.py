"""Data whose density has a pole at the boundary, and domains by functions that do not vanish there."""

import warnings

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, SSM, Domain, Energy, RowWeight, ScoreMatching, flat_simplex
from numpyro_score.losses.boundaries import check_boundary

SQUARED = ISM(boundary_weight=lambda distance: jnp.minimum(distance, 1.0) ** 2)


def gamma(x):
    shape = numpyro.param("shape", 1.5, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.independent(constraints.positive, 1), (), (1,)), obs=x)
        numpyro.factor("energy", ((shape - 1) * jnp.log(x) - x).sum(-1))


def energy_on(support, x):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), x.shape[1:]), obs=x)
            numpyro.factor("energy", -x.sum(-1))

    return Energy(model, {}, jnp.asarray(x, jnp.float32))


def says(energy, weight=None):
    """Whether there is a warning of a pole."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_boundary("ISM", energy, weight)
    return [str(w.message) for w in found]


def test_a_gamma_law_of_small_shape():
    """By the distance the estimate is 1 with a tiny error, which is told; by its square it is right."""
    x = jnp.asarray(np.random.default_rng(5).gamma(0.7, size=(4000, 1)), jnp.float32)
    with pytest.warns(UserWarning, match=r"grows towards it, about as the distance to the power -0\.3.* \*\* 2\)"):
        wrong = ScoreMatching(gamma).run(None, x, progress_bar=False)
    assert abs(wrong.estimates["shape"] - 0.7) > 100 * wrong.stderr()["shape"]
    fit = ScoreMatching(gamma, loss=SQUARED).run(None, x, progress_bar=False)
    assert abs(fit.estimates["shape"] - 0.7) < 3 * fit.stderr()["shape"]


def test_which_column_and_bound():
    """Of several columns the one is named, and either end of an interval counts."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(size=3000), rng.beta(2.0, 0.5, size=3000)], axis=-1)
    box = constraints.independent(constraints.unit_interval, 1)
    (message,) = says(energy_on(box, x))
    assert "in 'x[1]'" in message
    assert not says(energy_on(box, x[:, :1]))


@pytest.mark.parametrize("power, seen", [(1.0, True), (1.2, True), (2.0, False)])
def test_the_weights_own_order_counts(power, seen):
    """A pole of power −½ needs h ~ d^q with q above 1½; in units a million times as large, too."""
    x = np.random.default_rng(0).gamma(0.5, size=(3000, 2))
    support = constraints.independent(constraints.positive, 1)
    for scale in (1.0, 1e6):
        energy = energy_on(support, scale * x)
        assert bool(says(energy, lambda d: jnp.minimum(d, 1.0) ** power)) == seen
        product = RowWeight(lambda d, x: (jnp.minimum(d, 1.0) ** power).prod(-1))
        assert bool(says(energy, product)) == seen
        assert not says(energy, RowWeight(lambda d, x: (jnp.minimum(x, 1.0) ** power).prod(-1)))  # it cannot be told


def test_compositions_and_regions():
    """A share of small exponent, which the simplex of roots bears, and rows that crowd at a circle."""
    rng = np.random.default_rng(0)
    x = rng.dirichlet([2.0, 1.5, 0.4], size=3000)
    assert says(energy_on(flat_simplex, x))
    assert not says(energy_on(constraints.simplex, x))
    assert not says(energy_on(flat_simplex, rng.dirichlet([2.0, 1.5, 1.0], size=3000)))
    disc = Domain(lambda x: 1 - jnp.linalg.norm(x, axis=-1))
    for law, seen in ((rng.beta(1.0, 0.5, size=3000), True), (rng.uniform(size=3000) ** 0.5, False)):
        angle = rng.uniform(0, 2 * np.pi, size=3000)
        x = law[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        assert bool(says(energy_on(disc, x))) == seen


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.exponential(size=2000),
        lambda rng: np.abs(rng.normal(size=2000)),
        lambda rng: rng.lognormal(0.0, 1.0, size=2000),
        lambda rng: rng.gamma(1.2, size=2000),
        lambda rng: np.abs(rng.standard_cauchy(2000)),
        lambda rng: np.round(rng.exponential(size=2000), 1) + 0.05,
    ],
    ids=["exponential", "half normal", "lognormal", "gamma 1.2", "half Cauchy", "rounded"],
)
def test_no_false_alarm(draw):
    """Of densities that are finite at the boundary, at most one data set in a hundred; one in a thousand is meant."""
    rng = np.random.default_rng(1)
    found = [
        bool(says(energy_on(constraints.independent(constraints.positive, 1), draw(rng)[:, None]))) for _ in range(20)
    ]
    assert sum(found) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sign(1 - (x**2).sum(-1)),
        lambda x: jnp.where((x**2).sum(-1) < 1, 1.0, -1.0),
        lambda x: jnp.round(2 - (x**2).sum(-1)),
    ],
    ids=["sign", "where", "round"],
)
@pytest.mark.parametrize("loss", [ISM(), SSM()])
def test_functions_that_only_tell_inside_from_outside(function, loss):
    """Their weight has no slope, and a fit gave zeros with errors of zero."""
    x = np.random.default_rng(0).uniform(-0.7, 0.7, size=(50, 2))
    disc = Domain(lambda x: 2 - x[..., 0], function)
    with pytest.raises(ValueError, match=r"Function 1 of the Domain of site 'x' is constant around every row"):
        loss.check(energy_on(disc, x))


def test_functions_that_give_truth_values():
    with pytest.raises(ValueError, match=r"gave values of type bool: return numbers that fall to zero"):
        energy_on(Domain(lambda x: (x**2).sum(-1) < 1), np.zeros((3, 2))).check()


def test_masked_rows_are_not_looked_at():
    """Nor what stands in them."""
    x = np.random.default_rng(5).gamma(0.5, size=(4000, 1)).astype(np.float32)
    x[::2] = np.random.default_rng(0).exponential(size=(2000, 1)) + 0.5

    def model(x, counts):
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=counts):
            x = numpyro.sample(
                "x", dist.ImproperUniform(constraints.independent(constraints.positive, 1), (), (1,)), obs=x
            )
            numpyro.factor("energy", -x.sum(-1))

    counts = np.arange(4000) % 2 == 0
    assert not says(Energy(model, {}, jnp.asarray(x), jnp.asarray(counts)))
    assert says(Energy(model, {}, jnp.asarray(x), jnp.asarray(~counts)))
