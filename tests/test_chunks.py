"""Sums of losses over rows: in chunks, masked and scaled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import FAST_COMPILE, RUGGED, assert_mean, density, energy_of, improper, rugged, values
from numpyro import handlers

from numpyro_score import ISM, SSM, Energy
from numpyro_score.losses import chunks, row_losses, total_loss

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class InChunks:
    """ISM, at most `rows` rows at a time."""

    rows: int | None

    def __call__(self, energy, rng_key):
        return ISM()(energy, rng_key)

    def rows_per_chunk(self, energy):
        return self.rows


MANY = np.random.default_rng(6).normal(size=(13, 3))
KEY_DATA = np.array([0, 7], np.uint32)


def everything(loss, theta, x):
    """A total and all that is asked of it: derivatives, mapped and in the data."""
    key = jax.random.wrap_key_data(KEY_DATA)

    def total(theta, x=x):
        return total_loss(loss, energy_of(rugged, theta, x), key)

    def reverse(theta):
        return jax.value_and_grad(total, argnums=(0, 1))(theta, x)

    direction = jax.tree.map(jnp.ones_like, theta)
    scaled = jax.tree.map(lambda v: jnp.multiply.outer(jnp.array([0.5, 2.0]), v), theta)
    return {
        "value": total(theta),
        "rows": row_losses(loss, energy_of(rugged, theta, x), key),
        "gradient in both, and Hessian times vector": jax.jvp(reverse, (theta,), (direction,)),
        "forward": jax.jacfwd(total)(theta),
        "mapped": jax.vmap(jax.value_and_grad(total))(scaled),
    }


@functools.cache
def all_at_once():
    return jax.jit(functools.partial(everything, InChunks(None)), compiler_options=FAST_COMPILE)(RUGGED, MANY)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_change_nothing(rows):
    """In chunks, one of them of what is left over, value and derivatives are those of all rows at once."""
    whole = all_at_once()
    of = jax.jit(functools.partial(everything, InChunks(rows)), compiler_options=FAST_COMPILE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), of(RUGGED, MANY), whole)
    exact = values(ISM(), rugged, RUGGED, MANY)
    np.testing.assert_allclose(whole["rows"][0], exact, rtol=1e-12)
    np.testing.assert_allclose(whole["value"], exact.sum(), rtol=1e-12)


def test_chunks_draw_apart(monkeypatch):
    """Chunks of sliced score matching share no direction: every row of a kind has its own draw."""
    monkeypatch.setattr(chunks, "on_cpu", lambda: True)
    loss = SSM(variance_reduced=False, projection="gaussian")
    x = np.ones((600, 3))
    wide = jnp.eye(3, 150)  # of as many numbers for each row as a network has
    energy = energy_of(lambda a, x: -0.5 * a * jnp.sum((x @ wide) ** 2, -1), np.array(1.3), x)
    assert loss.rows_per_chunk(energy) * 4 < len(x)
    of = jax.jit(functools.partial(row_losses, loss), compiler_options=FAST_COMPILE)
    found = np.asarray(of(energy, jax.random.key(3))[0])
    assert len(np.unique(found)) == len(x)
    assert_mean(found, 0.5 * 1.3**2 * 3 - 1.3 * 3)


def masked(theta, x, mask, radial=False):
    """A model some of whose rows are masked out, all scaled by 2.5."""
    with numpyro.plate("rows", len(x)), handlers.scale(scale=2.5), handlers.mask(mask=mask):
        y = numpyro.sample("x", improper(3), obs=x)
        f = -theta["a"][0] * jnp.linalg.norm(y, axis=-1) if radial else rugged(theta, y)
        numpyro.factor("energy", f)


def mask_from_data(x, radial=False):
    masked(numpyro.param("theta"), x, ~jnp.isnan(x).any(-1), radial)


def mask_from_argument(x, mask, radial=False):
    masked(numpyro.param("theta"), x, mask, radial)


@pytest.mark.parametrize(
    ("model", "radial", "rows"),
    [
        (mask_from_data, True, 3),
        (mask_from_data, False, None),
        (mask_from_argument, True, None),
        (mask_from_argument, False, 3),
    ],
    ids=["data, singular at the origin, chunks", "data", "argument, singular at the origin", "argument, chunks"],
)
def test_masked_rows_do_not_count(model, radial, rows):
    """Rows that hold NaN and are masked out leave value and gradient as if they were not there."""
    theta = RUGGED
    x = MANY.copy()
    x[[0, 5, 12], [0, 2, 1]] = np.nan
    kept = ~np.isnan(x).any(-1)
    args = (x,) if model is mask_from_data else (x, kept)

    def total(theta, x, *mask):
        energy = Energy(model, {"theta": theta}, x, *mask, radial=radial)
        found, weights = row_losses(InChunks(rows), energy, jax.random.key(0))
        return total_loss(InChunks(rows), energy, jax.random.key(0)), (found, weights)

    of = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=FAST_COMPILE)
    (value, (found, weights)), gradient = of(theta, *args)
    (expected, _), expected_gradient = of(theta, *(a[kept] for a in args))
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient, expected_gradient)
    np.testing.assert_array_equal(weights, np.where(kept, 2.5, 0.0))
    np.testing.assert_array_equal(found[~kept], 0.0)


@pytest.mark.parametrize("rows", [None, 3], ids=["whole", "chunks"])
def test_scales_weigh_rows(rows):
    """A scale for each row weighs its loss, not its score."""
    weight = np.linspace(0.5, 3.0, 13)

    def model(x):
        with handlers.scale(scale=weight):
            density(rugged)(x)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def of(x):
        energy, key = Energy(model, {"theta": RUGGED}, x), jax.random.key(0)
        return *row_losses(InChunks(rows), energy, key), total_loss(InChunks(rows), energy, key)

    expected = values(ISM(), rugged, RUGGED, MANY)
    found, weights, total = of(MANY)
    np.testing.assert_allclose(weights, weight, rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(total, weight @ expected, rtol=1e-9)
