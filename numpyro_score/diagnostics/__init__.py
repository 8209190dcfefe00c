"""What ArviZ needs to know about a fit, and what to look at before believing it."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.plots import (
    plot_de_bruijn,
    plot_density,
    plot_influence,
    plot_khat,
    plot_losses,
    plot_marginals,
    plot_score_field,
)
from numpyro_score.diagnostics.report import report

__all__ = [
    "Audit",
    "AuditRow",
    "audit",
    "plot_de_bruijn",
    "plot_density",
    "plot_influence",
    "plot_khat",
    "plot_losses",
    "plot_marginals",
    "plot_score_field",
    "report",
    "to_arviz",
]
