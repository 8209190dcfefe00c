"""Models that read globals, as in notebooks: what they read now counts, not what they read when first compiled."""

from __future__ import annotations

import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import Energy, ScoreMatching, diffuse, flow_log_prob, log_partition, posterior, sample
from numpyro_score.closures import Keyed, outside_values

FLAT = dist.ImproperUniform(constraints.real, (), ())
KEY = jax.random.key(0)
scale, shift, rows, settings = 1.0, 0.0, np.zeros(1), {"scale": 1.0}


def square(y: Any) -> Any:
    return (y - shift) ** 2


def model() -> None:
    """Of data, a number and a function that are none of its arguments."""
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("rows", len(rows)):
        x = numpyro.sample("x", FLAT, obs=rows)
        numpyro.factor("energy", -0.5 * square(x - mu) / scale**2)


def noisy(x: Any, sigma: Any = 1.0) -> None:
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * square(x) / (scale**2 + sigma**2))


@pytest.fixture(autouse=True)
def set_globals(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **values: [monkeypatch.setitem(globals(), k, v) for k, v in values.items()]


@pytest.mark.parametrize("same_object", [False, True])
def test_a_fit_is_of_the_data_that_are_there(same_object: bool, set_globals: Any) -> None:
    """Estimates, errors and influences of a mean, by a new ScoreMatching and by the same one; also changed in place."""
    rng, sm = np.random.default_rng(0), ScoreMatching(model)
    x = np.zeros(200)
    for spread, offset in ((1.0, 0.0), (3.0, 5.0)):
        x[:] = offset + spread * rng.normal(size=200)
        set_globals(rows=x, scale=spread, shift=0.5)
        fit = (sm if same_object else ScoreMatching(model)).run(KEY, progress_bar=False)
        np.testing.assert_allclose(fit.estimates["mu"], x.mean() - 0.5, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fit.stderr()["mu"], x.std(ddof=1) / 200**0.5, rtol=1e-4)
        np.testing.assert_allclose(np.sum(fit.influence()["mu"] ** 2) ** 0.5, x.std(ddof=1) / 200**0.5, rtol=1e-4)


def test_what_energies_are_asked_follows(set_globals: Any) -> None:
    """log Z, draws of chains and of a diffusion, and log densities by the flow, of N(0, scale²)."""
    for value in (1.0, 4.0):
        set_globals(scale=value)
        energy = Energy(noisy, {}, jnp.array([-value, value]), sigma=1e-3)
        expected = 0.5 * np.log(2 * np.pi * value**2)
        np.testing.assert_allclose(log_partition(energy).value, expected, rtol=1e-4)
        np.testing.assert_allclose(sample(energy, KEY, 500)["posterior"]["x"].values.std(), value, rtol=0.15)
        levels = Energy(noisy, {}, jnp.array([-value, value]))
        np.testing.assert_allclose(
            flow_log_prob(levels, jnp.zeros(1), noise_range=(1e-2, 100.0)).value, [-expected], atol=1e-3
        )
        draws = diffuse(levels, KEY, 2000, noise_range=(1e-2, 100.0)).draws
        np.testing.assert_allclose(draws.std(), value, rtol=0.08)


def observed(x: Any) -> None:
    numpyro.sample("y", dist.Normal(x, 0.5), obs=shift)


class Observed:
    def __init__(self, y: float) -> None:
        self.y = y

    def __call__(self, x: Any) -> None:
        numpyro.sample("y", dist.Normal(x, 0.5), obs=self.y)


def test_posteriors_are_of_the_observation_that_is_there(set_globals: Any) -> None:
    """A number of the module, and an attribute of a callable object: mean 0.8 y."""

    def prior(x: Any, sigma: Any = 1.0) -> None:
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))

    energy, given = Energy(prior, {}, jnp.array([-1.0, 1.0])), Observed(0.0)
    for y in (2.0, -2.0):
        set_globals(shift=y)
        given.y = y
        for observation in (observed, given):
            found = posterior(energy, observation, KEY, noise_range=(0.01, 20.0))
            np.testing.assert_allclose(np.exp(found.log_weights) @ np.asarray(found.draws), 0.8 * y, atol=0.05)


