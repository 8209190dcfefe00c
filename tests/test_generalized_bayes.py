"""The generalised model: its density by hand, and its posterior under NumPyro's inference, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import initialize_model, log_density
from scipy.stats import expon, norm

from numpyro_score import ISM, SSM, Energy, generalized_bayes
from numpyro_score.generalized import LOSS_SITE

N, SIGMA, PRIOR_MEAN, PRIOR_SD = 40, 1.7, 0.5, 2.0
KEY = jax.random.key(0)
FLAT = dist.ImproperUniform(constraints.real, (), ())
PLANE = dist.ImproperUniform(constraints.real_vector, (), (2,))
X = np.random.default_rng(0).normal(2.0, SIGMA, N).astype(np.float32)


def conjugate(x):
    """N(mu, σ²) with σ known. Its ISM loss is ½(x − μ)²/σ⁴ − 1/σ²."""
    mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mu) ** 2 / SIGMA**2)


def posterior(x, beta):
    """Mean and sd of mu: the data count β/σ² times as much as in the ordinary posterior."""
    precision = PRIOR_SD**-2 + beta * len(x) / SIGMA**4
    return (PRIOR_MEAN / PRIOR_SD**2 + beta * np.sum(x) / SIGMA**4) / precision, precision**-0.5


def hand_density(x, mu, beta):
    """Log prior − βΣ loss."""
    loss = 0.5 * (x - mu) ** 2 / SIGMA**4 - 1 / SIGMA**2
    return norm.logpdf(mu, PRIOR_MEAN, PRIOR_SD) - beta * np.sum(loss)


def assert_is_posterior(draws, mean, sd):
    """Mean and variance of draws (chains, n), each within 5 Monte Carlo standard errors: false alarms at 1e-6."""
    z = (np.asarray(draws) - mean) / sd
    for moment, expected in ((z, 0.0), (z**2, 1.0)):
        error = moment.std() / effective_sample_size(moment) ** 0.5
        assert 0 < error < 0.2
        assert abs(moment.mean() - expected) < 5 * error


def run_nuts(model, *args, chains=2):
    """Draws and potential energies (chains, n)."""
    mcmc = MCMC(
        NUTS(model),
        num_warmup=300,
        num_samples=1000,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), *args, extra_fields=("potential_energy",))
    return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)["potential_energy"]


# -- posteriors in closed form ----------------------------------------------------------------------


def with_param(x):
    """`conjugate`, with the precision of rows as a param site: MCMC leaves it at its initial value."""
    mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
    tau = numpyro.param("tau", SIGMA**-2, constraint=constraints.positive)
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * tau * (x - mu) ** 2)


@pytest.fixture(scope="module")
def nuts():
    # As one program: what NUTS does before it samples would be compiled operation by operation.
    return jax.jit(lambda: run_nuts(generalized_bayes(with_param, ISM(), SIGMA**2), X)[0])()


@pytest.mark.slow
def test_ordinary_posterior_by_nuts(nuts):
    """With β = σ² ISM gives the ordinary conjugate posterior of a Gaussian mean; two vectorised chains.

    Param sites are frozen.
    """
    mean, sd = posterior(X, SIGMA**2)
    ordinary = 1 / (PRIOR_SD**-2 + N / SIGMA**2)
    np.testing.assert_allclose(sd**2, ordinary, rtol=1e-6)
    draws = nuts["mu"]
    assert draws.shape == (2, 1000)
    assert_is_posterior(draws, mean, sd)


def test_deterministic_sites_are_kept(nuts):
    """Deterministic sites of the model are in the draws; its data, factors and param sites are not."""
    assert set(nuts) == {"mu", "twice"}
    np.testing.assert_allclose(nuts["twice"], 2 * nuts["mu"], rtol=1e-6)


def test_mean_field_guide():
    """AutoNormal, with 100 draws a step and a rate that falls to zero, to 5% of the sd.

    Over many keys the error is below 0.01 sd in the mean and 1% in the sd.
    """
    model = generalized_bayes(conjugate, ISM(), 0.6)
    guide = AutoNormal(model, init_scale=0.5)
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    svi = SVI(model, guide, optim, Trace_ELBO(100))
    params = jax.jit(lambda: svi.run(KEY, 800, X, progress_bar=False).params)()
    mean, sd = posterior(X, 0.6)
    assert abs(params["mu_auto_loc"] - mean) < 0.05 * sd
    assert abs(params["mu_auto_scale"] / sd - 1) < 0.05


def regression(y, z):
    weights = numpyro.sample("weights", dist.Normal(0.0, PRIOR_SD).expand([2]).to_event(1))
    with numpyro.plate("rows", len(y)):
        y = numpyro.sample("y", FLAT, obs=y)
        numpyro.factor("energy", -0.5 * (y - z @ weights) ** 2 / SIGMA**2)


@pytest.mark.slow
def test_correlated_posterior():
    """AutoMultivariateNormal has mean and covariance of a regression with correlated weights, as above to 5%."""
    z = np.stack([np.ones(N), 1.0 + 0.7 * np.cos(np.arange(N))], axis=1).astype(np.float32)
    precision = np.eye(2) / PRIOR_SD**2 + 0.6 * z.T @ z / SIGMA**4
    covariance = np.linalg.inv(precision)
    assert covariance[0, 1] ** 2 > 0.6 * covariance[0, 0] * covariance[1, 1]
    model = generalized_bayes(regression, ISM(), 0.6)
    guide = AutoMultivariateNormal(model, init_scale=0.5)
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    svi = SVI(model, guide, optim, Trace_ELBO(50))

    @jax.jit
    def moments():
        law = guide.get_posterior(svi.run(KEY, 800, X, z, progress_bar=False).params)
        return law.mean, law.covariance_matrix

    found, spread = map(np.asarray, moments())
    root = np.linalg.cholesky(precision)
    error = root.T @ (found - covariance @ (0.6 * z.T @ X / SIGMA**4))
    assert np.abs(error).max() < 0.05
    whitened = root.T @ spread @ root
    np.testing.assert_allclose(whitened, np.eye(2), atol=0.1)


@pytest.mark.slow
def test_stein_particles_find_the_mean():
    """SteinVI with point particles, which are pushed apart symmetrically: their mean is the posterior's, to 0.1 sd."""
    model = generalized_bayes(conjugate, ISM(), SIGMA**2)
    stein = SteinVI(
        model,
        AutoDelta(model),
        numpyro.optim.Adagrad(0.5),
        RBFKernel(),
        num_stein_particles=5,
        num_elbo_particles=1,
    )
    particles = jax.jit(lambda: stein.run(KEY, 300, X, progress_bar=False).params["mu_auto_loc"])()
    mean, sd = posterior(X, SIGMA**2)
    assert particles.shape == (5,)
    assert abs(particles.mean() - mean) < 0.1 * sd


