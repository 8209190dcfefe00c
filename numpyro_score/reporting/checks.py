"""What can be asked of a fit before it is believed, and how the answers are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from numpyro_score.divergences.moments import moment_test
from numpyro_score.divergences.stein import kernel_stein_discrepancy
from numpyro_score.energy import numbered, plural
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.normaliser.mixing import mixed, too_many_diverged
from numpyro_score.plots.fits import shares, solved_at_once
from numpyro_score.uncertainty import ARRIVED

__all__ = ["Check", "check_all", "converged", "short", "whole_rows"]

Fit = ScoreMatchingResult | AdversarialResult

_R_HAT = 1.015  # 1.01 to two digits
_KSD_ROWS = 1000  # the test forms a matrix of pairs of rows


class Check(NamedTuple):
    """An answer and what it means."""

    question: str
    found: str
    verdict: str  # "good", "look", "bad" or "unknown"
    detail: str = ""


def check_all(fit: Fit, samples: Any, rng_key: Array) -> list[Check]:
    """All checks of a fit, in the order of the report; `samples` is ArviZ data, or a sentence why there are none."""
    checks = [_ask("End of the fit", _trend, fit)]
    if isinstance(fit, ScoreMatchingResult):
        checks = [
            _ask("Gradient at the end", _gradient_check, fit),
            *checks,
            _ask("Sandwich eigenvalues", _sandwich, fit),
            _ask("Row of most influence", _influence, fit),
        ]
    return [
        *checks,
        _ask("Data against model (KSD)", _stein, fit, rng_key),
        _ask("Moments of data and draws", _moments, fit, samples, rng_key),
        _ask("Draws of the model", _mixing, samples),
    ]


def _ask(question: str, check: Callable[..., tuple[str, ...]], *args: Any) -> Check:
    """The answer, or the sentence with which what was asked refuses."""
    try:
        return Check(question, *check(*args))
    except (TypeError, ValueError, NotImplementedError) as error:
        return Check(question, str(error), "unknown")


def converged(fit: Fit, checks: list[Check]) -> str:
    """Whether the fit converged, in one sentence, from its first checks."""
    by_name = {c.question: c for c in checks}
    gradient, trend = by_name.get("Gradient at the end"), by_name["End of the fit"]
    early = "Ctrl-C ended the fit early. " if fit.interrupted else ""
    if gradient is None or gradient.verdict == "unknown":  # no news of the minimum itself
        answer = {"good": "As far as can be seen, yes", "look": "Not yet", "unknown": "Not known"}[trend.verdict]
        return f"{early}{answer}: {trend.found}"
    answer = {"good": "Yes", "look": "Nearly", "bad": "No"}[gradient.verdict]
    if isinstance(fit, ScoreMatchingResult) and solved_at_once(fit) and answer == "Yes":
        return f"Yes: the objective is quadratic in the parameters and was solved in closed form; {gradient.found}"
    return f"{early}{answer}: {gradient.found}"


def short(value: float) -> str:
    """Two digits, and an exponent only where there would be many zeros."""
    if 1e-4 <= abs(value) < 1e6 or value == 0:
        return np.format_float_positional(value, precision=2, fractional=False, trim="-")
    return f"{value:.1e}"


# -- the checks: what was found, and the verdict ----------------------------------------------------

_gradient = jax.jit(lambda objective: jax.grad(objective)(objective.position))


def _gradient_check(fit: ScoreMatchingResult) -> tuple[str, str, str]:
    """How far the minimum is, in standard errors: a tenth is as good as there, and from one on errors mislead."""
    distance = np.abs(fit.curvature.distance)
    furthest = int(np.argmax(distance))
    found = (
        f"the minimum is {short(distance[furthest])} standard errors from the estimates, furthest in "
        f"{_parameter_names(fit)[furthest]}."
    )
    # Chains of the model leave a fit about one standard error from where its gradient at other chains is zero.
    good, look = (1.0, 3.0) if hasattr(fit.svi.score_loss, "settle") else (ARRIVED, 1.0)
    verdict = "good" if distance[furthest] <= good else "look" if distance[furthest] <= look else "bad"
    gradient = np.asarray(_gradient(fit._objective), np.float64)
    return found, verdict, f"The gradient's norm is {short(float(np.linalg.norm(gradient)))}."


def _parameter_names(fit: ScoreMatchingResult) -> list[str]:
    """Names of the unconstrained coordinates, (P,)."""
    leaves = jax.tree_util.tree_leaves_with_path(fit.coordinates.unravel(fit.coordinates.position))
    sites = ((jax.tree_util.keystr(path, simple=True, separator="."), np.shape(leaf)) for path, leaf in leaves)
    own = fit.number_names
    found = ((numbered(site, shape), own.get(site, [])) for site, shape in sites)
    return [name for plain, named in found for name in (named if len(named) == len(plain) else plain)]


def _trend(fit: Fit) -> tuple[str, ...]:
    """What the last tenth of steps still changed, beside the whole and its noise (steps taken as independent)."""
    if isinstance(fit, AdversarialResult):
        what, values = "data term less bound on log Z", np.asarray(fit.data_term - fit.log_partition_bound, np.float64)
    else:
        if (why := getattr(fit.svi.score_loss, "no_objective", None)) is not None:
            return f"the loss's value is not what the fit descends, as {why}.", "unknown"
        if solved_at_once(fit):
            return "one linear solve: there are no steps.", "good"
        what, values = "objective", np.asarray(fit.losses, np.float64)
    skipped = int((~np.isfinite(values)).sum())
    note = f"{skipped} of {len(values)} steps were skipped, as their loss was not finite." if skipped else ""
    found, verdict = trend_verdict(values[np.isfinite(values)], what)
    return found, "look" if verdict == "good" and skipped else verdict, note


def trend_verdict(values: Float[np.ndarray, "t"], what: str = "objective") -> tuple[str, str]:
    """Whether values of steps still move in the last tenth: beyond noise, and by 1% of the whole change."""
    k = len(values) // 10
    if k < 4:
        return f"{len(values)} steps are too few to see a trend.", "unknown"
    before, last = values[-2 * k : -k], values[-k:]
    change = last.mean() - before.mean()
    noise = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / k)
    whole = abs(last.mean() - values[0])
    limit = scipy.stats.t.isf(0.00135, 2 * k - 2)  # three standard errors, where there are many steps
    moving = abs(change) > limit * noise and abs(change) > 0.01 * whole
    found = (
        f"over the last tenth of {len(values)} steps the {what} changed by {short(change)} ± {short(noise)}, "
        f"{abs(change) / whole if whole else 0.0:.1%} of its whole change."
    )
    return found, "look" if moving else "good"


def _sandwich(fit: ScoreMatchingResult) -> tuple[str, str]:
    """Eigenvalues of the correlations of the estimates: near zero where a combination is not determined."""
    covariance = fit.curvature.covariance
    errors = np.sqrt(np.diag(covariance))
    moved = errors > 0
    if not moved.any():
        return "the data move no parameter.", "bad"
    if len(errors) == 1:
        return "there is one parameter, and the data determine it.", "good"
    values = np.linalg.eigvalsh(covariance[np.ix_(moved, moved)] / np.outer(errors[moved], errors[moved]))
    found = f"correlations of the {moved.sum()} estimates have eigenvalues {short(values[0])} to {short(values[-1])}."
    if not moved.all():
        return f"{found} The data do not move {(~moved).sum()} parameters.", "look"
    return found, "good" if values[0] > 1e-3 else "look"


def _influence(fit: ScoreMatchingResult) -> tuple[str, str]:
    """Whether one row carries an estimate, and is not just the largest of so many in a long tail."""
    names, share, signs = shares(fit)
    row, parameter = np.unravel_index(np.argmax(share), share.shape)
    largest, (verdict, pvalue) = share[row, parameter], row_verdict(share[:, parameter] * signs[:, parameter])
    percent = short(100 * largest**2)
    name = fit.labels.row_name(int(row), fit.energy.arrays)
    found = f"row {name} moves {names[parameter]} by {largest:.2g} standard errors, {percent}% of its variance"
    if largest**2 <= 0.25:
        return f"{found}.", verdict
    if verdict == "good":
        return f"{found}, as the largest of such a tail may.", verdict
    return f"{found}, beyond the tail of the others (p = {short(pvalue)}).", verdict


def row_verdict(values: Float[np.ndarray, "n"]) -> tuple[str, float]:
    """Of the influences of all rows on one estimate: a verdict on the largest, and its p-value in their tail."""
    row = int(np.argmax(np.abs(values)))
    share, pvalue = values[row] ** 2 / np.sum(values**2), beyond_the_tail(values, row)
    if share <= 0.25 or pvalue >= 0.01:
        return "good", pvalue
    return "look" if share <= 0.5 else "bad", pvalue


def beyond_the_tail(values: Float[np.ndarray, "n"], row: int) -> float:
    """The p-value of a row that is the largest in size, given the next 5 to 20 of its sign; 1 without these.

    For tails P(v > t) that fall like exp(−t^{1/θ}), as those of powers of normal and exponential values, the spacings
    S_j = j log(v_(j) / v_(j+1)) log((N+1)/j) of the largest values are close to independent exponentials of mean θ
    [Weibull tails: Beirlant, Broniatowski, Teugels & Vynckier 1995], and so the first over the mean of the others has
    the law F(2, 2(m−1)).
    """
    away = values - np.median(values)
    ordered = -np.sort(-away * np.sign(away[row]))
    m = min(max(5, min(20, len(values) // 10)), int((ordered > 0).sum()) - 1)
    if m < 4 or ordered[0] != abs(away[row]):
        return 1.0
    j = np.arange(1, m + 1)
    spacings = j * np.log(ordered[:m] / ordered[1 : m + 1]) * np.log((len(values) + 1) / j)
    rest = spacings[1:].mean()
    return float(scipy.stats.f.sf(spacings[0] / rest, 2, 2 * (m - 1))) if rest > 0 else 1.0


def whole_rows(fit: Fit) -> Any:
    """The fit's energy, at rows without missing cells where some have these: as good a sample as all."""
    energy = fit.energy
    if not (getattr(fit, "has_missing_cells", False) and energy.resizable):
        return energy
    return energy.whole_rows() if np.isfinite(np.asarray(energy.data)).all(axis=1).any() else energy


