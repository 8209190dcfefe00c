"""Moments of data beside those of draws, tested all at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.divergences.columns import chain_columns, data_columns
from numpyro_score.divergences.law import Draws, thin
from numpyro_score.energy import Energy, numbered

__all__ = ["MomentTest", "moment_test", "permutation_test"]

_MOST_ROWS = 4000  # of the data: more would not help beside as many draws
_MOST_PAIRED = 50  # columns whose correlations are compared
_LEAST_ROWS, _LEAST_DRAWS = 10, 50
_FAR = 5.0  # robust standard deviations
_BATCH = 100  # permutations at once

Pairs = tuple[np.ndarray, np.ndarray]  # indices of the first and second column of each pair


class MomentTest(NamedTuple):
    """Statistics of data and of draws, and how far they are apart."""

    names: list[str]
    data: Float[np.ndarray, "k"]
    draws: Float[np.ndarray, "k"]
    z: Float[np.ndarray, "k"]  # draws less data, in standard errors
    pvalues: Float[np.ndarray, "k"]  # family-wise
    num_rows: int
    num_draws: int  # that are all but independent

    @property
    def furthest(self) -> int:
        """The statistic that is furthest apart."""
        return int(np.argmax(np.abs(self.z)))

    @property
    def pvalue(self) -> float:
        """Of the hypothesis that data and draws have one law."""
        return float(self.pvalues[self.furthest])


def moment_test(energy: Energy, samples: Any, rng_key: Array) -> MomentTest:
    r"""Means, variances, skewnesses and correlations of the columns of data and of draws, with family-wise p-values.

    With rows of both in one table, each statistic is linearised at the moments of the table: z, z², z³ − 3z − 3γ/2 z²
    and z_i z_j − ρ/2 (z_i² + z_j²), for standardised columns z of skewness γ and correlation ρ. Its difference between
    the means over data and over draws is divided by its standard error. The p-value is the share of random
    permutations of the table's rows under which *any* statistic is as far apart [Westfall & Young 1993, maxT]. This is
    exact for any law and any correlation of the statistics, for independent rows. Therefore

    - chains are thinned until their rows all but are independent;
    - rows of weight w are kept with probability w / max w, which makes them independent rows of the weighted law;
    - values further than five robust standard deviations from a column's median are moved there: else one far value
      would decide its standard errors.

    Parameters that were fitted to the data bring moments that they determine closer together, so that p is too
    large. Angles enter by their cosines and sines. Above 50 columns the correlations are those of the first 50.

    Args:
        energy: at the data.
        samples: what :func:`~numpyro_score.sample` returned for it.
        rng_key: a key, for the permutations and where rows are left out.

    Raises:
        ValueError: for fewer than 10 rows or 50 independent draws, or chains that do not move.
    """
    names, data = data_columns(energy)
    chains = chain_columns(energy, samples)
    keep_key, key = jax.random.split(rng_key)
    data = data[_kept(energy, keep_key)]
    names, (data, chains) = _without_angles(energy, names, data, chains)
    if len(data) < _LEAST_ROWS:
        raise ValueError(f"moments need at least {_LEAST_ROWS} rows, and there are {len(data)}.")
    if (total := chains.shape[0] * chains.shape[1]) < _LEAST_DRAWS:
        raise ValueError(f"moments need at least {_LEAST_DRAWS} independent draws, and there are {total}.")
    # Single precision is enough for the chains' autocorrelation in these units.
    centre, scale = np.median(data, axis=0), np.where(np.ptp(data, axis=0) > 0, data.std(axis=0), 1.0)
    draws = centre + scale * np.asarray(thin(Draws(jnp.asarray((chains - centre) / scale, float), False)), np.float64)
    if len(draws) < _LEAST_DRAWS:
        raise ValueError(f"moments need at least {_LEAST_DRAWS} independent draws, and there are {len(draws)}.")
    paired = np.triu_indices(min(len(names), _MOST_PAIRED), 1)
    z, pvalues = permutation_test(data, draws, paired, np.random.default_rng(np.asarray(jax.random.bits(key, (4,)))))
    low, high = _fences(np.concatenate([data, draws]))
    of_data, of_draws = (_statistics(np.clip(x, low, high), paired) for x in (data, draws))
    labels = [f"{what} of {name}" for what in ("mean", "variance", "skewness") for name in names]
    labels += [f"correlation of {names[i]} and {names[j]}" for i, j in zip(*paired, strict=True)]
    return MomentTest(labels, of_data, of_draws, z, pvalues, len(data), len(draws))


def _kept(energy: Energy, rng_key: Array) -> np.ndarray:
    """Which rows of some weight are used: by their weights, and not more than are of use."""
    weights = np.asarray(energy.data_and_weights()[1], np.float64)
    weights = weights[weights != 0]
    chance = np.asarray(jax.random.uniform(rng_key, (2, len(weights))))
    kept = np.flatnonzero(chance[0] < weights / weights.max(initial=0.0)) if len(weights) else np.arange(0)
    return np.sort(kept[np.argsort(chance[1][kept])[:_MOST_ROWS]])


def _without_angles(energy: Energy, names: list[str], *columns: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Columns (..., K) with cosine and sine in place of each angle."""
    angles: list[bool] = []
    for a in energy.arrays:
        size = len(numbered("", tuple(s for i, s in enumerate(a.shape) if i not in a.row_axes)))
        angles += [a.support.kind == "circle"] * size
    angle = np.array(angles)
    if not angle.any():
        return names, list(columns)
    found = [np.concatenate([v[..., ~angle], np.cos(v[..., angle]), np.sin(v[..., angle])], -1) for v in columns]
    turned = [n for n, a in zip(names, angles, strict=True) if a]
    straight = [n for n, a in zip(names, angles, strict=True) if not a]
    return [*straight, *(f"cos {n}" for n in turned), *(f"sin {n}" for n in turned)], found


