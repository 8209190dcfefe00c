"""Objectives that are quadratic in the parameters: what is recognised, and the solutions against closed forms."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from models import FAST_COMPILE, counted_compilations, improper
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoDelta

from numpyro_score import (
    DSM,
    ESM,
    FSM,
    ISM,
    SSM,
    ClosedFormError,
    GradientSpread,
    KLContraction,
    QuadraticLoss,
    ScoreMatching,
    generalized_bayes,
    sparse_path,
)
from numpyro_score._dependence import is_constant, is_quadratic
from numpyro_score.losses import total_loss


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The functions compiled here run once or twice on little data."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
A = jnp.array([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0], [2.0, 0.3, 1.0]])


# -- what is recognised ---------------------------------------------------------------------------------


@jax.custom_jvp
def doubled(t):
    return 2 * t


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


@jax.custom_vjp
def callback_square(t):
    """A square whose gradient comes from Python, without a derivative of its own."""
    return jnp.sum(t**2)


callback_square.defvjp(
    lambda t: (jnp.sum(t**2), t),
    lambda t, g: (g * jax.pure_callback(lambda v: 2 * np.asarray(v), t, t),),
)

FUNCTIONS = {
    "square": (lambda t: jnp.sum((A @ t) ** 2) + t.sum(), True),
    "einsum": (lambda t: jnp.einsum("i,ij,j", t, A, t), True),
    "scan": (lambda t: lax.scan(lambda c, a: (c + a @ t, (a @ t) ** 2), 0.0, A)[1].sum(), True),
    "for loop": (lambda t: lax.fori_loop(0, 2, lambda i, c: c + (A[i] @ t) ** 2, 0.0), True),
    "batched map": (lambda t: lax.map(lambda a: (a @ t) ** 2, A, batch_size=2).sum(), True),
    "checkpoint": (lambda t: jax.checkpoint(lambda t: jnp.sum((A @ t) ** 2))(t), True),
    "custom rule": (lambda t: jnp.sum(doubled(t) ** 2), True),
    "scatter": (lambda t: jnp.sum(jnp.zeros((3, 3)).at[jnp.arange(3), jnp.array([1, 0, 2])].set(t) ** 2), True),
    "constant predicate": (lambda t: lax.cond(A[0, 0] > 0, lambda t: jnp.sum(t**2), jnp.sum, t), True),
    "triangular solve": (lambda t: jnp.sum(jax.scipy.linalg.solve_triangular(A, t) ** 2), True),
    "gradient from Python": (callback_square, False),
    "cube": (lambda t: jnp.sum(t**3), False),
    "growing product": (lambda t: lax.scan(lambda c, a: (c * (a @ t), None), 1.0, A)[0], False),
    "absolute value": (lambda t: jnp.abs(t).sum(), False),
    "relu": (lambda t: jax.nn.relu(t).sum(), False),
    "branches of t": (lambda t: jnp.where(t > 0, t**2, 2 * t**2).sum(), False),
    "cond on t": (lambda t: lax.cond(t[0] > 0, lambda t: jnp.sum(t**2), lambda t: jnp.sum(2 * t**2), t), False),
    "largest": (lambda t: t.max(), False),
    "sorted": (lambda t: jnp.sort(t)[0], False),
    "clipped": (lambda t: jnp.clip(t, 0.0, 1.0).sum(), False),
    "rounded": (lambda t: jnp.sum(jnp.floor(t) * t), False),
    "stopped": (lambda t: jnp.sum(lax.stop_gradient(t) * t), False),
    "counted": (lambda t: jnp.sum((t > 0).astype(float) * t), False),
    "exponential": (lambda t: jnp.exp(t).sum(), False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_quadratics_are_told_by_their_operations(name):
    """Those below that are quadratic are recognised, through control flow too, and nothing else is."""
    f, expected = FUNCTIONS[name]
    assert is_quadratic(f, jnp.ones(3)) == expected


def test_constants_are_told_by_their_operations():
    """A shape or a product with another array is no dependence; a comparison is one."""
    x = jnp.ones(3)
    assert is_constant(lambda t: (A @ x, jnp.zeros_like(t), t.shape[0]), x)
    assert not is_constant(lambda t: (A, (t > 0).sum()), x)


# -- fits of linear exponential families ------------------------------------------------------------------


ROWS, COLS = np.triu_indices(4, k=1)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 4)) @ (np.eye(4) + 0.3 * RNG.normal(size=(4, 4))) + 0.5


def pairwise(x, prior=None):
    """f = −½xᵀKx + b·x, with the diagonal of K positive, its couplings latent and b normal, of mean and sd `prior`."""
    d = x.shape[-1]
    rows, cols = np.triu_indices(d, k=1)
    diagonal = numpyro.param("diagonal", jnp.ones(d), constraint=constraints.positive)
    coupling = numpyro.sample("coupling", improper(len(rows)))
    b = numpyro.sample("b", improper(d) if prior is None else dist.Normal(*prior).expand([d]).to_event(1))
    k = jnp.diag(diagonal).at[rows, cols].set(coupling).at[cols, rows].set(coupling)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(d), obs=x)
        numpyro.factor("energy", -0.5 * jnp.einsum("...i,ij,...j", x, k, x) + x @ b)


def maximum_likelihood(x):
    k = np.linalg.inv(np.cov(x.T, bias=True))
    return {"diagonal": np.diag(k), "coupling": k[np.triu_indices(len(k), k=1)], "b": k @ x.mean(0)}


def run(sm, *args, **kwargs):
    return sm.run(KEY, *map(jnp.asarray, args), progress_bar=False, **kwargs)


def assert_sites_close(actual, expected, **tolerance):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        sm = ScoreMatching(pairwise)
        return sm, run(sm, X)


@pytest.mark.parametrize("d", [4, 20], ids=["all directions", "coloured Jacobian"])
def test_graphical_model_is_its_maximum_likelihood_estimate(small, d):
    """ISM's minimiser is the MLE [Hyvärinen 2005], to rounding; the objective there is −½N tr K."""
    x = X if d == 4 else RNG.normal(size=(200, 20)) @ (np.eye(20) + 0.1 * RNG.normal(size=(20, 20))) + 0.3
    fit = small[1] if d == 4 else run(ScoreMatching(pairwise), x)
    expected = maximum_likelihood(x)
    assert_sites_close(fit.estimates, expected, atol=1e-10)
    np.testing.assert_allclose(fit.losses, [-0.5 * len(x) * expected["diagonal"].sum()], rtol=1e-10)


