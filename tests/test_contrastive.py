"""Contrastive divergence, with chains from the data and with kept ones, against closed forms.

Random comparisons allow 5 standard errors, in float64.
"""

import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import FAST_COMPILE, Langevin, assert_mean, energy_of, improper
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from numpyro.infer.util import log_density

from numpyro_score import (
    CD,
    ISM,
    NCE,
    PCD,
    Energy,
    NonFiniteLossError,
    ScoreMatching,
    audit,
    generalized_bayes,
    score_factor,
)
from numpyro_score.generalized import prior_model
from numpyro_score.losses import CHAINS_SITE, LOG_PARTITION_SITE, row_losses
from numpyro_score.uncertainty import SandwichError

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
D = 2


def isotropic(a, x):
    return -0.5 * a * jnp.sum(x**2, -1)


def quartic(a, x):
    return -a * jnp.sum(x**4, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def slopes(loss, f, theta, x):
    """The derivative of each row's value in a scalar parameter."""
    return jax.jacfwd(lambda t: loss(energy_of(f, t, x), jax.random.key(0)))(theta)


# -- the gradient of CD ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
def test_slope_of_unadjusted_chains(num_steps):
    """For f = -½a‖x‖² x̃ given x is N(ρᵏx, s), ρ = 1 - ha, s = 2h Σ ρ²ⁱ, and the slope is ½(‖x‖² - ‖x̃‖²).

    At a = 0 this is -hkD on average, whatever the rows: chains that spread push a up.
    """
    h, row = 0.3, np.array([0.7, -1.2])
    loss = CD(num_steps, kernel=Langevin(h, adjusted=False))
    for a in (0.0, 1.3):
        rho = 1 - h * a
        spread = 2 * h * sum(rho ** (2 * i) for i in range(num_steps))
        expected = 0.5 * (row @ row - (rho ** (2 * num_steps) * row @ row + D * spread))
        if a == 0:
            np.testing.assert_allclose(expected, -h * num_steps * D)
        assert_mean(slopes(loss, isotropic, a, np.tile(row, (40_000, 1))), expected)


def test_slope_is_zero_at_the_true_parameter():
    """Exact chains leave exact data of exp(-θx⁴) as they are; off the truth the slope has the sign to go back."""
    theta, loss = 0.8, CD(5, kernel=Langevin(0.1))
    x = (RNG.gamma(0.25, size=40_000) / theta) ** 0.25 * RNG.choice([-1.0, 1.0], 40_000)
    assert_mean(slopes(loss, quartic, theta, x[:, None]), 0.0)
    for wrong, sign in ((0.7 * theta, -1), (1.4 * theta, 1)):
        found = sign * np.asarray(slopes(loss, quartic, wrong, x[:, None]))
        assert found.mean() > 10 * found.std() / len(found) ** 0.5


def test_long_exact_chains_give_the_likelihood_gradient():
    """After 50 steps of MALA x̃ is a draw of N(0, 1/a): the slope is that of -log p, ½x² - 1/(2a)."""
    a, x = 1.7, RNG.laplace(size=(40_000, 1))
    found = slopes(CD(50, kernel=Langevin(0.5)), isotropic, a, x)
    assert_mean(found - 0.5 * x[:, 0] ** 2, -0.5 / a)


def closing_over(theta):
    """A model that holds its parameter itself."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", quartic(theta, numpyro.sample("x", improper(D), obs=x)))

    return model


def test_no_gradient_passes_through_chains():
    """The slope is f(x) - f(x̃) over θ, with x̃ from the value; also where the model closes over the parameter."""
    theta, x, loss = 0.6, RNG.normal(size=(5, D)), CD(3, kernel=Langevin(0.05, adjusted=False))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def of(theta):
        declared = jax.value_and_grad(lambda t: loss(energy_of(quartic, t, x), KEY).sum())(theta)
        return declared, jax.grad(lambda t: loss(Energy(closing_over(t), {}, x), KEY).sum())(theta)

    (value, slope), held = of(theta)
    np.testing.assert_allclose(slope, value / theta, rtol=1e-10)  # f is linear in θ
    np.testing.assert_allclose(held, slope, rtol=1e-10)


def test_cost_is_one_gradient_a_step():
    """k unadjusted steps cost k gradients in x on top of the two densities and their gradient in θ, and no more."""
    theta, x = [RNG.normal(size=(s, 64)) for s in (8, 64, 64)], RNG.normal(size=(128, 8))

    def f(theta, x):
        for w in theta:
            x = jnp.tanh(x @ w)
        return x.sum(-1)

    def flops(g, *args):
        return jax.jit(g).lower(*args).compile().cost_analysis()["flops"]

    def total(k):
        loss = CD(k, kernel=Langevin(0.1, adjusted=False))
        return flops(jax.grad(lambda t: loss(energy_of(f, t, x), KEY).sum()), theta)

    score = flops(jax.grad(lambda x: f(theta, x).sum()), x)
    rest = flops(jax.grad(lambda t, y: (f(t, y) - f(t, x)).sum()), theta, x + 1)
    noise = 0.03 * score
    one, two = total(1), total(2)
    assert abs(one - score - rest) < noise + 0.02 * rest
    assert abs(two - one - score) < 2 * noise


# -- kept chains -------------------------------------------------------------------------------------


def linear(k, x):
    return -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x)


def test_value_and_derivatives_of_pcd():
    """With chains y: mean f(y) - f(x); in K its gradient is that of the mean, its Hessian cov(∇f) over the chains."""
    k, x, y = np.array([[1.5, 0.4], [0.4, 0.8]]), RNG.normal(size=(3, D)), RNG.normal(size=(50, D))
    loss = PCD(50, kernel=Langevin(0.1))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def of(k):
        def values(k):
            return loss(energy_of(linear, k, x).with_params({CHAINS_SITE: {"x": y}}), KEY)

        return values(k), jax.jacrev(values)(k), jax.hessian(lambda k: values(k)[0])(k)

    value, gradient, hessian = of(k)
    of_y, of_x = (-0.5 * np.einsum("ni,nj->nij", z, z) for z in (y, x))
    np.testing.assert_allclose(value, np.sum(k * (of_y.mean(0) - of_x), (1, 2)), rtol=1e-12)
    np.testing.assert_allclose(gradient, of_y.mean(0) - of_x, rtol=1e-10)
    covariance = np.cov(of_y.reshape(50, -1), rowvar=False, bias=True)
    np.testing.assert_allclose(hessian.reshape(4, 4), covariance, rtol=1e-10, atol=1e-12)


def precision(x, batch=None):
    """N(0, K⁻¹) in two dimensions, by three numbers."""
    diagonal = numpyro.param("diagonal", jnp.ones(2), constraint=constraints.positive)
    off = numpyro.param("off", 0.0)
    k = jnp.diag(diagonal) + off * jnp.array([[0.0, 1.0], [1.0, 0.0]])
    known = ~jnp.isnan(x).any(-1) if batch is None else True
    with numpyro.plate("rows", len(x), subsample_size=batch), handlers.mask(mask=known):
        x = numpyro.sample("x", improper(D), obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", linear(k, x))


# Not normal: the squares spread more than the model says, and standard errors are more than the Fisher information's.
ROOT = np.linalg.cholesky(np.linalg.inv([[1.5, 0.4], [0.4, 0.8]]))
ROWS = RNG.laplace(scale=0.5**0.5, size=(2000, 2)) @ ROOT.T
ADAM = optax.adam(optax.cosine_decay_schedule(0.05, 800))


@functools.cache
def pcd_fit():
    """Minibatches of 100 rows, 1,000 chains."""
    sm = ScoreMatching(precision, optim=ADAM, loss=PCD(1000, 2, kernel=Langevin(0.5)), num_steps=800)
    return sm.run(KEY, jnp.asarray(ROWS), batch=100, progress_bar=False)


@pytest.mark.slow
def test_pcd_recovers_a_precision():
    """Within 3 standard errors of the maximum likelihood estimate, and with its standard errors.

    In one dimension of K = S⁻¹ the sandwich follows from K̂ - K = -K (Ŝ - S) K. The Hessian is a covariance of squares
    over 20,000 draws ten steps apart: their fourth moments give 4% of Monte Carlo error in a standard error.
    """
    fit = pcd_fit()
    k = np.linalg.inv(ROWS.T @ ROWS / len(ROWS))
    influence = -np.einsum("ij,nj,nk,kl->nil", k, ROWS, ROWS, k)
    errors = influence.std(0, ddof=1) / len(ROWS) ** 0.5
    assert (np.diag(errors) > 1.3 * np.diag(k) * (2 / len(ROWS)) ** 0.5).all()  # those of a right model
    found = fit.stderr()
    np.testing.assert_allclose(found["diagonal"], np.diag(errors), rtol=0.2)
    np.testing.assert_allclose(found["off"], errors[0, 1], rtol=0.2)
    assert (np.abs(fit.estimates["diagonal"] - np.diag(k)) < 3 * found["diagonal"]).all()
    assert abs(fit.estimates["off"] - k[0, 1]) < 3 * found["off"]
    assert fit.state.mutable_state[CHAINS_SITE]["x"].shape == (1000, D)
    assert np.isfinite(jax.jit(lambda energy: row_losses(fit.svi.score_loss, energy, KEY)[0])(fit.energy)).all()
    # SVI's own `evaluate` would forget the chains and start new ones at the rows.
    assert abs(jax.jit(fit.svi.evaluate)(fit.state, jnp.asarray(ROWS))) < 0.2 * len(ROWS)


def one_parameter(x):
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", isotropic(a, numpyro.sample("x", improper(1), obs=x)))


def test_saved_chains_go_on():
    """Ten steps, a pickled state and ten steps more are twenty steps."""
    key = jax.random.PRNGKey(3)  # typed keys cannot be pickled
    sm = ScoreMatching(precision, optim=optax.adam(0.01), loss=PCD(20, kernel=Langevin(0.3), restart=0.1))
    x = jnp.asarray(ROWS[:50])
    whole = sm.run(key, x, num_steps=20, progress_bar=False)
    half = sm.run(key, x, num_steps=10, progress_bar=False)
    saved = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get(half.state))))
    rest = sm.run(key, x, num_steps=10, init_state=saved, progress_bar=False)
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)
    np.testing.assert_array_equal(np.concatenate([half.losses, rest.losses]), whole.losses)


def test_slots_and_restarts():
    """Chains start at the rows that count, in turn; each stays in its slot, but for the share that starts anew."""
    x = RNG.normal(size=(40, D))
    x[[3, 17]] = np.nan
    kept = ~np.isnan(x).any(-1)
    energy = Energy(precision, {"diagonal": jnp.ones(2), "off": 0.0}, x)
    still, moving = (PCD(5000, kernel=Langevin(1e-10), restart=r) for r in (0.0, 0.3))
    with handlers.trace() as trace:
        still.declare(energy)
    start = trace[CHAINS_SITE]["value"]
    np.testing.assert_array_equal(start["x"], x[kept][np.arange(5000) % 38])

    y = RNG.normal(size=(5000, D))
    energy = energy.with_params({CHAINS_SITE: {"x": y}})
    (same,), (new,) = (jax.jit(v.advance)(energy, KEY).values() for v in (still, moving))
    assert 0 < np.abs(same["x"] - y).max() < 1e-3
    assert set(np.abs(new["x"] - y).max(-1) < 1e-3) == {True, False}
    restarted = np.abs(new["x"] - y).max(-1) > 1e-3
    assert_mean(restarted, 0.3)
    distances = np.abs(np.asarray(new["x"])[restarted][:, None] - x[kept]).max(-1)
    assert (distances.min(-1) < 1e-3).all()
    counts = np.bincount(distances.argmin(-1), minlength=38)
    assert np.sum((counts - counts.mean()) ** 2 / counts.mean()) < 95  # χ² of 37 degrees exceeds it in 7e-7 of draws


# -- in models ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [CD(2, kernel=Langevin(0.3)), PCD(70, kernel=Langevin(0.3)), NCE(dist.Normal(0, 2).expand([D]).to_event(1))],
    ids=["CD", "PCD", "NCE"],
)
def test_minibatches_are_unbiased(loss):
    """The gradient of 10 rows out of 40, weighted, is on average that of all."""
    own = {
        CHAINS_SITE: {"x": jnp.asarray(RNG.normal(size=(70, D)))},
        LOG_PARTITION_SITE: jnp.array(0.4),
        "diagonal": jnp.array([1.2, 0.7]),
    }
    model = generalized_bayes(precision, loss)

    def gradient(key, batch):
        def of(off):
            values = {**own, CHAINS_SITE: dict(own[CHAINS_SITE]), "off": off}
            return log_density(handlers.seed(model, key), (jnp.asarray(ROWS[:40]),), {"batch": batch}, values)[0]

        return jax.grad(of)(0.2)

    keys = jax.random.split(KEY, 4000)
    batches, whole = (
        jax.jit(jax.vmap(functools.partial(gradient, batch=b)), compiler_options=FAST_COMPILE)(keys) for b in (10, None)
    )
    assert np.std(batches) > 1.2 * np.std(whole)
    assert_mean(batches - np.mean(whole), 0.0, errors=5 * (1 + np.var(whole) / np.var(batches)) ** 0.5)


def mean_model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 0.5))
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", -0.5 * (numpyro.sample("x", improper(), obs=x) - mu) ** 2)


@pytest.mark.slow
def test_pcd_under_numpyros_own_svi():
    """A point guide is at the mode of the ordinary posterior, Σx / (4 + N)."""
    x, loss = 1.0 + RNG.normal(size=50), PCD(1000, 2, kernel=Langevin(0.5))
    svi = SVI(generalized_bayes(mean_model, loss), AutoDelta(prior_model(mean_model, loss=loss)), ADAM, Trace_ELBO())
    fit = svi.run(KEY, 800, jnp.asarray(x), progress_bar=False)
    # The chains' mean has an error of about 0.03, and averages over many steps.
    np.testing.assert_allclose(fit.params["mu_auto_loc"], x.sum() / 54, atol=0.03)
    assert abs(np.mean(fit.state.mutable_state[CHAINS_SITE]["x"]) - fit.params["mu_auto_loc"]) < 0.2


# -- what is refused ---------------------------------------------------------------------------------

KERNEL = Langevin(0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CD(0, kernel=KERNEL), ValueError, "CD needs a num_steps of at least 1, got 0"),
        (lambda: CD(2.5, kernel=KERNEL), TypeError, "CD needs an integer as num_steps, got 2.5"),
        (lambda: CD(kernel=Langevin), TypeError, r"CD got the class Langevin as kernel: write kernel=Langevin\(...\)"),
        (lambda: CD(kernel=0.1), TypeError, r"CD needs a kernel with a method chains\(log_density\), got 0.1"),
        (lambda: PCD(0, kernel=KERNEL), ValueError, "PCD needs a num_chains of at least 1, got 0"),
        (lambda: PCD(10, -1, kernel=KERNEL), ValueError, "PCD needs a num_steps of at least 1, got -1"),
        (lambda: PCD(kernel=KERNEL, restart=1.5), ValueError, "PCD needs a restart from 0 to 1.*got 1.5"),
        (lambda: PCD(kernel=KERNEL, restart=float("nan")), ValueError, "PCD needs a restart from 0 to 1.*got nan"),
        (lambda: PCD(kernel=KERNEL, restart="some"), TypeError, "PCD needs a number as restart, got 'some'"),
    ],
)
def test_settings(make, error, message, unchecked):
    with pytest.raises(error, match=message):
        make()


LOSSES = [CD(2, kernel=KERNEL), PCD(3, kernel=KERNEL)]


@pytest.mark.parametrize("loss", LOSSES, ids=["CD", "PCD"])
def test_models_without_chains(loss):
    """Scores without a density, bounded data, and for PCD densities that differ from row to row."""

    def scores(x):
        with numpyro.plate("rows", len(x)):
            score_factor("score", x, -x)

    def positive(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", -x)

    def regression(x, z):
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", -0.5 * (numpyro.sample("x", improper(), obs=x) - z) ** 2)

    with pytest.raises(TypeError, match="'score' is a score_factor, whose density is unknown"):
        loss(Energy(scores, {}, np.ones((4, 2))), KEY)
    with pytest.raises(NotImplementedError, match=f"{type(loss).__name__} would move the data off.*'x' .box."):
        loss(Energy(positive, {}, np.ones(4)), KEY)
    energy = Energy(regression, {}, np.ones(4), np.arange(4.0))
    if isinstance(loss, PCD):
        with pytest.raises(ValueError, match=r"PCD compares.*one density for all rows.*use CD or ISM"):
            loss(energy, KEY)
    else:
        assert jax.eval_shape(lambda: loss(energy, KEY)).shape == (4,)


@pytest.mark.parametrize("loss", [*LOSSES, NCE(dist.Normal(0.0, 2.0))], ids=["CD", "PCD", "NCE"])
def test_no_posterior(loss):
    """MCMC and Laplace approximations ask for a density of the parameters, which these losses do not have."""
    x, model, name = jnp.ones(4), generalized_bayes(mean_model, loss), type(loss).__name__
    mcmc = MCMC(NUTS(model), num_warmup=1, num_samples=1, num_chains=2, chain_method="vectorized", progress_bar=False)
    with pytest.raises(NotImplementedError, match=f"{name} gives no posterior density, as .*: use ISM or SSM for MCMC"):
        mcmc.run(KEY, x)
    with pytest.raises(NotImplementedError, match=f"{name} gives no posterior density.*build the autoguide"):
        SVI(model, AutoLaplaceApproximation(model), ADAM, Trace_ELBO()).init(KEY, x)
    with pytest.raises(NotImplementedError, match=f"AutoLaplaceApproximation needs a density.*{name}"):
        ScoreMatching(mean_model, AutoLaplaceApproximation, loss=loss)


def test_no_line_search():
    """The value of CD is no objective."""
    sm = ScoreMatching(one_parameter, optim=optax.lbfgs(), loss=LOSSES[0])
    with pytest.raises(NotImplementedError, match=r"searches along a line.*energy gap.*use optax.adam"):
        sm.run(KEY, jnp.ones((4, 1)), progress_bar=False)


def test_no_audit():
    """Values and gradients of a likelihood are not those of score matching."""
    with pytest.raises(ValueError, match="audit compares with exact score matching, and PCD estimates the likelihood"):
        audit(one_parameter, [ISM(), LOSSES[1]], jnp.ones((4, 1)))


def test_no_standard_errors_of_cd():
    """Derivatives of the gradient of CD leave out how the chains move: no number rather than a wrong one."""
    sm = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=CD(1, kernel=KERNEL), num_steps=1)
    fit = sm.run(KEY, jnp.asarray(RNG.normal(size=(20, 1))), progress_bar=False)
    for ask in (fit.stderr, fit.covariance, fit.influence, fit.calibrated_learning_rate):
        with pytest.raises(SandwichError, match=r"CD gives no standard errors.*go on from the estimates with PCD"):
            ask()
    with pytest.raises(SandwichError):
        fit.stderr(diagonal=True)


def convex(x):
    """exp(½a‖x‖²) has no normaliser."""
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.factor("energy", 0.5 * a * jnp.sum(numpyro.sample("x", improper(1), obs=x) ** 2, -1))


@pytest.mark.parametrize(
    ("model", "loss"),
    [(convex, PCD(num_steps=400, kernel=Langevin(10.0, adjusted=False))), (one_parameter, CD(kernel=Langevin(1e6)))],
    ids=["run away", "stuck"],
)
def test_chains_that_fail(model, loss):
    """Chains that run away to infinity, or whose proposals are all refused, stop the fit, with step and cause.

    CD and PCD share the chains; below CD's run away.
    """
    sm = ScoreMatching(model, optim=optax.adam(0.01), loss=loss, num_steps=5)
    with pytest.raises(NonFiniteLossError, match=r"at step 0: .*the chains have run away or are stuck") as error:
        sm.run(KEY, jnp.asarray(RNG.normal(size=(20, 1))), progress_bar=False)
    assert error.value.step == 0


@pytest.mark.parametrize("h", [3.0, 100.0])
def test_few_steps_that_run_away(h):
    """Five steps of −2 x or worse are far from overflow, but their gradient makes the density ever narrower."""
    sm = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=CD(5, kernel=Langevin(h, adjusted=False)))
    with pytest.raises(NonFiniteLossError, match="the chains have run away"):
        sm.run(KEY, jnp.asarray(2 * RNG.normal(size=(200, 1))), num_steps=500, progress_bar=False)


def test_state_with_another_number_of_chains():
    x = jnp.asarray(RNG.normal(size=(20, 1)))
    few, many = (
        ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=PCD(n, kernel=Langevin(0.1))) for n in (10, 30)
    )
    with pytest.raises(ValueError, match="The state has 10 chains, and PCD num_chains=30"):
        many.run(KEY, x, init_state=few.init(KEY, x), progress_bar=False)


def test_state_without_chains():
    """NumPyro would start new chains in every step, which is CD, without saying so."""
    x = jnp.asarray(RNG.normal(size=(20, 1)))
    state = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=ISM()).init(KEY, x)
    sm = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=LOSSES[1])
    with pytest.raises(ValueError, match=re.escape("init_state has no mutable_state, where PCD keeps its chains")):
        sm.run(KEY, x, init_state=state, progress_bar=False)


def test_state_with_the_chains_of_another_loss():
    x = jnp.asarray(RNG.normal(size=(20, 1)))
    state = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=LOSSES[1]).init(KEY, x)
    sm = ScoreMatching(one_parameter, optim=optax.adam(0.01), loss=ISM())
    with pytest.raises(ValueError, match=r"init_state has the mutable sites \[.+\], and this fit has \[\]"):
        sm.run(KEY, x, init_state=state, progress_bar=False)
