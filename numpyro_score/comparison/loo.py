"""Comparison of models by the Hyvärinen score of their predictions: of new rows, and leave-one-out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from numpyro.infer import MCMC

from numpyro_score.comparison.posterior import Posterior, draw_losses, draws_of
from numpyro_score.energy import Energy, one_plate, refuse_other_axes, refuse_other_columns
from numpyro_score.generalized import GeneralizedModel
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.losses.base import refuse_kinks_of_score
from numpyro_score.losses.terms import exact_terms
from numpyro_score.normaliser.ratios import mcse, pareto_smoothed, partition_ratios
from numpyro_score.operators import full_precision
from numpyro_score.random import Key, as_key

__all__ = ["HyvarinenScore", "hyvarinen_loo", "hyvarinen_score"]

Predictive = Literal["pool", "mixture"]


@dataclass(frozen=True, repr=False)
class HyvarinenScore:
    r"""The Hyvärinen score of a model's predictions: a sum over rows, lower is better.

    Fields are named as in ArviZ's `ELPDData`, so that `az.plot_khat` and its like understand them.

    Attributes:
        estimate: Σ_n w_n H_n.
        se: its standard error as a sum over rows that could have been others.
        mcse: its Monte Carlo standard error, from the finite number of draws; 0 without draws. Where a Pareto k is
            above about 0.4 it is on the small side, as the draws that matter most are those that are missing.
        pointwise: H_n of each row that has a weight, with the number of the row as coordinate.
        pointwise_mcse: Monte Carlo standard errors of these.
        pareto_k: tail index of each row's importance weights, or None where there are none.
        good_k: above it these weights do not give the posterior that they are for: min(1 − 1/log₁₀S, 0.7).
        n_samples: S, the number of draws; 1 for a point fit.
        n_data_points: rows that have a weight.
        warning: whether some `pareto_k` is above `good_k`.
        predictive: "pool", "mixture" or "plug-in", the density that predicts.
        kind: "loo" or "held-out".
        scale: what H is.
    """

    estimate: float
    se: float
    mcse: float
    pointwise: xr.DataArray
    pointwise_mcse: xr.DataArray
    pareto_k: xr.DataArray | None
    good_k: float
    n_samples: int
    n_data_points: int
    warning: bool
    predictive: str
    kind: str
    scale: str = "½‖∇log p‖² + Δlog p, lower is better"

    def __repr__(self) -> str:
        label = f"hyvarinen_{self.kind.replace('-', '_')}"
        lines = [
            f"Computed from {self.n_samples} posterior samples and {self.n_data_points} observations, "
            f"{self.predictive} prediction.",
            f"Scale: {self.scale}.",
            "",
            f"{'':{len(label)}} Estimate       SE     MCSE",
            f"{label} {self.estimate:8.2f} {self.se:8.2f} {self.mcse:8.2f}",
        ]
        if self.pareto_k is not None:
            k, good = self.pareto_k.values, self.good_k
            counts = [np.sum(k <= good), np.sum((k > good) & (k <= 1)), np.sum(k > 1)]
            names = [f"(-Inf, {good:.2f}]   (good)", f"   ({good:.2f}, 1]   (bad)", "    (1, Inf)   (very bad)"]
            lines += ["------", "", "Pareto k diagnostic values:", f"{'':25} {'Count':>6} {'Pct.':>7}"]
            lines += [f"{a:25} {c:6d} {100 * c / len(k):6.1f}%" for a, c in zip(names, counts, strict=True)]
        return "\n".join(lines)


def hyvarinen_loo(
    source: ScoreMatchingResult | MCMC | GeneralizedModel,
    *args: Any,
    draws: dict[str, Any] | None = None,
    predictive: Predictive = "pool",
    rng_key: Key | None = None,
    num_samples: int = 4000,
    **kwargs: Any,
) -> HyvarinenScore:
    r"""Leave-one-out Hyvärinen score by Pareto-smoothed importance sampling; no normaliser is needed by default.

    With :math:`\pi_{-n}(\theta) \propto \pi(\theta)\, e^{\beta w_n \ell_n(\theta)}` the generalised posterior without
    row n [the weights undo the row's loss], the score of row n is that of a density which predicts it:

    - "pool", the logarithmic pool :math:`\log q = \mathrm{E}_{\pi_{-n}} \log p_\theta + \text{const}`, whose score
      needs no Z:

      .. math:: H_n = \tfrac12 \|\mathrm{E}\nabla\log p_\theta\|^2 + \mathrm{E}\Delta\log p_\theta .

    - "mixture", the posterior predictive :math:`q = \mathrm{E}_{\pi_{-n}} p_\theta` [Dawid & Musio 2015; Shao, Jacob,
      Ding & Tarokh 2019]:

      .. math:: H_n = \mathrm{E}\bigl[\Delta\log p_\theta + \|\nabla\log p_\theta\|^2\bigr]
                      - \tfrac12 \|\mathrm{E}\nabla\log p_\theta\|^2 ,

      where the expectations are over :math:`\pi_{-n}(\theta)\, p_\theta(x_n)`, the posterior that has seen the row
      through its likelihood. So it needs Z(θ), up to a constant: ratios are estimated from draws of the model.

    These are half of the H of Dawid & Musio and so on the scale of :class:`~numpyro_score.ISM`. The two differ by
    the spread of the posterior, a term of order 1/N in each row. On other supports than R^D the objective of ISM there
    takes the place of ∇ and Δ. Under ordinary Bayes, :math:`\ell_n = -\log p_\theta(x_n)`, the weights of the mixture
    are all equal and its expectations are over the posterior itself, as the two papers have it.

    Args:
        source: where draws of the generalised posterior come from.

            - an MCMC run over `generalized_bayes(model, loss)`, with the model's arguments after it;
            - a point fit: its own draws are N(estimate, sandwich), which is not the generalised posterior, so that
              draws of Student's t with 5 degrees of freedom around the estimate and the scale H⁻¹, with H the Hessian
              of the objective, are weighted to it. Params have no prior and get a flat one on their constrained
              values;
            - `generalized_bayes(model, loss)`, with the model's arguments after it and `draws`.
        *args: the model's arguments, whose rows are left out.
        draws: {site: (draw, ...)} or {site: (chain, draw, ...)}, as MCMC gives them.
        predictive: the density that predicts.
        rng_key: a key for the draws of a fit and of the mixture's rows; `jax.random.key(0)` if not given.
        num_samples: draws of a fit.
        **kwargs: the model's keyword arguments.

    Raises:
        TypeError, ValueError: for a source without draws of a generalised posterior; draws that are not finite or of
            other shapes than the sites; fewer than 25. With "mixture", as :func:`~numpyro_score.sample`.
        SandwichError: for a fit whose objective is not curved upwards.

    Warns:
        UserWarning: if the weights of some row have a Pareto k above `good_k`: its score is not to be trusted.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import ScoreMatching, hyvarinen_loo
        >>> def model(x):
        ...     tau = numpyro.sample("tau", dist.HalfNormal(5.0))
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> fit = ScoreMatching(model).run(jax.random.key(0), jax.random.normal(jax.random.key(1), (200,)))
        >>> loo = hyvarinen_loo(fit)
        >>> abs(loo.estimate + 100) < 5 * loo.se  # −N/2 for a standard normal law
        True
    """
    if predictive not in ("pool", "mixture"):
        raise ValueError(f"predictive must be 'pool' or 'mixture', got {predictive!r}.")
    rng_key = as_key(0 if rng_key is None else rng_key)
    draw_key, ratio_key = jax.random.split(rng_key)
    posterior = draws_of(source, draws, draw_key, num_samples, args, kwargs)
    refuse_kinks_of_score(posterior.energy, "kl_divergence")
    losses = draw_losses(posterior.energy, posterior.draws, posterior.loss, posterior.rng_key)
    log_weights = posterior.log_weights[:, None] + float(posterior.learning_rate) * np.asarray(losses, np.float64)
    return _weighted(posterior, log_weights, predictive, ratio_key, "loo", smooth=True)


def hyvarinen_score(
    source: ScoreMatchingResult | AdversarialResult | MCMC | GeneralizedModel | Energy,
    *args: Any,
    draws: dict[str, Any] | None = None,
    predictive: Predictive | Literal["plug-in"] | None = None,
    rng_key: Key | None = None,
    **kwargs: Any,
) -> HyvarinenScore:
    r"""The Hyvärinen score of new rows, by the plug-in density of a fit or under draws of a posterior.

    A fit is taken at its point estimates, :math:`H_n = \tfrac12\|\nabla\log p(x_n)\|^2 + \Delta\log p(x_n)`. Draws
    predict by their "pool" (default) or "mixture", as :func:`hyvarinen_loo` explains, with the posterior as it is.

    Args:
        source: a fit or an energy, or an MCMC run over `generalized_bayes(model, loss)`, or that model with `draws`.
        *args: the model's arguments with the new rows in place of the data; none for an energy, which has its own.
        draws: as in :func:`hyvarinen_loo`.
        predictive: "pool" or "mixture" for draws.
        rng_key: a key for the rows of the mixture; `jax.random.key(0)` if not given.
        **kwargs: the model's keyword arguments.

    Raises:
        TypeError, ValueError: as :func:`hyvarinen_loo`; a fit without new arguments.
    """
    if isinstance(source, Energy | ScoreMatchingResult | AdversarialResult):
        if draws is not None or predictive not in (None, "plug-in"):
            raise TypeError("A fit predicts by its estimates: pass generalized_bayes(model, loss) for draws.")
        energy = at_arguments(source, args, kwargs)
        energy.check()
        refuse_kinks_of_score(energy, "kl_divergence")
        values, weights = jax.device_get(_plug_in(energy))
        return _summary(values, weights, np.zeros(len(values)), 0.0, None, None, 1, "plug-in", "held-out")
    if predictive not in (None, "pool", "mixture"):
        raise ValueError(f"predictive must be 'pool' or 'mixture' for draws, got {predictive!r}.")
    rng_key = as_key(0 if rng_key is None else rng_key)
    posterior = draws_of(source, draws, rng_key, 0, args, kwargs)
    posterior.energy.check()
    refuse_kinks_of_score(posterior.energy, "kl_divergence")
    log_weights = np.zeros((posterior.num_samples, posterior.energy.num_rows))
    return _weighted(posterior, log_weights, predictive or "pool", rng_key, "held-out", smooth=predictive == "mixture")


def at_arguments(source: Energy | ScoreMatchingResult | AdversarialResult, args: Any, kwargs: Any) -> Energy:
    """The energy of a source on new arguments of its model."""
    if isinstance(source, Energy):
        if args or kwargs:
            raise TypeError("An Energy has its own data: pass energy.at(rows), or Energy(model, params, new data).")
        return source
    if not args and not kwargs:
        raise TypeError("Pass the model's arguments with the new rows after the fit; its own rows have seen it.")
    energy = one_plate(source.energy)
    new = Energy.bound_to(energy.model, energy.params, {}, None, energy.data_name, args, kwargs)
    refuse_other_columns(energy.labels, new.labels)
    refuse_other_axes(energy, new)
    return new


@jax.jit
def _plug_in(energy: Energy) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    energy, weights = energy.usable()
    score, laplacian = exact_terms(energy)
    return 0.5 * jnp.sum(score**2, axis=-1) + laplacian, weights


def _weighted(
    posterior: Posterior, log_weights: np.ndarray, predictive: Predictive, rng_key: Array, kind: str, smooth: bool
) -> HyvarinenScore:
    """The score under draws with log weights (S, N)."""
    energy, s = posterior.energy, posterior.num_samples
    mixture = predictive == "mixture"
    if mixture:
        log_z = partition_ratios(energy, posterior.draws, rng_key)
        log_densities = np.asarray(_log_densities(energy, posterior.draws), np.float64)
        log_weights = log_weights + log_densities - log_z.values[:, None]
    if not np.isfinite(log_weights).all():
        rows = np.flatnonzero(~np.isfinite(log_weights).all(0))
        raise ValueError(f"The losses of rows {rows[:5].tolist()} are not finite at some draws: look at these rows.")
    k, own_k = None, None
    if smooth:
        weights, k = pareto_smoothed(log_weights.T, posterior.efficiency)
        if np.ptp(posterior.log_weights) > 0:
            own_k = float(pareto_smoothed(posterior.log_weights[None], posterior.efficiency)[1][0])
    else:
        weights = np.full((energy.num_rows, s), 1 / s)
    values, deviations, row_weights = jax.device_get(
        _expectations(energy, posterior.draws, jnp.asarray(weights.T, energy.dtype), mixture)
    )
    # A weighted mean Σ w φ has the Monte Carlo error of the mean of S w φ.
    terms = s * weights.T * deviations.astype(np.float64)
    chains = terms.reshape(posterior.num_chains, -1, energy.num_rows)
    errors, total = mcse(chains), float(mcse((chains * row_weights).sum(-1, keepdims=True))[0])
    if mixture:  # log Z enters the weights, with errors that are the same for all rows
        shares = terms / s
        errors = np.hypot(errors, log_z.stderr_of(shares))
        total = float(np.hypot(total, log_z.stderr_of((shares * row_weights).sum(-1, keepdims=True))[0]))
    return _summary(values, row_weights, errors, total, k, own_k, s, predictive, kind)


def _summary(
    values: np.ndarray,
    weights: np.ndarray,
    errors: np.ndarray,
    total_error: float,
    pareto_k: np.ndarray | None,
    own_k: float | None,  # of weights that make draws those of the posterior with all rows
    num_samples: int,
    predictive: str,
    kind: str,
) -> HyvarinenScore:
    (used,) = np.nonzero(weights)
    if not len(used):
        raise ValueError("All rows are masked: there is nothing to score.")

    def by_row(v: np.ndarray) -> xr.DataArray:
        return xr.DataArray(np.asarray(v, np.float64)[used], {"row": used}, "row")

    if not np.isfinite(values[used]).all():
        bad = used[~np.isfinite(values[used])]
        raise ValueError(f"The score of rows {bad[:5].tolist()} is not finite: look at the data and the energy there.")
    good_k = min(1 - 1 / np.log10(num_samples), 0.7) if num_samples > 1 else 0.7
    warning = False
    if pareto_k is not None:
        bad = used[~(pareto_k[used] <= good_k)]
        if warning := len(bad) > 0:
            draws, remedy = "draws", "Fit without these rows, or see what is odd about them."
            if own_k is not None:  # the rows may not be to blame
                draws = f"draws around the fit's estimates (whose own k is {own_k:.2f})"
                remedy = (
                    "Pass an MCMC run over generalized_bayes(model, loss); if rows stay, see what is odd about them."
                )
            warnings.warn(
                f"{len(bad)} of {len(used)} rows have a Pareto k above {good_k:.2f}, the largest "
                f"{pareto_k[used].max():.2f} at row {used[pareto_k[used].argmax()]}: the posterior without them is too "
                f"far from the {draws} for importance weights. {remedy}",
                stacklevel=4,
            )
    weighted = (weights * values)[used].astype(np.float64)
    return HyvarinenScore(
        estimate=float(weighted.sum()),
        se=float(np.sqrt(len(used) * np.var(weighted))),
        mcse=total_error,
        pointwise=by_row(values),
        pointwise_mcse=by_row(errors),
        pareto_k=None if pareto_k is None else by_row(pareto_k),
        good_k=float(good_k),
        n_samples=num_samples,
        n_data_points=len(used),
        warning=warning,
        predictive=predictive,
        kind=kind,
    )


@jax.jit
@full_precision
def _log_densities(energy: Energy, draws: dict[str, Any]) -> Float[Array, "s n"]:
    energy, _ = energy.usable()
    return jax.lax.map(lambda theta: energy.with_params(theta).log_density(energy.data), draws)


@partial(jax.jit, static_argnames="mixture")
@full_precision
def _expectations(
    energy: Energy, draws: dict[str, Any], weights: Float[Array, "s n"], mixture: bool
) -> tuple[Float[Array, "n"], Float[Array, "s n"], Float[Array, "n"]]:
    """H of each row under weights that sum to one over draws, its derivative along each draw, and the row's weight."""
    energy, row_weights = energy.usable()
    sign = -1.0 if mixture else 1.0

    def terms(theta: dict[str, Any]) -> tuple[Array, Array]:
        score, second = exact_terms(energy.with_params(theta))
        return score, second + jnp.sum(score**2, axis=-1) if mixture else second

    def add(means: tuple[Array, Array], item: Any) -> tuple[tuple[Array, Array], None]:
        theta, w = item
        score, second = terms(theta)
        return (means[0] + w[:, None] * score, means[1] + w * second), None

    start = (jnp.zeros_like(energy.data), jnp.zeros_like(row_weights))
    (score, second), _ = jax.lax.scan(add, start, (draws, weights))

    def deviation(theta: dict[str, Any]) -> Array:
        one = terms(theta)
        return one[1] - second + sign * jnp.sum(score * (one[0] - score), axis=-1)

    value = second + 0.5 * sign * jnp.sum(score**2, axis=-1)
    return value, jax.lax.map(deviation, draws), row_weights
