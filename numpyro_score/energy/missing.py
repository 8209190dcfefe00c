"""The density of the cells of a row that were seen, with the others summed over by weighted points."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.energy.energy import Energy

__all__ = ["SeenCells", "seen_cells"]


class SeenCells(Energy):
    """See :func:`seen_cells`."""

    _whole: Energy
    _missing: Bool[Array, "n d"]
    _points: Float[Array, "k n d"]
    _log_weights: Float[Array, "k n"]

    @property
    def missing(self) -> Bool[Array, "n d"]:
        """Which numbers of a row the density does not depend on, (N, D)."""
        return self._missing[:, self._columns]

    @property
    def _columns(self) -> np.ndarray:
        """Where the numbers of a row stand in those of the whole: :func:`part` leaves some out."""
        kept = {a.name for a in self.arrays}
        pairs = zip(self._whole.arrays, self._whole.blocks, strict=True)
        return np.concatenate([np.arange(b.start, b.stop) for a, b in pairs if a.name in kept])

    def row_log_density(self, x: Float[Array, "n d"], rows: Array | None = None) -> Float[Array, "n"]:
        """The log density of the cells that were seen, (N,); the others in `x` do not matter."""
        return jax.nn.logsumexp(self._log_density_at_points(x, rows) + self._log_weights, axis=0)

    def effective_points(self) -> Float[Array, "n"]:
        """(Σ w)² / Σ w² of the points' weights w e^f for each row at its data, (N,)."""
        log_w = self._log_density_at_points(self.data) + self._log_weights
        return jnp.exp(2 * jax.nn.logsumexp(log_w, axis=0) - jax.nn.logsumexp(2 * log_w, axis=0))

    def _log_density_at_points(self, x: Array, rows: Array | None = None) -> Float[Array, "k n"]:
        columns = self._columns
        whole = x if len(columns) == self._whole.dim else self._whole.data.at[:, columns].set(x)

        def at(points: Array) -> Array:
            return self._whole.row_log_density(jnp.where(self._missing, points, whole), rows)

        return jax.vmap(at)(self._points)


def seen_cells(
    energy: Energy, missing: Bool[Array, "n d"], points: Float[Array, "k n d"], log_weights: Float[Array, "k n"]
) -> SeenCells:
    r"""The density of the cells o of each row that were seen, by K points in the place of the missing ones m.

    .. math:: \log \sum_k w_k e^{f(x_o, y_k)} \approx \log \int e^{f(x_o, x_m)} \, dx_m,
              \quad y_k \sim q, \quad w_k = \frac{1}{K q(y_k)},

    a function of :math:`x_o` at points that stay where they are. For the energy's own rows alone, and inside of one
    JAX transformation: it is no pytree.

    Args:
        energy: with any numbers of the support in the place of missing cells.
        missing: which they are, (N, D).
        points: rows with these cells drawn, (K, N, D); the others are not looked at.
        log_weights: of the points, (K, N).
    """
    layout = energy._layout
    layout = layout._replace(resizable=False, quadratic=False, width=len(points) * layout.width)
    new = object.__new__(SeenCells)
    new.__dict__.update(
        energy.__dict__, _layout=layout, _whole=energy, _missing=missing, _points=points, _log_weights=log_weights
    )
    return new
