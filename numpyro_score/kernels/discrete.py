"""Kernels for discrete data: for `numpyro.infer.MCMC`, :func:`~numpyro_score.sample` and the losses with chains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernels.base import ChainsKernel, batch_shape, check_number, first
from numpyro_score.kernels.langevin import Chains
from numpyro_score.kernels.lattice import (
    Lattice,
    LatticeState,
    discrete_langevin_chains,
    gibbs_chains,
    gibbs_with_gradients_chains,
)
from numpyro_score.kernels.potential import is_concrete

__all__ = ["DiscreteKernel", "DiscreteKernelState", "DiscreteLangevin", "Gibbs", "GibbsWithGradients"]


class DiscreteKernelState(NamedTuple):
    """The state of a kernel; `*chains` is empty, or the number of vectorised chains."""

    z: Float[Array, "*chains d"]  # integers
    chain: LatticeState
    i: Int[Array, "*chains"]  # steps taken, warm-up included
    rng_key: Array  # one for each chain

    @property
    def potential_energy(self) -> Float[Array, "*chains"]:
        """U(z)."""
        return -self.chain.log_density

    @property
    def accept_prob(self) -> Float[Array, "*chains"]:
        """Of the last step, the mean over its proposals."""
        return self.chain.accept_prob

    @property
    def diverging(self) -> Bool[Array, "*chains"]:
        """Whether the energy was not finite."""
        return self.chain.diverging

    @property
    def num_steps(self) -> Int[Array, "*chains"]:
        """1, as ArviZ counts gradients within a draw."""
        return jnp.ones_like(self.i)


@dataclass(frozen=True)
class DiscreteKernel(ChainsKernel):
    """A kernel that moves integers."""

    potential_fn: Callable[[Array], Array] | None = None
    low: Any = 0
    high: Any = 1
    num_values: int | None = None

    @abstractmethod
    def lattice_chains(self, lattice: Lattice) -> Chains:
        """The same transition of many independent chains over rows."""

    def postprocess_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Callable[..., Any]:
        """The positions as they are."""
        return lambda z: z

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> DiscreteKernelState:
        """The state at `init_params`, integers of shape (D,); with a batch of keys (chains, D).

        Raises:
            ValueError: without a potential or a start; if the start is outside of the support, or the energy is not
                finite there.
        """
        name = type(self).__name__
        if self.potential_fn is None:
            raise ValueError(f"{name} has nothing to sample: write {name}(potential_fn, low=..., high=...).")
        if init_params is None:
            raise ValueError(
                f"{name} needs init_params: write e.g. mcmc.run(key, init_params=...), integers of shape (d,), with "
                "one row per chain if there are several."
            )
        x = jnp.asarray(init_params, jnp.result_type(float))
        batch = batch_shape(rng_key)
        if x.ndim != len(batch) + 1:
            raise ValueError(
                f"{name} moves vectors, and got init_params of shape {x.shape} for {len(batch)} axes of chains: pass "
                "(d,), or (chains, d)."
            )
        chain = self.lattice_chains(self._lattice()).init(x)
        if is_concrete(chain, self.low, self.high):
            if not np.all((x >= self.low) & (x <= self.high) & (x == jnp.round(x))):
                raise ValueError(f"{name} starts outside of the integers from low to high: give other init_params.")
            if np.any(chain.diverging):
                raise ValueError("The potential energy at the start is not finite: give other init_params.")
        return DiscreteKernelState(x, chain, jnp.zeros(batch, int), rng_key)

    def sample(
        self, state: DiscreteKernelState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> DiscreteKernelState:
        """One step of every chain."""
        # One key serves all chains, whose random numbers are drawn at once.
        rng_key, i = first((state.rng_key, state.i), batch_shape(state.rng_key))
        chain = self.lattice_chains(self._lattice()).step(jax.random.fold_in(rng_key, i), state.chain)
        return state._replace(z=chain.x, chain=chain, i=state.i + 1)

    def _lattice(self) -> Lattice:
        potential, num_values = cast(Callable[[Array], Array], self.potential_fn), self.num_values
        if num_values is None and is_concrete(self.low, self.high) and np.isfinite(self.high).all():
            num_values = int(np.max(np.asarray(self.high) - np.asarray(self.low))) + 1

        def log_density(x: Array) -> Array:
            rows = x.reshape(-1, x.shape[-1])
            return -jax.vmap(potential)(rows).reshape(x.shape[:-1])

        return Lattice(log_density, self.low, self.high, num_values)


@dataclass(frozen=True)
class Gibbs(DiscreteKernel):
    """Gibbs sampling of discrete data with finitely many values [Geman & Geman 1984].

    A step draws each number from its law given the others, D of them one after the other. It takes D (V − 1) densities
    for V values, and no gradient. Slow for rows of hundreds of numbers: see :class:`DiscreteLangevin`.

    Args:
        potential_fn: U of one position (D,), to a scalar, for `numpyro.infer.MCMC`, whose `run` then needs
            `init_params`. :func:`~numpyro_score.sample` and the losses give the kernel all it needs: there it is
            `Gibbs` or `Gibbs(scan="random")`.
        low: the least value of each number.
        high: the largest.
        num_values: the most values that a number has, where `low` and `high` are traced.
        scan: "systematic", the numbers in their order, or "random", D of them drawn with replacement: reversible.

    Raises:
        ValueError: for another scan; when it runs, for counts without a largest value.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.infer import MCMC
        >>> from numpyro_score import Gibbs
        >>> kernel = Gibbs(lambda x: -1.0 * x[0] * x[1])  # two spins of 0 and 1
        >>> mcmc = MCMC(kernel, num_warmup=10, num_samples=5000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
        >>> both = mcmc.get_samples().prod(axis=-1).mean()
        >>> bool(abs(both - jnp.e / (3 + jnp.e)) < 0.05)
        True
    """

    scan: Literal["systematic", "random"] = "systematic"

    def __post_init__(self) -> None:
        if self.scan not in ("systematic", "random"):
            raise ValueError(f"Gibbs needs a scan that is 'systematic' or 'random', got {self.scan!r}.")

    def lattice_chains(self, lattice: Lattice) -> Chains:
        """The same transition of many independent chains over rows."""
        return gibbs_chains(lattice, self.scan)


@dataclass(frozen=True)
class GibbsWithGradients(DiscreteKernel):
    """Gibbs with gradients [Grathwohl et al. 2021]: the gradient says which number is worth changing.

    For densities that are differentiable functions of the data, such as networks and quadratic forms, evaluated at
    integers. Each proposal changes one number and is accepted by the rule of Metropolis and Hastings, so that the law
    of the draws is exact; where the gradient says nothing, as through a comparison, numbers are proposed at random.
    A step makes D proposals, each for one gradient.

    Args:
        potential_fn, low, high, num_values: as of :class:`Gibbs`. `high` may be infinite.
        num_proposals: in one step; D if not given.
        radius: the largest step of counts; finite data may take any other value.

    Raises:
        ValueError: for a radius or a num_proposals below 1.
    """

    num_proposals: int | None = None
    radius: int = 1

    def __post_init__(self) -> None:
        check_number("radius", self.radius, lambda r: r >= 1 and r == int(r), "whole, positive")
        if self.num_proposals is not None:
            check_number("num_proposals", self.num_proposals, lambda k: k >= 1 and k == int(k), "whole, positive")

    def lattice_chains(self, lattice: Lattice) -> Chains:
        """The same transition of many independent chains over rows."""
        return gibbs_with_gradients_chains(lattice, self.num_proposals, self.radius)


@dataclass(frozen=True)
class DiscreteLangevin(DiscreteKernel):
    """Discrete Langevin proposals with a Metropolis correction [DMALA, Zhang, Liu & Liu 2022].

    All numbers of a row move at once, each by its own step, for one gradient: the kernel for rows of many numbers. The
    law of the draws is exact; where the gradient says nothing it is a random walk.

    Args:
        potential_fn, low, high, num_values: as of :class:`Gibbs`. `high` may be infinite.
        step_size: α, in squared units of the data. Tune it until about half of the proposals are accepted.
        radius: the largest step of counts; finite data may take any other value.

    Raises:
        ValueError: for a step_size that is not positive, or a radius below 1.
    """

    step_size: float = 0.2
    radius: int = 1

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size, lambda h: h > 0, "positive")
        check_number("radius", self.radius, lambda r: r >= 1 and r == int(r), "whole, positive")

    def lattice_chains(self, lattice: Lattice) -> Chains:
        """The same transition of many independent chains over rows."""
        return discrete_langevin_chains(lattice, self.step_size, self.radius)
