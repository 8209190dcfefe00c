"""Pictures of diffusions: their paths, and the calibration of what they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from numpyro_score.diffusion import Diffused, NoiseBits, SimulationRanks
from numpyro_score.plots.axes import BLACK, BLUE, GREY, ORANGE, VERMILION, as_axes

__all__ = ["plot_bits_by_noise", "plot_draws_by_calls", "plot_simulation_ranks", "plot_trajectories"]

_SHOWN = 100  # chains
_COLORS = (BLUE, ORANGE, VERMILION, BLACK)


def plot_trajectories(result: Diffused, data: Any, *, column: int = 0, ax: Any = None) -> np.ndarray:
    """Data that become noise, and noise that becomes draws, along the noise level.

    Left paths of u = x + ρ-noise from rows of the data, right the chains of a sampler, both through the same levels; at
    most 100 of each. The two should be alike at every level.

    Args:
        result: what :func:`~numpyro_score.diffuse` returns with `trajectory=True`.
        data: rows of the data, (N, D) or (N,).
        column: which of the D numbers of a row.
        ax: two Matplotlib axes; new ones if not given.

    Returns:
        The two axes.

    Raises:
        ValueError: without a trajectory, for a column that is not there, or rows of another width.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    if result.trajectory is None:
        raise ValueError("There are no paths in this: write diffuse(..., trajectory=True).")
    paths = np.asarray(result.trajectory, np.float64)
    rows = np.asarray(data, np.float64).reshape(len(data), -1)
    if rows.shape[1] != paths.shape[2] or not 0 <= column < paths.shape[2]:
        raise ValueError(
            f"plot_trajectories got column {column} and rows of {rows.shape[1]} numbers, and chains of "
            f"{paths.shape[2]}: pass the data that were fitted, and a column below that."
        )
    axes = as_axes("plot_trajectories", ax, (1, 2)).ravel()
    rng, rho = np.random.default_rng(0), result.noise
    start = rows[rng.choice(len(rows), min(len(rows), _SHOWN), replace=False), column]
    steps = np.sqrt(np.diff(np.r_[0.0, rho[::-1]] ** 2))  # of a Brownian path at time ρ²
    forward = start + np.cumsum(steps[:, None] * rng.normal(size=(len(rho), len(start))), axis=0)
    reverse = paths[:, :_SHOWN, column]
    limit = np.percentile(np.abs(np.concatenate([forward[-1], reverse[0]])), 99) * 1.1
    for panel, levels, lines, color, title in (
        (axes[0], rho[::-1], forward, BLUE, "From data to noise"),
        (axes[1], rho, reverse, ORANGE, "From noise to draws"),
    ):
        panel.plot(levels, lines, color=color, linewidth=0.6, alpha=0.5)
        panel.set(xscale="log", ylim=(-limit, limit), xlabel="noise ρ", ylabel=f"x[{column}]", title=title)
    axes[1].invert_xaxis()
    return axes


