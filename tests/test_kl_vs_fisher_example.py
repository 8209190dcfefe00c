"""The example of KL against Fisher: its quadratures against closed forms, and its cases in a short setting."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from models import load_script


@pytest.fixture(scope="module")
def example():
    return load_script("kl_vs_fisher")


def test_divergences_and_errors_on_the_line(example, x64):
    """Normal laws; the likelihood's error for Student's t; score matching of a normal law the same."""
    kl, fisher = example.divergences(dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0))
    np.testing.assert_allclose(kl, np.log(2) + 2 / 8 - 0.5, rtol=1e-9)
    np.testing.assert_allclose(fisher, 0.5 * ((0.25 - 1) ** 2 + 0.25**2), rtol=1e-9)
    law = dist.StudentT(3.0)
    for parameter, information in {"location": 4 / 6, "log scale": 2 * 3 / 6}.items():
        mle, _ = example.standard_deviations(lambda v, f=parameter: example.PARAMETERS[f](3.0, v), jnp.array(0.0), law)
        np.testing.assert_allclose(mle, information**-0.5, rtol=1e-6)
    both = example.standard_deviations(lambda v: dist.Normal(v, 2.0), jnp.array(0.0), dist.Normal(0.0, 2.0))
    np.testing.assert_allclose(both, 2.0, rtol=1e-9)


@pytest.mark.slow
def test_far_modes(example, x64):
    """Fisher falls with the distance while KL rises to that of the weights, and its integral along noise is KL."""
    near, far = example.modes_case((1.0, 4.0), 2000)
    assert far["fisher"] < 0.01 * near["fisher"] and far["kl"] > near["kl"] and far["ratio"] > 10 * near["ratio"]
    np.testing.assert_allclose(far["kl"], 0.6 * np.log(4), rtol=1e-3)  # ⅘ log 4 − ⅕ log 4
    for r in (near, far):
        along = r["along"]
        assert abs(along.integral - r["kl"]) < 5 * along.integral_stderr + along.integral_error


def test_heavy_tails(example, x64):
    """A normal model has the variance of the data under both, and Fisher turns beyond some distance."""
    normal = example.wrong_models(5.0)["normal"]
    np.testing.assert_allclose([normal[0][0], normal[1][0]], (5 / 3) ** 0.5, rtol=1e-4)
    moved = example.right_model(3.0)["moved"]
    assert (np.diff(moved[:, 0]) > 0).all() and moved[-1, 1] < 0.9 * moved[:, 1].max()
