"""What a fit minimises, as a function of one unconstrained vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import log_density, transform_fn

from numpyro_score.energy import AnyEnergy, join_arrays, limits, split_arrays
from numpyro_score.losses import Loss, row_losses
from numpyro_score.operators import full_precision
from numpyro_score.programs import shared_jit

__all__ = [
    "NEAR_ZERO",
    "USE_NUTS",
    "Objective",
    "Parametrisation",
    "SandwichError",
    "norm_of_columns",
    "prior_terms",
    "site_blocks",
]


class SandwichError(ValueError):
    """The sandwich covariance of a fit does not exist or is too large to form."""


_FAR = 30.0  # in unconstrained space

NEAR_ZERO = math.exp(-_FAR - 1)  # a scale that floats do not see beside what is of order one

USE_NUTS = "Use NUTS over generalized_bayes(model, loss)."


@dataclass(frozen=True)
class Parametrisation:
    """The map between constrained values by site and one unconstrained vector of P numbers."""

    transforms: dict[str, Any]
    position: Float[Array, "p"]  # of the estimates
    unravel: Callable[[Array], dict[str, Any]]

    @classmethod
    def of_sites(cls, sites: dict[str, Any]) -> Parametrisation:
        """From the latent and param sites of a traced model, at their values there."""
        transforms, values = {}, {}
        for name, site in sites.items():
            if site["type"] == "param":
                constraint = site["kwargs"].get("constraint", constraints.real)
            elif site["type"] == "sample" and not site["is_observed"]:
                constraint = site["fn"].support
            else:
                continue
            transforms[name] = biject_to(constraint)
            values[name] = transforms[name].inv(site["value"])
        position, unravel = ravel_pytree(values)
        return cls(transforms, position, unravel)

    def constrain(self, vector: Float[Array, "p"]) -> dict[str, Any]:
        """Constrained values by site."""
        return transform_fn(self.transforms, self.unravel(vector))

    def at_an_end(self) -> np.ndarray:
        """Which coordinates are at the end of their constraint to all that floats show, as a scale at zero, (P,)."""
        return _at_an_end(self.transforms, self.unravel(self.position))

    def stderr(self, covariance: np.ndarray) -> dict[str, Any]:
        """Standard errors in constrained space by the delta method, in the sites' own shapes."""
        root = _root(covariance)
        return _delta_method(
            self.position, self.transforms, jnp.asarray(root, self.position.dtype), unravel=self.unravel
        )

    def draw(self, rng_key: Array, covariance: np.ndarray, n: int) -> dict[str, Any]:
        """N draws from N(position, covariance), constrained: {site: (n, ...)}."""
        root = jnp.asarray(_root(covariance), self.position.dtype)
        return _draws(rng_key, self.position, self.transforms, root, unravel=self.unravel, n=n)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("position", "transforms", "energy", "arrays", "learning_rate", "rng_key"),
    meta_fields=("unravel", "loss", "prior", "static", "by_coordinate"),
)
@dataclass(frozen=True)
class Objective:
    r"""What a fit minimises, :math:`\beta\sum_n w_n \ell_n(\theta) - \log\pi_0(\theta)`, of one unconstrained vector.

    A pytree, so that compiled functions of it serve all data of the same shapes. A stochastic loss is taken at the
    random numbers of one key.
    """

    position: Any  # of the estimates, (P,)
    transforms: Any
    energy: Any
    arrays: Any
    learning_rate: Any
    rng_key: Any
    unravel: Any
    loss: Any
    prior: Any
    static: Any
    by_coordinate: bool = False  # whether the rows are the numbers of one point of data

    @classmethod
    def of(
        cls,
        energy: AnyEnergy,
        coordinates: Parametrisation,
        loss: Loss,
        learning_rate: Any,
        prior: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rng_key: Array,
    ) -> Objective:
        """At the estimates; `prior` is the model's parameters alone, as :func:`prior_model` makes it."""
        arrays, static = split_arrays((args, kwargs), prior, loss)
        c = coordinates
        return cls(c.position, c.transforms, energy, arrays, learning_rate, rng_key, c.unravel, loss, prior, static)

    def constrain(self, vector: Array) -> dict[str, Any]:
        """Constrained values by site."""
        return Parametrisation(self.transforms, self.position, self.unravel).constrain(vector)

    @full_precision
    def rows(self, vector: Array) -> Array:
        """The weighted loss of each row, w_n ℓ_n, (N,): without β."""
        energy = self.energy.with_params(self.constrain(vector))
        if self.by_coordinate:
            return energy.weights * self.loss.by_coordinate(energy, self.rng_key)[0]
        values, weights = row_losses(self.loss, energy, self.rng_key)
        return weights * values

    def used(self) -> Array:
        """Which rows have a weight, (N,): the others, masked ones for instance, are no data."""
        used = self.energy.usable()[1] != 0
        return jnp.broadcast_to(used, self.energy.dim) if self.by_coordinate else used

    @full_precision
    def penalty(self, vector: Array) -> Array:
        """The log prior, negative."""
        args, kwargs = join_arrays(self.arrays, self.static)
        seeded = handlers.seed(self.prior, jax.random.key(0))
        return -jnp.asarray(log_density(seeded, args, kwargs, self.constrain(vector))[0])

    @full_precision
    def prior_terms(self, free: dict[str, Any]) -> dict[str, Array]:
        """The terms of :meth:`penalty` by the name of their site, from unconstrained values by site."""
        args, kwargs = join_arrays(self.arrays, self.static)
        return prior_terms(self.prior, args, kwargs, transform_fn(self.transforms, free))

    def at_an_end(self) -> np.ndarray:
        """Which coordinates are at the end of their constraint, (P,): see :class:`Parametrisation`."""
        return Parametrisation(self.transforms, self.position, self.unravel).at_an_end()

    def blocks(self) -> dict[str, np.ndarray]:
        """The coordinates of each site."""
        return site_blocks(self.unravel, len(self.position))

    def __call__(self, vector: Array) -> Array:
        """The value of the objective."""
        return self.learning_rate * jnp.sum(self.rows(vector)) + self.penalty(vector)


