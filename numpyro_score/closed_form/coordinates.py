"""The parameters of a quadratic objective as one vector, in their constraints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro.distributions import constraints

from numpyro_score.energy import base_constraint, limits
from numpyro_score.printed import num_numbers
from numpyro_score.uncertainty import NEAR_ZERO

__all__ = ["ClosedFormError", "Coordinates", "FlatObjectiveError"]


class ClosedFormError(ValueError):
    """The objective has no closed-form minimiser: it is not quadratic, or its minimum violates a constraint."""


class FlatObjectiveError(ClosedFormError):
    """The objective is quadratic, but the data and the prior leave a direction of the parameters free."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The constrained values of all latent and param sites as one vector of P numbers, sites in alphabetical order."""

    supports: dict[str, constraints.Constraint]
    values: dict[str, Any]  # somewhere inside the supports

    def __repr__(self) -> str:
        return f"{num_numbers(self.values)}: {', '.join(sorted(self.supports))}"

    @classmethod
    def of_sites(cls, sites: dict[str, Any]) -> Coordinates:
        """From the sites of a traced model.

        Raises:
            ClosedFormError: for a site whose support is not an open box.
        """
        supports = {
            name: site["kwargs"].get("constraint", constraints.real) if site["type"] == "param" else site["fn"].support
            for name, site in sites.items()
            if site["type"] == "param" or (site["type"] == "sample" and not site["is_observed"])
        }
        for name, support in supports.items():
            base = base_constraint(support)
            if not isinstance(base, _BOXES) or isinstance(base, type(constraints.circular)):
                raise ClosedFormError(
                    f"Site '{name}' has support {type(base).__name__.strip('_').lower()}, which has no coordinates in "
                    "which a quadratic could be minimised: use ScoreMatching with its optimiser."
                )
        return cls(supports, {name: sites[name]["value"] for name in supports})

    @property
    def size(self) -> int:
        """P."""
        return sum(np.size(leaf) for leaf in jax.tree.leaves(self.values))

    @property
    def unravel(self) -> Callable[[Array], dict[str, Any]]:
        """From a vector (P,) to values by site; equal for equal sites, so that functions of it compile once."""
        return ravel_pytree(self.values)[1]

    def ravel(self) -> Array:
        """The values as a vector (P,)."""
        return ravel_pytree(self.values)[0]

    def by_site(self, vector: np.ndarray) -> dict[str, Any]:
        """Values by site, in the precision in force."""
        return self.unravel(jnp.asarray(vector, jnp.result_type(float)))

    def site_of(self, index: int) -> str:
        """The site that a coordinate belongs to."""
        sizes = {k: sum(map(np.size, jax.tree.leaves(v))) for k, v in sorted(self.values.items())}
        return list(sizes)[int(np.searchsorted(np.cumsum(list(sizes.values())), index, side="right"))]

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper bound of each coordinate, (P,) each; infinite where there is none."""
        found = []
        for name, value in sorted(self.values.items()):
            bounds = [np.asarray(bound, np.float64) for bound in limits(self.supports[name])]
            for leaf in jax.tree.leaves(value):
                found.append([np.ravel(np.broadcast_to(bound, np.shape(leaf))) for bound in bounds])
        lower, upper = (np.concatenate(of_leaves) for of_leaves in zip(*found, strict=True))
        return lower, upper

    def beside_ends(self, vector: np.ndarray, at: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
        """A vector (P,) with what is at an end moved inside by all but nothing, as constraints are open.

        Args:
            vector: the values.
            at: −1 at the lower end, 1 at the upper, else 0, (P,).
            curvatures: of the objective, (P,), which say what is nothing beside a parameter's errors.
        """
        ends = self.ends()
        end = np.select([at < 0, at > 0], ends, 0.0)
        largest = np.max([np.abs(e, where=np.isfinite(e), out=np.zeros_like(e)) for e in ends], axis=0)
        gap = np.minimum(NEAR_ZERO, 1e-6 / np.sqrt(curvatures))
        gap = np.maximum(gap, 4 * float(jnp.finfo(jnp.result_type(float)).eps) * largest)
        return np.where(at == 0, vector, end - at * gap)

    def require_inside(self, vector: np.ndarray) -> None:
        """Raises ClosedFormError unless the values are inside their supports."""
        for name, value in self.by_site(vector).items():
            for leaf in jax.tree.leaves(value):
                finite = jnp.isfinite(dist.biject_to(self.supports[name]).inv(leaf)).all()
                if not (finite and jnp.all(self.supports[name](leaf))):
                    raise ClosedFormError(
                        f"The minimum of the quadratic violates the constraint of site '{name}': use ScoreMatching, "
                        "which stays inside."
                    )


_BOXES = (type(constraints.real), constraints.greater_than, constraints.less_than, constraints.interval)
