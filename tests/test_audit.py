"""The audit's figures against closed forms for quadratic energies."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest

from numpyro_score import DSM, FSM, ISM, SSM, ScoreMatching, audit

K = np.array([[2.0, 0.7, -0.4], [0.7, 1.5, 0.3], [-0.4, 0.3, 1.0]])
X = np.random.default_rng(0).normal(size=(300, 3))


def model(x):
    k = numpyro.param("k", K)
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x))


@pytest.fixture(scope="module")
def report():
    with jax.enable_x64(True):
        losses = [ISM(), SSM(), SSM(4), DSM(0.5), DSM(0.5, False), FSM(0.1)]
        return audit(model, losses, X, params={"k": K}, num_rows=300, num_draws=300)


@pytest.mark.slow
def test_values(report):
    """Bias and spread of a row: 0 and √(2Σ K_ij²/M) for slices, ½σ²‖K‖² for noise."""
    off = np.sqrt(2 * (np.sum(K**2) - np.sum(np.diag(K) ** 2)))
    exact, one, four, noisy, plain, steps = report.rows
    assert abs(exact.bias) < 1e-12
    assert exact.spread < 1e-12
    assert (exact.inflation, exact.signal_to_noise) == (1.0, np.inf)
    # Over 120,000 draws the spread is known to a few parts in a thousand.
    np.testing.assert_allclose([one.spread, four.spread], [off, off / 2], rtol=0.03)
    for row in (one, four, steps):
        assert abs(row.bias) < 5 * row.bias_error
    for row in (noisy, plain):
        assert abs(row.bias - 0.125 * np.sum(K**2)) < 5 * row.bias_error


@pytest.mark.slow
def test_gradients(report):
    """Bias and noise of the gradient in K, from the closed forms at these rows."""
    _, one, four, noisy, *_ = report.rows
    n = len(X)

    def by_hand(k, x):
        return 0.5 * jnp.sum((x @ (k + k.T) / 2) ** 2) - jnp.trace(k)

    slopes = jax.vmap(jax.grad(by_hand), (None, 0))(K, X)
    between = np.sum(np.var(slopes, axis=0))
    # Slices have -vvᵀ for -I, with six signs of variance 1/M off the diagonal, for each row.
    np.testing.assert_allclose(one.inflation, np.sqrt(1 + 6 / between), rtol=0.02)
    np.testing.assert_allclose(four.inflation, np.sqrt(1 + 1.5 / between), rtol=0.02)
    np.testing.assert_allclose(one.signal_to_noise, np.linalg.norm(slopes.mean(0)) / np.sqrt(6 / n), rtol=0.05)
    assert one.gradient_bias < 0.3
    # Noise adds σ²K.
    np.testing.assert_allclose(noisy.gradient_bias, 0.25 * np.linalg.norm(K) / np.sqrt(between / n), rtol=0.1)


def test_advice(report):
    """Projections from the inflation; a large step and a small noise, as a quadratic has no higher terms."""
    by_loss = dict(zip([r.loss for r in report.rows][1:], report.advice, strict=True))
    one = report.rows[1]
    needed = int(np.ceil((one.inflation**2 - 1) / 0.1025))
    assert f"SSM(): {needed} projection" in by_loss[SSM()]
    assert "epsilon of about" in by_loss[FSM(0.1)]
    assert "sigma of about 0.0" in by_loss[DSM(0.5)]
    text = str(report)
    assert "on 300 of 300 rows and 300 draws" in text
    assert "SSM(num_projections=4)" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.slow
def test_audit_of_a_sample_of_masked_data_and_of_a_fit():
    """At a fit's estimates, on a sample of rows, with one loss; a single-precision step is advised within range."""
    x = X.astype(np.float32)
    optim = optax.adam(0.03)  # K and its transpose are one, which a closed form would warn of
    fit = ScoreMatching(model, optim=optim).run(jax.random.key(0), x, num_steps=300, progress_bar=False)
    found = audit(model, FSM(), x, params=fit.estimates, num_rows=50, num_draws=20)
    assert (found.num_rows, found.total_rows) == (50, 300)
    best = float(found.advice[0].split("about ")[1].rstrip("."))
    assert 0.01 < best < 3  # what rounding destroys is not advised
    with pytest.raises(ValueError, match="num_draws of at least 2"):
        audit(model, ISM(), x, num_draws=1)
    with pytest.raises(ValueError, match="no parameters"):
        audit(lambda x: numpyro.factor("energy", -0.5 * (x**2).sum(-1)), ISM(), x)
