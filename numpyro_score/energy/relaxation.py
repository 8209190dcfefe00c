"""Discrete data as points among the real numbers, where a model takes these in the place of integers."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpyro.distributions as dist

from numpyro_score.energy.bound import BoundModel
from numpyro_score.energy.dependence import agrees_on_floats, has_constant_curvature
from numpyro_score.energy.supports import innermost

__all__ = ["bare", "is_quadratic_in_data", "relaxed"]

M = TypeVar("M", bound="BoundModel")


def relaxed(energy: M) -> M:
    """The same energy as a function of real numbers, where its model takes these in the place of integers."""
    arrays = tuple(a._replace(support=a.support._replace(dtype=None)) for a in energy._layout.arrays)
    return bare(energy._replace(_layout=energy._layout._replace(arrays=arrays)))


def bare(energy: M) -> M:
    """Without the sites that only say what the support is: a density of points inside."""
    sites, layout = energy._run().sites, energy._layout
    silent = {
        a.name
        for a in layout.arrays
        if a.support.is_discrete and isinstance(innermost(sites[a.name]["fn"]), dist.ImproperUniform)
    }
    return energy._replace(_layout=layout._replace(terms=tuple(t for t in layout.terms if t not in silent)))


def is_quadratic_in_data(energy: BoundModel) -> bool:
    """Whether the log density is a quadratic of the discrete numbers, whose second derivatives all rows share."""
    if not (energy.resizable and energy.has_density) or energy._layout.latents:
        return False
    x = jax.ShapeDtypeStruct((2, energy.dim), energy.dtype)
    try:
        return agrees_on_floats(bare(energy).row_log_density, x) and has_constant_curvature(
            relaxed(energy).row_log_density, x, energy._layout.discrete_columns
        )
    except (TypeError, IndexError):  # JAX's and NumPyro's, for models that index by their data
        return False
