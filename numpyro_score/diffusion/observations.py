"""Observations of one row of data: NumPyro models, checked, as functions of the row."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import MaskedDistribution, constraints
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from numpyro_score.diffusion.source import as_data
from numpyro_score.diffusion.steps import Field
from numpyro_score.energy import check_rows, join_arrays, split_arrays, varying_outputs
from numpyro_score.programs import being_traced

__all__ = ["check_call", "check_observation", "log_likelihood", "refuse_traced", "split_observation"]

Observation = Callable[..., Any]


def log_likelihood(observation: Observation, args: Any, kwargs: Any, field: Field, row: Float[Array, "d"]) -> Array:
    """The log density of the observation given one row (D,)."""
    seeded = handlers.seed(observation, jax.random.key(0))  # for its plates; nothing is drawn
    return jnp.asarray(log_density(seeded, (as_data(field.model.energy, row), *args), kwargs, {})[0], row.dtype)


def check_call(
    owner: str, source: Any, rng_key: Array, observation: Observation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raises TypeError unless the observation model takes a row and these arguments, and nothing is traced."""
    if not callable(observation) or isinstance(observation, dist.Distribution):
        raise TypeError(
            f"{owner} needs a NumPyro model as observation_model, got {observation!r}: write "
            "def observed(x, y): numpyro.sample('y', ..., obs=y)."
        )
    refuse_traced(owner, getattr(source, "energy", source), rng_key, args, kwargs)
    if "sde" in kwargs and "sde" not in inspect.signature(observation).parameters:
        raise TypeError(f"{owner} takes no sde, as its particles pass noise levels: choose these by grid=.")
    try:
        inspect.signature(observation).bind(None, *args, **kwargs)
    except TypeError as error:
        name = getattr(observation, "__name__", type(observation).__name__)
        raise TypeError(
            f"{owner} cannot call the observation model {name} by a row and the arguments given, {error}: pass what "
            f"it takes, and see {owner}'s own settings for what it does not."
        ) from None


def refuse_traced(owner: str, *inputs: Any) -> None:
    """Raises TypeError if an input is traced, or all is, as under `jax.jit`."""
    if being_traced(inputs):
        raise TypeError(
            f"{owner} looks at its weights while it runs, and got traced values: call it outside of jax.jit, jax.vmap "
            "and jax.grad, once for each observation; its programs are compiled once and used again."
        )


def split_observation(
    observation: Observation, field: Field, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Array], Any]:
    """The arguments of a checked observation model as arrays and a hashable rest, see `split_arrays`.

    Numbers of Python are among the arrays, so that other numbers need no other program, unless the model needs them as
    such: then its integers are not, or else none.

    Raises:
        TypeError, ValueError: see :func:`check_observation`.
    """
    given = (args, kwargs)
    # As the energy's own, and not as those of Python, which would be another type to compile for.
    arrays, static = split_arrays(jax.tree.map(lambda v: v.astype(v.dtype) if isinstance(v, jax.Array) else v, given))
    check_observation(observation, field, *join_arrays(arrays, static))
    dtype = field.model.dtype

    def turned(v: Any, integers: bool) -> Any:
        if isinstance(v, bool) or not isinstance(v, numbers.Real):
            return v
        if isinstance(v, numbers.Integral):
            return jnp.asarray(np.asarray(v, jnp.result_type(int))) if integers else v
        return jnp.asarray(np.asarray(v, dtype))

    if not any(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in jax.tree.leaves(given)):
        return arrays, static
    row = jax.ShapeDtypeStruct((field.model.dim,), dtype)
    for integers in (True, False):
        try:
            tried, rest = split_arrays(jax.tree.map(partial(turned, integers=integers), given))
            jax.eval_shape(partial(_joined, observation, rest, field), tried, row)
        except (TypeError, ValueError, IndexError, OverflowError):  # used as a size, in `if`, or beyond 32 bits
            continue
        return tried, rest
    return arrays, static


def _joined(observation: Observation, static: Any, field: Field, arrays: list[Array], row: Array) -> Array:
    args, kwargs = join_arrays(arrays, static)
    return log_likelihood(observation, args, kwargs, field, row)


