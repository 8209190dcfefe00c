"""Robust fits by Windham's weights: exact laws, an independent root, and what stays refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import scipy.optimize
from models import improper
from numpyro import handlers
from numpyro.distributions import constraints

from numpyro_score import ISM, Energy, ScoreMatching, hyvarinen_loo, windham
from numpyro_score.inference import Windham
from numpyro_score.uncertainty import SandwichError

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.append(RNG.normal(size=400) * 0.5, np.full(8, 9.0)).astype(np.float32)  # a fiftieth far outside


def scale(x):
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    numpyro.factor("energy", -0.5 * tau * x**2)


@pytest.fixture(scope="module")
def fit():
    return ScoreMatching(scale).run(KEY, X, progress_bar=False)


@pytest.mark.parametrize("c", [0.1, 0.25])
def test_estimate_and_error_of_a_root(c, fit):
    """Σ w (1 − (1+c) τ x²) = 0 with w = exp(−c τ x²/2), by another solver; its error by differences."""
    x = X.astype(np.float64)

    def rows(tau):
        return np.exp(-0.5 * c * tau * x**2) * (1 - (1 + c) * tau * x**2)

    tau = scipy.optimize.brentq(lambda t: rows(t).sum(), 2.0, 8.0)
    slope = (rows(tau + 1e-4) - rows(tau - 1e-4)).mean() / 2e-4
    error = np.sqrt(rows(tau).var(ddof=1) / len(x)) / abs(slope)
    robust = windham(fit, c)
    np.testing.assert_allclose(robust.estimates["tau"], tau, rtol=1e-3)
    np.testing.assert_allclose(robust.stderr()["tau"], error, rtol=2e-3)
    assert fit.estimates["tau"] < 1 < 3.3 < robust.estimates["tau"] < 4.7  # the truth is 4
    assert "by Windham(loss=ISM(), c=" in robust.summary().lines[0]


def quartic(x, w):
    """Of no exponential family in its parameters, and no Gaussian."""
    a, b = numpyro.param("a", 0.5, constraint=constraints.positive), numpyro.param("b", 0.3)
    with numpyro.plate("rows", len(x)), handlers.scale(scale=w):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -a * x**4 - jnp.exp(b) * x**2 + b * x)


def test_rows_of_the_model_itself(x64):
    """On a grid weighted by the density the estimates are the truth, whatever c: no normaliser is missing."""
    a, b = 0.3, -0.4
    x = np.linspace(-5, 5, 401)
    w = np.exp(-a * x**4 - np.exp(b) * x**2 + b * x)
    fit = ScoreMatching(quartic, optim=optax.lbfgs(), num_steps=60).run(KEY, x, w * 100 / w.sum(), progress_bar=False)
    found = windham(fit, 0.7).estimates
    np.testing.assert_allclose([found["a"], found["b"]], [a, b], atol=1e-4)


def test_what_it_is_not(fit, tmp_path):
    """No posterior, no calibration, no influence, and no loss to fit by."""
    robust = windham(fit, 0.1)
    with pytest.raises(TypeError, match="Windham gives no posterior, as its weights follow the parameters"):
        hyvarinen_loo(robust)
    with pytest.raises(SandwichError, match="root of an equation"):
        robust.calibrated_learning_rate()
    with pytest.raises(SandwichError, match="take the fit that over_batches or windham was given"):
        robust.influence()
    with pytest.raises(NotImplementedError, match=r"write windham\(fit, 0.1\)"):
        robust.svi.run(KEY, X, progress_bar=False)
    with pytest.raises(TypeError, match="and this one is by Windham"):
        windham(robust, 0.1)
    with pytest.raises(TypeError, match=r"save the fit that windham was given, and write windham.*0\.1"):
        robust.save(tmp_path / "robust")
    with pytest.raises(ValueError, match="windham needs a positive c"):
        windham(fit, -1.0)


def test_weights_of_a_loss():
    """Weights have mean one over the rows that count, and the loss is that of the density to the power 1 + c."""
    x, c, tau = X[:5], 0.5, 2.0
    w = np.exp(-0.5 * c * tau * x**2)
    of_power = 0.5 * ((1 + c) * tau * x) ** 2 - (1 + c) * tau
    found = Windham(ISM(), c)(Energy(scale, {"tau": tau}, x), KEY)
    np.testing.assert_allclose(found, w / w.mean() * of_power, rtol=1e-5)