def reads_a_dict() -> float:
    return settings["scale"]


def test_keys_tell_what_changed(set_globals: Any) -> None:
    """By value for numbers and dicts, by content for arrays, through helpers, partials, methods and attributes."""
    array, given = np.arange(5.0), Observed(1.0)

    def closes_over() -> Any:
        return array.sum()

    functions = {
        "global": model,
        "helper": noisy,
        "dict": reads_a_dict,
        "array": closes_over,
        "object": given,
        "method": given.__call__,
        "partial": functools.partial(model),
    }
    before = {k: Keyed(f) for k, f in functions.items()}
    assert all(Keyed(f) == before[k] and hash(Keyed(f)) == hash(before[k]) for k, f in functions.items())
    set_globals(shift=0.25)
    assert {k for k, f in functions.items() if Keyed(f) != before[k]} == {"global", "helper", "partial"}
    set_globals(shift=0.0, settings={"scale": 2.0})
    assert {k for k, f in functions.items() if Keyed(f) != before[k]} == {"dict"}
    set_globals(settings={"scale": 1.0})
    array[2] = 7.0
    given.y = 2.0
    assert {k for k, f in functions.items() if Keyed(f) != before[k]} == {"array", "object", "method"}


def test_keys_of_odd_functions() -> None:
    """A function that names itself, one of a library, a class, a builtin, and NaN, which is no other number."""

    def itself(n: int) -> int:
        return itself(n - 1) if n else 0

    nan = float("nan")
    for f in (itself, jnp.sum, Observed, len, lambda: nan, np.sin, dist.Normal):
        assert outside_values(f) == outside_values(f)
        hash(outside_values(f))


class Settings:
    power = 2


HOLDERS = {"namespace": types.SimpleNamespace(power=2), "class": Settings, "object": Settings()}


def powers(held: Any) -> Any:
    """A law e^(−k|x|^p), whose p is an attribute of an object."""

    def powers(x: Any) -> None:
        k = numpyro.param("k", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", FLAT, obs=x)
            numpyro.factor("energy", -k * x**held.power)

    return powers


def log_z(p: float, k: float = 1.0) -> float:
    return math.log(2 * math.gamma(1 + 1 / p)) - math.log(k) / p


@pytest.mark.parametrize("name", HOLDERS)
def test_attributes_of_objects_count(name: str) -> None:
    """Of log Z of an energy that was there before p changed."""
    held: Any = HOLDERS[name]
    held.power = 2
    model = powers(held)
    energy, before = Energy(model, {"k": 1.0}, np.linspace(-1, 1, 20)), Keyed(model)
    for held.power in (2, 8):
        np.testing.assert_allclose(log_partition(energy).value, log_z(held.power), rtol=1e-4)
    assert Keyed(model) != before


@pytest.mark.filterwarnings("ignore:The largest R-hat", "ignore:.*transitions diverged")
def test_fits_and_draws_follow_attributes() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 400).astype(np.float32)
    held = Settings()
    model = powers(held)
    for held.power in (2, 8):
        p, fit = held.power, ScoreMatching(model).run(KEY, x, progress_bar=False)
        k = float(fit.estimates["k"])
        np.testing.assert_allclose(k, np.sum((p - 1) * x ** (p - 2)) / np.sum(p * x ** (2 * p - 2)), rtol=1e-3)
        np.testing.assert_allclose(log_partition(fit).value, log_z(p, k), rtol=1e-4)
        draws = sample(fit, KEY, 1000)["posterior"]["x"].values
        np.testing.assert_allclose(np.mean(np.abs(draws) ** p), 1 / (p * k), rtol=0.15)
