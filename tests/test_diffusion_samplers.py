"""Methods that draw by diffusion: their laws, their order and where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusions import (
    AXES,
    MEAN,
    VARIANCES,
    drawn_mixture,
    energy,
    mixture,
    mixture_rows,
    normal_energy,
    normal_network,
    one_normal,
    predicted_variance,
    sliced_w2,
)
from models import assert_mean, assert_variance, counted_compilations
from scipy import stats

from numpyro_score import EDM, VE, VP, PredictorCorrector, SubVP, diffuse, reverse_sde
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.methods import METHODS

FIRST, SECOND = (0.75, 1.15), (1.85, 2.15)
ORDERS = {
    "ddim": FIRST,
    "probability_flow": FIRST,
    "euler_maruyama": FIRST,
    "reverse_diffusion": FIRST,
    "ddpm": FIRST,
    "dpm++2m": SECOND,
    "sde_dpm++2m": SECOND,
    "edm_heun": SECOND,
    "edm_churn": SECOND,
    "exp_ab3": (2.85, 3.15),
}
STEPS_IN_TIME = {"probability_flow", "euler_maruyama", "reverse_diffusion"}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name, x64, monkeypatch):
    """The variance of draws of normal data, as the number of steps doubles from 64 to 128, on the method's own grid."""
    low, high = ORDERS[name]
    for sde, grid in [(None, "karras"), (EDM(), "karras")] + [(SubVP(), "uniform")] * (name in STEPS_IN_TIME):
        errors = [
            predicted_variance(METHODS[name], levels_on(sde, grid, n, (0.01, 40.0)), 0.5, monkeypatch) - 0.5001
            for n in (64, 128)
        ]
        assert low < np.log2(errors[0] / errors[1]) < high, (sde, grid, errors)


@pytest.mark.parametrize("name", ["probability_flow", "euler_maruyama", "ddpm_covariance"])
def test_methods_that_are_exact(name, x64, monkeypatch):
    """With the covariance of normal data at any number of steps; Euler's steps where the diffusion is stationary."""
    if name == "ddpm_covariance":
        found = predicted_variance(METHODS[name], levels_on(EDM(), "karras", 3, (0.01, 40.0)), 0.5, monkeypatch)
        assert found == pytest.approx(0.5001, rel=1e-12)
        return
    error = predicted_variance(METHODS[name], levels_on(VP(), "uniform", 128, (0.02, 100.0)), 1.0, monkeypatch) - 1.0004
    assert abs(error) < (1e-10 if name == "probability_flow" else 0.02)


@pytest.mark.parametrize("name", METHODS)
def test_draws_of_normal_data(name, monkeypatch):
    """Mean and covariance are those of the method's steps; energies and score networks in turn."""
    model = (normal_energy, normal_network)[len(name) % 2]
    n = 12
    found = diffuse(energy(model), 3, 4000, method=name, num_steps=n, noise_range=(0.02, 30.0))
    along = (np.asarray(found.draws) - MEAN) @ AXES
    assert_mean(along, np.zeros(2))
    assert_mean(along[:, 0] * along[:, 1], 0.0)
    levels = levels_on(EDM(30.0), "karras", n, (0.02, 30.0))
    assert_variance(along, [predicted_variance(METHODS[name], levels, v, monkeypatch) for v in VARIANCES])
    assert found.num_calls == n * {"edm_heun": 2, "edm_churn": 2, "predictor_corrector": 2, "annealed_langevin": 5}.get(
        name, 1
    )
    np.testing.assert_allclose(found.noise, levels.rho, rtol=1e-6)


def test_any_predictor_and_diffusion(monkeypatch):
    """Three Langevin steps after a step with memory, on the levels of another diffusion."""
    method = PredictorCorrector("ddim", num_corrector_steps=3, snr=0.3)
    found = diffuse(
        energy(normal_energy), 4, 4000, method=method, num_steps=8, sde=VE(0.05, 20.0), grid="log_snr",
        noise_range=(0.05, 20.0),
    )  # fmt: skip
    levels = levels_on(EDM(20.0), "log_snr", 8, (0.05, 20.0))
    along = (np.asarray(found.draws) - MEAN) @ AXES
    assert_variance(along, [predicted_variance(method, levels, v, monkeypatch) for v in VARIANCES])
    assert found.num_calls == 32


