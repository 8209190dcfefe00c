"""Flows with learned settings, fitted to a density by raising their bound on its normaliser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from numpyro_score.energy import depends_on_inputs
from numpyro_score.flows.dynamics import DynamicsFlow, LogDensity, Trajectory, as_pytree
from numpyro_score.flows.hamiltonian import HamiltonianFlow
from numpyro_score.printed import values_with_errors
from numpyro_score.random import Key, as_key

__all__ = ["FlowFit", "FlowFunction", "LearnedFlow", "build_flow", "fit_flow", "flow_params", "flow_step"]

FlowFunction = Callable[[LogDensity], DynamicsFlow]
"""A function from a log density to a flow, with a `numpyro.param` for everything that is learned."""


class FlowFit(NamedTuple):
    """What :func:`fit_flow` returns."""

    flow: DynamicsFlow
    bounds: np.ndarray  # (S,), of every step, each an unbiased estimate of E[log w]
    params: dict[str, Any]  # constrained values of the flow's param sites

    def __repr__(self) -> str:
        head = f"FlowFit of {len(self.bounds)} steps, last bound {self.bounds[-1]:.4g}: {self.flow}"
        return "\n  ".join([head, *values_with_errors(self.params, None)])


@dataclass(frozen=True)
class LearnedFlow:
    """A :class:`~numpyro_score.HamiltonianFlow` on a normal base, with everything learned.

    Learned are the base's mean and standard deviations, the scale of the first velocity and the step sizes of every
    step and dimension; if annealed, the bridging densities; if refreshed, the share of the velocity that is drawn anew.

    Args:
        dim: D.
        num_steps: T.
        annealed: whether to bridge from the base to the density, as a rule the tighter bound.
        refreshed: whether to draw a share of the velocity anew before each step, which pays on long trajectories.
        loc: where the base's mean starts; a number or (D,).
        scale: where its standard deviations start; a number or (D,). Step sizes start at a fifth of it.
    """

    dim: int
    num_steps: int = 5
    annealed: bool = False
    refreshed: bool = False
    # Where a fit starts is no part of what is compiled for it.
    loc: ArrayLike = field(default=0.0, compare=False)
    scale: ArrayLike = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        if self.dim < 1 or self.num_steps < 1:
            raise ValueError(f"LearnedFlow needs positive dim and num_steps, got {self.dim} and {self.num_steps}.")

    def __call__(self, log_density: LogDensity) -> HamiltonianFlow:
        """The flow along a density, with its `numpyro.param` sites."""
        dim, num_steps, real = self.dim, self.num_steps, jnp.result_type(float)
        start = jnp.broadcast_to(jnp.asarray(self.scale, real), (dim,))
        loc = numpyro.param("flow_loc", jnp.broadcast_to(jnp.asarray(self.loc, real), (dim,)))
        scale = numpyro.param("flow_scale", start, constraint=constraints.positive)
        steps = jnp.broadcast_to(0.2 * start, (num_steps, dim))
        step_size = numpyro.param("flow_step_size", steps, constraint=constraints.positive)
        momentum = numpyro.param("flow_momentum_scale", jnp.ones(dim, real), constraint=constraints.positive)
        options: dict[str, Any] = dict(momentum_scale=momentum)
        if self.annealed:
            even = jnp.full(num_steps, 1.0 / num_steps, real)
            rises = numpyro.param("flow_annealing", even, constraint=constraints.simplex)
            options["annealing"] = jnp.minimum(jnp.cumsum(rises), 1.0)  # the sum is 1 up to rounding
        if self.refreshed:
            share = jnp.asarray(0.3, real)
            options["refreshment"] = numpyro.param("flow_refreshment", share, constraint=constraints.unit_interval)
        return HamiltonianFlow(dist.Normal(loc, scale).to_event(1), log_density, step_size, num_steps, **options)


def fit_flow(
    flow: FlowFunction,
    log_density: LogDensity,
    rng_key: Key,
    *,
    num_steps: int = 1000,
    num_samples: int = 64,
    optim: optax.GradientTransformation | None = None,
) -> FlowFit:
    r"""Fits a flow to a density by stochastic gradient ascent on its bound :math:`\mathrm{E}[\log w] \le \log Z`.

    Args:
        flow: a function from a log density to a flow, with a `numpyro.param` for all that is learned, such as
            :class:`LearnedFlow`.
        log_density: f, from rows (..., D) to (...), e.g. `energy.log_density`.
        rng_key: a key for initial values and draws.
        num_steps: steps of the optimiser.
        num_samples: draws of the flow in each.
        optim: an Optax optimiser. By default Adam at 0.03 falling to zero, with gradients clipped to norm 1, which
            leaves out steps whose gradient is not finite, up to 20 in a row: single draws may run away until the flow
            has learned to take smaller steps.

    Raises:
        FloatingPointError: if the bound is not finite at the end, as that of a density without a normaliser.
        ValueError: for a flow without learned parameters, or a learned base whose draws pass no gradients.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_score import fit_flow, LearnedFlow
        >>> def log_density(x):  # N(2, ¼I), so that log Z = log(2π/4)
        ...     return -2.0 * jnp.sum((x - 2.0) ** 2, -1)
        >>> fit = fit_flow(LearnedFlow(2), log_density, jax.random.key(0), num_steps=300)
        >>> found = fit.flow.log_partition_bound(jax.random.key(1), 1000)
        >>> bool(jnp.abs(found.bound - jnp.log(jnp.pi / 2)) < 0.05)
        True
    """
    if num_steps < 1 or num_samples < 1:
        raise ValueError(f"fit_flow needs positive num_steps and num_samples, got {num_steps} and {num_samples}.")
    init_key, run_key = jax.random.split(as_key(rng_key))
    log_density = as_pytree(log_density)
    params = flow_params(flow, log_density, init_key)
    optim = _adam(num_steps) if optim is None else optim
    params, bounds = _ascend(flow, optim, num_steps, num_samples, log_density, params, run_key)
    found = np.asarray(bounds)
    if not np.isfinite(found[-1]):
        step = int(np.argmin(np.isfinite(found)))
        raise FloatingPointError(
            f"The flow's bound is {found[step]} at step {step}: the density has no normaliser, or the step sizes are "
            "too large for it; start from smaller ones, or take a smaller rate in optim."
        )
    return FlowFit(build_flow(flow, params, log_density), found, constrained(flow, params, log_density))


@functools.cache  # the same object for the same steps, so that compiled code is found again
def _adam(num_steps: int) -> optax.GradientTransformation:
    # One draw that nearly runs away has a gradient beyond all others. One that does has none, and its step is left out.
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.03, num_steps)))
    return optax.apply_if_finite(clipped, max_consecutive_errors=20)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _ascend(
    flow: FlowFunction,
    optim: optax.GradientTransformation,
    num_steps: int,
    num_samples: int,
    log_density: LogDensity,
    params: Any,
    rng_key: Array,
) -> tuple[Any, Float[Array, "s"]]:
    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        params, state = carry
        params, state, trajectory = flow_step(flow, optim, log_density, num_samples, params, state, key)
        return (params, state), jnp.mean(trajectory.log_weights)

    carry, bounds = jax.lax.scan(step, (params, optim.init(params)), jax.random.split(rng_key, num_steps))
    return carry[0], bounds


# -- the parameters of a flow, in unconstrained space -------------------------------------------------------------


def flow_step(
    flow: FlowFunction,
    optim: optax.GradientTransformation,
    log_density: LogDensity,
    num_samples: int,
    params: dict[str, Any],
    state: optax.OptState,
    rng_key: Array,
) -> tuple[dict[str, Any], optax.OptState, Trajectory]:
    """One step up the bound: new parameters, the optimiser's state, and the draws at the old parameters."""

    def loss(params: dict[str, Any]) -> tuple[Array, Trajectory]:
        trajectory = build_flow(flow, params, log_density).simulate(rng_key, (num_samples,))
        return -jnp.mean(trajectory.log_weights), trajectory

    grads, trajectory = jax.grad(loss, has_aux=True)(params)
    updates, state = optim.update(grads, state, params)
    return optax.apply_updates(params, updates), state, trajectory


