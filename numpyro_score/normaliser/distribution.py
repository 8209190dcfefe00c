"""A fitted energy as a NumPyro distribution."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.energy import Energy
from numpyro_score.normaliser.coordinates import as_events, data_to_row, num_draws, row_log_jacobian, row_to_data
from numpyro_score.normaliser.partition import LogPartition
from numpyro_score.normaliser.sampling import Kernel, kernel_for, run_chains
from numpyro_score.normaliser.source import Source, density_of
from numpyro_score.random import Key, as_key

__all__ = ["EnergyDistribution"]


class EnergyDistribution(dist.Distribution):
    r"""One row of a fitted model as a NumPyro distribution, :math:`\log p(x) = f(x) - \log Z`.

    For use as a prior or likelihood inside another NumPyro model, and wherever NumPyro takes a distribution. The
    density is with respect to the measure of the data that :func:`~numpyro_score.log_partition` names, and no more
    exact than log Z, whose standard error is kept.

    log Z is a constant: the parameters of the energy are fixed. Making them random in another model would drop the
    gradient of log Z(θ) and be silently wrong, so that traced or differentiated parameters are refused; for such
    models there are :func:`~numpyro_score.generalized_bayes` and :class:`~numpyro_score.ScoreMatching`.

    `sample` draws by MCMC: from the law of the density as far as the chains have mixed, which it cannot report, and
    the draws of one call, in random order, are correlated. :func:`~numpyro_score.sample` reports.

    Args:
        energy: an energy or a fit, of one data site and with one density for all rows.
        log_partition: a result of :func:`~numpyro_score.log_partition`, or log Z where it is known. Without one
            `log_prob` raises.
        kernel, num_warmup, num_chains: for `sample`; see :func:`~numpyro_score.sample`.

    Attributes:
        log_partition: log Z, ().
        log_partition_stderr: its standard error, (); NaN if a number was given.

    Raises:
        TypeError: for traced parameters, several data sites, or a model with a score and no density.
        ValueError: if rows have densities of their own. Of `log_prob`, without log Z.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, EnergyDistribution, log_partition
        >>> def model(x):
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
        ...         numpyro.factor("energy", -2.0 * x)
        >>> energy = Energy(model, {}, jnp.array([0.5, 1.0]))
        >>> p = EnergyDistribution(energy, log_partition(energy))
        >>> bool(jnp.allclose(p.log_prob(3.0), dist.Exponential(2.0).log_prob(3.0), atol=1e-4))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("energy", "log_partition", "log_partition_stderr")
    pytree_aux_fields = ("kernel", "num_warmup", "num_chains")

    def __init__(
        self,
        energy: Source,
        log_partition: LogPartition | float | None = None,
        *,
        kernel: Kernel | None = None,
        num_warmup: int = 500,
        num_chains: int = 4,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(energy, Energy) and not energy.is_concrete:
            raise TypeError(
                "EnergyDistribution got an energy with traced parameters, but log Z is a constant of these: build it "
                "outside of jit, grad and other models, or learn the parameters by ScoreMatching or generalized_bayes."
            )
        self.energy = energy = density_of(energy)
        if len(arrays := energy.arrays) > 1:
            raise TypeError(f"The data are several sites, {[a.name for a in arrays]}: join them in one site.")
        value, stderr = log_partition[:2] if isinstance(log_partition, tuple) else (log_partition, math.nan)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"log_partition must be a finite number, got {value}.")
        self.log_partition = None if value is None else jnp.asarray(value, energy.dtype)
        self.log_partition_stderr = jnp.asarray(stderr, energy.dtype)
        self.kernel, self.num_warmup, self.num_chains = kernel_for(energy, kernel), num_warmup, num_chains
        shape = jax.eval_shape(partial(self._event, energy), jnp.zeros(energy.dim, energy.dtype)).shape
        super().__init__((), shape, validate_args=validate_args)

    def __repr__(self) -> str:
        return f"EnergyDistribution({self.energy}, log_partition={self.log_partition}, event_shape={self.event_shape})"

    @staticmethod
    def _event(energy: Energy, row: Float[Array, "d"]) -> Array:
        (value,) = row_to_data(energy, row).values()
        return value

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """That of the data site, over its whole event."""
        support = self.energy.support
        missing = len(self.event_shape) - support.event_dim
        return constraints.independent(support, missing) if missing else support

    def log_prob(self, value: Any) -> Array:
        """Normalised log density of events, (..., event shape) to (...).

        Raises:
            ValueError: if no log Z was given, or the value has another event shape.
        """
        if self.log_partition is None:
            raise ValueError(
                "EnergyDistribution has no log Z, so that its density is unknown: pass "
                "log_partition=log_partition(energy)."
            )
        energy = _fixed(self.energy)
        (name,) = (a.name for a in energy.arrays)

        def one(event: Array) -> Array:
            row = data_to_row(energy, {name: event})
            return energy.log_density(row) - row_log_jacobian(energy, row)

        events, batch = as_events(energy, self.event_shape, value)
        if not len(events):
            return jnp.zeros(batch, energy.dtype)
        if self._validate_args:
            self._validate_sample(events)
        return jax.vmap(one)(events).reshape(batch) - self.log_partition

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Approximate draws, (sample shape, event shape), by MCMC from rows of the energy's data."""
        n = num_draws("EnergyDistribution", sample_shape)
        if n == 0:
            return jnp.zeros((*sample_shape, *self.event_shape), self.energy.dtype)
        chains = min(n, self.num_chains)
        run_key, order_key = jax.random.split(as_key(key))
        rows, _ = run_chains(self.energy, run_key, self.kernel, -(-n // chains), chains, self.num_warmup)
        rows = jax.random.permutation(order_key, rows.reshape(-1, self.energy.dim))[:n]
        return jax.vmap(partial(self._event, self.energy))(rows).reshape(*sample_shape, *self.event_shape)


@jax.custom_jvp
def _fixed(energy: Energy) -> Energy:
    """The energy itself, which must not be differentiated."""
    return energy


@partial(_fixed.defjvp, symbolic_zeros=True)
def _fixed_jvp(primals: tuple[Energy], tangents: tuple[Any]) -> tuple[Energy, Any]:
    leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    if any(not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0 for t in leaves):
        raise TypeError(
            "The parameters of an EnergyDistribution are differentiated, but its log Z is a constant of these: learn "
            "them by ScoreMatching or generalized_bayes."
        )
    return primals[0], tangents[0]
