"""Pictures of what is compared: two laws along noise, and fits by their predictions."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import xarray as xr

from numpyro_score.comparison.compare import Comparison
from numpyro_score.divergences.de_bruijn import DeBruijn
from numpyro_score.plots.axes import BLACK, BLUE, ORANGE, VERMILION, as_axes

__all__ = ["plot_comparison", "plot_de_bruijn", "plot_khat"]


def plot_de_bruijn(result: DeBruijn, *, ax: Any = None) -> np.ndarray:
    """KL and Fisher divergence along the noise, and whether Fisher is the slope of KL, as de Bruijn's identity says.

    Left KL(p_t‖q_t), right β² times the Fisher divergence and −d KL/dt, which should agree; bands and bars of two
    standard errors. The axis of t is logarithmic where the times spread over more than a factor of ten.

    Args:
        result: what :func:`~numpyro_score.de_bruijn` returns.
        ax: two Matplotlib axes; new ones if not given.

    Returns:
        The two axes.

    Raises:
        ValueError: if `ax` is not two axes.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    left, right = as_axes("plot_de_bruijn", ax, (1, 2)).ravel()
    t, kl, kl_error, slope, slope_error = result.times, result.kl, result.kl_stderr, result.slope, result.slope_stderr
    fisher, fisher_error = result.diffusion * result.fisher, result.diffusion * result.fisher_stderr
    name = "Fisher divergence" if (result.diffusion == 1).all() else "β² × Fisher divergence"
    left.plot(t, kl, "o-", color=BLUE, markersize=4)
    left.fill_between(t, kl - 2 * kl_error, kl + 2 * kl_error, color=BLUE, alpha=0.25, linewidth=0)
    left.set(xlabel="time t of the noise", ylabel=r"KL$(p_t \,\Vert\, q_t)$, in nats", title="KL along the noise")
    right.plot(t, fisher, "o-", color=ORANGE, markersize=4, label=name)
    right.fill_between(t, fisher - 2 * fisher_error, fisher + 2 * fisher_error, color=ORANGE, alpha=0.3, linewidth=0)
    right.errorbar(t, slope, 2 * slope_error, fmt="s", color=BLACK, markersize=4, capsize=3, label="−d KL/dt")
    right.set(xlabel="time t of the noise", ylabel="nats per unit of t", title="Fisher is the slope of KL")
    right.legend()
    if t.max() > 10 * t.min() > 0:
        left.set_xscale("log")
        right.set_xscale("log")
    return np.array([left, right])


def plot_khat(loo: Any, *, ax: Any = None) -> Any:
    """The Pareto shape k̂ of each row's importance weights in leave-one-out, by ArviZ's `plot_khat`.

    Rows above the line, whose estimates are not to be trusted, are named.

    Args:
        loo: what :func:`~numpyro_score.hyvarinen_loo` returns, or the `ELPDData` of `az.loo`.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        ValueError: for a score without importance weights.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    if getattr(loo, "pareto_k", None) is None:  # a held-out score, or `az.loo` without pointwise values
        raise ValueError("There is no k̂ in this: pass the result of hyvarinen_loo, or of az.loo(..., pointwise=True).")
    (axes,) = as_axes("plot_khat", ax).ravel()
    k, good = loo.pareto_k, float(loo.good_k)
    if hasattr(az, "PlotCollection"):  # ArviZ 1.x
        parts = xr.Dataset({"figure": ((), axes.figure), "plot": ((), axes)})
        collection = az.PlotCollection(k.to_dataset(name="pareto_k"), xr.DataTree(parts), backend="matplotlib")
        az.plot_khat(loo, color=BLUE, plot_collection=collection, visuals={"hlines": False})
    else:
        az.plot_khat(az.ELPDData({"pareto_k": k, "good_k": good}), color=BLUE, ax=axes, textsize=10)
    axes.axhline(good, color=VERMILION, linestyle="--", linewidth=1.2, label=f"reliable below {good:.2f}")
    values = np.asarray(k, np.float64).ravel()
    numbers = np.asarray(k.coords[k.dims[0]]) if k.ndim == 1 and k.dims[0] in k.coords else np.arange(len(values))
    bad = np.flatnonzero(~(values <= good))
    for i in bad[np.argsort(-values[bad])][:5]:
        axes.annotate(f"row {numbers[i]}", (i, values[i]), (5, 0), textcoords="offset points", va="center")
    label = "row" if numbers[-1] == len(values) - 1 else "row, of those with a weight"
    title = f"Leave-one-out: {len(bad)} of {len(values)} rows unreliable"
    axes.set(xlabel=label, ylabel="Pareto shape k̂", title=title)
    axes.legend()
    return axes


def plot_comparison(comparison: Comparison, *, ax: Any = None) -> np.ndarray:
    """How far each fit is behind the best, under KL and under Fisher, with bars of two standard errors.

    Left the log likelihood, with the error of log Z in its bars, which ArviZ's `plot_compare` would leave out; right
    the Hyvärinen score, or what stands in its place for discrete data. Fits are in the order of the table, the one of
    highest likelihood at the top. Further from the line is worse on both sides. Without likelihoods there is only the
    right picture.

    Args:
        comparison: what :func:`~numpyro_score.compare` returns.
        ax: two Matplotlib axes, or one without likelihoods; new ones if not given.

    Returns:
        The axes, (2,) or (1,).

    Raises:
        ValueError: for another number of axes.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    table = comparison.table
    rule = comparison.rule
    sides = [("score", f"{rule.under[:1].upper()}{rule.under[1:]}: {rule.score} above the lowest", ORANGE, "s")]
    if comparison.order_kl is not None:
        sides.insert(0, ("log_likelihood", "KL: log likelihood below the highest, in nats", BLUE, "o"))
    axes = as_axes("plot_comparison", ax, (1, len(sides)), (4.6, 1.4 + 0.4 * len(table))).ravel()
    place = np.arange(len(table))
    for panel, (column, title, color, marker) in zip(axes, sides, strict=True):
        difference, error = table[f"{column}_diff"].to_numpy(float), table[f"{column}_dse"].to_numpy(float)
        panel.axvline(0, color=BLACK, linewidth=1, linestyle="--")
        panel.errorbar(difference, place, xerr=2 * error, fmt=marker, color=color, capsize=3)
        panel.set(yticks=place, yticklabels=table.index, ylim=(len(table) - 0.5, -0.5), xlabel="sum over rows")
        panel.set_title(title, fontsize="medium")
    return axes
