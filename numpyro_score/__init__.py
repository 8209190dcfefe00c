"""Unnormalised models as first-class NumPyro models."""

__version__ = "0.1.0.dev0"

from numpyro_score.diagnostics import audit, compare, hyvarinen_loo, hyvarinen_score, to_arviz
from numpyro_score.energy import Energy
from numpyro_score.flows import HamiltonianFlow, LangevinFlow, LearnedFlow, fit_flow
from numpyro_score.inference import (
    AdversarialDynamicsEmbedding,
    ClosedFormError,
    DenoisingGenerator,
    GradientSpread,
    NonFiniteLossError,
    QuadraticLoss,
    ScoreMatching,
    ScoreMatchingResult,
    adjust_draws,
    generalized_bayes,
    sparse_path,
)
from numpyro_score.kernels import MALA, SGHMC, SGLD, cyclical_schedule, polynomial_schedule
from numpyro_score.losses import (
    CD,
    DSM,
    ESM,
    FSM,
    ISM,
    NCE,
    PCD,
    SSM,
    KLContraction,
    geometric_levels,
    parzen_score,
)
from numpyro_score.normaliser import EnergyDistribution, log_partition, sample
from numpyro_score.score_terms import curl, score_factor

__all__ = [
    "CD",
    "DSM",
    "ESM",
    "FSM",
    "ISM",
    "MALA",
    "NCE",
    "PCD",
    "SGHMC",
    "SGLD",
    "SSM",
    "AdversarialDynamicsEmbedding",
    "ClosedFormError",
    "DenoisingGenerator",
    "Energy",
    "EnergyDistribution",
    "GradientSpread",
    "HamiltonianFlow",
    "KLContraction",
    "LangevinFlow",
    "LearnedFlow",
    "NonFiniteLossError",
    "QuadraticLoss",
    "ScoreMatching",
    "ScoreMatchingResult",
    "adjust_draws",
    "audit",
    "compare",
    "curl",
    "cyclical_schedule",
    "fit_flow",
    "generalized_bayes",
    "geometric_levels",
    "hyvarinen_loo",
    "hyvarinen_score",
    "log_partition",
    "parzen_score",
    "polynomial_schedule",
    "sample",
    "score_factor",
    "sparse_path",
    "to_arviz",
]
