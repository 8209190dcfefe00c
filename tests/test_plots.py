"""What plots show, read back from their artists, and the documentation's pictures."""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.stats
import xarray as xr
from models import improper
from numpyro.distributions import constraints

from numpyro_score import (
    Energy,
    ScoreMatching,
    plot_comparison,
    plot_de_bruijn,
    plot_density,
    plot_influence,
    plot_khat,
    plot_losses,
    plot_marginals,
    plot_score_field,
)
from numpyro_score.arviz import as_arviz, dataset
from numpyro_score.comparison import Comparison
from numpyro_score.divergences import DeBruijn
from numpyro_score.inference import AdversarialResult

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def gaussian(x):
    """f = −½ Σ_d k_d x_d² + ½ x_0 x_1, of which k is estimated: in one dimension by 1 / mean of x²."""
    k = numpyro.param("k", jnp.ones(x.shape[1]))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(x.shape[1]), obs=x)
        coupling = 0.5 * x[:, 0] * x[:, 1] if x.shape[1] > 1 else 0.0
        numpyro.factor("energy", coupling - 0.5 * jnp.sum(k * x**2, axis=-1))


def data(n, d):
    return np.random.default_rng(0).normal(0.2, 1.3, (n, d)).astype(np.float32)


@functools.cache
def fitted(d):
    return ScoreMatching(gaussian).run(jax.random.key(0), data(60, d), progress_bar=False)


def at(d, k):
    return Energy(gaussian, {"k": jnp.asarray(k, float)}, data(60, d))


# -- losses -----------------------------------------------------------------------------------------


def with_losses(losses):
    return dataclasses.replace(fitted(1), losses=np.asarray(losses))


def test_losses_and_their_running_mean():
    """Two lines, the losses and means of 2 % of them, in limits that hold all but the first 5 %."""
    losses = 100 * np.exp(-np.arange(400) / 3) + np.sin(np.arange(400))
    axes = plot_losses(with_losses(losses))
    raw, mean = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    steps, means = mean.get_data()
    np.testing.assert_allclose(means, [losses[s - 7 : s + 1].mean() for s in steps])
    assert steps[0] == 7 and steps[-1] == 399
    low, high = axes.get_ylim()
    assert low < losses[20:].min() < losses[20:].max() < high < 5
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "objective, sum over rows"


def test_skipped_steps_are_marked():
    losses = np.linspace(3.0, 1.0, 30)
    losses[[4, 17]] = np.nan
    axes = plot_losses(with_losses(losses))
    line, crosses = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), losses)
    np.testing.assert_array_equal(crosses.get_xdata(), [4, 17])
    assert "not finite: 2 of 30 steps" in [t.get_text() for t in axes.get_legend().get_texts()]


def test_closed_form_is_one_point():
    fit = fitted(1)
    axes = plot_losses(fit)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, fit.losses[0]]])
    assert axes.get_title() == "ISM: solved in closed form"


def test_terms_of_adversarial_fits():
    """The data term and the bound on one scale, as their difference counts; the entropy beside them."""
    fit = object.__new__(AdversarialResult)
    terms = {k: np.random.default_rng(i).normal(i, 0.1, 40) for i, k in enumerate(("a", "b", "c"))}
    fit.__dict__.update(data_term=terms["a"], log_partition_bound=terms["b"], joint_entropy=terms["c"])
    left, right = plot_losses(fit)
    for line, name in zip((*left.lines, *right.lines), terms, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), terms[name])
    assert [t.get_text()[:10] for t in left.get_legend().get_texts()] == ["data term,", "lower boun"]


# -- scores and densities ---------------------------------------------------------------------------


def read_arrows(axes):
    (quiver,) = (c for c in axes.collections if type(c).__name__ == "Quiver")
    return quiver.get_offsets(), np.column_stack([quiver.U, quiver.V]), quiver.get_array()


