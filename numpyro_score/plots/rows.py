"""Pictures of data, densities and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import arviz as az
import jax
import numpy as np

from numpyro_score.divergences.columns import data_columns, discrete_columns, sample_columns
from numpyro_score.energy import Energy
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.normaliser import log_partition as find_log_partition
from numpyro_score.normaliser.partition import LogPartition
from numpyro_score.plots.axes import (
    BLACK,
    BLUE,
    ORANGE,
    VERMILION,
    as_axes,
    choose_columns,
    energy_of,
    require_plane,
    row_columns,
)

__all__ = ["plot_density", "plot_marginals", "plot_score_field"]

Source = Energy | ScoreMatchingResult | AdversarialResult

_LEVELS = (-8.0, -6.0, -4.5, -3.0, -2.0, -1.0, -0.5, 0.0)  # nats below the maximum


def plot_score_field(
    source: Source,
    *,
    columns: Sequence[int | str] | None = None,
    at: Any = None,
    num_points: int = 20,
    ax: Any = None,
) -> Any:
    r"""The score field :math:`\nabla f(x)` over the data, in the plane of two columns of the rows.

    Arrows have one length and point along the two components of the score; their colour is the length of these. In
    more than two dimensions all other columns are held at one value, and the picture is the score of the conditional
    density of the two columns given these: :math:`\nabla_{ij} f = \nabla_{ij} \log p(x_i, x_j \mid \text{others})`. The
    data are then projected onto the plane, not conditioned. Crosses mark where the score is not finite.

    Args:
        source: a fit or an energy; a score network without a density will do.
        columns: two columns, by index or name such as "x[0]". Default: the first two.
        at: (D,), a row with the values at which the other columns are held. Default: the medians of the data.
        num_points: arrows along each axis, over the range of the data.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: for other sources, rows with densities of their own, data on a sphere or simplex, data
            of one column, or an `at` of another shape or not finite.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    name = "plot_score_field"
    energy = energy_of(name, source)
    require_plane(name, energy)
    names, x, _ = row_columns(energy)
    if len(names) < 2:
        raise ValueError(f"{name} draws two columns, and rows of this model have one: use plot_density.")
    chosen = choose_columns(name, names, columns, 2)
    if len(chosen) != 2:
        raise ValueError(f"{name} draws two columns, got {columns!r}.")
    held = np.median(x, axis=0) if at is None else np.asarray(at, np.float64)
    if held.shape != (len(names),) or not np.isfinite(held).all():
        raise ValueError(f"{name} needs a finite row of {len(names)} numbers as at, got {at!r}.")
    (axes,) = as_axes(name, ax, size=(5.5, 4.6)).ravel()

    i, j = chosen
    low, high = x[:, chosen].min(axis=0), x[:, chosen].max(axis=0)
    # Rows at the ends of the range may lie on a boundary, where the density ends.
    inner = np.linspace(0, 1, num_points + 2)[1:-1, None] * (high - low) + low
    grid = np.tile(held, (num_points, num_points, 1))
    grid[..., i], grid[..., j] = inner[:, 0], inner[:, 1, None]
    score = np.asarray(energy.score(grid), np.float64)[..., chosen]
    finite = np.asarray(np.isfinite(score).all(axis=-1))
    length = np.linalg.norm(np.where(finite[..., None], score, 0.0), axis=-1)
    unit = score / np.where(length > 0, length, 1.0)[..., None]

    axes.scatter(
        x[:, i], x[:, j], s=_dot(x), color=ORANGE, alpha=0.5, linewidths=0, label=f"data, {len(x)} rows", zorder=1
    )
    place = grid[finite][:, chosen]
    form = dict(angles="xy", pivot="mid", scale_units="width", scale=1.2 * num_points, width=0.004, headwidth=3.5)
    arrows = axes.quiver(*place.T, *unit[finite].T, length[finite], cmap="viridis", zorder=2, **form)
    if not finite.all():
        axes.scatter(*grid[~finite][:, chosen].T, marker="x", color=VERMILION, label="score not finite", zorder=3)
    units = "length of the score, per unit of x" if len(names) == 2 else "length of the two components"
    axes.figure.colorbar(arrows, ax=axes, label=units)
    others = [k for k in range(len(names)) if k not in chosen]
    title = "Score of the density"
    if others:
        title = "Score given " + ", ".join(f"{names[k]} = {held[k]:.3g}" for k in others[:3])
        title += f" and {len(others) - 3} more" if len(others) > 3 else ""
    axes.set(xlabel=names[i], ylabel=names[j], title=title)
    axes.legend(loc="upper right", framealpha=0.9)
    return axes


