"""What all kernels share: their state, and the way from a model or a potential to a step of many chains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int
from numpyro.infer.mcmc import MCMCKernel

from numpyro_score.kernels.langevin import Chains, ChainState, Evaluate, LogDensity, MomentumState, start
from numpyro_score.kernels.potential import ModelPotential, is_concrete
from numpyro_score.kernels.schedules import Schedule
from numpyro_score.printed import without_addresses

__all__ = ["Anchor", "ChainsKernel", "GradientKernel", "KernelState", "batch_shape", "check_number", "first"]


class Anchor(NamedTuple):
    """The energy on all rows at the centre of control variates."""

    x: Float[Array, "*chains d"]
    log_density: Float[Array, "*chains"]
    score: Float[Array, "*chains d"]


class KernelState(NamedTuple):
    """The state of a kernel; `*chains` is empty, or the number of vectorised chains.

    The potential energy and the score are those at `z`, on the rows drawn for the next step.
    """

    z: Any  # position in unconstrained space, a pytree of (*chains, ...)
    chain: Any  # ChainState or MomentumState: the same position as rows (*chains, D), and what is known there
    i: Int[Array, "*chains"]  # steps taken, warm-up included
    step_size: Float[Array, "*chains"]  # h of the last step
    temperature: Float[Array, "*chains"]  # T
    effective_temperature: Float[Array, "*chains"]  # of the last step
    minibatch_gradients: Int[Array, "*chains"]  # evaluated so far
    full_gradients: Int[Array, "*chains"]
    anchor: Anchor | None  # of control variates
    preconditioner: Any  # of the kernel's own
    rng_key: Array  # one for each chain

    @property
    def potential_energy(self) -> Float[Array, "*chains"]:
        """U(z), or the estimate of it that the next step uses."""
        return -self.chain.log_density

    @property
    def accept_prob(self) -> Float[Array, "*chains"]:
        """Of the last step; 1 without a Metropolis correction."""
        return self.chain.accept_prob

    @property
    def diverging(self) -> Bool[Array, "*chains"]:
        """Whether the energy or its gradient is not finite."""
        return self.chain.diverging

    @property
    def num_steps(self) -> Int[Array, "*chains"]:
        """1, as ArviZ counts gradients within a draw."""
        return jnp.ones_like(self.i)


class ChainsKernel(MCMCKernel):
    """A kernel that holds settings only: all that a run finds out is in its state, whose positions are `z`."""

    sample_field = "z"
    default_fields = ("z", "diverging")
    # MCMC starts a kernel without this private name anew at a warm restart, for which there may be no init_params.
    _sample_fn = True


class GradientKernel(ChainsKernel):
    """A kernel whose step takes one gradient."""

    stats = (
        "potential_energy",
        "accept_prob",
        "step_size",
        "temperature",
        "effective_temperature",
        "num_steps",
        "minibatch_gradients",
        "full_gradients",
    )
    """What else `MCMC.run(..., extra_fields=kernel.stats)` can collect."""

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Any] | None,
        step_size: float | Array | Schedule,
        temperature: float | Array,
        init_strategy: Callable[..., Any],
    ) -> None:
        if model is not None and potential_fn is not None:
            raise ValueError(f"{type(self).__name__} takes either `model` or `potential_fn`, got both: leave one out.")
        if not callable(step_size):
            check_number("step_size", step_size, lambda h: h > 0, "positive")
        check_number("temperature", temperature, lambda t: t >= 0, "non-negative")
        self.model, self.potential_fn = model, potential_fn
        self.step_size, self.temperature, self.init_strategy = step_size, temperature, init_strategy

    def __repr__(self) -> str:
        return f"{type(self).__name__}(step_size={without_addresses(self.step_size)})"

    # -- of each kernel -------------------------------------------------------------------------

    @abstractmethod
    def chains(self, log_density: LogDensity) -> Chains:
        """The same transition of many independent chains over rows, for a log density (..., D) to (...)."""

    @abstractmethod
    def _step(self, evaluate: Evaluate, rng_key: Array, state: KernelState, step_size: Array) -> KernelState:
        """The state with chain, effective temperature and preconditioner after a step of size (*chains, 1)."""

    def _start(self, evaluate: Evaluate, x: Array) -> ChainState | MomentumState:
        return start(evaluate, x)

    def _check_model(self, target: ModelPotential) -> None:
        target.check_plates()

    def _anchor(self, target: ModelPotential | None) -> Anchor | None:
        return None

    def _preconditioner(self, evaluate: Evaluate, rng_key: Array, chain: Any, step_size: Array, num_warmup: int) -> Any:
        return None

    # -- NumPyro's interface --------------------------------------------------------------------

    def postprocess_fn(self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None) -> Callable[..., Any]:
        """From an unconstrained position to sites in their supports, with the deterministic ones."""
        target = self._target(model_args, model_kwargs)
        return (lambda z: z) if target is None else target.constrain

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> KernelState:
        """The state at `init_params`, or where `init_strategy` puts it; a batch of keys makes a batch of chains.

        Raises:
            ValueError: if the energy or its gradient is not finite there, and for models that the kernel cannot take.
        """
        batch = batch_shape(rng_key)
        target = self._target(model_args, model_kwargs)
        run_key, init_key, first_key, probe_key, noise_key = _split(rng_key, 5)
        if target is not None:
            self._check_model(target)
        if init_params is not None:
            if target is not None:
                target.check_names(init_params, "init_params")
            z = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), init_params)
        elif target is not None:
            z = target.initial(init_key, self.init_strategy)
        else:
            raise ValueError(
                f"{type(self).__name__} with a potential_fn needs init_params: write e.g. "
                "mcmc.run(key, init_params=...), with one row per chain if there are several."
            )
        x, unravel = _ravel(z, batch)
        anchor = self._anchor(target)
        if anchor is not None:
            anchor = jax.tree.map(lambda a: jnp.broadcast_to(a, (*batch, *a.shape)), anchor)
        evaluate = self._evaluate(target, unravel, anchor, first(first_key, batch))
        if target is not None:
            evaluate = jax.jit(evaluate)  # a model is slow to run, and a subsample to draw, one operation at a time
        chain = self._start(evaluate, x)
        if is_concrete(chain):
            _check_start(target, z, chain, batch)
        zero = jnp.zeros(batch, int)
        step_size = self._step_size_at(zero, x.dtype)
        preconditioner = self._preconditioner(
            self._evaluate(target, unravel, anchor, first(probe_key, batch)),
            first(noise_key, batch), chain, step_size[..., None], num_warmup,
        )  # fmt: skip
        minibatch, full = (n * (1 if preconditioner is None else 2) for n in self._gradients(target, anchor))
        temperature = jnp.broadcast_to(jnp.asarray(self.temperature, x.dtype), batch)
        return KernelState(
            z=z, chain=chain, i=zero, step_size=step_size, temperature=temperature,
            effective_temperature=temperature, minibatch_gradients=zero + minibatch,
            full_gradients=zero + full + (anchor is not None), anchor=anchor,
            preconditioner=preconditioner, rng_key=run_key,
        )  # fmt: skip

    def sample(
        self, state: KernelState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> KernelState:
        """One step of every chain."""
        batch = batch_shape(state.rng_key)
        target = self._target(model_args, model_kwargs)
        unravel = _ravel(state.z, batch)[1]
        # One key serves all chains, whose noise is drawn at once; the count makes the two of a step new.
        rng_key, i = first(state.rng_key, batch), first(state.i, batch)
        noise_key, evaluate_key = jax.random.fold_in(rng_key, 2 * i), jax.random.fold_in(rng_key, 2 * i + 1)
        step_size = self._step_size_at(state.i, state.chain.x.dtype)
        evaluate = self._evaluate(target, unravel, state.anchor, evaluate_key)
        new = self._step(evaluate, noise_key, state, step_size[..., None])
        minibatch, full = self._gradients(target, state.anchor)
        return new._replace(
            z=jax.vmap(unravel)(new.chain.x) if batch else unravel(new.chain.x), i=state.i + 1, step_size=step_size,
            minibatch_gradients=state.minibatch_gradients + minibatch, full_gradients=state.full_gradients + full,
        )  # fmt: skip

    # -- parts ----------------------------------------------------------------------------------

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> ModelPotential | None:
        if self.model is None and self.potential_fn is None:
            name = type(self).__name__
            raise ValueError(f"{name} has nothing to sample: write {name}(model, ...) or {name}(potential_fn=...).")
        return None if self.model is None else ModelPotential(self.model, args, kwargs)

    def _potential(self, target: ModelPotential | None, rng_key: Array, z: Any) -> Float[Array, ""]:
        return cast(Callable[..., Any], self.potential_fn)(z) if target is None else target(rng_key, z)

    def _evaluate(
        self, target: ModelPotential | None, unravel: Callable[[Array], Any], anchor: Anchor | None, rng_key: Array
    ) -> Evaluate:
        """Log density and score of rows (*chains, D), each chain on data rows of its own."""

        def of_one(rng_key: Array, x: Array, anchor: Anchor | None) -> tuple[Array, Array]:
            f = jax.value_and_grad(lambda x: -self._potential(target, rng_key, unravel(x)))
            if anchor is None:
                return f(x)
            (value, value_0), (score, score_0) = jax.vmap(f)(jnp.stack([x, anchor.x]))  # on the same data rows
            return value - value_0 + anchor.log_density, score - score_0 + anchor.score

        def evaluate(x: Array) -> tuple[Array, Array]:
            if x.ndim == 1:
                return of_one(rng_key, x, anchor)
            return jax.vmap(of_one)(jax.random.split(rng_key, x.shape[0]), x, anchor)

        return evaluate

    def _gradients(self, target: ModelPotential | None, anchor: Anchor | None) -> tuple[int, int]:
        """How many gradients on a subsample and on all rows a step takes."""
        if target is None or not target.plates:
            return 0, 1
        return (1 if anchor is None else 2), 0

    def _step_size_at(self, i: Array, dtype: Any) -> Float[Array, "*chains"]:
        step_size = self.step_size(i) if callable(self.step_size) else self.step_size
        return jnp.broadcast_to(jnp.asarray(step_size, dtype), i.shape)

    def _constant_step_size(self) -> float | Array:
        if callable(self.step_size):
            raise ValueError(
                f"{type(self).__name__}.chains takes a step_size that is a number, got a schedule: chains over rows do "
                "not count their steps."
            )
        return self.step_size


def check_number(name: str, value: Any, holds: Callable[[Any], bool], range_: str) -> None:
    """Raises ValueError unless `value` is one finite number in the range; says nothing of traced values."""
    if not is_concrete(value):
        return
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim != 0 or not (np.isfinite(array) and holds(array)):
        raise ValueError(f"{name} must be one {range_} number, got {value}.")


def _check_start(target: ModelPotential | None, z: Any, chain: Any, batch: tuple[int, ...]) -> None:
    if not np.any(chain.diverging):
        return
    which = int(np.argmax(chain.diverging))
    value, at = -np.reshape(chain.log_density, -1)[which], f" of chain {which}" if batch else ""
    position = jax.tree.map(lambda a: a[which], z) if batch else z
    sites = [f"site '{name}'" for name in target.not_finite(position)] if target is not None else []
    what = f"potential energy{' of ' * bool(sites)}{', '.join(sites)} is {value}"
    if np.isfinite(value):
        what = "gradient of the potential energy is not finite"
    raise ValueError(
        f"The {what} at the start{at}: give other init_params or another init_strategy, or correct the density there."
    )


def _ravel(z: Any, batch: tuple[int, ...]) -> tuple[Array, Callable[[Array], Any]]:
    """Positions as rows (*chains, D), and the way back for one chain."""
    unravel = ravel_pytree(first(z, batch))[1]
    return (jax.vmap(lambda z: ravel_pytree(z)[0])(z) if batch else ravel_pytree(z)[0]), unravel


def batch_shape(rng_key: Array) -> tuple[int, ...]:
    """Of a key, or of a batch of keys; a raw key has an axis of its own."""
    return rng_key.shape if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else rng_key.shape[:-1]


def first(tree: Any, batch: tuple[int, ...]) -> Any:
    """Of the first of a batch of chains, or of the one chain."""
    return jax.tree.map(lambda a: a[0], tree) if batch else tree


def _split(rng_key: Array, num: int) -> list[Array]:
    """Each of a batch of keys, or the one key, into `num`."""
    if not batch_shape(rng_key):
        return list(jax.random.split(rng_key, num))
    keys = jax.vmap(lambda key: jax.random.split(key, num))(rng_key)
    return [keys[:, i] for i in range(num)]
