"""Langevin kernels for `numpyro.infer.MCMC`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from numpyro.infer import init_to_uniform

from numpyro_score import random
from numpyro_score.kernels.base import Anchor, GradientKernel, KernelState, check_number
from numpyro_score.kernels.langevin import (
    Chains,
    ChainState,
    Evaluate,
    LogDensity,
    MomentumState,
    langevin_chains,
    langevin_step,
    mala_chains,
    mala_step,
    sghmc_chains,
    sghmc_step,
    start,
    start_with_momentum,
)
from numpyro_score.kernels.potential import ModelPotential, is_concrete
from numpyro_score.kernels.schedules import Schedule

__all__ = ["MALA", "SGHMC", "SGLD", "RMSProp"]


class RMSProp(NamedTuple):
    """A running mean of squared gradients, and for how long it runs."""

    second_moment: Float[Array, "*chains d"]
    num_warmup: Int[Array, "*chains"]


RMS_DECAY, RMS_OFFSET = 0.99, 1e-5  # α and λ of Li et al. (2016)


class _StochasticGradientKernel(GradientKernel):
    """Control variates, for the kernels that take estimates of the gradient."""

    center: dict[str, Any] | None

    def _set_center(self, center: dict[str, Any] | None) -> None:
        if center is not None and self.model is None:
            raise ValueError("center needs a model, whose rows it can subsample: leave it out.")
        if center is not None and not isinstance(center, dict):
            raise TypeError(f"center must be a dict of values of the latent sites, got a {type(center).__name__}.")
        self.center = center

    def _anchor(self, target: ModelPotential | None) -> Anchor | None:
        if self.center is None or target is None:
            return None
        if not target.plates:
            raise ValueError("center reduces the noise of subsampled plates, and the model has none: leave it out.")
        float_center = {k: jnp.asarray(v, jnp.result_type(float)) for k, v in self.center.items()}
        target.check_values(float_center, "center")
        x, unravel = ravel_pytree(target.unconstrain(float_center, "center"))
        return Anchor(x, *jax.value_and_grad(lambda x: -target.on_all_rows(unravel(x)))(x))


class SGLD(_StochasticGradientKernel):
    r"""Stochastic gradient Langevin dynamics [Welling & Teh 2011] for `numpyro.infer.MCMC`.

    .. math:: x' = x - h \nabla \hat U(x) + \sqrt{2 h T}\, z, \qquad z \sim N(0, I),

    in unconstrained space, with the potential energy U = −log density and an unbiased estimate of its gradient. The
    other common form, with step ε/2 and noise √ε, is ε = 2h.

    Rows of subsampled plates, and other random numbers of the model such as a loss's projections, are drawn anew at
    every step and by each chain for itself. Rows are drawn with replacement if they are at most a tenth of the plate,
    which is much faster. Param sites stay at their initial values.

    There is no Metropolis step: the law of the draws is off by O(h). On a quadratic U of curvature a, with gradient
    noise of variance V, a coordinate has the variance (T + hV/2) / (a (1 − ha/2)) instead of T/a, and runs away for
    h > 2/a. In general the draws are as hot as

    .. math:: \mathrm{E}[x \cdot \nabla U(x)] / D = T + \tfrac h2 \mathrm{E} \|\nabla \hat U(x)\|^2 / D,

    exactly, once stationary: the right side, whose mean is found from few draws, is recorded at each step as
    `effective_temperature`. If its mean is much above T, take smaller steps, larger subsamples or a `center`.

    A chain whose energy or gradient is no longer finite is `diverging` from there on, and its draws become NaN.
    NumPyro calls no kernel at the end of `run`: it is :func:`~numpyro_score.to_arviz` that warns of such chains.

    Args:
        model: a NumPyro model, such as that of :func:`~numpyro_score.generalized_bayes`, or
        potential_fn: U of one position, a pytree, to a scalar; `MCMC.run` then needs `init_params`. With neither, the
            kernel serves for :meth:`chains` only.
        step_size: h, in squared units of the unconstrained parameters: a number, or a schedule from the number of
            steps taken, warm-up included, e.g. :func:`~numpyro_score.polynomial_schedule`.
        temperature: T. At 0 the noise is left out, and each seed goes down the energy to a mode.
        preconditioner: "rmsprop" multiplies h by G = 1 / (λ + √v) in each coordinate, with v a running mean of squared
            gradients, so that h is in units of length [pSGLD, Li et al. 2016]. Here v is learned in warm-up and then
            held fixed: G does not depend on x any more, and the term ∇·G, which they drop, is zero. v starts at the
            squared scores at the start and at a distance of h.
        center: constrained values of all latent sites near the mode, e.g. a point fit. The gradient on a subsample is
            corrected by that at the centre, on the same rows and on all [SGLD-CV, Baker et al. 2019]; this takes two
            gradients per step, and one on all rows at the start.
        init_strategy: how NumPyro chooses the start.

    Raises:
        ValueError: for settings out of range, both or neither of `model` and `potential_fn`, latent sites that are
            discrete or in a subsampled plate, a subsampled plate without data, and an energy that is not finite at
            the start.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import SGLD
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(y), subsample_size=100):
        ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=numpyro.subsample(y, event_dim=0))
        >>> y = 2.0 + jax.random.normal(jax.random.key(0), (10_000,))
        >>> kernel = SGLD(model, step_size=1e-5, center={"mu": y.mean()})
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=4000, progress_bar=False)
        >>> mcmc.run(jax.random.key(1), y)
        >>> bool(abs(mcmc.get_samples()["mu"].mean() - y.sum() / 10_001) < 0.005)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Any] | None = None,
        *,
        step_size: float | Array | Schedule,
        temperature: float | Array = 1.0,
        preconditioner: Literal["rmsprop"] | None = None,
        center: dict[str, Any] | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(model, potential_fn, step_size, temperature, init_strategy)
        if preconditioner not in (None, "rmsprop"):
            raise ValueError(f"preconditioner must be None or 'rmsprop', got {preconditioner!r}.")
        self.preconditioner = preconditioner
        self._set_center(center)

    def chains(self, log_density: LogDensity) -> Chains:
        """The same transition of many independent chains over rows, for a log density (..., D) to (...).

        Raises:
            ValueError: for a schedule or a preconditioner, which need the kernel's memory.
        """
        if self.preconditioner is not None:
            raise ValueError("SGLD.chains has no warm-up to learn a preconditioner in: leave preconditioner out.")
        return langevin_chains(log_density, self._constant_step_size(), self.temperature)

    def _preconditioner(
        self, evaluate: Evaluate, rng_key: Array, chain: Any, step_size: Array, num_warmup: int
    ) -> RMSProp | None:
        if self.preconditioner is None:
            return None
        if num_warmup == 0:
            raise ValueError("SGLD learns preconditioner='rmsprop' in warm-up: give MCMC a positive num_warmup.")
        # At a mode the score is zero, and v = 0 would make the first step huge. h is in units of length here, and the
        # score at that distance is of the size that belongs to such steps.
        probe = evaluate(chain.x + step_size * random.normal(rng_key, chain.x.shape, chain.x.dtype))[1]
        second_moment = chain.score**2 + 0.99 * probe**2 + 0.01 * jnp.mean(probe**2, axis=-1, keepdims=True)
        return RMSProp(second_moment, jnp.full(chain.score.shape[:-1], num_warmup))

    def _step(self, evaluate: Evaluate, rng_key: Array, state: KernelState, step_size: Array) -> KernelState:
        rms, score = state.preconditioner, state.chain.score
        if rms is not None:
            learned = RMS_DECAY * rms.second_moment + (1 - RMS_DECAY) * score**2
            second_moment = jnp.where((state.i < rms.num_warmup)[..., None], learned, rms.second_moment)
            rms = rms._replace(second_moment=second_moment)
            step_size = step_size / (RMS_OFFSET + jnp.sqrt(second_moment))
        temperature = state.temperature
        chain = langevin_step(evaluate, rng_key, state.chain, step_size, temperature[..., None])
        effective = temperature + 0.5 * jnp.mean(step_size * score**2, axis=-1)
        return state._replace(chain=chain, effective_temperature=effective, preconditioner=rms)


