"""What a guide says of the latent sites."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide

__all__ = ["draw_latents", "medians"]


def medians(guide: Any, params: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The median of each latent site: the guide's own, or of 1,000 draws."""
    if isinstance(guide, AutoGuide) and type(guide).median is not AutoGuide.median:
        names = [k for k, s in guide.prototype_trace.items() if s["type"] == "sample" and not s["is_observed"]]
        if not names:
            return {}
        median = guide.median(params)
        return {k: median[k] for k in names}
    draws = draw_latents(guide, jax.random.key(0), 1000, params, args, kwargs)
    return {k: jnp.median(v, axis=0) for k, v in draws.items()}


def draw_latents(
    guide: Any, rng_key: Array, n: int, params: dict[str, Any], args: Any, kwargs: Any
) -> dict[str, Array]:
    """Draws of the latent sites, (n, ...)."""
    if not isinstance(guide, AutoGuide):
        return Predictive(guide, params=params, num_samples=n)(rng_key, *args, **kwargs)
    draws = guide.sample_posterior(rng_key, params, *args, sample_shape=(n,), **kwargs)
    # An autoguide also returns the deterministic sites of its model.
    latents = {k for k, s in guide.prototype_trace.items() if s["type"] == "sample"}
    return {k: v for k, v in draws.items() if k in latents}