def _fences(table: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """Five robust standard deviations below and above the median of each column."""
    lower, median, upper = np.quantile(table, [0.25, 0.5, 0.75], axis=0)
    spread = (upper - lower) / 1.349
    spread = np.where(spread > 0, spread, table.std(axis=0))  # where half of the values are equal
    return median - _FAR * spread, median + _FAR * spread


def _statistics(x: Float[np.ndarray, "n d"], paired: Pairs) -> Float[np.ndarray, "k"]:
    """Means, variances, skewnesses and correlations; zero where a column does not vary."""
    z = _standardised(x)
    i, j = paired
    return np.concatenate([x.mean(axis=0), x.var(axis=0), (z**3).mean(axis=0), (z.T @ z / len(z))[i, j]])


def permutation_test(
    data: Float[np.ndarray, "n d"],
    draws: Float[np.ndarray, "m d"],
    paired: Pairs,
    rng: np.random.Generator,
    num_permutations: int = 1000,
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Differences of the statistics of independent rows in standard errors, draws less data; family-wise p-values."""
    n, m = len(data), len(draws)
    table = np.concatenate([data, draws])
    table = np.clip(table, *_fences(table))
    features = _standardised(_linear(_standardised(table), paired)).astype(np.float32)
    scale = (1 / n + 1 / m) ** 0.5
    first = (np.arange(n + m) < n).astype(np.float32)
    z = -scale * (first @ features)
    reached: list[float] = []
    while len(reached) < num_permutations:
        chosen = rng.permuted(np.tile(first, (min(_BATCH, num_permutations - len(reached)), 1)), axis=1)
        reached += list(scale * np.abs(chosen @ features).max(axis=-1))
    # Relabelled sums that are equal differ by rounding.
    count = np.sum(np.array(reached)[:, None] >= np.abs(z) * (1 - 1e-5), axis=0)
    return z, (1 + count) / (num_permutations + 1)


def _linear(z: Float[np.ndarray, "n d"], paired: Pairs) -> Float[np.ndarray, "n k"]:
    """What each row adds to the means, variances, skewnesses and correlations of standardised columns."""
    i, j = paired
    products = z[:, i] * z[:, j]
    skewness, correlation = np.mean(z**3, axis=0), np.mean(products, axis=0)
    products = products - 0.5 * correlation * (z[:, i] ** 2 + z[:, j] ** 2)
    return np.concatenate([z, z**2, z**3 - 3 * z - 1.5 * skewness * z**2, products], axis=1)


def _standardised(x: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """Columns of mean 0 and variance 1; zeros where they do not vary beyond rounding."""
    mean, sd = x.mean(axis=0), x.std(axis=0)
    varies = sd > 1e-12 * np.maximum(np.abs(mean), np.abs(x).max(axis=0))
    return np.where(varies, (x - mean) / np.where(varies, sd, 1.0), 0.0)
