"""Persistent contrastive divergence."""

from __future__ import annotations

import numbers
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.primitives import mutable

from numpyro_score.energy import Energy
from numpyro_score.kernels import DiscreteKernel
from numpyro_score.losses.base import require_equal_rows, required, set_counts
from numpyro_score.losses.cd import NO_OBJECTIVE, RUN_AWAY, ChainKernel, check_kernel, require_movable, run_chains

__all__ = ["CHAINS_SITE", "PCD"]

CHAINS_SITE = "pcd_chains"
"""The mutable site that holds the chains of :class:`~numpyro_score.PCD`, {"x": (C, D)}."""

_DRAWS, _GAP = 20_000, 10  # of the model for standard errors, and the least steps between two draws of one chain


@dataclass(frozen=True)
class PCD:
    r"""Persistent contrastive divergence, or stochastic maximum likelihood [Younes 1989; Tieleman 2008].

    C chains are kept from step to step and follow the model as its parameters change. Each evaluation moves them by
    `num_steps` of the kernel; then each row's value is the energy gap (1/C) Σ_c f(x̃_c) − f(x). Its gradient,
    (1/C) Σ_c ∇f(x̃_c) − ∇f(x), is that of the negative log likelihood where the chains are draws of the model. It is
    biased as far as they lag behind the parameters, by the kernel's own error, and by restarts. The number of chains
    has nothing to do with that of rows or minibatches, and rows' weights scale the gradient as they should.

    The chains are in NumPyro's mutable site `numpyro_score.losses.CHAINS_SITE`, each in a slot of its own, and so in
    `SVIState.mutable_state`: saving the state saves them. They start at the data's rows, in turn.

    The value is near zero at a good fit and is neither a divergence nor on the Hyvärinen scale: optimisers with a line
    search and MCMC do not work on it. Its second derivatives are those of the negative log likelihood, as estimated
    from the chains, E ∇²f + cov(∇f) − ∇²f(x): so `fit.stderr()` is the sandwich of the maximum likelihood estimate.
    For it the chains take more steps, until there are 20,000 draws. The noise that the chains leave in the
    estimates is not in it: let the step size of the optimiser fall to zero, as the default does.

    Called on an energy without chains, it starts new ones. Costs num_steps gradients in x of C rows (one more with a
    Metropolis correction), then N + C densities and their gradient in the parameters. Returns (N,) values.

    Args:
        num_chains: C.
        num_steps: steps of the kernel in one evaluation.
        kernel: an object whose `chains(log_density)` moves rows, as for :class:`~numpyro_score.CD`.
        restart: the probability that a chain starts anew in a step, at a random row of the data. Above zero this helps
            chains that are stuck, and they then are `num_steps / restart` steps old on average, as in CD.

    Raises:
        ValueError: for a setting out of range; when called, for a density that is not the same for all rows.
        TypeError: for a kernel that is a class, has no method `chains` or is not hashable; when called, for a model
            with a :func:`~numpyro_score.score_factor`, whose density is unknown.
        NotImplementedError: when called, for data with a bounded or curved support, and rows that hold both discrete
            and continuous numbers.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import MALA, PCD, ScoreMatching
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> x = 2.0 * jax.random.normal(jax.random.key(0), (2000,))
        >>> sm = ScoreMatching(model, loss=PCD(500, kernel=MALA(step_size=2.0)), num_steps=1000)
        >>> fit = sm.run(jax.random.key(1), x, progress_bar=False)
        >>> tau = 1 / jnp.mean(x**2)  # the maximum likelihood estimate
        >>> bool(jnp.abs(fit.estimates["tau"] - tau) < fit.stderr()["tau"])
        True
    """

    num_chains: int = 100
    num_steps: int = 1
    _: KW_ONLY
    kernel: ChainKernel | DiscreteKernel = None  # type: ignore[assignment]
    restart: float = 0.0

    takes_discrete: ClassVar[bool] = True
    no_objective: ClassVar[str] = NO_OBJECTIVE
    no_posterior: ClassVar[str] = NO_OBJECTIVE
    not_finite: ClassVar[str] = RUN_AWAY
    slots: ClassVar[tuple[str, ...]] = (CHAINS_SITE,)

    def __post_init__(self) -> None:
        set_counts(self, "num_chains", "num_steps")
        required(
            "PCD",
            "kernel",
            self.kernel,
            "the step of its chains: start from PCD(kernel=MALA(step_size=0.1 * float(x.var()))), in units of x²",
        )
        check_kernel("PCD", self.kernel)
        if not isinstance(self.restart, numbers.Real) or isinstance(self.restart, bool):
            raise TypeError(f"PCD needs a number as restart, got {self.restart!r}.")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"PCD needs a restart from 0 to 1, a probability, got {self.restart}.")

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,); the chains stay where they are."""
        self._require_suitable(energy)
        if CHAINS_SITE not in energy.params:
            energy = energy.with_params(self.advance(energy, rng_key))
        f = energy.log_density(energy.params[CHAINS_SITE]["x"])
        # The log of importance weights from these parameters to themselves: zero, with the mean of ∇f as its gradient
        # and E ∇²f + cov(∇f) as its Hessian, those of the log normaliser.
        still = jax.lax.stop_gradient(f)
        ratio, level = energy.over_devices(jax.lax.pmean, (jnp.mean(jnp.exp(f - still)), jnp.mean(still)))
        return level + jnp.log(ratio) - energy.log_density(energy.data)

    def declare(self, energy: Energy) -> dict[str, Any]:
        """Declares the chains as a mutable site; they start at the data's rows."""
        return {CHAINS_SITE: mutable(CHAINS_SITE, self._start(energy))}

    def advance(self, energy: Energy, rng_key: Array) -> dict[str, Any]:
        """The chains after `num_steps` of the kernel, each in its slot; restarted ones first go to a random row."""
        self._require_suitable(energy)
        which_key, row_key, chain_key = jax.random.split(rng_key, 3)
        held = energy.params.get(CHAINS_SITE)
        x = (self._start(energy) if held is None else held)["x"]
        num_chains = energy.over_devices(jax.lax.psum, len(x))
        if held is not None and num_chains != self.num_chains:
            raise ValueError(
                f"The state has {num_chains} chains, and PCD num_chains={self.num_chains}: go on with as many, or "
                "start from init_params=fit.params."
            )
        if self.restart:
            data, weights = energy.data_and_weights()
            used = jnp.sum(weights != 0)  # none, perhaps, of the rows of one device
            rows = jax.random.choice(row_key, data, (len(x),), p=(weights != 0) / jnp.maximum(used, 1))
            x = jnp.where(jax.random.bernoulli(which_key, self.restart, (len(x), 1)) & (used > 0), rows, x)
        return {CHAINS_SITE: {"x": run_chains(self.kernel, energy, x, chain_key, self.num_steps)}}

    def settle(self, energy: Energy, rng_key: Array) -> Energy:
        """The energy with many draws of the model for its chains: they go on, and the first half is dropped."""
        rounds = -(-_DRAWS // self.num_chains)

        def go_on(x: Array, key: Array) -> tuple[Array, Array]:
            x = run_chains(self.kernel, energy, x, key, max(self.num_steps, _GAP))
            return x, x

        _, draws = jax.lax.scan(go_on, energy.params[CHAINS_SITE]["x"], jax.random.split(rng_key, 2 * rounds))
        return energy.with_params({CHAINS_SITE: {"x": draws[rounds:].reshape(-1, energy.dim)}})

    def _start(self, energy: Energy) -> dict[str, Array]:
        data, weights = energy.data_and_weights()
        used = jnp.argsort(weights == 0)  # rows that count come first
        turns = jnp.arange(self.num_chains) % jnp.maximum(jnp.sum(weights != 0), 1)
        return {"x": data[used[turns]]}

    def check(self, energy: Energy) -> None:
        """Raises if the kernel does not move such data."""
        self._require_suitable(energy)

    def _require_suitable(self, energy: Energy) -> None:
        require_movable(energy, self.kernel, "PCD")
        require_equal_rows(energy, "PCD")