class MALA(GradientKernel):
    r"""The Metropolis-adjusted Langevin algorithm [Roberts & Tweedie 1996] for `numpyro.infer.MCMC`.

    It proposes the Langevin step

    .. math:: x' = x - h \nabla U(x) + \sqrt{2h}\, z, \qquad z \sim N(0, I),

    and accepts it by the rule of Metropolis and Hastings, so that its draws have the exact law for any h. The other
    common form, with step ε/2 and noise √ε, is ε = 2h. A mean `accept_prob` of about 0.57 is best in high dimensions
    [Roberts & Rosenthal 1998]; there h goes as D^(−1/3).

    A proposal whose energy or gradient is not finite is refused, with `accept_prob` 0, and this one draw is flagged
    `diverging`.

    Args:
        model: a NumPyro model without subsampled plates, or
        potential_fn: U of one position, a pytree, to a scalar; `MCMC.run` then needs `init_params`. With neither, the
            kernel serves for :meth:`chains` only.
        step_size: h, in squared units of the unconstrained parameters: a number, or a schedule from the number of
            steps taken, warm-up included.
        init_strategy: how NumPyro chooses the start.

    Raises:
        ValueError: for a step size that is not positive, both or neither of `model` and `potential_fn`, discrete latent
            sites, a subsampled plate, an energy that is not finite at the start, and one that falls far away from it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import MALA
        >>> kernel = MALA(potential_fn=lambda x: jnp.sum(x**4) / 4, step_size=0.2)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=20_000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
        >>> bool(jnp.abs(mcmc.get_samples().var() - 0.676) < 0.05)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Any] | None = None,
        *,
        step_size: float | Array | Schedule,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(model, potential_fn, step_size, 1.0, init_strategy)

    def chains(self, log_density: LogDensity) -> Chains:
        """The same transition of many independent chains over rows, for a log density (..., D) to (...).

        Raises:
            ValueError: for a schedule.
        """
        return mala_chains(log_density, self._constant_step_size())

    def _check_model(self, target: ModelPotential) -> None:
        for name in target.plates:
            raise ValueError(
                f"MALA needs the exact density, and the plate '{name}' is subsampled: give the plate no "
                "subsample_size, or use SGLD."
            )

    def _potential(self, target: ModelPotential | None, rng_key: Array, z: Any) -> Float[Array, ""]:
        # A model's random numbers, such as a loss's projections, are held fixed: one well-defined density.
        return super()._potential(target, jax.random.key(0), z)

    def _start(self, evaluate: Evaluate, x: Array) -> ChainState:
        chain = start(evaluate, x)
        if is_concrete(chain):
            _refuse_growth(evaluate, x.reshape(-1, x.shape[-1])[0])
        return chain

    def _step(self, evaluate: Evaluate, rng_key: Array, state: KernelState, step_size: Array) -> KernelState:
        return state._replace(chain=mala_step(evaluate, rng_key, state.chain, step_size))


def _refuse_growth(evaluate: Evaluate, x: Float[Array, "d"]) -> None:
    """Raises ValueError if the density grows from 1e3 to 1e6 away from x, along the diagonal or one of the first axes.

    Unadjusted chains run away there, and say so; a Metropolis step refuses to, and the chain looks like that of a law.
    """
    rays = jnp.concatenate([jnp.ones((1, len(x))), jnp.eye(len(x))[:3]])
    rays = jnp.concatenate([rays, -rays])
    near, far = np.split(np.asarray(evaluate(x + jnp.concatenate([1e3 * rays, 1e6 * rays]))[0]), 2)
    grows = np.isfinite(near) & (far > near + 1e3)
    if grows.any():
        which = int(np.argmax(grows))
        raise ValueError(
            f"The potential energy falls without bound, from {-near[which]:.3g} to {-far[which]:.3g} between distances "
            "of 1e3 and 1e6, so that the density has no normaliser: add a term or a prior that confines it."
        )


class SGHMC(_StochasticGradientKernel):
    r"""Stochastic gradient Hamiltonian Monte Carlo [Chen, Fox & Guestrin 2014] for `numpyro.infer.MCMC`.

    Underdamped Langevin dynamics in the discretisation of their eq. 15, with momentum r of unit mass:

    .. math:: r' = (1 - \alpha) r - \sqrt h\, \nabla \hat U(x) + \sqrt{2 \alpha T}\, z, \qquad x' = x + \sqrt h\, r'.

    Their learning rate is h, their v is √h r, and their estimate of the gradient noise is taken to be 0. With friction
    α = 1 it is :class:`SGLD` with the same h; with less friction it goes further in one direction.

    Its law is off by O(h). On a quadratic U of curvature a, with gradient noise of variance V, the stationary law of a
    coordinate is normal with

    .. math:: \operatorname{Var} x = \frac{T + hV/2\alpha}{a\,(1 - ha / (4 - 2\alpha))}, \quad
              \operatorname{Var} r = \frac{2a}{2 - \alpha} \operatorname{Var} x, \quad
              \operatorname{Cov}(x, r) = \tfrac12 \sqrt h \operatorname{Var} r,

    for h < (4 − 2α)/a; beyond, chains run away. For any U the draws are as hot as

    .. math:: \mathrm{E}[x \cdot \nabla U(x)] / D = (1 - \alpha/2)\, \mathrm{E}\|r\|^2 / D,

    exactly, once stationary: the right side is recorded at each step as `effective_temperature`.

    Subsampled plates, param sites and divergence are treated as by :class:`SGLD`.

    Args:
        model: a NumPyro model, or
        potential_fn: U of one position, a pytree, to a scalar; `MCMC.run` then needs `init_params`. With neither, the
            kernel serves for :meth:`chains` only.
        step_size: h, in squared units of the unconstrained parameters: a number, or a schedule from the number of
            steps taken, warm-up included.
        friction: α in (0, 1].
        temperature: T. At 0 it is gradient descent with momentum 1 − α.
        center: as of :class:`SGLD`.
        init_strategy: how NumPyro chooses the start.

    Raises:
        ValueError: as of :class:`SGLD`, and for a friction outside of (0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import SGHMC
        >>> kernel = SGHMC(potential_fn=lambda x: 0.5 * jnp.sum(x**2), step_size=0.1, friction=0.3)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=20_000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
        >>> bool(jnp.abs(mcmc.get_samples().var() - 1 / (1 - 0.1 / 3.4)) < 0.1)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Any] | None = None,
        *,
        step_size: float | Array | Schedule,
        friction: float | Array = 0.1,
        temperature: float | Array = 1.0,
        center: dict[str, Any] | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(model, potential_fn, step_size, temperature, init_strategy)
        check_number("friction", friction, lambda a: 0 < a <= 1, "positive and at most 1")
        self.friction = friction
        self._set_center(center)

    def chains(self, log_density: LogDensity) -> Chains:
        """The same transition of many independent chains over rows, for a log density (..., D) to (...).

        Raises:
            ValueError: for a schedule.
        """
        return sghmc_chains(log_density, self._constant_step_size(), self.friction, self.temperature)

    def _start(self, evaluate: Evaluate, x: Array) -> MomentumState:
        return start_with_momentum(evaluate, x)

    def _step(self, evaluate: Evaluate, rng_key: Array, state: KernelState, step_size: Array) -> KernelState:
        chain = sghmc_step(evaluate, rng_key, state.chain, step_size, self.friction, state.temperature[..., None])
        effective = (1.0 - 0.5 * self.friction) * jnp.mean(chain.momentum**2, axis=-1)
        return state._replace(chain=chain, effective_temperature=effective)
