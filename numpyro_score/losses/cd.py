"""Contrastive divergence."""

from __future__ import annotations

import inspect
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, lattice_density, num_values
from numpyro_score.kernels.discrete import DiscreteKernel
from numpyro_score.kernels.langevin import Chains, LogDensity
from numpyro_score.kernels.lattice import Lattice
from numpyro_score.losses.base import required, set_counts
from numpyro_score.losses.terms import require_flat

__all__ = ["CD", "ChainKernel", "check_kernel", "require_movable", "run_chains"]

NO_OBJECTIVE = "its value is an energy gap and no objective, and only its gradient means anything"
RUN_AWAY = (
    "the chains have run away or are stuck: the density has no normaliser at these parameters, or the steps of the "
    "kernel are too large for it"
)


_RUNS_AWAY = 1000.0
"""Nats per dimension that chains from the data lose on average if they run away; from a mode they lose about ½."""


@runtime_checkable
class ChainKernel(Protocol):
    """A hashable kernel that moves rows independently, such as `MALA(step_size=0.1)`."""

    def chains(self, log_density: LogDensity) -> Chains:
        """The transition of chains in a density over rows, (..., D) to (...)."""
        ...


@dataclass(frozen=True)
class CD:
    r"""Contrastive divergence, CD-k [Hinton 2002]: the gradient of the likelihood by k steps of a Markov chain.

    Each row's value is the energy gap f(x̃) − f(x), where x̃ is x after k steps of the kernel in the model's own density.
    The parameters enter through the two densities alone; no gradient passes through the chains. So the gradient,
    ∇f(x̃) − ∇f(x) on average, is that of the negative log likelihood, E_model ∇f − ∇f(x), up to a bias:

    - k is finite, so x̃ is between the data and the model. Up to the ignored part below, CD-k descends the contraction
      KL(p‖q) − KL(p_k‖q), with p_k the law of x̃;
    - the dependence of x̃ on the parameters is ignored;
    - unadjusted Langevin chains are off by O(h) for any k. Chains with a Metropolis correction leave the model as it
      is, so that the gradient has mean zero at the true parameters.

    The value itself is no divergence and no objective: it is near zero at a good fit, may be negative, and is not on
    the Hyvärinen scale. So optimisers with a line search do not work on it, and neither do MCMC and standard errors:
    for those go on from the fit by :class:`~numpyro_score.PCD`.

    Costs k gradients in x (k + 1 with a Metropolis correction), then two densities and their gradient in the
    parameters. Returns (N,) values.

    Args:
        num_steps: k.
        kernel: an object whose `chains(log_density)` moves rows, e.g. a Langevin kernel. Its step size has the squared
            units of the data. For discrete data Gibbs(), GibbsWithGradients() or DiscreteLangevin().

    Raises:
        ValueError: for num_steps below 1.
        TypeError: for a kernel that is a class, has no method `chains` or is not hashable; when called, for a model
            with a :func:`~numpyro_score.score_factor`, whose density is unknown.
        NotImplementedError: when called, for data with a bounded or curved support, and rows that hold both discrete
            and continuous numbers.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import CD, MALA, ScoreMatching
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> x = 2.0 * jax.random.normal(jax.random.key(0), (2000,))
        >>> sm = ScoreMatching(model, loss=CD(10, kernel=MALA(step_size=2.0)), num_steps=1000)
        >>> fit = sm.run(jax.random.key(1), x, progress_bar=False)
        >>> bool(jnp.isclose(fit.estimates["tau"], 1 / jnp.mean(x**2), rtol=0.1))  # the maximum likelihood estimate
        True
    """

    num_steps: int = 10
    _: KW_ONLY
    kernel: ChainKernel | DiscreteKernel = None  # type: ignore[assignment]

    takes_discrete: ClassVar[bool] = True
    no_objective: ClassVar[str] = NO_OBJECTIVE
    no_posterior: ClassVar[str] = NO_OBJECTIVE
    no_curvature: ClassVar[str] = (
        "the gradient through its chains is stopped, so that derivatives of its gradient are wrong: go on from the "
        "estimates with PCD (init_params=fit.params), whose standard errors are those of maximum likelihood"
    )
    not_finite: ClassVar[str] = RUN_AWAY

    def __post_init__(self) -> None:
        set_counts(self, "num_steps")
        required(
            "CD",
            "kernel",
            self.kernel,
            "the step of its chains: start from CD(kernel=MALA(step_size=0.1 * float(x.var()))), in units of x²",
        )
        check_kernel("CD", self.kernel)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_movable(energy, self.kernel, "CD")
        x = energy.data
        moved = run_chains(self.kernel, energy, x, rng_key, self.num_steps)
        after, before = energy.log_density(jnp.stack([moved, x]))
        # Chains that run away need not overflow in so few steps, and their gradient would push the density further out.
        lost = energy.over_devices(jax.lax.pmean, jnp.mean(before - after))
        return jnp.where(lost < _RUNS_AWAY * energy.dim, after - before, jnp.nan)

    def check(self, energy: Energy) -> None:
        """Raises if the kernel does not move such data."""
        require_movable(energy, self.kernel, "CD")


