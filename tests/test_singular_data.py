"""Data that are constant in a direction, and densities that are rounded more coarsely than their dtype."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import improper
from numpyro import handlers

from numpyro_score import DSM, FSM, ISM, Energy, KLContraction, SandwichError, ScoreMatching
from numpyro_score.losses.rounding import density_noise

X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
CONSTANT = X.copy()
CONSTANT[:, 1] = 0.7


def gaussian(x, mask=True, columns=(0, 1, 2)):
    k = numpyro.param("k", jnp.ones(3))
    with numpyro.plate("rows", len(x)), handlers.mask(mask=mask):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((k * x**2)[..., list(columns)], axis=-1))


def told(loss, x, **settings):
    """What the loss says of the data."""
    energy = Energy(gaussian, {"k": jnp.ones(3)}, jnp.asarray(x), **settings)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loss.check(energy)
    return [str(w.message) for w in found]


@pytest.mark.parametrize("loss", [FSM(), KLContraction(0.01)], ids=lambda loss: type(loss).__name__)
def test_constant_columns_are_told(loss):
    """By name, once; not if the density leaves the column out, nor where rows that count differ."""
    (message,) = told(loss, CONSTANT)
    assert "constant in x[1]:" in message and type(loss).__name__ in message
    assert not told(loss, X)
    assert not told(loss, CONSTANT, columns=(0, 2))
    masked = CONSTANT.copy()
    masked[7, 1] = 5.0
    assert told(loss, masked, mask=jnp.arange(50) != 7)
    assert not told(loss, masked)


@pytest.mark.parametrize("loss", [FSM(), KLContraction(0.01)], ids=lambda loss: type(loss).__name__)
def test_columns_that_follow_from_others_are_told(loss):
    """Sums that are constant but for rounding, as of shares, by the columns in them; not what is merely close."""
    x = CONSTANT.copy()
    x[:, 1] = 1 - 2 * x[:, 0]
    (message,) = told(loss, x)
    assert "One of x[0], x[1] follows from the others: " in message and type(loss).__name__ in message
    assert not told(loss, x, columns=(0, 2))
    x[:, 1] += 1e-2 * X[:, 1]
    assert not told(loss, x)
    assert not told(loss, X[:3])  # three rows of three columns: some sum is always constant


def test_noise_may_stand_for_the_width_that_is_missing():
    """DSM, and FSM with a noise level, fit the law of data and noise, which has a density."""
    assert not hasattr(DSM(0.1), "check")
    assert not told(FSM(sigma=0.1), CONSTANT)


def network(bits):
    """A network whose products have factors of so many bits after the leading one: 10 as of TF32, 7 as of bfloat16."""
    rng = np.random.default_rng(1)
    shapes = (3, 32), (32, 32), (32, 1)
    layers = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5) for s in shapes]

    def cut(x):
        return jax.lax.reduce_precision(x, 8, bits) if bits else x

    def model(x):
        numpyro.param("k", jnp.ones(3))
        with numpyro.plate("rows", len(x)):
            x = h = numpyro.sample("x", improper(3), obs=x)
            for layer in layers[:-1]:
                h = jax.nn.swish(cut(h) @ cut(layer.astype(x.dtype)))
            last = (cut(h) @ cut(layers[-1].astype(x.dtype)))[:, 0]
            numpyro.factor("energy", last - 0.5 * jnp.sum(x**2, axis=-1))

    return model


@pytest.mark.parametrize(("bits", "least", "most"), [(10, 3e-5, 1e-3), (7, 2e-4, 1e-2), (None, 1e-8, 5e-7)])
def test_rounding_of_the_density_is_measured(bits, least, most):
    """Of factors of b bits, of size one, about 2^-b of their products; of single precision as it is, 2^-24 or so.

    The default step follows, and only shorter ones are told of it: the first was the default in single precision.
    """
    energy = Energy(network(bits), {"k": jnp.ones(3)}, jnp.asarray(X))
    assert least < density_noise(energy, energy.data, energy.data.std(axis=0)) < most
    FSM().check(energy)  # warnings are errors
    FSM(sigma=0.3).check(energy)
    for loss in (FSM(0.02), FSM(sigma=0.3, epsilon=1e-4)):
        if bits is None:
            loss.check(energy)
            continue
        with pytest.raises((ValueError, UserWarning), match="seems to be rounded to about"):
            loss.check(energy)


def test_rounding_in_double_precision(x64):
    energy = Energy(network(None), {"k": jnp.ones(3)}, jnp.asarray(X, float))
    assert density_noise(energy, energy.data, energy.data.std(axis=0)) < 1e-14
    FSM().check(energy)


def test_laws_of_numpyro_are_rounded_as_their_dtype():
    """A likelihood of far rows, whose terms are large beside what varies, is not taken for a coarse one."""

    def model(x):
        mu = numpyro.param("k", 0.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.StudentT(3.0, mu, 1.0), obs=x)

    FSM().check(Energy(model, {"k": 0.0}, jnp.asarray(X[:, 0] * 20)))


@pytest.mark.filterwarnings("ignore:The loss was still falling")
def test_why_there_is_no_minimum_is_told():
    """Under ISM a constant column lets a precision grow without end, which the errors say."""
    fit = ScoreMatching(precisions, loss=ISM(), num_steps=20, optim=optax.adam(0.05))
    fit = fit.run(jax.random.key(0), jnp.asarray(CONSTANT), progress_bar=False)
    with pytest.raises(SandwichError, match=r"The data are constant in x\[1\], so that there may be no minimum"):
        fit.stderr()


def precisions(x):
    a, mu = numpyro.param("a", jnp.ones(3)), numpyro.param("mu", jnp.zeros(3))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(a * (x - mu) ** 2, axis=-1))
