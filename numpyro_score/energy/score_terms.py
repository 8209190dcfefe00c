"""Score networks in models: terms whose derivative in the data is known, but not their value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float

from numpyro_score.energy.base import AnyArray
from numpyro_score.energy.energy import Energy
from numpyro_score.energy.trace import ScoreUnit

__all__ = ["curl", "score_factor"]


def score_factor(
    name: str, x: Float[AnyArray, "*batch_and_event"], s: Float[AnyArray, "*batch_and_event"], *, event_dim: int = 1
) -> None:
    """Adds to a model a term whose derivative in the data x is the vector s.

    It stands where `numpyro.factor` would, when a network gives the score directly and no energy exists:

        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (d,)), obs=x)
            score_factor("score", x, network(x))

    The value of the term is undefined and reads NaN, so that a sampler on the raw model cannot use it by mistake.
    :class:`~numpyro_score.ISM`, :class:`~numpyro_score.SSM`, :class:`~numpyro_score.DSM` and
    :class:`~numpyro_score.ESM` work on it, and what needs the density refuses it. s need not be a gradient;
    :func:`curl` tells how far it is from one. It adds to the scores of the model's other terms.

    Args:
        name: the name of the site.
        x: the data, as the observed site returns them: the plate's batch shape, then `event_dim` dimensions.
        s: their score, of the same shape; a function of x.
        event_dim: the dimensions of one row: 1 for (..., D), 0 for numbers, 2 for images (..., 8, 8).

    Raises:
        ValueError: if the shapes differ or have fewer than `event_dim` dimensions.
    """
    if jnp.shape(x) != jnp.shape(s) or not 0 <= event_dim <= jnp.ndim(x):
        raise ValueError(
            f"score_factor '{name}' got data of shape {jnp.shape(x)} and a score of shape {jnp.shape(s)} with "
            f"event_dim={event_dim}: give both the same shape, that of the plate and then that of a row."
        )
    x, s = jnp.asarray(x), jnp.asarray(s)
    rows = (*x.shape[: x.ndim - event_dim], -1)
    unit = ScoreUnit(_unknown_integral(x.reshape(rows), s.reshape(rows)))
    numpyro.sample(name, unit, obs=unit.sample(None), infer={"is_auxiliary": True})


@jax.custom_jvp
def _unknown_integral(x: Array, s: Array) -> Array:
    """A function of x with the derivative s, (..., D) to (...)."""
    return jnp.full(jnp.shape(x)[:-1], jnp.nan, jnp.result_type(float))


@_unknown_integral.defjvp
def _unknown_integral_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, s = primals
    return _unknown_integral(x, s), jnp.sum(s * tangents[0], axis=-1)


def curl(energy: Energy, x: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch"]:
    """How far the score is from a gradient: the Frobenius norm ‖∇s − ∇sᵀ‖ at each row, (..., D) to (...).

    Zero for every energy, up to rounding; not for the s of a :func:`score_factor` in general. Costs D derivatives of
    the score.
    """

    def jacobian(x: Array) -> Array:
        _, push = jax.linearize(energy.score, x)
        return jax.lax.map(lambda v: push(jnp.broadcast_to(v, x.shape)), jnp.eye(x.shape[-1], dtype=x.dtype))

    j = jacobian(jnp.asarray(x, jnp.result_type(float)))  # (D, ..., D), first the coordinate of x
    return jnp.sqrt(jnp.sum((j - jnp.swapaxes(j, 0, -1)) ** 2, axis=(0, -1)))
