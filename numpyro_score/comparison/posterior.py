"""Draws of a generalised posterior, from wherever they come, with what importance weights need."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.transforms import IdentityTransform
from numpyro.infer import MCMC

from numpyro_score.energy import Energy
from numpyro_score.generalized import GeneralizedModel, prior_model
from numpyro_score.inference import ScoreMatchingResult
from numpyro_score.losses import Loss, row_losses
from numpyro_score.losses.base import declare_sites
from numpyro_score.operators import full_precision
from numpyro_score.uncertainty import Objective

__all__ = ["Posterior", "draw_losses", "draws_of"]

# Of Student's t around the estimates of a fit: tails that are heavier than those of nearly all posteriors.
_DEGREES = 5.0
MIN_DRAWS = 25  # below, ArviZ fits no Pareto tail


class Posterior(NamedTuple):
    """S draws of a generalised posterior π(θ) ∝ π₀(θ) exp(−β Σ_n w_n loss_n(θ)), and what they are of."""

    energy: Energy  # at the rows of the data; its params are one of the draws, or the estimates
    draws: dict[str, Any]  # {site: (S, ...)}, chain after chain
    num_chains: int
    loss: Loss
    rng_key: Array  # of the loss, held fixed in the posterior
    learning_rate: Any  # β
    log_weights: np.ndarray  # (S,): log density of the posterior over that of the draws, up to a constant
    efficiency: float  # effective number of draws over S

    @property
    def num_samples(self) -> int:
        """S, of all chains."""
        return len(self.log_weights)


def draws_of(
    source: MCMC | ScoreMatchingResult | GeneralizedModel,
    draws: dict[str, Any] | None,
    rng_key: Array,
    num_samples: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Posterior:
    """Draws of a run, of a fit, or those given with a generalised model; see :func:`hyvarinen_loo`."""
    if isinstance(source, ScoreMatchingResult):
        if draws is not None or args or kwargs:
            raise TypeError("A fit has its own data and draws: pass the fit alone, or generalized_bayes(model, loss).")
        return _from_fit(source, rng_key, num_samples)
    if isinstance(source, MCMC):
        if not isinstance(source.sampler.model, GeneralizedModel):
            raise TypeError(
                "The MCMC run is not over generalized_bayes(model, loss): run it over that, or use az.loo if its own "
                "likelihood is normalised."
            )
        if draws is not None:
            raise TypeError("An MCMC run has its own draws: pass draws=... with generalized_bayes(model, loss).")
        draws, source = source.get_samples(group_by_chain=True), source.sampler.model
    elif not isinstance(source, GeneralizedModel):
        raise TypeError(
            f"Expected a ScoreMatchingResult, an MCMC run over generalized_bayes(model, loss), or that model with "
            f"draws=..., got {type(source).__name__}."
        )
    if draws is None:
        raise TypeError("A generalised model has no draws of its own: pass draws={site: (draw, ...)}.")
    return _from_draws(source, draws, args, kwargs)


def _from_draws(
    model: GeneralizedModel, draws: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Posterior:
    energy = model.energy(*args, **kwargs)
    with handlers.block(), handlers.seed(rng_seed=0):
        trace = handlers.trace(prior_model(model.model, model.data)).get_trace(*args, **kwargs)
        energy = energy.with_params(declare_sites(model.loss, energy))
    latents = {k for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    if missing := sorted(latents - set(draws)):
        raise ValueError(f"draws have no site '{missing[0]}' of the model: pass all that mcmc.get_samples() gives.")
    # Deterministic sites follow from the others.
    draws = {k: jax.tree.map(jnp.asarray, v) for k, v in draws.items() if k in energy.params}
    if not draws:
        raise ValueError("draws have none of the model's sites: a model without latent sites has no posterior.")
    name = next(iter(draws))
    shape, site_ndim = np.shape(draws[name]), np.ndim(energy.params[name])
    lead = shape[: len(shape) - site_ndim]
    for k, v in draws.items():
        if len(lead) not in (1, 2) or np.shape(v) != (*lead, *np.shape(energy.params[k])):
            raise ValueError(
                f"draws of '{k}' have shape {np.shape(v)}, where a value has {np.shape(energy.params[k])}: pass "
                "{site: (draws, ...)} or {site: (chains, draws, ...)}."
            )
        bad = int((~jnp.isfinite(v)).reshape(*lead, -1).any(axis=-1).sum())
        if bad:
            raise ValueError(
                f"{bad} of {int(np.prod(lead))} draws of '{k}' are not finite: the chains may have run away, so run "
                "them again with a smaller step size, or start them at a fit by init_strategy=fit.init_strategy."
            )
    chains = lead[0] if len(lead) == 2 else 1
    if int(np.prod(lead)) < MIN_DRAWS or lead[-1] < 4:
        raise ValueError(f"There are {lead} draws: take at least {MIN_DRAWS}, and 4 of each chain.")
    grouped = {k: np.reshape(v, (chains, lead[-1], -1)) for k, v in draws.items()}
    ess = az.ess(xr.Dataset({k: (("chain", "draw", k + "_dim"), v) for k, v in grouped.items()}), method="mean")
    ess = np.concatenate([np.ravel(v) for v in ess.values()])
    flat = {k: jnp.reshape(v, (-1, *np.shape(energy.params[k]))) for k, v in draws.items()}
    n = int(np.prod(lead))
    rng_key = jax.random.key(0) if model.rng_key is None else model.rng_key  # NumPyro's own for densities
    rate = model.rate(*args, **kwargs)
    first = energy.with_params({k: v[0] for k, v in flat.items()})
    return Posterior(first, flat, chains, model.loss, rng_key, rate, np.zeros(n), float(np.mean(ess)) / n)


def _from_fit(fit: ScoreMatchingResult, rng_key: Array, num_samples: int) -> Posterior:
    loss = fit.svi.score_loss
    if (why := getattr(loss, "no_posterior", None)) is not None:
        raise TypeError(
            f"{type(loss).__name__} gives no posterior, as {why}: fit by ISM or SSM, or use hyvarinen_score."
        )
    if not fit.is_point:
        raise TypeError(
            f"The draws of {type(fit.svi.guide).__name__} are not of the generalised posterior: use NUTS over "
            "generalized_bayes(model, loss), or a point fit (guide=None)."
        )
    if num_samples < MIN_DRAWS:
        raise ValueError(f"num_samples must be at least {MIN_DRAWS}, got {num_samples}.")
    root = np.linalg.inv(np.linalg.cholesky(fit.curvature.hessian))  # rootᵀ root = H⁻¹
    normal_key, radius_key = jax.random.split(rng_key)
    noise = jax.random.normal(normal_key, (num_samples, len(root)))
    noise *= jnp.sqrt(_DEGREES / jax.random.chisquare(radius_key, _DEGREES, (num_samples, 1)))
    vectors = fit.coordinates.position + noise @ jnp.asarray(root, noise.dtype)
    log_density = np.asarray(_log_posterior(fit._objective, vectors), np.float64)
    if not np.isfinite(log_density).all():
        bad = int((~np.isfinite(log_density)).sum())
        raise ValueError(
            f"The generalised posterior is not finite at {bad} of {num_samples} draws around the estimates: use NUTS "
            "over generalized_bayes(model, loss)."
        )
    squared = np.sum(np.square(noise, dtype=np.float64), axis=-1)
    log_weights = log_density + 0.5 * (_DEGREES + len(root)) * np.log1p(squared / _DEGREES)
    draws = jax.vmap(fit.coordinates.constrain)(vectors)
    key = fit._objective.rng_key
    return Posterior(fit._objective.energy, draws, 1, loss, key, fit.learning_rate, log_weights, 1.0)


@jax.jit
@full_precision
def _log_posterior(objective: Objective, vectors: Float[Array, "s p"]) -> Float[Array, "s"]:
    """Log density of the generalised posterior in unconstrained coordinates, (S, P) to (S,)."""

    def one(vector: Array) -> Array:
        log_jacobian = jnp.zeros(())
        for name, free in objective.unravel(vector).items():
            transform = objective.transforms[name]
            if not isinstance(transform, IdentityTransform):  # which may be of a network's pytree
                log_jacobian += jnp.sum(transform.log_abs_det_jacobian(free, transform(free)))
        return log_jacobian - objective(vector)

    return jax.lax.map(one, vectors)


@partial(jax.jit, static_argnames="loss")
@full_precision
def draw_losses(energy: Energy, draws: dict[str, Any], loss: Loss, rng_key: Array) -> Float[Array, "s n"]:
    """The weighted loss w_n loss_n(θ) of each row at each draw, (S, N)."""

    def one(theta: dict[str, Any]) -> Array:
        values, weights = row_losses(loss, energy.with_params(theta), rng_key)
        return weights * values

    return jax.lax.map(one, draws)
