"""`diffuse` as it is called: its arguments, its errors, and what it compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from diffusions import ROWS, energy, normal_energy, one_normal, predicted_variance
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import counted_compilations, improper, two_devices
from numpyro.distributions import constraints

from numpyro_score import (
    DSM,
    EDM,
    VE,
    VP,
    EDMHeun,
    Energy,
    PredictorCorrector,
    ScoreMatching,
    diffuse,
    reverse_sde,
    score_factor,
)
from numpyro_score.diffusion.chains import advance, start
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.methods import METHODS
from numpyro_score.diffusion.samplers import Field, field_of
from numpyro_score.diffusion.source import noisy_model

RANGE = (0.02, 30.0)
run = functools.partial(diffuse, rng_key=0, num_samples=8, noise_range=RANGE, num_steps=4)


def learned(x, sigma=1.0):
    """A normal law with noise, of one parameter."""
    variance = numpyro.param("variance", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, axis=-1) / (variance + sigma**2))


@pytest.fixture(scope="module")
def fit():
    x = 0.5 * jax.random.normal(jax.random.key(0), (200, 2))
    return ScoreMatching(learned, loss=DSM((3.0, 1.0, 0.3, 0.1)), num_steps=300).run(
        jax.random.key(1), x, progress_bar=False
    )


def test_a_fit_knows_its_levels(fit):
    """A fit is sampled at the levels that it has seen, as far as the diffusion reaches."""
    found = diffuse(fit, jax.random.key(0), 4000)
    assert found.draws.std() == pytest.approx(0.51, rel=0.08)  # with the smallest noise
    assert found.noise[[0, -1]] == pytest.approx([3.0, 0.1])
    assert diffuse(fit, 0, 4, sde=VE(0.2, 2.0)).noise[[0, -1]] == pytest.approx([2.0, 0.2])
    with pytest.raises(
        ValueError, match=r"noise_range goes from 0.01 to 3, but the fit has seen 0.1 to 3: stay within"
    ):
        diffuse(fit, 0, 4, noise_range=(0.01, 3.0))
    with pytest.raises(ValueError, match=r"fit has seen noise levels from 0.1 to 3, and sigma/alpha .* from 5 to 50"):
        diffuse(fit, 0, 4, sde=VE(5.0, 50.0))


def test_other_values_compile_nothing():
    """Parameters, number of data, keys, levels, and settings are inputs of one program; nor does a bar need another."""
    sources = [
        Energy(learned, {"variance": v}, jnp.ones((n, 2)) * jnp.arange(n)[:, None])
        for v, n in ((1.0, 5), (2.0, 5), (3.0, 7))
    ]
    for method in (METHODS["edm_churn"], PredictorCorrector("dpm++2m", snr=0.1)):
        run(sources[0], method=method)
    run(sources[2], method="ddim")  # reads data of another length
    with counted_compilations() as compiled:
        draws = [run(s, rng_key=i, method="edm_churn", progress_bar=i == 1).draws for i, s in enumerate(sources)]
        draws.append(run(sources[1], method=PredictorCorrector("dpm++2m", snr=0.2), noise_range=(0.1, 20.0)).draws)
    assert len(compiled) == 0
    assert len({float(d[0, 0]) for d in draws}) == 4


def test_bar_and_chunks_change_nothing(capsys):
    """The numbers are those of one call, to the last bit."""
    one, two = (
        run(energy(normal_energy), method="euler_maruyama", num_steps=20, progress_bar=bar) for bar in (False, True)
    )
    np.testing.assert_array_equal(one.draws, two.draws)
    assert "20/20" in capsys.readouterr().err


def test_shards_and_vmap():
    """Chains spread over devices are those of one device; keys may be mapped over."""
    source = energy(normal_energy)
    devices = NamedSharding(Mesh(np.array(jax.devices()), ("chains",)), PartitionSpec("chains"))
    one, two = (run(source, method="sde_dpm++2m", sharding=s) for s in (None, devices))
    assert two.draws.sharding.is_equivalent_to(devices, 2)
    np.testing.assert_allclose(two.draws, one.draws, rtol=1e-5)
    keys = jax.random.split(jax.random.key(1), 3)
    mapped = jax.vmap(lambda key: run(source, rng_key=key, method="sde_dpm++2m").draws)(keys)
    jitted = jax.jit(lambda key: run(source, rng_key=key, method="sde_dpm++2m", sde=VP(), grid="karras").draws)(keys[2])
    for found in (mapped[2], jitted):
        np.testing.assert_allclose(found, run(source, rng_key=keys[2], method="sde_dpm++2m").draws, rtol=1e-5)


def test_trajectory_and_last_denoising():
    """All levels from the end law to the draws; the mean of the data given these."""
    found = run(energy(normal_energy), num_samples=4000, num_steps=None, trajectory=True, grid=[30.0, 3.0, 0.3, 0.1])
    assert found.trajectory.shape == (4, 4000, 2)
    assert found.noise.tolist() == [30.0, 3.0, 0.3, 0.1]
    np.testing.assert_array_equal(found.trajectory[-1], found.draws)
    assert repr(found) == "Diffused: 4000 draws of 3 calls each, noise 30 to 0.1"
    assert np.std(found.trajectory[0]) == pytest.approx(30.0, rel=0.1)
    denoised = run(energy(normal_energy), num_samples=4000, num_steps=None, denoise=True, grid=[30.0, 3.0, 0.3, 0.1])
    assert denoised.num_calls == 4
    mean, covariance = ROWS.mean(0), np.cov(ROWS.T, ddof=0)
    expected = mean + (found.draws - mean) @ np.linalg.inv(covariance + 0.01 * np.eye(2)) @ covariance
    np.testing.assert_allclose(denoised.draws, expected, atol=1e-4)


def test_calls_are_counted():
    """As many evaluations as the result says."""
    seen = []

    def counted(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            jax.debug.callback(lambda s: seen.append(s), jnp.mean(jnp.asarray(sigma)))
            score_factor("score", x, -x / (1 + jnp.asarray(sigma)[..., None] ** 2))

    for method in ("ddim", "edm_heun", PredictorCorrector("exp_ab3", 2)):
        source = energy(counted)
        jax.effects_barrier()
        before = len(seen)
        found = run(source, method=method, num_steps=5)
        jax.effects_barrier()
        assert found.num_calls == {"ddim": 5, "edm_heun": 10}.get(method, 15)
        levels = np.array(seen[before:])
        # Reading the model for the data is at its default, sigma=1.
        assert np.sum(levels != 1.0) == found.num_calls


def two_sites(a, b, sigma=1.0):
    with numpyro.plate("rows", len(b)):
        a = numpyro.sample("a", improper(), obs=a)
        b = numpyro.sample("b", improper(2, 3), obs=b)
        numpyro.factor("energy", -0.5 * (a**2 + jnp.sum(b**2, axis=(-2, -1))) / (1 + sigma**2))


def picture(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2, 3), obs=x)
        score_factor("score", x, -x / (1 + jnp.reshape(sigma, (-1, 1, 1)) ** 2), event_dim=2)


def one_point(x, sigma=1.0):
    x = numpyro.sample("x", improper(2, 3), obs=x)
    numpyro.factor("energy", -0.5 * jnp.sum(x**2) / (1 + jnp.mean(jnp.asarray(sigma)) ** 2))


@pytest.mark.parametrize("model, data", [(two_sites, 2), (picture, 1), (one_point, 0)])
def test_data_of_any_form(model, data):
    """Draws have the data's own form, and a spread of 1."""
    x = jax.random.normal(jax.random.key(0), (5, 2, 3))
    args = ((x[:, 0, 0], x), (x,), (x[0],))[2 - data]
    draws = run(Energy(model, {}, *args), num_samples=4000, num_steps=16).draws
    b = draws["b"] if model is two_sites else draws
    assert b.shape == (4000, 2, 3)
    np.testing.assert_allclose(b.std(0), 1.0, atol=0.06)
    if model is two_sites:
        assert draws["a"].shape == (4000,)


