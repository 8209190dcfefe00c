"""Which noise levels both a model and a diffusion know."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.diffusion.sde import SDE, noise_at
from numpyro_score.diffusion.source import noise_range_of
from numpyro_score.losses.base import as_numbers
from numpyro_score.normaliser.source import Source

__all__ = ["shared_noise_range"]


def shared_noise_range(owner: str, source: Source, sde: SDE | None, noise_range: Any) -> tuple[float, float]:
    """The smallest and the largest noise level that a fit has seen and the diffusion reaches.

    Args:
        owner: who asks, for messages.
        source: a fit or an energy.
        sde: the diffusion; None for any noise.
        noise_range: what the user asked for, if anything.

    Raises:
        TypeError: if the levels of the model are not known and not given, or no numbers, or `sde` is no diffusion.
        ValueError: if the levels asked for do not rise, or are not known to the model or not reached.
    """
    least, most = (0.0, np.inf) if sde is None else _reach(owner, sde)
    known = noise_range_of(source)
    reached = f"sigma/alpha of the SDE goes from {least:.3g} to {most:.3g}"
    if noise_range is None:
        if known is None:
            raise TypeError(
                f"{owner} cannot see at which noise levels the model of this {type(source).__name__} is good: write "
                "noise_range=(smallest, largest), or pass a fit by ContinuousDSM."
            )
        low, high = max(known[0], least), min(known[1], most)
        if not low < high:
            raise ValueError(
                f"The fit has seen noise levels from {known[0]:.3g} to {known[1]:.3g}, and {reached}: take an SDE that "
                "passes them."
            )
        return low, high
    given = as_numbers(owner, "noise_range=(smallest, largest)", noise_range)
    if given.shape != (2,) or not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"{owner} needs noise_range=(smallest, largest) of positive numbers, got {noise_range!r}.")
    low, high = (float(v) for v in given)
    if not low < high:
        order = f"write ({high:g}, {low:g})" if low > high else "take a larger one"
        raise ValueError(f"{owner} needs noise_range=(smallest, largest), and the largest is {high:g}: {order}.")
    if known is not None and (low < known[0] * (1 - 1e-5) or high > known[1] * (1 + 1e-5)):
        raise ValueError(
            f"noise_range goes from {low:.3g} to {high:.3g}, but the fit has seen {known[0]:.3g} to {known[1]:.3g}: "
            "stay within."
        )
    if low < least * (1 - 1e-5) or high > most * (1 + 1e-5):
        raise ValueError(f"noise_range goes from {low:.3g} to {high:.3g}, but {reached}: stay within.")
    return low, high


def _reach(owner: str, sde: SDE) -> tuple[float, float]:
    if not isinstance(sde, SDE) or isinstance(sde, type):
        raise TypeError(f"{owner} needs a diffusion such as sde=VP(), got {sde!r}.")
    with jax.ensure_compile_time_eval():  # also while a key is traced by jax.jit
        ends = jnp.asarray([0.0, sde.final_time], jnp.result_type(float))
        least, most = (float(v) for v in noise_at(sde, ends))
    return least if np.isfinite(least) else 0.0, most  # at the data α or σ need not be known
