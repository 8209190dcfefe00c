"""What ArviZ needs to know about a fit."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit
from numpyro_score.diagnostics.loo import HyvarinenScore, hyvarinen_loo, hyvarinen_score

__all__ = ["Audit", "AuditRow", "HyvarinenScore", "audit", "hyvarinen_loo", "hyvarinen_score", "to_arviz"]
