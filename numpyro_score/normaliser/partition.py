"""log Z of a fitted model, by several methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_score.energy import Energy, rows_given
from numpyro_score.normaliser.ais import ais
from numpyro_score.normaliser.bridge import nce
from numpyro_score.normaliser.coordinates import free_dim, has_domain
from numpyro_score.normaliser.enumeration import MAX_STATES, enumeration, num_states
from numpyro_score.normaliser.flow import flow
from numpyro_score.normaliser.quadrature import MAX_DIM, quadrature
from numpyro_score.normaliser.smc import smc
from numpyro_score.normaliser.source import Source, density_of, with_density
from numpyro_score.random import Key, as_key

__all__ = ["LogPartition", "log_partition"]

METHODS: dict[str, Callable[..., tuple[float, float, dict[str, Any]]]] = {
    "quadrature": quadrature,
    "smc": smc,
    "nce": nce,
    "flow": flow,
    "enumeration": enumeration,
    "ais": ais,
}
_DISCRETE = ("enumeration", "ais")


class LogPartition(NamedTuple):
    """An estimate of log Z."""

    value: float
    stderr: float  # of the value; by quadrature its numerical error
    method: str
    diagnostics: dict[str, Any]  # what the method has to say about how far to trust it

    @classmethod
    def of(cls, given: LogPartition | float, name: str = "log_partition") -> LogPartition:
        """An estimate as it is, or a number, which is taken to be exact; `name` is the argument's in errors.

        Raises:
            TypeError, ValueError: for anything else, and for what is not finite.
        """
        if not isinstance(given, LogPartition):
            value = np.asarray(given)
            if value.dtype.kind not in "iuf" or value.ndim:
                raise TypeError(f"{name} must be a number or a result of log_partition(energy, method), got {given!r}.")
            given = cls(float(value), 0.0, "given", {})
        if not (math.isfinite(given.value) and math.isfinite(given.stderr)):
            raise ValueError(f"{name} must be finite, got {given.value} with a standard error of {given.stderr}.")
        return given


def log_partition(
    energy: Source,
    method: str | None = None,
    rng_key: Key | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    r"""The log normaliser :math:`\log Z = \log \int \exp f(x)\,dx` of one row of a model.

    The measure dx is the one in which NumPyro's `log_prob` are densities, so that f − log Z is a `log_prob`: Lebesgue
    measure on R^D and on bounded supports, surface measure on a sphere, angles on a circle, Lebesgue measure of the
    first K − 1 coordinates on a simplex, and that of `biject_to` on other supports.

    - "quadrature", up to three dimensions: :func:`~numpyro_score.normaliser.quadrature`;
    - "smc" for more, with an error from replicates: :func:`~numpyro_score.normaliser.smc`;
    - "nce" where draws of the model are at hand: :func:`~numpyro_score.normaliser.nce`;
    - "flow", with a lower bound beside it: :func:`~numpyro_score.normaliser.flow`.

    For discrete data the integral is a sum:

    - "enumeration", up to 2²⁰ points: :func:`~numpyro_score.normaliser.enumeration`;
    - "ais" for more, annealed importance sampling: :func:`~numpyro_score.normaliser.ais`.

    All methods but enumeration find the mass from the energy's data; give it rows from where the mass is. None can see
    mass that is far from all of them.

    Args:
        energy: an energy or a fit. All rows must have one density, unless `given` says which.
        method: by default quadrature where it can, else SMC; of discrete data enumeration where it can, else "ais".
        rng_key: a key, for methods that draw.
        given: for a density given covariates, p(x | z), their values by the names of the model's arguments, M of each.
        **settings: of the method.

    Returns:
        A :class:`LogPartition`; with `given` a list of M, which is computed once for rows that are alike.

    Raises:
        TypeError: for a model with a :func:`~numpyro_score.score_factor`, and without a key where one is needed.
        NotImplementedError: for rows of discrete and continuous numbers, and data in a `Domain`.
        ValueError: for an unknown method; rows with densities of their own; and as the method says, among others if
            the density cannot be normalised.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, log_partition
        >>> def model(x):
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -(x**4))
        >>> result = log_partition(Energy(model, {}, jnp.array([-0.5, 0.5])))
        >>> round(result.value, 3)  # log 2Γ(5/4)
        0.595
    """
    if method is not None and not isinstance(method, str):
        raise TypeError(
            f"method must be one of {', '.join(map(repr, METHODS))}, got a {type(method).__name__}: if this is the "
            "key, write rng_key=..."
        )
    if method is not None and method not in METHODS:
        raise ValueError(f"log_partition has no method '{method}': use one of {', '.join(map(repr, METHODS))}.")
    if given is not None:
        return _each(rows_given(with_density(energy), given), method, rng_key, settings)
    energy = density_of(energy)
    chosen = _method(energy, method)
    if rng_key is None and chosen not in ("quadrature", "enumeration"):
        raise TypeError(f"method='{chosen}' draws at random: pass rng_key=jax.random.key(...).")
    key = None if rng_key is None else as_key(rng_key)
    value, stderr, diagnostics = METHODS[chosen](energy, key, **settings)
    return LogPartition(value, stderr, chosen, diagnostics)


def _method(energy: Energy, method: str | None) -> str:
    """The method, or the one for such data; raises where it is not for them."""
    if energy.is_mixed:
        raise NotImplementedError(
            "log_partition has no method for rows of discrete and continuous numbers: sum the discrete ones out of the "
            "density with jax.nn.logsumexp, in a model of the continuous ones."
        )
    if has_domain(energy):
        raise NotImplementedError(
            "log_partition has no method for data in a Domain, which has no map from the whole space: sum exp f over a "
            "grid or over uniform draws inside."
        )
    discrete = bool(len(energy.discrete_columns))
    if method is None:
        if discrete:
            counts = any(a.support.kind == "counts" for a in energy.arrays)
            few = energy.dim <= 2 if counts else num_states(energy) <= MAX_STATES
            return "enumeration" if few else "ais"
        return "quadrature" if free_dim(energy, "angles") <= MAX_DIM else "smc"
    if (method in _DISCRETE) != discrete:
        kind, these = (
            ("discrete", _DISCRETE) if discrete else ("continuous", [m for m in METHODS if m not in _DISCRETE])
        )
        raise ValueError(
            f"method='{method}' is not for the {kind} data of site '{energy.arrays[0].name}': use "
            f"{', '.join(map(repr, these))}."
        )
    return method


def _each(
    energies: list[Energy], method: str | None, rng_key: Key | None, settings: dict[str, Any]
) -> list[LogPartition]:
    """Log Z of each, with one computation for those that are alike."""
    found: dict[Any, LogPartition] = {}
    keys = [None] * len(energies) if rng_key is None else list(jax.random.split(as_key(rng_key), len(energies)))
    alike = [tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(e)) for e in energies]
    for energy, key, values in zip(energies, keys, alike, strict=True):
        if values not in found:
            found[values] = log_partition(energy, method, key, **settings)
    return [found[values] for values in alike]
