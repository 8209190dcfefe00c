"""What is said when a fit fails."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.placement import fetch

__all__ = ["explain", "explain_terms"]


def explain(fit: ScoreMatchingResult) -> str:
    """What is not finite where a fit has a loss that is not."""
    for name, value in fit.estimates.items():
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(value)):
            return f"site '{name}' is no longer finite after the previous step"
    for energy in fit.energy.parts:
        x, weights = energy.data_and_weights()
        parts = {"log density": energy.log_density} if energy.has_density else {}
        for what, of in {**parts, "score": energy.score}.items():
            bad = ~jnp.isfinite(of(x)).reshape(len(x), -1).all(-1) & (weights != 0)
            count, first = fetch((jnp.sum(bad), jnp.argmax(bad)))
            if count:
                return f"the {what} is not finite in {count} of {len(x)} rows, first row {first}"
    other = "the loss's second derivatives or the prior are not"
    return f"the density and score are finite at the data, so {getattr(fit.svi.score_loss, 'not_finite', other)}"


def explain_terms(terms: Any) -> str:
    """Which of the terms of an adversarial fit is not finite, and why."""
    data_term, bound = terms.data_term[-1], terms.log_partition_bound[-1]
    if not np.isfinite(data_term):
        return f"the data term is {data_term}"
    if not np.isfinite(bound):
        return (
            f"the flow ran away and its bound on log Z is {bound}, because the density has no normaliser or the flow's "
            "steps are too large for it"
        )
    return "the data term and the bound on log Z are finite, so the prior is not"