def flow_params(flow: FlowFunction, log_density: LogDensity, rng_key: Array) -> dict[str, Any]:
    """Initial values of the flow's param sites, in unconstrained space.

    Raises:
        ValueError: for a flow without any, or a base that is learned but whose draws pass no gradients.
    """
    with handlers.block(), handlers.trace() as sites, handlers.seed(rng_seed=rng_key):
        built = flow(log_density)
    params = {k: _transform(s).inv(s["value"]) for k, s in sites.items() if s["type"] == "param"}
    if not params:
        raise ValueError("The flow has no numpyro.param, so that nothing is learned: see LearnedFlow.")
    if not built.has_rsample and _is_learned(lambda params: build_flow(flow, params, log_density).base, params):
        raise ValueError(
            f"Draws of the flow's base ({built.base}) pass no gradients to its parameters: take a base such as "
            "dist.Normal(...).to_event(1), or one without any numpyro.param."
        )
    return params


def _is_learned(base: Callable[[dict[str, Any]], Any], params: dict[str, Any]) -> bool:
    """Whether any number in what `base` makes of the parameters depends on them."""
    jaxpr = jax.make_jaxpr(lambda params: jax.tree.leaves(base(params)))(params).jaxpr
    return any(depends_on_inputs(jaxpr, [True] * len(jaxpr.invars)))


def build_flow(flow: FlowFunction, params: dict[str, Any], log_density: LogDensity) -> DynamicsFlow:
    """The flow at unconstrained values of its param sites."""
    return _run(flow, params, log_density)[0]


def constrained(flow: FlowFunction, params: dict[str, Any], log_density: LogDensity) -> dict[str, Any]:
    """The constrained values of the param sites."""
    return {k: s["value"] for k, s in _run(flow, params, log_density)[1].items() if s["type"] == "param"}


def _run(flow: FlowFunction, params: dict[str, Any], log_density: LogDensity) -> tuple[DynamicsFlow, Any]:
    def value(site: Any) -> Any:
        return _transform(site)(params[site["name"]]) if site["type"] == "param" else None

    with handlers.block(), handlers.trace() as sites, handlers.substitute(substitute_fn=value):
        return flow(log_density), sites


def _transform(site: dict[str, Any]) -> Any:
    return biject_to(site["kwargs"].get("constraint", constraints.real))
