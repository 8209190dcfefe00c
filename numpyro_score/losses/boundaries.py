"""Whether score matching is right at the boundary of the data: what its weight there, and the data, must be like.

By parts, E_p[½ h‖∇f‖² + div(h ∇f)] is the divergence that is minimised up to a constant, if h p ∂f vanishes at the
boundary [Hyvärinen 2007].
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats

from numpyro_score.energy import (
    BoundaryWeight,
    Energy,
    RowWeight,
    capped_distance,
    distances_to_boundary,
    order_of_weight,
    slopes_of_domains,
    weight_at_boundary,
)
from numpyro_score.placement import fetch
from numpyro_score.programs import run_compiled

__all__ = ["check_boundary", "check_boundary_weight"]


def check_boundary_weight(owner: str, weight: BoundaryWeight | None) -> None:
    """Raises unless `weight` is None or vanishes at the boundary, which is what makes the normaliser drop out."""
    if weight is None or (isinstance(weight, RowWeight) and callable(weight.h)):
        return
    if not callable(weight):
        raise TypeError(
            f"{owner} needs a boundary_weight that is a RowWeight or a function of distances, got {weight!r}."
        )
    with jax.ensure_compile_time_eval():
        distance = jnp.array([0.0, 1.0])
        try:
            h, _ = jax.jvp(weight, (distance,), (jnp.ones(2),))
        except jax.errors.TracerArrayConversionError as error:
            raise TypeError(f"{owner}'s boundary_weight cannot be traced by JAX: write it with jax.numpy.") from error
        if jnp.shape(h) != (2,):
            raise ValueError(
                f"{owner}'s boundary_weight gave shape {jnp.shape(h)} for distances of shape (2,): return one number "
                "for each."
            )
        if not (abs(h[0]) < 1e-6 and 0 < h[1] < math.inf):
            raise ValueError(
                f"{owner}'s boundary_weight is {h[0]:g} at distance 0 and {h[1]:g} at 1: it must be zero at the "
                "boundary and positive inside, e.g. lambda distance: jnp.minimum(distance, 1.0)."
            )


def check_boundary(owner: str, energy: Energy, weight: BoundaryWeight | None) -> None:
    """Looks at an energy's data before a loss with a boundary weight is fitted.

    Raises:
        ValueError: for a `RowWeight` that does not vanish where rows are moved to the boundary, and for a `Domain` one
            of whose functions has no slope at any row, as those have that only tell inside from outside.

    Warns:
        UserWarning: if the density of the data has a pole at the boundary that the weight is too large for.
    """
    if energy.flat:
        return
    usable, weights = energy.usable()
    rows = _spread(np.flatnonzero(fetch(weights) != 0), _MANY)
    seen = tuple(v[rows] for v in (usable.data, *energy.bounds(usable.num_rows)))
    _check_domains(energy, seen[0])
    if isinstance(weight, RowWeight):
        few = _spread(np.arange(len(rows)), _LOOKED_AT)
        _check_row_weight(owner, energy, weight, tuple(v[few] for v in seen))
    _warn_of_poles(owner, energy, weight, seen)


Seen = tuple[Array, ...]
"""Rows, and their lower and upper bounds."""


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[:: -(-len(rows) // most)]


def _check_domains(energy: Energy, x: Array) -> None:
    sites = [(a.name, b, s) for a, b, s in zip(energy.arrays, energy.blocks, energy.supports.values(), strict=True)]
    if not any(b.kind == "domain" for _, b, _ in sites):
        return
    for name, slopes in fetch(run_compiled(partial(slopes_of_domains, sites), x)).items():
        if (flat := np.flatnonzero(slopes == 0)).size:
            raise ValueError(
                f"Function {flat[0]} of the Domain of site '{name}' is constant around every row, as one that only "
                "tells inside from outside: it must fall to zero towards the boundary, like the distance, e.g. "
                "Domain(lambda x: 1 - jnp.linalg.norm(x, axis=-1))."
            )


def _check_row_weight(owner: str, energy: Energy, weight: RowWeight, seen: Seen) -> None:
    looked = partial(weight_at_boundary, energy.blocks, tuple(energy.supports.values()), weight)
    highest, mean = fetch(run_compiled(looked, *seen))
    if not highest <= _VANISHES * mean:
        raise ValueError(
            f"{owner}'s RowWeight is {highest:.3g} at the boundary and {mean:.3g} at the data, on average: it must be "
            "zero wherever one of the distances is, e.g. RowWeight(lambda d, x: jnp.minimum(d, 1).prod(-1))."
        )


_LOOKED_AT = 64  # rows
_VANISHES = 1e-2  # of the mean weight of the data; rows are moved to the boundary within a ten thousandth
_MANY = 2**16


def _warn_of_poles(owner: str, energy: Energy, weight: BoundaryWeight | None, seen: Seen) -> None:
    """Warns if h ~ d^q, where d is the distance, and a density p ~ d^(κ−1) of κ + q < 2 is plain from the data.

    There h p ∂f ~ d^(q+κ−2) goes to infinity. Of the m smallest of N distances d, Σ log(d_m / d_i) is Gamma distributed
    with shape m and rate κ [Hill 1975]. A law that is narrow and wide in turn may seem to have a pole down to where it
    is flat, so that few distances must say the same as many.
    """
    x, blocks, supports = seen[0], energy.blocks, tuple(energy.supports.values())
    d = np.asarray(fetch(run_compiled(partial(distances_to_boundary, blocks, supports), *seen)), float)
    weight = capped_distance if weight is None else weight
    for k in range(d.shape[1]):
        inside = (d[:, k] > 0) & np.isfinite(d[:, k])
        order = np.flatnonzero(inside)[np.argsort(d[inside, k])]
        many, few = int(len(order) ** (2 / 3)), int(len(order) ** 0.5)
        if few < _FEWEST:
            continue
        hill = {m: float(np.log(d[order[m], k] / d[order[:m], k]).sum()) for m in (many, few)}
        if hill[many] < many:
            continue
        row = order[0]
        q = float(order_of_weight(weight, jnp.asarray(d[row], x.dtype), x[row], k))
        if isinstance(weight, RowWeight) and q < _UNTOLD:
            continue  # a function of the points, whose distances do not tell how it falls
        if q >= 2 or not (
            stats.gamma.sf((2 - q) * hill[many], many) < _SIGNIFICANT / d.shape[1]
            and stats.gamma.sf((2 - q) * hill[few], few) < _CONSISTENT
        ):
            continue
        power = many / hill[many]
        warnings.warn(
            f"The data crowd at the boundary of their support{_which(energy, k, d.shape[1])}: their density grows "
            f"towards it, about as the distance to the power {power - 1:.2g} ± {power / many**0.5:.1g}. For such a "
            f"pole the boundary_weight of {owner} must fall faster than the power {q:.2g} of the distance, or "
            "estimates go to a density without it, with errors that are too small: write "
            f"{owner}(boundary_weight=lambda distance: jnp.minimum(distance, 1.0) ** 2).",
            stacklevel=2,
        )
        return


def _which(energy: Energy, k: int, num: int) -> str:
    names = energy.column_names
    return f" in {names[k]!r}" if num == len(names) and num > 1 else ""


_FEWEST = 10  # distances, of 100 rows
_SIGNIFICANT = 1e-3  # over all distances
_CONSISTENT = 0.05
_UNTOLD = 0.1
