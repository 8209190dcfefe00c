"""Which terms of a prior are part of the law of the data, and what they add to the spread of estimates.

Rows are independent given all parameters, but not given the hyperparameters alone: the rows of one group share its
effect. Effects u with a prior π(u | φ) are drawn anew with every data set, so the gradient of −log π(u | φ) spreads, as
those of the rows do, and by the information identity its covariance is the expectation of the Hessian.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions.transforms import IdentityTransform, IndependentTransform

from numpyro_score.energy import varying_outputs
from numpyro_score.placement import fetch
from numpyro_score.programs import shared_jit
from numpyro_score.uncertainty.mixing import mixed_effects, varying_terms
from numpyro_score.uncertainty.objective import USE_NUTS, Objective, SandwichError

__all__ = [
    "between",
    "effects",
    "grouped_sites",
    "nested_terms",
    "refuse_products",
    "rows_along",
    "sum_of_terms",
    "ties",
    "unshared_sites",
    "warn_if_few_groups",
]

Terms = Callable[[dict[str, Any]], dict[str, Array]]


def nested_terms(terms: Terms, values: dict[str, Any]) -> tuple[str, ...]:
    """The names of the prior's terms that tie one site to another.

    These are priors of latent sites with parameters that are sites themselves, such as `mu ~ Normal(m, s)`, and factors
    whose gradient in one site varies with another.

    Args:
        terms: from values by site to the prior's terms, by the name of the latent site or factor.
        values: some.
    """
    if len(values) < 2:
        return ()
    sites = [k for k in sorted(values) for _ in jax.tree.leaves(values[k])]  # of each input
    varying = varying_terms(terms, values)

    def factor_ties(name: str) -> bool:
        slope = jax.make_jaxpr(jax.grad(lambda v: terms(v)[name]))(values).jaxpr
        return any(
            any(
                moves and a != b
                for a, moves in zip(sites, varying_outputs(slope, [k == b for k in sites]), strict=True)
            )
            for b in values
        )

    found = []
    for name in sorted({term for of_site in varying.values() for term in of_site}):
        others = [b for b in values if b != name and name in varying[b]]
        if (name in values and others) or (len(others) > 1 and factor_ties(name)):
            found.append(name)
    return tuple(found)


def grouped_sites(overlap: Bool[np.ndarray, "p p"], blocks: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The sites whose elements each enter the rows of one group alone, where other sites enter several groups.

    Args:
        overlap: whether two coordinates enter a common row.
        blocks: the coordinates of each site.
    """
    found = []
    for name, block in blocks.items():
        index = block[np.diag(overlap)[block]]
        together = overlap[np.ix_(index, index)]
        groups = np.unique(together, axis=0)
        # Groups that share no row: each element is in one of them.
        if len(groups) < 2 or (groups.sum(axis=0) != 1).any():
            continue
        others = np.setdiff1d(np.flatnonzero(np.diag(overlap)), block)
        if (((overlap[np.ix_(others, index)][:, None, :] & groups).any(axis=-1)).sum(axis=-1) > 1).any():
            found.append(name)
    return tuple(found)


def scale_pairs(
    gradients: np.ndarray, position: np.ndarray, blocks: dict[str, np.ndarray], real: set[str]
) -> list[tuple[str, str, np.ndarray]]:
    """Pairs of sites of which the losses may see the product alone, such as s and z in m + s z.

    Then each row's loss has the same derivative in log s and along z: to first order, so look again at the loss itself.

    Args:
        gradients: of the rows, (N, P).
        position: of the estimates, (P,).
        blocks: the coordinates of each site.
        real: the sites whose coordinates are their values.

    Returns:
        The name of a scale, that of what it multiplies, and a position (P,) with the same product.
    """
    size = np.abs(gradients) @ np.maximum(np.abs(position), 1.0)
    tolerance = 100 * float(np.finfo(jnp.result_type(float)).eps) * size
    shift = {k: gradients[:, block].sum(axis=1) for k, block in blocks.items()}
    scale = {k: gradients[:, block] @ position[block] for k, block in blocks.items()}
    found = []
    for s, block in blocks.items():
        # Of a positive site the coordinate is the logarithm; a real one may be a scale or the logarithm of one.
        moves = [(shift[s], np.full(len(block), _STEP))]
        moves += [(scale[s], np.expm1(_STEP) * position[block])] if s in real else []
        for slope, step in moves:
            for z in sorted(real - {s}):
                if (np.abs(slope) > tolerance).any() and (np.abs(slope - scale[z]) <= tolerance).all():
                    moved = position.copy()
                    moved[block] += step
                    moved[blocks[z]] *= np.exp(-_STEP)
                    found.append((s, z, moved))
    return found


