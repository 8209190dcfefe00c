"""Langevin flows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.flows.dynamics import DynamicsFlow, LogDensity, Trajectory, normal_log_prob

__all__ = ["LangevinFlow"]


class LangevinFlow(DynamicsFlow):
    r"""The law of Langevin paths, a NumPyro distribution of the last point and all increments [Dai et al. 2019].

    Draws :math:`x_0` of the base and moves it T times along the score of f with step size h,

    .. math:: v_i = h \nabla f(x_{i-1}) + \eta_i, \quad \eta_i \sim N(0, 2h), \quad x_i = x_{i-1} + v_i.

    The map from :math:`(x_0, \eta_1, \dots, \eta_T)` to :math:`(x_T, v_1, \dots, v_T)` has unit Jacobian, so that the
    log density of a path is that of its start and noise, and the joint entropy is exact.

    The log weights of the normaliser compare the increments with the same dynamics run backwards,
    :math:`-v_i \sim N(h \nabla f(x_i), 2h)`, which becomes exact for small h. Without `annealing` a path of small steps
    weighs no more than its start; with it, step i follows :math:`(1 - \beta_i) \log q_0 + \beta_i f`, and the bound
    tightens as steps get many and small.

    The event is (T + 1, D): x_T, then v_1 to v_T. Cost: T + 1 scores of f.

    Args:
        base: the law q₀ of rows, with event shape (D,).
        log_density: f, from rows (..., D) to (...), e.g. `energy.log_density`.
        step_size: h, a number, or one for each dimension (D,), each step (T, 1), or both (T, D), in squared units of x.
            The other common form, with step ε/2 and noise √ε, is ε = 2h.
        num_steps: T.
        annealing: β, (T,), between 0 and 1; all 1 if not given.

    Raises:
        ValueError, TypeError: for settings out of range, or whose shapes do not fit the base.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_score import LangevinFlow
        >>> base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> flow = LangevinFlow(base, lambda x: -jnp.sum(x**2, -1), 0.05, 3)
        >>> path = flow.sample(jax.random.key(0))
        >>> x = path[0] - jnp.cumsum(path[:0:-1], 0)[::-1]  # x₀ to x₂
        >>> noise = path[1:] + 0.05 * 2 * x
        >>> by_hand = base.log_prob(x[0]) + dist.Normal(0.0, 0.1**0.5).log_prob(noise).sum()
        >>> bool(jnp.isclose(flow.log_prob(path), by_hand))
        True
    """

    def __init__(
        self,
        base: dist.Distribution,
        log_density: LogDensity,
        step_size: Any,
        num_steps: int,
        *,
        annealing: Any = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(base, log_density, step_size, num_steps, annealing, num_steps + 1, validate_args)

    def simulate(self, rng_key: Array, sample_shape: tuple[int, ...] = ()) -> Trajectory:
        """As :meth:`DynamicsFlow.simulate`."""
        base_key, noise_key = jax.random.split(rng_key)
        x = self.base.sample(base_key, sample_shape)
        unit = random.normal(noise_key, (self.num_steps, *x.shape), x.dtype)
        noise = _steps_first(self._noise_scale, x) * unit

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, slope, backward = carry
            h, beta, eta = inputs
            v = h * self._force(slope, beta) + eta
            x = x + v
            slope = self._slope(x)
            backward += normal_log_prob(v + h * self._force(slope, beta), jnp.sqrt(2.0 * h))
            return (x, slope, backward), v

        start = self.base.log_prob(x)
        carry = x, self._slope(x), jnp.zeros_like(start)
        settings = self._per_step(self.step_size), self.annealing, noise
        (last, slope, backward), v = jax.lax.scan(step, carry, settings, unroll=self._unroll)
        value = jnp.moveaxis(jnp.concatenate([last[None], v]), 0, -2)
        return Trajectory(value, start + self._noise_log_prob(noise), slope.log_density, backward)

    def log_prob(
        self, value: Float[Array, "*batch k d"], intermediates: list[Any] | None = None
    ) -> Float[Array, "*batch"]:
        """The density log q of a path, its last point and its increments: (..., T + 1, D) to (...)."""
        if intermediates:
            return intermediates[0]
        rows = jnp.moveaxis(value, -2, 0)
        last, v = rows[0], rows[1:]
        x = last - jnp.flip(jnp.cumsum(jnp.flip(v, 0), 0), 0)  # x_0 to x_{T−1}
        beta = None if self.annealing is None else _steps_first(self.annealing[:, None], last)
        eta = v - _steps_first(self._per_step(self.step_size), last) * self._force(self._slope(x), beta)
        return self.base.log_prob(x[0]) + self._noise_log_prob(eta)

    @property
    def _noise_scale(self) -> Float[Array, "t d"]:
        return jnp.sqrt(2.0 * self._per_step(self.step_size))

    def _noise_log_prob(self, noise: Float[Array, "t *batch d"]) -> Float[Array, "*batch"]:
        return normal_log_prob(noise, _steps_first(self._noise_scale, noise[0])).sum(0)

    def _noise_entropy(self) -> Float[Array, ""]:
        return dist.Normal(0.0, self._noise_scale).entropy().sum()


def _steps_first(setting: Float[Array, "t k"], x: Float[Array, "*batch d"]) -> Float[Array, "t *ones k"]:
    """A setting by step, so that it broadcasts with (T, *x.shape)."""
    return setting.reshape(len(setting), *[1] * (x.ndim - 1), -1)
