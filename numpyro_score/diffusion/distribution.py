"""A model of every noise level as a NumPyro distribution."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score.diffusion.codes import decoded
from numpyro_score.diffusion.flow import Flow, Settings, prepared, require_solved, solve
from numpyro_score.diffusion.sde import SDE, VP
from numpyro_score.diffusion.source import NoisyModel, as_data
from numpyro_score.energy import Energy
from numpyro_score.normaliser.coordinates import as_events, data_to_row, num_draws, row_log_jacobian
from numpyro_score.normaliser.source import Source
from numpyro_score.random import Key, as_key

__all__ = ["ScoreDistribution"]


class ScoreDistribution(dist.Distribution):
    r"""One row of a model of every noise level as a NumPyro distribution, normalised by the probability flow.

    For use as a prior or likelihood inside another NumPyro model, and wherever NumPyro takes a distribution. `log_prob`
    is the value of :func:`~numpyro_score.flow_log_prob` with an exact divergence, and so the same at every call;
    `sample` draws independent standard normal codes and takes them to data as :func:`~numpyro_score.flow_decode` does.
    Both are of the data with the noise `smallest_sigma`.

    The derivative of `log_prob` is by default the model's score at the smallest noise, which is that of the density if
    the levels belong together, and costs no adjoint. Under NUTS and HMC any force leaves the posterior exact, as the
    acceptance goes by values: a force that differs costs acceptance only. SVI and optimisers follow the force: where
    the levels may not belong together, `adjoint="recursive"` differentiates the flow itself.

    The parameters of the model are fixed. To learn them through the density, differentiate
    :func:`~numpyro_score.flow_log_prob`.

    Args:
        source: a fit or an energy, of one data site and with one density for all rows.
        sde, noise_range, solver, rtol, atol: as in :func:`~numpyro_score.flow_log_prob`.
        adjoint: "score", or as in :func:`~numpyro_score.flow_log_prob`.

    Attributes:
        energy: the model at the smallest noise.
        smallest_sigma: the noise with which this is the law of the data.

    Raises:
        TypeError: for traced parameters or several data sites, and else as :func:`~numpyro_score.flow_log_prob`; of
            `log_prob`, where the parameters of the model are differentiated.
        ValueError: as :func:`~numpyro_score.flow_log_prob`; of `log_prob`, for a value of another event shape.
        FloatingPointError: of `sample` and `log_prob`, if a solution does not arrive. Where traced, as under NUTS, its
            value is NaN, which samplers take for a divergence.

    Warns:
        UserWarning: once, when it is built, as :func:`~numpyro_score.flow_log_prob`.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, ScoreDistribution
        >>> def model(x, sigma=1.0):  # a standard normal law with noise, without its normaliser
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))
        >>> p = ScoreDistribution(Energy(model, {}, jnp.array([-1.0, 1.0])), noise_range=(0.001, 100.0))
        >>> bool(jnp.allclose(p.log_prob(2.0), dist.Normal().log_prob(2.0), atol=1e-4))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("flow",)
    pytree_aux_fields = ("settings", "by_score")

    def __init__(
        self,
        source: Source,
        *,
        sde: SDE = VP(),  # noqa: B008
        noise_range: tuple[float, float] | None = None,
        solver: str = "dopri8",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        adjoint: Literal["score", "recursive", "backsolve", "direct"] = "score",
        validate_args: bool | None = None,
    ) -> None:
        energy = source if isinstance(source, Energy) else getattr(source, "energy", None)
        if isinstance(energy, Energy) and not energy.is_concrete:
            raise TypeError(
                "ScoreDistribution got an energy with traced parameters: build it outside of jit, grad and other "
                "models, or learn the parameters through flow_log_prob."
            )
        self.by_score = adjoint == "score"
        name = "recursive" if self.by_score else adjoint
        owner = "ScoreDistribution"
        # NumPyro's metaclass stands between the user and this.
        self.flow, self.settings = prepared(owner, source, sde, noise_range, solver, rtol, atol, name, stacklevel=4)
        if len(arrays := self.flow.model.energy.arrays) > 1:
            raise TypeError(f"The data are several sites, {[a.name for a in arrays]}: join them in one site.")
        event = partial(as_data, self.flow.model.energy)
        shape = jax.eval_shape(event, jnp.zeros(self.flow.model.dim, self.flow.model.dtype)).shape
        super().__init__((), shape, validate_args=validate_args)

    def __repr__(self) -> str:
        known = f"smallest_sigma={self.smallest_sigma}, event_shape={self.event_shape}"
        return f"ScoreDistribution({self.flow.model.energy}, {known})"

    @property
    def smallest_sigma(self) -> Float[Array, ""]:
        """The noise with which this is the law of the data, ()."""
        return self.flow.smallest

    @property
    def energy(self) -> Energy:
        """The model at the smallest noise, of one row."""
        return self.energy_at(self.flow.end.mean[None])

    def energy_at(self, x: Float[Array, "n d"]) -> Energy:
        """The model at the smallest noise with rows x, (N, D), as its data."""
        return self.flow.model.at(x, self.flow.smallest)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """That of the data site, over its whole event."""
        support = self.flow.model.energy.support
        missing = len(self.event_shape) - support.event_dim
        return constraints.independent(support, missing) if missing else support

    def log_prob(self, value: Any) -> Array:
        """Normalised log density of events, (..., event shape) to (...)."""
        events, batch = as_events(self.flow.model.energy, self.event_shape, value)
        if not len(events):
            return jnp.zeros(batch, events.dtype)
        if self._validate_args:
            self._validate_sample(events)
        found = (_by_score if self.by_score else _log_prob)(self.settings, self.flow, events)
        require_solved(
            "ScoreDistribution.log_prob", jnp.isfinite(found) | ~jnp.isfinite(events).reshape(len(found), -1).all(-1)
        )
        return found.reshape(batch)

    def log_prob_at(self, params: dict[str, Any], x: Float[Array, "n d"]) -> Float[Array, "s n"]:
        """Log densities of rows (N, D) at each of S values of the parameters, {site: (S, ...)}."""
        found = _at_parameters(self.settings, self.flow, params, jnp.asarray(x, self.flow.model.dtype))
        require_solved("ScoreDistribution", jnp.isfinite(found).all(0))
        return found

    @property
    def mean(self) -> Array:
        """Not known; draws have it."""
        raise NotImplementedError(_BY_DRAWS.format("mean", "x.mean(0)"))

    @property
    def variance(self) -> Array:
        """Not known; draws have it."""
        raise NotImplementedError(_BY_DRAWS.format("variance", "x.var(0)"))

    def entropy(self) -> Array:
        """Not known; draws have an estimate of it."""
        raise NotImplementedError(_BY_DRAWS.format("entropy", "-d.log_prob(x).mean()"))

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Independent draws, (sample shape, event shape), of the data with the smallest noise."""
        n = num_draws("ScoreDistribution", sample_shape)
        shape = (*sample_shape, *self.event_shape)
        if n == 0:
            return jnp.zeros(shape, self.flow.model.dtype)
        z = jax.random.normal(as_key(key), (n, self.flow.model.dim), self.flow.model.dtype)
        values, arrived = decoded(self.settings, self.flow, z)
        require_solved("ScoreDistribution.sample", arrived)
        return values.reshape(shape)


_BY_DRAWS = "ScoreDistribution has no {} in closed form: draw x = d.sample(key, (1000,)) and take {}."


def _rows(energy: Energy, events: Array) -> tuple[Float[Array, "n d"], Float[Array, "n"]]:
    """Events as rows, and what their log densities are to lose."""
    (array,) = energy.arrays
    rows = jax.vmap(lambda event: data_to_row(energy, {array.name: event}))(events)
    return rows, jax.vmap(partial(row_log_jacobian, energy))(rows)


@partial(jax.jit, static_argnums=0)
def _log_prob(settings: Settings, flow: Flow, events: Array) -> Float[Array, "n"]:
    rows, log_jacobian = _rows(flow.model.energy, events)
    _, value, _, arrived = solve(settings, flow, rows)
    return jnp.where(arrived, value[:, 0] - log_jacobian, jnp.nan)


@partial(jax.jit, static_argnums=0)
def _at_parameters(
    settings: Settings, flow: Flow, params: dict[str, Any], x: Float[Array, "n d"]
) -> Float[Array, "s n"]:
    log_jacobian = jax.vmap(partial(row_log_jacobian, flow.model.energy))(x)

    def one(params: dict[str, Any]) -> Array:
        model = NoisyModel(flow.model.energy.with_params(params))
        _, value, _, arrived = solve(settings, flow._replace(model=model), x)
        return jnp.where(arrived, value[:, 0] - log_jacobian, jnp.nan)

    return jax.lax.map(one, params)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_score(settings: Settings, flow: Flow, events: Array) -> Float[Array, "n"]:
    """:func:`_log_prob`, whose derivative is the model's score at the smallest noise."""
    return _log_prob(settings, flow, events)


@partial(_by_score.defjvp, symbolic_zeros=True)
def _by_score_jvp(settings: Settings, primals: tuple[Flow, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    leaves = jax.tree.leaves(tangents[0], is_leaf=lambda t: isinstance(t, SymbolicZero))
    if any(not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0 for t in leaves):
        raise TypeError(
            "The parameters of a ScoreDistribution are differentiated, but its derivative is the model's score, in the "
            "data alone: differentiate flow_log_prob, or pass adjoint='recursive'."
        )
    flow, events = primals
    value = _by_score(settings, flow, events)
    if isinstance(tangents[1], SymbolicZero):
        return value, jnp.zeros_like(value)
    return value, _along_score(flow, events, tangents[1])


@jax.jit
def _along_score(flow: Flow, events: Array, tangent: Array) -> Float[Array, "n"]:
    (rows, _), (pushed, less) = jax.jvp(partial(_rows, flow.model.energy), (events,), (tangent,))
    score = jax.vmap(lambda u: flow.model.score(u[None], flow.smallest)[0])(rows)
    return jnp.sum(score * pushed, axis=-1) - less
