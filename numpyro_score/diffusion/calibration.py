"""Are posterior draws right? Ranks over simulated data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.spatial
import scipy.stats
from jaxtyping import Array, Float, Int
from numpyro import handlers

from numpyro_score.closures import Keyed
from numpyro_score.diffusion.observations import check_call, check_observation, log_likelihood
from numpyro_score.diffusion.posteriors import Method, Problem
from numpyro_score.diffusion.samplers import diffuse
from numpyro_score.diffusion.source import as_data
from numpyro_score.diffusion.steps import Field
from numpyro_score.diffusion.twists import Twist
from numpyro_score.energy import check_rows, join_arrays, split_arrays, takes_keyword
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.coordinates import data_to_row, row_to_data
from numpyro_score.normaliser.source import Source
from numpyro_score.programs import run_compiled
from numpyro_score.random import Key, as_key

__all__ = ["SimulationRanks", "simulation_ranks"]

_COORDINATES = 4
_WRITE = "write quantities={'square': lambda x, y: x**2}, with one number each, and the observed sites as keywords."
_FEATURES, _PERMUTATIONS = 100, 999


class SimulationRanks(NamedTuple):
    """Of each quantity, the rank of its value at the truth among its values at posterior draws."""

    ranks: dict[str, Int[np.ndarray, "sets"]]  # 0 to num_draws
    num_draws: int  # L, of each posterior
    joint_pvalue: float  # that pairs (x*, y) and (x_l, y) have one law

    def pvalues(self) -> dict[str, float]:
        """By quantity, of the chi-squared test that ranks are uniform, in bins of at least five expected data sets.

        The smallest of K is to be compared with a level over K.
        """
        found = {}
        for name, ranks in self.ranks.items():
            num_bins = max(min(self.num_draws + 1, len(ranks) // 5, 20), 2)
            edges = np.linspace(0, self.num_draws + 1, num_bins + 1).round()
            expected = np.diff(edges) / (self.num_draws + 1) * len(ranks)
            observed = np.histogram(ranks, edges)[0]
            found[name] = float(scipy.stats.chisquare(observed, expected).pvalue)
        return found


def simulation_ranks(
    source: Source,
    observation_model: Callable[..., Any],
    rng_key: Key,
    *args: Any,
    num_sets: int = 200,
    num_draws: int = 19,
    quantities: Mapping[str, Callable[..., Any]] | None = None,
    truths: Any = None,
    method: Method = "tds",
    num_particles: int = 512,
    num_steps: int = 32,
    twist: Twist = "moments",
    grid: Any = "karras",
    noise_range: tuple[float, float] | None = None,
    **kwargs: Any,
) -> SimulationRanks:
    r"""Simulation-based calibration of :func:`~numpyro_score.posterior` [Talts et al. 2018; Modrák et al. 2023].

    Data sets are simulated: x* from the prior, y from the observation model at x*, then draws x₁, ..., x_L of the
    posterior given y. If these are right, x* and the x_l are exchangeable given y, so that

    - the rank of t(x*, y) among the t(x_l, y) is uniform, whatever t is. **Ranks of the coordinates of x alone may be
      uniform while the draws are far off**: a sampler that ignores y passes. Quantities that use y see that: the log
      likelihood of the observation, log p(y | x), and for energies the log joint density, log q(x) + log p(y | x), are
      always among those ranked;
    - pairs (x*, y) and (x_l, y) have one law. `joint_pvalue` is that of a kernel two-sample test, with Gaussian kernels
      of a half, one and two times the median distance by random features [Rahimi & Recht 2007], where x* changes place
      with its own draws at random, so that it is exact for any number of data sets. It sees errors that change with y
      and cancel in every rank.

    On a prior of eight modes in the plane, seen through one number, the log joint density of 300 data sets finds
    guidance by the "isotropic" twist and a prior that is 10% too wide, while the coordinates of x pass both. Each data
    set has one truth, so that smaller errors need more of them.

    Args:
        source: as in :func:`~numpyro_score.posterior`.
        observation_model: as there; each observed site has the name of the argument that holds its value, which is
            None when it is simulated: `def observed(x, y=None): numpyro.sample("y", ..., obs=y)`.
        rng_key: a key.
        *args: further positional arguments of the observation model, after x, in all data sets.
        num_sets: simulated data sets.
        num_draws: L, of each posterior, resampled by their weights.
        quantities: further ones, functions of x, in the form of its site, and of the observed values by name as
            keywords; the first four numbers of x if not given.
        truths: x*, in the form that `diffuse` gives draws, at least `num_sets` of them; drawn by
            :func:`~numpyro_score.diffuse` if not given.
        method: as in :func:`~numpyro_score.posterior`.
        num_particles: of the one run for each data set.
        num_steps: as there.
        twist: as there.
        grid: as there.
        noise_range: as there.
        **kwargs: further keyword arguments of the observation model.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`~numpyro_score.posterior`; an observed site without an
            argument of its name; a quantity that is not one number, or takes no observed values; truths of another
            shape than the data's, or not finite.
    """
    num_sets = at_least_one("simulation_ranks", "num_sets", num_sets)
    num_draws = at_least_one("simulation_ranks", "num_draws", num_draws)
    if not isinstance(quantities or {}, Mapping) or not all(map(callable, (quantities or {}).values())):
        raise TypeError(f"simulation_ranks needs functions by name as quantities, got {quantities!r}: " + _WRITE)
    key = as_key(rng_key)
    check_call("simulation_ranks", source, key, observation_model, args, kwargs)
    prior_key, data_key, run_key, tie_key = jax.random.split(key, 4)
    settings = (method, num_particles, 1, num_steps, twist, grid, noise_range, "simulation_ranks")
    problem = Problem.of(source, observation_model, *settings)
    if truths is None:
        steps = 2 * (len(problem.rho) - 1) if isinstance(grid, str) else None
        truths = diffuse(source, prior_key, num_sets, num_steps=steps, grid=grid, noise_range=noise_range).draws
    rows = _rows(problem, truths)[:num_sets]
    if len(rows) < num_sets:
        raise ValueError(f"truths holds {len(rows)} data sets: give at least num_sets={num_sets}.")
    observed = _simulated(problem, args, kwargs, rows, jax.random.split(data_key, num_sets))
    functions = tuple((quantities or {}).items())
    _check_quantities(problem, functions, rows[0], {k: v[0] for k, v in observed.items()})
    rng = np.random.default_rng(np.asarray(jax.random.bits(tie_key, (4,))))
    ranks: dict[str, list[int]] = {}
    pairs = []
    # Of each data set two compiled programs run and nothing else, as its observed values are on the host.
    run_keys, choice_keys = _keys(jax.random.split(run_key, num_sets))
    for i, truth in enumerate(np.asarray(rows)):
        y = {k: np.asarray(v[i]) for k, v in observed.items()}  # a NumPy number would be static
        arrays, static = split_arrays((args, {**kwargs, **y}))
        if i == 0:
            check_observation(problem.observation, problem.field, args, {**kwargs, **y})
        found = problem.run_checked(run_keys[i], arrays, static)
        held = (Keyed(problem.observation), static, tuple((k, Keyed(f)) for k, f in functions), num_draws)
        points, at = jax.device_get(
            _values(
                problem.field,
                problem.rho[-1],
                truth,
                found.u[0],
                problem.log_weights(found),
                choice_keys[i],
                arrays,
                y,
                *held,
            )
        )
        pairs.append([np.r_[p, np.ravel(jax.tree.leaves(y))] for p in points])
        for name, value in at.items():
            if not np.isfinite(value).all():
                raise FloatingPointError(f"The quantity '{name}' is not finite at a draw.")
            below, ties = np.sum(value[1:] < value[0]), np.sum(value[1:] == value[0])
            ranks.setdefault(name, []).append(int(below + rng.integers(ties + 1)))
    return SimulationRanks({k: np.array(v) for k, v in ranks.items()}, num_draws, _joint_pvalue(np.array(pairs), rng))


def _joint_pvalue(pairs: Float[np.ndarray, "sets k p"], rng: np.random.Generator) -> float:
    """Of pairs of x and y for each data set, the first with the truth."""
    n, k, p = pairs.shape
    flat = pairs.reshape(-1, p)
    z = (pairs - flat.mean(axis=0)) / np.where(flat.std(axis=0) > 0, flat.std(axis=0), 1.0)
    some = z.reshape(-1, p)[rng.choice(n * k, min(n * k, 500), replace=False)]
    length = np.median(scipy.spatial.distance.pdist(some))
    away = np.zeros(_PERMUTATIONS + 1)
    chosen = rng.integers(k, size=(_PERMUTATIONS + 1, n))
    chosen[0] = 0  # the truths
    for width in (0.5, 1.0, 2.0):
        angles = z @ rng.normal(size=(p, _FEATURES)) / (width * length)
        features = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        features -= features.mean(axis=1, keepdims=True)
        away += [np.sum(features[np.arange(n), c].sum(axis=0) ** 2) for c in chosen]
    return float(np.mean(away >= away[0] * (1 - 1e-12)))


def _check_quantities(problem: Problem, functions: Any, row: Float[Array, "d"], y: dict[str, Any]) -> None:
    for name, f in functions:
        try:
            shape = jax.eval_shape(
                lambda r, y, f=f: jnp.asarray(f(as_data(problem.field.model.energy, r), **y)), row, y
            )
        except TypeError as error:
            raise TypeError(
                f"The quantity '{name}' cannot be called with x and {sorted(y)}, {error}: " + _WRITE
            ) from None
        if shape.shape != ():
            raise ValueError(f"The quantity '{name}' has shape {shape.shape}, and only numbers have ranks: " + _WRITE)


def _rows(problem: Problem, truths: Any) -> Float[Array, "sets d"]:
    energy = problem.field.model.energy
    values = truths if isinstance(truths, Mapping) else {energy.arrays[0].name: truths}
    for name, value in values.items():
        check_rows(name, value)
    shapes = {k: v.shape for k, v in row_to_data(energy, jnp.zeros(energy.dim, energy.dtype)).items()}
    got = {k: np.shape(v) for k, v in values.items()}
    if got.keys() != shapes.keys() or any(len(v) == 0 or v[1:] != shapes[k] for k, v in got.items()):
        raise ValueError(f"truths needs rows of the shapes {shapes}, as diffuse draws them, got {got}.")
    if bad := [k for k, v in values.items() if not np.isfinite(np.asarray(v)).all()]:
        raise ValueError(f"truths has NaN or infinity in '{bad[0]}': give draws of the prior, or leave truths out.")
    return jax.vmap(partial(data_to_row, energy))({k: jnp.asarray(v, energy.dtype) for k, v in values.items()})


def _simulated(
    problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Float[Array, "sets d"], keys: Array
) -> dict[str, np.ndarray]:
    """The observed values by site, (sets, ...), on the host."""

    def one(row: Array, key: Array) -> dict[str, Array]:
        seeded = handlers.seed(problem.observation, key)
        trace = handlers.trace(seeded).get_trace(as_data(problem.field.model.energy, row), *args, **kwargs)
        return {k: s["value"] for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}

    found = jax.device_get(run_compiled(jax.vmap(one), rows, keys))
    if missing := [k for k in found if not takes_keyword(problem.observation, k)]:
        raise TypeError(
            f"The observation model takes no argument '{missing[0]}', the name of what it observes: write "
            f"def observed(x, {missing[0]}=None) with obs={missing[0]}, so that it can be simulated and then given."
        )
    if not found:
        raise ValueError("The observation model has nothing to simulate: leave what it observes at None.")
    return found


@jax.jit
@jax.vmap
def _keys(rng_key: Array) -> tuple[Array, Array]:
    """Those of the one run of a data set, (1,), and of the choice of its draws."""
    run_key, choice_key = jax.random.split(rng_key)
    return jax.random.split(run_key, 1), choice_key


@partial(jax.jit, static_argnames=("observation", "static", "functions", "num_draws"))
def _values(
    field: Field,
    rho: Float[Array, ""],
    truth: Float[Array, "d"],
    particles: Float[Array, "n d"],
    log_weights: Float[Array, "n"],
    rng_key: Array,
    arrays: list[Any],
    y: dict[str, Any],
    observation: Callable[..., Any],
    static: Any,
    functions: tuple[tuple[str, Callable[..., Any]], ...],
    num_draws: int,
) -> tuple[Float[Array, "k d"], dict[str, Float[Array, "k"]]]:
    """The truth and draws among the particles, and the quantities there, by name."""
    chosen = jax.random.choice(rng_key, len(particles), (num_draws,), p=jnp.exp(log_weights))
    rows = jnp.concatenate([truth[None], particles[chosen]])
    args, kwargs = join_arrays(arrays, static)
    likelihood = jax.vmap(partial(log_likelihood, observation, args, kwargs, field))(rows)
    found = {"log likelihood": likelihood}
    if field.model.energy.has_density:
        found["log joint"] = likelihood + field.model.log_density(rows, rho)
    if not functions:
        return rows, {**found, **{f"x[{i}]": rows[:, i] for i in range(min(_COORDINATES, rows.shape[1]))}}
    own = {k: jax.vmap(lambda r, f=f: f(as_data(field.model.energy, r), **y))(rows) for k, f in functions}
    return rows, {**found, **own}
