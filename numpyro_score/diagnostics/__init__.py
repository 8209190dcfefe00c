"""What ArviZ needs to know about a fit, how far laws are apart, and what to look at before believing a fit."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.compare import Comparison, compare
from numpyro_score.diagnostics.de_bruijn import DeBruijn, de_bruijn
from numpyro_score.diagnostics.divergences import (
    Divergence,
    fisher_divergence,
    kl_divergence,
    local_variance,
    squared_log_ratio,
)
from numpyro_score.diagnostics.entropy import ScoreEntropy, entropy_from_scores
from numpyro_score.diagnostics.loo import HyvarinenScore, hyvarinen_loo, hyvarinen_score
from numpyro_score.diagnostics.mmd import mmd
from numpyro_score.diagnostics.plots import (
    plot_comparison,
    plot_de_bruijn,
    plot_density,
    plot_influence,
    plot_khat,
    plot_losses,
    plot_marginals,
    plot_score_field,
)
from numpyro_score.diagnostics.report import report
from numpyro_score.diagnostics.stein import SteinTest, kernel_stein_discrepancy

__all__ = [
    "Audit",
    "AuditRow",
    "Comparison",
    "DeBruijn",
    "Divergence",
    "HyvarinenScore",
    "ScoreEntropy",
    "SteinTest",
    "audit",
    "compare",
    "de_bruijn",
    "entropy_from_scores",
    "fisher_divergence",
    "hyvarinen_loo",
    "hyvarinen_score",
    "kernel_stein_discrepancy",
    "kl_divergence",
    "local_variance",
    "mmd",
    "plot_comparison",
    "plot_de_bruijn",
    "plot_density",
    "plot_influence",
    "plot_khat",
    "plot_losses",
    "plot_marginals",
    "plot_score_field",
    "report",
    "squared_log_ratio",
    "to_arviz",
]
