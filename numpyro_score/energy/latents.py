"""Latent sites of each row, which the density is summed or integrated over."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy.placed import fewest_points
from numpyro_score.energy.quadrature import NEAR, START, is_integrated, is_placed, num_points
from numpyro_score.energy.supports import Shape
from numpyro_score.energy.trace import Site, is_summed, support_points

__all__ = ["Latent", "assignments", "find_latents", "marginals", "with_rows_in_place"]

MAX_ASSIGNMENTS = 4096
"""More values than this that the latent sites of one row take together are not summed."""


class Latent(NamedTuple):
    """A latent site of each row."""

    name: str
    size: int  # how many values one number of it takes
    integrated: bool  # whether these are points of a continuous one
    placed: bool  # whether they are placed for each row, `size` of them for all numbers of a row
    shape: Shape  # of the site, with 1 along the rows
    rest: Shape  # without the rows
    row_axes: Shape  # of the site that number the rows, outermost first
    start: float  # of the search for the place, in deviations of the law

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return math.prod(self.rest)


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
        integrated, start = is_integrated(site), site["infer"].get(START, NEAR)
        size, shape = num_points(site) if integrated else len(support_points(site)), jnp.shape(site["value"])
        rows = tuple(len(site["fn"].batch_shape) + d for d in row_dims)
        whole = tuple(1 if i in rows else s for i, s in enumerate(shape))
        rest = tuple(s for i, s in enumerate(shape) if i not in rows)
        found.append(Latent(name, size, integrated, is_placed(site), whole, rest, rows, start))
    _check_placed([latent for latent in found if latent.placed])
    summed = [latent for latent in found if not latent.placed]
    count = math.prod(latent.size**latent.width for latent in summed)
    if count > MAX_ASSIGNMENTS:
        of = ", ".join(f"'{latent.name}' ({latent.size}^{latent.width})" for latent in summed)
        raise ValueError(
            f"The latent sites of a row, {of}, take {count} values together, and at most {MAX_ASSIGNMENTS} are summed: "
            "take fewer points of continuous ones, infer={'laplace': 64} for points placed by row, or write the sum in "
            "the model, e.g. softplus for each binary unit that meets no other."
        )
    return tuple(found)


def _check_placed(placed: list[Latent]) -> None:
    """Raises ValueError unless the sites whose points are placed agree on how many, and those are enough."""
    if not placed:
        return
    first, width = placed[0], sum(latent.width for latent in placed)
    for other in placed[1:]:
        if other.size != first.size:
            raise ValueError(
                f"Sites '{first.name}' and '{other.name}' are integrated together, by the points of a row, and one "
                f"has infer={{'laplace': {first.size}}} and the other {other.size}: write the same number."
            )
    if first.size < (least := fewest_points(width)):
        names = " and ".join(f"'{latent.name}'" for latent in placed)
        raise ValueError(
            f"{first.size} points for the {width} numbers of a row that site {names} has are too few: write at least "
            f"infer={{'laplace': {least}}}, better {4 * least}."
        )


def assignments(latents: tuple[Latent, ...]) -> dict[str, np.ndarray]:
    """All values that the latent sites of one row take together, by number of the point of the support: (A, ...).

    Without those whose points are placed.
    """
    latents = tuple(latent for latent in latents if not latent.placed)
    sizes = [(latent.size,) * latent.width for latent in latents]
    table = np.array(list(itertools.product(*(range(k) for s in sizes for k in s))))
    ends = np.cumsum([len(s) for s in sizes])
    parts = np.split(table, ends[:-1], axis=1)
    return {latent.name: part.reshape(-1, *latent.shape) for latent, part in zip(latents, parts, strict=True)}


def marginals(latents: tuple[Latent, ...], joint: Float[Array, "a n"]) -> dict[str, Float[Array, "n *rest k"]]:
    """Probabilities of the values of each number of each discrete site, from those of all assignments, (A, N)."""
    found, numbers = {}, assignments(latents)
    for latent in latents:
        if latent.integrated:
            continue
        table = numbers[latent.name]
        points = jax.nn.one_hot(table.reshape(len(table), *latent.rest), latent.size, dtype=joint.dtype)
        found[latent.name] = jnp.tensordot(joint.T, points, axes=1)
    return found


def with_rows_in_place(
    latents: tuple[Latent, ...], numbers: Float[Array, "n m"], row_shape: Shape
) -> dict[str, Float[Array, "..."]]:
    """The numbers of each row that the sites have whose points are placed, (N, M), in the shapes of the sites."""
    found, start = {}, 0
    for latent in latents:
        if latent.placed:
            part = numbers[:, start : start + latent.width].reshape(*row_shape, *latent.rest)
            found[latent.name] = jnp.moveaxis(part, range(len(row_shape)), latent.row_axes)
            start += latent.width
    return found
