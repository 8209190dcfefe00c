"""The loss of rows that no step is taken on, looked at while steps are taken on others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, join_arrays, split_arrays
from numpyro_score.inference.loop import Course
from numpyro_score.inference.processes import require_common
from numpyro_score.inference.reading import as_arguments
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.losses import total_loss
from numpyro_score.losses.base import at_least_one
from numpyro_score.placement import fetch, places_of
from numpyro_score.programs import shared_jit

__all__ = ["HeldOut"]


class HeldOut:
    """Rows held out, and when to look at them.

    Args:
        svi: a :class:`~numpyro_score.ScoreMatching`.
        rows: the model's arguments, in the form of a batch.
        every: steps between two looks.
        rng_key: the loss's random numbers, the same at each look.
        course: of the run.
        state: its first.

    Raises:
        TypeError: for what is no batch; for a loss whose values do not say how good a fit is.
        ValueError, TypeError, NotImplementedError: as for the rows of a fit.
    """

    def __init__(self, svi: Any, rows: Any, every: Any, rng_key: Array, course: Course, state: Any) -> None:
        if hasattr(svi.score_loss, "no_objective"):
            name = type(svi.score_loss).__name__
            raise TypeError(f"{name} has no value to look at, as {svi.score_loss.no_objective}: leave out held_out.")
        args = as_arguments("held_out", rows)
        self.every = at_least_one("run_batches", "held_out_every", every)
        self.args = jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, args)
        self._arrays, static = split_arrays((self.args, {}))
        require_common("run_batches", self._arrays)
        self._key = jax.random.fold_in(rng_key, 0x68656C64)
        try:
            _energy(svi, state, self.args).check(svi._evaluate)
        except (ValueError, TypeError, NotImplementedError) as error:
            error.add_note("It was raised by the rows of held_out.")
            raise
        stepping = svi._stepping(course, places_of(self._arrays))

        def mean_loss(arrays: Any, state: Any, key: Array) -> Float[Array, ""]:
            energy = _energy(stepping, state, join_arrays(arrays, static)[0])
            return total_loss(stepping.score_loss, energy, key) / jnp.sum(energy.usable()[1])

        self._mean_loss = shared_jit(mean_loss)

    def look(self, state: Any) -> float:
        """The mean loss of the rows at the estimates of a state."""
        return float(fetch(self._mean_loss(self._arrays, state, self._key)))


def _energy(svi: Any, state: Any, args: tuple[Any, ...]) -> Energy:
    return ScoreMatchingResult(svi.get_params(state), state, np.zeros(0), svi, args, {}).energy
