"""Memory on accelerators: chunks of rows are as large as the bound, as the compiler counts it.

Nothing here needs an accelerator: the decision is taken for one, and XLA says what the program for a CPU takes.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from models import energy_of, improper

from numpyro_score import DSM, FSM, ISM, SSM, ContinuousDSM, Energy, KLContraction
from numpyro_score.losses import DefaultLoss, chunks, row_losses, total_loss
from numpyro_score.placement import on_cpu

BOUND = 2**23


@pytest.fixture
def elsewhere(monkeypatch):
    """As if the default device were no CPU, with a bound that takes a CPU little time."""
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", BOUND)
    with jax.default_device("cpu"):  # whose compiler is asked, also where there is a GPU
        yield


def network(x):
    """A layer is a product, a sum and a swish."""
    weights = numpyro.param("weights")
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(x.shape[1]), obs=x)
        for w, b in weights[:-1]:
            x = jax.nn.swish(x @ w + b)
        numpyro.factor("energy", (x @ weights[-1])[:, 0])


def weights_of(dim, width, hidden):
    rng = np.random.default_rng(0)
    sizes = [dim, *[width] * hidden]
    layers = [(rng.normal(size=s) / s[0] ** 0.5, np.zeros(s[1])) for s in itertools.pairwise(sizes)]
    return jax.tree.map(lambda w: w.astype(np.float32), [*layers, rng.normal(size=(width, 1)) / width**0.5])


def energy_of_network(weights, n):
    x = np.random.default_rng(1).normal(size=(n, len(weights[0][0]))).astype(np.float32)
    return Energy(network, {"weights": weights}, x)


def gradient(loss, energy):
    def total(params):
        return total_loss(loss, energy.with_params(params), jax.random.key(0))

    return jax.jit(jax.value_and_grad(total)).lower(energy.params).compile()


LOSSES = {
    "ISM": ISM(),
    "DSM, plain": DSM(0.1, control_variate=False),
    "DSM": DSM(0.1),
    "DSM, antithetic": DSM(0.1, antithetic=True),
    "SSM, plain": SSM(variance_reduced=False),
    "SSM, plain, three": SSM(3, variance_reduced=False),
    "SSM": SSM(),
    "FSM": FSM(0.1),
    "FSM, denoising": FSM(0.1, sigma=0.1),
    "KL contraction": KLContraction(0.1, num_samples=4),
}


def share_of_bound(loss, sizes, chunks_of=5):
    """The memory of a gradient of several chunks, over the bound."""
    weights = weights_of(*sizes)
    rows = loss.rows_per_chunk(energy_of_network(weights, 8))
    compiled = gradient(loss, energy_of_network(weights, chunks_of * rows))
    return compiled.memory_analysis().temp_size_in_bytes / BOUND


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere", "optimised")
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_fill_the_bound(name):
    """Neither more nor much less: the estimate of what a row takes is that of the compiler."""
    assert 0.75 < share_of_bound(LOSSES[name], (8, 64, 2)) < 1.3


@pytest.mark.usefixtures("elsewhere", "optimised")
@pytest.mark.parametrize("sizes", [(3, 128, 3), (16, 64, 4)])
def test_chunks_fill_the_bound_for_any_network(sizes):
    assert 0.75 < share_of_bound(ISM(), sizes) < 1.3


@pytest.mark.usefixtures("elsewhere", "optimised")
def test_memory_does_not_grow_with_the_rows():
    """But for the data themselves and what is as large, such as the weights of rows."""
    few, many = (share_of_bound(ISM(), (8, 64, 2), chunks_of) for chunks_of in (3, 24))
    rows = 21 * ISM().rows_per_chunk(energy_of_network(weights_of(8, 64, 2), 8))
    assert many - few < 3 * 4 * rows * (8 + 2) / BOUND
    assert many < 1.5


@pytest.mark.usefixtures("x64")
def test_chunks_one_by_one_change_nothing(monkeypatch):
    """Where each pass of the loop takes one chunk, down to two of them."""
    x = np.random.default_rng(2).normal(size=(13, 2))

    def total(a, x):
        energy = energy_of(lambda a, x: -a * jnp.sum(x**4, -1) + x[..., 0] * x[..., 1] ** 2, a, x)
        key = jax.random.key(0)
        return total_loss(ISM(), energy, key), row_losses(ISM(), energy, key)[0]

    def of(x):
        return jax.jit(jax.value_and_grad(total, has_aux=True))(np.array(0.7), x)

    s = -2.8 * x**3 + np.stack([x[:, 1] ** 2, 2 * x[:, 0] * x[:, 1]], axis=-1)
    expected = 0.5 * np.sum(s**2, -1) - 8.4 * np.sum(x**2, -1) + 2 * x[:, 0]
    slope = np.sum(-4 * x**3 * s) - 12 * np.sum(x**2)
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    for at_once in (13, 12, 5, 1):
        monkeypatch.setattr(ISM, "rows_per_chunk", lambda self, energy, at_once=at_once: at_once)
        (value, rows), found = of(x)
        np.testing.assert_allclose(rows, expected, rtol=1e-12)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-12)
        np.testing.assert_allclose(found, slope, rtol=1e-12)
        jax.clear_caches()


def rows_at(loss, sizes):
    return loss.rows_per_chunk(energy_of_network(weights_of(*sizes), 8))


@pytest.mark.parametrize("name", LOSSES)
def test_small_problems_are_not_cut(name, monkeypatch):
    """512 rows of 16 in three layers of 128; 8,192 of 64 in layers of 512, but for the exact trace."""
    loss = LOSSES[name]
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    assert rows_at(loss, (16, 128, 3)) >= 512
    if name == "ISM":
        assert 1000 < rows_at(loss, (64, 512, 3)) < 3000
        assert rows_at(DefaultLoss(), (64, 512, 3)) == rows_at(loss, (64, 512, 3))
    elif name != "SSM, plain, three":
        assert rows_at(loss, (64, 512, 3)) >= 8192


def test_the_default_step_takes_all_rows(monkeypatch):
    """It depends on the spread and the number of all of them."""
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    assert rows_at(FSM(), (64, 512, 3)) is None


def test_levels_count(monkeypatch):
    """Every row at four levels takes as much as four rows."""
    monkeypatch.setattr(chunks, "on_cpu", lambda: False)
    one, four = DSM((0.1,)), DSM((0.1, 0.2, 0.3, 0.4), levels="all")
    assert rows_at(one, (16, 128, 3)) // 4 == rows_at(four, (16, 128, 3))
    assert rows_at(ContinuousDSM(0.1, 1.0, antithetic=True), (16, 128, 3)) == rows_at(
        DSM(0.1, antithetic=True), (16, 128, 3)
    )


def test_numbers_of_a_row():
    """All that operations give: of a layer product, sum and the two of a swish, little else; loops in full."""
    energy = energy_of_network(weights_of(3, 100, 2), 8)
    assert energy.width == 100
    assert 2 * 4 * 100 <= energy.numbers_per_row <= 2 * 4 * 100 + 10 * 3

    def looped(a, x):
        return -jax.lax.fori_loop(0, 50, lambda _, y: y + a * x[..., 0] ** 2, jnp.zeros(len(x)))

    assert 100 <= energy_of(looped, np.float32(0.1), np.ones((4, 3), np.float32)).numbers_per_row <= 300


def test_the_default_device_decides():
    """That of the context, where there is one."""
    assert on_cpu() == (jax.default_backend() == "cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert on_cpu()
    with jax.default_device("cpu"):
        assert on_cpu()
