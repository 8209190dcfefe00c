"""What log Z and samples are taken of: an energy or a fit with one density for all rows."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_score.energy import Energy, one_plate
from numpyro_score.normaliser.coordinates import Chart, to_free

__all__ = [
    "Fitted",
    "Source",
    "density_of",
    "energy_of_fit",
    "fitted_moments",
    "free_data",
    "one_density",
    "with_density",
]


@runtime_checkable
class Fitted(Protocol):
    """A fit, as far as its density goes."""

    @property
    def energy(self) -> Energy:
        """The model bound to the estimates."""


Source = Energy | Fitted


def one_density(source: Source) -> Energy:
    """The energy of a source, if it has values and these are the same function for every row.

    Raises:
        TypeError: if the source is neither an energy nor a fit, or has a score but no density.
        ValueError: if rows have densities of their own.
    """
    energy = with_density(source)
    if energy.num_rows > 1 and not energy.resizable:
        raise ValueError(
            f"The model's {energy.num_rows} rows may differ in density (covariates, bounds by row, or a plate of fixed "
            "size), and each has its own normaliser: say which, e.g. by given={'z': z} in sample and log_partition, or "
            "bind it to one row, e.g. Energy(model, params, x[:1], z[:1])."
        )
    return energy


def energy_of_fit(fit: Any) -> Energy:
    """The energy of a fit, at its whole rows where some have missing cells: they place draws of its density."""
    energy = one_plate(getattr(fit, "energy", None))
    return energy.whole_rows() if getattr(fit, "has_missing_cells", False) and energy.resizable else energy


def with_density(source: Source) -> Energy:
    """The energy of a source, if it has values; rows may have densities of their own.

    Raises:
        TypeError: if the source is neither an energy nor a fit, or has a score but no density.
    """
    energy = source if isinstance(source, Energy) else energy_of_fit(source)
    if not isinstance(energy, Energy):
        raise TypeError(f"Expected an Energy or a fit, got {type(source).__name__}.")
    if not energy.has_density:
        raise TypeError(
            f"Site '{energy.score_terms[0]}' is a score_factor, whose density is unknown: declare an energy "
            "with numpyro.factor."
        )
    return energy


def density_of(source: Source) -> Energy:
    """:func:`one_density`, with the values of data and density checked there."""
    energy = one_density(source)
    if not energy.is_concrete:
        raise TypeError("The energy is traced by a JAX transformation: call this outside of jit, vmap and grad.")
    energy.check()
    return energy


def free_data(energy: Energy, chart: Chart = "embedding", rng_key: Array | None = None) -> np.ndarray:
    """Free coordinates of the data that count, (N, P) in double precision, without rows on a boundary (at infinity)."""
    x, weights = jax.device_get(energy.data_and_weights())
    u = np.asarray(to_free(energy, jnp.asarray(x[weights > 0]), chart, rng_key), np.float64)
    u = u[np.isfinite(u).all(-1)]
    if not len(u):
        raise ValueError("The energy's data are all masked or on the boundary of the support: give it a row inside.")
    return u


def fitted_moments(u: np.ndarray, instead: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean (P,) and Cholesky factor of the covariance (P, P) of the data's free coordinates (N, P).

    Raises ValueError, with what to do `instead`, if the data do not determine them.
    """
    n, p = u.shape
    covariance = np.atleast_2d(np.cov(u.T)) if n > 2 * p else np.zeros((p, p))
    scales = np.linalg.eigvalsh(covariance)
    if scales[0] <= 1e-10 * scales[-1]:
        raise ValueError(
            f"The energy's data ({n} rows in {p} dimensions) do not span the space, so that no law can be fitted to "
            f"them: {instead}."
        )
    return u.mean(0), np.linalg.cholesky(covariance)
