"""What users pass to fits: refused by name where it cannot be meant."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoLaplaceApproximation,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
from numpyro.primitives import Messenger

from numpyro_score.energy import Sealed, Site, takes_keyword
from numpyro_score.printed import without_addresses

__all__ = [
    "GUIDES_WITH_DENSITY",
    "InitParams",
    "as_floats",
    "check_guide",
    "check_inside",
    "check_keywords",
    "check_memory",
    "check_optimizer",
    "is_loss",
    "named_leaves",
    "numbers_of",
    "refuse_misplaced",
    "refuse_unknown",
    "told",
]

GUIDES_WITH_DENSITY = (
    AutoLaplaceApproximation,
    AutoDAIS,
    AutoSemiDAIS,
    AutoSurrogateLikelihoodDAIS,
)
"""Guides that evaluate the density of the model that they are built on."""


def check_keywords(run: Callable[..., Any], model: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a keyword that is neither of `run`, which got it for the model, nor of the model."""
    for name in kwargs:
        if takes_keyword(model, name):
            continue
        own = [p.name for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
        near = difflib.get_close_matches(name, [*own, *_keywords(model)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"its own are {', '.join(own)}."
        raise TypeError(f"{run.__name__} has no argument '{name}', nor has the model: {hint}")


def check_guide(guide: Any, model: Callable[..., Any], loss: Any) -> Any:
    """The guide, a function, an autoguide or its class; raises for what cannot guide a fit of the model."""
    if inspect.isclass(guide) and guide in GUIDES_WITH_DENSITY and hasattr(loss, "no_posterior"):
        raise NotImplementedError(
            f"{guide.__name__} needs a density of the parameters, which {type(loss).__name__} does not give, as "
            f"{loss.no_posterior}: use ISM or SSM, or guide=AutoNormal."
        )
    if not callable(guide):
        raise TypeError(f"guide must be a guide function or an autoguide, got {guide!r}: write e.g. guide=AutoNormal.")
    if isinstance(guide, GUIDES_WITH_DENSITY) and guide.model is model:
        name = type(guide).__name__
        raise ValueError(
            f"{name} evaluates the density of its model, which is unnormalised: pass the class, guide={name}, or "
            f"build it on generalized_bayes(model, loss)."
        )
    return guide


def check_memory(state: Any, loss: Any, mutable: list[str]) -> None:
    """Raises ValueError if a state to go on from has not the mutable sites; NumPyro would start them in every step."""
    if hasattr(loss, "advance") and not state.mutable_state:
        raise ValueError(
            f"init_state has no mutable_state, where {type(loss).__name__} keeps its chains: pass a state of a fit "
            "with this loss, or init_params=fit.params."
        )
    if (found := sorted(state.mutable_state or {})) != mutable:
        raise ValueError(
            f"init_state has the mutable sites {found}, and this fit has {mutable}: pass a state of a fit with the "
            "same model and loss, or init_params=fit.params."
        )


def _keywords(model: Callable[..., Any]) -> list[str]:
    return [n for n in inspect.signature(model).parameters if takes_keyword(model, n)]


def is_loss(value: Any) -> bool:
    """Whether a callable is a pointwise objective by its arguments, as an instance or a class."""
    call = getattr(value if inspect.isclass(value) else type(value), "__call__", None)  # noqa: B004
    if not inspect.isfunction(call):
        return False
    return list(inspect.signature(call).parameters)[1:] == ["energy", "rng_key"]


class InitParams(Messenger):
    """Raises ValueError for an initial value, as given by the user, that its param site cannot take.

    One that violates the site's constraint would be NaN without it, and the fit fail at its first step. One of another
    shape would be broadcast, so that fewer numbers are fitted, or fail inside the model. One that is named after a
    sample site, not after the guide's parameter, would move the density that is checked, but not the fit.
    """

    def __init__(self, init_params: dict[str, Any] | None) -> None:
        self.init_params = init_params or {}
        self.known: list[str] = []
        super().__init__()

    def process_message(self, msg: Site) -> None:
        """Looks at the value given."""
        name = msg.get("name", "")
        if msg["type"] == "param":
            self.known.append(name)
            if name in self.init_params:
                _check_shape(name, self.init_params[name], msg)
            check_inside(self.init_params, {name: msg["kwargs"].get("constraint", constraints.real)})
        elif msg["type"] == "sample" and name in self.init_params and name not in self.known:
            near = [k for k in self.known if k.startswith(f"{name}_")] or self.known
            uses = f"name the guide's, e.g. '{near[-1]}'" if near else "leave it out"
            raise ValueError(
                f"init_params has '{name}', which is a sample site, and init_params are values of param sites: {uses}."
            )


def _check_shape(name: str, given: Any, site: Site) -> None:
    """Raises ValueError if a value given is not of the shapes of a param site's own initial value."""
    if site["args"]:
        (own,) = site["args"]
    else:  # a function of a key, whose draw must not take one from the handlers around
        with Sealed(jax.random.key(0)):
            own = jax.eval_shape(site["fn"])
    if own is None:  # a later mention of the site
        return
    shapes, expected = _shapes(given), _shapes(own)
    if shapes.keys() != expected.keys():
        raise ValueError(
            f"init_params has {name} with the parts {sorted(shapes)}, the site has {sorted(expected)}: give it these."
        )
    for part, shape in shapes.items():
        if shape != expected[part]:
            raise ValueError(
                f"init_params has {name}{part} of shape {shape}, the site has {expected[part]}: give it one value for "
                "each number of the site."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {k: tuple(np.shape(v)) for k, v in named_leaves(tree).items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def as_floats(init_params: dict[str, Any] | None) -> dict[str, Any] | None:
    """Initial values with integers as floats, which can be differentiated.

    Raises:
        TypeError: for what is no dict, and values that are no numbers.
    """
    if init_params is None:
        return None
    if not isinstance(init_params, Mapping):
        raise TypeError(
            f"init_params must be a dict of values by param site, got a {type(init_params).__name__}: write e.g. "
            "init_params={'a': 1.0}, or init_params=fit.params."
        )

    def as_float(name: str, value: Any) -> Any:
        dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
        if jnp.issubdtype(dtype, jnp.inexact):
            return value
        if not (any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))):
            raise TypeError(f"init_params has {name} of {dtype}, which are no numbers: give it numbers.")
        return jnp.asarray(value, float)

    return {k: jax.tree.map(partial(as_float, k), v) for k, v in init_params.items()}


def refuse_misplaced(guide: Any, optim: Any) -> None:
    """Raises TypeError where ScoreMatching's guide or optimiser is a loss, or the guide an optimiser."""
    for value in (guide, optim):
        if is_loss(value):
            made = f"{value.__name__}(...)" if inspect.isclass(value) else repr(value)
            raise TypeError(f"{made} is a loss: write ScoreMatching(model, loss={made}).")
    if hasattr(guide, "init") and hasattr(guide, "update"):
        raise TypeError("The guide given is an optimiser: write ScoreMatching(model, optim=...).")
    if optim is not None:
        check_optimizer("optim", optim)


def check_optimizer(name: str, value: Any) -> None:
    """Raises TypeError for a value of the argument `name` that is no optimiser of Optax, NumPyro or JAX."""
    if inspect.isclass(value) or not (hasattr(value, "init") or hasattr(value, "init_fn")):
        given = getattr(value, "__name__", repr(value))
        raise TypeError(f"{name} must be an optimiser, got {given}: write e.g. {name}=optax.adam(1e-3).")


def refuse_unknown(init_params: dict[str, Any] | None, known: Collection[str]) -> None:
    """Raises ValueError for names in `init_params` that no param site has."""
    if unknown := set(init_params or ()) - set(known):
        raise ValueError(f"init_params has {sorted(unknown)}, but the param sites are {sorted(known)}: use these.")


def check_inside(init_params: dict[str, Any] | None, supports: dict[str, constraints.Constraint]) -> None:
    """Raises ValueError if a value in `init_params` violates the constraint of its site, where one is given."""
    for name, value in (init_params or {}).items():
        if name not in supports or isinstance(value, jax.core.Tracer) or not jax.tree_util.all_leaves([value]):
            continue
        if not np.all(supports[name](jnp.asarray(value))):
            raise ValueError(
                f"init_params has {name} = {value}, which violates the site's constraint {supports[name]}: start from "
                "a value inside of it."
            )


def numbers_of(value: Any) -> Any:
    """An array of numbers, which keys are made of."""
    return jax.random.key_data(value) if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def told(tree: Any, most: int) -> list[Any]:
    """The leaves of a tree: arrays by their :func:`fingerprint`, all else as text."""
    arrays = jax.Array | np.ndarray
    return [fingerprint(v, most) if isinstance(v, arrays) else without_addresses(v) for v in jax.tree.leaves(tree)]


def fingerprint(value: Any, most: int) -> list[Any]:
    """The type and shape of an array, and a digest of at most so many rows of it if they are all in this process."""
    known = [str(value.dtype), list(value.shape)]
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return known
    value = numbers_of(value)
    rows = np.unique(np.linspace(0, len(value) - 1, most).astype(int)) if value.ndim and len(value) else ()
    some = np.asarray(value[rows])
    return [*known, hashlib.sha256(some.tobytes()).hexdigest()[:16]]
