"""A fitted model of the data with noise, at any noise level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, one_plate, plural, rows_text, takes_keyword
from numpyro_score.losses import ContinuousDSM
from numpyro_score.losses.terms import require_flat
from numpyro_score.normaliser.coordinates import row_to_data
from numpyro_score.normaliser.source import Source

__all__ = ["NoisyModel", "as_data", "data_rows", "noise_range_of", "noisy_model"]


@jax.tree_util.register_pytree_node_class
class NoisyModel:
    """The density q_ρ of the data with noise of standard deviation ρ, as functions of points u and levels ρ.

    A pytree whose leaves are those of the energy. Its methods are meant to be called under `jax.jit`: to bind a model
    to a noise level reads it anew.
    """

    def __init__(self, energy: Energy) -> None:
        self.energy = energy

    @property
    def dim(self) -> int:
        """D."""
        return self.energy.dim

    @property
    def dtype(self) -> Any:
        """That of points and densities."""
        return self.energy.dtype

    def at(self, u: Float[Array, "n d"], rho: Float[Array, "..."]) -> Energy:
        """The energy with points u as its data, each at its own level, or all at one."""
        sigma = jnp.broadcast_to(jnp.asarray(rho, u.dtype), u.shape[:1])
        return self.energy.at(u).bind(sigma=sigma)

    def log_density(self, u: Float[Array, "n d"], rho: Float[Array, "..."]) -> Float[Array, "n"]:
        """The log of q_ρ(u), up to a constant for each level."""
        return self._evaluate("log_density", u, rho)

    def score(self, u: Float[Array, "n d"], rho: Float[Array, "..."]) -> Float[Array, "n d"]:
        """∇ log q_ρ(u), (N, D)."""
        return self._evaluate("score", u, rho)

    def _evaluate(self, what: str, u: Array, rho: Array) -> Array:
        if self.energy.resizable:
            return getattr(self.at(u, rho), what)(u)

        def one(u: Array, sigma: Array) -> Array:  # the data are one big point
            return getattr(self.energy.bind(sigma=sigma[None]), what)(u)

        return jax.vmap(one)(u, jnp.broadcast_to(jnp.asarray(rho, u.dtype), u.shape[:1]))

    def tree_flatten(self) -> tuple[tuple[Energy], None]:
        """For JAX."""
        return (self.energy,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> NoisyModel:
        """For JAX."""
        model = object.__new__(cls)
        model.energy = children[0]
        return model


def noisy_model(owner: str, source: Source) -> NoisyModel:
    """The model of a fit or an energy, if it has one density for all rows at each noise level.

    Args:
        owner: who asks, for messages.
        source: a fit, or an energy; its model takes the noise level of each row as the keyword `sigma`.

    Raises:
        TypeError: if the source is neither, its data are discrete, its model takes no `sigma`, or its arguments give
            one already.
        ValueError: if rows have densities of their own.
        NotImplementedError: if the data have bounds.
    """
    energy = one_plate(source if isinstance(source, Energy) else getattr(source, "energy", None))
    if not isinstance(energy, Energy):
        raise TypeError(f"{owner} needs a fit or an Energy, got {type(source).__name__}.")
    energy.require_continuous(owner, "draw by sample(fit, rng_key, kernel=GibbsWithGradients())")
    if not takes_keyword(energy.model, "sigma"):
        raise TypeError(
            f"{owner} needs a model of every noise level, and this one takes no keyword 'sigma': write "
            "def model(x, sigma=1.0), where sigma holds the level of each row, and fit it by ContinuousDSM or "
            "DSM with several levels."
        )
    if energy.is_given("sigma"):
        raise TypeError(f"The arguments give 'sigma', which {owner} sets itself: leave it out.")
    require_flat(energy, owner, "model unbounded coordinates, such as log x")
    if energy.num_rows > 1 and not energy.resizable:
        raise ValueError(
            f"The model's {energy.num_rows} rows may differ in density (covariates, or a plate of fixed size): bind it "
            "to one row, e.g. Energy(model, params, x[:1], z[:1]), or let the plate follow len(x)."
        )
    return NoisyModel(energy)


def noise_range_of(source: Source) -> tuple[float, float] | None:
    """The least and the largest noise level that a fit has seen; None for an energy and other losses."""
    loss = getattr(getattr(source, "svi", None), "score_loss", None)
    if isinstance(loss, ContinuousDSM):
        return loss.smallest, loss.largest
    levels = getattr(loss, "sigma", None)
    if isinstance(levels, tuple) and len(levels) > 1:
        return min(levels), max(levels)
    return None


def data_rows(energy: Energy) -> tuple[np.ndarray, np.ndarray]:
    """The data (N, D) and their weights (N,), without rows that do not count.

    Raises ValueError if none counts, or one is not finite, naming site and rows.
    """
    x, weights = (np.asarray(v) for v in jax.device_get(jax.jit(Energy.data_and_weights)(energy)))
    used = weights > 0
    names, why = ", ".join(repr(a.name) for a in energy.arrays), "whose mean and covariance say where noise begins"
    if not used.any():
        raise ValueError(f"All {plural(len(x), 'row')} of {names} have weight zero: bind the energy to data, {why}.")
    if bad := rows_text(used & ~np.isfinite(x).all(-1)):
        raise ValueError(f"Data {names} have NaN or infinity in {bad}: bind the energy to finite data, {why}.")
    return (x, weights) if used.all() else (x[used], weights[used])


def as_data(energy: Energy, row: Float[Array, "d"]) -> Any:
    """One row in the form of its data site; by name where there are several sites."""
    values = row_to_data(energy, row)
    return values if len(values) > 1 else next(iter(values.values()))
