"""Log densities by the probability flow of a diffusion."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.diffusion.end import NoisyNormal, end_law
from numpyro_score.diffusion.noise_range import shared_noise_range
from numpyro_score.diffusion.sde import SDE, VP, noise_at, time_at
from numpyro_score.diffusion.source import NoisyModel, data_rows, noisy_model
from numpyro_score.energy import Energy, rows_text
from numpyro_score.losses.base import at_least_one, positive
from numpyro_score.normaliser.coordinates import row_log_jacobian
from numpyro_score.normaliser.source import Source
from numpyro_score.operators import full_precision, score_and_directional
from numpyro_score.random import Key, as_key

__all__ = ["Flow", "FlowLogProb", "Settings", "flow_log_prob", "prepared", "require_solved", "solve"]

Adjoint = Literal["recursive", "backsolve", "direct"]
Divergence = Literal["exact", "hutchinson"]

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
_LOOSER = 30.0  # how much, for the second solve that tells the error of the first: covers on 95 to 99% of rows
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


class FlowLogProb(NamedTuple):
    """What :func:`flow_log_prob` returns, an entry for each row of x."""

    value: Float[Array, "n"]
    """The log density of the data with noise of standard deviation `smallest_sigma`."""
    stderr: Float[Array, "n"]
    """The standard error over probes; 0 for an exact divergence."""
    solver_error: Float[Array, "n"]
    """An estimate of the error of the solver, meant to be above it."""
    end_error: Float[Array, "n"]
    """How far the model is from normal at the largest noise, in nats: what the value would change by with its own law
    there."""
    smallest_sigma: Float[Array, ""]
    """The noise with which the value is the density of the data."""
    num_steps: Int[Array, "n"]
    """Steps of the solver, rejected ones included."""


def flow_log_prob(
    source: Source,
    x: Any,
    *,
    sde: SDE = VP(),  # noqa: B008
    noise_range: tuple[float, float] | None = None,
    solver: str = "dopri8",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    divergence: Divergence = "exact",
    num_probes: int = 16,
    rng_key: Key | None = None,
    adjoint: Adjoint = "recursive",
) -> FlowLogProb:
    r"""The normalised log density of each row of x, by the probability flow of a fitted model.

    The ordinary differential equation that has the marginals of the diffusion,

    .. math:: \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla \log p_t(x),

    takes x from the smallest noise :math:`\sigma_{min}` to the largest, where the law is normal with the mean and
    covariance of the data, and

    .. math:: \log p_0(x_0) = \log p_T(x_T) + \int_0^T \mathrm{div}\, \frac{dx}{dt}\, dt

    [Chen et al. 2018; Song et al. 2021, eq. 39]. It is the density of what :func:`~numpyro_score.flow_decode` draws.
    For a model whose levels belong together this is the density of the data with noise σ_min, which is not taken off.
    For another, such as a network or a :func:`~numpyro_score.score_factor` that is not a gradient, it is normalised
    all the same, but differs from the model's own density at σ_min, if it has one, by more than a constant.

    Every row has steps of its own. 1,000 rows are one compiled call, and neither other data nor other parameters of the
    same shapes compile it anew.

    Args:
        source: a fit by :class:`~numpyro_score.DSM` at several levels, or an energy of a model with the keyword
            `sigma`. Its data give the law at the end.
        x: rows as the data site takes them; the density is in their measure.
        sde: the diffusion along which to integrate.
        noise_range: the smallest and largest level, by default those of the fit within those of the diffusion. The
            largest should be some ten times the data's standard deviation, or more.
        solver: "dopri8", "dopri5", "tsit5", "bosh3" or "heun", of Diffrax.
        rtol: its relative tolerance. In single precision less than 1e-6 does not help.
        atol: its absolute tolerance, in the units of the data.
        divergence: "exact", at the cost of a Laplacian, D + 2 energies or D derivatives of a score; or "hutchinson",
            from random probes of each row, held along its path: unbiased, with the error `stderr` [Grathwohl et al.
            2019].
        num_probes: how many, of random signs.
        rng_key: for the probes.
        adjoint: how derivatives with respect to x and parameters are taken: "recursive" checkpoints, exact for the
            steps taken; "backsolve", another flow backwards in constant memory, as exact as the tolerance [Chen et al.
            2018]; "direct", which keeps all steps, and can be differentiated forwards.

    Returns:
        Of each row, the log density, its Monte Carlo error, estimates of the errors of the solver and of the normal law
        at the end, and the number of steps; and σ_min. The solver's error is the difference from a second solution at
        thirty times the tolerances, and usually some ten times too large. That of the end is what the model's own law
        there would change, by its score: for one whose levels belong together an error of the value, which a larger
        noise makes smaller; for another the density of what the flow draws is another one than the model's.

    Raises:
        TypeError: if the source is no model of noise levels, or these are not known.
        ValueError: for settings that are none, levels that the model or diffusion does not have, or rows that are not
            finite.
        FloatingPointError: naming rows whose solution did not arrive. Inside `jax.jit` these rows are NaN.

    Warns:
        UserWarning: if the largest noise is less than three standard deviations of the data.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, flow_log_prob
        >>> def model(x, sigma=1.0):  # a standard normal law with noise, without its normaliser
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))
        >>> energy = Energy(model, {}, jnp.array([-1.0, 1.0]))
        >>> found = flow_log_prob(energy, jnp.array([0.0, 2.0]), noise_range=(0.001, 100.0))
        >>> bool(jnp.allclose(found.value, dist.Normal().log_prob(jnp.array([0.0, 2.0])), atol=1e-4))
        True
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"flow_log_prob has no divergence {divergence!r}: use 'exact' or 'hutchinson'.")
    at_least_one("flow_log_prob", "num_probes", num_probes)
    key = None
    if divergence == "hutchinson":
        if num_probes < 2:
            raise ValueError("flow_log_prob needs num_probes of 2 or more, to tell the error from.")
        key = as_key(rng_key, "divergence='hutchinson' draws probes, so pass rng_key=jax.random.key(0)")
    flow, settings = prepared("flow_log_prob", source, sde, noise_range, solver, rtol, atol, adjoint)
    rows = flow.model.energy.flatten(x)
    require_finite("flow_log_prob", rows)
    found, arrived = _values_and_errors(settings, flow, rows, key, num_probes)
    require_solved("flow_log_prob", arrived)
    return found


