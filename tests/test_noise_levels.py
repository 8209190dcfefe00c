"""Denoising at many levels, and explicit score matching against Parzen densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import FAST_COMPILE, assert_mean, energy_of, improper
from numpyro import handlers
from numpyro.distributions import constraints
from scipy.special import logsumexp

from numpyro_score import DSM, ESM, ISM, Energy, ScoreMatching, geometric_levels, parzen_score

LEVELS = (2.0, 0.5, 0.1)


def widening(x, sigma=1.0):
    """N(0, (1 + σ²)/a I) at the level σ of each row: the truth for N(0, I) data if a = 1."""
    a = numpyro.param("a", 0.5, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * a * jnp.sum(x**2, -1) / (1 + sigma**2))


def objective(a, sigma):
    """J of N(0, (1+σ²)I) data for :func:`widening`."""
    return (a**2 - 2 * a) / (1 + sigma**2)


@pytest.mark.parametrize("levels", ["sampled", "all"])
@pytest.mark.parametrize(
    ("weighting", "form"),
    [(None, {}), (None, {"control_variate": False}), (None, {"antithetic": True}), (jnp.sqrt, {})],
)
def test_levels_add_up(levels, weighting, form, x64):
    """The mean is Σ λ(σ) J(σ), with λ(σ) = σ² unless given."""
    x = np.random.default_rng(0).normal(size=(60_000, 2))
    loss = DSM(LEVELS, levels=levels, weighting=weighting, **form)
    of = jax.jit(lambda a, x, k: loss(Energy(widening, {"a": a}, x), k), compiler_options=FAST_COMPILE)
    sigma = np.array(LEVELS)
    weight = sigma**2 if weighting is None else np.sqrt(sigma)
    assert_mean(of(1.7, x, jax.random.key(1)), np.sum(weight * objective(1.7, sigma)))


def test_rows_share_the_levels(x64):
    """Sampled, every row is as likely to have any level, and a batch has all in equal numbers."""
    seen = []

    def model(x, sigma=1.0):
        jax.debug.callback(lambda s: seen.append(np.asarray(s)), jnp.asarray(sigma))
        widening(x, sigma)

    energy = Energy(model, {"a": 1.0}, np.zeros((6, 2)))
    of = jax.jit(lambda k: DSM(LEVELS)(energy, k))
    for i in range(40):
        of(jax.random.key(i))
    jax.effects_barrier()
    drawn = np.stack([s for s in seen if s.shape == (6,)])
    assert (np.sort(drawn, axis=1) == np.sort(np.tile(LEVELS, 2))).all()
    assert all(set(drawn[:, row]) == set(LEVELS) for row in range(6))


def test_levels_draw_apart(x64):
    """All at once, each level has noise of its own: for a flat density ½‖ε/σ‖² differs by more than σ."""
    levels = (1.0, 1.0 + 1e-9)

    def weigh_first(sigma):
        return jnp.where(sigma == 1.0, 1.0, 0.0)

    def weigh_last(sigma):
        return 1.0 - weigh_first(sigma)

    energy = Energy(widening, {"a": 0.0}, np.zeros((5, 2)))
    losses = {w: jax.jit(DSM(levels, False, w, levels="all")) for w in (weigh_first, weigh_last)}
    of = {w: loss(energy, jax.random.key(0)) for w, loss in losses.items()}
    assert (np.abs(of[weigh_first] - of[weigh_last]) > 1e-3).all()


@pytest.mark.slow
def test_fit_over_levels():
    """A fit over levels with a subsampled plate finds a = 1."""

    def subsampled(x, sigma=1.0):
        a = numpyro.param("a", 0.5, constraint=constraints.positive)
        with numpyro.plate("rows", len(x), subsample_size=600):
            x = numpyro.sample("x", improper(2), obs=numpyro.subsample(x, event_dim=1))
            numpyro.factor("energy", -0.5 * a * jnp.sum(x**2, -1) / (1 + sigma**2))

    x = np.random.default_rng(1).normal(size=(2000, 2)).astype(np.float32)
    fit = ScoreMatching(subsampled, loss=DSM(LEVELS), num_steps=600).run(jax.random.key(0), x, progress_bar=False)
    # The weighted optimum is 1 up to sampling error of the 4,000 numbers, 1/√2000, and of the last steps' noise.
    assert abs(fit.estimates["a"] - 1) < 0.15


def test_models_must_take_the_level():
    """A model without the keyword is told what to write, whether it is a function or under a handler."""

    def model(x):
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1))

    for m in (model, handlers.scale(model, scale=2.0)):
        with pytest.raises(TypeError, match=r"'sigma'.*def model\(x, sigma=1.0\)"):
            jax.eval_shape(DSM(LEVELS), Energy(m, {}, np.zeros((3, 2))), jax.random.key(0))
    jax.eval_shape(DSM(0.5), Energy(model, {}, np.zeros((3, 2))), jax.random.key(0))


def test_geometric_levels():
    np.testing.assert_allclose(geometric_levels(8.0, 0.5, 5), [8, 4, 2, 1, 0.5])


# -- explicit score matching -----------------------------------------------------------------------


def test_parzen_score_is_that_of_the_mixture(x64):
    """The score is the gradient of the log density of the mixture, near and far, in chunks or not."""
    rng = np.random.default_rng(2)
    data, x, sigma = rng.normal(size=(7, 3)), np.concatenate([rng.normal(size=(9, 3)), [[60.0, 0, 0]]]), 0.4

    def log_density(x):
        return logsumexp(-0.5 * np.sum((x[:, None] - data) ** 2, -1) / sigma**2, axis=1)

    h = 1e-5
    expected = np.stack([(log_density(x + h * e) - log_density(x - h * e)) / (2 * h) for e in np.eye(3)], -1)
    np.testing.assert_allclose(parzen_score(data, sigma)(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-6)
    many = np.concatenate([data] * 200_000)  # two rows at a time
    np.testing.assert_allclose(parzen_score(many, sigma)(jnp.asarray(x[:3])), expected[:3], rtol=1e-6)


def test_parzen_target_is_denoising_up_to_a_constant(x64):
    """On the Parzen density itself, ESM and the Hyvärinen objective, which is DSM's mean, differ by no parameter."""
    data, sigma = np.array([-1.0, 0.3, 2.0]), 0.6
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    x = (data[:, None] + sigma * node).reshape(-1, 1)
    weight = np.tile(weight, 3) / weight.sum() / 3

    def f(t, x):
        return t * jnp.sin(x[:, 0]) - 0.1 * t**2 * x[:, 0] ** 4

    target = parzen_score(data[:, None], sigma)
    energy = {t: energy_of(f, t, x) for t in (0.5, 1.7)}
    difference = jax.jit(lambda e: ESM(target)(e, jax.random.key(0)) - ISM()(e, jax.random.key(0)))
    gap = {t: weight @ difference(e) for t, e in energy.items()}
    np.testing.assert_allclose(gap[0.5], gap[1.7], rtol=1e-6)
    np.testing.assert_allclose(gap[0.5], weight @ (0.5 * np.asarray(target(jnp.asarray(x)))[:, 0] ** 2), rtol=1e-6)


