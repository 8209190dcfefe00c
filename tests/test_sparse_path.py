"""Sparse fits along a path of penalties, against the optimality conditions and coordinate descent."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import assert_sites_close, improper
from numpyro.distributions import constraints
from quadratics import COLS, KEY, ROWS, X, Y, laplace, location
from sklearn.metrics import roc_auc_score

from numpyro_score import ISM, ClosedFormError, QuadraticLoss, generalized_bayes, sparse_path

pytestmark = pytest.mark.usefixtures("x64")

SCALES = np.array([0.02, 0.05, 0.02, 0.1, 0.02, 0.02])


def sparse_pairwise(x):
    """`pairwise` with Laplace priors on the couplings, and a normal one on b."""
    k = numpyro.sample("coupling", dist.Laplace(0.0, jnp.asarray(SCALES)).to_event(1))
    diagonal = numpyro.param("diagonal", jnp.ones(4), constraint=constraints.positive)
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    matrix = jnp.diag(diagonal).at[ROWS, COLS].set(k).at[COLS, ROWS].set(k)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(4), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("...i,ij,...j", x, matrix, x) + x @ b)


def hyvarinen_score(values, x):
    """Σ_n ½‖b − Kx_n‖² − N tr K."""
    k = np.diag(values["diagonal"]).astype(float)
    k[ROWS, COLS] = k[COLS, ROWS] = values["coupling"]
    return 0.5 * np.sum((values["b"] - x @ k) ** 2) - len(x) * np.trace(k)


def descend(quadratic, penalty, sweeps=3000):
    """Coordinate descent, one coordinate at a time: slow and obvious."""
    gamma, g, w = quadratic.total.hessian, quadratic.total.linear, penalty * quadratic.penalties
    theta = np.zeros(len(g))
    for _ in range(sweeps):
        for j in range(len(g)):
            pull = gamma[j, j] * theta[j] - gamma[j] @ theta - g[j]
            theta[j] = np.sign(pull) * max(abs(pull) - w[j], 0.0) / gamma[j, j]
    return theta


@pytest.fixture(scope="module")
def sparse():
    with jax.enable_x64(True):
        target = generalized_bayes(sparse_pairwise, ISM())
        quadratic = QuadraticLoss.of(target, KEY, jnp.asarray(X[:160]))
        return target, quadratic, sparse_path(quadratic, smallest=0.0)


@pytest.mark.slow
def test_penalties_are_the_inverse_scales(sparse):
    """Of the couplings, which come between b and the diagonal; and the objective is the log posterior's."""
    _, quadratic, _ = sparse
    np.testing.assert_allclose(quadratic.penalties, np.r_[np.zeros(4), 1 / SCALES, np.zeros(4)])
    theta = np.random.default_rng(1).normal(size=14) ** 2
    values = quadratic.coordinates.by_site(theta)
    expected = hyvarinen_score(values, X[:160])
    expected -= dist.Laplace(0.0, SCALES).log_prob(values["coupling"]).sum()
    expected -= dist.Normal(0.0, 1.0).log_prob(values["b"]).sum()
    np.testing.assert_allclose(quadratic.total(theta) + quadratic.penalties @ theta, expected, rtol=1e-12)


def test_path_meets_the_optimality_conditions(sparse):
    """−(Γθ + g)_j is λw_j sign θ_j where θ_j ≠ 0, at most λw_j in size where θ_j is exactly 0; between knots too."""
    _, quadratic, path = sparse
    largest = path.penalties[0]
    for penalty in [2 * largest, 0.999 * largest, *(largest * np.geomspace(0.9, 1e-3, 7)), 1.0, 0.0]:
        theta = path.vector(penalty)
        pull, allowed = -quadratic.total.gradient(theta), penalty * quadratic.penalties
        zero = (theta == 0) & (quadratic.penalties > 0)
        np.testing.assert_allclose(pull[~zero], (allowed * np.sign(theta))[~zero], atol=1e-8 * largest)
        assert (np.abs(pull[zero]) <= allowed[zero] * (1 + 1e-9) + 1e-9).all()
        assert zero.sum() == 6 if penalty > largest else zero.sum() < 6
    np.testing.assert_allclose(path.vector(0.0), -np.linalg.solve(quadratic.total.hessian, quadratic.total.linear))


def test_path_is_that_of_coordinate_descent(sparse):
    """At λ = 1, the MAP under the model's own priors, and at some other penalties."""
    _, quadratic, path = sparse
    for penalty in (1.0, 0.2 * path.penalties[0]):
        np.testing.assert_allclose(path.vector(penalty), descend(quadratic, penalty), atol=1e-9)
    end = sparse_path(quadratic)
    assert end.penalties[-1] == 1.0
    assert_sites_close(end.estimates(1.0), path.estimates(1.0), atol=1e-9)


def test_choice_is_the_best_held_out_score(sparse):
    """The held-out loss of the chosen knot, by the loss itself, is the least of all knots."""
    target, _, path = sparse
    chosen = path.choose(QuadraticLoss.of(target, KEY, jnp.asarray(X[160:])))
    scores = [hyvarinen_score(path.coordinates.by_site(v), X[160:]) for v in path.vectors]
    assert chosen == path.penalties[np.argmin(scores)]
    assert path.penalties[0] > chosen


