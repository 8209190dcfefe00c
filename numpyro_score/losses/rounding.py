"""What a loss that differences densities has to know of the data and of the density's own rounding."""

from __future__ import annotations

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.energy import Energy, numbered
from numpyro_score.operators import full_precision
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = [
    "constant_columns",
    "density_noise",
    "log_density_at",
    "warn_of_flat_data",
    "warn_of_rounded_counts",
]

_POINTS, _ROWS = 7, 64
_LARGE = 1000.0  # counts; of smaller ones a log density has three digits behind the point
_FELT = 2.5e-3  # of a log density: fits of negative binomial laws with as much did not arrive


def density_noise(energy: Energy, x: Float[Array, "n d"], spreads: Float[Array, "d"]) -> float:
    """The standard deviation of the rounding error of the log density at the data, whatever it is computed in.

    A density may be rounded far more coarsely than its dtype: by products of matrices on a GPU, or by layers in
    bfloat16. On seven equally spaced points of a line its k-th differences are those of a smooth function, which fall
    with k, or of noise: then σ² = (k!)²/(2k)! E(Δᵏf)² is the same for each k [Hamming 1973; Moré & Wild 2011]. Lines of
    several lengths are taken, as coarse rounding is constant on short ones, and the largest σ counts on which k = 4, 5
    and 6 agree, and two lengths ten times apart.

    Args:
        energy: at its data.
        x: rows at which to look; 64 of them do where the density takes any number.
        spreads: of the columns.
    """
    rows = x[jnp.linspace(0, len(x) - 1, _ROWS).astype(int)] if energy.resizable and len(x) > _ROWS else x
    lengths = 10.0 ** np.arange(math.ceil(math.log10(float(jnp.finfo(x.dtype).eps))) + 1, 0)
    v = jax.random.normal(jax.random.key(0), rows.shape, x.dtype) * spreads / math.sqrt(x.shape[-1])
    steps = jnp.asarray(np.multiply.outer(lengths, np.arange(_POINTS) - _POINTS // 2), x.dtype)
    lines = rows + steps[..., None, None] * v  # (length, point, row, D)
    f = fetch(run_compiled(log_density_at, energy, lines)).astype(np.float64)
    found = [_noise(at) for at in f[np.isfinite(f).all(axis=(1, 2))]]
    pairs = [(min(pair), max(pair)) for pair in itertools.pairwise(found)]
    return max((low for low, high in pairs if high < 3 * low), default=0.0)


def _noise(f: Float[np.ndarray, "7 n"]) -> float:
    """σ of noise, from values at seven equally spaced points of N lines; 0 where what varies is a smooth function."""
    sigmas = [
        math.factorial(k) / math.sqrt(math.factorial(2 * k)) * float(np.sqrt(np.mean(np.diff(f, k, axis=0) ** 2)))
        for k in (4, 5, 6)
    ]
    return float(np.mean(sigmas)) if min(sigmas) > 0.5 * max(sigmas) else 0.0


def warn_of_rounded_counts(owner: str, energy: Energy) -> None:
    """Warns where counts are so large that rounding of the log density is felt in its ratios.

    By the differences of :func:`density_noise` over seven counts in a row, at the largest of each column; beside the
    parameters, too, as terms that cancel at a start, such as lgamma(x + r) − lgamma(x + 1) at r = 1, are not rounded.

    Args:
        owner: the loss.
        energy: at its data.
    """
    x, weights = run_compiled(lambda e: e.data_and_weights(), energy)
    counts = jnp.where(weights[:, None] != 0, x, 0)
    beside = energy.with_params(jax.tree.map(_beside, energy.params))
    for column in energy.discrete_columns:
        largest = float(fetch(counts[:, column].max()))
        if largest < _LARGE:
            continue
        rows = counts
        if energy.resizable and len(x) > _ROWS:
            rows = counts[jax.lax.top_k(counts[:, column], _ROWS)[1]]
        lines = rows + jnp.arange(_POINTS).reshape(-1, 1, 1) * (jnp.arange(x.shape[1]) == column)
        chosen = fetch(rows[:, column]) >= max(_LARGE, 0.1 * largest)
        noise = 0.0
        for at in (energy, beside):
            f = fetch(run_compiled(log_density_at, at, lines)).astype(np.float64)
            if (finite := chosen & np.isfinite(f).all(axis=0)).any():
                noise = max(noise, _noise(f[:, finite]))
        if noise > _FELT:
            warnings.warn(
                f"Rounding moves the log density by {noise:.1g} at counts as large as {largest:.0f} of "
                f"{_names(energy, np.array([column]))}, and {owner} sees differences of it: estimates may be far off, "
                "and the fit may not arrive. Compute in double precision, jax.config.update('jax_enable_x64', True).",
                stacklevel=3,
            )
            return


def _beside(value: Array) -> Array:
    return 1.1 * value + 0.1 if jnp.issubdtype(jnp.result_type(value), jnp.inexact) else value


@full_precision
def log_density_at(energy: Energy, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """The log density with all products in the precision of its dtype."""
    return energy.log_density(x)


def warn_of_flat_data(owner: str, energy: Energy, by: str) -> None:
    """Warns where the data do not vary along a direction, and the density depends on it.

    That is a column that is constant, or columns of which one is a sum of multiples of the others.

    Args:
        owner: the loss.
        energy: at its data.
        by: what makes the estimate there, for the message.
    """
    x, weights = fetch(run_compiled(lambda e: e.data_and_weights(), energy))
    used = (fetch(run_compiled(lambda e: e.score(e.data), energy.usable()[0])) != 0).any(axis=0)
    constant, dependent = _flat_columns(x[weights != 0][:, used])
    columns = np.flatnonzero(used)[constant if constant.any() else dependent]
    if not len(columns):
        return
    shown = _names(energy, columns)
    what = f"The data are constant in {shown}" if constant.any() else f"One of {shown} follows from the others"
    warnings.warn(
        f"{what}: the data say nothing of the density's width there, and {owner}'s estimate of it is made by {by}. "
        f"Leave {'what is constant' if constant.any() else 'it'} out of data and model, or take DSM(sigma=...) if the "
        "data with that noise are meant.",
        stacklevel=3,
    )


def constant_columns(energy: Energy) -> str:
    """A sentence that names the columns of the data that are constant; nothing if there are none.

    For messages of fits that found no minimum, which may be why: the narrower such a column's law, the less the loss.
    """
    x, weights = fetch(run_compiled(lambda e: e.data_and_weights(), energy))
    columns = np.flatnonzero(_flat_columns(x[weights != 0])[0])
    if not len(columns):
        return ""
    return (
        f" The data are constant in {_names(energy, columns)}, so that there may be no minimum: leave what is constant "
        "out of data and model."
    )


def _names(energy: Energy, columns: np.ndarray) -> str:
    names: list[str] = []
    for a in energy.arrays:
        shape = a.support.coordinate_shape(a.shape)
        names += numbered(a.name, tuple(s for i, s in enumerate(shape) if i not in a.row_axes))
    return ", ".join(names[i] for i in columns[:4]) + (f" and {len(columns) - 4} more" if len(columns) > 4 else "")


def _flat_columns(x: Float[np.ndarray, "n d"]) -> tuple[Bool[np.ndarray, "d"], Bool[np.ndarray, "d"]]:
    """Which columns are constant, and which of the rest have a part in a sum that is constant but for rounding."""
    x = x[~np.isnan(x).any(axis=1)]
    n, d = x.shape
    constant = (x == x[:1]).all(axis=0) if n > 1 else np.zeros(d, bool)
    dependent = np.zeros(d, bool)
    if n <= d or constant.all():  # with as few rows some sum is always constant
        return constant, dependent
    rest = np.asarray(x[:, ~constant], np.float64)
    away, size = rest - rest.mean(axis=0), np.abs(rest).max(axis=0)
    spread = away.std(axis=0)
    values, vectors = np.linalg.eigh((away / spread).T @ (away / spread) / n)
    rounding = float(np.finfo(x.dtype).eps) * size / spread  # each number has an error of about a quarter of that
    null = vectors[:, values < len(values) * rounding.max() ** 2]
    dependent[~constant] = (np.abs(null) > 0.05).any(axis=1)
    return constant, dependent
