"""What ArviZ needs to know about a fit, and how far laws are from each other and from data."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.compare import Comparison, compare
from numpyro_score.diagnostics.divergences import (
    Divergence,
    fisher_divergence,
    kl_divergence,
    local_variance,
    squared_log_ratio,
)
from numpyro_score.diagnostics.loo import HyvarinenScore, hyvarinen_loo, hyvarinen_score
from numpyro_score.diagnostics.mmd import mmd
from numpyro_score.diagnostics.stein import SteinTest, kernel_stein_discrepancy

__all__ = [
    "Audit",
    "AuditRow",
    "Comparison",
    "Divergence",
    "HyvarinenScore",
    "SteinTest",
    "audit",
    "compare",
    "fisher_divergence",
    "hyvarinen_loo",
    "hyvarinen_score",
    "kernel_stein_discrepancy",
    "kl_divergence",
    "local_variance",
    "mmd",
    "squared_log_ratio",
    "to_arviz",
]
