"""Parameters whose errors rest on few rows, which are told."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.placement import fetch
from numpyro_score.uncertainty.objective import Objective

__all__ = ["bends_of", "sums_of_bends", "warn_if_few_rows_bend", "warn_if_few_rows_enter"]

FEW_ROWS, ONE_OF = 4, 150  # rows in effect; see warn_if_few_rows_bend


def warn_if_few_rows_enter(
    objective: Objective, counts: np.ndarray, num_rows: int, curvatures: np.ndarray, effects: tuple[str, ...] = ()
) -> None:
    """The spread of few residuals says little, and the fit makes them small: one row alone has none at all.

    Args:
        objective: whose parameters these are.
        counts: rows whose loss has a first or second derivative in each, (P,).
        num_rows: all that count.
        curvatures: of the losses, (P,): 0 for what enters the prior alone.
        effects: sites with a law of their own in a hierarchy, whose spread tells their errors.
    """
    few = (counts < FEW_ROWS + 1) & (counts < num_rows) & (curvatures > 0)
    for name, block in objective.blocks().items():
        if name not in effects and few[block].any():
            least = max(counts[block][few[block]].min(), 1)
            warnings.warn(
                f"Numbers of site '{name}' are fitted to {least:.0f} of {num_rows} rows, "
                "whose spread tells their errors: these come out far too small. Merge groups of so few rows, or give "
                "their parameters a common law, in a hierarchy.",
                stacklevel=5,
            )
            return


def warn_if_few_rows_bend(objective: Objective, hessian: np.ndarray, bends: np.ndarray) -> None:
    r"""Errors are as uncertain as the curvature that they are divided by, which is a sum over rows, too.

    A density that bends over less than the distance of many rows, such as exp(-√(x² + ε)) with a tiny ε, has an
    objective full of minima. A fit finds one, where the curvature is that of the few rows nearby: intervals of 90% that
    are computed from it hold the truth in 5% to 75% of data sets.

    With g_n and h_n the first and second derivative of a row's loss in one coordinate, for m rows with h_n ≠ 0, the
    number of rows that bend the objective is in effect the squared ratio of its curvature to the standard error of it,

    .. math:: (H_{jj} / \beta)^2 \Big/ \tfrac{m}{m-1} \sum_n (h_n - \bar h)^2 (1 - \rho^2_{hg}).

    What the h_n share with the g_n is left out, as another scale of the coordinate would take it away.

    Args:
        objective: whose rows these are.
        hessian: of the whole objective, (P, P).
        bends: sums of 1, h, g, h², hg and g² over the rows with h ≠ 0, (6, P).

    Warns:
        UserWarning: for fewer than 4 such rows, if they are fewer than one of 150 as well. Densities with heavy tails
            come near to 4 where the rows are 50 to 200, and their intervals still cover.
    """
    count, h, g, hh, hg, gg = bends
    per_row = 1 / np.maximum(count, 1)
    hh, hg, gg = hh - h**2 * per_row, hg - h * g * per_row, gg - g**2 * per_row
    left = np.maximum(hh - hg**2 / np.where(gg > 0, gg, np.inf), 0.0) * count / np.maximum(count - 1, 1)
    share = float(objective.learning_rate) ** 2 * left / np.diag(hessian) ** 2  # the inverse of the number of rows
    few = (share > 1 / FEW_ROWS) & (share * count > ONE_OF)
    if few.any():
        worst = int(np.argmax(np.where(few, share, 0.0)))
        name = next(k for k, block in objective.blocks().items() if worst in block)
        warnings.warn(
            f"The errors of site '{name}' are known to ±{share[worst] ** 0.5:.0%} only, and may be far too small: in "
            f"effect {1 / share[worst]:.1f} of {count[worst]:.0f} rows bend the objective there. Either few rows have "
            "all the leverage, as outlying covariates have: look at them. Or the density bends over a width of few "
            "rows, and the objective has many minima: take e.g. a larger ε in sqrt(x**2 + ε), or NCE or PCD.",
            stacklevel=5,
        )


def bends_of(g: Float[Array, "n"], h: Float[Array, "n"]) -> Float[Array, "8"]:
    """These sums in units of the largest g and h, in which no square leaves single precision, and the units."""
    used = h != 0
    g = jnp.where(used, g, 0.0)
    units = [jnp.where(m > 0, m, 1.0) for m in (jnp.max(jnp.abs(h)), jnp.max(jnp.abs(g)))]
    h, g = h / units[0], g / units[1]
    return jnp.stack([jnp.sum(used, dtype=h.dtype), *(jnp.sum(v) for v in (h, g, h**2, h * g, g**2)), *units])


def sums_of_bends(bends: Array) -> np.ndarray:
    """The sums that :func:`derivatives` returns, (8, P), in double precision and their own units, (6, P)."""
    *sums, of_h, of_g = fetch(bends).astype(np.float64)
    return np.stack(sums) * [np.ones_like(of_h), of_h, of_g, of_h**2, of_h * of_g, of_g**2]
