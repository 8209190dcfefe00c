"""Pictures of a fit: its losses, and what single rows do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from numpyro_score.energy import numbered
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.losses import loss_for
from numpyro_score.plots.axes import BLACK, BLUE, GREY, ORANGE, VERMILION, as_axes

__all__ = ["loss_of", "plot_influence", "plot_losses", "shares", "solved_at_once"]


def plot_losses(fit: ScoreMatchingResult | AdversarialResult, *, ax: Any = None) -> Any:
    """What a fit minimised, by step.

    For a :class:`~numpyro_score.ScoreMatching` fit the objective, with its running mean over 2 % of the steps. The
    picture is scaled to the steps after the first 5 %, which may lie above. Crosses mark steps that were skipped, as
    their loss was not finite (`stable_update`). For adversarial dynamics embedding two pictures: the data term and the
    bound on log Z, whose difference is an upper bound of the mean log likelihood, and the entropy of the flow.

    Args:
        fit: a fit.
        ax: Matplotlib axes, two for adversarial dynamics embedding; new ones if not given.

    Returns:
        The axes, an array of two for adversarial dynamics embedding.

    Raises:
        TypeError: for anything but a fit.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    if isinstance(fit, AdversarialResult):
        left, right = as_axes("plot_losses", ax, (1, 2)).ravel()
        _trace(left, fit.data_term, BLUE, "data term, mean of f over the data")
        _trace(left, fit.log_partition_bound, ORANGE, "lower bound on log Z", style="--")
        _scale_to_settled(left, fit.data_term, fit.log_partition_bound)
        left.set(xlabel="step", ylabel="nats per row", title="Likelihood: data term less log Z")
        left.legend()
        _trace(right, fit.joint_entropy, BLUE, "entropy of the flow")
        _scale_to_settled(right, fit.joint_entropy)
        right.set(xlabel="step", ylabel="entropy of x and momenta, in nats", title="Entropy of the flow")
        return np.array([left, right])
    if not isinstance(fit, ScoreMatchingResult):
        raise TypeError(f"plot_losses takes a fit, got {type(fit).__name__}.")
    (axes,) = as_axes("plot_losses", ax).ravel()
    losses = np.asarray(fit.losses, np.float64)
    name = type(loss_of(fit)).__name__
    if len(losses) == 1:
        axes.plot([0], losses, "o", color=BLUE)
        axes.set_title(f"{name}: solved in closed form" if solved_at_once(fit) else f"{name}: one step")
    else:
        _trace(axes, losses, BLUE, "objective")
        _scale_to_settled(axes, losses)
        axes.set_title(f"{name}: objective by step")
        if not np.isfinite(losses).all():
            axes.legend()
    axes.set(xlabel="step", ylabel="objective, sum over rows" + (" − log prior" if fit.has_prior else ""))
    return axes


def _trace(axes: Any, values: np.ndarray, color: str, label: str, style: str = "-") -> None:
    """Values by step with their running mean, and crosses at the bottom where they are not finite."""
    values = np.asarray(values, np.float64)
    steps, width = np.arange(len(values)), len(values) // 50
    finite = np.isfinite(values)
    if width > 1 and finite.all():
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width - 1 :], mean, style, color=color, linewidth=2, label=label)
    else:
        axes.plot(steps, values, style, color=color, linewidth=1.2, label=label)
    if not finite.all():
        skipped, at_bottom = steps[~finite], axes.get_xaxis_transform()
        label = f"not finite: {len(skipped)} of {len(steps)} steps"
        axes.plot(
            skipped, np.zeros(len(skipped)), "x", color=VERMILION, transform=at_bottom, clip_on=False, label=label
        )


