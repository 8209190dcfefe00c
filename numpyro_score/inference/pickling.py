"""Pickles of fits: without compiled functions, which are made again, and with optimisers where pickle takes them."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

from numpyro.infer.autoguide import AutoGuide

from numpyro_score.inference.arguments import GUIDES_WITH_DENSITY

__all__ = ["Compiling", "PickledOptimizer", "refuse_not_pickled", "without_observed"]


class Compiling:
    """Base of what holds compiled functions: its pickles and deep copies leave them out and compile anew.

    Attributes:
        _compiled: the names of the attributes that `_compile` sets.
        _optimizers: the names of those that hold optimisers.
    """

    _compiled: ClassVar[tuple[str, ...]] = ()
    _optimizers: ClassVar[tuple[str, ...]] = ()

    def _compile(self) -> None:
        """Sets the compiled functions."""

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in self._compiled}
        state |= {k: PickledOptimizer(state[k]) for k in self._optimizers}
        return state | {k: _without_functions(v) for k, v in state.items() if isinstance(v, AutoGuide)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update({k: state[k].optimizer for k in self._optimizers})
        self._compile()


def _without_functions(guide: AutoGuide) -> AutoGuide:
    """A guide that has forgotten how its model's param sites start, which are local functions of NumPyro."""
    if getattr(guide, "prototype_trace", None) is None:
        return guide
    new = copy.copy(guide)
    new.prototype_trace = {
        k: {**s, "fn": None} if s["type"] == "param" else s for k, s in guide.prototype_trace.items()
    }
    return new


def without_observed(guide: Any) -> Any:
    """A guide that has forgotten the observed sites of its model's first run, whose values it never uses."""
    if getattr(guide, "prototype_trace", None) is None:
        return guide
    new = copy.copy(guide)
    new.prototype_trace = {
        k: {**s, "fn": None, "value": None} if s["type"] == "sample" and s["is_observed"] else s
        for k, s in guide.prototype_trace.items()
    }
    if not isinstance(guide, GUIDES_WITH_DENSITY) and hasattr(new, "_potential_fn"):
        new._potential_fn = None  # of the model with its arguments, which other guides do not use
    return new


class PickledOptimizer:
    """Carries an optimiser through pickle, or, where it is made of functions that pickle refuses, a stand-in for it.

    A fit needs no optimiser for its estimates and their errors, so it can be saved without. Most of Optax's and
    NumPyro's are made of local functions, and so never can be pickled; this package's own say how to make them again.
    A deep copy shares the optimiser, which has no state.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __deepcopy__(self, memo: Any) -> PickledOptimizer:
        return self

    def __getstate__(self) -> dict[str, Any]:
        remake = getattr(self.optimizer, "remake", None)
        state = {"optimizer": self.optimizer} if remake is None else {"remake": remake}
        try:
            pickle.dumps(state)
        # What pickle raises for functions and objects that it refuses, by Python's version.
        except (pickle.PicklingError, AttributeError, TypeError):
            return {"optimizer": NotPickled(type(self.optimizer).__name__)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["remake"]() if "remake" in state else state["optimizer"]


class NotPickled:
    """Stands for the optimiser of a fit that was pickled without it.

    Args:
        name: of the optimiser's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"The optimiser ({self._name}) could not be saved with this fit: give it again, e.g. "
            "ScoreMatching(model, optim=optax.adam(1e-3), loss=loss).run(key, x, init_state=fit.state)."
        )

    init = update = get_params = eval_and_update = eval_and_stable_update = _refuse


def refuse_not_pickled(optimizer: Any) -> None:
    """Raises ValueError for the stand-in of an optimiser, which SVI would take for an object of no known type."""
    if isinstance(optimizer, NotPickled):
        optimizer.init()