def test_result_is_that_of_a_converged_optimiser():
    """Estimates, params, objective and covariance of gradient descent, on a positive site: no Jacobian enters."""

    def prior():
        return dist.HalfNormal(0.2).expand([2]).to_event(1)

    sm = ScoreMatching(location)
    fit = run(sm, Y, prior=prior)
    slow = run(ScoreMatching(location, optim=optax.sgd(0.05), num_steps=300), Y, prior=prior)
    assert_sites_close(fit.estimates, slow.estimates, rtol=1e-5)
    assert_sites_close(fit.params, slow.params, rtol=1e-5)
    np.testing.assert_allclose(fit.losses[-1], slow.losses[-1], rtol=1e-8)
    np.testing.assert_allclose(fit.covariance(), slow.covariance(), rtol=1e-4)
    np.testing.assert_allclose(sm.evaluate(fit.state, jnp.asarray(Y), prior=prior), fit.losses[0], rtol=1e-10)
    again = run(sm, Y, prior=prior, init_state=fit.state, num_steps=3)
    assert_sites_close(again.estimates, fit.estimates, rtol=1e-12)
    assert len(again.losses) == 1


def test_second_fit_compiles_nothing(small):
    """New data of the same shape are inputs of the compiled functions."""
    with counted_compilations() as found:
        fit = run(small[0], 2 * X)
    assert not found
    assert_sites_close(fit.estimates, maximum_likelihood(2 * X), atol=1e-10)


def location(x, prior=lambda: improper(2), batch=None):
    """N(μ, I) with a prior made inside the model, as users do: NumPyro then validates its values."""
    mu = numpyro.sample("mu", prior())
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x = numpyro.sample("x", improper(2), obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))


Y = X[:50, :2]
TOTAL = Y.sum(0)
COVARIANCE = np.array([[0.4, 0.1], [0.1, 0.2]])


def priors():
    """Priors and, as the objective is ½Σ‖x − μ‖² less the log prior, the MAP."""
    return {
        "Normal": (lambda: dist.Normal(jnp.array([1.0, -1.0]), 0.2).to_event(1), (TOTAL + 25 * np.array([1, -1])) / 75),
        "MultivariateNormal": (
            lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.asarray(COVARIANCE)),
            np.linalg.solve(50 * np.eye(2) + np.linalg.inv(COVARIANCE), TOTAL),
        ),
        "HalfNormal": (lambda: dist.HalfNormal(0.5).expand([2]).to_event(1), TOTAL / 54),
        "Exponential": (lambda: dist.Exponential(3.0).expand([2]).to_event(1), (TOTAL - 3) / 50),
        "Uniform": (lambda: dist.Uniform(-1.0, 2.0).expand([2]).to_event(1), TOTAL / 50),
    }


