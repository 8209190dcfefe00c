"""Rows with missing cells: the loss of the cells that were seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float

from numpyro_score.energy import FLAT, AnyEnergy, Energies, Energy, RowWeight, SeenCells, rows_text, seen_cells
from numpyro_score.losses.base import Loss, at_least_one, check_settings
from numpyro_score.losses.default import DefaultLoss, loss_for
from numpyro_score.losses.discrete import DiscreteFisher, PairLikelihood, PseudoLikelihood, RatioMatching
from numpyro_score.losses.dsm import DSM
from numpyro_score.losses.imputation import draw, moments, typical_rows
from numpyro_score.losses.ism import ISM
from numpyro_score.losses.mixed import Mixed
from numpyro_score.losses.ssm import SSM
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["MissingCells"]

_MOMENTS = "missing_cells_moments"
_LEVEL = 1e-3  # of a warning that cells are not missing at random, for all pairs of columns together
_ENOUGH = 20  # cells on each side of a comparison
_LOOKED_AT = 100_000  # rows


@dataclass(frozen=True)
class MissingCells:
    r"""A loss of rows with missing cells, which are NaN, by the density of the cells that were seen.

    The cells o of a row that were seen have the density :math:`p(x_o) = \int p(x_o, x_m)\,dx_m`, whose score and
    second derivatives in :math:`x_o` need no normaliser either [Givens, Liu & Reeve 2025]:

    .. math:: \partial_j \log p(x_o) = E[\partial_j f \mid x_o], \quad
              \partial_j^2 \log p(x_o) = E[\partial_j^2 f + (\partial_j f)^2 \mid x_o] - E[\partial_j f \mid x_o]^2,

    so that a loss of these sums over the cells that were seen; likewise the ratios that a discrete loss takes.
    Expectations are over K draws of the missing cells, from a Student law with the mean and covariance that they have
    given the others in a normal law of the data, with weights :math:`e^f / q`. They are drawn anew at each evaluation.
    Cells with bounds, angles and integers are drawn on the line of their logarithms or logits, inside of their support.
    The value has a bias of order 1/K, none where the density is a product over columns, and none of rows whose missing
    cells are integers that together take at most K values, which are all taken. In graphs of five columns and 500 rows,
    a fifth of the cells missing, estimates with K = 8 are a fifteenth of their standard errors away from those with 32
    (`python -m benchmarks.missing_cells`).

    Cells must be missing completely at random, whatever their values and those of other cells. For score matching it
    is not enough that what is missing depends on cells that were seen alone. A row counts by its cells: NaN in all of
    them is refused, and so is infinity. A call costs K evaluations of the density for each row, also of whole rows.

    Args:
        loss: `ISM()`, `SSM(...)` or `DSM(sigma)` with one number; for discrete data `PseudoLikelihood(...)`,
            `PairLikelihood()`, `RatioMatching()` or `DiscreteFisher()`; `Mixed` of these. Default: what a fit of whole
            rows takes, by the data.
        num_draws: K, an even number.

    Raises:
        TypeError: for another loss, and a boundary weight of whole rows.
        ValueError: for an odd number of draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_score import MissingCells, ScoreMatching
        >>> def model(x):
        ...     a = numpyro.param("a", 0.0)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)), obs=x)
        ...         numpyro.factor("energy", -jnp.sum(x**2, -1) + a * x[:, 0] * x[:, 1])
        >>> x = jax.random.normal(jax.random.key(0), (400, 2))
        >>> x = x.at[:100, 0].set(jnp.nan)
        >>> fit = ScoreMatching(model, loss=MissingCells(num_draws=8), num_steps=300).run(
        ...     jax.random.key(1), x, progress_bar=False
        ... )
        >>> abs(float(fit.estimates["a"])) < 3 * float(fit.stderr()["a"]) + 0.1
        True
    """

    loss: Loss = DefaultLoss()  # noqa: RUF009
    num_draws: int = 32

    takes_missing: ClassVar[bool] = True
    takes_discrete: ClassVar[bool] = True
    no_closed_form: ClassVar[bool] = True  # draws have weights by the density, which are no sums over the data
    allow_kinks: ClassVar[bool] = True  # the loss inside looks for them

    def __post_init__(self) -> None:
        _require_known(self.loss)
        object.__setattr__(self, "num_draws", at_least_one("MissingCells", "num_draws", self.num_draws))
        if self.num_draws % 2:
            raise ValueError(
                f"MissingCells draws pairs, got num_draws = {self.num_draws}: give an even number, 2 or more."
            )

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        return run_compiled(self._values, energy, rng_key)  # the density of seen cells lives inside of a program

    def _values(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        draw_key, loss_key = jax.random.split(rng_key)
        return loss_for(self.loss, energy)(self._seen(energy, draw_key)[0], loss_key)

    @property
    def no_kinks(self) -> str:
        """Why the loss cannot have a jump of the score, if it cannot."""
        return str(self.loss.no_kinks)  # type: ignore[attr-defined]

    def prepare(self, energy: Energy) -> Energy:
        """With the moments of all rows, which chunks of them cannot know."""
        return energy.with_params({_MOMENTS: moments(energy)})

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """As many evaluations at once as the loss itself has."""
        rows: int | None = getattr(loss_for(self.loss, energy), "rows_per_chunk", lambda _: None)(energy)
        return None if rows is None else max(rows // self.num_draws, 8)

    def filled(self, energy: AnyEnergy) -> Energy:
        """The energy with typical cells of the columns in the place of missing ones, at which it can be looked at.

        Raises:
            NotImplementedError, TypeError: for several plates, or a support that ties the numbers of a row.
            ValueError: for infinity, a row or a column without any cell.
        """
        if isinstance(energy, Energies):
            raise NotImplementedError("MissingCells takes data in one plate, and these are in several.")
        for a in energy.arrays:
            if a.support.kind not in (*FLAT, "box") and not a.support.is_discrete:
                raise NotImplementedError(
                    f"MissingCells takes numbers that vary each by itself, and those of site '{a.name}' are tied "
                    f"together ({a.support.kind}): fill the cells, or drop these rows."
                )
        if not energy.has_density:
            raise TypeError("MissingCells weighs draws by the density, and that of a score_factor is unknown.")
        x, weights = energy.data_and_weights()
        infinite, empty, columns = _faults(x, weights)
        names = ", ".join(f"'{a.name}'" for a in energy.arrays)
        if fetch(infinite).any():
            raise ValueError(f"Data {names} are infinite in {rows_text(infinite)}: correct them, or put NaN there.")
        if (bad := np.flatnonzero(fetch(columns))).size:
            raise ValueError(f"Column {energy.column_names[bad[0]]} of the data has fewer than two cells: drop it.")
        if fetch(empty).any():
            raise ValueError(
                f"Data {names} have no cell that was seen in {rows_text(empty)}: drop these rows or mask them with "
                "handlers.mask."
            )
        return energy.at(run_compiled(typical_rows, energy))

    def check(self, energy: Energy) -> None:
        """Raises as :meth:`filled` and the loss; warns if what is missing depends on the values of other cells."""
        check_settings(loss_for(self.loss, energy), self.filled(energy))
        x, weights = energy.data_and_weights()
        rows = np.flatnonzero(fetch(weights))[:_LOOKED_AT]
        if (pair := _most_dependent(fetch(x[rows]))) is not None:
            one, other, how = pair
            names = energy.column_names
            warnings.warn(
                f"Cells of {names[one]} are missing where those of {names[other]} are {how}: MissingCells takes cells "
                "as missing completely at random, and estimates are biased where they are not.",
                stacklevel=6,
            )

    def effective_draws(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """How many equally weighted draws the weights of a row's draws are worth, (N,): K where they are exact.

        Few of them make the loss noisy and biased: give more draws.
        """
        return run_compiled(self._effective_draws, energy, rng_key)  # one program, not one for each operation

    def _effective_draws(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        energy, weights = energy.usable()
        seen, exact = self._seen(self.prepare(energy), rng_key)
        return jnp.where(exact | (weights == 0), self.num_draws, seen.effective_points())

    def _seen(self, energy: Energy, rng_key: Array) -> tuple[SeenCells, Bool[Array, "n"]]:
        known = energy.params[_MOMENTS] if _MOMENTS in energy.params else moments(energy)
        points, log_weights, exact = draw(energy, rng_key, known, self.num_draws)
        return seen_cells(energy.at(points[0]), jnp.isnan(energy.data), points, log_weights), exact


def _require_known(loss: Any) -> None:
    """Raises TypeError for a loss that MissingCells cannot take."""
    if loss is None or isinstance(loss, type):
        raise TypeError(
            f"MissingCells needs a loss such as ISM(), got {getattr(loss, '__name__', loss)}: write ISM(), "
            "or MissingCells() for that of whole rows."
        )
    if isinstance(loss, Mixed):
        for piece in (loss.continuous, loss.discrete):
            _require_known(piece)
    elif isinstance(loss, ISM | SSM):
        if isinstance(loss.boundary_weight, RowWeight):
            raise TypeError(
                "MissingCells knows no distances of cells that are missing, and a RowWeight sees those of whole rows: "
                f"write {type(loss).__name__}(boundary_weight=...) with a function of one distance."
            )
    elif isinstance(loss, DSM):
        if isinstance(loss.sigma, tuple):
            raise TypeError(f"MissingCells takes DSM(sigma) with one number, got {loss!r}.")
    elif not isinstance(loss, DefaultLoss | PseudoLikelihood | PairLikelihood | RatioMatching | DiscreteFisher):
        raise TypeError(
            "MissingCells takes ISM, SSM, DSM(sigma) with one number, PseudoLikelihood, PairLikelihood, RatioMatching, "
            f"DiscreteFisher and Mixed of these, got {loss!r}: other losses need whole rows."
        )


@jax.jit
def _faults(
    x: Float[Array, "n d"], weights: Float[Array, "n"]
) -> tuple[Bool[Array, "n"], Bool[Array, "n"], Bool[Array, "d"]]:
    """Rows with infinity, rows without any cell that was seen, and columns with fewer than two."""
    used = weights != 0
    seen = ~jnp.isnan(x) & used[:, None]
    return used & jnp.isinf(x).any(axis=1), used & ~seen.any(axis=1), jnp.sum(seen, axis=0) < 2


def _most_dependent(x: np.ndarray) -> tuple[int, int, str] | None:
    """A column whose cells are missing where another's are large, small, or far from or near its middle; None if none.

    Normal scores of each column are compared between the rows where another's cell is missing and where it is not, and
    so are their squares, at one level for all pairs of columns.
    """
    seen = ~np.isnan(x)
    ranks = scipy.stats.rankdata(x, axis=0, nan_policy="omit")
    z = np.where(seen, scipy.stats.norm.ppf(np.where(seen, ranks, 1.0) / (seen.sum(axis=0) + 1)), 0.0)
    without, others = (~seen).T.astype(float) @ seen, seen.T.astype(float) @ seen  # (D, D) rows of the second column
    found: list[tuple[Any, str, str]] = []
    for scores, below, above in ((z, "small", "large"), (z**2, "near their middle", "far from their middle")):
        centred = np.where(seen, scores - scores.sum(axis=0) / np.maximum(seen.sum(axis=0), 1), 0.0)
        variance = np.sum(centred**2, axis=0) / np.maximum(seen.sum(axis=0) - 1, 1)
        there, elsewhere = (
            m.T.astype(float) @ centred / np.maximum(n, 1) for m, n in ((~seen, without), (seen, others))
        )
        error = np.sqrt(variance * (1 / np.maximum(without, 1) + 1 / np.maximum(others, 1)))
        enough = (without >= _ENOUGH) & (others >= _ENOUGH) & (error > 0)
        found.append((np.where(enough, (there - elsewhere) / np.where(error > 0, error, 1.0), 0.0), below, above))
    largest = max(found, key=lambda f: float(np.abs(f[0]).max(initial=0.0)))
    differences, below, above = largest
    tests = 2 * x.shape[1] * max(x.shape[1] - 1, 1)
    at = np.unravel_index(int(np.abs(differences).argmax()), differences.shape)
    if 2 * scipy.stats.norm.sf(abs(differences[at])) * tests > _LEVEL:
        return None
    return int(at[0]), int(at[1]), above if differences[at] > 0 else below
