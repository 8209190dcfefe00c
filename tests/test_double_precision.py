"""Diagnostics end to end in double precision, where NumPy's arrays are views of JAX's that cannot be written to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from flax import nnx
from models import improper
from numpyro.contrib.module import nnx_module

from numpyro_score import Energy, ScoreMatching, compare, kernel_stein_discrepancy, mmd, report, sample

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.filterwarnings("ignore:Draws of fit:UserWarning"),
    pytest.mark.filterwarnings("ignore:The largest R-hat:UserWarning"),  # by chance, of so few draws
]

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0.3, 1.2, (60, 2))


def model(x):
    k = numpyro.param("k", lambda _: jnp.ones(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(k * (x - 0.3) ** 2, axis=-1))


@functools.cache
def fitted():
    """The fit, and draws of it."""
    fit = ScoreMatching(model).run(KEY, X, progress_bar=False)
    return fit, sample(fit, KEY, 100)


@pytest.mark.slow
def test_divergences_from_draws():
    """MMD and the Stein test, of chains that are thinned."""
    fit, draws = fitted()
    assert draws["posterior"]["x"].dtype == np.float64
    assert abs(mmd(X, (fit, draws)).value) < 0.1
    test = kernel_stein_discrepancy((fit, draws), Energy(model, {"k": 9 * fit.estimates["k"]}, X), KEY)
    assert test.pvalue < 0.01


def test_rows_are_left_as_they_were():
    """What is computed from draws does not write into them."""
    fit, draws = fitted()
    before = draws["posterior"]["x"].values.copy()
    mmd((fit, draws), X)
    np.testing.assert_array_equal(draws["posterior"]["x"].values, before)


def test_fits_beside_each_other():
    fit, _ = fitted()
    table = compare({"fit": fit, "narrow": fit.energy.with_params({"k": 4 * fit.estimates["k"]})}, X, rng_key=KEY,
                    num_samples=100).table  # fmt: skip
    assert table.index[0] == "fit" and (table["r_hat"] < 1.1).all()


def test_report(tmp_path):
    fit, _ = fitted()
    page = report(fit, tmp_path / "fit.html", num_samples=100).read_text()
    assert "float64" in page and "read-only" not in page


class Quartic(nnx.Module):
    """Its weights are in single precision, whatever the data are in."""

    def __init__(self, rngs):
        self.square = nnx.Linear(1, 1, use_bias=False, rngs=rngs)
        self.fourth = nnx.Linear(1, 1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.square(x**2) + self.fourth(x**4)


@pytest.mark.slow
def test_errors_of_weights_in_single_precision():
    """The influences of rows are those of the covariance, and draws of the weights keep their type."""

    def network(x):
        net = nnx_module("net", Quartic(nnx.Rngs(0)))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(1), obs=x)
            numpyro.factor("energy", -net(x)[:, 0])

    fit = ScoreMatching(network, optim=optax.lbfgs(), num_steps=30).run(KEY, X[:, :1], progress_bar=False)
    errors = fit.stderr()["net$params"]
    squares = jax.tree.map(lambda i: jnp.sqrt(jnp.sum(i**2, axis=0)), fit.influence()["net$params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), errors, squares)
    draws = fit.sample_posterior(KEY, 8)["net$params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(draws)} == {np.dtype("float32")}
    diagonal = fit.stderr(diagonal=True)["net$params"]
    jax.tree.map(lambda a, b: np.testing.assert_array_less(a, 1.01 * b), diagonal, errors)
