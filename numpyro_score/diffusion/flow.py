"""The probability flow of a diffusion as a differential equation, solved for each row by steps of its own."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.diffusion.end import NoisyNormal, end_law
from numpyro_score.diffusion.noise_range import shared_noise_range
from numpyro_score.diffusion.sde import SDE, noise_at, time_at
from numpyro_score.diffusion.source import NoisyModel, data_rows, noisy_model
from numpyro_score.energy import Energy, rows_text
from numpyro_score.losses.base import positive
from numpyro_score.normaliser.source import Source
from numpyro_score.operators import full_precision, score_and_directional

__all__ = ["Flow", "Settings", "prepared", "require_finite", "require_solved", "solve"]

_ADJOINTS: dict[str, type[diffrax.AbstractAdjoint]] = {
    "recursive": diffrax.RecursiveCheckpointAdjoint,
    "backsolve": diffrax.BacksolveAdjoint,
    "direct": diffrax.DirectAdjoint,
}
_SOLVERS = {
    "dopri8": diffrax.Dopri8,
    "dopri5": diffrax.Dopri5,
    "tsit5": diffrax.Tsit5,
    "bosh3": diffrax.Bosh3,
    "heun": diffrax.Heun,
}
_MAX_STEPS = 1000  # smooth densities take 10 to 30
_MOST_CURL, _CURL_ROWS = 0.3, 16  # of the Jacobian's antisymmetric part over its symmetric one; rows looked at
_NORMAL_FROM = 3.0  # standard deviations of the data that the largest noise should have


class Settings(NamedTuple):
    """What a compiled flow depends on besides arrays."""

    sde: SDE
    solver: str
    adjoint: str


class Flow(NamedTuple):
    """The probability flow of a model between two noise levels, as arrays."""

    model: NoisyModel  # at one row
    end: NoisyNormal
    start_time: Float[Array, ""]
    final_time: Float[Array, ""]
    smallest: Float[Array, ""]  # ρ at the start
    rtol: Float[Array, ""]
    atol: Float[Array, ""]


def prepared(
    owner: str,
    source: Source,
    sde: SDE,
    noise_range: Any,
    solver: str,
    rtol: float,
    atol: float,
    adjoint: str,
    stacklevel: int = 3,
) -> tuple[Flow, Settings]:
    """The flow of a source, and what is static of it; see :func:`flow_log_prob` for arguments, errors and warnings."""
    for what, known, name in (("solver", _SOLVERS, solver), ("adjoint", _ADJOINTS, adjoint)):
        if name not in known:
            raise ValueError(f"{owner} has no {what} {name!r}: use {', '.join(map(repr, known))}.")
    positive(owner, "rtol", rtol)
    positive(owner, "atol", atol)
    if rtol >= 1:
        raise ValueError(f"{owner} needs an rtol below 1, the error of a number over the number itself, got {rtol}.")
    if sde is None:
        raise TypeError(f"{owner} needs a diffusion such as sde=VP(), got None.")
    model = noisy_model(owner, source)
    low, high = shared_noise_range(owner, source, sde, noise_range)
    energy, dtype = model.energy, model.dtype
    if energy.is_concrete:
        with jax.ensure_compile_time_eval():
            rows, weights = data_rows(energy)
            end = end_law(rows, weights, dtype)
            scale = float(jnp.sqrt(end.largest))
        if atol >= (spread := float(np.hypot(scale, low))):
            raise ValueError(
                f"{owner} needs an atol below the spread of the data with the least noise, {spread:.3g}, got {atol}: "
                "take a thousandth of it or less."
            )
        if high < _NORMAL_FROM * scale:
            warnings.warn(
                f"The largest noise level, {high:.3g}, is {high / scale:.2g} times the data's standard deviation of "
                f"{scale:.3g}, where {owner} takes the noisy data to be normal, which they may not be yet: take larger "
                "levels, or standardise the data.",
                stacklevel=stacklevel,
            )
    else:  # to be differentiated in its parameters, on which the data do not depend
        end = jax.lax.stop_gradient(end_law(*energy.data_and_weights(), dtype))
    # At one row: a program for any number of data, and none of them among the adjoint's unknowns.
    one = NoisyModel(energy.at(end.mean[None]))
    with jax.ensure_compile_time_eval():
        levels = jnp.asarray([low, high], dtype)
        times = _times(sde, levels)
        tolerances = jnp.asarray([rtol, atol], dtype)
        if energy.is_concrete and not energy.has_density:
            _warn_of_curl(owner, one, jnp.asarray(rows[:_CURL_ROWS], dtype), levels[0], stacklevel + 1)
    return Flow(one, end, times[0], times[1], levels[0], tolerances[0], tolerances[1]), Settings(sde, solver, adjoint)


def _warn_of_curl(
    owner: str, model: NoisyModel, x: Float[Array, "n d"], rho: Float[Array, ""], stacklevel: int
) -> None:
    """Warns of a score that is far from a gradient at the smallest noise."""
    share = float(jnp.median(_curl_shares(model, x, rho)))
    if share > _MOST_CURL:
        warnings.warn(
            f"The score is not a gradient: the antisymmetric part of its Jacobian is {share:.0%} of the symmetric one "
            f"at the smallest noise (median of the first rows of the data). What {owner} gives is of the law that "
            "the flow draws, and no energy with this score has its density.",
            stacklevel=stacklevel,
        )


@jax.jit
def _curl_shares(model: NoisyModel, x: Float[Array, "n d"], rho: Float[Array, ""]) -> Float[Array, "n"]:
    jacobian = jax.vmap(jax.jacfwd(lambda u: model.score(u[None], rho)[0]))(x)
    other = jnp.swapaxes(jacobian, -1, -2)
    return jnp.linalg.norm(jacobian - other, axis=(-1, -2)) / jnp.linalg.norm(jacobian + other, axis=(-1, -2))


_times = jax.jit(time_at, static_argnums=0)  # its loop would be compiled at every call


def solve(
    settings: Settings,
    flow: Flow,
    x: Float[Array, "n d"],
    probes: Float[Array, "n m d"] | None = None,
    *,
    backwards: bool = False,
    density: bool = True,
) -> tuple[Float[Array, "n d"], Float[Array, "n m"], Int[Array, "n"], Bool[Array, "n"]]:
    """The flow from rows at the smallest noise to u at the largest, or backwards, each row by steps of its own.

    Args:
        settings: of :func:`prepared`.
        flow: likewise.
        x: rows, (N, D), in u = x/α.
        probes: random directions for the divergence; exact if not given.
        backwards: from the largest noise.
        density: whether to integrate the divergence.

    Returns:
        The rows at the other end, (N, D); their log density at the smallest noise, (N, M) by probe, M = 1 if exact;
        steps taken, (N,); and whether the row arrived with finite numbers, (N,).
    """
    sde = settings.sde
    controller = diffrax.PIDController(flow.rtol, flow.atol)
    adjoint = _ADJOINTS[settings.adjoint]()
    terms = diffrax.ODETerm(partial(_velocity, sde))
    times = (flow.start_time, flow.final_time)[:: -1 if backwards else 1]
    scales = [sde.alpha(t) for t in times]
    m = 0 if not density else 1 if probes is None else probes.shape[1]

    def one(x: Array, probes: Array | None) -> tuple[Array, ...]:
        start = (scales[0] * x, jnp.zeros(m, x.dtype))
        found = diffrax.diffeqsolve(
            terms,
            _SOLVERS[settings.solver](),
            *times,
            None,
            start,
            (flow.model, probes),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=_MAX_STEPS,
            throw=False,
        )
        y, integral = (v[-1] for v in found.ys)
        arrived = (found.result == diffrax.RESULTS.successful) & jnp.isfinite(y).all() & jnp.isfinite(integral).all()
        return y / scales[1], integral, found.stats["num_steps"], arrived

    u, integral, num_steps, arrived = jax.vmap(one)(x, probes)
    # In x, not in u: nothing large arises that would have to cancel.
    alpha, sigma = (jnp.asarray(v) for v in (sde.alpha(flow.final_time), sde.sigma(flow.final_time)))
    law = flow.end.times(alpha)
    at_end = law.log_prob(alpha * (x if backwards else u), sigma) + x.shape[1] * jnp.log(sde.alpha(flow.start_time))
    value = at_end[:, None] + (-integral if backwards else integral)
    return u, value, num_steps, arrived & ~jnp.isnan(value).any(-1)


@partial(jax.jit, static_argnums=0)  # traced once, and not at each of the places where Diffrax calls it
@full_precision
def _velocity(sde: SDE, t: Array, state: tuple[Array, Array], args: Any) -> tuple[Array, Array]:
    """dx/dt of one row, (D,), and its divergence or estimates of it, (M,)."""
    (x, integral), (model, probes) = state, args
    alpha, d_alpha = jax.jvp(sde.alpha, (t,), (jnp.ones_like(t),))
    rho, d_rho = jax.jvp(partial(noise_at, sde), (t,), (jnp.ones_like(t),))
    f, rate, u = d_alpha / alpha, rho * d_rho, (x / alpha)[None]
    at: Energy = model.at(u, rho)
    if not len(integral):
        score, divergence = at.score(u), integral
    elif probes is None:
        _, score, divergence = at.value_score_laplacian(u)
    else:
        v = probes[:, None]
        score, along = score_and_directional(at.row_log_density, u, v)
        divergence = jnp.sum(v * along, axis=(1, 2))
    return f * x - alpha * rate * score[0], f * x.shape[0] - rate * divergence


def require_finite(owner: str, x: Float[Array, "n d"]) -> None:
    """Raises ValueError for rows that are not finite; nothing while they are traced."""
    if isinstance(x, jax.core.Tracer):
        return
    bad = ~np.isfinite(np.asarray(x)).all(-1)
    if bad.any():
        raise ValueError(f"{owner} got {rows_text(bad)} with NaN or infinity: pass finite rows.")


def require_solved(owner: str, arrived: Bool[Array, "n"]) -> None:
    """Raises FloatingPointError for rows whose solution did not arrive; nothing while they are traced."""
    if isinstance(arrived, jax.core.Tracer):
        return
    bad = ~np.asarray(arrived)
    if bad.any():
        raise FloatingPointError(
            f"{owner} did not arrive at the other end in {_MAX_STEPS} steps for {rows_text(bad)}: the score is not "
            "finite or changes too fast on the way there; look at the model at its smallest noise, raise "
            "noise_range[0], or loosen rtol and atol."
        )
