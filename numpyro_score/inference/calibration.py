"""Generalised posteriors with the spread of the estimates: a calibrated learning rate, and adjusted draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.autoguide import AutoDelta

from numpyro_score import _trace
from numpyro_score.inference.sandwich import Curvature, SandwichError
from numpyro_score.losses import Loss

if TYPE_CHECKING:
    from numpyro_score.inference.result import ScoreMatchingResult
    from numpyro_score.inference.score_matching import ScoreMatching

__all__ = ["CalibratedRate", "adjust_draws", "calibrated_fit", "calibrated_learning_rate"]

_MAX_FITS = 5
_TOLERANCE = 0.02  # of β: 1% of the width of an interval


def calibrated_learning_rate(curvature: Curvature) -> float:
    r"""The β at which the generalised posterior is as informative as the estimates [Lyddon, Holmes & Walker 2019].

    .. math:: \beta = \operatorname{tr}(H S^{-1} H) / \operatorname{tr}(H), \quad H = \sum_n w_n \nabla^2 \ell_n, \quad
              S = N \operatorname{cov}_n(w_n \nabla \ell_n),

    in unconstrained coordinates, of the losses alone. The precision of the estimates is HS⁻¹H and that of the
    posterior βH, without the prior: β makes their traces equal, and with one parameter the two themselves. Both H and
    S grow as N, so β does not. Weights of c in all rows divide β by c, and so cancel from the posterior. Parameters
    that the losses do not depend on, such as the scale of a prior, do not count.

    Raises:
        SandwichError: if H is not positive definite, or S is singular.
    """
    p = len(curvature.size)
    counts = (curvature.size > 0) | (np.diag(curvature.loss_hessian) != 0)
    h, size = curvature.loss_hessian[np.ix_(counts, counts)], curvature.size[counts]
    root = np.asarray(np.linalg.qr(curvature.root[:, counts], mode="r"))
    resolution = 10 * p * float(np.finfo(jnp.result_type(float)).eps)
    diagonal = np.diag(h)
    if not (counts.any() and (diagonal > 0).all() and _lowest(h / np.sqrt(np.outer(diagonal, diagonal))) > resolution):
        raise SandwichError(
            f"The losses are not curved upwards at the estimates in all {p} parameters, so no learning rate is "
            "calibrated: drop or fix parameters that the data do not determine, enable double precision, or pass "
            "learning_rate as a number."
        )
    # In units of the gradients, so that those that are equal in all rows but for rounding count as equal.
    relative = root / np.where(size > 0, size, 1.0)
    if len(root) < len(h) or np.linalg.svd(relative, compute_uv=False)[-1] < resolution:
        raise SandwichError(
            f"The gradients of the rows do not spread in all {p} parameters, so no learning rate is calibrated: use "
            "more rows than parameters, drop parameters whose gradient is the same in all rows, or pass learning_rate "
            "as a number."
        )
    return float(np.sum(np.linalg.solve(root.T, h) ** 2) / np.trace(h))


def _lowest(symmetric: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(symmetric)[0])


def calibrated_fit(svi: ScoreMatching, run: Callable[..., ScoreMatchingResult], **start: Any) -> ScoreMatchingResult:
    """A fit at its own calibrated learning rate.

    The rate depends on the estimates and, with a prior, the estimates on the rate, by O(1/N). So fits follow each
    other, each from where the one before ended, until the rate is within 2% of the one that the fit used: as a rule
    two, and one without a prior, where the rate does not move the minimum. A guide that is no point is fitted once,
    at the rate of a point fit.

    Args:
        svi: made with `learning_rate="calibrated"`.
        run: `run(svi, **start)` fits such an object, at another learning rate.
        **start: where the first fit starts; where the guide's starts, if it is no point.

    Raises:
        SandwichError: if no rate can be calibrated.

    Warns:
        UserWarning: if the rate does not settle in five fits.
    """
    is_point = isinstance(svi.guide, AutoDelta)
    point = svi if is_point else svi.point()
    fit = run(point.at_learning_rate(1.0), **start if is_point else {})
    for _ in range(_MAX_FITS):
        if fit.interrupted:
            if is_point:
                return fit
            raise KeyboardInterrupt
        used, rate = float(fit.learning_rate), fit.calibrated_learning_rate()
        if not fit.has_prior:
            fit = replace(fit, svi=point.at_learning_rate(rate), losses=rate / used * fit.losses)
            break
        if abs(rate / used - 1) < _TOLERANCE:
            break
        fit = run(point.at_learning_rate(rate), init_params=fit.params)
    else:
        warnings.warn(
            f"The learning rate has not settled: the last fit used {used:.4g} and led to {rate:.4g}. The prior and "
            "the data disagree; take more steps, or pass learning_rate as a number.",
            stacklevel=3,
        )
    return fit if is_point else run(svi.at_learning_rate(fit.learning_rate), **start)


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


class CalibratedRate:
    """The calibrated learning rate of a model's arguments, remembered while these stay the same."""

    def __init__(self, model: Callable[..., Any], loss: Loss, data: str | None) -> None:
        self.model, self.loss, self.data = model, loss, data
        self._seen: tuple[Any, list[Any]] | None = None
        self._rate = 0.0

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], observed: Callable[[], Any]) -> float:
        """The rate of these arguments, from a point fit the first time.

        `observed()` gives the data as the model has them now: it may hold them itself, and they may change.

        Raises:
            TypeError: if an argument is traced.
            SandwichError: if no rate can be calibrated.
        """
        leaves, treedef = jax.tree.flatten((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "learning_rate='calibrated' needs the values of the model's arguments, and they are traced by jit, "
                "grad or vmap: take the number from fit.calibrated_learning_rate() of a ScoreMatching fit outside, and "
                "pass it as learning_rate."
            )
        # Inside of the compiled parts of a sampler too these are numbers, and no handler around is to see the fit.
        with _trace.Sealed(None), jax.ensure_compile_time_eval():
            leaves.append(observed())
            if self._seen is None or self._seen[0] != treedef or not all(map(_same, self._seen[1], leaves)):
                self._rate = self._fit(args, kwargs)
                self._seen = treedef, [np.copy(v) if isinstance(v, np.ndarray) else v for v in leaves]
        return self._rate

    def _fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        from numpyro_score.inference.score_matching import ScoreMatching  # it stands on top of the generalised model

        svi = ScoreMatching(self.model, loss=self.loss, learning_rate="calibrated", data=self.data)
        return svi.run(jax.random.key(0), *args, progress_bar=False, **kwargs).learning_rate


def _same(old: Any, new: Any) -> bool:
    """Whether two leaves are the same argument. A NumPy array may have changed in place, so its values count."""
    if isinstance(old, np.ndarray):
        return isinstance(new, np.ndarray) and old.dtype == new.dtype and np.array_equal(old, new)
    return old is new or (not isinstance(old, jax.Array) and type(old) is type(new) and bool(old == new))
