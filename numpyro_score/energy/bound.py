"""A model bound to parameter values, and its data as rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints

from numpyro_score.energy.base import AnyArray, ModelAtValues, Table
from numpyro_score.energy.binding import data_arguments, rebound
from numpyro_score.energy.latents import Latent, assignments, with_rows_in_place
from numpyro_score.energy.layout import (
    DataArray,
    by_name,
    check_row_shape,
    coordinate_bounds,
    row_weights,
    rows_first,
    sum_rows,
)
from numpyro_score.energy.placed import log_integral, logsumexp
from numpyro_score.energy.supports import Block, outside
from numpyro_score.energy.tables import as_rows
from numpyro_score.energy.trace import term_log_prob
from numpyro_score.energy.values import check_rows
from numpyro_score.placement import Spread, fetch, places_of

__all__ = ["BoundModel"]


M = TypeVar("M", bound="BoundModel")


class BoundModel(ModelAtValues):
    """A model, its arguments and the values of its parameters, with its data as rows (N, D).

    What :class:`Energy` is before it is a density: `ReadModel` reads how the data enter, `Energy` adds derivatives and
    checks.
    """

    # -- structure ------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """D, the number of coordinates of one row."""
        return self._layout.dim

    @property
    def num_rows(self) -> int:
        """N, the number of rows of the model's data."""
        return self._layout.num_rows

    @property
    def parts(self: M) -> tuple[M, ...]:
        """Itself: where data stand in several plates, a fit has `Energies`, of one part for each."""
        return (self,)

    @property
    def row_axes(self) -> tuple[tuple[str | None, int], ...]:
        """The axes that number the rows, outermost first: the plate, if it is one, and the length."""
        layout = self._layout
        names = layout.row_plates or (None,) * len(layout.row_shape)
        return tuple(zip(names, layout.row_shape, strict=True))

    @property
    def resizable(self) -> bool:
        """Whether the density takes any number of rows: its data are arguments, and the plate follows their length."""
        return self._layout.resizable

    @property
    def width(self) -> int:
        """The most numbers for one row that an operation of the density gives, as a network's layer; 1 if not known."""
        return self._layout.width

    @property
    def numbers_per_row(self) -> int:
        """The numbers for one row that all operations of the density give together; 1 if not known."""
        return self._layout.numbers_per_row

    @property
    def has_density(self) -> bool:
        """Whether :meth:`log_density` is known, not only its derivatives in the data."""
        return not self._layout.score_terms

    @property
    def is_concrete(self) -> bool:
        """Whether all values are known, as outside of JAX transformations, so that :meth:`check` can look at them."""
        return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self))

    @property
    def penalties(self) -> tuple[str, ...]:
        """The factors that do not depend on the data, and so belong to the prior."""
        return self._layout.penalties

    @property
    def score_terms(self) -> tuple[str, ...]:
        """The terms that are a :func:`~numpyro_score.score_factor`, whose derivative is known, but not their value."""
        return self._layout.score_terms

    @property
    def data_name(self) -> str | tuple[str, ...] | None:
        """The site or argument that the user named as the data, or sites of one of several plates; None if found."""
        return self._choice

    @property
    def arrays(self) -> tuple[DataArray, ...]:
        """What the data are: sites or arguments, their kinds of support, and their axes that number the rows."""
        return self._layout.arrays

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The columns of a row that belong to each of :attr:`arrays`."""
        return self._layout.blocks

    @property
    def latents(self) -> tuple[Latent, ...]:
        """The latent sites of each row that the density is summed or integrated over."""
        return self._layout.latents

    def at_one_point(self: M) -> M:
        """The same with the latent sites whose points are placed at one of them, for what reads the model's operations.

        Where points are placed the model runs some five times, and one of them shows what it does.
        """
        latents = tuple(latent for latent in self._layout.latents if not latent.placed)
        return self._replace(_layout=self._layout._replace(latents=latents))

    @property
    def angle_columns(self) -> list[int]:
        """Which numbers of a row are angles."""
        return self._layout.angle_columns

    @property
    def flat(self) -> bool:
        """Whether the data fill R^D: they have neither a boundary nor curvature."""
        return self._layout.flat

    @property
    def supports(self) -> dict[str, constraints.Constraint]:
        """The support of each of :attr:`arrays`, by name, in its own shape."""
        sites = self._run().sites
        return {a.name: sites[a.name]["fn"].support if a.is_site else constraints.real for a in self.arrays}

    @property
    def support(self) -> constraints.Constraint:
        """The support of the data, in the sites' own shape."""
        supports = list(self.supports.values())
        return supports[0] if len(supports) == 1 else constraints.real_vector

    @property
    def data(self) -> Float[Array, "n d"]:
        """The model's own data, (N, D)."""
        return self._flat_data(self._run().sites)

    @property
    def weights(self) -> Float[Array, "n"]:
        """What each row counts, (N,): plate size over subsample size, `handlers.scale`, and 0 where masked."""
        return self.data_and_weights()[1]

    def data_and_weights(self) -> tuple[Float[Array, "n d"], Float[Array, "n"]]:
        """:attr:`data` and :attr:`weights` from one run of the model."""
        sites = self._run().sites
        return self._flat_data(sites), row_weights(sites[self._layout.terms[0]], self._layout)[:, 0]

    def _flat_data(self, sites: dict[str, Any]) -> Array:
        return self.flatten(
            {
                a.name: self._arrays[a.leaf] if not a.is_site and a.leaf is not None else sites[a.name]["value"]
                for a in self._layout.arrays
            }
        )

    def usable(self: M, weights: Float[Array, "n"] | None = None) -> tuple[M, Float[Array, "n"]]:
        """The energy with the rows of weight zero moved to where a row of some weight is, and the weights.

        Such rows may hold NaN, which no later multiplication by zero would remove. `weights` are the model's own if not
        given.
        """
        x, own = self.data_and_weights()
        weights = own if weights is None else weights
        if not self._layout.masked:
            return self, weights
        found, row = jnp.any(weights != 0), x[jnp.argmax(weights != 0)]
        if self._axes:  # another device may have one where this has none
            on_each, rows = (jax.lax.all_gather(v, self._axes) for v in (found, row))
            found, row = jnp.any(on_each), rows[jnp.argmax(on_each)]
        return self.at(jnp.where(weights[:, None] != 0, x, jnp.where(found, row, 0.0))), weights

    def whole_rows(self: M) -> M:
        """The density at the rows of some weight without missing cells: what places draws of it, not its data.

        Raises:
            ValueError: if there is none, or the density is not :attr:`resizable`.
        """
        x, weights = (fetch(v) for v in self.data_and_weights())
        whole = x[(weights != 0) & ~np.isnan(x).any(axis=1)]
        if not (len(whole) and self.resizable):
            raise ValueError(
                "No row of the data is whole, and draws are placed by such rows: give some, e.g. fit.energy.at(x)."
                if self.resizable
                else "Rows with missing cells have densities of their own: say which, e.g. fit.energy.at(x, z=z)."
            )
        return self.at(whole)

    # -- over several devices -------------------------------------------------------------------------------------

    @property
    def spread(self) -> Spread | None:
        """How the rows lie over several devices, where a program may run on each for its rows alone; else None.

        Where the density is not :attr:`resizable` or the values are traced it is None, and JAX lays programs out.
        """
        found = {
            None if a.leaf is None or not self._places else Spread.along(self._places[a.leaf], a.row_axes[0])
            for a in self._layout.arrays
            if self.resizable
        }
        return found.pop() if len(found) == 1 else None

    def on_device(self: M, x: Float[Array, "n d"], axes: tuple[str, ...]) -> M:
        """The same density of the rows of one device, inside of a `jax.shard_map` over some axes of a mesh."""
        return self.at(x)._replace(_axes=axes)

    def over_devices(self, operation: Callable[[Any, tuple[str, ...]], Any], value: Any) -> Any:
        """What holds for the rows of all devices from what holds for those of each, e.g. by `jax.lax.pmean`.

        Where the energy has all rows it is the value itself.
        """
        return operation(value, self._axes) if self._axes else value

    def flatten(self, values: Any) -> Float[Array, "n d"]:
        """Data in the sites' own shapes, {name: array} or one array, to rows (N, D).

        Rows hold the data as they are where these are real, bounded coordinate by coordinate, or on a sphere; √x for x
        on a simplex; and unconstrained coordinates by NumPyro's `biject_to` for any other support.

        Raises:
            TypeError, ValueError: if sites are missing, empty, or not the model's.
        """
        values, columns = by_name(self._layout, values), []
        for a in self._layout.arrays:
            value = as_rows(a, values[a.name], self.labels)
            check_rows(a.name, value)
            value = jnp.asarray(value, self.dtype)
            check_row_shape(a, value.shape)
            value = a.support.to_coordinates(value)
            columns.append(rows_first(value, a.row_axes))
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)

    def unflatten(self, x: Float[AnyArray, "n d"]) -> dict[str, Array]:
        """Rows (N, D) to data in the sites' own shapes, {name: array}. The inverse of :meth:`flatten`."""
        coordinates = self.coordinates(x)
        return {a.name: a.support.to_data(coordinates[a.name]) for a in self._layout.arrays}

    def coordinates(self, x: Float[AnyArray, "n d"]) -> dict[str, Array]:
        """Rows (N, D) by site, {name: array}, in the coordinates of :meth:`flatten`."""
        layout = self._layout.with_rows(x.shape[0])
        found = {}
        for a, block in zip(layout.arrays, layout.blocks, strict=True):
            shape = a.support.coordinate_shape(a.shape)
            rest = tuple(s for i, s in enumerate(shape) if i not in a.row_axes)
            value = jnp.asarray(x)[:, block.start : block.stop].reshape(layout.row_shape + rest)
            found[a.name] = jnp.moveaxis(value, tuple(range(len(a.row_axes))), a.row_axes)
        return found

    def bind(self: M, **kwargs: Any) -> M:
        """The same density with other arguments of the model by name, e.g. a noise level or covariates.

        Raises:
            TypeError: if the model takes no such argument.
            TypeError, ValueError: if the model fails with it, naming its shape.
        """
        return rebound(self, kwargs)

    def at(self: M, x: Float[AnyArray, "n d"] | Table, /, **arguments: Any) -> M:
        """The same density with `x` as its data; another number of rows needs :attr:`resizable`.

        Rows with covariates go with theirs: `energy.at(x, z=z)` for a model of x and z, in any number.
        """
        x = self._from_table(x)
        check_rows("x", x)
        x = jnp.asarray(x, self.dtype)
        n = x.shape[0]
        if x.shape != (n, self.dim):
            raise ValueError(f"x has shape {x.shape}, but a row has {self.dim} numbers: pass (n, {self.dim}).")
        any_rows = self.resizable or (arguments and all(len(a.row_axes) == 1 for a in self.arrays))
        if n != self.num_rows and not any_rows:
            raise ValueError(
                f"The model has {self.num_rows} rows and cannot take {n}: pass the data as an argument and let the "
                "plate follow its length, e.g. numpyro.plate('data', len(x)); rows go with covariates, at(x, z=z)."
            )
        values = self.unflatten(x)
        if arguments:
            return rebound(self, {**data_arguments(self, values), **arguments})
        layout = self._layout.with_rows(n)
        arrays, pinned, plates = list(self._arrays), dict(self._pinned), dict(self._plates)
        for a in layout.arrays:
            if a.leaf is not None:
                arrays[a.leaf] = values[a.name]
                plates = {k: v for k, v in plates.items() if k not in layout.row_plates}
            else:
                pinned[a.name] = values[a.name]
        changed = dict(_arrays=arrays, _places=places_of(arrays))
        return self._replace(**changed, _pinned=pinned, _plates=plates, _layout=layout)

    def _from_table(self, x: Any) -> Any:
        """Rows given as a table as an array; raises ValueError for other columns than those of the data."""
        return as_rows(self.arrays[0], x, self.labels) if len(self.arrays) == 1 else x

    def bounds(self, n: int) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """Lower and upper bounds of the coordinates of n rows, (N, D) each; infinite where there are none."""
        return coordinate_bounds(self._run().sites, self._layout.with_rows(n))

    def rows_outside(self) -> dict[str, Bool[Array, "n"]]:
        """Which rows of the data are outside of their support, (N,) by name, where they could be."""
        sites = self._run().sites
        return {
            a.name: rows_first(
                outside(a.support.kind, sites[a.name]["value"], sites[a.name]["fn"].support), a.row_axes
            ).any(-1)
            for a in self.arrays
            if a.is_site and a.support.kind != "real"
        }

    def row_log_density(self, x: Float[Array, "n d"], rows: Array | None = None) -> Float[Array, "n"]:
        """The log density of n rows (N, D), (N,): what losses differentiate.

        As :meth:`Energy.log_density`, without other leading axes, and NaN with the right derivatives where a term is a
        :func:`~numpyro_score.score_factor`.

        Args:
            x: as many rows as the model has, or any number where it is :attr:`resizable`.
            rows: the indices that the rows' plate is to have; those of all rows if not given.
        """
        at = self.at(x)
        if rows is not None:
            at = at._replace(_plates={**at._plates, **dict.fromkeys(at._layout.row_plates, rows)})
        total = at._sum_of_terms(at._layout.terms, rows)
        coordinates = at.coordinates(x)
        for a in at._layout.arrays:
            u = coordinates[a.name]
            if (log_jacobian := a.support.log_jacobian(u, a.support.to_data(u))) is not None:
                total += rows_first(log_jacobian, a.row_axes).sum(-1)
        return total

    def _sum_of_terms(self, names: Sequence[str], rows: Array | None = None) -> Float[Array, "n"]:
        """Some terms of each row together, (N,): log Σ_z p(z) e^{terms} where latent sites z are summed."""
        terms = self._terms_by_assignment(names, rows)
        return logsumexp(terms) if self._layout.latents else terms[0]

    def _terms_by_assignment(self, names: Sequence[str], rows: Array | None = None) -> Float[Array, "a n"]:
        """The same for each of the values that the latent sites of a row take together, with log p(z): (A, N)."""
        layout = self._layout
        latents = [latent.name for latent in layout.latents]

        def with_latents(energy: BoundModel, values: dict[str, Any]) -> Array:
            sites = energy._replace(_pinned={**energy._pinned, **values})._run().sites
            if rows is not None and any(sites[p]["args"][0] != len(rows) for p in layout.row_plates):
                raise ValueError("A plate of rows has a fixed size.")
            return functools.reduce(jnp.add, [sum_rows(term_log_prob(sites[k]), layout) for k in [*names, *latents]])

        placed = [latent for latent in layout.latents if latent.placed]

        def of(values: dict[str, Any]) -> Array:
            if not placed:
                return with_latents(self, values)

            def joint(energy: BoundModel, u: Array) -> Array:
                return with_latents(energy, {**values, **with_rows_in_place(layout.latents, u, layout.row_shape)})

            shape = (layout.num_rows, sum(latent.width for latent in placed))
            start = jnp.full(shape, placed[0].start, self.dtype)
            parts = {"params": self.params, "_arrays": self._arrays, "_pinned": self._pinned}
            frozen = self._replace(**jax.tree.map(jax.lax.stop_gradient, parts))
            return log_integral(functools.partial(joint, self), functools.partial(joint, frozen), start, placed[0].size)

        return jax.vmap(of)(assignments(layout.latents)) if len(placed) < len(latents) else of({})[None]
