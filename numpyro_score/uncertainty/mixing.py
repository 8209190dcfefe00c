"""Effects of groups that reach the rows by a matrix, by sites of their own or among other elements of a site.

A row of a group moves along one direction of such effects, whatever its data: its gradient in them is its residual
times what the group has of each. So the rows' gradients have as many directions as there are groups, and these are
independent where each group can have any effect. A site that all groups share, such as their mean, then moves the rows
of a group in proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.energy import varying_outputs
from numpyro_score.uncertainty.objective import Objective, SandwichError

__all__ = ["mixed_effects", "varying_terms"]

_LEAST_GROUPS = 3
_INDEPENDENT = 1e-5  # of the largest singular value of the directions


def mixed_effects(objective: Objective, gradients: np.ndarray, known: tuple[str, ...]) -> tuple[str, ...]:
    """The terms of the prior, beside those known, that effects of groups have by mixing.

    Args:
        objective: at its minimum.
        gradients: of the rows that have a weight, (N, P).
        known: terms that are part of the law of the data already.

    Raises:
        SandwichError: for a site that holds effects of groups and what all groups share.
    """
    blocks = objective.blocks()
    rows = (gradients != 0).sum(axis=0)
    few = (rows > 0) & (rows < len(gradients))
    whole = [k for k in sorted(blocks) if _are_effects(gradients, blocks[k])]
    rest = [k for k in sorted(blocks) if k not in whole and few[blocks[k]].any()]
    if not whole and not rest:
        return ()
    terms = varying_terms(objective.prior_terms, objective.unravel(objective.position))
    unknown = {k for k, of in terms.items() if of and not set(of) & set(known)}
    found, rest = [k for k in whole if k in unknown], [k for k in rest if k in unknown]
    columns = np.concatenate([np.zeros(0, int), *(blocks[k][few[blocks[k]]] for k in rest)])
    if _are_effects(gradients, columns):  # together, as sites or elements of one group each
        for name in rest:
            if not few[blocks[name]].all():
                raise SandwichError(
                    f"Site '{name}' holds effects of groups and what all groups share, whose errors differ in kind: "
                    "make two sites of it."
                )
        found += rest
    return tuple(dict.fromkeys(t for k in found for t in terms[k]))


def varying_terms(terms: Callable[[dict[str, Any]], dict[str, Array]], values: dict[str, Any]) -> dict[str, list[str]]:
    """The terms of a prior that vary with each site, by site.

    Args:
        terms: from values by site to the prior's terms, by the name of the latent site or factor.
        values: some.
    """
    closed, shapes = jax.make_jaxpr(terms, return_shape=True)(values)
    inputs = [k for k in sorted(values) for _ in jax.tree.leaves(values[k])]
    outputs = {k: varying_outputs(closed.jaxpr, [k == i for i in inputs]) for k in values}
    return {k: [t for t, varies in zip(sorted(shapes), of, strict=True) if varies] for k, of in outputs.items()}


def _are_effects(gradients: np.ndarray, columns: np.ndarray) -> bool:
    """Whether rows have independent directions by group along these columns, and others move all groups."""
    if len(columns) < _LEAST_GROUPS:
        return False
    others = np.setdiff1d(np.arange(gradients.shape[1]), columns)
    size = np.linalg.norm(gradients[:, columns], axis=1)
    used = size > 1e-3 * np.median(size[size > 0]) if (size > 0).any() else size > 0
    if not len(others) or used.sum() < 2 * _LEAST_GROUPS:
        return False
    own, most = gradients[np.ix_(used, columns)], min(len(columns), used.sum() / 2)
    one, other = (own @ v for v in np.random.default_rng(0).normal(size=(2, len(columns))))
    ratio = np.sort(other / one)  # of the direction alone, and cheap
    if 1 + np.sum(np.diff(ratio) > 100 * _tolerance() * (1 + np.abs(ratio[1:]))) > most:
        return False
    length = np.where(one < 0, -1.0, 1.0) * size[used]
    direction = own / length[:, None]
    label = _clusters(direction, one / length)
    if label is None:
        return False
    count = label.max() + 1
    if not _LEAST_GROUPS <= count <= most:
        return False
    number = np.bincount(label)
    centre = np.stack([np.bincount(label, weights=d) for d in direction.T], axis=1) / number[:, None]
    singular = np.linalg.svd(centre, compute_uv=False)
    if singular[-1] <= _INDEPENDENT * singular[0]:
        return False
    share = gradients[np.ix_(used, others)] / length[:, None]
    means = np.stack([np.bincount(label, weights=s) for s in share.T], axis=1) / number[:, None]
    scale = np.abs(means).max(axis=0)
    alike = (np.abs(share - means[label]) <= 1e-2 * scale).all(axis=0) & (scale > 0)
    return bool((alike & ((np.abs(means) > 1e-6 * scale).sum(axis=0) > 1)).any())


def _tolerance() -> float:
    """How far directions of one group are apart by rounding."""
    return 1e3 * float(np.finfo(jnp.result_type(float)).eps)


def _clusters(direction: np.ndarray, along: np.ndarray) -> np.ndarray | None:
    """Which rows have one direction, (N,), from a projection of them; None where there is no such thing."""
    tolerance = _tolerance()
    order = np.argsort(along)
    step = np.diff(along[order]) > tolerance * np.linalg.norm(along) / len(along) ** 0.5
    label = np.empty(len(along), int)
    label[order] = np.concatenate([[0], np.cumsum(step)])
    first = np.unique(label, return_index=True)[1]
    if (np.abs(direction - direction[first][label]).max(axis=1) > 100 * tolerance).any():
        return None
    return label
