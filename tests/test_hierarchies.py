"""Standard errors where rows share effects with a prior of their own, against closed forms and replications."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, GradientSpread, QuadraticLoss, ScoreMatching, adjust_draws, generalized_bayes
from numpyro_score.uncertainty import SandwichError, stderr_of
from numpyro_score.uncertainty.hierarchy import row_groups, unshared_sites

pytestmark = pytest.mark.usefixtures("x64")

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)
SPREAD = 0.7  # of the effects


def rows(x, mean):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mean) ** 2)


def centred(x, group, num_groups):
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("groups", num_groups):
        mu = numpyro.sample("mu", dist.Normal(m, SPREAD))
    rows(x, mu[group])


def shifted(x, group, num_groups):
    """The same law, in which no prior depends on another site."""
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("groups", num_groups):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    rows(x, (m + SPREAD * z)[group])


def free_scale(x, group, num_groups):
    m = numpyro.param("m", 0.1)
    s = numpyro.param("s", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", num_groups):
        mu = numpyro.sample("mu", dist.Normal(m, s))
    rows(x, mu[group])


def scaled(x, group, num_groups):
    """Not centred, with a scale that is not known."""
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    with numpyro.plate("groups", num_groups):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    rows(x, (m + s * z)[group])


def data(sizes, spread=SPREAD, seed=0):
    """Rows of groups whose effects have exactly this spread, and the rows' groups."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=len(sizes))
    effects = 0.4 + spread * (effects - effects.mean()) / effects.std()
    group = np.repeat(np.arange(len(sizes)), sizes)
    return effects[group] + rng.normal(size=len(group)), group


@functools.cache
def score_matching(model):
    return ScoreMatching(model, optim=optax.lbfgs(), num_steps=60)


def fitted(model, *args):
    return score_matching(model).run(KEY, *args, progress_bar=False)


def group_sums(x, group, u):
    """Σ (x − u)² of each group, about their mean over all rows of the gradients."""
    n, k = len(x), len(u)
    g = np.zeros((n, k))
    g[np.arange(n), group] = u[group] - x
    g -= g.mean(axis=0)
    return g.T @ g * n / (n - 1)


def known_spread_covariance(x, group, k, hyperprior=100.0):
    """Of (m, u): rows have the Hessian 1 in u_g, and the prior of u is N(m, s²) with s known.

    H = [[k b + 1/v, −b], [−b, n_g + b]] with b = 1/s², and what is random are the rows, whose gradients in u_g are
    u_g − x_n, and the effects, whose gradient b(u_g − m) in u_g, and the negative in m, has variance b.
    """
    b, sizes = SPREAD**-2, np.bincount(group)
    prior = np.block([[np.full((1, 1), k * b), np.full((1, k), -b)], [np.full((k, 1), -b), b * np.eye(k)]])
    h = prior + np.diag(np.concatenate([[1 / hyperprior], sizes]))
    linear = np.concatenate([[0.0], np.bincount(group, x)])
    theta = np.linalg.solve(h, linear)
    s = prior.copy()
    s[1:, 1:] += group_sums(x, group, theta[1:])
    return theta, np.linalg.inv(h) @ s @ np.linalg.inv(h)


@pytest.fixture(scope="module")
def grouped():
    with jax.enable_x64(True):
        x, group = data([30, 60, 110, 90, 70, 40])
        return jnp.asarray(x), jnp.asarray(group)


@pytest.fixture(scope="module")
def shifted_fit(grouped):
    with jax.enable_x64(True):
        return ScoreMatching(shifted).run(KEY, *grouped, 6, progress_bar=False)