@pytest.mark.parametrize("columns", [None, ("x[2]", 0)])
def test_score_field_is_the_score(columns):
    """Of −½ Σ k_d x_d² + ½ x_0 x_1 at the arrows; other columns are held at their medians, as the title says."""
    k, x = np.array([1.0, 2.0, 0.5]), data(60, 3)
    i, j = (0, 1) if columns is None else (2, 0)
    axes = plot_score_field(at(3, k), columns=columns, num_points=7)
    place, arrow, length = read_arrows(axes)
    assert len(place) == 49
    row = np.tile(np.median(x, axis=0), (49, 1))
    row[:, [i, j]] = place
    score = np.stack(
        [0.5 * row[:, 1] - k[0] * row[:, 0], 0.5 * row[:, 0] - k[1] * row[:, 1], -k[2] * row[:, 2]], axis=1
    )
    expected = score[:, [i, j]]
    norm = np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(length, norm, rtol=1e-4)
    np.testing.assert_allclose(arrow, expected / norm[:, None], atol=1e-4)
    assert (place >= x[:, [i, j]].min(0)).all() and (place <= x[:, [i, j]].max(0)).all()
    np.testing.assert_allclose(axes.collections[0].get_offsets(), x[:, [i, j]], rtol=1e-6)
    (other,) = {0, 1, 2} - {i, j}
    assert axes.get_title() == f"Score given x[{other}] = {np.median(x[:, other]):.3g}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"x[{i}]", f"x[{j}]")


def test_score_field_at_a_given_row():
    place, arrow, length = read_arrows(plot_score_field(at(3, [1, 1, 1]), columns=(0, 2), at=[9, 4, 9], num_points=3))
    expected = np.column_stack([2.0 - place[:, 0], -place[:, 1]])
    np.testing.assert_allclose(arrow * length[:, None], expected, atol=1e-4)


def test_scores_that_are_not_finite_are_crosses():
    """f = √(x_0 − 0.1) has no score on the left."""

    def model(x):
        numpyro.factor("energy", jnp.sqrt(x[:, 0] - 0.1) - x[:, 1] ** 2)

    x = np.abs(data(60, 2)) + 0.2
    x[0, 0] = -1.0
    axes = plot_score_field(Energy(model, {}, x), num_points=10)
    place, arrow, _ = read_arrows(axes)
    crosses = axes.collections[-1].get_offsets()
    assert np.isfinite(arrow).all() and len(place) + len(crosses) == 100
    assert (place[:, 0] > 0.1).all() and (crosses[:, 0] < 0.1).all() and len(crosses) > 0
    assert "score not finite" in [t.get_text() for t in axes.get_legend().get_texts()]


def test_density_in_one_dimension():
    """N(0, 1/k) over the histogram of the data, both of mass one; no density below a bound."""
    axes = plot_density(at(1, [2.0]))
    grid, density = axes.lines[0].get_data()
    np.testing.assert_allclose(density, scipy.stats.norm.pdf(grid, 0, 2**-0.5), rtol=1e-4)
    bars = axes.patches
    heights = [p.get_height() for p in bars]
    x = data(60, 1)[:, 0]
    expected = np.histogram(x, "auto", density=True)[0]
    np.testing.assert_allclose(heights, expected, rtol=1e-5)

    given = plot_density(at(1, [2.0]), log_partition=0.0).lines[0].get_data()
    np.testing.assert_allclose(given[1], np.exp(-(given[0] ** 2)), rtol=1e-5)

    def exponential(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", -2.0 * x)

    grid, density = plot_density(Energy(exponential, {}, np.abs(x))).lines[0].get_data()
    np.testing.assert_allclose(density, 2 * np.exp(-2 * grid), rtol=1e-4)
    assert 0 < grid[0] < np.abs(x).min()


def test_density_in_two_dimensions():
    """Contours lie where f is its level below the maximum, which is zero."""
    axes = plot_density(at(2, [1.0, 2.0]))
    (lines,) = (c for c in axes.collections if type(c).__name__ == "QuadContourSet" and not c.filled)
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        x, y = path.vertices.T
        f = 0.5 * x * y - 0.5 * x**2 - y**2
        # Contours are linear between grid points.
        np.testing.assert_allclose(f, level, atol=5e-3)
    np.testing.assert_allclose(axes.collections[-1].get_offsets(), data(60, 2), rtol=1e-6)


def test_marginals_show_data_and_samples():
    """Pairs are the columns themselves; curves have mass one and the columns' means."""
    samples = np.random.default_rng(1).normal(size=(80, 3))
    axes = plot_marginals(at(3, [1, 1, 1]), samples, columns=["x[2]", "x[0]"])
    assert axes.shape == (2, 2)
    drawn, seen = axes[1, 0].collections
    np.testing.assert_allclose(drawn.get_offsets(), samples[:, [2, 0]])
    np.testing.assert_allclose(seen.get_offsets(), data(60, 3)[:, [2, 0]])
    for panel, column in ((axes[0, 0], 2), (axes[1, 1], 0)):
        for line, values in zip(panel.lines, (samples, data(60, 3)), strict=True):
            grid, density = line.get_data()
            # ArviZ ends its estimate at the extremes, with the mass beyond reflected.
            np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=0.01)
            np.testing.assert_allclose(
                np.trapezoid(grid * density, grid), values[:, column].mean(), atol=0.1 * values[:, column].std()
            )
    legend = [t.get_text() for t in axes[0, 1].get_legend().get_texts()]
    assert legend == ["data, 60 rows", "model, 80 draws"]
    assert (axes[1, 0].get_xlabel(), axes[1, 0].get_ylabel()) == ("x[2]", "x[0]")


