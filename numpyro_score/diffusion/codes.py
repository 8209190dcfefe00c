"""Latent codes: the data where the probability flow has made them standard normal."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.diffusion.flow import (
    Flow,
    Settings,
    prepared,
    require_finite,
    require_solved,
    solve,
)
from numpyro_score.diffusion.sde import SDE, VP, noise_at
from numpyro_score.diffusion.source import as_data
from numpyro_score.energy import check_rows
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.source import Source

__all__ = ["decoded", "flow_decode", "flow_encode", "flow_interpolate"]


def flow_encode(
    source: Source,
    x: Any,
    *,
    sde: SDE = VP(),  # noqa: B008
    noise_range: tuple[float, float] | None = None,
    solver: str = "dopri8",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Float[Array, "n d"]:
    """The latent codes of rows of data: where the probability flow takes them, in units in which that is N(0, I).

    The inverse of :func:`flow_decode`. Data of the model have independent standard normal codes; a row that is far out
    there is unlike them.

    Args:
        source: as in :func:`~numpyro_score.flow_log_prob`.
        x: rows as the data site takes them.
        sde: the diffusion.
        noise_range: the smallest and largest noise level.
        solver: the solver's name.
        rtol: its relative tolerance.
        atol: its absolute tolerance.

    Returns:
        z, (N, D).

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`~numpyro_score.flow_log_prob`.

    Warns:
        UserWarning: likewise.
    """
    flow, settings = prepared("flow_encode", source, sde, noise_range, solver, rtol, atol, "recursive")
    return _encode("flow_encode", settings, flow, x)


def flow_decode(
    source: Source,
    z: Float[Array, "n d"],
    *,
    sde: SDE = VP(),  # noqa: B008
    noise_range: tuple[float, float] | None = None,
    solver: str = "dopri8",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Any:
    """Data from latent codes, by the probability flow backwards: of standard normal codes, draws of the model.

    The data have the smallest noise in them, as the density of :func:`~numpyro_score.flow_log_prob` has.

    Args:
        source: as in :func:`~numpyro_score.flow_log_prob`.
        z: codes, (N, D), as :func:`flow_encode` gives.
        sde: the diffusion.
        noise_range: the smallest and largest noise level.
        solver: the solver's name.
        rtol: its relative tolerance.
        atol: its absolute tolerance.

    Returns:
        Rows as the data site has them; for several sites {site: rows}.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`~numpyro_score.flow_log_prob`.

    Warns:
        UserWarning: likewise.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, flow_decode, flow_encode
        >>> def model(x, sigma=1.0):  # N(0, 4) with noise
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (4 + sigma**2))
        >>> energy = Energy(model, {}, jnp.array([-2.0, 2.0]))
        >>> z = flow_encode(energy, jnp.array([-1.0, 3.0]), noise_range=(0.001, 100.0))
        >>> bool(jnp.allclose(z[:, 0], jnp.array([-0.5, 1.5]), atol=1e-3))
        True
        >>> bool(jnp.allclose(flow_decode(energy, z, noise_range=(0.001, 100.0)), jnp.array([-1.0, 3.0]), atol=1e-3))
        True
    """
    flow, settings = prepared("flow_decode", source, sde, noise_range, solver, rtol, atol, "recursive")
    check_rows("z", z)
    z = jnp.asarray(z, flow.model.dtype)
    if z.ndim != 2 or z.shape[1] != flow.model.dim:
        raise ValueError(f"flow_decode got codes of shape {z.shape}: pass (n, {flow.model.dim}), one row for each.")
    return _decode("flow_decode", settings, flow, z)


def flow_interpolate(
    source: Source,
    first: Any,
    last: Any,
    num: int,
    *,
    sde: SDE = VP(),  # noqa: B008
    noise_range: tuple[float, float] | None = None,
    solver: str = "dopri8",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Any:
    """Data between two rows, along the great circle between their latent codes [Shoemake 1985].

    Codes of D independent normal numbers lie near a sphere of radius √D, where a straight line between two leaves it:
    its middle would be unlike any draw. The radius goes from that of one code to that of the other. Where the codes are
    opposite, all great circles are as short, and one of them is taken; in one dimension there is none, and the way is
    straight.

    Args:
        source: as in :func:`~numpyro_score.flow_log_prob`.
        first: one event, as the data site takes it, without the axis of rows.
        last: another.
        num: how many, the two included.
        sde: the diffusion.
        noise_range: the smallest and largest noise level.
        solver: the solver's name.
        rtol: its relative tolerance.
        atol: its absolute tolerance.

    Returns:
        Rows as the data site has them, `num` of them.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`~numpyro_score.flow_log_prob`.
    """
    num = at_least_one("flow_interpolate", "num", num)
    for name, value in {"first": first, "last": last}.items():
        check_rows(name, value)
    if _shapes(first) != _shapes(last):
        raise ValueError(
            f"flow_interpolate got rows of shapes {_shapes(first)} and {_shapes(last)}: pass two events of one shape."
        )
    flow, settings = prepared("flow_interpolate", source, sde, noise_range, solver, rtol, atol, "recursive")
    ends = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), first, last)
    a, b = _encode("flow_interpolate", settings, flow, ends)
    return _decode("flow_interpolate", settings, flow, great_circle(a, b, jnp.linspace(0.0, 1.0, num, dtype=a.dtype)))


def _shapes(event: Any) -> Any:
    return jax.tree.map(jnp.shape, event)


def great_circle(a: Float[Array, "d"], b: Float[Array, "d"], share: Float[Array, "n"]) -> Float[Array, "n d"]:
    """Points between two codes at shares of the angle, at radii between theirs; a straight line in one dimension."""
    share = share[:, None]
    if len(a) == 1:
        return (1 - share) * a + share * b
    sizes = jnp.linalg.norm(a), jnp.linalg.norm(b)
    # A code at the centre has any direction.
    from_, to = (v / jnp.where(s > 0, s, 1.0) for v, s in zip((a, b), sizes, strict=True))
    from_, to = jnp.where(sizes[0] > 0, from_, to), jnp.where(sizes[1] > 0, to, from_)
    # Which way to turn: across `from_`, made so twice, as little is left of opposite codes. An axis where nothing is.
    across = _across(to, from_)
    axis = _across(jnp.eye(len(a), dtype=a.dtype)[jnp.argmin(jnp.abs(from_))], from_)
    left = jnp.linalg.norm(across)
    turn = _across(jnp.where(left > 8 * jnp.finfo(a.dtype).eps, across, axis), from_)
    turn /= jnp.linalg.norm(turn)
    angle = share * jnp.arctan2(left, jnp.dot(from_, to))
    return ((1 - share) * sizes[0] + share * sizes[1]) * (jnp.cos(angle) * from_ + jnp.sin(angle) * turn)


def _across(v: Float[Array, "d"], unit: Float[Array, "d"]) -> Float[Array, "d"]:
    return v - jnp.dot(v, unit) * unit


def _encode(owner: str, settings: Settings, flow: Flow, x: Any) -> Float[Array, "n d"]:
    rows = flow.model.energy.flatten(x)
    require_finite(owner, rows)
    z, arrived = _encoded(settings, flow, rows)
    require_solved(owner, arrived)
    return z


def _decode(owner: str, settings: Settings, flow: Flow, z: Float[Array, "n d"]) -> Any:
    require_finite(owner, z)
    values, arrived = decoded(settings, flow, z)
    require_solved(owner, arrived)
    return values


@partial(jax.jit, static_argnums=0)
def _encoded(settings: Settings, flow: Flow, x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Bool[Array, "n"]]:
    u, _, _, arrived = solve(settings, flow, x, density=False)
    z = flow.end.code(u, noise_at(settings.sde, flow.final_time))
    return jnp.where(arrived[:, None], z, jnp.nan), arrived


@partial(jax.jit, static_argnums=0)
def decoded(settings: Settings, flow: Flow, z: Float[Array, "n d"]) -> tuple[Any, Bool[Array, "n"]]:
    """Data from codes, and which of them arrived; NaN for others."""
    u = flow.end.from_code(z, noise_at(settings.sde, flow.final_time))
    x, _, _, arrived = solve(settings, flow, u, backwards=True, density=False)
    x = jnp.where(arrived[:, None], x, jnp.nan)
    return jax.vmap(partial(as_data, flow.model.energy))(x), arrived