def plot_draws_by_calls(
    results: Mapping[str, Sequence[Diffused]], data: Any = None, *, columns: tuple[int, int] = (0, 1), ax: Any = None
) -> np.ndarray:
    """Draws of several methods, one row of pictures for each, against the calls of the model that they took.

    Two numbers of a row are points above those of the data in grey; rows of one number are histograms.

    Args:
        results: by the method's name, what :func:`~numpyro_score.diffuse` returned with some numbers of steps.
        data: rows of the data, (N, D) or (N,), to compare with.
        columns: which two of the D numbers of a row.
        ax: Matplotlib axes, one for each draw; new ones if not given.

    Returns:
        The axes, (methods, most draws of one).

    Raises:
        ValueError: for nothing to draw, draws of several sites, columns that are not there.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    if not results or not all(len(r) for r in results.values()):
        raise ValueError("plot_draws_by_calls needs some draws of each method, e.g. {'ddim': [diffuse(...)]}.")
    shape = len(results), max(map(len, results.values()))
    axes = as_axes("plot_draws_by_calls", ax, shape).reshape(shape)
    known = None if data is None else _two_columns(data, columns)[:2000]
    for (name, draws_of_one), row in zip(results.items(), axes, strict=True):
        for panel in row[len(draws_of_one) :]:
            panel.set_axis_off()
        for found, panel in zip(draws_of_one, row, strict=False):
            _draw_beside(panel, _two_columns(found.draws, columns), known)
            panel.set_title(f"{name}, {found.num_calls} calls", fontsize="medium")
    shown = axes.ravel()[0]
    for panel in axes.ravel()[1:]:
        panel.sharex(shown)
        panel.sharey(shown)
    return axes


def _draw_beside(panel: Any, draws: np.ndarray, known: np.ndarray | None) -> None:
    """Draws (N, 2) as points or (N, 1) as a histogram, above those known in grey."""
    if draws.shape[1] == 1:
        low, high = np.percentile(draws if known is None else np.concatenate([draws, known]), [0.5, 99.5])
        edges = np.linspace(low, high, 40)
        if known is not None:
            panel.hist(known[:, 0], edges, density=True, color=GREY, alpha=0.5)
        panel.hist(draws[:, 0], edges, density=True, color=BLUE, histtype="step")
        return
    if known is not None:
        panel.scatter(*known.T, s=3, color=GREY, alpha=0.5, linewidths=0)
    panel.scatter(*draws[:2000].T, s=3, color=BLUE, alpha=0.5, linewidths=0)


def _two_columns(rows: Any, columns: tuple[int, int]) -> np.ndarray:
    """(N, 2), or (N, 1) of rows of one number."""
    if isinstance(rows, Mapping):
        raise ValueError(f"plot_draws_by_calls draws one site and got {', '.join(rows)}: make them one by hand first.")
    x = np.asarray(rows, np.float64).reshape(len(rows), -1)
    if x.shape[1] == 1:
        return x
    if not all(0 <= c < x.shape[1] for c in columns):
        raise ValueError(f"plot_draws_by_calls got columns {columns} and rows of {x.shape[1]} numbers.")
    return x[:, list(columns)]


def plot_bits_by_noise(results: NoiseBits | Mapping[str, NoiseBits], *, ax: Any = None) -> np.ndarray:
    """At which noise a model of every noise level knows how much: its error left, and bits right.

    The error is that of the noise ε in its own unit, 1 where the model knows nothing and 0 where it sees the noise; the
    area under it from some noise on, over ln 2, are the bits that it needs for a number with this noise. Bands are of
    two standard errors. Where held-out rows lie above those of the fit the model has learned these by heart.

    Args:
        results: what :func:`~numpyro_score.bits_by_noise` returns; several by their names.
        ax: two Matplotlib axes; new ones if not given.

    Returns:
        The two axes.

    Raises:
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    axes = as_axes("plot_bits_by_noise", ax, (1, 2)).ravel()
    named = {"": results} if isinstance(results, NoiseBits) else results
    for i, (name, found) in enumerate(named.items()):
        color = _COLORS[i % 4]
        for panel, value, error in (
            (axes[0], found.error, found.error_stderr),
            (axes[1], found.bits, found.bits_stderr),
        ):
            panel.plot(found.noise, value, color=color, label=name)
            panel.fill_between(found.noise, value - 2 * error, value + 2 * error, color=color, alpha=0.25, linewidth=0)
    axes[0].set(xscale="log", xlabel="noise ρ", ylabel="error of the noise", ylim=(0, None))
    axes[1].set(xscale="log", xlabel="noise ρ", ylabel="bits a number", ylim=(0, None))
    if any(named):
        axes[1].legend(fontsize="small")
    return axes


def plot_simulation_ranks(result: SimulationRanks, *, ax: Any = None) -> Any:
    """Ranks of simulated truths: how far their distribution function is from that of uniform ranks.

    Lines within the grey band are as even as 95% of right samplers' [a simultaneous band for each line, Säilynoja,
    Bürkner & Vehtari 2022]; with K lines, one of right draws leaves it about K times as often. A line above the band
    at low ranks says that truths are too often low; an arch that draws are too wide or too narrow.

    Args:
        result: what :func:`~numpyro_score.simulation_ranks` returns.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    (axes,) = as_axes("plot_simulation_ranks", ax).ravel()
    k, n = result.num_draws + 1, len(next(iter(result.ranks.values())))
    place = np.arange(1, k) / k  # the share of ranks below each of 1 to L
    low, high = _band(n, k)
    axes.fill_between(place, low - place, high - place, color=GREY, alpha=0.3, linewidth=0, label="95% band")
    axes.axhline(0, color=BLACK, linewidth=1, linestyle="--")
    styles = ["-", "--", "-.", ":"]
    for i, (name, ranks) in enumerate(result.ranks.items()):
        share = np.array([np.mean(ranks < r) for r in range(1, k)])
        color = _COLORS[i % 4]
        axes.plot(place, share - place, styles[(i // 4) % 4], color=color, label=name, drawstyle="steps-mid")
    axes.set(xlabel="rank of the truth, as a share", ylabel="share of data sets below, less uniform")
    axes.set_title(f"{n} data sets; pairs of data and truth: p = {result.joint_pvalue:.2g}", fontsize="medium")
    axes.legend(fontsize="small")
    return axes


def _band(n: int, k: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise binomial limits of the distribution function of n uniform ranks among k, that hold for all at once."""
    rng = np.random.default_rng(0)
    counts = np.cumsum(rng.multinomial(n, np.full(k, 1 / k), size=4000), axis=1)[:, :-1]
    share = np.arange(1, k) / k
    below, above = scipy.stats.binom.cdf(counts, n, share), scipy.stats.binom.sf(counts - 1, n, share)
    tail = np.quantile(np.minimum(below, above).min(axis=1), 1 - level)
    return scipy.stats.binom.ppf(tail, n, share) / n, scipy.stats.binom.isf(tail, n, share) / n
