"""Reads off a model how its data enter: the one place that traces a model for its structure."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_score.energy.arguments import named_arrays
from numpyro_score.energy.bound import BoundModel
from numpyro_score.energy.dependence import depends_on_data, depends_on_inputs, numbers_per_row, treats_rows_alike
from numpyro_score.energy.layout import DataArray, Layout, find_arrays, refuse_moving_bounds
from numpyro_score.energy.relaxation import is_quadratic_in_data
from numpyro_score.energy.rows import assemble
from numpyro_score.energy.supports import distances
from numpyro_score.energy.trace import is_factor, is_observed_sample, is_summed, term_log_prob, unwrap

__all__ = ["ReadModel"]


class ReadModel(BoundModel):
    """A :class:`BoundModel` that finds its layout."""

    def _read_layout(self) -> Layout:
        dynamic = dict(params=self.params, _arrays=self._arrays, _plates=self._plates, _pinned=self._pinned)
        found: dict[str, Any] = {}

        def read_arrays(dynamic: dict[str, Any], only_sites: bool = False) -> None:
            energy = self._replace(**dynamic)
            named, first = named_arrays(self.model, self._static)
            first = None if only_sites else first
            found["arrays"] = find_arrays(energy._run(), energy._arrays, named, first, self._choice)

        jax.eval_shape(read_arrays, dynamic)
        arrays: list[DataArray] = found["arrays"]
        if not all(a.is_site for a in arrays) and self._choice is None and self._factors_see_discrete_sites(dynamic):
            jax.eval_shape(partial(read_arrays, only_sites=True), dynamic)
            arrays = found["arrays"]

        def terms(data: list[Any], dynamic: dict[str, Any]) -> list[Any]:
            leaves, pinned = list(dynamic["_arrays"]), dict(dynamic["_pinned"])
            for a, value in zip(arrays, data, strict=True):
                if a.leaf is not None and leaves[a.leaf].shape == a.shape:
                    leaves[a.leaf] = value
                if a.is_site:
                    pinned[a.name] = value
            found["sites"] = sites = self._replace(**dynamic | {"_arrays": leaves, "_pinned": pinned})._run().sites
            log_probs = {k: term_log_prob(s) for k, s in sites.items() if is_observed_sample(s)}
            found["shapes"] = {k: v.shape for k, v in log_probs.items()}
            return list(log_probs.values())

        data = [jax.ShapeDtypeStruct(a.shape, a.support.dtype or self.dtype) for a in arrays]
        jaxpr = jax.make_jaxpr(terms)(data, dynamic).jaxpr
        depends = dict(
            zip(found["shapes"], depends_on_data(jaxpr, [a.support.is_discrete for a in arrays]), strict=True)
        )
        if any(is_summed(s) for s in found["sites"].values()):
            depends = self._with_latents(depends, dynamic)
        layout = assemble(arrays, found["sites"], found["shapes"], depends)
        if any(a.support.has_boundary for a in arrays):

            def bounds(params: Any, rest: dict[str, Any]) -> Any:
                energy = self._replace(**rest, params=params, _layout=layout)
                return energy.bounds(layout.num_rows), distances(energy.supports.values(), energy.blocks, energy.data)

            params = dynamic.pop("params")
            jaxpr = jax.make_jaxpr(bounds)(params, dynamic).jaxpr
            refuse_moving_bounds(arrays, jaxpr, len(jax.tree.leaves(params)))
        layout = self._settle_rows(layout)
        if not len(layout.discrete_columns):
            return layout
        return layout._replace(quadratic=is_quadratic_in_data(self._replace(_layout=layout)))

    def _with_latents(self, depends: dict[str, bool], dynamic: dict[str, Any]) -> dict[str, bool]:
        """Which terms depend on the data or on latent sites that are summed.

        Raises:
            ValueError: for a mask or scale that depends on one, which would have to be summed, too.
        """
        sites = self._run().sites
        numbers = {k: jnp.zeros(jnp.shape(s["value"]), int) for k, s in sites.items() if is_summed(s)}

        def of(numbers: dict[str, Any], dynamic: dict[str, Any]) -> tuple[list[Any], list[Any]]:
            sites = self._replace(**dynamic | {"_pinned": {**dynamic["_pinned"], **numbers}})._run().sites
            weights = [(unwrap(sites[k]["fn"])[1], sites[k]["scale"]) for k in depends]
            return [term_log_prob(sites[k]) for k in depends], [sum(map(jnp.sum, jax.tree.leaves(w))) for w in weights]

        jaxpr = jax.make_jaxpr(of)(numbers, dynamic).jaxpr
        marks = [i < len(numbers) for i in range(len(jaxpr.invars))]
        found = depends_on_inputs(jaxpr, marks, discrete=True)
        for name, weighed in zip(depends, found[len(depends) :], strict=True):
            if weighed:
                raise ValueError(
                    f"The mask or scale of site '{name}' depends on the latent site '{next(iter(numbers))}', and "
                    "weighs rows, not values of it: write jnp.where(z == 1, ..., 0.0) in the factor instead."
                )
        return {k: depends[k] or yes for k, yes in zip(depends, found, strict=False)}

    def _factors_see_discrete_sites(self, dynamic: dict[str, Any]) -> bool:
        """Whether a factor depends on an observed discrete site, which then is data and no label."""
        values = {
            k: s["value"]
            for k, s in self._run().sites.items()
            if is_observed_sample(s)
            and not is_factor(s)
            and s["fn"].support is not None
            and s["fn"].support.is_discrete
        }

        def factors(values: dict[str, Any], dynamic: dict[str, Any]) -> list[Any]:
            sites = self._replace(**dynamic | {"_pinned": {**dynamic["_pinned"], **values}})._run().sites
            return [term_log_prob(s) for s in sites.values() if is_observed_sample(s) and is_factor(s)]

        if not values:
            return False
        jaxpr = jax.make_jaxpr(factors)(values, dynamic).jaxpr
        return any(depends_on_data(jaxpr, [True] * len(values)))

    def _settle_rows(self, layout: Layout) -> Layout:
        """Decides whether subsampled data can enter through the arguments, and whether another number of rows can."""

        def for_any_rows(layout: Layout) -> Layout:
            if any(len(a.row_axes) != 1 for a in layout.arrays):
                return layout
            resizable = layout._replace(resizable=True)
            energy, traced = self._replace(_layout=resizable).at_one_point(), {}

            def trace(n: int) -> Any:
                jax.eval_shape(lambda: energy.bounds(n))  # as many as there are rows, or the same for all
                x = jax.ShapeDtypeStruct((n, layout.dim), self.dtype)
                rows = jax.ShapeDtypeStruct((n,), jnp.result_type(int))
                traced[n] = jax.make_jaxpr(energy.row_log_density)(x, rows)
                return traced[n]

            try:
                if not treats_rows_alike(trace):
                    return layout
            # Only the model can say which shapes it takes; JAX and NumPyro refuse a wrong one with these.
            except (TypeError, ValueError, IndexError, AssertionError):
                return layout
            n, closed = traced.popitem()
            times = next((v.size for v in layout.latents if v.placed), 1)
            width, total = numbers_per_row(closed.jaxpr, n)
            return resizable._replace(width=width, numbers_per_row=times * total)

        layout = for_any_rows(layout)
        held_apart = any(a.leaf is not None and self._arrays[a.leaf].shape != a.shape for a in layout.arrays)
        if held_apart and not layout.resizable:
            # Subsampled data of a model that is not free of the rows' numbers: set the value of the site instead.
            return for_any_rows(layout._replace(arrays=tuple(a._replace(leaf=None) for a in layout.arrays)))
        return layout
