"""What ArviZ needs to know about a fit."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.compare import Comparison, compare
from numpyro_score.diagnostics.loo import HyvarinenScore, hyvarinen_loo, hyvarinen_score

__all__ = [
    "Audit",
    "AuditRow",
    "Comparison",
    "HyvarinenScore",
    "audit",
    "compare",
    "hyvarinen_loo",
    "hyvarinen_score",
    "to_arviz",
]