@pytest.mark.parametrize("name", priors())
def test_priors_make_it_a_ridge(name):
    """The MAP in the constrained space: of each prior what its formula says, on 50 rows of mean (½, ½) or so."""
    prior, expected = priors()[name]
    fit = run(ScoreMatching(location), Y, prior=prior)
    assert len(fit.losses) == 1
    np.testing.assert_allclose(fit.estimates["mu"], expected, rtol=1e-10)


LOSSES = {
    "ISM": (ISM(), True),
    "SSM": (SSM(projection="gaussian"), True),
    "plain SSM": (SSM(variance_reduced=False), True),
    "DSM": (DSM(0.3), True),
    "plain DSM": (DSM(0.3, control_variate=False), True),
    "FSM": (FSM(), True),
    "KLContraction": (KLContraction(0.5), False),
}


def quartic(x):
    """f = −a x⁴ − ½b x², one variable."""
    a, b = numpyro.param("a", 0.1), numpyro.param("b", 0.1)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * b * x**2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_one_draw_of_their_random_numbers(name):
    """Those quadratic in the energy are solved, at the random numbers of the fit's key, which the sandwich takes too.

    Newton's step from the estimates by central differences of the same loss is nothing beside a standard error.
    """
    loss, quadratic = LOSSES[name]
    fit = run(ScoreMatching(quartic, loss=loss, num_steps=2), X[:, 0])
    assert len(fit.losses) == (1 if quadratic else 2)
    if not quadratic:
        return
    theta = np.array([fit.estimates["a"], fit.estimates["b"]])
    total = jax.jit(
        lambda t: total_loss(loss, fit.energy.with_params({"a": t[0], "b": t[1]}), fit.state.rng_key),
        compiler_options=FAST_COMPILE,
    )
    errors = np.array([fit.stderr()["a"], fit.stderr()["b"]])
    steps = [total(theta + e) - total(theta - e) for e in np.diag(errors)]
    curvature = [total(theta + e) + total(theta - e) - 2 * total(theta) for e in np.diag(errors)]
    np.testing.assert_array_less(np.abs(steps), 1e-6 * np.array(curvature))


# -- what is left to the optimiser --------------------------------------------------------------------------


def observed(x):
    """The data have a density of their own, of unknown mean, times a factor."""
    mu = numpyro.param("mu", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.Normal(mu, 0.5).to_event(1), obs=x)
        numpyro.factor("tails", -jnp.sum(x**4, axis=-1))


def test_observed_site_with_a_density_of_its_own():
    """s = −4(x − μ) − 4x³: the mean of ½‖s‖² is least at μ̂ = mean(x + x³)."""
    fit = run(ScoreMatching(observed), Y)
    np.testing.assert_allclose(fit.estimates["mu"], np.mean(Y + Y**3, axis=0), rtol=1e-10)


def scaled(x):
    """A precision that the data want negative in one coordinate, as x⁴ tails outweigh it."""
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", jnp.sum(-0.5 * tau * x**2 - x**4, axis=-1))


def on_simplex(x):
    w = numpyro.param("w", jnp.ones(2) / 2, constraint=constraints.simplex)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - w) ** 2, axis=-1))


def laplace(loc=0.0, scale=1.0):
    return dist.Laplace(loc, scale).expand([2]).to_event(1)


def cases():
    return {
        "violated constraint": (ScoreMatching(scaled), (2 * Y,), {}),
        "subsampled plate": (ScoreMatching(location), (Y,), {"batch": 10}),
        "Laplace prior": (
            ScoreMatching(location),
            (Y,),
            {"prior": lambda: dist.Laplace(0.0, 1.0).expand([2]).to_event(1)},
        ),
        "optimiser given": (ScoreMatching(location, optim=optax.adam(0.01)), (Y,), {}),
        "guide given": (ScoreMatching(location, AutoDelta), (Y,), {}),
        "simplex": (ScoreMatching(on_simplex), (Y,), {}),
    }


@pytest.mark.parametrize("name", cases())
def test_everything_else_takes_steps(name):
    """As many losses as steps, and no number from a linear solve that does not apply."""
    sm, args, kwargs = cases()[name]
    assert len(run(sm, *args, num_steps=3, **kwargs).losses) == 3


def test_flat_objective_is_said_to_be_flat():
    """Two parameters of which the data see the sum: the optimiser finds one of many minima, and that is said."""

    def model(x):
        a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
        c = numpyro.param("c", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -0.5 * jnp.sum((x - c) ** 2, axis=-1) + (a + b) * x[:, 0])

    with pytest.warns(UserWarning, match="do not determine site 'a' and 'b': .* The optimiser finds one of many"):
        fit = run(ScoreMatching(model), Y, num_steps=3)
    assert len(fit.losses) == 3


