"""How far the integrals over continuous latent sites are off, seen from more points."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from numpyro_score.energy.arguments import join_arrays
from numpyro_score.energy.energy import Energy
from numpyro_score.energy.latents import MAX_ASSIGNMENTS, Latent
from numpyro_score.energy.placed import more_points
from numpyro_score.energy.quadrature import MAX_POINTS, START, is_integrated, is_placed
from numpyro_score.operators import value_score
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["quadrature_error"]

_LOOKED_AT = 128  # rows
_AWAY = 2.0  # from where the mode of a row is looked for otherwise, in deviations of the latent law


class _Otherwise(Messenger):
    """Integrates by more points, none of which but 0 are those of the model's own rule, or from other starts."""

    def __init__(self, latents: tuple[Latent, ...], more: bool, start: float) -> None:
        self.sizes = _more(latents) if more else {v.name: v.size for v in latents}
        self.start = start
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Changes what the site asks for."""
        if is_integrated(msg):
            size = self.sizes[msg["name"]]
            wanted = {"laplace": size, START: self.start} if is_placed(msg) else {"quadrature": size}
            msg["infer"] = {**msg["infer"], **wanted}  # not in place: it is the user's own dict


def _more(latents: tuple[Latent, ...]) -> dict[str, int]:
    width = sum(v.width for v in latents if v.placed)
    return {v.name: more_points(v.size, width) if v.placed else 2 * v.size + 1 for v in latents}


def _otherwise(energy: Energy, more: bool, start: float) -> Energy:
    model, latents = energy.model, energy.latents

    @functools.wraps(model)
    def integrated(*args: Any, **kwargs: Any) -> Any:
        with _Otherwise(latents, more, start):
            return model(*args, **kwargs)

    args, kwargs = join_arrays(energy._arrays, energy._static)
    params, plates, rng_key = energy.held
    return Energy.bound_to(integrated, params, plates, rng_key, energy.data_name, args, kwargs)


def quadrature_error(energy: Energy) -> float | None:
    """How much the score of some row changes with more points, over the size of scores at all.

    Shared points become twice as many and one. Points that are placed become more, too, and the modes that they are
    placed at are looked for from two other starts, so that a row with several of them shows.

    The largest of at most 128 rows. None where nothing is integrated, there is no density, or so many points are too
    many.
    """
    latents = energy.latents
    if not any(latent.integrated for latent in latents) or not energy.has_density:
        return None
    more, summed = _more(latents), [v for v in latents if not v.placed]
    count = math.prod((more[v.name] if v.integrated else v.size) ** v.width for v in summed)
    most = max((more[v.name] for v in summed if v.integrated), default=0)
    if count > MAX_ASSIGNMENTS or most > MAX_POINTS:
        return None
    others = [_otherwise(energy, True, -_AWAY)]
    if len(summed) < len(latents):
        others.append(_otherwise(energy, False, _AWAY))
    energy, weights = energy.usable()
    rows = np.flatnonzero(fetch(weights))[:_LOOKED_AT] if energy.resizable else slice(None)
    x = energy.data[rows]
    own, finer, *rest = (
        fetch(run_compiled(lambda e, x: value_score(e.row_log_density, x)[1], e, x)).astype(np.float64)
        for e in (energy, *others)
    )
    size = np.sqrt(np.mean(np.sum(finer**2, axis=1)))
    off = max(float(np.max(np.linalg.norm(finer - s, axis=1))) for s in (own, *rest))
    return off / max(size, float(jnp.finfo(x.dtype).tiny))
