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
    rows = flow.model.energy.flatten(x)
    require_finite("flow_encode", rows)
    z, arrived = _encoded(settings, flow, rows)
    require_solved("flow_encode", arrived)
    return z


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
    z = jnp.asarray(z, flow.model.dtype)
    if z.ndim != 2 or z.shape[1] != flow.model.dim:
        raise ValueError(f"flow_decode got codes of shape {z.shape}: pass (n, {flow.model.dim}), one row for each.")
    require_finite("flow_decode", z)
    values, arrived = decoded(settings, flow, z)
    require_solved("flow_decode", arrived)
    return values


def flow_interpolate(source: Source, first: Any, last: Any, num: int, **options: Any) -> Any:
    """Data between two rows, along the great circle between their latent codes [Shoemake 1985].

    Codes of D independent normal numbers lie near a sphere of radius √D, where a straight line between two leaves it:
    its middle would be unlike any draw. The radius goes from that of one code to that of the other.

    Args:
        source: as in :func:`~numpyro_score.flow_log_prob`.
        first: one event, as the data site takes it, without the axis of rows.
        last: another.
        num: how many, the two included.
        **options: of :func:`flow_decode`.

    Returns:
        Rows as the data site has them, `num` of them.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`~numpyro_score.flow_log_prob`.
    """
    at_least_one("flow_interpolate", "num", num)
    ends = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), first, last)
    a, b = flow_encode(source, ends, **options)
    share = jnp.linspace(0.0, 1.0, num, dtype=a.dtype)[:, None]
    sizes = jnp.linalg.norm(a), jnp.linalg.norm(b)
    angle = jnp.arccos(jnp.clip(jnp.dot(a, b) / (sizes[0] * sizes[1]), -1.0, 1.0))
    # As sin(s·angle)/sin(angle), also where the angle is nothing.
    weights = [jnp.sinc(s * angle / jnp.pi) * s / jnp.sinc(angle / jnp.pi) for s in (1 - share, share)]
    direction = weights[0] * a / sizes[0] + weights[1] * b / sizes[1]
    return flow_decode(source, ((1 - share) * sizes[0] + share * sizes[1]) * direction, **options)


def _units(settings: Settings, flow: Flow) -> Float[Array, "d"]:
    """The standard deviations of the law at the end along its axes."""
    return jnp.sqrt(flow.end.variances + noise_at(settings.sde, flow.final_time) ** 2)


@partial(jax.jit, static_argnums=0)
def _encoded(settings: Settings, flow: Flow, x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Bool[Array, "n"]]:
    u, _, _, arrived = solve(settings, flow, x, density=False)
    z = ((u - flow.end.mean) @ flow.end.axes) / _units(settings, flow)
    return jnp.where(arrived[:, None], z, jnp.nan), arrived


@partial(jax.jit, static_argnums=0)
def decoded(settings: Settings, flow: Flow, z: Float[Array, "n d"]) -> tuple[Any, Bool[Array, "n"]]:
    """Data from codes, and which of them arrived; NaN for others."""
    u = flow.end.mean + (_units(settings, flow) * z) @ flow.end.axes.T
    x, _, _, arrived = solve(settings, flow, u, backwards=True, density=False)
    x = jnp.where(arrived[:, None], x, jnp.nan)
    return jax.vmap(partial(as_data, flow.model.energy))(x), arrived