def bounded(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", numpyro.distributions.Exponential(1.0 + 0 * jnp.asarray(sigma)), obs=x)


def plain(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", numpyro.distributions.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)


@pytest.mark.parametrize(
    "source, options, message",
    [
        (lambda: energy(plain), {}, r"takes no keyword 'sigma': write def model\(x, sigma=1.0\)"),
        (lambda: Energy(bounded, {}, jnp.ones(3)), {}, r"diffuse"),
        (lambda: energy(normal_energy), {"noise_range": None}, r"write noise_range=\(smallest, largest\)"),
        (lambda: energy(normal_energy), {"noise_range": (3.0, 1.0)}, r"the largest is 1: write \(1, 3\)"),
        (lambda: energy(normal_energy), {"noise_range": (0.0, 1.0)}, r"noise_range=\(smallest, largest\) of positive"),
        (lambda: energy(normal_energy), {"noise_range": (True, 5)}, r"needs numbers as noise_range.*got \(True, 5\)"),
        (lambda: energy(normal_energy), {"noise_range": "ab"}, r"needs numbers as noise_range"),
        (lambda: energy(normal_energy), {"grid": ["a", "b"]}, r"diffuse needs numbers as grid"),
        (lambda: energy(normal_energy), {"grid": [[3.0, 2.0], [1.0]]}, r"diffuse needs one array of numbers as grid"),
        (lambda: energy(normal_energy), {"grid": [3.0, 2.0, 1.0]}, r"num_steps=4 and a grid of 3 levels.*leave num_st"),
        (
            lambda: energy(normal_energy),
            {"num_steps": 1, "method": "dpm++2m"},
            r"'dpm\+\+2m' extrapolates from 1 step .*is 1 step in all",
        ),
        (lambda: energy(normal_energy), {"num_steps": 2, "method": "exp_ab3"}, r"take 3 or more, or .* 'ddim'"),
        (lambda: energy(normal_energy), {"denoise": "no"}, r"needs True or False as denoise, got 'no'"),
        (lambda: energy(normal_energy), {"trajectory": 3}, r"needs True or False as trajectory, got 3"),
        (lambda: energy(normal_energy), {"progress_bar": "x"}, r"needs True or False as progress_bar, got 'x'"),
        (lambda: energy(normal_energy), {"sharding": 2}, r"needs a sharding such as NamedSharding"),
        (lambda: energy(normal_energy), {"num_samples": 8.0}, r"needs an integer as num_samples"),
        (lambda: energy(normal_energy), {"sde": VE(0.1, 20.0)}, r"but sigma/alpha of the SDE goes from 0.1 to 20"),
        (lambda: energy(normal_energy), {"method": "heun"}, r"no diffusion method 'heun': use one of 'ddim'"),
        (lambda: energy(normal_energy), {"sde": VP}, r"a diffusion such as sde=VP\(\), got <class"),
        (lambda: energy(normal_energy), {"grid": "linear"}, r"no grid 'linear': use 'karras'"),
        (lambda: energy(normal_energy), {"grid": [1.0, 2.0]}, r"levels that fall"),
        (lambda: energy(normal_energy), {"grid": [50.0, 2.0]}, r"lie beyond 0.02 to 30"),
        (lambda: energy(normal_energy), {"num_steps": 0}, r"num_steps of at least 1"),
        (lambda: energy(normal_energy), {"rng_key": None}, r"write diffuse\(fit, jax.random.key\(0\), 1000\)"),
        (
            lambda: energy(normal_energy),
            {"grid": "uniform", "sde": VP(), "num_steps": 32, "method": "dpm++2m"},
            r"'dpm\+\+2m' extrapolates from the steps before, and step 31 .* write grid='karras' or 'log_snr'",
        ),
        (lambda: energy(normal_energy, np.full((3, 2), np.nan)), {}, r"Data 'x' have NaN or infinity in rows 0, 1, 2"),
    ],
)
def test_bad_input(source, options, message, unchecked):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        run(source(), **options)


@pytest.mark.parametrize("num_steps", [3, 5, 64])
def test_usual_grids_are_not_refused(num_steps, x64):
    """The rule for methods with memory is quiet where they are good, ten thousandfold ranges included."""
    for grid in ("karras", "log_snr"):
        METHODS["exp_ab3"].plan(levels_on(EDM(), grid, num_steps, (0.002, 80.0)), one_normal(1.0).end)


def test_settings_of_methods(unchecked):
    """Are checked where they are given."""
    for build, message in (
        (lambda: EDMHeun(churn=-1.0), r"EDMHeun needs a positive churn, or 0 for none, got -1"),
        (lambda: EDMHeun(churn_range=(1.0, 0.1)), r"churn_range=\(low, high\) of rising"),
        (lambda: PredictorCorrector("corrector"), r"no diffusion method 'corrector'"),
        (lambda: PredictorCorrector(snr=0.0), r"PredictorCorrector needs a positive snr, got 0"),
        (lambda: PredictorCorrector(snr=1.0), r"snr below 1, got 1.0: .* stable below 2 ρ².* take 0.1 to 0.3"),
        (lambda: EDMHeun(1.0, "ab"), r"EDMHeun needs numbers as churn_range"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            build()
    assert repr(PredictorCorrector("ddim", jnp.array(2))) == (
        "PredictorCorrector(predictor='ddim', num_corrector_steps=2, snr=0.16)"
    )


@pytest.mark.parametrize("snr", [0.3, 0.9])
def test_langevin_steps_widen_noise_as_stated(snr, monkeypatch):
    """Of data of no variance, whose curvature is that of the noise: ρ²/(1 − snr²), and beyond snr = 1 nothing stays."""
    levels = levels_on(EDM(2.0), np.geomspace(1.001, 1.0, 400), 1, (0.5, 2.0))
    found = predicted_variance(PredictorCorrector(None, 5, snr), levels, 0.0, monkeypatch)
    assert found == pytest.approx(1 / (1 - snr**2), rel=1e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drift": lambda x, t: x[:, 0]}, r"drift gave shape \(4,\) for rows of shape \(4, 2\)"),
        ({"score": lambda x, t: x[:, :1]}, r"score gave shape \(4, 1\) for rows of shape \(4, 2\)"),
        ({"diffusion": lambda t: jnp.ones((4, 1))}, r"diffusion gave shape \(4, 1\): .* each coordinate, \(2,\)"),
        ({"diffusion": lambda t: jnp.eye(2)}, r"diffusion gave shape \(2, 2\)"),
        ({"diffusion": 2.0}, r"needs a function as diffusion, got 2.0: write e.g. lambda t: 2.0"),
        ({"times": ["a", "b"]}, r"reverse_sde needs numbers as times"),
        ({"x": jnp.ones((4, 2), jnp.bfloat16)}, r"'x' holds bfloat16 values"),
        ({"x": np.full((4, 2), np.nan)}, r"rows 0, 1, 2, 3 .* with NaN"),
        ({"progress_bar": "x"}, r"needs True or False as progress_bar"),
    ],
)
def test_bad_input_of_reverse_sde(options, message, unchecked):
    minus = lambda x, t: -x  # noqa: E731
    good = {"drift": minus, "diffusion": jnp.ones_like, "score": minus, "x": np.ones((4, 2)), "times": [1.0, 0.5]}
    with pytest.raises((TypeError, ValueError), match=message):
        reverse_sde(rng_key=0, **(good | options))


@two_devices
def test_chains_that_cannot_be_split(unchecked):
    """The number of chains is named."""
    devices = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("chains",)), PartitionSpec("chains"))
    with pytest.raises(ValueError, match=r"num_samples=101 chains evenly over the 2 devices.* multiple of 2"):
        run(energy(normal_energy), num_samples=101, sharding=devices)


def test_little_noise_is_suspected():
    """Chains start from a normal law."""
    with pytest.warns(
        UserWarning, match=r"largest noise level of diffuse, 1, is less than twice the data's standard deviation of"
    ):
        run(energy(normal_energy), noise_range=(0.02, 1.0))


def test_not_a_number_is_named():
    """The first step and the chains; where keys are traced the draws are NaN."""

    def torn(x, sigma=1.0):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            sigma = jnp.asarray(sigma)[..., None]
            hole = (x[:, :1] > 0) & (sigma < 1.0)
            score_factor("score", x, jnp.where(hole, jnp.nan, -x / (1 + sigma**2)))

    source = energy(torn)
    options = dict(grid=[30.0, 3.0, 0.5, 0.1], num_steps=3, num_samples=100)
    with pytest.raises(FloatingPointError, match=r"chains of 100 did not stay finite.* in step 2 of 3, from noise 0.5"):
        run(source, **options)
    draws = jax.vmap(lambda key: run(source, rng_key=key, **options).draws)(jax.random.split(jax.random.key(0), 2))
    assert 0.2 < np.isnan(draws).any(-1).mean() < 0.8
    with pytest.raises(
        FloatingPointError,
        match=r"3 chains of 3 did not stay finite, the first of them chain 0 in step 1 of 2, from time 0.5",
    ):
        reverse_sde(lambda x, t: x, lambda t: 1.0, lambda x, t: x / (t - 0.5), 0, jnp.ones((3, 1)), [1.0, 0.5, 0.0])


@pytest.mark.parametrize("kind", ["energy", "score"])
def test_no_more_arithmetic_than_by_hand(kind, optimised):
    """One step of a network's sampler against the network alone in the same loop."""
    sizes = [(17, 64), (64, 64), (64, 1 if kind == "energy" else 16)]
    weights = [jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, s in enumerate(sizes)]

    def network(weights, x, sigma):
        h = jnp.concatenate([x, jnp.log(sigma)[:, None]], axis=-1)
        for w in weights[:-1]:
            h = jax.nn.silu(h @ w)
        return h @ weights[-1]

    def model(x, sigma=1.0):
        weights = numpyro.param("weights")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(16), obs=x)
            found = network(weights, x, jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1]))
            if kind == "energy":
                numpyro.factor("energy", found[:, 0])
            else:
                score_factor("score", x, found)

    @jax.tree_util.register_pytree_node_class
    class ByHand:
        def __init__(self, weights):
            self.weights = weights

        def score(self, u, rho):
            sigma = jnp.full(len(u), rho)
            if kind == "score":
                return network(self.weights, u, sigma)
            return jax.grad(lambda u: jnp.sum(network(self.weights, u, sigma)))(u)

        def tree_flatten(self):
            return (self.weights,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    field = field_of(noisy_model("diffuse", Energy(model, {"weights": weights}, jnp.eye(20, 16))))
    u = jnp.zeros((64, 16))

    plan = jax.tree.map(
        jnp.asarray, METHODS["euler_maruyama"].plan(levels_on(EDM(), "karras", 4, (0.1, 10.0)), field.end)
    )
    counts = []
    for f in (field, Field(ByHand(weights), field.end)):
        program = jax.jit(advance, static_argnums=0).lower(
            METHODS["euler_maruyama"].step, f, plan, jax.random.key(0), start(u), 0, 4
        )
        counts.append(program.compile().cost_analysis()["flops"])
    assert 0.9 < counts[0] / counts[1] < 1.01