class _NoKeys(Messenger):
    """Refuses `numpyro.prng_key()`."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "prng_key":
            raise TypeError(
                "The observation model asks for a random key by numpyro.prng_key(), and a density given x is not "
                "random: pass such numbers as its arguments."
            )


def check_observation(observation: Observation, field: Field, args: Any, kwargs: Any) -> None:
    """Raises unless all sites are observed, there is one, and what is observed is possible for some x.

    TypeError for latent sites, random keys and values that are no numbers; ValueError for no sites, subsampled plates,
    and values of other shapes than their laws, NaN, or outside of a support that does not depend on x.
    """
    energy, seeded = field.model.energy, handlers.seed(observation, jax.random.key(0))

    def traced(row: Array) -> dict[str, Any]:
        return handlers.trace(seeded).get_trace(as_data(energy, row), *args, **kwargs)

    with _NoKeys():
        sites = [s for s in traced(field.end.mean).values() if s["type"] in ("sample", "param", "plate")]
    for site in sites:
        if site["type"] == "plate" and len(site["value"]) != site["args"][0]:
            raise ValueError(
                f"The plate '{site['name']}' of the observation model takes {len(site['value'])} of "
                f"{site['args'][0]}, and a posterior is given all: observe all rows, without subsample_size."
            )
    sites = [s for s in sites if s["type"] != "plate"]
    if free := [s["name"] for s in sites if s["type"] == "param" or not s["is_observed"]]:
        raise TypeError(
            f"The observation model has the latent site '{free[0]}', of which posterior knows nothing: give its value, "
            "or take the prior as ScoreDistribution in a model of both and run NUTS."
        )
    if not sites:
        raise ValueError("The observation model observes nothing: write numpyro.sample(..., obs=y) in it.")
    sites = [s for s in sites if not isinstance(s["fn"], dist.Unit)]
    for site in sites:
        _check_value(site)

    def outside(row: Array) -> list[Array]:
        found = traced(row)
        return [_outside(found[s["name"]]) for s in sites]

    varies = varying_outputs(jax.make_jaxpr(outside)(field.end.mean).jaxpr, [True])
    for site, varying, where in zip(sites, varies, outside(field.end.mean), strict=True):
        if not varying and (bad := np.argwhere(where)).shape[0]:
            first = tuple(int(i) for i in bad[0])
            value, at = np.asarray(site["value"])[first], f" at {list(first)}" if first else ""
            raise ValueError(
                f"The observed value of site '{site['name']}' is NaN or outside of the site's support at {len(bad)} of "
                f"{where.size} places, first {value}{at}, which no x makes possible: give values within it, or mask "
                "the site there."
            )


def _check_value(site: dict[str, Any]) -> None:
    name: str = site["name"]
    value: Any = site["value"]
    if not isinstance(value, numbers.Number | np.ndarray | np.generic | jax.Array):
        raise TypeError(f"The observed value of site '{name}' is {value!r}: give a number or an array.")
    check_rows(name, value)
    shape, expected = getattr(value, "shape", ()), site["fn"].shape()
    try:
        np.broadcast_shapes(shape, expected)
    except ValueError:
        raise ValueError(
            f"The observed value of site '{name}' has shape {shape}, and its law {expected}: give one value "
            "for each, and plates of as many."
        ) from None


def _outside(site: dict[str, Any]) -> Array:
    """Where the value is NaN, or not in the support, and not masked."""
    fn, value, mask = site["fn"], jnp.asarray(site["value"]), jnp.asarray(True)
    while isinstance(fn, MaskedDistribution | dist.Independent | dist.ExpandedDistribution):
        mask = mask & fn._mask if isinstance(fn, MaskedDistribution) else mask
        fn = fn.base_dist
    support = site["fn"].support
    if constraints.is_dependent(support):
        return jnp.zeros((), bool)
    if support.event_dim == 0 or support.is_discrete:
        found = ~jnp.asarray(support(value))
    else:  # simplices and the like hold up to a rounding error, which is not for posteriors to judge
        found = ~jnp.isfinite(value).all(tuple(range(value.ndim - support.event_dim, value.ndim)))
    if mask.ndim > found.ndim:  # parts of an event are masked
        return jnp.zeros((), bool)
    return found & mask
