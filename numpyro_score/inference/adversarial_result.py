"""What a fit by adversarial dynamics embedding returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Float

from numpyro_score.energy import Energy
from numpyro_score.flows.dynamics import DynamicsFlow
from numpyro_score.inference.cost import FitCost
from numpyro_score.inference.summary import Summary, rows_of, summarise_estimates
from numpyro_score.printed import name_of, values_with_errors

__all__ = ["AdversarialResult", "AdversarialState", "AdversarialTerms"]


class AdversarialState(NamedTuple):
    """The state of an :class:`AdversarialDynamicsEmbedding` between two steps."""

    optim_state: Any  # of the model's parameters, as SVI's
    flow_params: dict[str, Any]  # in unconstrained space
    flow_optimizer: optax.OptState
    rng_key: Array  # ()


class AdversarialTerms(NamedTuple):
    """What a step reports, at the parameters before it."""

    loss: Float[Array, ""]  # Σw (bound − data term) − log prior
    data_term: Float[Array, ""]  # the weighted mean of f over rows
    log_partition_bound: Float[Array, ""]  # of log Z, from this step's draws
    joint_entropy: Float[Array, ""]  # of the flow; exact if it keeps volume, else from this step's draws


@dataclass(frozen=True)
class AdversarialResult:
    """A fitted model, and the flow that bounds its normaliser.

    Attributes:
        params: constrained values of the param sites of model and guide, as SVI's.
        state: the last state; pass it as `init_state` to go on.
        losses: of every step, (S,): −Σ_n w_n f(x_n) + Σ_n w_n · bound − log prior, with the bound that θ's step uses.
        data_term: of every step, (S,): the weighted mean of f over rows.
        log_partition_bound: of every step, (S,): this step's estimate of the bound on log Z.
        joint_entropy: of every step, (S,): of the flow's x and auxiliary rows.
        energy: the model bound to its estimates, on all rows of its data.
        flow: the fitted flow, along the energy's score.
        interrupted: whether Ctrl-C ended the fit early.
        cost: seconds, memory and evaluations of the density that the run took.
    """

    params: dict[str, Any]
    state: AdversarialState
    losses: np.ndarray
    data_term: np.ndarray
    log_partition_bound: np.ndarray
    joint_entropy: np.ndarray
    energy: Energy
    flow: DynamicsFlow
    interrupted: bool = False
    cost: FitCost | None = None

    def __repr__(self) -> str:
        head = f"AdversarialResult of {len(self.losses)} steps, last loss {self.losses[-1]:.6g}"
        return "\n  ".join([head, *values_with_errors(self.estimates, None)])

    @cached_property
    def estimates(self) -> dict[str, Any]:
        """Constrained values by site, latents and params alike."""
        return dict(self.energy.params)

    def summary(self) -> Summary:
        """The fit as a table of the numbers that it has estimated; a bound on log Z gives no errors of these.

        Returns:
            A `pandas.DataFrame` that prints as text, and in notebooks as HTML.
        """
        return summarise_estimates(
            self.estimates,
            f"{name_of(self.energy.model)} by adversarial dynamics embedding on {rows_of(self.energy)}, "
            f"{len(self.losses)} steps; log Z at least {self.log_partition_bound[-1]:.4g} in the last.",
            "No standard errors: likelihood is bounded by a flow, and the rows' own gradients of it are not known. "
            "Start ScoreMatching at these estimates for errors of its own.",
        )
