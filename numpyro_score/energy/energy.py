"""A model bound to parameter values, as a density of its data and pure functions of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score import operators
from numpyro_score.energy.base import AnyArray, Table
from numpyro_score.energy.check import check
from numpyro_score.energy.latents import marginals
from numpyro_score.energy.reading import ReadModel
from numpyro_score.energy.values import check_rows
from numpyro_score.programs import being_traced, run_compiled

__all__ = ["Energy"]


@jax.tree_util.register_pytree_node_class
class Energy(ReadModel):
    r"""A NumPyro model bound to parameter values: a density of its data, known up to a constant.

    The log density is :math:`f_\theta(x)`, the sum of every `numpyro.factor` and every `log_prob` of an observed site
    that depends on the data :math:`x`; the normaliser :math:`Z(\theta)` is never needed. The energy of physics is
    :math:`E = -f`. Rows are independent: row n of the data adds its own :math:`f_n(x_n)`.

    Data are the observed continuous sample sites and the discrete ones without a law of their own, concatenated into
    one row of `dim` numbers. A model without any takes the discrete sites that a factor depends on, or else its first
    positional argument, or else all discrete sites. All other observed sites and arguments are conditioned on.

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
        ValueError, TypeError, NotImplementedError: if the model's density is not a sum over rows of data. The message
            names the site and what to write instead.

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

    @property
    def discrete_columns(self) -> np.ndarray:
        """Which numbers of a row are discrete, (K,)."""
        return self._layout.discrete_columns

    @property
    def is_mixed(self) -> bool:
        """Whether a row holds discrete and continuous numbers."""
        return 0 < len(self.discrete_columns) < self.dim

    @property
    def is_quadratic(self) -> bool:
        """Whether the log density is a quadratic of the discrete numbers, whose second derivatives all rows share."""
        return self._layout.quadratic

    @property
    def missing(self) -> Bool[Array, "n d"] | None:
        """Which numbers of a row the density is summed over, (N, D), at rows with missing cells; None elsewhere."""
        return None

    def log_density(self, x: Float[AnyArray, "*batch d"] | Table) -> Float[Array, "*batch"]:
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
        return self._over_rows(_values, x)

    def score(self, x: Float[AnyArray, "*batch d"] | Table) -> Float[Array, "*batch d"]:
        """The score ∇f(x) of each row: (..., D) to (..., D). Scale, mask and subsampling do not enter.

        Raises:
            TypeError: for discrete data, which have none.
        """
        self.require_continuous()
        return self._over_rows(_scores, x)

    def laplacian(self, x: Float[AnyArray, "*batch d"] | Table) -> Float[Array, "*batch"]:
        """The Laplacian tr ∇²f(x) of each row: (..., D) to (...). Exact; costs D + 2 densities."""
        return self.value_score_laplacian(x)[2]

    def value_score_laplacian(
        self, x: Float[AnyArray, "*batch d"] | Table
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"], Float[Array, "*batch"]]:
        """The log density, its score and its Laplacian in one pass: (..., D) to ((...), (..., D), (...)).

        The value is NaN for a model with a :func:`~numpyro_score.score_factor`.

        Raises:
            TypeError: for discrete data.
        """
        self.require_continuous()
        return self._over_rows(_values_scores_laplacians, x)

    def latent_probabilities(self, x: Float[AnyArray, "n d"] | Table) -> dict[str, Float[Array, "n *rest k"]]:
        """The law of the discrete latent sites of each row given its data, by site, (N, ..., K) for K values.

        They are those that the density is summed over, marked by `infer={"enumerate": "parallel"}`: e.g. from which
        component of a mixture each row is.

        Raises:
            ValueError: if the model has no such site.
        """
        layout = self._layout
        if not layout.latents:
            raise ValueError(
                "The model has no latent site of rows that is summed: mark one in the plate of rows, e.g. "
                "numpyro.sample('z', dist.Categorical(w), infer={'enumerate': 'parallel'})."
            )
        return run_compiled(_latent_probabilities, self.at(x))

    def require_continuous(
        self,
        owner: str = "A score",
        instead: str = "use PseudoLikelihood(), RatioMatching() or DiscreteFisher(), with Mixed(...) beside continuous "
        "sites",
    ) -> None:
        """Raises TypeError if some of the data are discrete, whose density has no derivatives."""
        for a in self.arrays:
            if a.support.is_discrete:
                raise TypeError(
                    f"{owner} needs derivatives in the data, and site '{a.name}' is discrete ({a.support.kind}): "
                    f"{instead}."
                )

    def _over_rows(self, f: Callable[[Energy, Array], Any], x: Any) -> Any:
        """Applies a function of (M, D) rows to x of any leading shape."""
        x = self._from_table(x)
        check_rows("x", x)
        x = jnp.asarray(x, self.dtype)
        if x.ndim == 0 or x.shape[-1] != self.dim or x.size == 0:
            raise ValueError(f"x has shape {x.shape}, but a row has {self.dim} numbers: pass (..., {self.dim}).")
        if not self.resizable and self.num_rows > 1 and (x.ndim < 2 or x.shape[-2] != self.num_rows):
            raise ValueError(
                f"x has shape {x.shape}, but the model has {self.num_rows} rows: pass (..., {self.num_rows}, "
                f"{self.dim}), or pass the data as an argument and let the plate follow its length, e.g. "
                "numpyro.plate('data', len(x))."
            )
        if being_traced((self, x)):
            return _of_rows(f, self, x)
        # Traced at each call, as the model may read what has changed; compiled where that made other operations of it.
        return run_compiled(functools.partial(_of_rows, f), self, x)

    def check(self, evaluate: Callable[[Energy], Any] | None = None) -> None:
        """Looks at the data and the density there; needs concrete values.

        Args:
            evaluate: a compiled `evaluate_for_check`, to compile it once for several checks.

        Raises:
            ValueError: NaN or infinity in the data, data outside of the support, a log density or score that is not
                finite there, rows that interact.
        """
        check(self, evaluate)


def _of_rows(f: Callable[[Energy, Array], Any], energy: Energy, x: Array) -> Any:
    """What a function of (M, D) rows gives for x of any leading shape."""
    d, n, lead = energy.dim, energy.num_rows, x.shape[:-1]
    # A batch of one would make XLA's kernels for images slower.
    if energy.resizable or x.size == n * d:
        rows = f(energy, x.reshape(-1, d))
        return jax.tree.map(lambda r: r.reshape(lead + r.shape[1:]), rows)
    # One big point has every leading axis as a batch.
    rows = jax.vmap(lambda y: f(energy, y))(x.reshape(-1, n, d))
    return jax.tree.map(lambda r: r.reshape(lead + r.shape[2:]), rows)


def _values(energy: Energy, x: Array) -> Array:
    return energy.row_log_density(x)


def _scores(energy: Energy, x: Array) -> Array:
    return operators.value_score(energy.row_log_density, x)[1]


def _latent_probabilities(energy: Energy) -> dict[str, Array]:
    joint = jax.nn.softmax(energy._terms_by_assignment(energy._layout.terms), axis=0)
    return marginals(energy._layout.latents, joint)


def _values_scores_laplacians(energy: Energy, x: Array) -> tuple[Array, Array, Array]:
    # The forward Laplacian differentiates values.
    return operators.value_score_laplacian(energy.row_log_density, x, forward=energy.has_density)
