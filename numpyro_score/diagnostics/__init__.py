"""What ArviZ needs to know about a fit."""

from numpyro_score.diagnostics.arviz import to_arviz
from numpyro_score.diagnostics.audit import Audit, AuditRow, audit

__all__ = ["Audit", "AuditRow", "audit", "to_arviz"]
