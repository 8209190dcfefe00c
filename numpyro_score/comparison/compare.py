"""Several fits of the same data beside each other, under KL and under Fisher."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import arviz as az
import jax
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Array, Float

from numpyro_score.comparison.scores import HYVARINEN, Rule, row_scores
from numpyro_score.comparison.verdict import (
    ERRORS,
    Rows,
    cell,
    find_sentence,
    joined,
    paired,
    score_scale,
    told_apart,
)
from numpyro_score.diffusion import ScoreDistribution
from numpyro_score.diffusion.source import noise_range_of
from numpyro_score.divergences.mmd import mmd
from numpyro_score.divergences.moments import moment_test
from numpyro_score.divergences.stein import kernel_stein_discrepancy
from numpyro_score.energy import Energy
from numpyro_score.inference import AdversarialResult, FitCost, ScoreMatchingResult
from numpyro_score.normaliser import LogPartition, sample
from numpyro_score.normaliser import log_partition as estimate_log_partition
from numpyro_score.normaliser.coordinates import row_log_jacobian
from numpyro_score.normaliser.source import energy_of_fit
from numpyro_score.random import Key, as_key

__all__ = ["Comparison", "compare"]

Fit = ScoreMatchingResult | AdversarialResult | Energy | ScoreDistribution


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`compare` returns; print it.

    Attributes:
        table: one row for each fit, best likelihood first. Sums over the rows of the data, with standard errors:

            - `score`, `score_se`: Hyvärinen score Σ ½‖∇f‖² + Δf, lower is better; `score_diff`, `score_dse`: paired
              difference from the fit of lowest score. Of discrete data the value of
              :class:`~numpyro_score.PseudoLikelihood`, of counts that of :class:`~numpyro_score.PairLikelihood`;
            - `log_likelihood`, `log_likelihood_se`, higher is better; `log_likelihood_diff`, `log_likelihood_dse`:
              paired difference from the fit of highest likelihood; the errors hold that of log Z;
            - `log_partition`, `log_partition_stderr`;
            - `ksd`, `ksd_pvalue`: squared kernel Stein discrepancy of the data from the fit, and its test;
            - `mmd`, `mmd_stderr`: squared MMD between the data and draws of the fit;
            - `moments_pvalue`: of a permutation test that means, variances, skewnesses and correlations of the data and
              of the draws agree, for the largest difference of all; `moments_furthest` says in which statistic it is;
              missing for fewer than 10 rows or 50 independent draws;
            - `ess`, `r_hat`: the worst of these draws' coordinates;
            - `seconds`, `compile_seconds`, `gradient_evaluations`, `peak_memory` (bytes), `device`: of the run, as
              :class:`~numpyro_score.inference.FitCost` defines them; missing where they were not measured.
        arviz: `az.compare` of the log likelihoods, or None if some fit has no density.
        order_kl: names from the highest likelihood to the lowest, or None.
        order_fisher: names from the lowest score to the highest.
        sentence: what it means if the two disagree beyond their errors, else None.
        lines: the orders as text, and the sentence.
        rule: what `score` is, in words.
    """

    table: pd.DataFrame
    arviz: pd.DataFrame | None
    order_kl: tuple[str, ...] | None
    order_fisher: tuple[str, ...]
    sentence: str | None
    lines: tuple[str, ...]
    rule: Rule = HYVARINEN

    def shown(self) -> pd.DataFrame:
        """The table as people read it: estimates with errors in one cell, fits for columns."""
        t, shown = self.table, {}
        for label, value, error in _CELLS:
            if not t[value].isna().all():
                errors = [None] * len(t) if error is None else t[error]
                shown[label or self.rule.score] = [cell(v, e) for v, e in zip(t[value], errors, strict=True)]
        return pd.DataFrame(shown, index=t.index).T

    def __repr__(self) -> str:
        return "\n".join([self.shown().to_string(), "", *self.lines])

    def _repr_html_(self) -> str:
        paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in self.lines)
        return self.shown().to_html() + paragraphs


_CELLS = [
    ("log likelihood", "log_likelihood", "log_likelihood_se"),
    ("  behind the best", "log_likelihood_diff", "log_likelihood_dse"),
    (None, "score", "score_se"),
    ("  above the best", "score_diff", "score_dse"),
    ("log Z", "log_partition", "log_partition_stderr"),
    ("KSD²", "ksd", None),
    ("  p-value", "ksd_pvalue", None),
    ("MMD²", "mmd", "mmd_stderr"),
    ("moments, p-value", "moments_pvalue", None),
    ("  furthest", "moments_furthest", None),
    ("ESS of draws", "ess", None),
    ("R-hat of draws", "r_hat", None),
    ("seconds", "seconds", None),
    ("  of them compiling", "compile_seconds", None),
    ("gradient evaluations", "gradient_evaluations", None),
    ("peak memory, bytes", "peak_memory", None),
    ("device", "device", None),
]
_COLUMNS = [column for cell in _CELLS for column in cell[1:] if column is not None]


