"""Whether a density decays: what is certain of its tails is refused, what is suspected is said."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.energy import Energy, plural
from numpyro_score.normaliser.coordinates import free_log_density, from_free, to_free
from numpyro_score.operators import full_precision

__all__ = ["check_counts", "check_tails"]

_NEAR = (30.0, 100.0, 300.0, 1e3, 3e3)  # scales of the data
_RADII = np.concatenate([_NEAR, np.logspace(4, 36, 17)])  # as far as single precision goes
_LEAST = 1e6  # a ray that floats do not follow to here proves nothing
_DEPTH = 20.0  # nats: what is further below the density at the data carries no mass
_SHIFTS = 8  # neighbours of a ray
_WIDTH = 0.1  # of the neighbourhood: scales of a tube, radians of a cone
_RAYS = 16  # of one compiled call


class Tails(NamedTuple):
    """What is seen along rays; each (..., ray)."""

    improper: Bool[Array, "... ray"]  # mass does not fall as far as floats go
    suspect: Bool[Array, "... ray"]  # nor between 30 and 3,000 scales, and it is not small there


class Place(NamedTuple):
    """Where the data are, in free coordinates."""

    centre: Float[Array, "p"]
    scale: Float[Array, "p"]
    rows: Float[Array, "m p"]


def check_counts(energy: Energy) -> None:
    """Refuses a law of counts whose probabilities do not fall like 1/x, or faster, from 10³ to 10⁶.

    Along each count, with the others as in the first row that has a weight. It proves no density proper, nor another
    improper: a law that falls from beyond 10⁶ on is refused as well.

    Raises:
        ValueError: for such a law.
    """
    if not any(a.support.kind == "counts" for a in energy.arrays):
        return
    x = energy.usable()[0].data[:1]
    _, high = energy.bounds(energy.num_rows)
    columns = np.flatnonzero(np.isinf(np.asarray(high[0])))
    far = jnp.stack([x[0].at[d].set(v) for v in (1e3, 1e6) for d in columns])
    values = energy.log_density(far) if energy.resizable else energy.log_density(far[:, None])[:, 0]
    near, beyond = np.split(np.asarray(values, np.float64), 2)
    grows = ~(beyond - near < -np.log(1e3)) & ~np.isneginf(beyond)
    if grows.any():
        d = int(columns[np.argmax(grows)])
        name = next(a.name for a, b in zip(energy.arrays, energy.blocks, strict=True) if b.start <= d < b.stop)
        raise ValueError(
            f"The log density of counts '{name}' goes from {near[grows][0]:.4g} at 1e3 to {beyond[grows][0]:.4g} at "
            "1e6, so that it has no normaliser at these parameters: add a term that confines it, such as "
            "-gammaln(x + 1)."
        )


def check_tails(energy: Energy, u: Float[np.ndarray, "n p"], draws: dict[str, Any] | None = None) -> None:
    r"""Refuses a density whose mass does not fall along a tube or a cone, and warns of one that may be so.

    With P free coordinates, ∫ exp f is infinite if r exp f(c + δ + r v) does not fall in r for all δ of a small ball
    (a tube of lines), or r^P exp f(c + r(v + δ)) does not (a cone). Tubes and cones around the axes and the principal
    directions of curvature at the centre of the data, both ways, are followed by eight neighbours each to 10³⁶ times
    the scale of the data, or to where floats or the support end. One line alone says nothing: along x₁ the funnel
    −½x₀² − ½x₁² exp(−x₀) grows by thousands of nats if x₀ grows as well, until x₀² ends it.

    Growth to the end of floats is refused. Growth from 30 to 3,000 scales, to values that are within 20 nats of those
    at the data, is suspicious. Neither proves a density proper. Nothing is seen of bounded supports and spheres.

    Args:
        energy: one density for all rows.
        u: the data's free coordinates.
        draws: {site: (S, ...)}, parameters at each of which the density is checked.

    Raises:
        ValueError: as said; at which draw.

    Warns:
        UserWarning: as said; at how many draws.
    """
    scale = u.std(0)
    rows = u[np.linspace(0, len(u) - 1, 32).astype(int)]  # rows repeat where there are few
    place = Place(*(jnp.asarray(v, energy.dtype) for v in (u.mean(0), np.where(scale > 0, scale, 1.0), rows)))
    if draws is None:
        at, seen = [energy], np.asarray(_screen(energy, place))[None]
    else:
        seen = np.asarray(_screen_draws(energy, draws, place))
    suspects = []
    for s in np.flatnonzero(seen.any(-1)):
        one = at[s] if draws is None else energy.with_params(jax.tree.map(lambda v, s=s: v[s], draws))
        tails = _follow(one, place, np.flatnonzero(seen[s]))
        if jnp.any(tails.improper):
            raise ValueError(
                ("" if draws is None else f"At draw {s} of the parameters: ")
                + "The density is not normalisable, or its tails are too heavy for floats: around some line its mass "
                f"does not fall from 100 times the scale of the data to {_RADII[-1]:.0e} times, or where floats end."
            )
        if jnp.any(tails.suspect):
            suspects.append(s)
    if suspects:
        draw = "" if draws is None else f"At {plural(len(suspects), 'draw')} of {len(seen)} (first: {suspects[0]}): "
        warnings.warn(
            f"{draw}The density may not be normalisable, or its mass lies far from the data: around some line it does "
            "not fall from 30 to 3,000 times the scale of the data. Look at the factor there; if it is right, give the "
            "energy rows from where its mass is.",
            stacklevel=4,
        )


def _directions(energy: Energy, place: Place) -> Float[Array, "ray p"]:
    """The axes and the principal directions of curvature at the centre, in units of the scales, both ways."""
    centre, scale, _ = place
    _, q = jnp.linalg.eigh(jax.hessian(lambda w: free_log_density(energy, centre + scale * w))(jnp.zeros_like(centre)))
    v = jnp.concatenate([jnp.eye(len(centre), dtype=centre.dtype), q.T])
    return jnp.concatenate([v, -v])


@jax.jit
@full_precision
def _screen(energy: Energy, place: Place) -> Bool[Array, "ray"]:
    """Rays worth a second look: their own line does not fall as fast as a proper cone would."""
    found = _tails(energy, place, jnp.zeros_like(place.centre), _directions(energy, place), len(place.centre))
    return found.improper | found.suspect


@jax.jit
@full_precision
def _screen_draws(energy: Energy, draws: dict[str, Any], place: Place) -> Bool[Array, "s ray"]:
    return jax.lax.map(lambda theta: _screen(energy.with_params(theta), place), draws)


def _follow(energy: Energy, place: Place, rays: Int[np.ndarray, "k"]) -> Tails:
    """:func:`_neighbours`, some rays at a time."""
    parts = (np.resize(rays[i : i + _RAYS], _RAYS) for i in range(0, len(rays), _RAYS))
    found = [_neighbours(energy, place, jnp.asarray(part)) for part in parts]
    return jax.tree.map(lambda *part: jnp.concatenate(part), *found)


@jax.jit
@full_precision
def _neighbours(energy: Energy, place: Place, rays: Int[Array, "k"]) -> Tails:
    """Of each ray, whether all of its tube or all of its cone agree."""
    p = len(place.centre)
    v = _directions(energy, place)[rays]
    shifts = _WIDTH * jax.random.normal(jax.random.key(0), (_SHIFTS, 1, p), v.dtype)
    tube = _tails(energy, place, shifts, v, 1)
    cone = _tails(energy, place, jnp.zeros_like(shifts), v + shifts / p**0.5, p)
    return jax.tree.map(lambda a, b: a.all(0) | b.all(0), tube, cone)


def _tails(energy: Energy, place: Place, shift: Float[Array, "... p"], v: Float[Array, "... p"], power: int) -> Tails:
    """Of f along c + δ + r v, in units of the scales: whether r^power exp f does not fall."""
    radii = jnp.asarray(_RADII, v.dtype)
    u = place.centre + place.scale * (shift[..., None, :] + radii[:, None] * v[..., None, :])  # (..., radius, p)
    x, log_jacobian = from_free(energy, u)
    f = energy.log_density(x) + log_jacobian
    # Nothing is known where the data are at a bound, as far as floats can tell, nor where f overflows.
    back = to_free(energy, jax.lax.optimization_barrier(x))
    known = jnp.all(jnp.abs(back - u) <= 0.01 * (1 + jnp.abs(u)), axis=-1) & ~jnp.isnan(f) & (f != -jnp.inf)
    pairs = known[..., 1:] & known[..., :-1]
    finite = jnp.clip(f, -1e37, 1e37)
    steps = jnp.diff(jnp.log(radii))
    rounding = jnp.minimum(2 * jnp.finfo(f.dtype).eps * jnp.abs(finite[..., 1:]), 0.1)
    # Mass per unit of log r, up to what the precision can tell from r^(-1.001): constant is infinite mass, too.
    grows = jnp.diff(finite) + power * steps >= -1e-3 * steps - rounding
    near = len(_NEAR)
    reached = jnp.any(known[..., np.searchsorted(_RADII, _LEAST) :], axis=-1) & (jnp.sum(pairs[..., 1:], axis=-1) >= 4)
    far = reached & jnp.all(grows[..., 1:] | ~pairs[..., 1:], axis=-1)
    highest = jnp.max(free_log_density(energy, place.rows))
    large = jnp.all(f[..., :near] >= highest - _DEPTH, axis=-1)
    return Tails(far, large & jnp.all(grows[..., : near - 1] & known[..., 1:near], axis=-1))