_STEP = 0.3  # of the logarithm of a scale


def ties(objective: Objective) -> tuple[str, ...]:
    """The terms of an objective's prior that tie sites to each other."""
    return nested_terms(objective.prior_terms, objective.unravel(objective.position))


def effects(objective: Objective, gradients: np.ndarray) -> tuple[str, ...]:
    """The terms of the prior that are part of the law of the data, by name.

    Args:
        objective: at its minimum.
        gradients: of the rows, (N, P).
    """
    found = ties(objective)
    enters = (gradients != 0).astype(np.float32)
    rows = enters.sum(axis=0)
    if ((rows > 0) & (rows < len(enters))).any():
        if grouped := grouped_sites(enters.T @ enters > 0, objective.blocks()):
            latents = jax.eval_shape(objective.prior_terms, objective.unravel(objective.position))
            found += tuple(k for k in grouped if k in latents and k not in found)
    return found + mixed_effects(objective, gradients, found)


def warn_if_few_groups(objective: Objective, names: tuple[str, ...]) -> None:
    """Few effects say little of their own spread, and a point fit leaves out how uncertain it is.

    Intervals of 90% around point fits hold a mean and a scale of effects in 81% of data sets with 8 groups, in 83 to
    86% with 20, and in 88% with 40, of 100 rows each (benchmarks/HIERARCHIES.md). Effects whose spread is known have
    the right errors with any number of groups.

    Args:
        objective: at its minimum.
        names: the terms of the prior that are part of the law of the data.
    """
    values, blocks = objective.unravel(objective.position), objective.blocks()
    for name in names:
        if name not in values or (scale := _spread_depends_on(objective.prior_terms, values, name)) is None:
            continue
        found = row_groups(objective, name)
        count = len(blocks[name]) if found is None else len(np.unique(found[found >= 0]))
        if 1 < count < ENOUGH_GROUPS:  # a single one is shared by all rows
            warnings.warn(
                f"Site '{name}' has effects of {count} groups, and their spread depends on site '{scale}', which is "
                f"estimated: with fewer than {ENOUGH_GROUPS} groups the errors of a point fit are too small. For the "
                "sites that all groups share, use NUTS over generalized_bayes(model, loss).",
                stacklevel=5,
            )
            return


ENOUGH_GROUPS = 30


def row_groups(objective: Objective, name: str) -> Int[np.ndarray, "n"] | None:
    """Which element of a site, or slice along one of its axes, each row depends on; −1 for none.

    None if some row depends on several, or all rows on one. For any number of parameters: where a row depends on one
    slice alone, its derivative along a vector that is r_k throughout slice k is r_k times that along ones.
    """
    value = objective.unravel(objective.position)[name]
    if not isinstance(value, jax.Array):  # a network
        return None
    block, rng = objective.blocks()[name], np.random.default_rng(0)
    for axis in range(value.ndim):
        size = value.shape[axis]
        if size < 2:
            continue
        steps = rng.permutation(np.linspace(1.0, 2.0, size))
        directions = np.zeros((2, len(objective.position)))
        directions[0, block] = 1.0
        directions[1, block] = np.broadcast_to(
            np.expand_dims(steps, tuple(range(1, value.ndim - axis))), value.shape
        ).ravel()
        along = fetch(rows_along(objective, jnp.asarray(directions, objective.position.dtype)))
        ones, others = along.astype(np.float64).T
        touched = ones != 0
        if not touched.any():
            return None
        index = (np.divide(others, ones, out=np.ones_like(ones), where=touched) - 1.0) * (size - 1)
        nearest = np.clip(index.round(), 0, size - 1).astype(int)
        close = np.abs(index - nearest) < np.clip(4e-6 * size, 0.02, 0.25)  # as far as single precision reaches
        if close[touched].all() and len(np.unique(nearest[touched])) > 1:
            order = np.argsort(steps)
            return np.where(touched, order[nearest], -1)
    return None


