"""Objectives for discrete data, of ratios of the density at neighbouring points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, evaluations, log_ratios
from numpyro_score.losses.base import at_least_one, set_counts
from numpyro_score.losses.chunks import rows_at_once, rows_in_cache
from numpyro_score.losses.rounding import warn_of_rounded_counts
from numpyro_score.operators import full_precision
from numpyro_score.placement import fetch

__all__ = [
    "DiscreteFisher",
    "PairLikelihood",
    "PseudoLikelihood",
    "RatioMatching",
    "refuse_mixed",
    "require_discrete",
]


@dataclass(frozen=True)
class PseudoLikelihood:
    r"""The negative log pseudo-likelihood, −Σ_d log p(x_d | x_{−d}) [Besag 1975].

    Each number of a row is seen given the others, and the normaliser of its conditional law is a sum over the values
    that it may take:

    .. math:: -\log p(x_d \mid x_{-d}) = \log \sum_v \exp[f(x^{d \to v}) - f(x)].

    The estimates are consistent, and those of maximum likelihood where the numbers are independent, as one number is.
    In densities affine in the parameters the objective is convex. Costs 1 + D (V − 1) densities for V values, one
    gradient where the density is a quadratic of the data. Returns (N,) values.

    Args:
        max_count: for counts, whose support has no largest value: where their conditional laws are cut off. Take it so
            large that what lies beyond has no probability to speak of at the estimates; the cost grows with it.

    Raises:
        TypeError, ValueError: for a max_count that is not an integer of at least 1. When called: for continuous data,
            rows that hold some (see :class:`~numpyro_score.Mixed`), and counts without a max_count.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import PseudoLikelihood, ScoreMatching
        >>> def model(x):  # two spins with a coupling
        ...     b, w = numpyro.param("b", jnp.zeros(2)), numpyro.param("w", 0.0)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), (2,)), obs=x)
        ...         numpyro.factor("energy", x @ b + w * x[:, 0] * x[:, 1])
        >>> x = jnp.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
        >>> fit = ScoreMatching(model, loss=PseudoLikelihood()).run(jax.random.key(0), x, progress_bar=False)
        >>> round(float(fit.estimates["w"]), 3)  # log(2 · 2 / (1 · 1)), as for maximum likelihood
        1.386
    """

    max_count: int | None = None

    takes_discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_count is not None:
            object.__setattr__(self, "max_count", at_least_one("PseudoLikelihood", "max_count", self.max_count))

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        shifts = self._shifts(energy)
        ratios, valid = log_ratios(energy, shifts, cycle=True, top=self.max_count)
        ratios = jnp.where(valid, ratios, -jnp.inf)
        values = jax.nn.logsumexp(jnp.pad(ratios, ((0, 0), (0, 0), (1, 0))), axis=-1).sum(axis=-1)
        if self.max_count is None:
            return values
        return jnp.where((energy.data[:, energy.discrete_columns] <= self.max_count).all(axis=-1), values, jnp.nan)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        return _rows_per_chunk(energy, self.evaluations(energy))

    def evaluations(self, energy: Energy) -> int:
        """Of the log density, for each row."""
        return evaluations(energy, len(self._shifts(energy)))

    def check(self, energy: Energy) -> None:
        """Raises TypeError for rows that hold continuous numbers, and ValueError for counts beyond max_count."""
        refuse_mixed(energy, "PseudoLikelihood")
        self._shifts(energy)
        warn_of_rounded_counts("PseudoLikelihood", energy)
        if self.max_count is None:
            return
        x, weights = energy.data_and_weights()
        largest = fetch(jnp.max(jnp.where(weights[:, None] != 0, x[:, energy.discrete_columns], 0)))
        if largest > self.max_count:
            raise ValueError(
                f"PseudoLikelihood cuts the counts off at max_count={self.max_count}, and there are some up to "
                f"{largest:.0f}: take a larger one, beyond which counts have no probability to speak of."
            )

    def _shifts(self, energy: Energy) -> range:
        require_discrete(energy, "PseudoLikelihood")
        sizes: list[int] = []
        for a in energy.arrays:
            if not a.support.is_discrete:
                continue
            size = a.support.size
            if size is None and self.max_count is None:
                if a.support.kind == "counts":
                    raise ValueError(
                        f"PseudoLikelihood sums over all values, and the counts of site '{a.name}' have no largest "
                        "one: write PseudoLikelihood(max_count=...), or use PairLikelihood()."
                    )
                raise ValueError(
                    f"PseudoLikelihood sums over all values of site '{a.name}', whose bounds the model computes: write "
                    "them as Python integers, or write PseudoLikelihood(max_count=...)."
                )
            sizes.append((self.max_count or 0) + 1 if size is None else size)
        return range(1, max(sizes))


@dataclass(frozen=True)
class PairLikelihood:
    r"""The conditional likelihood of pairs of values: of each number, given that it is one of two.

    .. math:: -\sum_d \sum_{s \in \pm\{1, 2, 4, \dots\}} \log p(x_d \mid x_{-d},\ x_d \in \{x_d, x_d + s\})
              = \sum_d \sum_s \log\left[1 + \frac{p(x^{d \to x_d + s})}{p(x)}\right].

    A composite likelihood [Lindsay 1988]: each pair is judged by a proper score with no normaliser but the sum of the
    two, and for the distance 1 alone the pairs tie all values together, so that the estimates are consistent. It is
    conditional noise-contrastive estimation [Ceylan & Gutmann 2018] with the noise ±s, summed over s in place of drawn.
    Nothing is summed over all values, so that it takes counts without end. A row whose probability is far below that
    of a neighbour weighs as its logarithm, as in a likelihood. In densities affine in the parameters the objective is
    convex, and of binary data it is the pseudo-likelihood.

    Distances up to the spread of the law are needed: for geometric laws of mean 10 and 100, distance 1 alone has a
    tenth and a hundredth of the information of the likelihood, the distances 1 to 1,024 nine tenths; for Poisson,
    Conway–Maxwell–Poisson and negative binomial laws they have 0.93 to 0.98, of wide ones 0.7 (`benchmarks/PAIRS.md`).

    Costs 1 + 2 D S densities for S distances, one gradient where the density is a quadratic of the data. Returns (N,)
    values.

    Args:
        num_distances: S, of the distances 1, 2, 4, ..., 2^(S − 1). Those without a second value in the support are left
            out.

    Raises:
        TypeError, ValueError: for a num_distances that is not an integer from 1 to 24. When called: for continuous data
            and rows that hold some (see :class:`~numpyro_score.Mixed`).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import PairLikelihood, ScoreMatching
        >>> def model(x):  # a geometric law, p(x + 1) / p(x) = e^a
        ...     a = numpyro.param("a", -1.0)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.nonnegative_integer, (), ()), obs=x)
        ...         numpyro.factor("energy", a * x)
        >>> x = dist.Geometric(0.1).sample(jax.random.key(0), (2000,))
        >>> fit = ScoreMatching(model, loss=PairLikelihood()).run(jax.random.key(1), x, progress_bar=False)
        >>> bool(abs(fit.estimates["a"] - jnp.log(0.9)) < 3 * fit.stderr()["a"])
        True
    """

    num_distances: int = 11

    takes_discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_counts(self, "num_distances")
        if self.num_distances > 24:
            raise ValueError(
                f"PairLikelihood needs num_distances of at most 24, got {self.num_distances}: it counts distances "
                "1, 2, 4, ..., and floats know no larger integers."
            )

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        ratios, valid = log_ratios(energy, self._shifts(energy), cycle=False)
        return jnp.where(valid, jax.nn.softplus(ratios), 0.0).sum(axis=(1, 2))

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        return _rows_per_chunk(energy, self.evaluations(energy))

    def evaluations(self, energy: Energy) -> int:
        """Of the log density, for each row."""
        return evaluations(energy, len(self._shifts(energy)))

    def check(self, energy: Energy) -> None:
        """Raises TypeError for rows that hold continuous numbers."""
        refuse_mixed(energy, "PairLikelihood")
        warn_of_rounded_counts("PairLikelihood", energy)

    def _shifts(self, energy: Energy) -> tuple[int, ...]:
        require_discrete(energy, "PairLikelihood")
        sizes = [a.support.size for a in energy.arrays if a.support.is_discrete]
        most = math.inf if None in sizes else max(s for s in sizes if s is not None)
        distances = [2**k for k in range(self.num_distances) if 2**k < most]
        return (*(-s for s in reversed(distances)), *distances)


@dataclass(frozen=True)
class RatioMatching:
    r"""Ratio matching of binary data [Hyvärinen 2007, eq. 14].

    .. math:: \sum_d g\!\left(\frac{p(x)}{p(\bar x_d)}\right)^2, \quad g(u) = \frac{1}{1 + u},

    with x̄_d the row x with number d flipped: Σ_d σ(f(x̄_d) − f(x))², the squared probability that x_d were the other
    value given the rest. It is bounded, so that rows of small probability have less to say than under
    :class:`~numpyro_score.PseudoLikelihood`. Costs 1 + D densities, one gradient where the density is a quadratic of
    the data. Returns (N,) values.

    Raises:
        TypeError: when called, for continuous data and for more than two values.
    """

    takes_discrete: ClassVar[bool] = True

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        self._require_two_values(energy)
        ratios, valid = log_ratios(energy, (1,), cycle=True)
        return jnp.where(valid, jax.nn.sigmoid(ratios) ** 2, 0.0).sum(axis=(1, 2))

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        return _rows_per_chunk(energy, self.evaluations(energy))

    def evaluations(self, energy: Energy) -> int:
        """Of the log density, for each row."""
        return evaluations(energy, 1)

    def check(self, energy: Energy) -> None:
        """Raises TypeError for rows that hold continuous numbers."""
        refuse_mixed(energy, "RatioMatching")
        self._require_two_values(energy)

    def _require_two_values(self, energy: Energy) -> None:
        require_discrete(energy, "RatioMatching")
        for a in energy.arrays:
            if a.support.is_discrete and a.support.size != 2:
                raise TypeError(
                    f"RatioMatching compares two values, and site '{a.name}' has more ({a.support.kind}): use "
                    "PseudoLikelihood() or PairLikelihood()."
                )


@dataclass(frozen=True)
class DiscreteFisher:
    r"""The discrete Fisher divergence of Matsubara, Knoblauch, Briol & Oates [2023], up to a constant of the data.

    .. math:: \sum_d \left(\frac{p(x^{d-})}{p(x)}\right)^2 - 2 \frac{p(x)}{p(x^{d+})},

    with x^{d−} and x^{d+} the row x with number d one step lower and higher. Its mean is
    E Σ_d (p(x^{d−})/p(x) − π(x^{d−})/π(x))² for data of law π, less a term without p. Nothing is summed over the
    values, so that it takes counts without end. Ratios are not bounded: rows at which the model's probability is far
    below that of a neighbour weigh much, as outliers of least squares do.

    On a path the first term is left out where there is no lower value, and the second where there is no higher; on a
    cycle the largest value is followed by the least; on a complete graph all values are steps both ways. The estimates
    are consistent for each, whatever the values mean; their variance depends on it.

    Costs 1 + 2 D densities, 1 + D for binary data, 1 + D (V − 1) on the complete graph; one gradient where the density
    is a quadratic of the data. Returns (N,) values.

    Args:
        neighbours: "path", "cycle" or "complete". Default: a cycle where there are finitely many values, as in the
            paper, and the path of all counts.

    Raises:
        ValueError: for another word; when called, for a cycle or a complete graph of counts.
        TypeError: when called, for continuous data.
    """

    neighbours: Literal["path", "cycle", "complete"] | None = None

    takes_discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.neighbours not in (None, "path", "cycle", "complete"):
            raise ValueError(
                f"DiscreteFisher needs neighbours that are 'path', 'cycle' or 'complete', got {self.neighbours!r}."
            )

    @full_precision
    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        shifts, both = self._shifts(energy)
        graph = self._graph(energy)
        ratios, valid = log_ratios(energy, shifts, cycle=graph != "path")
        lower, higher = (ratios, ratios) if both else (ratios[..., :1], ratios[..., 1:])
        has_lower, has_higher = (valid, valid) if both else (valid[..., :1], valid[..., 1:])
        first = jnp.where(has_lower, jnp.exp(2 * lower), 0.0).sum(axis=(1, 2))
        return first - 2 * jnp.where(has_higher, jnp.exp(-higher), 0.0).sum(axis=(1, 2))

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        return _rows_per_chunk(energy, self.evaluations(energy))

    def evaluations(self, energy: Energy) -> int:
        """Of the log density, for each row."""
        return evaluations(energy, len(self._shifts(energy)[0]))

    def check(self, energy: Energy) -> None:
        """Raises TypeError for rows that hold continuous numbers."""
        refuse_mixed(energy, "DiscreteFisher")
        self._shifts(energy)
        warn_of_rounded_counts("DiscreteFisher", energy)

    def _graph(self, energy: Energy) -> str:
        require_discrete(energy, "DiscreteFisher")
        counts = [a.name for a in energy.arrays if a.support.kind == "counts"]
        if counts and self.neighbours in ("cycle", "complete"):
            raise ValueError(
                f"DiscreteFisher has no {self.neighbours} of the counts of site '{counts[0]}', which have no largest "
                "value: write neighbours='path'."
            )
        return self.neighbours or ("path" if counts else "cycle")

    def _shifts(self, energy: Energy) -> tuple[tuple[int, ...], bool]:
        """The steps, and whether each is both a step down and a step up."""
        graph = self._graph(energy)
        known = [a.support.size for a in energy.arrays if a.support.is_discrete]
        sizes = [size for size in known if size is not None]
        if graph == "complete":
            if len(sizes) < len(known):
                raise ValueError(
                    "DiscreteFisher(neighbours='complete') needs to know how many values there are: write the bounds "
                    "of the sites' integer_interval as Python integers."
                )
            return tuple(range(1, max(sizes))), True
        if graph == "cycle" and set(known) == {2}:
            return (1,), True
        return (-1, 1), False


def require_discrete(energy: Energy, owner: str) -> None:
    """Raises TypeError unless some of the data are discrete, and ValueError if they have one value only."""
    for a in energy.arrays:
        if a.support.size == 1:
            raise ValueError(
                f"Site '{a.name}' has one value only, so that no point has a neighbour: give its "
                "constraints.integer_interval(low, high) two values or more."
            )
    if not len(energy.discrete_columns):
        a = energy.arrays[0]
        raise TypeError(
            f"{owner} is for discrete data, and {a.what} is continuous ({a.support.kind}): use ISM() or SSM(), or "
            f"observe a site that says so, e.g. numpyro.sample('{a.name}', dist.ImproperUniform(constraints.boolean, "
            f"(), (d,)), obs={a.name})."
        )


def refuse_mixed(energy: Energy, owner: str) -> None:
    """Raises TypeError for rows that hold continuous numbers, too, of which `owner` says nothing."""
    require_discrete(energy, owner)
    for a in energy.arrays:
        if not a.support.is_discrete:
            raise TypeError(
                f"{owner} sees the discrete numbers of a row alone, and {a.what} is continuous ({a.support.kind}): "
                f"write Mixed(ISM(), {owner}()), or condition on it with data='...', the discrete site."
            )


def _rows_per_chunk(energy: Energy, count: int) -> int | None:
    in_cache = rows_in_cache(energy, count)
    # By derivatives it is one gradient of all rows, and K of one row for each chunk.
    return rows_at_once(energy, count, max(in_cache, 8 * len(energy.discrete_columns)) if count <= 3 else in_cache)
