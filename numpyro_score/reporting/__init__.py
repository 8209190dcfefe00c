"""One page on a fit, with checks."""

from numpyro_score.reporting.report import report

__all__ = [
    "report",
]
