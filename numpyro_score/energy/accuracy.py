"""How far the integrals over continuous latent sites are off, seen from more points."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_score.energy.arguments import join_arrays
from numpyro_score.energy.energy import Energy
from numpyro_score.energy.latents import MAX_ASSIGNMENTS
from numpyro_score.energy.quadrature import MAX_POINTS, is_integrated
from numpyro_score.operators import value_score
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["quadrature_error"]

_LOOKED_AT = 128  # rows


class _MorePoints(Messenger):
    """Twice as many points and one for each site that is integrated: none of a rule is one of the other's but 0."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Changes what the site asks for."""
        if is_integrated(msg):
            msg["infer"] = {**msg["infer"], "quadrature": 2 * msg["infer"]["quadrature"] + 1}


def _with_more_points(model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(model)
    def finer(*args: Any, **kwargs: Any) -> Any:
        with _MorePoints():
            return model(*args, **kwargs)

    return finer


def quadrature_error(energy: Energy) -> float | None:
    """How much the score of some row changes with twice as many points and one, over the size of scores at all.

    The largest of at most 128 rows. None where nothing is integrated, there is no density, or so many points are too
    many.
    """
    latents = energy.latents
    if not any(latent.integrated for latent in latents) or not energy.has_density:
        return None
    more = [(2 * v.size + 1 if v.integrated else v.size, v) for v in latents]
    if math.prod(n ** math.prod(v.shape) for n, v in more) > MAX_ASSIGNMENTS or max(n for n, _ in more) > MAX_POINTS:
        return None
    args, kwargs = join_arrays(energy._arrays, energy._static)
    params, plates, rng_key = energy.held
    finer = Energy.bound_to(_with_more_points(energy.model), params, plates, rng_key, energy.data_name, args, kwargs)
    energy, weights = energy.usable()
    rows = np.flatnonzero(fetch(weights))[:_LOOKED_AT] if energy.resizable else slice(None)
    x = energy.data[rows]
    scores = [
        fetch(run_compiled(lambda e, x: value_score(e.row_log_density, x)[1], e, x)).astype(np.float64)
        for e in (energy, finer)
    ]
    size = np.sqrt(np.mean(np.sum(scores[1] ** 2, axis=1)))
    return float(np.max(np.linalg.norm(scores[0] - scores[1], axis=1)) / max(size, float(jnp.finfo(x.dtype).tiny)))