def test_marginals_of_arviz_data_are_in_the_datas_own_units():
    """Proportions stay proportions, and masked rows are left out."""

    def model(x, seen):
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=seen):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.simplex, (), (3,)), obs=x)
            numpyro.factor("energy", jnp.sum(jnp.log(x), axis=-1))

    rng = np.random.default_rng(0)
    x, draws = rng.dirichlet(np.ones(3), 40), rng.dirichlet(np.ones(3), (2, 30))
    seen = np.arange(40) < 35
    samples = as_arviz({"posterior": dataset({"x": draws}, ("chain", "draw"))})
    axes = plot_marginals(Energy(model, {}, x, seen), samples, columns=[0, 1])
    drawn, rows = axes[1, 0].collections
    np.testing.assert_allclose(drawn.get_offsets(), draws.reshape(60, 3)[:, :2])
    np.testing.assert_allclose(rows.get_offsets(), x[seen, :2], atol=1e-6)


# -- influence and comparisons ----------------------------------------------------------------------


def test_influence_in_standard_errors():
    """1/k̂ is the mean of x², so row n's share in k̂ is |x_n² − mean| / √Σ(x_n² − mean)²."""
    x = data(60, 1)[:, 0].astype(float)
    expected = np.abs(x**2 - np.mean(x**2))
    expected /= np.linalg.norm(expected)
    axes = plot_influence(fitted(1))
    points, line = axes.lines
    np.testing.assert_allclose(points.get_ydata(), expected, rtol=1e-3, atol=1e-6)
    assert line.get_ydata()[0] == 60**-0.5
    order = np.argsort(-expected)[:3]
    *numbers, named = axes.texts
    assert [(t.get_text(), t.xy[0]) for t in numbers] == [(str(n), n) for n in order]
    assert named.get_text().split("\n") == [f"row {n}: k[0]" for n in order]
    of = plot_influence(fitted(1), of=lambda e: e["k"][0] ** 2)  # to first order the same share
    np.testing.assert_allclose(of.lines[0].get_ydata(), expected, rtol=1e-3, atol=1e-6)
    assert of.texts[-1].get_text().startswith(f"row {order[0]}: of\n")


def noisy(times=(0.1, 0.5, 2.0, 8.0), diffusion=1.0):
    """What `de_bruijn` returns, of N(0, 1) against N(0, 4) along t in closed form."""
    t = np.array(times)
    a, b = 1 + t, 4 + t
    kl, fisher = 0.5 * (a / b - 1 + np.log(b / a)), 0.5 * (1 / b - 1 / a) ** 2 * a
    slope, zero = diffusion * fisher, 0.0 * t
    bands = (0.1 * kl, fisher, 0.2 * fisher, slope, 0.05 * slope, np.full(len(t), diffusion), zero, zero)
    return DeBruijn(t, kl, *bands, 0.32, 0.0, 0.0, 0.0, 0.0)


def test_kl_and_fisher_along_noise():
    result = noisy()
    left, right = plot_de_bruijn(result)
    np.testing.assert_array_equal(left.lines[0].get_xydata(), np.column_stack([result.times, result.kl]))
    np.testing.assert_array_equal(right.lines[0].get_ydata(), result.fisher)
    for panel, middle, error in ((left, result.kl, result.kl_stderr), (right, result.fisher, result.fisher_stderr)):
        band = panel.collections[0].get_paths()[0].vertices
        for t, m, e in zip(result.times, middle, error, strict=True):
            found = band[band[:, 0] == t, 1]
            np.testing.assert_allclose([found.min(), found.max()], [m - 2 * e, m + 2 * e])
    (bars,) = right.containers
    segments = np.array(bars.lines[2][0].get_segments())
    np.testing.assert_allclose(np.ptp(segments[..., 1], axis=1), 4 * result.slope_stderr)
    assert left.get_xscale() == right.get_xscale() == "log"
    assert plot_de_bruijn(noisy((0.5, 1.0, 2.0)))[0].get_xscale() == "linear"


