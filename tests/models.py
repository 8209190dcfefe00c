"""Models and comparisons that several test files share."""

import contextlib
import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import Energy
from numpyro_score.inference import loop
from numpyro_score.kernels import langevin_chains, mala_chains

# Compiles in half the time, where the compiled function runs once.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
K = np.array([[2.0, 0.7, -0.4], [0.7, 1.5, 0.3], [-0.4, 0.3, 1.0]])
RUGGED = {"K": K, "a": np.array([0.1, 0.3, 0.2])}


# Conditions in text are looked at when the test is to run, in the test's module, which imports jax.
two_devices = pytest.mark.skipif("jax.device_count() < 2", reason="needs two devices, which conftest.py makes of a CPU")
only_on_cpus = pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="is about programs for CPUs")


def stop_after(monkeypatch, calls):
    """Ctrl-C between two calls of the device, each of at most 32 steps."""
    left = iter(range(calls))

    def next_size(n, seconds):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 32

    monkeypatch.setattr(loop, "next_size", next_size)


@functools.cache
def load_script(name):
    """A script of `examples/` as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def counted_compilations():
    """Yields a list that grows by one with every program that XLA compiles."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def improper(*event_shape):
    """A data site without a density of its own, for real values of any event shape."""
    return dist.ImproperUniform(constraints.independent(constraints.real, len(event_shape)), (), event_shape)


@functools.cache
def density(f):
    """A model of rows x with the parameter site 'theta' and the factor `f(theta, x)`."""

    def model(x):
        theta = numpyro.param("theta")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(*x.shape[1:]), obs=x)
            numpyro.factor("energy", f(theta, x))

    return model


def energy_of(f, theta, x):
    """The energy of :func:`density`; equal functions share compiled code."""
    return Energy(density(f), {"theta": theta}, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values(loss, f, theta, x):
    """The loss of each row."""
    return loss(energy_of(f, theta, x), jax.random.key(0))


def quadratic(k, x):
    return -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x)


def rugged(t, x):
    """A density with odd and even terms and couplings, log-concave only in part."""
    return quadratic(t["K"], x) - (x**4) @ t["a"] + jnp.sin(2 * x[:, 0] * x[:, -1])


def gaussian(x, batch=None):
    """N(mu, I/tau) of rows (N, D), with a flat prior on mu. `batch` rows at a time, if given."""
    mu = numpyro.sample("mu", improper())
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x = numpyro.sample("x", improper(x.shape[-1]), obs=numpyro.subsample(x, event_dim=1))
        numpyro.factor("energy", -0.5 * tau * jnp.sum((x - mu) ** 2, axis=-1))


def assert_sites_close(actual, expected, **tolerance):
    """The same sites, with values close to each other."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, err_msg=name, **tolerance)


def assert_mean(draws, expected, errors=5.0):
    """The mean of independent draws is the expected one, within 5 standard errors.

    That fails by chance in 6e-7 of comparisons.
    """
    draws = np.asarray(draws, np.float64)
    standard_error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    np.testing.assert_array_less(
        np.abs(draws.mean(0) - expected), errors * standard_error + 1e-9 * (1 + np.abs(expected))
    )


def assert_variance(draws, expected, errors=5.0):
    """The variance of independent draws, within 5 standard errors from their fourth moment."""
    draws = np.asarray(draws, np.float64)
    squares = (draws - draws.mean(0)) ** 2
    assert_mean(squares * len(draws) / (len(draws) - 1), expected, errors)


@dataclasses.dataclass(frozen=True)
class Langevin:
    """A kernel of losses with chains."""

    step_size: float
    adjusted: bool = True

    def chains(self, log_density):
        return (mala_chains if self.adjusted else langevin_chains)(log_density, self.step_size)