def _stein(fit: Fit, rng_key: Array) -> tuple[str, str, str]:
    """A test of fit by kernel Stein discrepancy, on the rows of the fit itself or a sample of them."""
    energy = whole_rows(fit)
    x, weights = (np.asarray(v) for v in energy.data_and_weights())
    rows = x[weights != 0]
    choose, test = jax.random.split(rng_key)
    some = ""
    if energy.resizable and len(rows) > _KSD_ROWS:
        some = f" on {_KSD_ROWS} of {len(rows)} rows"
        rows = rows[np.asarray(jax.random.permutation(choose, len(rows)))[:_KSD_ROWS]]
    result = kernel_stein_discrepancy(energy.unflatten(rows), energy, test)
    pvalue = float(result.pvalue)
    meaning = "the data tell the two apart" if pvalue < 0.01 else "no difference seen"
    found = f"p = {short(pvalue)}{some}: {meaning}."
    caution = "The model was fitted to these rows, so p is too large as a rule."
    return found, "look" if pvalue < 0.01 else "good", caution


def _moments(fit: Fit, samples: Any, rng_key: Array) -> tuple[str, str, str]:
    """Means, variances, skewnesses and correlations of draws beside those of the data."""
    if isinstance(samples, str):
        return samples, "unknown", ""
    test = moment_test(whole_rows(fit), samples, rng_key)
    k = test.furthest
    found = (
        f"furthest is the {test.names[k]}: {short(test.draws[k])} in draws, {short(test.data[k])} in the data, "
        f"{abs(test.z[k]):.1f} standard errors apart; p = {short(test.pvalue)} for the largest of {len(test.z)}."
    )
    order = [int(i) for i in np.argsort(-np.abs(test.z)) if test.pvalues[i] < 0.01 and i != k]
    more = f" and {len(order) - 3} more" if len(order) > 3 else ""
    others = f"Also: {', '.join(test.names[i] for i in order[:3])}{more}." if order else ""
    return found, "good" if test.pvalue >= 0.01 else "look" if test.pvalue >= 0.001 else "bad", others


def _mixing(samples: Any) -> tuple[str, str]:
    if isinstance(samples, str):
        return samples, "unknown"
    r_hat = max(float(v.max(skipna=False)) for v in samples["r_hat"].values())
    ess = min(float(v.min(skipna=False)) for v in samples["ess"].values())
    stats = samples["sample_stats"]
    diverged = int(stats["diverging"].sum()) if "diverging" in stats else 0
    found = f"largest R-hat {r_hat:.4f}, least effective sample size {ess:.0f}"
    draws = math.prod(next(iter(samples["posterior"].values())).shape[:2])
    found += f", {plural(diverged, 'divergence')} in {draws} transitions." if diverged else "."
    good = mixed(samples["r_hat"], samples["ess"], _R_HAT, draws) and not too_many_diverged(diverged, draws)
    return found, "good" if good else "look"
