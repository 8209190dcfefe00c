"""Log densities by the probability flow of a diffusion."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.diffusion.flow import Flow, Settings, prepared, require_finite, require_solved, solve
from numpyro_score.diffusion.sde import SDE, VP, noise_at
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.coordinates import row_log_jacobian
from numpyro_score.normaliser.source import Source
from numpyro_score.random import Key, as_key

__all__ = ["FlowLogProb", "flow_log_prob"]

Adjoint = Literal["recursive", "backsolve", "direct"]
Divergence = Literal["exact", "hutchinson"]

# How much, for a second solve that tells the error of the first; covers 95 to 99% of rows at tolerances from 1e-5.
_LOOSER = 30.0


class FlowLogProb(NamedTuple):
    """What :func:`flow_log_prob` returns, an entry for each row of x."""

    value: Float[Array, "n"]
    """The log density of the data with noise of standard deviation `smallest_sigma`."""
    stderr: Float[Array, "n"]
    """The standard error over probes; 0 for an exact divergence. Of few probes it is itself uncertain: the truth lies
    within t standard errors, t the quantile of Student's law of `num_probes` − 1 degrees of freedom."""
    solver_error: Float[Array, "n"]
    """An estimate of the error of the solver alone, meant to be above it."""
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
    same shapes compile it anew; another `sde` does, the same with other numbers included.

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
            2019]. With D probes or more the exact one costs no more, and is taken.
        num_probes: how many, each a uniform direction of length √D.
        rng_key: for the probes, with "hutchinson" only.
        adjoint: how derivatives with respect to x and parameters are taken: "recursive" checkpoints, exact for the
            steps taken; "backsolve", another flow backwards in constant memory, as exact as the tolerance [Chen et al.
            2018]; "direct", which keeps all steps, and can be differentiated forwards.

    Returns:
        Of each row, the log density, its Monte Carlo error, estimates of the errors of the solver and of the normal law
        at the end, and the number of steps; and σ_min. The solver's error is the difference from a second solution at
        thirty times the tolerances, and usually some ten times too large; it knows nothing of the law at the end. The
        error of that is what the model's own law there would change, by its score: for one whose levels belong together
        an error of the value, which a larger noise makes smaller; for another the density of what the flow draws is
        another one than the model's. The law at the end has the mean and covariance of the rows that the source holds.
        Those of a sample are off those of the model, by 1e-3 nat with 2,000 rows and a noise of some ten standard
        deviations: as a rule this dominates the solver's error, whatever the tolerance.

    Raises:
        TypeError: if the source is no model of noise levels, or these are not known.
        ValueError: for settings that are none, levels that the model or diffusion does not have, or rows that are not
            finite.
        FloatingPointError: naming rows whose solution did not arrive. Inside `jax.jit` these rows are NaN.

    Warns:
        UserWarning: if the largest noise is less than three standard deviations of the data; if a
            :func:`~numpyro_score.score_factor` is far from a gradient.

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
    num_probes = at_least_one("flow_log_prob", "num_probes", num_probes)
    key = None
    if divergence == "hutchinson":
        if num_probes < 2:
            raise ValueError("flow_log_prob needs num_probes of 2 or more, to tell the error from.")
        key = as_key(rng_key, "divergence='hutchinson' draws probes, so pass rng_key=jax.random.key(0)")
    elif rng_key is not None:
        raise TypeError(
            "flow_log_prob draws nothing with divergence='exact': leave rng_key out, or write divergence='hutchinson'."
        )
    flow, settings = prepared("flow_log_prob", source, sde, noise_range, solver, rtol, atol, adjoint)
    rows = flow.model.energy.flatten(x)
    require_finite("flow_log_prob", rows)
    if num_probes >= rows.shape[1]:
        key = None
    if key is None:
        num_probes = 1  # of none, so that all exact divergences are one program
    found, arrived = _values_and_errors(settings, flow, rows, key, num_probes)
    require_solved("flow_log_prob", arrived)
    return found


@partial(jax.jit, static_argnums=(0, 4))
def _values_and_errors(
    settings: Settings, flow: Flow, x: Float[Array, "n d"], rng_key: Array | None, num_probes: int
) -> tuple[FlowLogProb, Bool[Array, "n"]]:
    log_jacobian = jax.vmap(partial(row_log_jacobian, flow.model.energy))(x)
    probes = None
    if rng_key is not None:
        # Uniform on the sphere: random signs have few values in few dimensions, and too small errors by chance.
        z = jax.random.normal(rng_key, (len(x), num_probes, x.shape[1]), x.dtype)
        probes = x.shape[1] ** 0.5 * z / jnp.linalg.norm(z, axis=-1, keepdims=True)

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
    rho, mean = jnp.asarray(noise_at(settings.sde, flow.final_time)), flow.end.mean

    def along(share: float) -> Array:
        at = mean + share * (u - mean)
        score = jax.vmap(lambda v: flow.model.score(v[None], rho)[0])(at)
        return jnp.sum((u - mean) * (score - flow.end.score(at, rho)), axis=-1)

    return jax.lax.stop_gradient(jnp.abs(0.5 * along(0.5 - 12**-0.5) + 0.5 * along(0.5 + 12**-0.5)))
