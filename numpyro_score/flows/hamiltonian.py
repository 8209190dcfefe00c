"""Hamiltonian flows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.flows.dynamics import DynamicsFlow, LogDensity, Trajectory, as_pytree, normal_log_prob
from numpyro_score.flows.leapfrog import Phase, Scaling, leapfrog, leapfrog_inverse

__all__ = ["HamiltonianFlow"]

_UNIT_ENTROPY = 0.5 * (1.0 + math.log(2.0 * math.pi))  # of N(0, 1)


class HamiltonianFlow(DynamicsFlow):
    r"""The law of positions and velocities after leapfrog steps, a NumPyro distribution [Dai et al. 2019].

    Draws :math:`x_0` of the base and :math:`v_0 \sim N(0, m^2)`, and takes T leapfrog steps along the score of f, with
    no Metropolis step. The steps keep volume, so that :math:`\log q(x_T, v_T) = \log q_0(x_0) + \log N(v_0)`, found
    for any value by stepping back, and the joint entropy is that of the start, :math:`H(q_0) + H(N)`. This bounds

    .. math:: \log Z = \log \int e^{f} \ge \mathrm{E}\,[f(x_T) + \log N(v_T; 0, I)] + H(q_0) + H(N).

    Velocities have unit mass; a step size for each dimension is a diagonal mass.

    With `annealing`, step k follows the bridging density :math:`(1 - \beta_k) \log q_0 + \beta_k f`. With `refreshment`
    r, every step but the first starts by drawing a share of the velocity anew: the rotation

    .. math:: v' = \sqrt{1-r}\, v + \sqrt r\, \xi, \quad \xi' = \sqrt{1-r}\, \xi - \sqrt r\, v, \quad \xi \sim N(0, I),

    which also keeps volume; the discarded :math:`\xi'` are auxiliary rows. The two together are uncorrected
    Hamiltonian annealing [Geffner & Domke 2021; Zhang et al. 2021], whose bound tightens as steps get many and small.
    Its weights exp(:meth:`log_weights`) have mean Z exactly, as those without.

    The event is (2, D): x_T and v_T; with refreshment (T + 1, D): then the discarded ξ' of steps 2 to T. Cost: T + 1
    scores of f. Inverting many steps in float32 loses digits: take float64, or the log density that
    :meth:`simulate` returns with its draws.

    Args:
        base: the law q₀ of rows, with event shape (D,).
        log_density: f, from rows (..., D) to (...), e.g. `energy.log_density`. What a bound method belongs to, or a
            `jax.tree_util.Partial` holds, passes through `jit` as arrays.
        step_size: ε, a number, or one for each dimension (D,), each step (T, 1), or both (T, D).
        num_steps: T.
        momentum_scale: m, the standard deviation of v₀; a number or (D,).
        annealing: β, (T,), between 0 and 1; all 1 if not given.
        refreshment: r, in the shapes of `step_size`, between 0 and 1; the first step has none.
        scaling: nets of the generalised step, shared by all steps. The log determinant is added to the log density,
            and the entropy is then an estimate.

    Raises:
        ValueError, TypeError: for settings out of range, or whose shapes do not fit the base.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_score import HamiltonianFlow
        >>> base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> flow = HamiltonianFlow(
        ...     base,
        ...     lambda x: -jnp.sum(x**2, -1),  # N(0, I/2), so that Z = π
        ...     step_size=0.15,
        ...     num_steps=20,
        ...     annealing=jnp.linspace(0.05, 1.0, 20),
        ...     refreshment=0.3,
        ... )
        >>> found = flow.log_partition_bound(jax.random.key(0), 4000)
        >>> bool(found.bound < jnp.log(jnp.pi)), bool(jnp.abs(found.log_partition - jnp.log(jnp.pi)) < 0.02)
        (True, True)
    """

    pytree_data_fields = ("momentum_scale", "refreshment", "scaling")

    def __init__(
        self,
        base: dist.Distribution,
        log_density: LogDensity,
        step_size: Any,
        num_steps: int,
        *,
        momentum_scale: Any = 1.0,
        annealing: Any = None,
        refreshment: Any = None,
        scaling: Scaling | None = None,
        validate_args: bool | None = None,
    ) -> None:
        num_rows = 2 if refreshment is None else num_steps + 1
        super().__init__(base, log_density, step_size, num_steps, annealing, num_rows, validate_args)
        self.momentum_scale = jnp.asarray(momentum_scale)
        if self.momentum_scale.shape not in {(), (1,), (self.dim,)}:
            raise ValueError(
                f"HamiltonianFlow needs momentum_scale of shape () or ({self.dim},), got {self.momentum_scale.shape}."
            )
        self._refuse("momentum_scale", self.momentum_scale, lambda a: (a > 0) & np.isfinite(a), "positive")
        self.refreshment = refreshment
        if refreshment is not None:
            in_range = "between 0 and 1"
            self.refreshment = self._checked("refreshment", refreshment, lambda a: (a >= 0) & (a <= 1), in_range)
        self.scaling = None if scaling is None else Scaling(as_pytree(scaling.velocity), as_pytree(scaling.position))

    def simulate(self, rng_key: Array, sample_shape: tuple[int, ...] = ()) -> Trajectory:
        """As :meth:`DynamicsFlow.simulate`."""
        base_key, noise_key = jax.random.split(rng_key)
        x = self.base.sample(base_key, sample_shape)
        noise = random.normal(noise_key, (self.event_shape[0] - 1, *x.shape), x.dtype)
        v = self.momentum_scale * noise[0]
        start = self._start_log_prob(x, v, noise[1:])

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            phase, log_det = carry
            step_size, beta, angle, xi = inputs
            if angle is not None:
                v, xi = _rotate(phase.v, xi, *angle)
                phase = phase._replace(v=v)
            phase, more = leapfrog(self._slope, lambda s: self._force(s, beta), step_size, phase, self.scaling)
            return (phase, log_det + more), xi

        carry = Phase(x, v, self._slope(x)), jnp.zeros_like(start)
        # The first step turns nothing, so that v₀'s own noise may stand in for the noise it does not have.
        xi = None if self.refreshment is None else noise
        (phase, log_det), discarded = jax.lax.scan(step, carry, (*self._settings(), xi), unroll=self._unroll)
        rows = [phase.x[None], phase.v[None]] + ([] if discarded is None else [discarded[1:]])
        value = jnp.moveaxis(jnp.concatenate(rows), 0, -2)
        auxiliary = normal_log_prob(value[..., 1:, :]).sum(-1)
        return Trajectory(value, start - log_det, phase.at.log_density, auxiliary)

    def log_prob(
        self, value: Float[Array, "*batch k d"], intermediates: list[Any] | None = None
    ) -> Float[Array, "*batch"]:
        """The density log q of x_T, v_T and the discarded noise: (..., K, D) to (...), by stepping back."""
        if intermediates:
            return intermediates[0]
        rows = jnp.moveaxis(value, -2, 0)

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            phase, log_det = carry
            step_size, beta, angle, xi = inputs
            phase, more = leapfrog_inverse(self._slope, lambda s: self._force(s, beta), step_size, phase, self.scaling)
            if angle is not None:
                cos, sin = angle
                v, xi = _rotate(phase.v, xi, cos, -sin)
                phase = phase._replace(v=v)
            return (phase, log_det + more), xi

        carry = Phase(rows[0], rows[1], self._slope(rows[0])), jnp.zeros_like(rows[0, ..., 0])
        discarded = None if self.refreshment is None else rows[1:]  # the first step turns nothing, whatever its row
        (phase, log_det), xi = jax.lax.scan(step, carry, (*self._settings(), discarded), reverse=True)
        noise = rows[:0] if xi is None else xi[1:]
        return self._start_log_prob(phase.x, phase.v, noise) - log_det

    def _start_log_prob(self, x: Array, v: Array, noise: Float[Array, "k *batch d"]) -> Float[Array, "*batch"]:
        return self.base.log_prob(x) + normal_log_prob(v, self.momentum_scale) + normal_log_prob(noise).sum(0)

    def _settings(self) -> tuple[Any, ...]:
        """By step: the step size, β, and the cosine and sine of the refreshment's rotation; the first turns nothing."""
        if self.refreshment is None:
            return self._per_step(self.step_size), self.annealing, None
        share = self._per_step(self.refreshment)
        cos, sin = jnp.sqrt(1.0 - share).at[0].set(1.0), jnp.sqrt(share).at[0].set(0.0)
        return self._per_step(self.step_size), self.annealing, (cos, sin)

    def _noise_entropy(self) -> Float[Array, ""]:
        unit = _UNIT_ENTROPY * (self.event_shape[0] - 1) * self.dim
        return unit + jnp.broadcast_to(jnp.log(self.momentum_scale), (self.dim,)).sum()

    def _exact_entropy(self) -> Array | None:
        return super()._exact_entropy() if self.scaling is None else None


def _rotate(v: Array, xi: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    return cos * v + sin * xi, cos * xi - sin * v
