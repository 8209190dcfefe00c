"""Pictures of diffusions hold what they say."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import pytest
from models import improper

from numpyro_score import Energy, diffuse, plot_score_field, plot_simulation_ranks, plot_trajectories
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