def compare(
    fits: Mapping[str, Fit],
    data: Any,
    *,
    rng_key: Key,
    log_partition: Mapping[str, LogPartition | float] | None = None,
    num_samples: int = 1000,
    given: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compares fits on rows that none of them has seen: which is better, in which sense, and is it to be trusted?

    Every fit is taken at its point estimates. Discrete data have a pseudo-likelihood, counts one of pairs, in place
    of the Hyvärinen score, as `rule` says. The likelihood sees what the Hyvärinen score does not, such as the
    weights of modes far apart, and costs a normaliser; where the two disagree beyond their errors, a sentence says so:

    - each prefers another fit, both by more than three standard errors of the paired difference; or
    - the likelihood prefers one by more than three standard errors, while the score's difference is nil: even three
      errors further it is, times the largest variance of the data, less than a tenth of the likelihood's. For Gaussian
      fits, with that variance, it could not be below the whole [log-Sobolev inequality, Gross 1975]. On bounded
      supports, where scores near the boundary have less weight, the variance is divided by the mean of that weight.

    Args:
        fits: two or more by name: of :class:`~numpyro_score.ScoreMatching` or
            :class:`~numpyro_score.AdversarialDynamicsEmbedding`, or energies. Their models may differ, their data not.
            For a model fitted at every noise level, a :class:`~numpyro_score.ScoreDistribution`: its likelihood is by
            the probability flow, without log Z, also where it has a score alone; its Hyvärinen score is that of the
            smallest noise.
        data: new rows, as the data site takes them, or {site: values} for several.
        rng_key: a key, for draws of the fits, bootstrap and log Z.
        log_partition: log Z by name, by :func:`~numpyro_score.log_partition`, or a number where it is known exactly.
            Those that are missing are estimated. A fit with a :func:`~numpyro_score.score_factor` has none, and then
            there is no order under KL.
        num_samples: draws of each of four chains of each fit.
        given: covariates of the new rows, by the names of the models' arguments: `given={"z": z_new}`. A fit whose
            model has no such argument is of the law of the data without it. log Z is then found for each row, and
            there are no draws, and so neither MMD nor moments.

    Raises:
        TypeError: for anything but a fit or an energy; an argument that no model has.
        NotImplementedError: for models whose rows differ in density, without `given`.
        ValueError: for fewer than two fits, fits of different data, data that these cannot take, or a log Z that
            belongs to none of them or cannot be estimated.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, compare
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> x = jax.random.normal(jax.random.key(0), (500,))
        >>> fits = {"good": Energy(model, {"tau": 1.0}, x), "narrow": Energy(model, {"tau": 2.0}, x)}
        >>> comparison = compare(fits, x, rng_key=jax.random.key(1), num_samples=100)
        >>> comparison.order_kl, comparison.order_fisher, comparison.sentence
        (('good', 'narrow'), ('good', 'narrow'), None)
    """
    known, covariates = dict(log_partition or {}), dict(given or {})
    own = _energies(fits, known, covariates)
    names = list(own)
    rows = own[names[0]].flatten(data)
    energies = {}
    for name in names:
        try:
            fit = fits[name]
            at = fit.energy_at if isinstance(fit, ScoreDistribution) else own[name].at
            energies[name] = at(rows, **_taken(own[name], covariates))
            energies[name].check()
        except ValueError as error:
            raise ValueError(f"Fit '{name}' cannot take the data: {error}") from None
    keys = dict(zip(names, jax.random.split(as_key(rng_key), (len(names), 3)), strict=True))
    rule, scores = row_scores(energies, keys[names[0]][0])
    likelihoods, log_zs = None, {}
    flows = {k: fit for k, fit in fits.items() if isinstance(fit, ScoreDistribution)}
    if all(k in flows or e.has_density for k, e in own.items()):
        for k, e in own.items():
            if k not in flows:
                log_zs[k] = _log_partition(k, e, known.get(k), keys[k][0], _taken(e, covariates))
        likelihoods = {
            k: np.asarray(flows[k].log_prob(data), np.float64) if k in flows else _log_likelihoods(e, log_zs[k].value)
            for k, e in energies.items()
        }

    record = pd.DataFrame(index=names)
    exact = dict.fromkeys(names, 0.0)
    columns, order_fisher = _sums("score", {k: -v for k, v in scores.items()}, exact, sign=-1)
    order_kl, table, errors = None, None, exact
    if likelihoods is not None:
        errors = {k: log_zs[k].stderr if k in log_zs else 0.0 for k in names}
        more, _ = _sums("log_likelihood", likelihoods, errors, sign=1)
        one = {k: z for k, z in log_zs.items() if np.ndim(z.value) == 0}
        log_z: dict[str, Any] = {
            "log_partition": {k: z.value for k, z in one.items()},
            "log_partition_stderr": {k: z.stderr for k, z in one.items()},
        }
        columns |= more | log_z
        table = _compared_by_arviz(likelihoods)
        order_kl = tuple(table.index)
    found = {}
    for k, fit in fits.items():
        if isinstance(fit, ScoreDistribution):
            found[k] = _draws_against_data(fit, data, keys[k][2], num_samples)
        else:
            draws = 0 if _taken(own[k], covariates) else num_samples
            found[k] = _against_data(k, own[k], energies[k], data, keys[k], draws) | _cost(fit)
    record = pd.DataFrame(columns, names).join(pd.DataFrame.from_dict(found, orient="index"))
    sentence = None
    if likelihoods is not None:
        scale = score_scale(energies[names[0]]) if rule == HYVARINEN else None
        sentence = find_sentence(likelihoods, errors, scores, rule, scale)
    lines = [f"{len(names)} fits on {len(rows)} rows; ≈ is for a difference within {ERRORS:.0f} standard errors."]
    if order_kl is not None and likelihoods is not None:
        lines.append(f"Under KL, best first: {' ' * (len(rule.under) - 2)}" + joined(order_kl, likelihoods, errors))
    lines.append(f"Under {rule.under}, best first: " + joined(order_fisher, scores, exact))
    if sentence is not None:
        lines.append(sentence)
    elif order_kl is not None and likelihoods is not None:
        lines += told_apart(order_kl, likelihoods, errors, scores, rule)
    record = record.reindex(index=list(order_kl or order_fisher), columns=_COLUMNS)
    return Comparison(record, table, order_kl, order_fisher, sentence, tuple(lines), rule)


def _taken(energy: Energy, covariates: dict[str, Any]) -> dict[str, Any]:
    """Those of the covariates that the energy's model has."""
    return {k: v for k, v in covariates.items() if energy.is_given(k) is not None}


def _energies(fits: Mapping[str, Fit], log_partition: dict[str, Any], covariates: dict[str, Any]) -> dict[str, Energy]:
    if not isinstance(fits, Mapping):
        raise TypeError(f'compare takes fits by name, got a {type(fits).__name__}: write {{"ism": fit1, "pcd": fit2}}.')
    if len(fits) < 2:
        raise ValueError(
            f"compare needs two fits or more, got {len(fits)}: for one, use hyvarinen_score and kl_divergence."
        )
    for name, fit in fits.items():
        if not isinstance(fit, Fit):
            raise TypeError(f"Fit '{name}' is a {type(fit).__name__}: pass fits of ScoreMatching, or Energy objects.")
        if isinstance(fit, ScoreMatchingResult) and noise_range_of(fit) is not None:
            raise TypeError(
                f"Fit '{name}' is of many noise levels, and what it says of the data is the density at the smallest: "
                "pass ScoreDistribution(fit), whose likelihood is by the probability flow."
            )
    if unknown := sorted(set(log_partition) - set(fits)):
        raise ValueError(f"log_partition has '{unknown[0]}', which is no fit: the fits are {sorted(fits)}.")
    energies = {k: fit if isinstance(fit, Energy) else energy_of_fit(fit) for k, fit in fits.items()}
    if unknown := [k for k in covariates if not any(_taken(e, {k: None}) for e in energies.values())]:
        raise TypeError(f"given has '{unknown[0]}', which no model takes: use the names of the models' arguments.")
    for name, energy in energies.items():
        if energy.is_mixed:
            raise NotImplementedError(
                f"compare has no log Z and no draws for rows of discrete and continuous numbers, as of fit '{name}': "
                "compare their losses, e.g. by fit.energy.at(x) and Mixed(...)."
            )
        if energy.num_rows > 1 and not energy.resizable and not _taken(energy, covariates):
            raise NotImplementedError(
                f"Rows of fit '{name}' differ in density (covariates, or a plate of fixed size), so that each has its "
                "own normaliser: pass the covariates of the new rows, e.g. given={'z': z_new}."
            )
    sites = {k: [(a.name, a.support.kind, e.dim) for a in e.arrays] for k, e in energies.items()}
    first, *others = sites
    for name in others:
        if sites[name] != sites[first]:
            raise ValueError(
                f"Fit '{name}' is of {_described(sites[name])} and '{first}' of {_described(sites[first])}: compare "
                "fits of the same data, on the same support."
            )
    return energies


def _described(sites: list[tuple[str, str, int]]) -> str:
    found = " and ".join(f"'{name}' ({kind})" for name, kind, _ in sites)
    return f"{found} with {sites[0][2]} numbers a row"


class _EachRow(NamedTuple):
    """log Z of rows with densities of their own."""

    value: Float[np.ndarray, "n"]
    stderr: float  # as if all errors were one


def _log_partition(
    name: str, energy: Energy, given: LogPartition | float | None, rng_key: Array, covariates: dict[str, Any]
) -> LogPartition | _EachRow:
    if given is not None:
        return LogPartition.of(given, f"log_partition['{name}']")
    try:
        if covariates:
            each = estimate_log_partition(energy, rng_key=rng_key, given=covariates)
            return _EachRow(np.array([z.value for z in each]), float(np.mean([z.stderr for z in each])))
        return estimate_log_partition(energy, rng_key=rng_key)
    except ValueError as error:
        raise ValueError(f"log Z of fit '{name}' cannot be estimated, pass it by log_partition: {error}") from error


def _log_likelihoods(energy: Energy, log_z: Any) -> Float[np.ndarray, "n"]:
    """Log p of each row, in the measure of the data."""
    return np.asarray(_log_densities(energy), np.float64) - log_z


@jax.jit
def _log_densities(energy: Energy) -> Float[Array, "n"]:
    x = energy.data
    return energy.log_density(x) - jax.vmap(partial(row_log_jacobian, energy))(x)


def _sums(
    column: str, values: dict[str, Any], errors: dict[str, float], sign: int
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Sums of values, of which higher is better, and their differences from the best, by column; names, best first."""
    order = sorted(values, key=lambda k: -values[k].sum())
    best = order[0]
    totals = {k: paired(v, np.zeros(len(v)), errors[k]) for k, v in values.items()}
    behind = {k: paired(v, values[best], *([errors[k], errors[best]] * (k != best))) for k, v in values.items()}
    columns = {
        column: {k: sign * v.value + 0.0 for k, v in totals.items()},  # no negative zeros
        f"{column}_se": {k: v.error for k, v in totals.items()},
        f"{column}_diff": {k: sign * v.value + 0.0 for k, v in behind.items()},
        f"{column}_dse": {k: v.error for k, v in behind.items()},
    }
    return columns, tuple(order)


def _compared_by_arviz(likelihoods: Rows) -> pd.DataFrame:
    """`az.compare` of log likelihoods of held-out rows. No row was in the fit, so none is to be left out."""
    elpds = {}
    for name, values in likelihoods.items():
        total, pointwise = float(values.sum()), xr.DataArray(values, dims="row")
        se = math.sqrt(len(values) * np.var(values))
        common = dict(se=se, n_samples=1, n_data_points=len(values), scale="log", warning=False, good_k=0.7)
        if hasattr(az, "ELPDDataLOO"):  # ArviZ 1.x
            elpds[name] = az.ELPDDataLOO(elpd=total, p=0.0, elpd_i=pointwise, **common)
        else:
            elpds[name] = az.ELPDData({"elpd_loo": total, "p_loo": 0.0, "loo_i": pointwise, **common})
    return az.compare(elpds, **({"round_to": "none"} if hasattr(az, "ELPDDataLOO") else {}))


def _against_data(
    name: str, energy: Energy, at_data: Energy, data: Any, keys: Array, num_samples: int
) -> dict[str, Any]:
    """What the data say of one fit without another to compare with; `at_data` is its energy at the new rows."""
    stein = kernel_stein_discrepancy(data, at_data, keys[1])
    found: dict[str, Any] = {"ksd": stein.value, "ksd_pvalue": stein.pvalue}
    if not energy.has_density or num_samples == 0:
        return found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = sample(energy, keys[2], num_samples)
    for warning in caught:
        warnings.warn(f"Draws of fit '{name}': {warning.message}", warning.category, stacklevel=3)
    distance = mmd(data, (energy, draws))
    try:
        test = moment_test(at_data, draws, keys[2])
        found |= {"moments_pvalue": test.pvalue, "moments_furthest": test.names[test.furthest]}
    except ValueError:  # too few rows or draws
        pass
    return found | {
        "mmd": distance.value,
        "mmd_stderr": distance.stderr,
        "ess": min(float(v.min()) for v in draws["ess"].data_vars.values()),
        "r_hat": max(float(v.max()) for v in draws["r_hat"].data_vars.values()),
    }


def _draws_against_data(fit: ScoreDistribution, data: Any, rng_key: Array, num_samples: int) -> dict[str, Any]:
    """The same of independent draws by the probability flow."""
    distance = mmd(data, fit.sample(rng_key, (4 * num_samples,)))
    return {"mmd": distance.value, "mmd_stderr": distance.stderr, "ess": 4.0 * num_samples}


def _cost(fit: Fit) -> dict[str, Any]:
    cost: FitCost | None = getattr(fit, "cost", None)  # an Energy was not run, and has none
    return {} if cost is None else cost._asdict()