def test_fisher_is_times_the_diffusion():
    result = noisy(diffusion=2.0)
    panel = plot_de_bruijn(result)[1]
    np.testing.assert_array_equal(panel.lines[0].get_ydata(), 2 * result.fisher)
    assert panel.get_legend().get_texts()[0].get_text() == "β² × Fisher divergence"


class Loo(NamedTuple):
    """What a plot reads of `hyvarinen_loo`'s result."""

    pareto_k: xr.DataArray | None
    good_k: float = 0.7


def compared():
    """What a plot reads of `compare`'s result."""
    table = pd.DataFrame(
        {
            "log_likelihood_diff": [0.0, -3.0, -40.0], "log_likelihood_dse": [0.0, 2.0, 5.0],
            "score_diff": [1.5, 0.0, 90.0], "score_dse": [1.0, 0.0, 7.0],
        },
        ["ism", "pcd", "nce"],
    )  # fmt: skip
    return Comparison(table, None, ("ism", "pcd", "nce"), ("pcd", "ism", "nce"), None, ())


def test_comparison_is_a_forest():
    """Differences and two standard errors on both sides, in the table's order from the top; one side without KL."""
    comparison = compared()
    table = comparison.table
    axes = plot_comparison(comparison)
    for panel, column in zip(axes, ("log_likelihood", "score"), strict=True):
        (bars,) = panel.containers
        np.testing.assert_array_equal(bars.lines[0].get_xdata(), table[f"{column}_diff"])
        segments = np.array(bars.lines[2][0].get_segments())
        np.testing.assert_allclose(np.ptp(segments[..., 0], axis=1), 4 * table[f"{column}_dse"])
        assert [t.get_text() for t in panel.get_yticklabels()] == list(table.index)
        assert panel.yaxis_inverted()
    (only,) = plot_comparison(dataclasses.replace(comparison, order_kl=None))
    np.testing.assert_array_equal(only.containers[0].lines[0].get_xdata(), table["score_diff"])


def test_khat_names_rows_above_the_line():
    k = np.random.default_rng(0).uniform(-0.2, 0.6, 30)
    k[[3, 20]] = 0.9, 1.2
    axes = plot_khat(Loo(xr.DataArray(k, dims="row", coords={"row": np.arange(30)})))
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    np.testing.assert_allclose(points, np.column_stack([np.arange(30), k]))
    assert [t.get_text() for t in axes.texts] == ["row 20", "row 3"]
    assert axes.get_title() == "Leave-one-out: 2 of 30 rows unreliable" and axes.get_xlabel() == "row"
    some = Loo(xr.DataArray([0.1, 0.9], dims="row", coords={"row": [4, 8]}))  # the others are masked
    assert [t.get_text() for t in plot_khat(some).texts] == ["row 8"]
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), [0.7, 0.7])


# -- what all have in common ------------------------------------------------------------------------


def calls():
    energy = at(2, [1.0, 2.0])
    k = Loo(xr.DataArray(np.linspace(0, 1, 9), dims="row", coords={"row": np.arange(9)}))
    return {
        "losses": (lambda ax: plot_losses(fitted(1), ax=ax), 1),
        "score field": (lambda ax: plot_score_field(energy, num_points=5, ax=ax), 1),
        "density": (lambda ax: plot_density(energy, ax=ax), 1),
        "marginals": (lambda ax: plot_marginals(energy, data(9, 2), ax=ax), 4),
        "influence": (lambda ax: plot_influence(fitted(1), ax=ax), 1),
        "de Bruijn": (lambda ax: plot_de_bruijn(noisy(), ax=ax), 2),
        "k-hat": (lambda ax: plot_khat(k, ax=ax), 1),
        "comparison": (lambda ax: plot_comparison(compared(), ax=ax), 2),
    }


@pytest.mark.parametrize("name", calls())
def test_axes_given_are_drawn_in_and_returned(name):
    """With no other figure made, and refused where they are too many."""
    plot, count = calls()[name]
    axes = plt.figure().subplots(1, count, squeeze=False)[0]
    returned = plot(axes if count > 1 else axes[0])
    assert list(np.ravel(returned)) == list(axes) and len(plt.get_fignums()) == 1
    assert all(a.has_data() or not a.axison for a in axes)
    many = plt.figure().subplots(1, 5)
    with pytest.raises(ValueError, match=f"draws into {count} axes, got 5"):
        plot(many)


