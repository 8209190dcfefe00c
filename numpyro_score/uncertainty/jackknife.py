"""The spread of groups of rows as it is when each of them is left out."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.placement import fetch
from numpyro_score.programs import shared_jit
from numpyro_score.uncertainty.dependence import Dependence
from numpyro_score.uncertainty.hierarchy import rows_along
from numpyro_score.uncertainty.objective import Objective

__all__ = ["MOST_GROUPS", "MOST_PARAMETERS", "jackknife_root", "takes_jackknife"]

MOST_PARAMETERS = 32
"""More take P² second derivatives of the rows' losses, which then is most of the time of a fit."""
MOST_GROUPS = 1000
"""Beyond, one group is too small a part of the data to matter."""

_LEAST = 1e-4  # of the curvature, that is left of some direction without a group


def takes_jackknife(dependence: Dependence, used: np.ndarray, num_parameters: int) -> bool:
    """Whether the spread is over groups of several rows, few enough that each is felt."""
    if not dependence.by_groups or num_parameters > MOST_PARAMETERS:
        return False
    groups = dependence.count(used)
    return 2 <= groups <= MOST_GROUPS and groups < int(used.sum())


def jackknife_root(
    objective: Objective,
    dependence: Dependence,
    used: np.ndarray,
    hessian: np.ndarray,
    gradients: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, "g p"]:
    r"""R with RᵀR the spread S for which H⁻¹β²SH⁻¹ is that of estimates without one group of rows each.

    To first order in what a group weighs the estimates without group c are those with all plus

    .. math:: d_c = (H - \beta H_c)^{-1} \beta g_c,

    from the group's own gradient and Hessian in the constrained values, where there are as many of these as
    coordinates: exact for objectives that are quadratic in them. Their spread is
    :math:`\tfrac{G-1}{G} \sum_c (d_c - \bar d)(d_c - \bar d)^\top` [Bell & McCaffrey 2002; MacKinnon, Nielsen & Webb
    2023]. With H in the place of H − βH_c it is the sandwich, whose errors come out too small, as the fit follows each
    group, the more so the fewer there are and the less alike.

    Args:
        objective: at its minimum.
        dependence: the groups.
        used: which rows have a weight, (N,).
        hessian: of the whole objective, (P, P).
        gradients: of the rows' weighted losses, without β.

    Raises:
        SandwichError: for fewer than two groups.

    Warns:
        UserWarning: for fewer than 30 groups, or where one group alone determines a parameter.
    """
    dependence.check(used)
    beta, p = float(objective.learning_rate), len(hessian)
    g = dependence.sums @ gradients
    unit = jnp.eye(p, dtype=objective.position.dtype)
    own = np.stack([dependence.sums @ fetch(_gradients_along(objective, v)).astype(np.float64) for v in unit], axis=1)
    own -= _of_coordinates(objective, g)
    # In coordinates in which H is the identity.
    root = np.linalg.cholesky(hessian)
    share = np.linalg.solve(root, np.linalg.solve(root, own).transpose(0, 2, 1)) * beta
    left, axes = np.linalg.eigh(np.eye(p) - 0.5 * (share + share.transpose(0, 2, 1)))
    if (alone := left < _LEAST).any():
        _warn_of_one_group(objective, root, left, axes)
    inverse = np.where(alone, 0.0, 1 / np.where(alone, 1.0, left))
    d = np.einsum("gij,gj,gkj,gk->gi", axes, inverse, axes, np.linalg.solve(root, g.T).T)
    count = dependence.count(used)
    d = d[dependence.sums @ used.astype(float) > 0]
    d -= d.mean(axis=0)
    return (d @ root.T) * ((count - 1) / count) ** 0.5


def _of_coordinates(objective: Objective, g: Float[np.ndarray, "g p"]) -> Float[np.ndarray, "g p p"]:
    """What of the groups' Hessians is that of the coordinates, and not of the constrained values: Σ_k g_k ∇²θ_k."""
    slopes, bends = (fetch(v).astype(np.float64) for v in _of_constrained(objective))
    if slopes.shape[0] != slopes.shape[1]:  # as of a simplex
        return np.zeros((len(g), *bends.shape[1:]))
    return np.einsum("gk,kpq->gpq", np.linalg.solve(slopes.T, g.T).T, bends)


@shared_jit
def _of_constrained(objective: Objective) -> tuple[Float[Array, "k p"], Float[Array, "k p p"]]:
    """First and second derivatives of the constrained values."""

    def values(vector: Array) -> Array:
        return ravel_pytree(objective.constrain(vector))[0]

    return jax.jacfwd(values)(objective.position), jax.jacfwd(jax.jacfwd(values))(objective.position)


@shared_jit
def _gradients_along(objective: Objective, direction: Float[Array, "p"]) -> Float[Array, "n p"]:
    """The derivative along a direction of the gradients of the rows' losses."""
    unit = jnp.eye(len(direction), dtype=direction.dtype)

    def gradients(at: Array) -> Array:
        return rows_along(replace(objective, position=at), unit)

    return jax.jvp(gradients, (objective.position,), (direction,))[1]


def _warn_of_one_group(objective: Objective, root: np.ndarray, left: np.ndarray, axes: np.ndarray) -> None:
    """Warns, naming the site, that the estimates without one of the groups are not determined."""
    group, axis = np.unravel_index(int(left.argmin()), left.shape)
    direction = np.abs(np.linalg.solve(root.T, axes[group, :, axis]) * np.sqrt(np.diag(root @ root.T)))
    name = next(k for k, block in objective.blocks().items() if int(direction.argmax()) in block)
    warnings.warn(
        f"Numbers of site '{name}' are determined by one group of rows alone, whose spread from group to group cannot "
        "tell their errors: these mean nothing.",
        stacklevel=6,
    )