def plot_density(source: Source, *, log_partition: LogPartition | float | None = None, ax: Any = None) -> Any:
    """The fitted density over the data, in one dimension or two.

    In one dimension exp(f(x) − log Z) over a histogram of the data, in two the contours of f below its maximum in the
    picture, which need no normaliser, over the data. Rows that count differently do so in the histogram.

    Args:
        source: a fit or an energy.
        log_partition: log Z, in one dimension; by quadrature if not given.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: for other sources, more than two dimensions, rows with densities of their own, data on a
            sphere or simplex, or a density that is unknown or cannot be normalised.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    name = "plot_density"
    energy = energy_of(name, source)
    require_plane(name, energy)
    names, x, weights = row_columns(energy)
    if len(names) > 2:
        raise ValueError(
            f"{name} draws one or two columns, and rows of this model have {len(names)}: use plot_marginals with draws "
            "of sample(fit, key, 1000)."
        )
    low, high = x.min(axis=0), x.max(axis=0)
    lower, upper = (np.asarray(b[0], np.float64) for b in energy.bounds(energy.num_rows))
    margin = 0.1 * (high - low)
    inside = 1e-3 * (high - low)  # at a bound the density may be zero or infinite
    low, high = np.maximum(low - margin, lower + inside), np.minimum(high + margin, upper - inside)
    if len(names) == 1:
        if log_partition is None:
            log_partition = find_log_partition(energy, "quadrature")
        normaliser = log_partition.value if isinstance(log_partition, LogPartition) else float(log_partition)
        grid = np.linspace(low, high, 400)
        values = np.exp(np.asarray(energy.log_density(grid), np.float64) - normaliser)
        (axes,) = as_axes(name, ax).ravel()
        edges = np.histogram_bin_edges(x[:, 0], "auto")
        label = f"data, {len(x)} rows"
        axes.hist(x[:, 0], edges, weights=weights, density=True, color=ORANGE, alpha=0.5, label=label)
        axes.plot(grid[:, 0], values, color=BLUE, linewidth=2, label="fitted density")
        axes.set(xlabel=names[0], ylabel=f"density, per unit of {names[0]}", title="Data and fitted density")
        axes.legend()
        return axes
    first, second = np.linspace(low, high, 200).T
    grid = np.stack(np.meshgrid(first, second), axis=-1)
    values = np.asarray(energy.log_density(grid), np.float64)
    (axes,) = as_axes(name, ax, size=(5.5, 4.6)).ravel()
    below = values - np.nanmax(values)
    shades = axes.contourf(first, second, below, levels=_LEVELS, cmap="Blues", extend="min")
    axes.contour(first, second, below, levels=_LEVELS[:-1], colors=BLACK, linewidths=0.4, linestyles="solid")
    edged = dict(edgecolors=BLACK, linewidths=0.3)  # seen on light and dark alike
    axes.scatter(*x.T, s=_dot(x), color=ORANGE, label=f"data, {len(x)} rows", **edged)
    axes.figure.colorbar(shades, ax=axes, label="log density below its maximum here, in nats")
    axes.set(xlabel=names[0], ylabel=names[1], title="Data and fitted density")
    axes.legend(loc="upper right", framealpha=0.9)
    return axes


def plot_marginals(
    source: Source, samples: Any, *, columns: Sequence[int | str] | None = None, ax: Any = None
) -> np.ndarray:
    """Data against samples: densities of single columns on the diagonal, pairs of columns below it.

    Single columns by ArviZ's kernel density estimate, in the data's own units. Discrete ones by the share of each
    value, and in pairs moved a little at random, so that equal rows do not hide each other.

    Args:
        source: a fit or an energy, for the data.
        samples: ArviZ data from :func:`~numpyro_score.sample`, or an array (M, K) of as many columns as one datum has.
        columns: at most six columns of the data, by index or name such as "x[0]". Default: the first five.
        ax: an array of (C, C) Matplotlib axes for C columns; new ones if not given.

    Returns:
        The axes, (C, C).

    Raises:
        TypeError, ValueError: for other sources, samples of another shape or not finite, or columns that are not there.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    name = "plot_marginals"
    energy = energy_of(name, source)
    names, data = data_columns(energy)
    is_arviz = not isinstance(samples, np.ndarray | jax.Array) and "posterior" in samples
    drawn = np.asarray(sample_columns(energy, samples) if is_arviz else samples, np.float64)
    if drawn.ndim != 2 or drawn.shape[1] != len(names) or not np.isfinite(drawn).all():
        raise ValueError(
            f"{name} needs finite samples of shape (M, {len(names)}), as a datum has {len(names)} numbers, got shape "
            f"{drawn.shape}."
        )
    chosen = choose_columns(name, names, columns, 6) if columns is not None else list(range(min(5, len(names))))
    count = len(chosen)
    axes = as_axes(name, ax, (count, count), (5.5, 3.8) if count == 1 else (2.2, 2.0))
    shown = {
        f"data, {len(data)} rows": (data, ORANGE, "-", 0.6),
        f"model, {len(drawn)} draws": (drawn, BLUE, "--", 0.35),
    }
    both, discrete = np.concatenate([data, drawn]), discrete_columns(energy)
    margin = np.where(discrete, 0.6, 0.05 * np.ptp(both, axis=0))
    rng = np.random.default_rng(0)
    limits = np.column_stack([both.min(axis=0) - margin, both.max(axis=0) + margin])
    for row, i in enumerate(chosen):
        for column, j in enumerate(chosen):
            panel = axes[row, column]
            if column > row:
                panel.axis("off")
                continue
            for side, (label, (values, color, style, alpha)) in zip((0.2, -0.2), reversed(shown.items()), strict=True):
                if i == j and discrete[i]:
                    at, counts = np.unique(values[:, i], return_counts=True)
                    panel.bar(at + side, counts / len(values), 0.4, color=color, label=label)
                elif i == j:
                    grid, density = az.kde(values[:, i])[:2]
                    panel.plot(grid, density, style, color=color, linewidth=2, label=label)
                else:
                    moved = values + np.where(discrete, rng.uniform(-0.3, 0.3, values.shape), 0.0)
                    panel.scatter(moved[:, j], moved[:, i], s=_dot(values) / 2, color=color, alpha=alpha, linewidths=0)
            panel.set_xlim(*limits[j])
            if i == j:
                panel.set(ylim=(0, None), yticks=[])
            else:
                panel.set_ylim(*limits[i])
            if row == count - 1:
                panel.set_xlabel(names[j])
            if column == 0 and row > 0:
                panel.set_ylabel(names[i])
    axes[0, 0].set_ylabel("share" if discrete[chosen[0]] else "density")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, -1].legend(handles[::-1], labels[::-1], loc="upper right", fontsize="small" if count > 1 else None)
    return axes


def _dot(rows: np.ndarray) -> float:
    """The area of a dot in points², so that many rows do not hide all else."""
    return float(np.clip(7500 / len(rows), 3, 10))