def prior_terms(
    prior: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Any]
) -> dict[str, Array]:
    """Minus the log prior by the names of its sites, at constrained values; `prior` is as prior_model makes it."""
    prior = handlers.substitute(handlers.seed(prior, jax.random.key(0)), data=values)
    sites = {k: s for k, s in handlers.trace(prior).get_trace(*args, **kwargs).items() if s["type"] == "sample"}
    scales = {k: 1.0 if s["scale"] is None else s["scale"] for k, s in sites.items()}
    return {k: -jnp.sum(scales[k] * s["fn"].log_prob(s["value"])) for k, s in sites.items()}


def site_blocks(unravel: Callable[[Array], dict[str, Any]], size: int) -> dict[str, np.ndarray]:
    """The coordinates of each site in a vector (P,)."""
    numbers = unravel(jnp.arange(size, dtype=jnp.result_type(float)))
    return {
        k: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)] or [np.zeros(0)]).astype(int)
        for k, v in numbers.items()
    }


def _at_an_end(transforms: dict[str, Any], free: dict[str, Any]) -> np.ndarray:
    found = {name: jax.tree.map(partial(_beside, transforms[name]), values) for name, values in free.items()}
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)] or [np.zeros(0, bool)])


def _beside(transform: Any, free: Any) -> np.ndarray:
    """Which numbers of an unconstrained array are, as constrained ones, beside an end."""
    ends = [end for end in limits(transform.codomain) if np.isfinite(end).all()]
    beside = np.zeros(np.shape(free), bool)
    if ends or isinstance(transform.codomain, type(constraints.simplex)):
        beside |= np.abs(np.asarray(free)) > _FAR
        value, rounding = np.asarray(transform(free), np.float64), float(jnp.finfo(jnp.result_type(free)).eps)
        for end in ends:
            beside |= np.abs(value - end) <= 8 * rounding * reduce(np.maximum, map(np.abs, ends))
    return beside


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R Rᵀ the covariance, in double precision, as variances may be beyond the range of single."""
    covariance = np.asarray(covariance, np.float64)
    scale = np.sqrt(np.diag(covariance))
    scale = np.where(scale > 0, scale, 1.0)
    # Not Cholesky: where the data leave a direction free, the covariance is singular.
    variances, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    return scale[:, None] * axes * np.sqrt(np.maximum(variances, 0.0))


@partial(shared_jit, static_argnames=("unravel",))
def _delta_method(position: Array, transforms: Any, root: Array, *, unravel: Any) -> dict[str, Any]:
    constrain = Parametrisation(transforms, position, unravel).constrain

    def row(direction: Array) -> Array:
        return jax.jvp(lambda v: ravel_pytree(constrain(v))[0], (position,), (direction,))[1]

    images = jax.lax.map(row, root.T, batch_size=64)  # (P, Q), of the covariance's principal axes
    return ravel_pytree(constrain(position))[1](norm_of_columns(images))


@partial(shared_jit, static_argnames=("unravel", "n"))
def _draws(rng_key: Array, position: Array, transforms: Any, root: Array, *, unravel: Any, n: int) -> dict[str, Any]:
    draws = position + jax.random.normal(rng_key, (n, len(position)), position.dtype) @ root.T
    return jax.vmap(Parametrisation(transforms, position, unravel).constrain)(draws)


def norm_of_columns(x: Float[Array, "n *columns"]) -> Float[Array, "*columns"]:
    """Euclidean norms over the first axis, also of numbers whose squares are out of the range of floats."""
    largest = jnp.max(jnp.abs(x), axis=0)
    largest = jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum((x / largest) ** 2, axis=0))
