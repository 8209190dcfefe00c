"""The parts of the examples that can be checked without running them whole."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
import xarray as xr
from numpyro import handlers
from numpyro.infer.util import log_density
from sklearn.datasets import load_wine


@pytest.fixture(scope="module")
def quickstart():
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def values(quickstart):
    rng = np.random.default_rng(0)
    return {
        "diagonal": jnp.asarray(rng.uniform(1.0, 2.0, 13), dtype=float),
        "coupling": jnp.asarray(rng.normal(0.0, 0.2, 78), dtype=float),
        "tail": jnp.asarray(rng.uniform(0.01, 0.1, 13), dtype=float),
    }


def test_wine_data_are_standardised_logs(quickstart):
    """One column for each measurement, in the order of the names, with mean 0 and sd 1."""
    x, names = quickstart.load()
    wine = load_wine()
    assert x.shape == (178, 13) and len(names) == 13
    expected = scipy.stats.zscore(np.log(wine.data))
    np.testing.assert_allclose(x, expected, atol=1e-4)
    for name, original in zip(names, wine.feature_names, strict=True):
        assert original.replace("_", " ").startswith(name.split(" of ")[0])


@pytest.mark.parametrize("quartic", [True, False])
def test_model_density_is_the_formula(quickstart, values, quartic):
    """Log density is the log prior − Σ_n {½xᵀKx + Σ aᵢxᵢ⁴}, on data and, with x as a site, on new wines."""
    x = quickstart.load()[0][:7]
    used = values if quartic else {k: v for k, v in values.items() if k != "tail"}
    k = np.diag(values["diagonal"]).astype(float)
    upper = [(i, j) for i in range(13) for j in range(i + 1, 13)]
    for (i, j), c in zip(upper, np.asarray(values["coupling"]), strict=True):
        k[i, j] = k[j, i] = c
    tail = np.asarray(values["tail"]) if quartic else 0.0
    f = sum(-0.5 * row @ k @ row - np.sum(tail * row**4) for row in np.asarray(x))
    f += dist.LogNormal(0.0, 1.0).log_prob(values["diagonal"]).sum()
    f += dist.Normal(0.0, 0.3).log_prob(values["coupling"]).sum()
    if quartic:
        f += dist.LogNormal(-3.0, 1.0).log_prob(values["tail"]).sum()
    given, _ = log_density(quickstart.model, (x,), {"quartic": quartic}, used)
    np.testing.assert_allclose(given, f, rtol=1e-5)
    fitted = handlers.condition(quickstart.model, used)
    new, trace = log_density(fitted, (None, 7), {"quartic": quartic}, {"x": x})
    np.testing.assert_allclose(new, f, rtol=1e-5)
    assert not trace["x"]["is_observed"] and ("tail" in trace) == quartic


def fake_results(estimate):
    draws = estimate + np.random.default_rng(0).normal(0.0, 0.05, (2, 50, 78))
    errors = {"coupling": np.full(78, 0.05)}
    fit = SimpleNamespace(estimates={"coupling": jnp.asarray(estimate)}, stderr=lambda: errors)
    posterior = xr.Dataset({"coupling": (("chain", "draw", "coupling_dim_0"), draws)})
    return fit, xr.DataTree.from_dict({"posterior": posterior})


def colours(path):
    """Which hues the left half of the picture has, beside black on white."""
    image = plt.imread(path)
    left = image[:, : int(0.5 * image.shape[1]), :3].astype(float)
    red, blue = left[..., 0] - left[..., 2], left[..., 2] - left[..., 0]
    return (red > 0.2).mean(), (blue > 0.2).mean(), (left.mean(-1) < 0.5).mean()


def test_picture_shows_the_edges(quickstart, tmp_path):
    """Red lines for positive couplings and blue ones for negative, none where the interval holds zero."""
    names = quickstart.load()[1]
    shown = {}
    for label, sign in {"none": 0, "positive": 1, "negative": -1}.items():
        estimate = np.zeros(78)
        estimate[:5] = 0.5 * sign
        path = tmp_path / f"{label}.png"
        quickstart.picture(*fake_results(estimate), names, path)
        shown[label] = colours(path)
    assert all(dark > 1e-3 for *_, dark in shown.values())  # nodes and names
    assert shown["positive"][0] > 0.005 > 1e-3 > shown["positive"][1]
    assert shown["negative"][1] > 0.005 > 1e-3 > shown["negative"][0]
    assert max(shown["none"][:2]) < 1e-3
