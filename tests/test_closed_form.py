"""Objectives that are quadratic in the parameters: what is recognised, and the solutions against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from models import FAST_COMPILE, assert_sites_close, counted_compilations, improper
from numpyro.infer.autoguide import AutoDelta
from quadratics import (
    COLS,
    ROWS,
    X,
    Y,
    laplace,
    location,
    maximum_likelihood,
    on_simplex,
    pairwise,
    run,
)

from numpyro_score import (
    DSM,
    FSM,
    SSM,
    KLContraction,
    ScoreMatching,
)
from numpyro_score.energy import is_constant, is_quadratic
from numpyro_score.losses import total_loss

pytestmark = pytest.mark.usefixtures("x64")

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


@pytest.fixture(scope="module")
def small():
    with jax.enable_x64(True):
        sm = ScoreMatching(pairwise)
        return sm, run(sm, X)


@pytest.mark.slow
@pytest.mark.parametrize("d", [4, 20], ids=["all directions", "coloured Jacobian"])
def test_graphical_model_is_its_maximum_likelihood_estimate(small, d):
    """ISM's minimiser is the MLE [Hyvärinen 2005], to rounding; the objective there is −½N tr K."""
    if d == 4:
        x, fit = X, small[1]
    else:
        rng = np.random.default_rng(1)
        x = rng.normal(size=(200, d)) @ (np.eye(d) + 0.1 * rng.normal(size=(d, d))) + 0.3
        fit = run(ScoreMatching(pairwise), x)
    expected = maximum_likelihood(x)
    assert_sites_close(fit.estimates, expected, atol=1e-10)
    np.testing.assert_allclose(fit.losses, [-0.5 * len(x) * expected["diagonal"].sum()], rtol=1e-10)


@pytest.mark.slow
def test_result_is_that_of_a_converged_optimiser():
    """Estimates, params, objective and covariance of gradient descent, on a positive site: no Jacobian enters."""

    def prior():
        return dist.HalfNormal(0.2).expand([2]).to_event(1)

    sm = ScoreMatching(location)
    fit = run(sm, Y, prior=prior)
    slow = run(ScoreMatching(location, optim=optax.sgd(0.05), num_steps=300), Y, prior=prior)
    assert len(slow.losses) == 300  # as an optimiser was given
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


TOTAL = Y.sum(0)
COVARIANCE = np.array([[0.4, 0.1], [0.1, 0.2]])


PRIORS = {  # and, as the objective is ½Σ‖x − μ‖² less the log prior, the MAP
    "Normal": (lambda: dist.Normal(jnp.array([1.0, -1.0]), 0.2).to_event(1), (TOTAL + 25 * np.array([1, -1])) / 75),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.asarray(COVARIANCE)),
        np.linalg.solve(50 * np.eye(2) + np.linalg.inv(COVARIANCE), TOTAL),
    ),
    "HalfNormal": (lambda: dist.HalfNormal(0.5).expand([2]).to_event(1), TOTAL / 54),
    "Exponential": (lambda: dist.Exponential(3.0).expand([2]).to_event(1), (TOTAL - 3) / 50),
    "Uniform": (lambda: dist.Uniform(-1.0, 2.0).expand([2]).to_event(1), TOTAL / 50),
}


def location_by_prior(x):
    """Two columns beside each other for each prior."""
    mu = jnp.concatenate([numpyro.sample(name, prior()) for name, (prior, _) in PRIORS.items()])
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(len(mu)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, axis=-1))


@pytest.mark.slow
def test_priors_make_it_a_ridge():
    """The MAP in the constrained space: of each prior what its formula says, on 50 rows of mean (½, ½) or so."""
    fit = run(ScoreMatching(location_by_prior), np.tile(Y, len(PRIORS)))
    assert len(fit.losses) == 1
    assert_sites_close(fit.estimates, {name: expected for name, (_, expected) in PRIORS.items()}, rtol=1e-10)


LOSSES = {
    "SSM": (SSM(projection="gaussian"), True),
    "DSM": (DSM(0.3), True),
    "FSM": (FSM(), True),
    "KLContraction": (KLContraction(0.5), False),
}


def quartic(x):
    """f = −a x⁴ − ½b x², one variable."""
    a, b = numpyro.param("a", 0.1), numpyro.param("b", 0.1)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(), obs=x)
        numpyro.factor("energy", -a * x**4 - 0.5 * b * x**2)


@pytest.mark.slow
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


def cases():
    return {
        "subsampled plate": (ScoreMatching(location), (Y,), {"batch": 10}),
        "Laplace prior": (ScoreMatching(location), (Y,), {"prior": laplace}),
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


@pytest.mark.slow
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
    x = X.copy()
    x[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in row 3 \(1 of 240\)"):
        run(ScoreMatching(pairwise), x)
