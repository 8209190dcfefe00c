"""Sums of a kernel over all pairs of rows, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import AnyArray

__all__ = ["PairSums", "median_distance", "pair_sums"]

_ENTRIES = 2**22  # numbers held at once


class PairSums(NamedTuple):
    """Sums over the second argument of a kernel, for each row of the first."""

    values: Float[Array, "n"]  # Σ_j k(a_i, b_j)
    squares: Float[Array, "n"]  # Σ_j k(a_i, b_j)²
    signed: Any  # (N, B), Σ_j k(a_i, b_j) ε_jb, where signs are given


def pair_sums(
    kernel: Callable[..., Array],
    a: tuple[Float[Array, "n ..."], ...],
    b: tuple[Float[Array, "m ..."], ...],
    signs: Float[Array, "m b"] | None = None,
    *,
    distinct: bool = False,
) -> PairSums:
    """Sums of `kernel(row of a, all rows of b)`, (M,), over the rows of b, without the N × M matrix.

    Args:
        kernel: from a tuple of rows (D,) and one of (M, D), or what the arrays have, to (M,).
        a: arrays with the rows first, the first of them (N, D).
        b: likewise, (M, D).
        signs: ε (M, B); none if not given.
        distinct: leave out the pairs i = j.
    """
    (n, d), m = a[0].shape, len(b[0])

    def one(of_row: tuple[Array, tuple[Array, ...]]) -> PairSums:
        i, row = of_row
        values = kernel(row, b)
        if distinct:
            values = jnp.where(jnp.arange(m) == i, 0.0, values)
        return PairSums(values.sum(), jnp.sum(values**2), None if signs is None else values @ signs)

    return jax.lax.map(one, (jnp.arange(n), a), batch_size=max(min(_ENTRIES // (m * d), n), 1))


@partial(jax.jit, static_argnames="most")
def median_distance(x: Float[AnyArray, "n d"], most: int = 500) -> Float[Array, ""]:
    """The median distance between rows (N, D), of about `most` that are evenly spaced in the order given.

    What :func:`~numpyro_score.mmd` and :func:`~numpyro_score.kernel_stein_discrepancy` take for their bandwidth.
    """
    x = x[:: -(-len(x) // most)]
    i, j = jnp.triu_indices(len(x), 1)
    return jnp.median(jnp.linalg.norm(x[i] - x[j], axis=-1))
