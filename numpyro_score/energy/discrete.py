"""What takes the place of the score where data are discrete: ratios of the density at neighbouring points.

A neighbour of a row differs from it in one number. As the score does, log p(x') − log p(x) = f(x') − f(x) needs no
normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.energy.energy import Energy
from numpyro_score.energy.relaxation import bare, relaxed

__all__ = ["evaluations", "lattice_density", "log_ratios", "num_values", "part"]

_NUMBERS = 2**22  # that an operation of the density may give at once: 16 MB in float32


def part(energy: Energy, *, discrete: bool) -> Energy:
    """The density of the discrete or of the continuous numbers of each row given the others, which stay as they are."""
    energy = energy.at(energy.data)  # those of a minibatch, whose plate would else take rows of the others anew
    layout = energy._layout
    arrays = tuple(a for a in layout.arrays if a.support.is_discrete == discrete)
    return energy._replace(_layout=layout._replace(arrays=arrays, resizable=False, quadratic=False))


def num_values(energy: Energy) -> int | None:
    """The most values that a discrete number of a row takes; None if there is no largest one, or it is not known."""
    sizes = [a.support.size for a in energy.arrays if a.support.is_discrete]
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def lattice_density(energy: Energy) -> Callable[[Array], Array]:
    """The log density of rows inside of the support, (..., D) to (...), with the slope of :func:`relaxed`.

    Where the model does not take real numbers, because it indexes by its data, the slope is zero.
    """
    exact, smooth = bare(energy), relaxed(energy)
    if all(a.support.dtype is None for a in energy.arrays):
        return exact.log_density
    try:
        jax.eval_shape(smooth.log_density, energy.data)
    except (TypeError, IndexError):
        return exact.log_density

    def log_density(x: Array) -> Array:
        guide = smooth.log_density(x)
        return exact.log_density(x) + (guide - jax.lax.stop_gradient(guide))

    return log_density


def evaluations(energy: Energy, num_shifts: int) -> int:
    """Evaluations of the log density that :func:`log_ratios` of so many shifts takes for each row."""
    return 3 if energy.is_quadratic else 1 + num_shifts * len(energy.discrete_columns)


def log_ratios(
    energy: Energy, shifts: Sequence[int], *, cycle: bool, top: int | None = None
) -> tuple[Float[Array, "n k s"], Bool[Array, "n k s"]]:
    """The ratios log p(x') − log p(x) of each row x of the data, where x' has x_d + s in the place of x_d, (N, K, S).

    K numbers of a row are discrete. Also which x' are other points of the support, (N, K, S): the ratios of those that
    are not are 0, and NaN where x is none itself. Missing cells have no other points. Costs 1 + K S densities; one
    gradient where the density is a quadratic of the discrete numbers, as f(x') − f(x) = s ∂_d f + ½ s² ∂²_dd f with
    second derivatives that all rows share.

    Args:
        energy: at its data.
        shifts: s.
        cycle: whether the largest value is followed by the least.
        top: the largest value, where the support has none, or a larger one.
    """
    x, columns, shift = energy.data, energy.discrete_columns, jnp.asarray(shifts, energy.dtype)
    lower, upper = (bound[:, columns, None] for bound in energy.bounds(len(x)))
    if top is not None:
        upper = jnp.minimum(upper, top)
    here = x[:, columns, None]
    inside = (here >= lower) & (here <= upper) & (here == jnp.round(here))
    there = here + shift
    if cycle:
        size = upper - lower + 1
        there, valid = lower + jnp.mod(there - lower, size), jnp.abs(shift) < size
    else:
        valid = (there >= lower) & (there <= upper)
    if energy.missing is not None:
        valid &= ~energy.missing[:, columns, None]
    steps = jnp.where(valid, there - here, 0.0)
    ratios = (_by_derivatives if energy.is_quadratic else _by_values)(energy, x, columns, steps)
    return jnp.where(inside, ratios, jnp.nan), valid


def _by_values(energy: Energy, x: Array, columns: np.ndarray, steps: Array) -> Array:
    """f(x + step) − f(x) for each of the steps (N, K, S) in one column, all at once or in chunks."""
    n, k, s = steps.shape
    pairs = k * s
    at = jnp.asarray(np.repeat(columns, s))
    steps = jnp.moveaxis(steps.reshape(n, pairs), 1, 0)
    energy = bare(energy)
    value = energy.log_density(x)

    def differences(steps: Array, at: Array) -> Array:
        moved = x + steps[..., None] * (jnp.arange(x.shape[1]) == at[:, None, None])
        return energy.log_density(moved) - value

    chunk = max(_NUMBERS // (n * max(energy.width, energy.dim)), 1)
    if chunk >= pairs:
        found = differences(steps, at)
    else:
        num = -(-pairs // chunk)
        chunk = -(-pairs // num)
        pad = num * chunk - pairs
        parts = jnp.pad(steps, ((0, pad), (0, 0))).reshape(num, chunk, n), jnp.pad(at, (0, pad)).reshape(num, chunk)
        # Of each chunk the gradient keeps its steps alone, and works the densities out again.
        found = jax.lax.map(jax.checkpoint(lambda p: differences(*p)), parts).reshape(-1, n)[:pairs]
    return jnp.moveaxis(found, 0, 1).reshape(n, k, s)


def _by_derivatives(energy: Energy, x: Array, columns: np.ndarray, steps: Array) -> Array:
    smooth = relaxed(energy)

    def slope(x: Array) -> Array:
        return jax.grad(lambda x: smooth.row_log_density(x).sum())(x)

    def curvature(direction: Array) -> Array:  # of one row, as of all
        return jnp.vdot(direction, jax.jvp(slope, (x[:1],), (direction[None],))[1][0])

    directions = jnp.eye(x.shape[1], dtype=x.dtype)[columns]
    chunk = max(_NUMBERS // max(energy.width, energy.dim), 1)
    curvatures = jax.lax.map(curvature, directions, batch_size=min(chunk, len(columns)))
    return steps * slope(x)[:, columns, None] + 0.5 * steps**2 * curvatures[:, None]
