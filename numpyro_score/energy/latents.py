"""Latent sites of each row, which the density is summed or integrated over."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy.quadrature import is_integrated, num_points
from numpyro_score.energy.supports import Shape
from numpyro_score.energy.trace import Site, is_summed, support_points

__all__ = ["Latent", "assignments", "find_latents", "marginals"]

MAX_ASSIGNMENTS = 4096
"""More values than this that the latent sites of one row take together are not summed."""


class Latent(NamedTuple):
    """A latent site of each row."""

    name: str
    size: int  # how many values one number of it takes
    integrated: bool  # whether these are points of a continuous one
    shape: Shape  # of the site, with 1 along the rows
    rest: Shape  # without the rows


def find_latents(sites: dict[str, Site], row_plates: tuple[str, ...], row_dims: Shape) -> tuple[Latent, ...]:
    """The latent sites that are to be summed.

    Raises:
        ValueError: for one outside of the plates that number the rows, or too many values to sum.
    """
    found = []
    for name, site in sites.items():
        if not is_summed(site):
            continue
        if not row_plates or not set(row_plates) <= {f.name for f in site["cond_indep_stack"]}:
            plates = " and ".join(f"'{p}'" for p in row_plates) or "of the data"
            raise ValueError(
                f"Site '{name}' is to be summed, and stands outside of the plate {plates} that numbers the rows: a "
                "density is summed over latent values of each row alone; move the site into the plate, or sum over it "
                "in the model by logsumexp."
            )
        size, shape = num_points(site) if is_integrated(site) else len(support_points(site)), jnp.shape(site["value"])
        batch = len(site["fn"].batch_shape)
        rows = {batch + d for d in row_dims}
        whole = tuple(1 if i in rows else s for i, s in enumerate(shape))
        found.append(
            Latent(name, size, is_integrated(site), whole, tuple(s for i, s in enumerate(shape) if i not in rows))
        )
    count = math.prod(latent.size ** math.prod(latent.shape) for latent in found)
    if count > MAX_ASSIGNMENTS:
        of = ", ".join(f"'{latent.name}' ({latent.size}^{math.prod(latent.shape)})" for latent in found)
        raise ValueError(
            f"The latent sites of a row, {of}, take {count} values together, and at most {MAX_ASSIGNMENTS} are summed: "
            "take fewer points of continuous ones, or write the sum in the model, e.g. softplus for each binary unit "
            "that meets no other."
        )
    return tuple(found)


def assignments(latents: tuple[Latent, ...]) -> dict[str, np.ndarray]:
    """All values that the latent sites of one row take together, by number of the point of the support: (A, ...)."""
    sizes = [(latent.size,) * math.prod(latent.shape) for latent in latents]
    table = np.array(list(itertools.product(*(range(k) for s in sizes for k in s))))
    ends = np.cumsum([len(s) for s in sizes])
    parts = np.split(table, ends[:-1], axis=1)
    return {latent.name: part.reshape(-1, *latent.shape) for latent, part in zip(latents, parts, strict=True)}


def marginals(latents: tuple[Latent, ...], joint: Float[Array, "a n"]) -> dict[str, Float[Array, "n *rest k"]]:
    """Probabilities of the values of each number of each discrete site, from those of all assignments, (A, N)."""
    found = {}
    for latent, numbers in zip(latents, assignments(latents).values(), strict=True):
        if latent.integrated:
            continue
        points = jax.nn.one_hot(numbers.reshape(len(numbers), *latent.rest), latent.size, dtype=joint.dtype)
        found[latent.name] = jnp.tensordot(joint.T, points, axes=1)
    return found
