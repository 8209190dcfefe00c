"""What divergences compare: laws with a density, and rows drawn from laws."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from jaxtyping import Array, Float
from numpyro.diagnostics import effective_sample_size

from numpyro_score.energy import Energy, as_array, innermost, one_plate, rows_text
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser import EnergyDistribution, LogPartition, log_partition, sample
from numpyro_score.normaliser.coordinates import data_to_row
from numpyro_score.operators import full_precision
from numpyro_score.random import Key, as_key

__all__ = [
    "Draws",
    "Law",
    "check_rows",
    "draw",
    "log_normaliser",
    "mean_and_error",
    "read_pair",
    "refuse_rows",
    "refuse_weights",
    "thin",
    "weighted",
]


class Law(NamedTuple):
    """One side of a divergence."""

    name: str  # "p" or "q"
    energy: Any  # its density, an Energy; None where only rows are given
    normaliser: tuple[float, float] | None  # log Z and its standard error, where they are known
    distribution: dist.Distribution | None  # to draw from
    given: Any  # rows that the user gave; None to draw them


class Draws(NamedTuple):
    """Rows of a law, in the coordinates of :meth:`numpyro_score.Energy.flatten`."""

    rows: Float[Array, "chain draw d"]
    independent: bool  # else draws of Markov chains

    @property
    def flat(self) -> Float[Array, "n d"]:
        """The rows of all chains."""
        return self.rows.reshape(-1, self.rows.shape[-1])


def read_pair(owner: str, p: Any, q: Any, *, needs: str = "q") -> tuple[Law, Law]:
    """The two sides of a divergence, on one space.

    Args:
        owner: the function to name in messages.
        p: an energy, a fit, a distribution, rows, or a pair of one of the first three and draws of it.
        q: the same.
        needs: which of them must have a density, e.g. "pq".

    Raises:
        TypeError, ValueError: if one that needs a density has none; if their rows differ.
    """
    laws = _read("p", p), _read("q", q)
    for law in laws:
        if law.name in needs and law.energy is None:
            instead = "fisher_divergence or kl_divergence, or for two sets of rows mmd" if law.name == "p" else "mmd"
            raise TypeError(
                f"{owner} needs the density of {law.name}, and {law.name} is rows: use {instead}, or pass an Energy, "
                "a fit or a distribution."
            )
    _refuse_different_rows(laws[0].energy, laws[1].energy)
    return laws


def _read(name: str, given: Any) -> Law:
    draws = None
    laws = Energy | ScoreMatchingResult | AdversarialResult | dist.Distribution
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], laws):
        given, draws = given
    if isinstance(given, EnergyDistribution):
        value, stderr = given.log_partition, float(given.log_partition_stderr)
        known = None if value is None else (float(value), 0.0 if math.isnan(stderr) else stderr)
        return Law(name, given.energy, known, None, draws)
    if isinstance(given, dist.Distribution):
        return Law(name, _distribution_energy(name, given), (0.0, 0.0), given, draws)
    if isinstance(given, ScoreMatchingResult | AdversarialResult):
        given = one_plate(given.energy)
    if isinstance(given, Energy):
        if not given.is_concrete:
            raise TypeError(f"{name} is traced by a JAX transformation: call this outside of jit, vmap and grad.")
        return Law(name, given, None, None, draws)
    return Law(name, None, None, None, given)


def _distribution_energy(name: str, law: dist.Distribution) -> Energy:
    """A distribution as the energy of a model that observes it."""
    base = innermost(law)
    if isinstance(base, dist.ImproperUniform):
        raise TypeError(f"{name} is an ImproperUniform, which is no law: pass a distribution that can be normalised.")
    if law.support.is_discrete:
        raise TypeError(f"{name} is discrete ({type(base).__name__}): pass a continuous distribution.")
    if law.batch_shape:
        raise ValueError(
            f"{name} is a batch of shape {law.batch_shape} of distributions: make it one, e.g. "
            f".to_event({len(law.batch_shape)})."
        )
    # As arrays, so that other values of the parameters compile nothing.
    law = jax.tree.map(lambda v: jnp.asarray(v, float) if isinstance(v, int | float) else jnp.asarray(v), law)
    return Energy(_observe, {}, jnp.zeros((2, *law.event_shape)), law)


def _observe(x: Array, law: dist.Distribution) -> None:
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample(type(innermost(law)).__name__, law, obs=x)
        # A uniform density does not depend on the data, and a model's must.
        numpyro.factor("rows_used", 0.0 * x.reshape(len(x), -1).sum(-1))


def _rows_are_data(energy: Energy) -> bool:
    return all(a.support.kind in ("real", "circle", "box") for a in energy.arrays)


def _coordinates(energy: Energy) -> list[Any]:
    return [(a.support, block) for a, block in zip(energy.arrays, energy.blocks, strict=True)]


def _refuse_different_rows(p: Energy | None, q: Energy | None) -> None:
    if p is None or q is None:
        return
    same = p.dim == q.dim
    if not (_rows_are_data(p) and _rows_are_data(q)):
        same = _coordinates(p) == _coordinates(q)
    if not same:
        supports = [[(a.name, a.support.kind) for a in e.arrays] for e in (p, q)]
        raise ValueError(
            f"p and q are not laws of the same data: rows of {p.dim} numbers on {supports[0]}, and of {q.dim} on "
            f"{supports[1]}."
        )


# -- rows ---------------------------------------------------------------------------------------------------------


def draw(law: Law, other: Law, rng_key: Key | None, num_samples: int) -> Draws:
    """Rows of a law: those that were given, or about `num_samples` that are drawn.

    Raises:
        TypeError: without a key where one is needed.
        ValueError: rows of another shape, or with NaN or infinity.
    """
    space = law.energy if law.energy is not None else other.energy
    if law.given is not None:
        return _given_rows(law, space)
    num_samples = at_least_one("The divergence", "num_samples", num_samples)
    if rng_key is None:
        raise TypeError(f"{law.name} is to be drawn from: pass rng_key=jax.random.key(...), or ({law.name}, draws).")
    rng_key = as_key(rng_key)
    if law.distribution is not None:
        values = law.distribution.sample(rng_key, (num_samples,))
        return Draws(_finite(law, _to_rows(law, values, space)[None]), True)
    chains = 4
    return _chains(law, sample(law.energy, rng_key, -(-num_samples // chains), num_chains=chains), space)


def _given_rows(law: Law, space: Energy | None) -> Draws:
    given = law.given
    if not isinstance(given, dict | list | np.ndarray | jax.Array) and "posterior" in given:
        return _chains(law, given, space)
    return Draws(_finite(law, _to_rows(law, given, space)[None]), True)


def _chains(law: Law, draws: Any, space: Energy | None) -> Draws:
    """What :func:`numpyro_score.sample` returned."""
    posterior = draws["posterior"]
    found = {str(name): jnp.asarray(np.asarray(v), float) for name, v in posterior.data_vars.items()}
    if space is None:
        rows = jnp.concatenate([v.reshape(*v.shape[:2], -1) for v in found.values()], axis=-1)
    else:
        names = [a.name for a in space.arrays]
        if len(names) == len(found) == 1:  # whatever it is called
            found = dict(zip(names, found.values(), strict=True))
        if missing := [n for n in names if n not in found]:
            raise ValueError(f"The draws of {law.name} have no variable {missing}, only {list(found)}.")
        rows = jax.vmap(jax.vmap(partial(data_to_row, space)))({n: found[n] for n in names})
    return Draws(_finite(law, rows), False)


def _to_rows(law: Law, values: Any, space: Energy | None) -> Float[Array, "n d"]:
    if not isinstance(values, dict):
        table, values = values, as_array(law.name, values)
        if space is not None and values is not table:  # a table, which says what its columns are
            return space.flatten(table)
    if space is None:
        if isinstance(values, dict):
            raise TypeError(f"{law.name} is a dict, and nothing says in which order: pass one array of rows (N, D).")
        values = jnp.asarray(values, float)
        if values.ndim == 0:
            raise ValueError(f"{law.name} is the number {values}: pass an array of rows (N, D).")
        if values.size == 0:
            raise ValueError(f"{law.name} is empty, of shape {values.shape}: pass at least one row.")
        return values.reshape(len(values), -1)
    arrays = space.arrays
    if not isinstance(values, dict):
        values = jnp.asarray(values, float)
        alone = len(arrays) == 1 and values.ndim == len(arrays[0].shape)
        if not alone and _rows_are_data(space) and values.shape[1:] == (space.dim,):
            return values
        if len(arrays) == 1 and not alone:
            raise ValueError(
                f"{law.name} has shape {values.shape}: pass rows of site '{arrays[0].name}', shape {arrays[0].shape} "
                "for any number of rows."
            )
    rows = space.flatten(values)
    if rows.shape[1] != space.dim:
        raise ValueError(f"Rows of {law.name} have {rows.shape[1]} numbers, and those of the density {space.dim}.")
    return rows


def _finite(law: Law, rows: Array) -> Array:
    if bad := rows_text(~np.isfinite(np.asarray(rows)).all(-1).reshape(-1)):
        raise ValueError(f"Rows of {law.name} have NaN or infinity in {bad}: drop these rows.")
    return rows


def thin(draws: Draws) -> Float[Array, "n d"]:
    """Rows that are all but independent: chains keep every k-th draw, k = 2τ − 1.

    τ is the autocorrelation time of the coordinate, or squared coordinate, that mixes worst. Where the autocorrelation
    falls as ρ^t, τ = (1 + ρ)/(1 − ρ), and that between the draws kept is below 0.07.
    """
    rows = draws.rows
    if not draws.independent:
        x = np.asarray(rows, np.float64)
        x = x - x.mean((0, 1))  # not in place: in double precision this is a view of the rows
        ess = effective_sample_size(np.concatenate([x, x**2], axis=-1))
        if not np.isfinite(ess).all():
            raise ValueError("The chains do not move in some coordinate: draw longer chains.")
        rows = rows[:, :: max(1, round(2 * x.shape[0] * x.shape[1] / float(ess.min()) - 1))]
    return rows.reshape(-1, rows.shape[-1])


def refuse_weights(owner: str, argument: str, law: Law, weights: Any) -> None:
    """Raises TypeError for weights of rows that were not given."""
    rows = law.given is not None and (
        isinstance(law.given, dict | list | np.ndarray | jax.Array) or "posterior" not in law.given
    )
    if weights is not None and not rows:
        raise TypeError(f"{argument} of {owner} are of rows of data: leave them out for laws and draws of chains.")


def weighted(
    argument: str, law: Law, rows: Float[Array, "n d"], weights: Any
) -> tuple[Float[Array, "m d"], Float[Array, "m"] | None]:
    """Rows that have a weight, and their weights, of mean one; None where there are none.

    Raises:
        ValueError: for weights of another shape, negative or not finite.
    """
    if weights is None:
        return rows, None
    found = np.asarray(weights, np.float64)
    if found.shape != (len(rows),):
        raise ValueError(
            f"{argument} has shape {found.shape}: pass one weight for each row of {law.name}, ({len(rows)},)."
        )
    if bad := rows_text(~(np.isfinite(found) & (found >= 0))):
        raise ValueError(f"{argument} is negative or not finite in {bad}: pass weights of zero or more.")
    kept = found > 0
    return rows[kept], jnp.asarray(found[kept] / found[kept].mean() if kept.any() else found[kept], rows.dtype)


def check_rows(energy: Energy, rows: Float[Array, "n d"]) -> None:
    """Raises ValueError, naming rows of p, where they leave the support of q or its log density is not finite."""
    if not energy.flat and not energy.resizable and energy.num_rows != len(rows):
        raise NotImplementedError(
            "q's model has one row with bounds or curvature: give it a plate that follows the length of the data."
        )
    outside, log_density = jax.device_get(_look(energy, rows))
    for name, wrong in outside.items():
        if bad := rows_text(wrong):
            raise ValueError(
                f"Rows of p lie outside of the support of q's site '{name}' in {bad}: p is no law there, or the "
                "support is not what the data have."
            )
    if bad := rows_text(~np.isfinite(log_density)):
        raise ValueError(f"The log density of q is not finite at p's {bad}: the divergence is infinite or unknown.")


@jax.jit
@full_precision
def _look(energy: Energy, x: Float[Array, "n d"]) -> tuple[dict[str, Array], Float[Array, "n"]]:
    """Which rows lie outside of each site's support, and the log density, or zero where only the score is known."""
    outside = {}
    if not energy.flat:
        outside = energy.at(x).rows_outside()
    return outside, energy.log_density(x) if energy.has_density else jnp.zeros(len(x), x.dtype)


