"""Sums of quadratic losses over batches of rows: their solutions and standard errors against whole fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import assert_sites_close, improper
from quadratics import KEY, X, Y, location, on_simplex, pairwise, run, scaled

from numpyro_score import (
    ESM,
    ISM,
    ClosedFormError,
    GradientSpread,
    KLContraction,
    QuadraticLoss,
    ScoreMatching,
    generalized_bayes,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def batches():
    """Two batches of the rows of `small`, with a prior on b: the target, the sum, and the whole fit."""
    with jax.enable_x64(True):
        prior = (0.3, 0.05)
        target = generalized_bayes(pairwise, ISM(), 0.7)
        total = sum(QuadraticLoss.of(target, KEY, jnp.asarray(x), prior=prior) for x in np.split(X, 2))
        return target, prior, total, run(ScoreMatching(pairwise, learning_rate=0.7), X, prior=prior)


@pytest.mark.slow
def test_batches_add_up_to_the_whole(batches):
    """Estimates and objective are those of all rows at once: the prior counts once."""
    _, _, total, whole = batches
    fit = total.solve()
    assert total.num_rows == len(X)
    assert_sites_close(fit.estimates, whole.estimates, atol=1e-11)
    np.testing.assert_allclose(fit.value, whole.losses[0], rtol=1e-12)


def test_second_pass_gives_the_sandwich(batches):
    """Standard errors are those of the whole fit, which come from unconstrained space by the delta method."""
    target, prior, total, whole = batches
    estimates = total.solve().estimates
    parts = [GradientSpread.of(target, estimates, KEY, jnp.asarray(x), prior=prior) for x in np.split(X, 2)]
    assert_sites_close(total.stderr(sum(parts)), whole.stderr(), rtol=1e-8)


def rows_with_numbers(x, i):
    """A density that cannot take another number of rows, as it holds one covariate for each."""
    mu = numpyro.param("mu", jnp.zeros(2))
    with numpyro.plate("rows", 50):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * i * jnp.sum((x - mu) ** 2, axis=-1))


def test_rows_that_cannot_be_had_alone():
    """f = −½ i_n‖x_n − μ‖²: μ̂ = Σi²x/Σi², and its sandwich is (Σi²)⁻² n cov(i²(μ̂ − x))."""
    i = 1.0 + np.arange(50) / 50
    target = generalized_bayes(rows_with_numbers, ISM())
    args = jnp.asarray(Y), jnp.asarray(i)
    total = QuadraticLoss.of(target, KEY, *args)
    mu = (i[:, None] ** 2 * Y).sum(0) / (i**2).sum()
    fit = total.solve()
    np.testing.assert_allclose(fit.estimates["mu"], mu, rtol=1e-12)
    spread = GradientSpread.of(target, fit.estimates, KEY, *args)
    expected = 50 * np.cov((i[:, None] ** 2 * (mu - Y)).T) / (i**2).sum() ** 2
    np.testing.assert_allclose(total.covariance(spread), expected, rtol=1e-10)


def test_coloured_jacobian_is_the_hessian():
    """Γ of a pairwise model by hand: Σ_n x_j x_l for elements ij and il; columns with data zeros are not lost."""
    d = 14
    x = np.random.default_rng(1).normal(size=(60, d))
    x[:, 3] = 0.0
    x[7, 3] = 2.0  # seen in one row alone

    def model(x):
        k = numpyro.param("k", jnp.zeros((d, d)))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(d), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(x * (x @ k), axis=-1))

    gamma = QuadraticLoss.of(generalized_bayes(model, ESM(jnp.negative)), KEY, jnp.asarray(x)).data.hessian
    # The score is −½(K + Kᵀ)x: ∂s_i/∂K_ab = −½(δ_ia x_b + δ_ib x_a).
    eye = np.eye(d)
    jacobian = -0.5 * (np.einsum("ia,nb->niab", eye, x) + np.einsum("ib,na->niab", eye, x)).reshape(60, d, d * d)
    np.testing.assert_allclose(gamma, np.einsum("nip,niq->pq", jacobian, jacobian), atol=1e-11)


def test_what_is_no_quadratic_sum_is_refused(batches):
    """Each message names the site and what to do."""
    target, prior, total, _ = batches
    y = jnp.asarray(Y)
    with pytest.raises(ClosedFormError, match="loss is not quadratic"):
        QuadraticLoss.of(generalized_bayes(location, KLContraction(0.5)), KEY, y)
    with pytest.raises(ClosedFormError, match="'w' has support simplex"):
        QuadraticLoss.of(generalized_bayes(on_simplex, ISM()), KEY, y)
    with pytest.raises(ClosedFormError, match="constraint of site 'tau'"):
        QuadraticLoss.of(generalized_bayes(scaled, ISM()), KEY, 2 * y).solve()
    other = QuadraticLoss.of(target, KEY, jnp.asarray(X[:120]), prior=(0.0, 1.0))
    with pytest.raises(ValueError, match="differ in their parameters or priors"):
        total + other
    with pytest.raises(ValueError, match="leave subsample_size out"):
        QuadraticLoss.of(generalized_bayes(location, ISM()), KEY, y, batch=10)
    with pytest.raises(ValueError, match="NaN or infinity in row 0"):
        QuadraticLoss.of(target, KEY, jnp.asarray(X[:120]).at[0, 0].set(jnp.nan), prior=prior)
    with pytest.raises(ValueError, match="at least two"):
        GradientSpread(np.eye(2), np.zeros(2), 1).covariance()


def test_batches_of_different_rates_are_refused(batches):
    """β multiplies the losses, and is one for all rows."""
    with pytest.raises(ValueError, match="different learning rates"):
        batches[2] + dataclasses.replace(batches[2], learning_rate=0.5)