def _scale_to_settled(axes: Any, *series: np.ndarray) -> None:
    """Limits that hold all values after the first 5 % of steps."""
    settled = np.concatenate([v[len(v) // 20 :] for v in series])
    settled = settled[np.isfinite(settled)]
    if settled.size and np.ptp(settled) > 0:
        margin = 0.05 * np.ptp(settled)
        axes.set_ylim(settled.min() - margin, settled.max() + margin)


def loss_of(fit: ScoreMatchingResult) -> Any:
    """The loss of a fit, the one chosen where none was given."""
    return loss_for(fit.svi.score_loss, fit.energy)


def solved_at_once(fit: ScoreMatchingResult) -> bool:
    """Whether the fit is the solution of linear equations, which leaves the optimiser's step counter at zero."""
    return len(fit.losses) == 1 and int(fit.state.optim_state[0]) == 0


def _names(fit: ScoreMatchingResult, site: str, shape: tuple[int, ...]) -> list[str]:
    """Names of the numbers of a variable of that shape: of a site, or of what is computed from several."""
    names, own = numbered(site, shape), fit.number_names.get(site, [])
    return own if len(own) == len(names) else names


def plot_influence(
    fit: ScoreMatchingResult, *, of: Callable[[dict[str, Any]], Any] | None = None, ax: Any = None
) -> Any:
    r"""How far each row moves the estimates, in their standard errors; the three rows that move them most are named.

    The height of row n is the largest :math:`|I_{nj}| / \sqrt{\sum_m I_{mj}^2}` over parameters j, with the influence
    I of :meth:`fit.influence() <numpyro_score.ScoreMatchingResult.influence>`. Its square is the share of the row in
    the sandwich variance of that estimate, in a hierarchy in the rows' part of it. The line is at 1/√N, where all rows
    would be if their shares were equal.

    Args:
        fit: a fit.
        of: a function of the estimates, whose influence is shown instead; above 2,000 parameters it must be given.
        ax: Matplotlib axes; new ones if not given.

    Returns:
        The axes.

    Raises:
        TypeError: for anything but a fit of :class:`~numpyro_score.ScoreMatching`.
        SandwichError: as `fit.influence`.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.
    """
    if not isinstance(fit, ScoreMatchingResult):
        raise TypeError(f"plot_influence takes a fit of ScoreMatching, got {type(fit).__name__}.")
    names, share, _ = shares(fit, of)
    largest, parameter = share.max(axis=1), share.argmax(axis=1)
    n = len(largest)
    (axes,) = as_axes("plot_influence", ax).ravel()
    axes.vlines(np.arange(n), 0, largest, color=GREY, linewidth=0.6)
    axes.plot(np.arange(n), largest, "o", color=BLUE, markersize=3, label="rows")
    axes.axhline(n**-0.5, color=BLACK, linestyle="--", linewidth=1, label=f"equal shares, 1/√{n}")
    most, arrays = np.argsort(-largest)[:3], fit.energy.arrays
    for row in most:
        axes.annotate(fit.labels.row_name(int(row), arrays), (row, largest[row]), (3, 2), textcoords="offset points")
    named = "\n".join(f"row {fit.labels.row_name(int(row), arrays)}: {names[parameter[row]]}" for row in most)
    axes.text(0.02, 0.97, named, transform=axes.transAxes, va="top")
    axes.set(xlabel="row", ylabel="largest influence, in standard errors", title="Influence of rows")
    axes.set_ylim(0, 1.45 * largest.max())  # the names and the legend are above the rows
    axes.legend(loc="upper right", frameon=False)
    return axes


def shares(
    fit: ScoreMatchingResult, of: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Parameters that the data move, |influence| of rows in standard errors, and its signs: (Q,), (N, Q), (N, Q)."""
    names, columns = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(fit.influence(of)):
        site = jax.tree_util.keystr(path, simple=True, separator=".") or "of"
        names += _names(fit, site, leaf.shape[1:])
        columns.append(np.asarray(leaf, np.float64).reshape(len(leaf), -1))
    signed = np.concatenate(columns, axis=1)
    influence = np.abs(signed)
    moved = influence.max(axis=0) > 0
    if not moved.any():
        raise ValueError("No row moves any estimate: the data do not enter the objective.")
    influence, names = influence[:, moved], [k for k, m in zip(names, moved, strict=True) if m]
    influence = influence / influence.max(axis=0)  # whose squares are in the range of floats
    return names, influence / np.linalg.norm(influence, axis=0), np.sign(signed[:, moved])