def test_wrong_derivative_rule_is_noticed():
    """A rule that hides a cube: the operations look quadratic, and the values a unit of score away do not."""

    @jax.custom_jvp
    def cube(t):
        return t**3

    cube.defjvp(lambda primals, tangents: (primals[0] ** 3, tangents[0]))

    def model(x):
        a = numpyro.param("a", 0.5)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", cube(a) * x[:, 0] - jnp.sum(x**2, axis=-1))

    assert len(run(ScoreMatching(model), Y, num_steps=3).losses) == 3


def test_single_precision_on_badly_scaled_data():
    """Columns a thousandfold apart in float32: estimates within 1e-3 of their standard errors' scale."""
    with jax.enable_x64(False):
        x = (X * np.array([1e-2, 1.0, 1e1, 3.0])).astype(np.float32)
        fit = run(ScoreMatching(pairwise), x)
    expected = maximum_likelihood(x.astype(np.float64))
    scale = {"diagonal": expected["diagonal"], "b": np.sqrt(expected["diagonal"])}
    scale["coupling"] = np.sqrt(np.outer(scale["b"], scale["b"])[ROWS, COLS]) ** 2
    for name, value in expected.items():
        np.testing.assert_array_less(np.abs(fit.estimates[name] - value) / scale[name], 1e-3)


def test_bad_data_are_refused_as_before():
    """NaN in the data is an error, not a solution."""
    with pytest.raises(ValueError, match=r"NaN or infinity in row 3 \(1 of 240\)"):
        run(ScoreMatching(pairwise), jnp.asarray(X).at[3, 0].set(jnp.nan))


# -- sums over batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches():
    """Three batches of the rows of `small`, with a prior on b: the target, the sum, and the whole fit."""
    with jax.enable_x64(True):
        prior = (0.3, 0.05)
        target = generalized_bayes(pairwise, ISM(), 0.7)
        total = sum(QuadraticLoss.of(target, KEY, jnp.asarray(x), prior=prior) for x in np.split(X, 3))
        return target, prior, total, run(ScoreMatching(pairwise, learning_rate=0.7), X, prior=prior)


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
    parts = [GradientSpread.of(target, estimates, KEY, jnp.asarray(x), prior=prior) for x in np.split(X, 3)]
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
    x = RNG.normal(size=(60, d))
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
    other = QuadraticLoss.of(target, KEY, jnp.asarray(X[:80]), prior=(0.0, 1.0))
    with pytest.raises(ValueError, match="differ in their parameters or priors"):
        total + other
    with pytest.raises(ValueError, match="leave subsample_size out"):
        QuadraticLoss.of(generalized_bayes(location, ISM()), KEY, y, batch=10)
    with pytest.raises(ValueError, match="NaN or infinity in row 0"):
        QuadraticLoss.of(target, KEY, jnp.asarray(X[:80]).at[0, 0].set(jnp.nan), prior=prior)
    with pytest.raises(ValueError, match="at least two"):
        GradientSpread(np.eye(2), np.zeros(2), 1).covariance()


# -- sparse paths --------------------------------------------------------------------------------------------


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


def test_penalties_are_the_inverse_scales(sparse):
    """Of the couplings, which come between b and the diagonal; and the objective is the log posterior's."""
    _, quadratic, _ = sparse
    np.testing.assert_allclose(quadratic.penalties, np.r_[np.zeros(4), 1 / SCALES, np.zeros(4)])
    theta = RNG.normal(size=14) ** 2
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


def test_what_has_no_sparse_path(sparse, batches):
    """No Laplace prior, one off centre or whose scale is unknown, a penalty off the path, a missing extra."""
    _, quadratic, path = sparse
    y = jnp.asarray(Y)
    with pytest.raises(ClosedFormError, match="'coupling' has a Laplace prior"):
        quadratic.solve()
    with pytest.raises(ValueError, match="no Laplace prior"):
        sparse_path(batches[2])
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


def test_batches_of_different_rates_are_refused(batches):
    """β multiplies the losses, and is one for all rows."""
    with pytest.raises(ValueError, match="different learning rates"):
        batches[2] + dataclasses.replace(batches[2], learning_rate=0.5)


def test_missing_extra_is_named(sparse, monkeypatch):
    """Without scikit-learn the message says how to get it."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"numpyro-score\[sparse\]"):
        sparse_path(sparse[1])
