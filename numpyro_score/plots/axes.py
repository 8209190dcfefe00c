"""What all plots share: axes, colours, and the rows and columns that they draw."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import numpy as np

from numpyro_score.energy import SIMPLICES, Energy, numbered
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult

__all__ = [
    "BLACK",
    "BLUE",
    "GREY",
    "ORANGE",
    "VERMILION",
    "as_axes",
    "choose_columns",
    "energy_of",
    "require_plane",
    "row_columns",
]

# Colours that colour-blind readers tell apart [Okabe & Ito 2008]; no plot relies on colour alone.
BLACK, GREY = "#000000", "#8a8a8a"
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"


def as_axes(owner: str, ax: Any, shape: tuple[int, int] = (1, 1), size: tuple[float, float] = (5.5, 3.8)) -> np.ndarray:
    """The axes to draw in, an array of the given shape: those given, or new ones in a figure of Pyplot's.

    Args:
        owner: the plot's name, for messages.
        ax: Matplotlib axes, an array of them, or None.
        shape: rows and columns of axes.
        size: of one of them in inches.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if `ax` does not hold as many axes.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{owner} needs Matplotlib: pip install 'numpyro-score[plots]'.")
    if ax is None:
        import matplotlib.pyplot as plt

        figsize = (size[0] * shape[1], size[1] * shape[0])
        return plt.subplots(*shape, figsize=figsize, squeeze=False, layout="constrained")[1]
    given = np.asarray(ax, dtype=object)
    if given.size != shape[0] * shape[1]:
        raise ValueError(f"{owner} draws into {shape[0] * shape[1]} axes, got {given.size}: pass ax=None, or as many.")
    return given.reshape(shape)


def energy_of(owner: str, source: Any) -> Energy:
    """The energy of a fit, at rows without missing cells where some have these, or the energy itself.

    Raises:
        TypeError: for anything else.
    """
    energy = source.energy if isinstance(source, ScoreMatchingResult | AdversarialResult) else source
    if not isinstance(energy, Energy):
        raise TypeError(f"{owner} takes a fit or an Energy, got {type(source).__name__}.")
    return energy.whole_rows() if getattr(source, "has_missing_cells", False) else energy


def require_plane(owner: str, energy: Energy) -> None:
    """Raises unless all rows have one density, in coordinates of which each can vary by itself."""
    if energy.num_rows > 1 and not energy.resizable:
        raise ValueError(
            f"{owner} draws one density, and the model's {energy.num_rows} rows may each have their own (covariates, "
            "bounds by row, or a plate of fixed size): bind it to one row, e.g. Energy(model, params, x[:1], z[:1])."
        )
    for a in energy.arrays:
        if a.support.is_discrete:
            raise ValueError(
                f"{owner} draws a density on a plane, and site '{a.name}' is discrete ({a.support.kind}): use "
                "plot_marginals."
            )
        if a.support.kind in ("sphere", *SIMPLICES):
            raise ValueError(
                f"{owner} varies two coordinates by themselves, and site '{a.name}' lives on a {a.support.kind}: use "
                "plot_marginals."
            )


def row_columns(energy: Energy) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the D coordinates of rows, and the rows of some weight: (D,), (N, D) and their weights (N,)."""
    names = energy.column_names if all(a.support.kind != "other" for a in energy.arrays) else []
    for a in energy.arrays if not names else ():
        label = f"unconstrained {a.name}" if a.support.kind == "other" else a.name
        shape = a.support.coordinate_shape(a.shape)
        names += numbered(label, tuple(s for i, s in enumerate(shape) if i not in a.row_axes))
    x, weights = (np.asarray(v, np.float64) for v in jax.device_get(energy.data_and_weights()))
    return names, x[weights != 0], weights[weights != 0]


def choose_columns(owner: str, names: list[str], columns: Any, most: int) -> list[int]:
    """Indices of columns given by index or name; the first `most` if none are given.

    Raises:
        ValueError: for a column that is not there, twice the same, or more than `most`.
    """
    if columns is None:
        return list(range(min(most, len(names))))
    for c in columns:
        if c not in names and not (isinstance(c, int | np.integer) and 0 <= c < len(names)):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"{owner} has no column {c!r}: use an index below {len(names)}, or a name of {shown}.")
    found = [names.index(c) if isinstance(c, str) else int(c) for c in columns]
    if len(set(found)) != len(found) or not 0 < len(found) <= most:
        raise ValueError(f"{owner} takes 1 to {most} different columns, got {columns!r}.")
    return found
