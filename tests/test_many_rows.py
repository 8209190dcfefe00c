"""What is done to the data before a fit does it in parts: memory stays small, and nothing is overlooked."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import Energy
from numpyro_score.energy import evaluate_for_check, find_kink

N = 40_003
WIDTH = 256  # of a network, so that all rows at once would take as many numbers each
PART = 2**22 // WIDTH  # rows that are looked at together; N is two parts and half of one


def network(x):
    """A layer as wide as many rows cannot be held."""
    weight = numpyro.param("weight", jnp.full((2, WIDTH), 0.1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", jax.nn.softplus(x @ weight).sum(-1) - jnp.sum(x**4, axis=-1))


def summed(x):
    """Rows that see each other."""
    weight = numpyro.param("weight", jnp.full((2, WIDTH), 0.1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", jax.nn.softplus(x @ weight).sum(-1) - 0.01 * jnp.sum(x) * x[..., 0])


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)


def energy(model, x):
    return Energy(model, {"weight": jnp.full((2, WIDTH), 0.1)}, x)


def test_memory():
    """The check holds no more than the intermediates of one part twice, and a few numbers for each row."""
    n = 100_003
    compiled = jax.jit(evaluate_for_check).lower(energy(network, np.zeros((n, 2), np.float32))).compile()
    held = compiled.memory_analysis()
    assert held.temp_size_in_bytes < 4 * 4 * PART * WIDTH + 40 * n < 4 * n * WIDTH


def test_every_row_is_looked_at(rows):
    """Density of every row, as of all at once; a bad row is named by its number, in whatever part it is."""
    whole = energy(network, rows)
    _, change, sizes, _ = jax.jit(evaluate_for_check)(whole)
    np.testing.assert_allclose(sizes, jnp.abs(whole.log_density(rows)), rtol=1e-4, atol=1e-3)
    assert np.asarray(change).max() < 1e-3
    for row in (0, PART - 1, PART, N - PART, N - 1):
        x = rows.copy()
        x[row] = 1e20
        with pytest.raises(ValueError, match=rf"not finite in row {row} \(1 of {N}\)"):
            energy(network, x).check()


def test_rows_that_interact(rows):
    """They do so within each part."""
    with pytest.raises(ValueError, match="Rows of 'x' interact"):
        energy(summed, rows).check()


def test_kinks_among_many_rows(rows):
    """Some rows are enough to find one."""

    def kinked(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            numpyro.factor("energy", -jnp.sum(jnp.abs(x), axis=-1))

    kink = find_kink(Energy(kinked, {}, rows))
    assert kink is not None
    assert kink.operation == "abs"
    assert find_kink(energy(network, rows)) is None
