"""A comparison of fits as a page."""

from __future__ import annotations

from numpyro_score.comparison import HYVARINEN, Comparison
from numpyro_score.plots import plot_comparison
from numpyro_score.reporting.page import page, table, tag
from numpyro_score.reporting.parts import draw, machine

__all__ = ["comparison_page"]

_MEANING = {
    "log likelihood": "sum over the rows of log p; higher is better. Its error holds that of log Z.",
    "log Z": "the log normaliser, by which the likelihood is normalised.",
    "KSD²": "kernel Stein discrepancy of the data from the fit, and the p-value of a test that they agree.",
    "MMD²": "squared maximum mean discrepancy between the data and draws of the fit.",
    "moments, p-value": "of a test that means, variances, skewnesses and correlations of data and draws agree.",
    "ESS of draws": "the least effective sample size of the draws' columns.",
    "R-hat of draws": "the largest; above 1.01 the chains have not mixed, and the rows above may mislead.",
}


def comparison_page(comparison: Comparison) -> str:
    """The whole document."""
    shown = comparison.shown()
    names = [str(c) for c in shown.columns]
    rows = [(str(label).strip(), *values) for label, values in zip(shown.index, shown.to_numpy(), strict=True)]
    sides = 1 if comparison.order_kl is None else 2
    title = f"Comparison of {', '.join(names)}"
    rule = comparison.rule
    blind = " and sees little of the weights of modes far apart" if rule == HYVARINEN else ""
    scores = f"sum over the rows of {rule.formula}; lower is better. It needs no normaliser{blind}."
    meaning = [(k, v) for k, v in (_MEANING | {rule.score: scores}).items() if k in shown.index]
    body = [
        tag("h1", title),
        *(tag("p", line) for line in comparison.lines),
        table(("", *names), rows, range(1, 1 + len(names))),
        tag("h2", "Pictures"),
        tag(
            "div",
            draw("Fits by their predictions", lambda ax: plot_comparison(comparison, ax=ax), (1, sides), 6.0 * sides),
        ),
        tag("h2", "What the rows mean"),
        table(("row", "meaning"), meaning),
        tag("h2", "Versions and machine"),
        table(("", ""), machine()),
    ]
    return page(title, *body)