def refuse_rows(what: str, values: Array | np.ndarray) -> None:
    """Raises ValueError unless the values (N, ...) of rows are finite."""
    finite = np.isfinite(np.asarray(values))
    if bad := rows_text(~finite.reshape(len(finite), -1).all(-1)):
        raise ValueError(f"The {what} is not finite at p's {bad}: correct the density there, or drop these rows.")


# -- means --------------------------------------------------------------------------------------------------------


def mean_and_error(values: Any, independent: bool) -> tuple[float, float, float]:
    """Mean of values (chain, draw), its standard error, and the effective sample size.

    Raises:
        ValueError: for fewer than two values.

    Warns:
        UserWarning: where the values have a tail so heavy that their variance may not exist.
    """
    values = np.asarray(values, np.float64)
    size = values.size
    if size < 2 or not (independent or values.shape[1] > 3):
        raise ValueError(f"A standard error needs at least two rows, or chains of four, got shape {values.shape}.")
    _warn_of_tails(values.reshape(-1))
    spread = float(values.std(ddof=1))
    ess = float(size)
    if not independent and spread > 0:
        ess = min(float(effective_sample_size(values)), ess)
    return float(values.mean()), spread / math.sqrt(ess), ess


def _warn_of_tails(values: Float[np.ndarray, "n"]) -> None:
    """Warns where one row decides the variance, and the tail looks as if there was none."""
    squares = (values - values.mean()) ** 2
    share = squares.max() / max(squares.sum(), 1e-300)
    sizes = np.abs(values - np.median(values))
    sizes = sizes[sizes > 0]
    if share < 0.3 or len(sizes) < 100:  # below 100 there is no tail to look at
        return
    k = _tail_index(np.log(sizes))
    error = (1 + k) / math.sqrt(min(len(sizes) / 5, 3 * math.sqrt(len(sizes))))  # of the generalised Pareto fit
    if k - 2 * error > 0.5:
        warnings.warn(
            f"One of {len(values)} rows of p makes up {share:.0%} of the variance of the values, whose tail has an "
            f"index of {k:.2g} ± {error:.1g}. Their variance (above ½) or the divergence itself (above 1) may be "
            "infinite: do not trust the standard error.",
            stacklevel=4,
        )


def _tail_index(log_sizes: Float[np.ndarray, "n"]) -> float:
    """The shape k of a generalised Pareto law fitted to the largest values, by ArviZ [Vehtari et al. 2024]."""
    if hasattr(az, "psislw"):  # ArviZ 0.23
        return float(az.psislw(log_sizes)[1])
    # 1.x takes log likelihoods, the negative of log weights.
    return float((-xr.DataArray(log_sizes, dims="__sample__")).azstats.psislw(dim="__sample__")[1])


def log_normaliser(law: Law, given: LogPartition | float | None, rng_key: Key | None) -> tuple[float, float]:
    """Log Z of a law and its standard error.

    Raises:
        ValueError: if one is given for a law that has it already, or is not finite; and as
            :func:`~numpyro_score.log_partition` says.
    """
    if law.normaliser is not None:
        if given is not None:
            raise ValueError(f"{law.name} is normalised already: leave out log_partition_{law.name}.")
        return law.normaliser
    if given is None:
        given = log_partition(law.energy, rng_key=rng_key)
    found = LogPartition.of(given, f"log_partition_{law.name}")
    return found.value, found.stderr