# -- the density, by hand ---------------------------------------------------------------------------


def penalised(x, batch=None):
    """Two-dimensional rows with a shared mean; `strength` enters only a factor without data."""
    mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
    tau = numpyro.param("tau", 1.3, constraint=constraints.positive)
    strength = numpyro.sample("strength", dist.Exponential(2.0))
    numpyro.factor("penalty", -strength * mu**4)
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x = numpyro.sample("x", PLANE, obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", -0.5 * tau * jnp.sum((x - mu) ** 2, axis=-1))


ROWS = np.random.default_rng(1).normal(1.0, 1.0, (10, 2)).astype(np.float32)
VALUES = {"mu": jnp.array(0.3), "strength": jnp.array(0.7), "tau": jnp.array(1.9)}


def row_loss(x, mu=0.3, tau=1.9):
    return 0.5 * tau**2 * np.sum((x - mu) ** 2, axis=-1) - 2 * tau


def prior(mu=0.3, strength=0.7):
    """The log prior, with the penalty as part of it."""
    return norm.logpdf(mu, PRIOR_MEAN, PRIOR_SD) - strength * mu**4 + expon.logpdf(strength, scale=0.5)


def traced(model, *args, values=VALUES, seed=3, **kwargs):
    """Log density by NumPyro, and the trace it is the sum of."""
    seeded = handlers.seed(model, jax.random.key(seed))
    return log_density(seeded, args, kwargs, values)


def test_density_is_prior_minus_losses():
    """Log density is log π₀ + penalties − βΣ loss, in sites of their own."""
    value, trace = traced(generalized_bayes(penalised, ISM(), 0.4), ROWS)
    loss = 0.4 * row_loss(ROWS).sum()
    np.testing.assert_allclose(value, prior() - loss, rtol=1e-5)
    np.testing.assert_allclose(trace[LOSS_SITE]["fn"].log_factor, -loss, rtol=1e-5)
    np.testing.assert_allclose(trace["penalty"]["fn"].log_factor, -0.7 * 0.3**4, rtol=1e-5)
    assert "energy" not in trace and "x" not in trace


def test_subsampled_rows_count_for_all():
    """Four rows of ten count 2.5 times, and are the rows that the plate drew; the penalty counts once."""
    value, trace = traced(generalized_bayes(penalised, ISM(), 0.4), ROWS, 4)
    drawn = trace["rows"]["value"]
    assert drawn.shape == (4,)
    expected = prior() - 0.4 * 2.5 * row_loss(ROWS[drawn]).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    other = traced(generalized_bayes(penalised, ISM(), 0.4), ROWS, 4, seed=4)[0]
    assert abs(other - value) > 1e-3


def test_scale_around_the_generalised_model_tempers_all_of_it():
    """`handlers.scale(½)` from outside halves prior, penalty and loss alike, and the loss only once."""
    model = handlers.scale(generalized_bayes(penalised, ISM(), 0.4), 0.5)
    expected = 0.5 * (prior() - 0.4 * row_loss(ROWS).sum())
    np.testing.assert_allclose(traced(model, ROWS)[0], expected, rtol=1e-5)


def test_scale_and_mask_of_a_penalty():
    """A factor without data keeps what handlers inside the model make of it."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
        with handlers.scale(scale=3.0):
            numpyro.factor("scaled", -(mu**2))
        with handlers.mask(mask=False):
            numpyro.factor("masked", -(mu**4))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * (x - mu) ** 2 / SIGMA**2)

    value, _ = traced(generalized_bayes(model, ISM(), 0.4), X, values={"mu": jnp.array(0.3)})
    np.testing.assert_allclose(value, hand_density(X, 0.3, 0.4) - 3 * 0.3**2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["scale", "mask"])
def test_weights_inside_the_model(kind):
    """A scale of 3 around the rows weighs their losses, and masked rows drop out, whatever they hold."""
    keep = np.arange(10) != 4

    def weighted(x):
        mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD))
        handler = handlers.scale(scale=3.0) if kind == "scale" else handlers.mask(mask=keep)
        with numpyro.plate("rows", len(x)), handler:
            x = numpyro.sample("x", PLANE, obs=x)
            numpyro.factor("energy", -0.5 * 1.9 * jnp.sum((x - mu) ** 2, axis=-1))

    x = ROWS if kind == "scale" else np.where(keep[:, None], ROWS, np.nan)
    weights = 3.0 * np.ones(10) if kind == "scale" else keep
    expected = norm.logpdf(0.3, PRIOR_MEAN, PRIOR_SD) - 0.4 * weights @ row_loss(ROWS)
    value = traced(generalized_bayes(weighted, ISM(), 0.4), x, values={"mu": jnp.array(0.3)})[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_gradient_under_vmap_over_data_sets():
    """One call for three data sets, with their gradients in mu, and β as an array too."""
    sets = np.stack([X, X + 1.0, 2.0 * X])
    betas = np.array([0.5, 1.0, SIGMA**2], np.float32)

    def density(mu, x, beta):
        return log_density(generalized_bayes(conjugate, ISM(), beta), (x,), {}, {"mu": mu})[0]

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(density), (None, 0, 0)))(0.3, sets, betas)
    for i in range(3):
        mean, sd = posterior(sets[i], betas[i])
        np.testing.assert_allclose(value[i], hand_density(sets[i], 0.3, betas[i]), rtol=1e-5)
        np.testing.assert_allclose(slope[i], (mean - 0.3) / sd**2, rtol=1e-4)


def test_condition_and_substitute():
    """Sites fixed from outside take their value: conditioned ones keep their prior's density there."""
    model = generalized_bayes(penalised, ISM(), 0.4)
    rest = {k: v for k, v in VALUES.items() if k != "mu"}
    expected = prior(mu=-0.8) - 0.4 * row_loss(ROWS, mu=-0.8).sum()
    for handler in (handlers.condition, handlers.substitute):
        fixed = handler(model, data={"mu": jnp.array(-0.8)})
        np.testing.assert_allclose(traced(fixed, ROWS, values=rest)[0], expected, rtol=1e-5)
    trace = traced(handlers.condition(model, data={"mu": jnp.array(-0.8)}), ROWS, values=rest)[1]
    assert trace["mu"]["is_observed"]


@pytest.mark.parametrize("side", ["outside", "inside"])
def test_reparam(side):
    """A non-centred mu has a standard normal base, and the loss at m + s·base, on either side."""
    config = {"mu": LocScaleReparam(centered=0.0)}
    if side == "outside":
        model = handlers.reparam(generalized_bayes(penalised, ISM(), 0.4), config=config)
    else:
        model = generalized_bayes(handlers.reparam(penalised, config=config), ISM(), 0.4)
    base = -0.4
    values = {**VALUES, "mu_decentered": base}
    del values["mu"]
    mu = PRIOR_MEAN + PRIOR_SD * base
    shift = norm.logpdf(base) - norm.logpdf(mu, PRIOR_MEAN, PRIOR_SD)
    expected = prior(mu=mu) + shift - 0.4 * row_loss(ROWS, mu=mu).sum()
    value, trace = traced(model, ROWS, values=values)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(trace["mu"]["value"], mu, rtol=1e-6)


def test_potential_has_the_jacobian_of_constrained_sites():
    """What NUTS samples from in unconstrained space is −log density − log|det| of every constrained site."""

    def model(x):
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        rho = numpyro.sample("rho", dist.Uniform(-1.0, 1.0))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * tau * (x - rho) ** 2)

    generalized = generalized_bayes(model, ISM())
    info = initialize_model(KEY, generalized, model_args=(X,))
    at = {"tau": jnp.array(0.8), "rho": jnp.array(-0.6)}
    values = info.postprocess_fn(at)
    tau, rho = np.exp(0.8), np.tanh(-0.3)  # to (-1, 1): 2/(1 + exp(-u)) - 1
    np.testing.assert_allclose([values["tau"], values["rho"]], [tau, rho], rtol=1e-5)
    density = norm.logpdf(0.8) - 0.8 - np.log(2.0)
    density -= np.sum(0.5 * tau**2 * (X - rho) ** 2 - tau)
    jacobian = 0.8 + np.log(0.5 * (1 - rho**2))
    np.testing.assert_allclose(info.potential_fn(at), -density - jacobian, rtol=1e-5)