@pytest.mark.slow
def test_known_spread_has_its_closed_form(grouped):
    """m and u together; half of the error of m is that between groups, which rows as if independent would leave out."""
    x, group = grouped
    fit = ScoreMatching(centred).run(KEY, x, group, 6, progress_bar=False)
    theta, covariance = known_spread_covariance(np.asarray(x), np.asarray(group), 6)
    errors = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(fit.estimates["m"], theta[0], rtol=1e-6)
    np.testing.assert_allclose(fit.covariance(), covariance, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fit.stderr()["m"], errors[0], rtol=1e-6)
    np.testing.assert_allclose(fit.stderr()["mu"], errors[1:], rtol=1e-6)
    contrast = fit.stderr(of=lambda e: e["mu"][0] - e["m"])
    c = np.array([-1.0, 1.0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(contrast, (c @ covariance @ c) ** 0.5, rtol=1e-6)
    # With the others known: b is the curvature of the effects' prior in m, six times.
    b = SPREAD**-2
    np.testing.assert_allclose(fit.stderr(diagonal=True)["m"], (6 * b) ** 0.5 / (6 * b + 0.01), rtol=1e-6)
    draws = fit.sample_posterior(KEY, 20_000)["m"]
    assert abs(draws.std() / errors[0] - 1) < 5 / 200
    # The rate is that of the rows given their effects.
    inner = group_sums(np.asarray(x), np.asarray(group), theta[1:])
    sizes = np.bincount(np.asarray(group))
    rate = np.trace(np.diag(sizes) @ np.linalg.inv(inner) @ np.diag(sizes)) / sizes.sum()
    np.testing.assert_allclose(fit.calibrated_learning_rate(), rate, rtol=1e-6)
    # Draws with the covariance H⁻¹ get that of the errors.
    root = np.linalg.cholesky(np.linalg.inv(fit.curvature.hessian))
    z = np.concatenate([np.eye(7), -np.eye(7)]) * 7**0.5
    moved = adjust_draws({"m": theta[0] + z @ root[0], "mu": theta[1:] + z @ root[1:].T}, fit)
    np.testing.assert_allclose(np.mean((moved["m"] - theta[0]) ** 2) ** 0.5, errors[0], rtol=1e-6)


def test_shifted_effects_have_the_errors_of_centred_ones(grouped, shifted_fit):
    """z = (u − m)/s, with a prior that depends on nothing: what shows it is that the rows of a group share it."""
    (x, group), fit = grouped, shifted_fit
    errors = np.sqrt(np.diag(known_spread_covariance(np.asarray(x), np.asarray(group), 6)[1]))
    assert fit.curvature.effects == ("z",)
    np.testing.assert_allclose(fit.stderr()["m"], errors[0], rtol=1e-6)
    np.testing.assert_allclose(fit.stderr(of=lambda e: e["m"] + SPREAD * e["z"]), errors[1:], rtol=1e-6)


@pytest.mark.parametrize("model", [centred, shifted])
def test_sums_over_batches_have_them_too(grouped, model):
    x, group = grouped
    target = generalized_bayes(model, ISM())
    batches = [(x[i::2], group[i::2], 6) for i in range(2)]
    quadratic = sum(QuadraticLoss.of(target, KEY, *batch) for batch in batches)
    estimates = quadratic.solve().estimates
    spread = sum(GradientSpread.of(target, estimates, KEY, *batch) for batch in batches)
    errors = np.sqrt(np.diag(known_spread_covariance(np.asarray(x), np.asarray(group), 6)[1]))
    np.testing.assert_allclose(quadratic.stderr(spread)["m"], errors[0], rtol=1e-6)


# -- a spread that is estimated -------------------------------------------------------------------------


def joint_mode(means, n):
    """m, s, u at the minimum over all of them, from the groups' means (..., k) of n rows each.

    Minimised over u, the objective is k log s + Σ(x̄ − m)²/2(s² + 1/n): least where s + 1/(n s) is the root mean
    square V^½ of the means' deviations, so s = (V^½ + (V − 4/n)^½)/2, if there is such a minimum.
    """
    m = means.mean(axis=-1)
    deviation = means - m[..., None]
    v = np.mean(deviation**2, axis=-1)
    s = (v**0.5 + np.maximum(v - 4 / n, 0.0) ** 0.5) / 2
    return m, s, m[..., None] + deviation * (n / (n + s**-2))[..., None]


def free_scale_covariance(s, u, m, n, inner):
    """Of (m, u, log s), by H⁻¹(S + B)H⁻¹, where B is the Hessian of k log s + Σ(u − m)²/2s² and S is `inner` in u."""
    k = u.shape[-1]
    r = (u - m[..., None]) / s[..., None]
    b = np.zeros((*s.shape, k + 2, k + 2))
    i = np.arange(1, k + 1)
    b[..., i, i] = (s**-2)[..., None]
    b[..., 0, i] = b[..., i, 0] = -(s**-2)[..., None]
    b[..., 0, 0] = k * s**-2
    b[..., i, -1] = b[..., -1, i] = -2 * r / s[..., None]
    b[..., 0, -1] = b[..., -1, 0] = 2 * r.sum(axis=-1) / s
    b[..., -1, -1] = 2 * np.sum(r**2, axis=-1)
    h, spread = b.copy(), b
    h[..., i, i] += n
    spread[..., 1:-1, 1:-1] += inner
    inverse = np.linalg.inv(h)
    return inverse @ spread @ inverse


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.7, 2.0])
@pytest.mark.filterwarnings("ignore:Site 'mu' has effects of 8 groups")
def test_hyperparameters_have_the_error_between_groups(spread):
    """8 groups of 100 rows: s/√8 for m, ten times what rows as if independent would give; about 1/√16 for log s."""
    k, n = 8, 100
    x, group = data([n] * k, spread)
    fit = fitted(free_scale, jnp.asarray(x), jnp.asarray(group), k)
    means = np.bincount(group, x) / n
    m, s, u = joint_mode(means, n)
    covariance = free_scale_covariance(s, u, m, n, group_sums(x, group, u))
    np.testing.assert_allclose([fit.estimates["m"], fit.estimates["s"]], [m, s], rtol=1e-5)
    errors = fit.stderr()
    np.testing.assert_allclose(errors["m"], covariance[0, 0] ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(errors["s"], s * covariance[-1, -1] ** 0.5, rtol=1e-4)
    assert abs(errors["m"] / (spread / k**0.5) - 1) < 0.1
    assert abs(errors["s"] / (s * (2 * k) ** -0.5) - 1) < 0.1


@pytest.mark.parametrize(("k", "lowest", "highest"), [(8, 0.79, 0.87), (40, 0.85, 0.91)])
def test_coverage_of_the_hyperparameters_mean(k, lowest, highest):
    """90% intervals over 2,000 data sets, of 100 rows a group: near 90% with 40 groups, 83% with 8.

    With k groups the interval is that of a t of k − 1 degrees, with a spread that divides by k: P(|t| < 1.645 ((k −
    1)/k)^½) is 0.83 and 0.888. Rows as if independent cover 18%.
    """
    rng, n = np.random.default_rng(0), 100
    effects = SPREAD * rng.normal(size=(2000, k))
    means = effects + rng.normal(size=effects.shape) / n**0.5
    m, s, u = joint_mode(means, n)
    covariance = free_scale_covariance(s, u, m, n, n * np.eye(k))
    covered = np.mean(np.abs(m) < 1.645 * covariance[:, 0, 0] ** 0.5)
    assert lowest < covered < highest


def test_scale_shared_by_coefficients():
    """No groups of rows: 30 coefficients ~ N(0, τ), whose τ has the error τ/√60 of a spread of 30 numbers, and more."""
    rng = np.random.default_rng(3)
    beta, design = 0.5 * rng.normal(size=30), rng.normal(size=(400, 30))
    y = design @ beta + rng.normal(size=400)

    def model(y):
        tau = numpyro.sample("tau", dist.HalfNormal(10.0))
        b = numpyro.sample("b", dist.Normal(0.0, tau).expand([30]).to_event(1))
        rows(y, design @ b)

    fit = fitted(model, jnp.asarray(y))
    error, tau = fit.stderr()["tau"], fit.estimates["tau"]
    assert 1.0 < error / (tau / 60**0.5) < 1.15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The fit has not converged")  # nor can it, where a scale collapses
def test_products_and_collapsed_scales_are_refused(grouped):
    """The mode of s z has an s of no meaning, and effects that do not differ have none of any spread."""
    with pytest.raises(SandwichError, match=r"see sites 's' and 'z' by their product alone.*Use NUTS"):
        fitted(scaled, *grouped, 6).stderr()
    group = np.repeat(np.arange(6), 20)
    x = np.tile(np.random.default_rng(0).normal(size=20), 6)
    with pytest.warns(UserWarning, match="still falling"):  # s goes on to zero
        fit = ScoreMatching(free_scale).run(KEY, jnp.asarray(x), jnp.asarray(group), 6, progress_bar=False)
    with pytest.raises(SandwichError, match=r"prior of site 'mu' depends on other sites.*Use NUTS"):
        fit.stderr()


# -- what is no hierarchy ---------------------------------------------------------------------------------


def apart(x, group, kind):
    """Effects alone, or two sites that nothing ties: neither their priors nor a factor of both."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
    if kind == "alone":
        return rows(x, a[group])
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -jnp.sum(a**2) - b**2)
    return rows(x, a @ jnp.cos(jnp.arange(6.0)) + b * group)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "penalty"])
def test_priors_that_tie_nothing_add_nothing(grouped, kind):
    """Fixed priors bend the objective alone, also of effects that are all that the rows depend on."""
    fit = ScoreMatching(functools.partial(apart, kind=kind)).run(KEY, *grouped, progress_bar=False)
    assert fit.curvature.effects == () and fit.curvature.between is None


# -- few groups, and errors without the dense Hessian ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("num_groups", "size"), [(8, 100), (30, 20)])
def test_few_groups_of_unknown_spread(num_groups, size, recwarn):
    """A warning below 30 groups, once for each fit, from whatever uses its errors."""
    x, group = data([size] * num_groups, spread=2.0)
    sm = score_matching(free_scale) if num_groups == 8 else ScoreMatching(free_scale, optim=optax.lbfgs(), num_steps=60)
    fit = sm.run(KEY, jnp.asarray(x), jnp.asarray(group), num_groups, progress_bar=False)
    if num_groups < 30:
        with pytest.warns(UserWarning, match=rf"Site 'mu' has effects of {num_groups} groups.*site 's'.*use NUTS"):
            fit.sample_posterior(KEY, 2)
        with pytest.warns(UserWarning, match=f"effects of {num_groups} groups"):
            fit.stderr(diagonal=True)
        with pytest.warns(UserWarning, match=f"effects of {num_groups} groups"):
            stderr_of(fit._objective, lambda e: e["m"], None)
        recwarn.clear()
    fit.stderr()
    if num_groups >= 30:
        fit.stderr(diagonal=True)
    assert not [w for w in recwarn if "groups" in str(w.message)]


def test_effects_are_seen_without_the_dense_hessian(shifted_fit):
    """Of a prior with fixed parameters: by conjugate gradients the error of m is that of the dense sandwich."""
    fit = shifted_fit
    np.testing.assert_allclose(
        stderr_of(fit._objective, lambda e: e["m"], None), fit.stderr(of=lambda e: e["m"]), rtol=1e-4
    )
    with pytest.raises(SandwichError, match=r"element of site 'z'.*diagonal=True.*stderr\(of="):
        fit.stderr(diagonal=True)


def test_rows_find_their_groups(grouped):
    """Effects of groups of one number or two each; coefficients that all rows share have no groups."""

    def model(x, group):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([6, 2]).to_event(2))
        t = jnp.cos(jnp.arange(len(x)))
        rows(x, m @ jnp.stack([t, t**2, t**3]) + z[group, 0] + z[group, 1] * t)

    objective = (
        ScoreMatching(model, optim=optax.sgd(0.0), num_steps=1).run(KEY, *grouped, progress_bar=False)._objective
    )
    np.testing.assert_array_equal(row_groups(objective, "z"), grouped[1])
    assert row_groups(objective, "m") is None
    assert unshared_sites(objective) == ("z",)
