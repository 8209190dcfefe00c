"""What the flows share: a base, a density, steps along its score, and weights for its normaliser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import Partial
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.energy import base_constraint, innermost
from numpyro_score.flows.weights import WeightSummary, summarize_weights
from numpyro_score.operators import value_score
from numpyro_score.random import Key, as_key

__all__ = ["DynamicsFlow", "LogDensity", "Slope", "Trajectory", "as_pytree", "normal_log_prob"]

LogDensity = Callable[[Float[Array, "*batch d"]], Float[Array, "*batch"]]


class Slope(NamedTuple):
    """The density at a point."""

    log_density: Float[Array, "*batch"]  # f
    score: Float[Array, "*batch d"]  # ∇f
    base_score: Float[Array, "*batch d"] | None  # of the log density of the base, if that is annealed


class Trajectory(NamedTuple):
    """Draws of a flow, with densities that their simulation gave on the way."""

    value: Float[Array, "*batch k d"]  # x after the last step, then the auxiliary rows
    log_prob: Float[Array, "*batch"]  # of `value` under the flow
    log_density: Float[Array, "*batch"]  # f(x)
    log_auxiliary: Float[Array, "*batch"]  # a normalised density of the auxiliary rows, given x

    @property
    def log_weights(self) -> Float[Array, "*batch"]:
        """Log importance weights: E[exp] = Z = ∫ exp f, so that their mean is a lower bound of log Z."""
        return self.log_density + self.log_auxiliary - self.log_prob


class DynamicsFlow(dist.Distribution):
    """A distribution of rows x and auxiliary rows that dynamics along the score of f push forward from a base.

    The event is (K, D): row 0 is x after the last step, the others are auxiliary. Subclasses say by
    :meth:`simulate`, :meth:`log_prob` and :meth:`_noise_entropy` what the dynamics are.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_matrix
    pytree_data_fields: tuple[str, ...] = ("base", "log_density", "step_size", "annealing")
    pytree_aux_fields = ("num_steps",)

    def __init__(
        self,
        base: dist.Distribution,
        log_density: LogDensity,
        step_size: Any,
        num_steps: int,
        annealing: Any,
        num_rows: int,
        validate_args: bool | None,
    ) -> None:
        name = type(self).__name__
        if len(base.event_shape) != 1:
            raise ValueError(
                f"{name} needs a base with one event dimension, got event_shape {base.event_shape}: write e.g. "
                "dist.Normal(0, 1).expand([2]).to_event(1)."
            )
        if not _covers_space(base):
            raise ValueError(
                f"{name} needs a base with a density on all of R^D, or its weights miss part of Z; got {base}, on "
                f"{base.support}: write e.g. dist.Normal(0, 1).expand([2]).to_event(1)."
            )
        if not callable(log_density):
            raise TypeError(
                f"{name} needs a function of rows as log_density, got {log_density!r}: write e.g. energy.log_density."
            )
        if isinstance(num_steps, bool) or num_steps != int(num_steps) or num_steps < 1:
            raise ValueError(f"{name} needs a positive integer as num_steps, got {num_steps}.")
        self.base, self.log_density, self.num_steps = base, as_pytree(log_density), int(num_steps)
        self.step_size = self._checked("step_size", step_size, lambda a: (a > 0) & np.isfinite(a), "positive")
        self.annealing = annealing
        if annealing is not None:
            self.annealing = jnp.asarray(annealing)
            if self.annealing.shape != (num_steps,):
                raise ValueError(
                    f"{name} needs annealing of shape ({num_steps},), one for each step, got {self.annealing.shape}: "
                    f"write e.g. jnp.linspace(0, 1, {num_steps + 1})[1:]."
                )
            self._refuse("annealing", self.annealing, lambda a: (a >= 0) & (a <= 1), "between 0 and 1")
        super().__init__(base.batch_shape, (num_rows, base.event_shape[0]), validate_args=validate_args)

    def __repr__(self) -> str:
        batch = f", batch shape {self.batch_shape}" if self.batch_shape else ""
        return f"{type(self).__name__} of {self.num_steps} steps, event shape {self.event_shape}{batch}"

    @property
    def dim(self) -> int:
        """D, the numbers in one row."""
        return self.base.event_shape[0]

    @property
    def has_rsample(self) -> bool:
        """Whether gradients pass through draws of the base."""
        return self.base.has_rsample

    # -- what a flow is for ---------------------------------------------------------------------------------------

    def simulate(self, rng_key: Array, sample_shape: tuple[int, ...] = ()) -> Trajectory:
        """Draws, and the densities that come with them; num_steps + 1 scores of f."""
        raise NotImplementedError

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*batch k d"]:
        """Draws of x and the auxiliary rows, (..., K, D)."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: Array | None, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "*batch k d"], list[Any]]:
        """Draws with their log density, which :meth:`log_prob` then need not find by inversion."""
        assert key is not None
        trajectory = self.simulate(key, sample_shape)
        return trajectory.value, [trajectory.log_prob]

    def entropy(self, rng_key: Key | None = None, num_samples: int = 1000) -> Float[Array, "*batch"]:
        """The entropy of x and the auxiliary rows jointly, (...).

        Exact where the flow keeps volume and NumPyro knows the base's entropy: then it is that of what is pushed
        forward. Otherwise the mean of −log q over draws, which is unbiased.

        Args:
            rng_key: only for the estimate.
            num_samples: of the estimate.

        Raises:
            ValueError: if there is nothing exact and no key.
        """
        exact = self._exact_entropy()
        if exact is not None:
            return exact
        if rng_key is None:
            raise ValueError(
                f"The entropy of this {type(self).__name__} is not known exactly, as its base ({self.base}) has none "
                "or its steps are scaled: pass a key, entropy(rng_key), for an estimate."
            )
        return -jnp.mean(self.simulate(as_key(rng_key), (num_samples,)).log_prob, axis=0)

    def log_weights(self, rng_key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*batch"]:
        """Log importance weights of independent draws, (...): the mean of their exp is unbiased for Z = ∫ exp f."""
        return self.simulate(as_key(rng_key), sample_shape).log_weights

    def log_partition_bound(self, rng_key: Key, num_samples: int = 1000) -> WeightSummary:
        """The bound E[log w] ≤ log Z and the importance-weighted estimate of log Z, with standard errors.

        They are NaN or infinite where a trajectory ran away.
        """
        return summarize_weights(self.log_weights(rng_key, (num_samples,)))

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _noise_entropy(self) -> Float[Array, ""]:
        """The entropy of what is pushed forward beside the base."""
        raise NotImplementedError

    def _exact_entropy(self) -> Array | None:
        try:
            return self.base.entropy() + self._noise_entropy()
        except NotImplementedError:  # NumPyro has no other way to tell
            return None

    def _slope(self, x: Array) -> Slope:
        value, score = value_score(self.log_density, x)
        if value.shape != x.shape[:-1]:
            raise ValueError(
                f"log_density gave shape {value.shape} for rows of shape {x.shape}: return one value for each row."
            )
        return Slope(value, score, None if self.annealing is None else value_score(self.base.log_prob, x)[1])

    @staticmethod
    def _force(slope: Slope, beta: Array | None) -> Array:
        """The score of the bridging density (1 − β) log base + β f."""
        if beta is None or slope.base_score is None:
            return slope.score
        return beta * slope.score + (1 - beta) * slope.base_score

    @property
    def _unroll(self) -> bool:
        # Unrolled, an update of an adversarial fit took half the time (D = 16, five steps, width 128, on a CPU); many
        # steps would take long to compile.
        return self.num_steps <= 8

    def _per_step(self, value: Array) -> Float[Array, "t d"]:
        return jnp.broadcast_to(value, (self.num_steps, self.dim))

    def _checked(self, argument: str, value: Any, valid: Callable[[Any], Any], wanted: str) -> Array:
        """A setting of the steps: a number, or one for each dimension (D,), step (T, 1) or both (T, D)."""
        array, steps, dim = jnp.asarray(value), self.num_steps, self.base.event_shape[0]
        if array.shape not in {(), (1,), (dim,), (1, 1), (1, dim), (steps, 1), (steps, dim)}:
            raise ValueError(
                f"{type(self).__name__} needs {argument} of shape (), ({dim},), ({steps}, 1) or ({steps}, {dim}): a "
                f"number, one for each dimension, each step, or both; got {array.shape}."
            )
        self._refuse(argument, array, valid, wanted)
        return array

    def _refuse(self, argument: str, array: Array, valid: Callable[[Any], Any], wanted: str) -> None:
        if not isinstance(array, jax.core.Tracer) and not np.all(valid(np.asarray(array))):
            raise ValueError(f"{type(self).__name__} needs {argument} {wanted}, got {np.asarray(array).tolist()}.")


def _covers_space(base: dist.Distribution) -> bool:
    return base_constraint(base.support) == constraints.real and not isinstance(innermost(base), dist.Delta)


def normal_log_prob(value: Float[Array, "*batch d"], scale: Any = 1.0) -> Float[Array, "*batch"]:
    """The density log N(value; 0, scale²), summed over the last axis: (..., D) to (...)."""
    return dist.Normal(0.0, scale).log_prob(value).sum(-1)


def as_pytree(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function that passes through `jit`: what a method is bound to, if that is a pytree, becomes its leaves."""
    if not jax.tree_util.all_leaves([f]):
        return f
    if inspect.ismethod(f) and not jax.tree_util.all_leaves([f.__self__]):
        return Partial(f.__func__, f.__self__)
    return Partial(f)