def unshared_sites(objective: Objective) -> tuple[str, ...]:
    """The sites of :func:`grouped_sites`, for any number of parameters, from a few derivatives of the rows for each."""
    values, blocks = objective.unravel(objective.position), objective.blocks()
    latents = jax.eval_shape(objective.prior_terms, values)
    grouped = {k: g for k in values if k in latents and (g := row_groups(objective, k)) is not None}
    if not grouped:
        return ()
    directions = np.stack([np.isin(np.arange(len(objective.position)), block) for block in blocks.values()])
    enters = fetch(rows_along(objective, jnp.asarray(directions, objective.position.dtype))).T != 0
    return tuple(
        k
        for k, g in grouped.items()
        if any(
            len(np.unique(g[rows & (g >= 0)])) > 1 and (b not in grouped or not _finer(grouped[b], g))
            for b, rows in zip(blocks, enters, strict=True)
            if b != k
        )
    )


def _finer(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether all rows of a group of `a` are of one group of `b`."""
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a))


@shared_jit
def rows_along(objective: Objective, directions: Float[Array, "k p"]) -> Float[Array, "n k"]:
    """Derivatives of the rows' weighted losses along directions."""

    def derivative(direction: Array) -> Array:
        return jax.jvp(objective.rows, (objective.position,), (direction,))[1]

    return jax.lax.map(derivative, directions, batch_size=8).T


def _spread_depends_on(terms: Terms, values: dict[str, Any], name: str) -> str | None:
    """Another site with which the curvature of a latent site's prior varies."""

    def curvature(values: dict[str, Any]) -> Any:
        def slope(own: Any) -> Any:
            return jax.grad(lambda v: terms({**values, name: v})[name])(own)

        ones = jax.tree.map(jnp.ones_like, values[name])
        return jax.tree.leaves(jax.jvp(slope, (values[name],), (ones,))[1])

    jaxpr = jax.make_jaxpr(curvature)(values).jaxpr
    sites = [k for k in sorted(values) for _ in jax.tree.leaves(values[k])]  # of each input
    others = (k for k in sorted(values) if k != name)
    return next((k for k in others if any(varying_outputs(jaxpr, [k == s for s in sites]))), None)


def refuse_products(objective: Objective, gradients: np.ndarray) -> None:
    """Raises SandwichError where the losses see two sites by their product alone, as a non-centred hierarchy's."""
    position = np.asarray(objective.position, np.float64)
    real = {k for k, t in objective.transforms.items() if isinstance(_innermost(t), IdentityTransform)}
    pairs = scale_pairs(gradients, position, objective.blocks(), real)
    if not pairs:
        return
    rows = _rows(objective, objective.position)
    for scale, name, moved in pairs:
        new = _rows(objective, jnp.asarray(moved, objective.position.dtype))
        if bool(jnp.all(jnp.abs(new - rows) <= 1e4 * jnp.finfo(rows.dtype).eps * jnp.max(jnp.abs(rows)))):
            raise SandwichError(
                f"The losses see sites '{scale}' and '{name}' by their product alone, as of a non-centred prior, so "
                "that the spread of rows is not that of each: declare the product itself with a prior that has "
                f"'{scale}' as its scale. {USE_NUTS}"
            )


_rows = shared_jit(Objective.rows)


def _innermost(transform: Any) -> Any:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


@partial(shared_jit, static_argnames=("names",))
def between(objective: Objective, *, names: tuple[str, ...]) -> Array:
    """The Hessian of some terms of the prior, (P, P)."""
    gradient = jax.grad(partial(sum_of_terms, objective, names))

    def along(direction: Array) -> Array:
        return jax.jvp(gradient, (objective.position,), (direction,))[1]

    hessian = jax.lax.map(along, jnp.eye(len(objective.position)), batch_size=8)
    return 0.5 * (hessian + hessian.T)


def sum_of_terms(objective: Objective, names: tuple[str, ...], vector: Array) -> Array:
    """Some terms of the prior, of one unconstrained vector."""
    terms = objective.prior_terms(objective.unravel(vector))
    return sum((terms[k] for k in names), start=jnp.zeros(()))