def run_chains(
    kernel: ChainKernel | DiscreteKernel, energy: Energy, x: Float[Array, "*n d"], rng_key: Array, num_steps: int
) -> Float[Array, "*n d"]:
    """Rows (..., D) after `num_steps` of the kernel in the energy's density; no gradient passes.

    NaN if no chain can take the last step: all would accept it with probability 0, to rounding.
    """
    # The inputs are cut off so that no derivative of the chains is computed, the output in case that the model holds
    # parameters itself.
    energy, x = jax.lax.stop_gradient((energy, x))
    chains = _chains(kernel, energy, x)
    keys = jax.random.split(rng_key, num_steps)
    state, _ = jax.lax.scan(lambda state, key: (chains.step(key, state), None), chains.init(x), keys[:-1])
    # The last step is apart: its score is not used, so that unadjusted chains take no gradient there.
    state = chains.step(keys[-1], state)
    # Where every proposal is refused, whatever its chain, the gradient would be zero at any parameters.
    moved = energy.over_devices(jax.lax.pmax, jnp.max(state.accept_prob)) > 0
    return jax.lax.stop_gradient(jnp.where(moved, state.x, jnp.nan))


def _chains(kernel: Any, energy: Energy, x: Array) -> Chains:
    if not len(energy.discrete_columns):
        return kernel.chains(energy.log_density)
    low, high = energy.bounds(x.shape[-2])
    return kernel.lattice_chains(Lattice(lattice_density(energy), low, high, num_values(energy)))


def require_movable(energy: Energy, kernel: Any, owner: str) -> None:
    """Raises unless the kernel moves such data.

    Raises:
        TypeError: for a kernel of real numbers and discrete data, or the reverse.
        NotImplementedError: for rows of both, and for continuous data with a boundary or curvature.
    """
    discrete, name = bool(len(energy.discrete_columns)), type(kernel).__name__
    if energy.is_mixed:
        raise NotImplementedError(
            f"{owner} moves rows by one kernel, and these hold discrete and continuous numbers: use Mixed(ISM(), "
            "PseudoLikelihood()), or condition on one of the sites with data='...'."
        )
    if discrete and not hasattr(kernel, "lattice_chains"):
        raise TypeError(
            f"{name} moves real numbers, and site '{energy.arrays[0].name}' is discrete "
            f"({energy.arrays[0].support.kind}): write {owner}(kernel=Gibbs()), GibbsWithGradients() or "
            "DiscreteLangevin(step_size=...)."
        )
    if not discrete:
        if not hasattr(kernel, "chains"):
            raise TypeError(
                f"{name} moves integers, and {energy.arrays[0].what} is continuous: write "
                f"{owner}(kernel=MALA(step_size=...))."
            )
        require_flat(energy, owner)


def check_kernel(owner: str, kernel: Any) -> None:
    """Raises TypeError unless `kernel` can move the chains of a loss."""
    if inspect.isclass(kernel):
        raise TypeError(f"{owner} got the class {kernel.__name__} as kernel: write kernel={kernel.__name__}(...).")
    if not any(callable(getattr(kernel, method, None)) for method in ("chains", "lattice_chains")):
        raise TypeError(f"{owner} needs a kernel with a method chains(log_density), got {kernel!r}.")
    hash(kernel)  # a loss is a static argument of compiled functions
