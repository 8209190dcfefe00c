"""Points and weights at which a density is summed over the continuous latent sites of each row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

__all__ = [
    "MAX_PLACED",
    "MAX_POINTS",
    "NEAR",
    "START",
    "is_integrated",
    "is_placed",
    "law_of_numbers",
    "num_points",
    "set_point",
]

Site = dict[str, Any]

_WAYS = {"quadrature", "laplace"}

MAX_POINTS = 256
"""For one number of a site."""
MAX_PLACED = 4096
"""For the numbers of a row together."""
START = "laplace_start"
"""Where in `infer` the start of the search for the mode stands, in deviations, for checks."""
NEAR = 0.1
"""The start otherwise. At 0 itself, the median, quantiles of a Laplace law have the derivative 0 in JAX."""


def is_integrated(site: Site) -> bool:
    """Whether a site is a continuous latent one of each row that the density is to be integrated over."""
    return site["type"] == "sample" and not site["is_observed"] and not _ways(site).isdisjoint(_WAYS)


def is_placed(site: Site) -> bool:
    """Whether the points of a site that is integrated are placed for each row, about its mode."""
    return "laplace" in _ways(site)


def _ways(site: Site) -> set[str]:
    return {k for k, v in site["infer"].items() if v is not None}


def num_points(site: Site) -> int:
    """The points that one number of the site is integrated by, or all numbers of a row by if they are placed.

    Raises:
        ValueError: for no number of points, or a law that is neither normal nor has quantiles.
    """
    way, most = ("laplace", MAX_PLACED) if is_placed(site) else ("quadrature", MAX_POINTS)
    if {"laplace", "quadrature"} <= _ways(site):
        raise ValueError(f"Site '{site['name']}' has both 'laplace' and 'quadrature' in its infer: write one of them.")
    count, law = site["infer"][way], law_of_numbers(site)
    if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count <= most:
        raise ValueError(
            f"Site '{site['name']}' is to be integrated by {count!r} points: write a number from 2 to {most}, "
            f"e.g. infer={{'{way}': 16}}."
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


def set_point(site: Site, at: Any) -> None:
    """Sets a site that is integrated to one of its points.

    Its `value` is in its own shape, and its `log_weight` is what stands for its log density, of its batch shape.

    Args:
        site: a message of NumPyro's.
        at: the numbers of points, 0 to K − 1, in the shape of the site or one that spreads to it; or, of a site whose
            points are placed, standard normal numbers under whose law it is integrated.
    """
    law, shape, count = law_of_numbers(site), site["fn"].shape(), num_points(site)
    normal, dtype = _is_normal(law), jnp.result_type(float)
    if is_placed(site):
        points = jnp.broadcast_to(jnp.asarray(at, dtype), shape)
        log_weights = dist.Normal().log_prob(points)
        if not normal:
            points = jnp.clip(jax.scipy.special.ndtr(points), jnp.finfo(dtype).tiny, 1 - jnp.finfo(dtype).eps / 2)
    else:
        rule, weights = _rule(count, normal)
        points = jnp.asarray(rule, dtype)[at]
        log_weights = jnp.broadcast_to(jnp.asarray(np.log(weights), dtype)[at], shape)
    if not normal:
        values = law.icdf(points)
    else:
        values = law.loc + law.scale * points
        values = jnp.exp(values) if isinstance(law, dist.LogNormal) else values
    site["value"] = jnp.broadcast_to(values, shape)
    site["log_weight"] = jnp.sum(log_weights, axis=tuple(range(-site["fn"].event_dim, 0)))


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