def prepared(
    owner: str,
    source: Source,
    sde: SDE,
    noise_range: Any,
    solver: str,
    rtol: float,
    atol: float,
    adjoint: str,
) -> tuple[Flow, Settings]:
    """The flow of a source, and what is static of it; see :func:`flow_log_prob` for arguments and errors."""
    for what, known, name in (("solver", _SOLVERS, solver), ("adjoint", _ADJOINTS, adjoint)):
        if name not in known:
            raise ValueError(f"{owner} has no {what} {name!r}: use {', '.join(map(repr, known))}.")
    positive(owner, "rtol", rtol)
    positive(owner, "atol", atol)
    model = noisy_model(owner, source)
    low, high = shared_noise_range(owner, source, sde, noise_range)
    energy, dtype = model.energy, model.dtype
    if energy.is_concrete:
        with jax.ensure_compile_time_eval():
            end = end_law(*data_rows(energy), dtype)
            scale = float(jnp.sqrt(end.variances[-1]))
        if high < _NORMAL_FROM * scale:
            warnings.warn(
                f"The largest noise level, {high:.3g}, is {high / scale:.2g} times the data's standard deviation of "
                f"{scale:.3g}, where {owner} takes the noisy data to be normal, which they may not be yet: take larger "
                "levels, or standardise the data.",
                stacklevel=3,
            )
    else:  # to be differentiated in its parameters, on which the data do not depend
        end = jax.lax.stop_gradient(end_law(*energy.data_and_weights(), dtype))
    # At one row: a program for any number of data, and none of them among the adjoint's unknowns.
    one = NoisyModel(energy.at(end.mean[None]))
    with jax.ensure_compile_time_eval():
        levels = jnp.asarray([low, high], dtype)
        times = time_at(sde, levels)
        tolerances = jnp.asarray([rtol, atol], dtype)
    return Flow(one, end, times[0], times[1], levels[0], tolerances[0], tolerances[1]), Settings(sde, solver, adjoint)


@partial(jax.jit, static_argnums=(0, 4))
def _values_and_errors(
    settings: Settings, flow: Flow, x: Float[Array, "n d"], rng_key: Array | None, num_probes: int
) -> tuple[FlowLogProb, Bool[Array, "n"]]:
    log_jacobian = jax.vmap(partial(row_log_jacobian, flow.model.energy))(x)
    probes = None
    if rng_key is not None:
        probes = jax.random.rademacher(rng_key, (len(x), num_probes, x.shape[1]), x.dtype)

    def at_tolerance(looser: Array) -> tuple[Array, ...]:
        return solve(settings, flow._replace(rtol=looser * flow.rtol, atol=looser * flow.atol), x, probes)

    # With the same probes: the difference is that of the steps.
    (u, _), (values, less_exact), (num_steps, _), (arrived, _) = jax.vmap(at_tolerance)(
        jnp.asarray([1.0, _LOOSER], x.dtype)
    )
    rounding = jnp.finfo(x.dtype).eps * num_steps * (1 + jnp.abs(values.mean(1)))
    error = jax.lax.stop_gradient(jnp.abs(values.mean(1) - less_exact.mean(1)) + rounding)
    m = values.shape[1]
    stderr = jnp.std(values, axis=1, ddof=1) / m**0.5 if m > 1 else jnp.zeros_like(error)
    value = jnp.where(arrived, values.mean(1), jnp.nan) - log_jacobian
    return FlowLogProb(value, stderr, error, _end_error(settings, flow, u), flow.smallest, num_steps), arrived


def _end_error(settings: Settings, flow: Flow, u: Float[Array, "n d"]) -> Float[Array, "n"]:
    """|log q_ρ(u) − log N(u)| at the largest noise, each less its value at the mean.

    By the difference of scores along the line between, at the two points of Gauss and Legendre: exact for what a third
    and fourth cumulant change.
    """
    rho, mean = noise_at(settings.sde, flow.final_time), flow.end.mean

    def along(share: float) -> Array:
        at = mean + share * (u - mean)
        score = jax.vmap(lambda v: flow.model.score(v[None], rho)[0])(at)
        return jnp.sum((u - mean) * (score - flow.end.score(at, rho)), axis=-1)

    return jax.lax.stop_gradient(jnp.abs(0.5 * along(0.5 - 12**-0.5) + 0.5 * along(0.5 + 12**-0.5)))


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
    alpha, sigma = sde.alpha(flow.final_time), sde.sigma(flow.final_time)
    law = NoisyNormal(alpha * flow.end.mean, flow.end.axes, alpha**2 * flow.end.variances)
    at_end = law.log_prob(alpha * (x if backwards else u), sigma) + x.shape[1] * jnp.log(sde.alpha(flow.start_time))
    return u, at_end[:, None] + (-integral if backwards else integral), num_steps, arrived


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