def test_matplotlib_is_asked_for(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match=r"plot_losses needs Matplotlib: pip install 'numpyro-score\[plots\]'"):
        plot_losses(fitted(1))


def with_offsets(x, z):
    """Rows with densities of their own."""
    numpyro.factor("energy", -jnp.sum((x - z) ** 2, axis=-1))


def on_sphere(x):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.sphere, (), (3,)), obs=x)
        numpyro.factor("energy", x[:, 0])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: plot_khat(Loo(None)), ValueError, "no k̂ in this: pass the result of hyvarinen_loo"),
        (lambda: plot_losses(at(1, [1.0])), TypeError, "plot_losses takes a fit, got Energy"),
        (lambda: plot_influence(at(1, [1.0])), TypeError, "takes a fit of ScoreMatching, got Energy"),
        (lambda: plot_density(3), TypeError, "plot_density takes a fit or an Energy, got int"),
        (
            lambda: plot_score_field(at(1, [1.0])),
            ValueError,
            "draws two columns, and rows .* have one: use plot_density",
        ),
        (lambda: plot_score_field(at(2, [1, 1]), columns=[0]), ValueError, r"draws two columns, got \[0\]"),
        (lambda: plot_score_field(at(2, [1, 1]), columns=[0, 2]), ValueError, r"no column 2: use an index below 2"),
        (lambda: plot_score_field(at(2, [1, 1]), columns=["x[0]", 0]), ValueError, "1 to 2 different columns"),
        (lambda: plot_score_field(at(2, [1, 1]), at=[0, np.nan]), ValueError, "a finite row of 2 numbers as at"),
        (lambda: plot_density(at(3, [1, 1, 1])), ValueError, "rows of this model have 3: use plot_marginals"),
        (lambda: plot_marginals(at(2, [1, 1]), np.zeros((5, 3))), ValueError, r"shape \(M, 2\).* got shape \(5, 3\)"),
        (lambda: plot_marginals(at(2, [1, 1]), np.full((5, 2), np.nan)), ValueError, "needs finite samples"),
        (
            lambda: plot_score_field(Energy(with_offsets, {}, data(9, 2), data(9, 2))),
            ValueError,
            "9 rows may each have their own .*: bind it to one row",
        ),
        (
            lambda: plot_score_field(Energy(on_sphere, {}, np.eye(3))),
            ValueError,
            "site 'x' lives on a sphere: use plot_marginals",
        ),
    ],
)
def test_what_is_refused(unchecked, call, error, match):
    with pytest.raises(error, match=match):
        call()


@functools.cache
def pictures():
    """The script that makes the documentation's pictures."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # In place of what takes long.
    module.fit_by_steps = lambda: with_losses(np.random.default_rng(0).normal(size=300))
    module.draws = lambda: np.asarray(module.DATA)[:, ::-1]
    module.noised = noisy
    module.left_out = lambda: Loo(xr.DataArray(np.linspace(-0.3, 0.9, 40), dims="row"))
    module.compared = compared
    return module


NAMES = ["comparison", "de_bruijn", "density", "influence", "khat", "losses", "marginals", "score_field"]


def test_every_picture_is_kept_and_shown():
    """By the page, in a file of less than 80 kB."""
    page = (DOCS / "diagnostics.md").read_text()
    assert sorted(pictures().PICTURES) == NAMES
    for name in (*NAMES, "report"):
        assert f"](images/{name}.png)" in page
        assert (DOCS / "images" / f"{name}.png").stat().st_size < 80_000


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_not_blank_and_legible(name):
    """At 72 dpi: each panel has ink of several colours; text is of 8 points or more and within the picture."""
    axes = np.ravel(pictures().PICTURES[name]())
    figure = axes[0].figure
    figure.set_dpi(72)
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    for panel in axes:
        if not panel.axison:
            continue
        box = panel.get_window_extent()
        part = image[int(len(image) - box.y1) : int(len(image) - box.y0), int(box.x0) : int(box.x1)].reshape(-1, 3)
        assert (part.min(axis=1) < 200).mean() > 0.005 and len(np.unique(part, axis=0)) > 10
    written = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
    assert min(t.get_fontsize() for t in written) >= 8
    inside = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(inside.x0, inside.y0) > -0.02 and inside.x1 < width + 0.02 and inside.y1 < height + 0.02