def test_what_has_no_sparse_path(sparse):
    """No Laplace prior, one off centre or whose scale is unknown, a penalty off the path, a missing extra."""
    _, quadratic, path = sparse
    y = jnp.asarray(Y)
    with pytest.raises(ClosedFormError, match="'coupling' has a Laplace prior"):
        quadratic.solve()
    with pytest.raises(ValueError, match="no Laplace prior"):
        sparse_path(QuadraticLoss.of(generalized_bayes(location, ISM()), KEY, y))
    with pytest.raises(ValueError, match="at least 0"):
        sparse_path(quadratic, smallest=-1.0)
    with pytest.raises(ValueError, match="path ends at the penalty 0"):
        path.vector(-0.1)
    with pytest.raises(ClosedFormError, match="'mu' is not centred"):
        QuadraticLoss.of(generalized_bayes(location, ISM()), KEY, y, prior=lambda: laplace(0.5))

    def hierarchy(x):
        tau = numpyro.sample("tau", dist.Exponential(1.0))
        location(x, prior=lambda: laplace(scale=tau))

    with pytest.raises(ClosedFormError, match="log prior is not quadratic"):
        QuadraticLoss.of(generalized_bayes(hierarchy, ISM()), KEY, y)


def test_parameters_that_enter_together():
    """f = −½ Σ k_j x_j² has g = −N for every k_j: with equal scales k_j = (N − λ)⁺/Σ x_j², all from one knot on."""

    def model(x):
        k = numpyro.sample("k", dist.Laplace(0.0, 1.0).expand([4]).to_event(1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(4), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum(k * x**2, -1))

    x = X[:160]
    quadratic = QuadraticLoss.of(generalized_bayes(model, ISM()), KEY, jnp.asarray(x))
    for smallest in (10.0, 3.6, 0.1):  # a path ends where it was asked to, in the last digit too
        path = sparse_path(quadratic, smallest)
        for penalty in (200.0, 100.0, smallest):
            expected = max(160 - penalty, 0.0) / np.sum(x**2, 0)
            np.testing.assert_allclose(path.vector(penalty), expected, rtol=1e-6, atol=1e-12)


def test_missing_extra_is_named(sparse, monkeypatch):
    """Without scikit-learn the message says how to get it."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"numpyro-score\[sparse\]"):
        sparse_path(sparse[1])


def test_ebic(sparse):
    """2 Σ loss + k log N + 2γ log C(6, k) at the minimum on the selected alone, which the path has not to be at."""
    _, quadratic, path = sparse
    values, refit = path.ebic(1.0), []
    for chosen in path.selected:
        index = np.flatnonzero(chosen | (quadratic.penalties == 0))
        theta = np.zeros(len(chosen))
        part = np.ix_(index, index)
        theta[index] = np.linalg.solve(quadratic.total.hessian[part], -quadratic.total.linear[index])
        k = int(chosen.sum())
        refit.append(2 * quadratic.data(theta) + k * np.log(160) + 2 * np.log(math.comb(6, k)))
    np.testing.assert_allclose(values, refit, rtol=1e-9)
    assert path.choose(gamma=1.0) == path.penalties[np.argmin(values)]
    last = path.refit(path.penalties[-1])  # the path ends at λ = 0, where nothing is shrunk
    assert_sites_close(last, path.estimates(0.0), rtol=1e-6)
    assert (np.diff(path.ebic(0.0) - values) <= 1e-9).any()


def test_roc(sparse):
    """The area is that of scikit-learn with the penalty at which a parameter enters as its score."""
    _, _, path = sparse
    entry = np.array([0.5, 3.0, 1.0, 2.0, 0.0, 0.7])  # 0: never
    truth = np.array([0, 1, 0, 1, 1, 0])
    penalties = np.array([3.0, 2.0, 1.0, 0.7, 0.5])
    vectors = np.ones((5, len(path.vectors[0])))
    at = np.flatnonzero(path.quadratic.penalties)
    vectors[:, at] = entry >= penalties[:, None]
    curve = dataclasses.replace(path, penalties=penalties, vectors=vectors).roc({"coupling": truth})
    np.testing.assert_allclose(curve.true_positive_rate, [1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(curve.false_positive_rate, [0, 0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.area, roc_auc_score(truth, entry))
    with pytest.raises(ValueError, match="truth has parameters without a Laplace prior"):
        path.roc({"coupling": truth, "diagonal": np.ones(4)})
    with pytest.raises(ValueError, match=r"truth has 'coupling' of shape \(3,\)"):
        path.roc({"coupling": truth[:3]})
    with pytest.raises(ValueError, match="zero and some that are not"):
        path.roc({"coupling": np.ones(6)})


def test_automatic_end(sparse, unchecked):
    """The path ends at a ten-thousandth of its start, whatever the scales of the priors."""
    _, quadratic, _ = sparse
    path = sparse_path(quadratic, smallest="auto")
    np.testing.assert_allclose(path.penalties[-1] / path.penalties[0], 1e-4, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 0, or 'auto', got 'small'"):
        sparse_path(quadratic, smallest="small")
