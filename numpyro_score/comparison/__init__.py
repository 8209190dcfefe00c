"""Fits and losses beside each other, under KL and under Fisher."""

from numpyro_score.comparison.audit import Audit, AuditRow, audit
from numpyro_score.comparison.compare import Comparison, compare
from numpyro_score.comparison.loo import HyvarinenScore, hyvarinen_loo, hyvarinen_score
from numpyro_score.comparison.scores import HYVARINEN

__all__ = [
    "HYVARINEN",
    "Audit",
    "AuditRow",
    "Comparison",
    "HyvarinenScore",
    "audit",
    "compare",
    "hyvarinen_loo",
    "hyvarinen_score",
]
