"""Rows that depend on each other: the spread of sums of gradients over groups, or over windows of time and space."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from numpyro_score.uncertainty.hierarchy import ENOUGH_GROUPS
from numpyro_score.uncertainty.objective import SandwichError

__all__ = ["Dependence", "automatic_window", "spread_root"]


@dataclass(frozen=True, eq=False)
class Dependence:
    """Which rows depend on each other, as a matrix A for which the spread of gradients g is S = (Ag)ᵀ(Ag).

    Attributes:
        sums: A, (M, N): each of its rows adds up rows of the data.
        by_groups: whether these are groups, each row of the data in one.
        text: what they are, for people.
        of_coordinates: whether the rows are the numbers of one point, such as a series.
    """

    sums: scipy.sparse.csr_array
    by_groups: bool
    text: str
    of_coordinates: bool = False

    def of_parts(self, whole: scipy.sparse.sparray) -> Dependence:
        """The same for the numbers of one point, from sums over its parts (M, T), and these sums of numbers (T, D)."""
        return replace(self, sums=scipy.sparse.csr_array(self.sums @ whole), of_coordinates=True)

    @classmethod
    def of_groups(cls, numbers: Int[np.ndarray, "n"], name: str) -> Dependence:
        """Groups of rows that are independent of each other.

        Args:
            numbers: the group of each row, 0, 1, ...
            name: of what they are groups.
        """
        n = len(numbers)
        sums = scipy.sparse.csr_array((np.ones(n), (numbers, np.arange(n))), shape=(int(numbers.max()) + 1, n))
        return cls(sums, True, f"rows of one of {sums.shape[0]} {name} depend on each other")

    @classmethod
    def of_windows(cls, shape: Sequence[int], windows: Mapping[int, int], names: Sequence[str]) -> Dependence:
        r"""Rows in order along some axes, which depend on those nearby.

        All windows of L rows in a line are summed, those that reach over an end, too, and divided by √L: the outer
        products are Σ_l (1 − |l|/L)₊ Σ_t g_t g_{t+l}ᵀ, Bartlett's weights of the lags l [Newey & West 1987]; along
        several axes their product.

        Args:
            shape: of the rows, whose product is N.
            windows: L of each axis along which rows depend on each other; along others they do not.
            names: of the axes.
        """

        def sums(length: int, window: int) -> scipy.sparse.sparray:
            diagonals = [np.full(length, window**-0.5)] * window
            return scipy.sparse.diags_array(diagonals, offsets=-np.arange(window), shape=(length + window - 1, length))

        parts = [sums(n, windows.get(axis, 1)) for axis, n in enumerate(shape)]
        said = " and ".join(f"{w - 1} apart along {names[axis]}" for axis, w in windows.items())
        return cls(
            scipy.sparse.csr_array(reduce(scipy.sparse.kron, parts)), False, f"rows up to {said} depend on each other"
        )

    def encode(self, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """As JSON, with arrays that `put` takes."""
        a = self.sums
        parts = {k: put(v) for k, v in (("data", a.data), ("indices", a.indices), ("indptr", a.indptr))}
        return {**parts, "shape": list(a.shape), **{k: getattr(self, k) for k in _SAID}}

    @classmethod
    def decode(cls, entry: dict[str, Any], get: Callable[[Any], np.ndarray]) -> Dependence:
        """The inverse of :meth:`encode`."""
        parts = tuple(get(entry[k]) for k in ("data", "indices", "indptr"))
        return cls(scipy.sparse.csr_array(parts, shape=entry["shape"]), **{k: entry[k] for k in _SAID})

    def pieces(self, rows: Float[np.ndarray, "n k"], used: np.ndarray) -> Float[np.ndarray, "m k"]:
        """What the spread is the sum of squares of, from rows of mean zero, which are zero where they are not used.

        To take the mean away takes the spread of that from the sum: of G groups a share of 1/G, of windows of W of N
        rows W/N, less what of them is over an end.
        """
        n = int(used.sum())
        share = 1 / self.count(used) if self.by_groups else np.sum((self.sums @ used.astype(float)) ** 2) / n**2
        return (self.sums @ rows) / (1 - share) ** 0.5

    def degrees(self, used: np.ndarray) -> float:
        """Of freedom of the spread, for the t law of intervals: G − 1 for G groups.

        Of windows of W of N rows N/Σ_l (1 − |l|/W)² = 3NW/(2W² + 1), twice the squared mean of the spread over its
        variance; along several axes it is more.
        """
        if self.by_groups:
            return float(self.count(used) - 1)
        window = self._rows_of_a_window()
        return float(3 * used.sum() * window / (2 * window**2 + 1))

    def count(self, used: np.ndarray) -> int:
        """How many groups have a row that is used."""
        return int((self.sums @ used.astype(float) > 0).sum())

    def check(self, used: np.ndarray) -> None:
        """Looks at how many pieces there are.

        Raises:
            SandwichError: for fewer than two groups.

        Warns:
            UserWarning: for fewer than 30, of which the errors come out too small.
        """
        # Of windows: how many fit into the rows side by side.
        independent = self.count(used) if self.by_groups else math.floor(used.sum() / self._rows_of_a_window())
        if independent < 2:
            raise SandwichError(
                f"Errors of rows that depend on each other need the spread over independent pieces of the data, and "
                f"these are {independent}: give smaller groups or fewer lags."
            )
        if independent < ENOUGH_GROUPS:
            what = f"{independent} groups" if self.by_groups else f"windows that fit {independent} times into the rows"
            warnings.warn(
                f"The errors are from the spread over {what}: with fewer than {ENOUGH_GROUPS} they come out too small.",
                stacklevel=6,
            )

    def refuse_effects(self, names: tuple[str, ...]) -> None:
        """Raises SandwichError if terms of the prior are effects of groups, and so part of the law of the data."""
        if names and not self.of_coordinates:
            raise SandwichError(
                f"The prior of site '{names[0]}' says how rows of a group depend on each other, and the errors count "
                "it already: leave dependent_rows out, or the effects."
            )

    def _rows_of_a_window(self) -> int:
        return int(np.diff(self.sums.indptr).max())


_SAID = ("by_groups", "text", "of_coordinates")


def spread_root(
    gradients: Float[np.ndarray, "n p"], used: np.ndarray, dependence: Dependence | None
) -> Float[np.ndarray, "m p"]:
    """R, with RᵀR the spread S of the sum of the used rows' gradients, in double precision."""
    g = gradients[used]
    if dependence is None:
        return np.asarray(np.linalg.qr(g - g.mean(axis=0), mode="r")) * (len(g) / (len(g) - 1)) ** 0.5
    dependence.check(used)
    centred = np.where(used[:, None], gradients - g.mean(axis=0), 0.0)
    return np.asarray(np.linalg.qr(dependence.pieces(centred, used), mode="r"))


def automatic_window(gradients: Float[np.ndarray, "n p"]) -> int:
    r"""The window that is best for series like autoregressions of first order [Andrews 1991, eqs. 6.2 and 6.4].

    .. math:: L = 1.1447\,(\alpha N)^{1/3}, \quad
              \alpha = \frac1P\sum_p \frac{4\rho_p^2}{(1-\rho_p)^2(1+\rho_p)^2},

    with ρ_p the correlation of each coordinate of the gradients with the row before, each weighted by its inverse
    spread at frequency zero, so that units do not matter.
    """
    g = gradients - gradients.mean(axis=0)
    g = g[:, np.any(g != 0, axis=0)]
    if not g.size:
        return 1
    rho = np.clip(np.sum(g[1:] * g[:-1], axis=0) / np.sum(g**2, axis=0), -0.97, 0.97)
    alpha = np.mean(4 * rho**2 / ((1 - rho) ** 2 * (1 + rho) ** 2))
    return max(1, math.ceil(1.1447 * (alpha * len(g)) ** (1 / 3)))
