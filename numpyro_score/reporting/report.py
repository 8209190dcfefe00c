"""One HTML file that says what was fitted, whether it converged and whether it can be trusted."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from numpyro_score.comparison import Comparison
from numpyro_score.divergences.columns import data_columns, sample_columns
from numpyro_score.energy import numbered, plural
from numpyro_score.inference import AdversarialResult, ScoreMatchingResult
from numpyro_score.normaliser import sample
from numpyro_score.plots import (
    plot_density,
    plot_influence,
    plot_losses,
    plot_marginals,
    plot_score_field,
)
from numpyro_score.plots.fits import loss_of, solved_at_once
from numpyro_score.printed import name_of, settings
from numpyro_score.random import Key, as_key
from numpyro_score.reporting.checks import Check, check_all, converged, whole_rows
from numpyro_score.reporting.comparison import comparison_page
from numpyro_score.reporting.page import Markup, page, table, tag
from numpyro_score.reporting.parts import draw, machine, or_reason

__all__ = ["report"]

Fit = ScoreMatchingResult | AdversarialResult

_FIRST, _MOST = 10, 500  # numbers in the table of the first screen, and in that below
_WORDS = {"good": "✓ good", "look": "! look at this", "bad": "✗ bad", "unknown": "? not known"}


def report(fit: Fit | Comparison, path: str | Path, *, rng_key: Key | None = None, num_samples: int = 1000) -> Path:
    """Writes all there is to know about a fit, or a comparison of fits, to one HTML file.

    The first screen says what was fitted and by which loss, whether it converged, the estimates with their standard
    errors, and the checks that bear on trust: the gradient and the trend of the loss at the end, the eigenvalues of the
    sandwich, the row of most influence, a kernel Stein test of the data against the model, moments of the model's draws
    beside those of the data, and R-hat of the draws. Below are pictures, tables, versions and the machine. What cannot
    be computed is reported with its reason. The file needs no script, no other file and no network.

    Of a comparison the page has the orders under KL and under Fisher, the table with its errors, what each row of it
    means, and the pictures of both orders.

    Args:
        fit: a fit of :class:`~numpyro_score.ScoreMatching` or
            :class:`~numpyro_score.AdversarialDynamicsEmbedding`, or what :func:`~numpyro_score.compare` returned.
        path: the file to write; one that is there is replaced.
        rng_key: a key for the draws of the model and the test; `jax.random.key(0)` if not given.
        num_samples: draws of the model by each of four chains of :func:`~numpyro_score.sample`; 0 to leave them out,
            where they would take too long.

    Returns:
        The path.

    Raises:
        TypeError: for anything but a fit or a comparison.
        ValueError: for fewer than four `num_samples`, but not zero.
        ImportError: without Matplotlib, `pip install numpyro-score[plots]`.

    Example:
        >>> import jax, numpyro, tempfile
        >>> from pathlib import Path
        >>> from numpyro_score import ScoreMatching, report
        >>> def model(x):
        ...     k = numpyro.param("k", 1.0)
        ...     numpyro.factor("energy", -0.5 * k * (x**2).sum(-1))
        >>> fit = ScoreMatching(model).run(jax.random.key(0), jax.random.normal(jax.random.key(1), (200, 2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = report(fit, Path(folder) / "fit.html", num_samples=0).read_text()
        >>> "Yes: the objective is quadratic in the parameters and was solved in closed form" in text
        True
    """
    if not isinstance(fit, ScoreMatchingResult | AdversarialResult | Comparison):
        raise TypeError(f"report takes a fit or a comparison, got {type(fit).__name__}.")
    if num_samples < 4 and num_samples != 0:  # R-hat needs four
        raise ValueError(f"report needs a num_samples of at least 4, or 0 for no draws, got {num_samples}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("report needs Matplotlib: pip install 'numpyro-score[plots]'.")
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give report a file in it, e.g. '{path / 'fit.html'}'.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no directory: make it, or give report a file in another one.")
    if isinstance(fit, Comparison):
        text = comparison_page(fit)
        path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
        return path
    sample_key, check_key = jax.random.split(as_key(0 if rng_key is None else rng_key))
    # What is warned of on the way is part of the report.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples: Any = "none were drawn, as num_samples is 0."
        if num_samples:
            samples = or_reason(lambda: sample(whole_rows(fit), sample_key, num_samples))
        checks = check_all(fit, samples, check_key)
        errors = _errors(fit)
        body = _body(fit, samples, checks, errors)
    said = dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
    if said:
        body.append(tag("h2", "Warnings on the way"))
        body.append(tag("ul", *(tag("li", text) for text in said)))
    path.write_text(page(f"Fit of {_name(fit)}", *body), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _body(fit: Fit, samples: Any, checks: list[Check], errors: Any) -> list[Markup]:
    rows = _estimate_rows(fit, errors)
    head, numeric = ("parameter", "estimate", "standard error"), (1, 2)
    first: list[Any] = [tag("h2", "Estimates"), table(head, rows[:_FIRST], numeric)]
    if len(rows) > _FIRST:
        first.append(tag("p", f"{len(rows) - _FIRST} more below.", class_="note"))
    if isinstance(errors, str):
        first.append(tag("p", f"No standard errors: {errors}", class_="note"))
    elif (dependence := getattr(fit, "dependence", None)) is not None:
        first.append(tag("p", f"Standard errors are those where {dependence.text}.", class_="note"))
    answers = [
        ("What was fitted", _what(fit)),
        ("By which loss", _loss(fit)),
        ("Did it converge?", converged(fit, checks)),
        ("Can it be trusted?", _trust(checks)),
    ]
    body = [
        tag("h1", f"Fit of {_name(fit)}"),
        tag("dl", *(part for question, answer in answers for part in (tag("dt", question), tag("dd", answer)))),
        tag("div", tag("section", *first), tag("section", tag("h2", "Checks"), _check_table(checks)), class_="columns"),
        tag("h2", "Pictures"),
        tag("div", *_pictures(fit, samples), class_="columns"),
    ]
    if len(rows) > _FIRST:
        body += [tag("h2", "All estimates"), table(head, rows[:_MOST], numeric)]
        if len(rows) > _MOST:
            body.append(tag("p", f"The first {_MOST} of {len(rows)} numbers.", class_="note"))
    body += [tag("h2", "Data and draws"), _moments(fit, samples)]
    return [*body, tag("h2", "Cost, versions and machine"), table(("", ""), _cost(fit) + machine())]


# -- the answers -----------------------------------------------------------------------------------


def _name(fit: Fit) -> str:
    return name_of(fit.energy.model)


def _what(fit: Fit) -> str:
    energy = fit.energy
    sites = {k: sum(np.size(leaf) for leaf in jax.tree.leaves(v)) for k, v in sorted(fit.estimates.items())}
    shown = ", ".join(f"{k} ({n})" for k, n in list(sites.items())[:8]) + (", ..." if len(sites) > 8 else "")
    weights = np.asarray(energy.weights)
    masked = int((weights == 0).sum())
    whole = whole_rows(fit).num_rows
    data = ", ".join(a.name for a in energy.arrays)
    return (
        f"{_name(fit)}, with {plural(sum(sites.values()), 'parameter')}: {shown or 'none'}; on "
        f"{plural(energy.num_rows, 'row')} of {plural(energy.dim, 'number')}: {data}"
        + (f", of which {masked} rows are masked" if masked else "")
        + (f"; checks and pictures of rows are of the {whole} without missing cells." if whole < len(weights) else ".")
    )


def _loss(fit: Fit) -> str:
    if isinstance(fit, AdversarialResult):
        return (
            "Maximum likelihood through a flow's bound on log Z (adversarial dynamics embedding), "
            f"{plural(len(fit.losses), 'step')}."
        )
    loss = loss_of(fit)
    how = "in closed form" if solved_at_once(fit) else f"{plural(len(fit.losses), 'step')} of an optimiser"
    about = (type(loss).__doc__ or "").strip().split("\n")[0]
    return f"{settings(loss)}: {about} {how.capitalize()}, learning rate β = {float(fit.learning_rate):.4g}."


def _trust(checks: list[Check]) -> str:
    count = {verdict: sum(c.verdict == verdict for c in checks) for verdict in _WORDS}
    known = len(checks) - count["unknown"]
    unknown = f" {plural(count['unknown'], 'check')} could not be made." if count["unknown"] else ""
    if count["bad"]:
        names = ", ".join(c.question for c in checks if c.verdict == "bad")
        return f"Not as it is: see {names}.{unknown}"
    if count["look"]:
        names = ", ".join(c.question for c in checks if c.verdict == "look")
        return f"With care: {count['good']} of {known} checks are good; look at: {names}.{unknown}"
    return f"Nothing speaks against it: {known} of {known} checks are good.{unknown}"


def _check_table(checks: list[Check]) -> Markup:
    first = {c.found: c.question for c in reversed(checks)}

    def row(c: Check) -> tuple[Any, ...]:
        if first[c.found] != c.question:
            c = c._replace(found=f"as for: {first[c.found]}.")
        found = tag("span", c.found, " ", tag("span", c.detail, class_="note"))
        return c.question, found, tag("span", _WORDS[c.verdict], class_=f"verdict {c.verdict}")

    return table(("check", "found", "verdict"), map(row, checks))


def _errors(fit: Fit) -> Any:
    """Standard errors by site, or the reason why there are none."""
    if isinstance(fit, AdversarialResult):
        return "the gradient of this fit is that of a bound, through draws of the flow."
    return or_reason(fit.stderr)


def _estimate_rows(fit: Fit, errors: Any) -> list[tuple[str, str, str]]:
    found = {} if isinstance(errors, str) else dict(_numbers(errors))
    labels = {} if isinstance(fit, AdversarialResult) else fit.number_names
    names = [n for site in labels.values() for n in site]
    rows = [(name, *_with_error(value, found.get(name))) for name, value in _numbers(fit.estimates)]
    return [(n, *row[1:]) for n, row in zip(names, rows, strict=True)] if names else rows


def _with_error(value: float, error: float | None) -> tuple[str, str]:
    """Both to the second digit of the error."""
    if error is None:
        return f"{value:.4g}", "–"
    if not 1e-6 < error < 1e6:
        return f"{value:.4g}", f"{error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}", f"{error:.{decimals}f}"


def _numbers(tree: Any) -> list[tuple[str, float]]:
    """Every number of a pytree by name."""
    found: list[tuple[str, float]] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        site = jax.tree_util.keystr(path, simple=True, separator=".")
        found += zip(numbered(site, np.shape(leaf)), np.ravel(leaf).tolist(), strict=True)
    return found


# -- pictures and tables ---------------------------------------------------------------------------


def _pictures(fit: Fit, samples: Any) -> list[Markup]:
    """The pictures that can be drawn of this fit; one that cannot says why."""
    energy, wide = whole_rows(fit), isinstance(fit, AdversarialResult)
    found = []
    if isinstance(fit, AdversarialResult) or not solved_at_once(fit):
        found.append(draw("Objective by step", lambda ax: plot_losses(fit, ax=ax), (1, 1 + wide), 6.0 + 6.0 * wide))
    smooth = not len(energy.discrete_columns)
    if energy.dim <= 2 and energy.has_density and smooth:
        found.append(draw("Data and fitted density", lambda ax: plot_density(energy, ax=ax)))
    if energy.dim == 2 and smooth:
        found.append(draw("Score field over the data", lambda ax: plot_score_field(energy, ax=ax)))
    if not isinstance(samples, str):
        side = min(5, len(data_columns(energy)[0]))
        caption = "Data against draws of the model" + (", the first five columns" if side < energy.dim else "")
        found.append(draw(caption, lambda ax: plot_marginals(energy, samples, ax=ax), (side, side), 2.0 * max(side, 3)))
    if isinstance(fit, ScoreMatchingResult):
        found.append(draw("Influence of rows", lambda ax: plot_influence(fit, ax=ax)))
    return found


def _moments(fit: Fit, samples: Any) -> Markup:
    """Mean and spread of the data's columns, and the same of the draws with their R-hat and effective size."""
    energy = whole_rows(fit)
    names, data = data_columns(energy)
    head = ["column", "data mean", "data sd"]
    columns = [data.mean(axis=0), data.std(axis=0)]
    if not isinstance(samples, str):
        sites = [a.name for a in energy.arrays]
        draws = sample_columns(energy, samples)
        head += ["draws mean", "draws sd"]
        columns += [draws.mean(axis=0), draws.std(axis=0)]
        for group, title in (("r_hat", "R-hat"), ("ess", "effective sample size")):
            head.append(title)
            columns.append(np.concatenate([np.ravel(samples[group][k].values) for k in sites]))
    rows = [(name, *(f"{c[i]:.4g}" for c in columns)) for i, name in enumerate(names[:_MOST])]
    return table(head, rows, range(1, len(head)))


def _cost(fit: Fit) -> list[tuple[str, str]]:
    """What the run took, as far as it was measured."""
    if fit.cost is None:
        return []
    cost = fit.cost
    found = [("run", f"{cost.seconds:.1f} s, {cost.compile_seconds:.1f} s of it compiling, on {cost.device}")]
    if cost.gradient_evaluations is not None:
        found.append(("gradient evaluations", f"{cost.gradient_evaluations:,.0f} of each row of a step's data"))
    if cost.peak_memory is not None:
        found.append(("peak memory", f"{cost.peak_memory / 2**20:,.0f} MiB of the device, by the whole process so far"))
    return found
