"""The page of figures on a GPU: where it goes, and that both contestants take the same step."""

import jax
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.cases import CASES


def case_of(key):
    return next(c for c in CASES if c.key == key)


def test_no_figures_of_a_cpu_are_kept_as_those_of_a_gpu(tmp_path):
    assert gpu.output_of("gpu", None) == gpu.OUTPUT
    assert gpu.output_of("gpu", tmp_path / "a.md") == gpu.output_of("cpu", tmp_path / "a.md") == tmp_path / "a.md"
    assert gpu.output_of("cpu", None) is None
    with pytest.raises(SystemExit, match=r"GPU\.md is for figures of a GPU"):
        gpu.output_of("cpu", gpu.OUTPUT)


def test_contestants_have_the_same_loss():
    """From the same weights, with a width and rows that are not those of the other benchmarks."""
    size = gpu.Size(24, 10, 3)
    case, x = case_of("ism"), gpu.make_data(size.dim, size.rows)
    fit = gpu.cases.package_fit(case.loss, size.width)
    state = fit.init(jax.random.key(0), x)
    weights = fit.get_params(state)[gpu.SITE]
    shapes = [(3, 10), (10,), (10, 10), (10,), (10, 10), (10,), (10, 1), (1,)]
    assert [w.shape for w in jax.tree.leaves(weights)] == shapes
    assert [w.shape for w in jax.tree.leaves(gpu.cases.hand_step(case, x, size.width, 24).state.params)] == shapes
    loss, _ = jax.jit(case.by_hand(gpu.rows_by_hand(case, size, x)))(weights, x, jax.random.key(1))
    np.testing.assert_allclose(jax.jit(fit.update)(state, x)[1], loss, rtol=1e-5)


def test_rows_by_hand_divide_all_rows():
    size = gpu.Size(96, 128, 3)
    rows = gpu.rows_by_hand(case_of("ism"), size, gpu.make_data(size.dim, size.rows))
    assert 96 % rows == 0
