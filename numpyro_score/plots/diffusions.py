"""Pictures of diffusions: their paths, and the calibration of what they draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats

from numpyro_score.diffusion import Diffused, SimulationRanks
from numpyro_score.plots.axes import BLACK, BLUE, GREY, ORANGE, VERMILION, as_axes

__all__ = ["plot_simulation_ranks", "plot_trajectories"]

_SHOWN = 100  # chains


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
        color = (BLUE, ORANGE, VERMILION, BLACK)[i % 4]
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