def test_corrected_chains_do_not_see_each_other():
    """A chain is the same to the last bit whatever the others are: no step size is a mean over the batch."""
    method, field = METHODS["predictor_corrector"], one_normal(0.5)
    plan = method.plan(levels_on(EDM(), "karras", 8, (0.1, 10.0)), field.end)
    plan = jax.tree.map(lambda v: jnp.asarray(v[3]), plan)
    u = jax.random.normal(jax.random.key(0), (6, 1))
    draws = [method.step(field, plan, v, jnp.zeros((0, 6, 1)), jax.random.key(1))[0] for v in (u, u.at[0].set(1e6))]
    np.testing.assert_array_equal(draws[0][1:], draws[1][1:])
    assert draws[0][0] != draws[1][0]


@pytest.mark.slow
def test_ends_of_the_flow_at_32_calls(x64, optimised):
    """Against the converged flow of eight mixtures, over all rows, those included that end in another mode."""
    bars = {"dpm++2m": 2e-2, "exp_ab3": 1e-2, "edm_heun": 6e-2, "ddim": 0.2}
    away = {method: [] for method in bars}
    for i in range(8):
        source = drawn_mixture(i)

        def ends(method, num_steps, grid="karras", source=source, key=i):
            found = diffuse(source, key, 1000, method=method, num_steps=num_steps, grid=grid, noise_range=(0.01, 40.0))
            return np.asarray(found.draws)

        converged = ends("exp_ab3", 400, "log_snr")
        for method in bars:
            found = ends(method, 16 if method == "edm_heun" else 32)
            away[method].append(np.sqrt(np.mean(np.sum((found - converged) ** 2, axis=-1))))
    for method, bar in bars.items():
        assert np.median(away[method]) < bar, (method, away[method])
    assert max(away["exp_ab3"]) < 2e-2, away["exp_ab3"]


def test_draws_of_a_mixture_at_32_calls(optimised):
    """SDE-DPM-Solver++ is within twice the distance of two exact samples."""
    source = energy(mixture, mixture_rows(4000))
    draws = diffuse(source, 5, 4000, method="sde_dpm++2m", noise_range=(0.01, 40.0)).draws
    floor = np.mean([sliced_w2(mixture_rows(4000, i), mixture_rows(4000, i + 1)) for i in range(1, 20, 2)])
    assert sliced_w2(draws, mixture_rows(4000, 99)) < 2 * floor


def test_nonlinear_diffusion():
    """Beneš's: dx = tanh(x) dt + dw from 0.7 has the density of a mixture of N(0.7 ± t, t) [Beneš 1981]."""
    share = 1 / (1 + np.exp(-1.4))

    def at(rng, n, t):
        return 0.7 + t * np.where(rng.uniform(size=n) < share, 1, -1) + np.sqrt(t) * rng.normal(size=n)

    def score(x, t):
        return jax.grad(lambda x: jnp.sum(jnp.log(jnp.cosh(x)) - (x - 0.7) ** 2 / (2 * t)))(x)

    x = at(np.random.default_rng(0), 4000, 3.0)[:, None]
    times = np.linspace(3.0, 0.5, 201)
    found = reverse_sde(lambda x, t: jnp.tanh(x), lambda t: 1.0, score, 0, x, times)
    with counted_compilations() as compiled:  # nor for functions that are new and the same
        shown = reverse_sde(lambda x, t: jnp.tanh(x), lambda t: 1.0, score, 0, x, times, progress_bar=True)
    assert len(compiled) == 0
    np.testing.assert_array_equal(shown, found)

    def cdf(x):
        return share * stats.norm.cdf(x, 1.2, 0.5**0.5) + (1 - share) * stats.norm.cdf(x, 0.2, 0.5**0.5)

    assert stats.kstest(np.asarray(found[:, 0]), cdf).pvalue > 1e-3
    assert stats.kstest(x[:, 0], cdf).pvalue < 1e-9  # the law has changed
