"""Draws of a generalised posterior with the spread of the estimates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from numpyro_score.inference.result import ScoreMatchingResult

__all__ = ["adjust_draws"]


def adjust_draws(draws: dict[str, Any], fit: ScoreMatchingResult) -> dict[str, Any]:
    r"""Draws of the generalised posterior, moved so that they have the spread of the estimates.

    .. math:: \theta^* = \hat\theta + C(\theta - \hat\theta), \quad C = (H^{-1} S)^{1/2},

    in unconstrained coordinates, with H the Hessian of the whole objective and S the covariance of its gradient at the
    estimates [Ribatet, Cooley & Davison 2012; Shaby 2014]. Posterior draws have the covariance H⁻¹ to first order;
    then θ* has C H⁻¹ Cᵀ = H⁻¹SH⁻¹, the sandwich. Other C have this too; the principal root, taken here, depends
    neither on the order of the parameters nor on their units, and where H = S, as for a likelihood that is right, it is
    I. A calibrated learning rate matches one number, the trace; this matches the whole covariance.

    Args:
        draws: as `mcmc.get_samples()` gives them, {site: (n, ...)}, or grouped by chain, {site: (chains, n, ...)}.
            They have to be from `generalized_bayes(model, loss, fit.learning_rate)`, at the β of the fit: draws do not
            say at which β they are, so this is not checked.
        fit: a fit of the same model to the same data.

    Returns:
        Draws in constrained space, of the same shapes. Deterministic sites are computed anew.

    Raises:
        ValueError: if the sites of the draws are not those of the fit, or draws are outside of their support.
        SandwichError: as `fit.covariance()`.
    """
    coordinates, curvature = fit.coordinates, fit.curvature
    parameters = set(coordinates.transforms)
    if missing := sorted(parameters - set(draws)):
        raise ValueError(
            f"draws have no site '{missing[0]}', which the fit estimates: pass all of mcmc.get_samples(), and declare "
            "with numpyro.sample what is now a numpyro.param, as MCMC holds these fixed."
        )
    if unknown := sorted(set(draws) - set(fit.deterministic_sites) - parameters):
        raise ValueError(f"draws have a site '{unknown[0]}', which the fit does not: pass draws of the same model.")
    axes = {k: np.ndim(draws[k]) - np.ndim(fit.estimates[k]) for k in parameters}
    name = min(axes, key=lambda k: axes[k])
    lead = np.shape(draws[name])[: axes[name]]
    if len(lead) not in (1, 2) or any(np.shape(draws[k]) != lead + np.shape(fit.estimates[k]) for k in parameters):
        shapes = {k: np.shape(draws[k]) for k in sorted(parameters)}
        raise ValueError(f"draws have the shapes {shapes}: pass {{site: (n, ...)}} or {{site: (chains, n, ...)}}.")

    flat = {k: jnp.reshape(draws[k], (-1, *np.shape(fit.estimates[k]))) for k in parameters}
    free = jax.vmap(lambda d: ravel_pytree({k: t.inv(d[k]) for k, t in coordinates.transforms.items()})[0])(flat)
    if not bool(jnp.all(jnp.isfinite(free))):
        raise ValueError("Some draws are not finite or outside of their support: pass mcmc.get_samples() as it is.")
    # With H = LLᵀ the root is L⁻ᵀ(Lᵀ V L)^½ Lᵀ, of a symmetric matrix.
    lower = np.linalg.cholesky(curvature.hessian)
    values, vectors = np.linalg.eigh(lower.T @ curvature.covariance @ lower)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    c = jnp.asarray(np.linalg.solve(lower.T, root @ lower.T), free.dtype)
    centre = coordinates.position
    moved = fit.with_deterministic(jax.vmap(coordinates.constrain)(centre + (free - centre) @ c.T))
    return {k: jnp.reshape(v, (*lead, *v.shape[1:])) for k, v in moved.items()}
