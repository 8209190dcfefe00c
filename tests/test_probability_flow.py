"""Log densities by the probability flow, against mixtures in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import counted_compilations, improper
from numpyro.distributions import constraints
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from benchmarks.mixtures import Mixture
from numpyro_score import (
    DSM,
    EDM,
    VE,
    VP,
    Energy,
    ScoreDistribution,
    ScoreMatching,
    SubVP,
    flow_decode,
    flow_encode,
    flow_interpolate,
    flow_log_prob,
    score_factor,
)
from numpyro_score.diffusion import flow

RANGE = (1e-3, 140.0)
PLANE, WIDE = Mixture(2, 4, 0), Mixture(16, 4, 1)


def exact(mixture, x, sigma=0.0):
    noise = sigma**2 * np.eye(x.shape[1])
    laws = [multivariate_normal(*law) for law in zip(mixture.means, mixture.covariances + noise, strict=True)]
    return logsumexp([law.logpdf(np.asarray(x, np.float64)) for law in laws], b=mixture.weights[:, None], axis=0)


def errors(mixture, found, x, sigma=0.0):
    return np.abs(np.asarray(found.value, np.float64) - exact(mixture, x, sigma))


@pytest.fixture
def plain_end(monkeypatch):
    """The law at the end as it usually is, N(0, ρ²I) in u: that of data without mean and covariance."""
    own = flow.end_law
    monkeypatch.setattr(flow, "end_law", lambda x, w, dtype: own(0.0 * x, w, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("mixture, sde", [(PLANE, VP()), (PLANE, SubVP()), (WIDE, VE(3e-4, 140.0))])
def test_double_precision(mixture, sde, x64, request):
    """At most 1e-4 nat off the density without noise, whatever number the model has in front of it at each level.

    With N(0, I) at the end it fails, at any tolerance.
    """
    x, energy = mixture.draw(100, 1), mixture.energy()
    run = partial(flow_log_prob, energy, x, sde=sde, noise_range=(3e-4, 140.0), rtol=1e-6, atol=1e-6)
    found = run()
    assert errors(mixture, found, x).max() <= 1e-4
    assert np.mean(errors(mixture, found, x, 3e-4) <= found.solver_error + found.end_error) >= 0.95
    assert np.median(found.solver_error + found.end_error) < 1e-4
    assert float(found.smallest_sigma) == pytest.approx(3e-4) and not found.stderr.any()
    request.getfixturevalue("plain_end")
    assert errors(mixture, run(), x).max() > 2e-4


@pytest.mark.slow
def test_single_precision():
    """Rows of a scale that no seed was chosen for; a second call, with other data and parameters, compiles nothing."""
    x = jnp.asarray(PLANE.draw(1000, 2), jnp.float32)
    found = flow_log_prob(PLANE.energy(), x, noise_range=RANGE)
    wrong = errors(PLANE, found, x)
    assert np.median(wrong) <= 6e-5 and np.quantile(wrong, 0.99) <= 3e-4
    assert np.mean(errors(PLANE, found, x, 1e-3) <= found.solver_error + found.end_error) >= 0.95
    assert found.num_steps.shape == (1000,) and found.num_steps.max() < 40


@pytest.mark.slow
def test_scores_have_a_density_too(x64):
    """A score network's divergence is that of its Jacobian; EDM's time is the noise itself."""
    x = PLANE.draw(50, 3)
    found = flow_log_prob(PLANE.energy(score=True), x, sde=EDM(), noise_range=(3e-4, 80.0), rtol=1e-6, atol=1e-6)
    assert errors(PLANE, found, x).max() <= 1e-4


TURNS = "antisymmetric part of its Jacobian is 100% of the symmetric one"


def turning():
    """The score of N(0, I) and a rotation, which moves neither the law nor the divergence; no energy has this score."""

    def model(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            turned = jnp.stack([x[:, 1], -x[:, 0]], axis=1)
            score_factor("score", x, (turned - x) / (1 + jnp.square(sigma) * jnp.ones(len(x)))[:, None])

    return Energy(model, {}, jnp.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("function", [flow_encode, flow_decode, ScoreDistribution])
def test_all_that_follows_the_flow_warns_of_a_score_that_turns(function, unchecked):
    """Once, and before anything else is looked at."""
    with pytest.warns(UserWarning, match=TURNS) as warned:
        if function is ScoreDistribution:
            ScoreDistribution(turning(), noise_range=RANGE)
        else:
            with pytest.raises(ValueError, match="with NaN"):
                function(turning(), jnp.full((2, 2), jnp.nan), noise_range=RANGE)
    assert len(warned) == 1


@pytest.mark.slow
def test_a_score_that_turns_has_the_density_of_its_draws():
    """Those of N(0, I)."""
    x = jnp.array([[0.5, -1.0], [2.0, 0.0]])
    with pytest.warns(UserWarning, match=TURNS):
        found = flow_log_prob(turning(), x, noise_range=RANGE, solver="tsit5")
    np.testing.assert_allclose(found.value, dist.Normal().log_prob(x).sum(1), atol=1e-3)


@pytest.mark.slow
def test_probes_are_unbiased_with_their_error(optimised):
    """z within ±2 on 93 to 97% of rows, and errors that fall with the root of the number of probes."""
    mixture = Mixture(33, 2, 2)
    x = jnp.asarray(mixture.draw(1000, 4), jnp.float32)
    run = partial(flow_log_prob, mixture.energy(), x, noise_range=RANGE, rtol=1e-3, atol=1e-3, solver="tsit5")
    run = partial(run, divergence="hutchinson", rng_key=0)
    found = run(num_probes=32)
    z = (np.asarray(found.value) - exact(mixture, x, 1e-3)) / found.stderr
    # Two standard errors of a share of 1,000 rows are 0.014, and 32 probes have the t law: 0.946.
    assert 0.93 <= np.mean(np.abs(z) < 2) <= 0.97
    assert abs(z.mean()) < 4 / 1000**0.5
    few = run(num_probes=8)
    assert np.mean(few.stderr) / np.mean(found.stderr) == pytest.approx(2.0, rel=0.1)
    # As many probes as numbers cost what the exact divergence does.
    same, plain = run(num_probes=33), run(divergence="exact", rng_key=None)
    np.testing.assert_array_equal(same.value, plain.value)
    assert not same.stderr.any()
    with pytest.raises(TypeError, match=r"draws probes, so pass rng_key=jax.random.key\(0\)"):
        run(rng_key=None)
    with pytest.raises(ValueError, match="num_probes of 2 or more"):
        run(num_probes=1)


def normal(x, sigma=1.0):
    """A normal law with noise, of one parameter and one number a row."""
    variance = numpyro.param("variance", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        numpyro.factor("energy", -0.5 * x**2 / (variance + sigma**2))


def of_variance(variance):
    return Energy(normal, {"variance": variance}, jnp.array([-1.0, 1.0]))


@pytest.mark.slow
def test_adjoints_agree(x64):
    """Derivatives in x and in a parameter, against those of the exact law with the end held fixed."""
    x = jnp.array([0.3, -1.7])

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=(0, 1))
    def total(x, variance, adjoint):
        options = dict(noise_range=(1e-2, 100.0), rtol=1e-8, atol=1e-8, solver="tsit5", adjoint=adjoint)
        return flow_log_prob(of_variance(variance), x, **options).value.sum()

    variance = 1.3 + 1e-4
    in_law = -x / variance, 0.5 * jnp.sum(x**2 / variance - 1) / variance
    found = {k: total(x, 1.3, k)[1] for k in ("recursive", "backsolve", "direct")}
    for name, (in_x, in_variance) in found.items():
        # The end is that of the data's variance, 1, where 1.3 would be right: 0.3/100² of a relative error.
        np.testing.assert_allclose(in_x, in_law[0], rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(in_variance, in_law[1], rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(in_variance, found["direct"][1], rtol=1e-6, err_msg=name)
    low, high = (total(x, v, "recursive")[0] for v in (1.3 - 1e-4, 1.3 + 1e-4))
    np.testing.assert_allclose(found["recursive"][1], (high - low) / 2e-4, rtol=1e-4)


def test_other_parameters_and_data_compile_nothing():
    flow_log_prob(of_variance(1.0), jnp.array([0.5, 1.0]), noise_range=RANGE, solver="heun", rtol=1e-2, atol=1e-2)
    other, x = of_variance(0.5), jnp.array([0.1, 2.0])
    with counted_compilations() as compiled:
        flow_log_prob(other, x, noise_range=(1e-2, 90.0), solver="heun", rtol=1e-3, atol=1e-3)
    assert not compiled


@pytest.mark.slow
def test_a_fit_knows_its_levels_and_short_ranges_are_suspect():
    x = jax.random.normal(jax.random.key(0), (200,))
    fit = ScoreMatching(normal, loss=DSM((2.0, 1.0, 0.1)), num_steps=50).run(jax.random.key(1), x, progress_bar=False)
    run = partial(flow_log_prob, fit, x[:2], solver="heun", rtol=1e-2, atol=1e-2)
    with pytest.warns(UserWarning, match=r"The largest noise level, 2, is 2.* times the data's .* may not be yet"):
        assert run().smallest_sigma == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"from 0.01 to 2, but the fit has seen 0.1 to 2: stay within"):
        run(noise_range=(0.01, 2.0))


def test_bad_input_gives_no_number(unchecked):
    energy, x = of_variance(1.0), jnp.array([0.5, 1.0])
    with pytest.raises(TypeError, match="cannot see at which noise levels the model of this Energy is good"):
        flow_log_prob(energy, x)
    run = partial(flow_log_prob, energy, x, noise_range=RANGE)
    with pytest.raises(ValueError, match=r"from 0.001 to 1e\+03, but sigma/alpha of the SDE goes from 0 to 152"):
        run(noise_range=(1e-3, 1e3))
    with pytest.raises(ValueError, match="has no solver 'rk4': use 'dopri8'"):
        run(solver="rk4")
    with pytest.raises(ValueError, match="has no adjoint 'none'"):
        run(adjoint="none")
    with pytest.raises(ValueError, match="has no divergence 'approximate'"):
        run(divergence="approximate")
    with pytest.raises(TypeError, match=r"needs a diffusion such as sde=VP\(\)"):
        run(sde="vp")
    with pytest.raises(TypeError, match=r"needs a diffusion such as sde=VP\(\), got None"):
        run(sde=None)
    with pytest.raises(TypeError, match=r"draws nothing with divergence='exact': leave rng_key out"):
        run(rng_key=0)
    with pytest.raises(ValueError, match=r"needs an rtol below 1.*got 5.0"):
        run(rtol=5.0)
    with pytest.raises(ValueError, match=r"needs an atol below the spread of the data with the least noise, 1, got 2"):
        run(atol=2.0)
    with pytest.raises(TypeError, match=r"'z' has 'a' in the place of a number"):
        flow_decode(energy, "a", noise_range=RANGE)
    with pytest.raises(ValueError, match=r"rows of shapes \(\) and \(2,\): pass two events of one shape"):
        flow_interpolate(energy, 1.0, jnp.ones(2), 3, noise_range=RANGE)
    with pytest.raises(ValueError, match=r"got row 1 \(1 of 2\) with NaN"):
        flow_log_prob(energy, jnp.array([0.5, jnp.nan]), noise_range=RANGE)

    def breaks(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(), obs=x)
            nowhere = jnp.where((x > 2) & (sigma < 0.5), jnp.nan, 0.0)
            numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2) + nowhere * x)

    broken = Energy(breaks, {}, x)
    options = dict(noise_range=RANGE, solver="heun", rtol=1e-2, atol=1e-2)
    with pytest.raises(FloatingPointError, match=r"did not arrive .* for row 1 \(1 of 2\): the score is not finite"):
        flow_log_prob(broken, jnp.array([0.1, 3.0]), sde=VE(1e-3, 140.0), **options)
    found = jax.jit(lambda x: flow_log_prob(broken, x, sde=VE(1e-3, 140.0), **options).value)(jnp.array([0.1, 3.0]))
    assert jnp.isfinite(found).tolist() == [True, False]