def test_explicit_target_of_another_shape():
    with pytest.raises(ValueError, match=r"gave shape \(3,\) for rows of shape \(3, 2\)"):
        ESM(lambda x: x[:, 0])(Energy(widening, {"a": 1.0}, np.zeros((3, 2))), jax.random.key(0))


def test_sigma_is_passed_or_given_never_both_nor_neither():
    """A model of the noise level is not left at its default without a word."""
    x, key = np.zeros((4, 2)), jax.random.key(0)
    with pytest.raises(TypeError, match=r"takes 'sigma'.*write DSM\(\(0.5,\)\)"):
        jax.eval_shape(DSM(0.5), Energy(widening, {"a": 1.0}, x), key)
    with pytest.raises(TypeError, match=r"arguments give 'sigma'.*leave it out"):
        jax.eval_shape(DSM(LEVELS), Energy(widening, {"a": 1.0}, x, sigma=0.5), key)
    for loss, energy in (
        (DSM((0.5,), weighting=jnp.ones_like), Energy(widening, {"a": 1.0}, x)),
        (DSM(0.5), Energy(widening, {"a": 1.0}, x, 0.5)),
        (DSM(0.5), Energy(functools.partial(widening, sigma=0.5), {"a": 1.0}, x)),
    ):
        assert jax.eval_shape(loss, energy, key).shape == (4,)


def test_parzen_score_of_other_rows():
    """Rows of another width are refused, not broadcast."""
    with pytest.raises(ValueError, match="3 columns, and asked at rows with 1"):
        parzen_score(np.zeros((5, 3)), 1.0)(jnp.zeros((4, 1)))
