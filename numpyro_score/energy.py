"""A model bound to parameter values, as pure functions of its data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from numpyro_score import _check, _layout, _trace, operators
from numpyro_score._arguments import (
    is_given,
    join_arrays,
    named_arrays,
    refuse_empty,
    split_arrays,
    takes_keyword,
)
from numpyro_score._layout import DataArray, Layout

__all__ = ["Energy"]

AnyArray = Array | np.ndarray


@jax.tree_util.register_pytree_node_class
class Energy:
    r"""A NumPyro model bound to parameter values: a density of its data, known up to a constant.

    The log density is :math:`f_\theta(x)`, the sum of every `numpyro.factor` and every `log_prob` of an observed site
    that depends on the data :math:`x`; the normaliser :math:`Z(\theta)` is never needed. The energy of physics is
    :math:`E = -f`. Rows are independent: row n of the data adds its own :math:`f_n(x_n)`.

    Data are the observed continuous sample sites, concatenated into one row of `dim` numbers. A model without any
    takes its first positional argument as the data. All other observed sites and arguments are conditioned on.

    Instances are pytrees whose leaves are the parameters and the array arguments, so they pass through `jax.jit`,
    `jax.vmap` and `jax.lax.scan`.

    Args:
        model: a NumPyro model.
        params: constrained values of all latent sample sites and `numpyro.param` sites, by name.
        *args: the model's arguments; NumPy and JAX arrays are traced, anything else is static.
        data: the name of the site or argument that is the data, where several could be. A value of `data` that is
            not a string is passed to the model.
        **kwargs: the model's keyword arguments.

    Raises:
        ValueError, TypeError, NotImplementedError: if the model's density is not a sum over rows of continuous,
            unbounded data. The message names the site and what to write instead.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy
        >>> def model(x):
        ...     tau = numpyro.sample("tau", dist.Exponential(1.0))
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * (x**2).sum(-1))
        >>> energy = Energy(model, {"tau": 3.0}, jnp.array([[1.0, 2.0]]))
        >>> energy.score(energy.data).tolist()
        [[-3.0, -6.0]]
    """

    def __init__(self, model: Callable[..., Any], params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        choice = kwargs.pop("data") if isinstance(kwargs.get("data"), str) else None
        self._set(model, params, {}, None, choice, args, kwargs)

    @classmethod
    def bound_to(
        cls,
        model: Callable[..., Any],
        params: dict[str, Any],
        plates: dict[str, Array],
        rng_key: Array | None,
        data: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Energy:
        """The energy inside a run of the model: on the rows its plates drew, with a key for its random numbers."""
        new = object.__new__(cls)
        new._set(model, params, plates, rng_key, data, args, kwargs)
        return new

    def _set(
        self,
        model: Any,
        params: Any,
        plates: Any,
        rng_key: Any,
        choice: str | None,
        args: Any,
        kwargs: Any,
    ) -> None:
        refuse_empty(model, args, kwargs)
        self.model, self.params = model, params
        self._arrays, self._static = split_arrays((args, kwargs))
        self._choice = choice
        self._plates = plates  # the rows that subsampled plates take; all of them if not given
        self._pinned: dict[str, Any] = {}  # observed sites given another value
        self._rng_key = rng_key  # what `numpyro.prng_key()` in the model draws from
        self._layout = self._read_layout()

    def _replace(self, **changes: Any) -> Energy:
        new = object.__new__(Energy)
        new.__dict__.update(self.__dict__, **changes)
        return new

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Parameters and arrays are leaves; the model, its other arguments and the layout are static."""
        children = (self.params, self._arrays, self._plates, self._pinned, self._rng_key)
        return children, (self.model, self._static, self._choice, self._layout)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> Energy:
        """The inverse of :meth:`tree_flatten`."""
        new = object.__new__(cls)
        new.params, new._arrays, new._plates, new._pinned, new._rng_key = children
        new.model, new._static, new._choice, new._layout = aux
        return new

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
    def resizable(self) -> bool:
        """Whether the density takes any number of rows: its data are arguments, and the plate follows their length."""
        return self._layout.resizable

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
    def support(self) -> constraints.Constraint:
        """The support of the data, in the sites' own shape."""
        sites = self._run().sites
        supports = [sites[a.name]["fn"].support if a.is_site else constraints.real for a in self._layout.arrays]
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
        return self._flat_data(sites), _layout.row_weights(sites[self._layout.terms[0]], self._layout)[:, 0]

    def _flat_data(self, sites: dict[str, Any]) -> Array:
        return self.flatten(
            {
                a.name: self._arrays[a.leaf] if not a.is_site and a.leaf is not None else sites[a.name]["value"]
                for a in self._layout.arrays
            }
        )

    def usable(self) -> tuple[Energy, Float[Array, "n"]]:
        """The energy with the rows of weight zero moved to where a row of some weight is, and the weights.

        Such rows may hold NaN, which no later multiplication by zero would remove.
        """
        x, weights = self.data_and_weights()
        if not self._layout.masked:
            return self, weights
        somewhere = jnp.where(jnp.any(weights != 0), x[jnp.argmax(weights != 0)], 0.0)
        return self.at(jnp.where(weights[:, None] != 0, x, somewhere)), weights

    def flatten(self, values: Any) -> Float[Array, "n d"]:
        """Data in the sites' own shapes, {name: array} or one array, to rows (N, D).

        Rows hold the data as they are where these are real, bounded coordinate by coordinate, or on a sphere; √x for x
        on a simplex; and unconstrained coordinates by NumPyro's `biject_to` for any other support.

        Raises:
            TypeError, ValueError: if sites are missing, empty, or not the model's.
        """
        values, columns = _check.by_name(self._layout, values), []
        for a in self._layout.arrays:
            value = a.support.to_coordinates(jnp.asarray(values[a.name], self._dtype))
            columns.append(_layout.rows_first(value, a.row_axes))
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)

    def unflatten(self, x: Float[AnyArray, "n d"]) -> dict[str, Array]:
        """Rows (N, D) to data in the sites' own shapes, {name: array}. The inverse of :meth:`flatten`."""
        coordinates = self._coordinates(x)
        return {a.name: a.support.to_data(coordinates[a.name]) for a in self._layout.arrays}

    def _coordinates(self, x: AnyArray) -> dict[str, Array]:
        layout = self._layout.with_rows(x.shape[0])
        found = {}
        for a, block in zip(layout.arrays, layout.blocks, strict=True):
            shape = a.support.coordinate_shape(a.shape)
            rest = tuple(s for i, s in enumerate(shape) if i not in a.row_axes)
            value = jnp.asarray(x)[:, block.start : block.stop].reshape(layout.row_shape + rest)
            found[a.name] = jnp.moveaxis(value, tuple(range(len(a.row_axes))), a.row_axes)
        return found

    def bind(self, **kwargs: Any) -> Energy:
        """The same density with other keyword arguments of the model, e.g. a noise level or covariates.

        Raises:
            TypeError: if the model takes no such argument.
        """
        for name in kwargs:
            if not takes_keyword(self.model, name):
                raise TypeError(
                    f"The model takes no keyword '{name}': add it with a default, e.g. def model(x, {name}=1.0)."
                )
        args, old = join_arrays(self._arrays, self._static)
        arrays, static = split_arrays((args, {**old, **kwargs}))
        new = self._replace(_arrays=arrays, _static=static)
        new._layout = new._read_layout()
        return new

    def is_given(self, name: str) -> bool | None:
        """Whether the model's argument `name` was given, or is at its default; None if there is none of this name."""
        return is_given(self.model, self._static, name)

    def with_params(self, params: dict[str, Any]) -> Energy:
        """The same density at other values of the given sites, of the same shapes."""
        return self._replace(params={**self.params, **params})

    def at(self, x: Float[AnyArray, "n d"]) -> Energy:
        """The same density with `x` as its data; another number of rows needs :attr:`resizable`."""
        x = jnp.asarray(x, self._dtype)
        n = x.shape[0]
        if x.shape != (n, self.dim):
            raise ValueError(f"x has shape {x.shape}, but a row has {self.dim} numbers: pass (n, {self.dim}).")
        if n != self.num_rows and not self.resizable:
            raise ValueError(
                f"The model has {self.num_rows} rows and cannot take {n}: pass the data as an argument and let the "
                "plate follow its length, e.g. numpyro.plate('data', len(x))."
            )
        values = self.unflatten(x)
        layout = self._layout.with_rows(n)
        arrays, pinned, plates = list(self._arrays), dict(self._pinned), dict(self._plates)
        for a in layout.arrays:
            if a.leaf is not None:
                arrays[a.leaf] = values[a.name]
                plates = {k: v for k, v in plates.items() if k not in layout.row_plates}
            else:
                pinned[a.name] = values[a.name]
        return self._replace(_arrays=arrays, _pinned=pinned, _plates=plates, _layout=layout)

    # -- the density and its derivatives --------------------------------------------------------------------------

    def log_density(self, x: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch"]:
        """The unnormalised log density f(x) of each row: (..., D) to (...).

        In the coordinates of :meth:`flatten`, with the Jacobian of the change from the data included.

        Raises:
            TypeError: for a model with a :func:`~numpyro_score.score_factor`, whose density is unknown.
        """
        if not self.has_density:
            raise TypeError(
                f"Site '{self._layout.score_terms[0]}' is a score_factor, whose density is unknown: use ISM, SSM, DSM "
                "or ESM, or declare an energy with numpyro.factor."
            )
        return self._over_rows(self._log_density, x)

    def score(self, x: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch d"]:
        """The score ∇f(x) of each row: (..., D) to (..., D). Scale, mask and subsampling do not enter."""
        return self._over_rows(lambda y: operators.value_score(self._log_density, y)[1], x)

    def laplacian(self, x: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch"]:
        """The Laplacian tr ∇²f(x) of each row: (..., D) to (...). Exact; costs D + 2 densities."""
        return self.value_score_laplacian(x)[2]

    def value_score_laplacian(
        self, x: Float[AnyArray, "*batch d"]
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"], Float[Array, "*batch"]]:
        """The log density, its score and its Laplacian in one pass: (..., D) to ((...), (..., D), (...)).

        The value is NaN for a model with a :func:`~numpyro_score.score_factor`.
        """
        # The forward Laplacian differentiates values.
        of = functools.partial(operators.value_score_laplacian, self._log_density, forward=self.has_density)
        return self._over_rows(of, x)

    def _over_rows(self, f: Callable[..., Any], x: Any) -> Any:
        """Applies a function of (M, D) rows to x of any leading shape."""
        x = jnp.asarray(x, self._dtype)
        if x.ndim == 0 or x.shape[-1] != self.dim or x.size == 0:
            raise ValueError(f"x has shape {x.shape}, but a row has {self.dim} numbers: pass (..., {self.dim}).")
        if self.resizable:
            rows = f(x.reshape(-1, self.dim))
            return jax.tree.map(lambda r: r.reshape(x.shape[:-1] + r.shape[1:]), rows)
        n = self.num_rows
        if n == 1:  # one big point: every leading axis is a batch
            x = x[..., None, :]
        elif x.ndim < 2 or x.shape[-2] != n:
            raise ValueError(
                f"x has shape {x.shape}, but the model has {n} rows: pass (..., {n}, {self.dim}), or pass the data as "
                "an argument and let the plate follow its length, e.g. numpyro.plate('data', len(x))."
            )
        rows = jax.vmap(f)(x.reshape(-1, n, self.dim))
        lead = x.shape[:-2] if n == 1 else x.shape[:-1]
        return jax.tree.map(lambda r: r.reshape(lead + r.shape[2:]), rows)

    def bounds(self, n: int) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """Lower and upper bounds of the coordinates of n rows, (N, D) each; infinite where there are none."""
        layout, sites = self._layout.with_rows(n), self._run().sites
        return _layout.coordinate_bounds(sites, layout)

    def _log_density(self, x: Float[Array, "n d"], rows: Array | None = None) -> Float[Array, "n"]:
        at = self.at(x)
        if rows is not None:
            at = at._replace(_plates={**at._plates, **dict.fromkeys(at._layout.row_plates, rows)})
        sites = at._run().sites
        if rows is not None and any(sites[p]["args"][0] != len(rows) for p in at._layout.row_plates):
            raise ValueError("A plate of rows has a fixed size.")
        terms = [_layout.sum_rows(_trace.term_log_prob(sites[k]), at._layout) for k in at._layout.terms]
        coordinates = at._coordinates(x)
        for a in at._layout.arrays:
            u = coordinates[a.name]
            if (log_jacobian := a.support.log_jacobian(u, a.support.to_data(u))) is not None:
                terms.append(_layout.rows_first(log_jacobian, a.row_axes).sum(-1))
        return functools.reduce(jnp.add, terms)

    # -- checks on values -----------------------------------------------------------------------------------------

    def check(self, evaluate: Callable[[Energy], Any] | None = None) -> None:
        """Looks at the data and the density there; needs concrete values.

        Args:
            evaluate: a compiled `evaluate_for_check`, to compile it once for several checks.

        Raises:
            ValueError: NaN or infinity in the data, data outside of the support, a log density or score that is not
                finite there, rows that interact.
        """
        _check.check(self, evaluate)

    # -- reading the model ----------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> Any:
        return jnp.result_type(float)

    def _run(self) -> _trace.Recorder:
        args, kwargs = join_arrays(self._arrays, self._static)
        values = {**self.params, **self._pinned}
        return _trace.run_model(self.model, args, kwargs, values, self._plates, self._rng_key)

    def _read_layout(self) -> Layout:
        dynamic = dict(params=self.params, _arrays=self._arrays, _plates=self._plates, _pinned=self._pinned)
        found: dict[str, Any] = {}

        def read_arrays(dynamic: dict[str, Any]) -> None:
            energy = self._replace(**dynamic)
            named, first = named_arrays(self.model, self._static)
            found["arrays"] = _layout.find_arrays(energy._run(), energy._arrays, named, first, self._choice)

        jax.eval_shape(read_arrays, dynamic)
        arrays: list[DataArray] = found["arrays"]

        def terms(data: list[Any], dynamic: dict[str, Any]) -> list[Any]:
            leaves, pinned = list(dynamic["_arrays"]), dict(dynamic["_pinned"])
            for a, value in zip(arrays, data, strict=True):
                if a.leaf is not None and leaves[a.leaf].shape == a.shape:
                    leaves[a.leaf] = value
                if a.is_site:
                    pinned[a.name] = value
            found["sites"] = sites = self._replace(**dynamic | {"_arrays": leaves, "_pinned": pinned})._run().sites
            log_probs = {k: _trace.term_log_prob(s) for k, s in sites.items() if _trace.is_observed_sample(s)}
            found["shapes"] = {k: v.shape for k, v in log_probs.items()}
            return list(log_probs.values())

        data = [jax.ShapeDtypeStruct(a.shape, self._dtype) for a in arrays]
        jaxpr = jax.make_jaxpr(terms)(data, dynamic).jaxpr
        is_data = [i < len(data) for i in range(len(jaxpr.invars))]
        depends = dict(zip(found["shapes"], _layout.depends_on_inputs(jaxpr, is_data), strict=True))
        layout = _layout.assemble(arrays, found["sites"], found["shapes"], depends)
        if any(a.support.kind == "box" for a in arrays):

            def bounds(params: Any, rest: dict[str, Any]) -> Any:
                return self._replace(**rest, params=params, _layout=layout).bounds(layout.num_rows)

            params = dynamic.pop("params")
            jaxpr = jax.make_jaxpr(bounds)(params, dynamic).jaxpr
            _layout.refuse_moving_bounds(arrays, jaxpr, len(jax.tree.leaves(params)))
        return self._settle_rows(layout)

    def _settle_rows(self, layout: Layout) -> Layout:
        """Decides whether subsampled data can enter through the arguments, and whether another number of rows can."""

        def takes_any_rows(layout: Layout) -> bool:
            if any(len(a.row_axes) != 1 for a in layout.arrays):
                return False
            energy = self._replace(_layout=layout._replace(resizable=True))

            def trace(n: int) -> Any:
                energy.bounds(n)  # as many as there are rows, or the same for all
                x = jax.ShapeDtypeStruct((n, layout.dim), self._dtype)
                rows = jax.ShapeDtypeStruct((n,), jnp.result_type(int))
                return jax.make_jaxpr(energy._log_density)(x, rows)

            try:
                return _layout.treats_rows_alike(trace)
            # Only the model can say which shapes it takes; JAX and NumPyro refuse a wrong one with these.
            except (TypeError, ValueError, IndexError, AssertionError):
                return False

        if takes_any_rows(layout):
            return layout._replace(resizable=True)
        if any(a.leaf is not None and self._arrays[a.leaf].shape != a.shape for a in layout.arrays):
            # Subsampled data of a model that is not free of the rows' numbers: set the value of the site instead.
            layout = layout._replace(arrays=tuple(a._replace(leaf=None) for a in layout.arrays))
            return layout._replace(resizable=takes_any_rows(layout))
        return layout
