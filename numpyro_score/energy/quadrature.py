"""Points and weights at which a density is summed over the continuous latent sites of each row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array

__all__ = ["MAX_POINTS", "is_integrated", "law_of_numbers", "num_points", "point_values", "point_weights"]

Site = dict[str, Any]

MAX_POINTS = 256
"""For one number of a site."""


def is_integrated(site: Site) -> bool:
    """Whether a site is a continuous latent one of each row that the density is to be integrated over."""
    return site["type"] == "sample" and not site["is_observed"] and site["infer"].get("quadrature") is not None


def num_points(site: Site) -> int:
    """The points that one number of the site is integrated by.

    Raises:
        ValueError: for no number of points, or a law that is neither normal nor has quantiles.
    """
    count, law = site["infer"]["quadrature"], law_of_numbers(site)
    if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count <= MAX_POINTS:
        raise ValueError(
            f"Site '{site['name']}' is to be integrated by {count!r} points: write a number from 2 to {MAX_POINTS}, "
            "e.g. infer={'quadrature': 16}."
        )
    why = "" if law.event_dim == 0 and not law.support.is_discrete else "is no law of single continuous numbers"
    if not (why or _is_normal(law)):
        try:
            jax.eval_shape(law.icdf, 0.5)
        except (NotImplementedError, ImportError, AttributeError) as error:
            why = "has no quantiles in NumPyro" + (f" ({str(error).rstrip('.')})" if str(error) else "")
    if why:
        raise ValueError(
            f"Site '{site['name']}' is to be integrated, and {type(law).__name__} {why}: use dist.Normal, a transform "
            "of it in the model, or another law with icdf, such as Exponential, Uniform, Laplace or Logistic."
        )
    return count


def point_values(site: Site, numbers: Any) -> Array:
    """The values of a site at points of these numbers, 0 to K − 1, in its own shape."""
    law, count = law_of_numbers(site), num_points(site)
    points = jnp.asarray(_rule(count, _is_normal(law))[0], jnp.result_type(float))[numbers]
    if not _is_normal(law):
        values = law.icdf(points)
    else:
        values = law.loc + law.scale * points
        values = jnp.exp(values) if isinstance(law, dist.LogNormal) else values
    return jnp.broadcast_to(values, site["fn"].shape())


def point_weights(site: Site, numbers: Any) -> Array:
    """The log weights of these points, as the log density of the site would be: of its batch shape."""
    weights = np.log(_rule(num_points(site), _is_normal(law_of_numbers(site)))[1])
    whole = jnp.broadcast_to(jnp.asarray(weights, jnp.result_type(float))[numbers], site["fn"].shape())
    return jnp.sum(whole, axis=tuple(range(-site["fn"].event_dim, 0)))


@functools.cache
def _rule(count: int, normal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gauss and Hermite's rule for N(0, 1), or Gauss and Legendre's for quantiles: points and weights, (K,) each."""
    if normal:
        points, weights = np.polynomial.hermite_e.hermegauss(count)
        return points, weights / weights.sum()
    points, weights = np.polynomial.legendre.leggauss(count)
    return 0.5 * (points + 1), 0.5 * weights


def law_of_numbers(site: Site) -> Any:
    """The law of one number of a site, under what shapes or masks it."""
    law = site["fn"]
    while isinstance(law, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        law = law.base_dist
    return law


def _is_normal(law: Any) -> bool:
    return isinstance(law, dist.Normal | dist.LogNormal)
