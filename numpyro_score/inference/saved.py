"""Fits read from disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.energy import Labels
from numpyro_score.inference.arguments import named_leaves
from numpyro_score.inference.cost import FitCost
from numpyro_score.inference.files import Arrays, read
from numpyro_score.inference.pickling import NotPickled
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.score_matching import ScoreMatching
from numpyro_score.losses import (
    DSM,
    FSM,
    ISM,
    SSM,
    ContinuousDSM,
    DefaultLoss,
    DiscreteFisher,
    KLContraction,
    Loss,
    MissingCells,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
)
from numpyro_score.uncertainty import Dependence

__all__ = ["load"]

_SETTINGS_TELL_ALL = (
    DSM, FSM, ISM, SSM, ContinuousDSM, DefaultLoss, DiscreteFisher, KLContraction, MissingCells, Mixed,
    PairLikelihood, PseudoLikelihood, RatioMatching,
)  # fmt: skip
_LOSSES: dict[str, Any] = {c.__name__: c for c in _SETTINGS_TELL_ALL}


def load(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    *args: Any,
    loss: Loss | None = None,
    guide: Any = None,
    optim: Any = None,
    **kwargs: Any,
) -> ScoreMatchingResult:
    """The fit that `fit.save(path)` wrote.

    Nothing in the files is run as code: model, guide, optimiser and any loss with functions or kernels in it are given
    again, as they were given to :class:`~numpyro_score.ScoreMatching`.

    Args:
        path: the directory.
        model: the model that was fitted.
        *args: its arguments, if the fit was saved without them.
        loss: the loss, where the files do not say all of it (CD, PCD, NCE, ESM, your own).
        guide: the guide, if it was no point estimate.
        optim: the optimiser, if it was not the default. It is needed only to go on from the fit.
        **kwargs: the model's keyword arguments, if the fit was saved without them.

    Returns:
        The fit, whose compiled functions are compiled anew.

    Raises:
        FileNotFoundError: if the directory holds no fit.
        ValueError, TypeError: if what is given is not what was fitted; if the files are of a later version.
    """
    head, arrays = read(path)
    made = head["settings"]
    if head["data"] is not None:
        if args or kwargs:
            raise ValueError(f"{path} holds the model's arguments: write load(path, model) without them.")
        args, kwargs = jax.tree.map(_on_device, arrays.decode(head["data"]))
    elif not args and not kwargs:
        raise ValueError(f"{path} was saved without the model's arguments: write load(path, model, x).")
    if loss is None:
        loss = _loss(head["loss"], arrays)
    elif (given := type(loss).__name__) != head["loss"]["name"]:
        raise ValueError(f"The fit has the loss {head['loss']['printed']}, and {given} was given.")
    rate = arrays.decode(made["learning_rate"])
    svi = ScoreMatching(
        model, guide, optim, loss,
        num_steps=made["num_steps"], learning_rate=rate, data=made["data"], average=made["average"],
    )  # fmt: skip
    if (found := type(svi.guide).__name__) != made["guide"]:
        raise ValueError(f"The fit has the guide {made['guide']}, and this one would have {found}: pass guide=....")
    start = svi.init(jax.random.key(0), *args, **kwargs)
    saved = {name: _on_device(arrays.get(entry)) for name, entry in head["state"]}
    params = _filled(svi.get_params(start), {name: _on_device(arrays.get(entry)) for name, entry in head["params"]})
    state = _filled(start, saved)
    if state is None:
        if optim is not None or made["default_optimizer"]:
            raise ValueError(_MISMATCH.format(path=path))
        # Without the optimiser its state has no form; what a fit needs of it is the number of steps.
        rest = {k: v for k, v in saved.items() if not k.startswith(".optim_state[1]")}
        state = _filled(start._replace(optim_state=(start.optim_state[0], ())), rest)
        svi.optim = NotPickled(made["optimizer"])
        svi._compile()
    if state is None or params is None:
        raise ValueError(_MISMATCH.format(path=path))
    cost = None if head["cost"] is None else FitCost(**head["cost"])
    losses = np.asarray(arrays.get(head["losses"]))
    held_out = None if head.get("held_out") is None else np.asarray(arrays.get(head["held_out"]))
    dependence = None if head.get("dependence") is None else Dependence.decode(head["dependence"], arrays.get)
    return ScoreMatchingResult(
        params, state, losses, svi, args, kwargs, head["interrupted"], cost,
        labels=Labels.decode(head.get("labels")),  # unless the arguments given again are tables, which bring their own
        held_out=held_out, dependence=dependence,
    )  # fmt: skip


_MISMATCH = (
    "The parameters of the fit in {path} are not those of this model, guide and optimiser: pass the ones that were "
    "fitted, with data of the same shape."
)


def _on_device(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _filled(tree: Any, saved: dict[str, Any]) -> Any:
    """A tree of the same form with the saved leaves; None if they are others, or of other shapes."""
    named = named_leaves(tree)
    if {k: jnp.shape(v) for k, v in named.items()} != {k: jnp.shape(v) for k, v in saved.items()}:
        return None
    return jax.tree.unflatten(jax.tree.structure(tree), [saved[k] for k in named])


def _loss(entry: dict[str, Any], arrays: Arrays) -> Loss:
    """The loss that a file says all of."""
    if entry["fields"] is None:
        raise ValueError(f"The fit has the loss {entry['printed']}, which the files do not say all of: pass loss=....")
    fields = arrays.decode(entry["fields"])
    inner = {k: _loss(v, arrays) for k, v in fields.items() if isinstance(v, dict) and "printed" in v}
    return _LOSSES[entry["name"]](**fields | inner)