# -- under MCMC -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stochastic_loss_is_one_density_for_the_whole_run():
    """The same projections at every evaluation, and at every draw of two chains."""
    k = np.array([[1.0, 0.6], [0.6, 2.0]], np.float32)

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(PRIOR_MEAN, PRIOR_SD).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", PLANE, obs=x)
            numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x - mu, k, x - mu))

    loss = SSM(variance_reduced=False, projection="gaussian")
    generalized = generalized_bayes(model, loss)
    at = {"mu": jnp.array([0.2, -0.1])}
    potential_fn = initialize_model(KEY, generalized, model_args=(ROWS,)).potential_fn
    assert potential_fn(at) == potential_fn(at)
    draws, potential = jax.jit(lambda: run_nuts(generalized, ROWS))()
    draws, potential = np.reshape(draws["mu"], (-1, 2)), np.reshape(potential, -1)
    # One set of projections makes the potential a quadratic of mu, with no residual.
    design = [np.ones(len(draws)), *draws.T, draws[:, 0] ** 2, draws[:, 0] * draws[:, 1]]
    design = np.stack([*design, draws[:, 1] ** 2], axis=1).astype(np.float64)
    residual = potential - design @ np.linalg.lstsq(design, np.float64(potential))[0]
    assert np.abs(residual).max() < 1e-4 * np.std(potential) + 1e-5 * np.abs(potential).max()


@pytest.mark.parametrize("chains", [1, 2])
def test_nan_in_the_data_is_named_by_nuts(chains):
    """NUTS fails at once, with the rows."""
    bad = np.where(np.isin(np.arange(N), [3, 7]), np.nan, X)
    with pytest.raises(ValueError, match=r"'x' have NaN or infinity in rows 3, 7 \(2 of 40\)"):
        run_nuts(generalized_bayes(conjugate, ISM()), bad, chains=chains)


def test_unhashable_loss_is_refused_at_once():
    """A loss is a static argument of compiled functions."""

    class Unhashable(ISM):
        __hash__ = None

    with pytest.raises(TypeError, match="unhashable"):
        generalized_bayes(conjugate, Unhashable())


def test_energy_of_the_generalised_model_holds_the_data():
    """`generalized_bayes(model, loss).energy(x)` needs no parameters and leaks nothing to handlers outside."""
    with handlers.trace() as trace:
        energy = generalized_bayes(conjugate, ISM()).energy(X)
    assert isinstance(energy, Energy)
    assert not trace
    np.testing.assert_array_equal(energy.data, X[:, None])
