"""Pictures of diffusions hold what they say."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import pytest
from models import improper

from numpyro_score import (
    Energy,
    bits_by_noise,
    diffuse,
    plot_bits_by_noise,
    plot_draws_by_calls,
    plot_score_field,
    plot_simulation_ranks,
    plot_trajectories,
)
from numpyro_score.diffusion import SimulationRanks
from numpyro_score.plots.diffusions import _band

matplotlib.use("Agg")
X = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)


def normal(x, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1) / (1 + sigma**2))


def test_trajectories():
    """Both ways through the same levels, with the spread that each level has."""
    energy = Energy(normal, {}, jnp.asarray(X))
    settings = {"noise_range": (0.01, 10.0), "num_steps": 8}
    found = diffuse(energy, jax.random.key(0), 150, trajectory=True, **settings)
    left, right = plot_trajectories(found, X, column=1)
    for panel, flip in ((left, -1), (right, 1)):
        paths = np.array([line.get_ydata() for line in panel.lines])
        assert paths.shape == (100, 9)
        np.testing.assert_allclose(panel.lines[0].get_xdata()[::flip], found.noise)
        np.testing.assert_allclose(paths[:, ::flip].std(axis=0), np.sqrt(1 + found.noise**2), rtol=0.35)
    with pytest.raises(ValueError, match=r"write diffuse\(..., trajectory=True\)"):
        plot_trajectories(found._replace(trajectory=None), X)
    with pytest.raises(ValueError, match="got column 2 and rows of 2 numbers, and chains of 2"):
        plot_trajectories(found, X, column=2)


def test_score_field_at_a_noise_level():
    """A bound model is a source like any other."""
    axes = plot_score_field(Energy(normal, {}, jnp.asarray(X)).bind(sigma=2.0))
    (arrows,) = (c for c in axes.collections if isinstance(c, matplotlib.quiver.Quiver))
    np.testing.assert_allclose(arrows.get_array(), np.hypot(*arrows.get_offsets().T) / 5, rtol=1e-4)


def test_rank_bands_hold_their_level():
    """Of 2,000 sets of uniform ranks 5% leave the band; skewed ones do."""
    rng = np.random.default_rng(1)
    low, high = _band(200, 20)
    shares = np.cumsum(rng.multinomial(200, np.full(20, 0.05), size=2000), axis=1)[:, :-1] / 200
    assert 0.93 < np.mean(((shares >= low) & (shares <= high)).all(axis=1)) < 0.98
    result = SimulationRanks({"even": rng.integers(20, size=200), "low": rng.integers(14, size=200)}, 19, 0.5)
    axes = plot_simulation_ranks(result)
    even, low_line = axes.lines[1:]
    assert low_line.get_label() == "low"
    place = np.arange(1, 20) / 20
    assert ((even.get_ydata() + place >= low) & (even.get_ydata() + place <= high)).all()
    assert (low_line.get_ydata() + place > high).any()


def test_draws_by_calls():
    """A row for each method, a picture for each number of calls, the same limits everywhere."""
    energy = Energy(normal, {}, jnp.asarray(X))

    def drawn(method, num_steps):
        return diffuse(energy, jax.random.key(0), 50, method=method, num_steps=num_steps, noise_range=(0.01, 10.0))

    results = {"ddim": [drawn("ddim", 2), drawn("ddim", 8)], "edm_heun": [drawn("edm_heun", 4)]}
    axes = plot_draws_by_calls(results, X)
    assert [a.get_title() for a in axes.ravel()] == ["ddim, 2 calls", "ddim, 8 calls", "edm_heun, 8 calls", ""]
    np.testing.assert_allclose(axes[0, 1].collections[1].get_offsets(), results["ddim"][1].draws, rtol=1e-6)
    assert axes[0, 0].get_xlim() == axes[1, 0].get_xlim() and not axes[1, 1].axison
    flat = [found._replace(draws=found.draws[:, 0]) for found in results["ddim"]]
    assert (
        len(plot_draws_by_calls({"ddim": flat}, X[:, 0])[0, 0].patches) == 40
    )  # a histogram in bars and one in outline
    with pytest.raises(ValueError, match=r"columns \(0, 2\) and rows of 2 numbers"):
        plot_draws_by_calls(results, columns=(0, 2))
    with pytest.raises(ValueError, match="needs some draws of each method"):
        plot_draws_by_calls({"ddim": []})
    with pytest.raises(ValueError, match="draws one site and got a, b"):
        plot_draws_by_calls({"ddim": [flat[0]._replace(draws={"a": X, "b": X})]})


def test_bits_by_noise():
    """Lines and bands are the numbers of the result; several have a legend."""
    found = bits_by_noise(Energy(normal, {}, jnp.asarray(X)), X, jax.random.key(0), noise_range=(0.1, 10.0))
    left, right = plot_bits_by_noise({"fitted": found, "held out": found})
    np.testing.assert_array_equal(left.lines[0].get_ydata(), found.error)
    np.testing.assert_array_equal(right.lines[1].get_ydata(), found.bits)
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["fitted", "held out"]
    assert plot_bits_by_noise(found)[1].get_legend() is None
