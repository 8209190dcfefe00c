"""Pictures of what is compared: two laws along noise, and fits by their predictions."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import xarray as xr

from numpyro_score.diagnostics.plots.axes import BLACK, BLUE, ORANGE, VERMILION, as_axes

__all__ = ["plot_de_bruijn", "plot_khat"]


def plot_de_bruijn(result: Any, *, ax: Any = None) -> np.ndarray:
    """KL and Fisher divergence along the noise, and whether Fisher is the slope of KL, as de Bruijn's identity says.

    Left KL(p_t‖q_t), right the Fisher divergence and −d KL/dt, which should agree; bands and bars of two standard
    errors. The axis of t is logarithmic where the times are positive and spread over more than a factor of ten.

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
    t = np.asarray(result.times, np.float64)
    kl, kl_error, fisher, fisher_error, slope, slope_error = (
        np.asarray(v, np.float64)
        for v in (result.kl, result.kl_stderr, result.fisher, result.fisher_stderr, result.slope, result.slope_stderr)
    )
    left.plot(t, kl, "o-", color=BLUE, markersize=4)
    left.fill_between(t, kl - 2 * kl_error, kl + 2 * kl_error, color=BLUE, alpha=0.25, linewidth=0)
    left.set(xlabel="noise variance t", ylabel="KL(p_t‖q_t), in nats", title="KL along the noise")
    right.plot(t, fisher, "o-", color=ORANGE, markersize=4, label="Fisher divergence")
    right.fill_between(t, fisher - 2 * fisher_error, fisher + 2 * fisher_error, color=ORANGE, alpha=0.3, linewidth=0)
    right.errorbar(t, slope, 2 * slope_error, fmt="s", color=BLACK, markersize=4, capsize=3, label="−d KL/dt")
    right.set(xlabel="noise variance t", ylabel="nats per unit of t", title="Fisher is the slope of KL")
    right.legend()
    if t.min() > 0 and t.max() > 10 * t.min():
        left.set_xscale("log")
        right.set_xscale("log")
    return np.array([left, right])


def plot_khat(loo: Any, *, ax: Any = None) -> Any:
    """The Pareto shape k̂ of each row's importance weights in leave-one-out, by ArviZ's `plot_khat`.

    Rows above the line, whose estimates are not to be trusted, are named.

    Args:
        loo: what :func:`~numpyro_score.hyvarinen_loo` returns, or ArviZ's own `ELPDData` with pointwise values.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    (axes,) = as_axes("plot_khat", ax).ravel()
    good = float(getattr(loo, "good_k", 0.7))
    k = loo.pareto_k if isinstance(loo.pareto_k, xr.DataArray) else xr.DataArray(np.asarray(loo.pareto_k), dims="row")
    if hasattr(az, "PlotCollection"):  # ArviZ 1.x
        parts = xr.Dataset({"figure": ((), axes.figure), "plot": ((), axes)})
        collection = az.PlotCollection(k.to_dataset(name="pareto_k"), xr.DataTree(parts), backend="matplotlib")
        az.plot_khat(loo, color=BLUE, plot_collection=collection, visuals={"hlines": False})
    else:
        az.plot_khat(az.ELPDData({"pareto_k": k, "good_k": good}), color=BLUE, ax=axes, textsize=10)
    axes.axhline(good, color=VERMILION, linestyle="--", linewidth=1.2, label=f"reliable below {good:.2f}")
    values = np.asarray(k, np.float64).ravel()
    bad = np.flatnonzero(~(values <= good))
    for row in bad[np.argsort(-values[bad])][:5]:
        axes.annotate(f"row {row}", (row, values[row]), (5, 0), textcoords="offset points", va="center")
    axes.set(xlabel="row", ylabel="Pareto shape k̂", title=f"Leave-one-out: {len(bad)} of {len(values)} rows unreliable")
    axes.legend()
    return axes
