"""Unnormalised models as first-class NumPyro models."""

from numpyro_score.arviz import to_arviz
from numpyro_score.closed_form import ClosedFormError, GradientSpread, QuadraticLoss, sparse_path
from numpyro_score.comparison import audit, compare, hyvarinen_loo, hyvarinen_score
from numpyro_score.diffusion import EDM, SDE, VE, VP, EDMHeun, LinearSDE, PredictorCorrector, SubVP, diffuse
from numpyro_score.divergences import (
    de_bruijn,
    entropy_from_scores,
    fisher_divergence,
    kernel_stein_discrepancy,
    kl_divergence,
    local_variance,
    mmd,
    squared_log_ratio,
)
from numpyro_score.energy import Energy, curl, score_factor
from numpyro_score.flows import HamiltonianFlow, LangevinFlow, LearnedFlow, fit_flow
from numpyro_score.generalized import prior_model
from numpyro_score.inference import (
    AdversarialDynamicsEmbedding,
    DenoisingGenerator,
    NonFiniteLossError,
    ScoreMatching,
    ScoreMatchingResult,
    adjust_draws,
    generalized_bayes,
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
from numpyro_score.plots import (
    plot_comparison,
    plot_de_bruijn,
    plot_density,
    plot_influence,
    plot_khat,
    plot_losses,
    plot_marginals,
    plot_score_field,
)
from numpyro_score.reporting import report
from numpyro_score.uncertainty import SandwichError
from numpyro_score.version import __version__ as __version__

__all__ = [
    "CD",
    "DSM",
    "EDM",
    "ESM",
    "FSM",
    "ISM",
    "MALA",
    "NCE",
    "PCD",
    "SDE",
    "SGHMC",
    "SGLD",
    "SSM",
    "VE",
    "VP",
    "AdversarialDynamicsEmbedding",
    "ClosedFormError",
    "DenoisingGenerator",
    "EDMHeun",
    "Energy",
    "EnergyDistribution",
    "GradientSpread",
    "HamiltonianFlow",
    "KLContraction",
    "LangevinFlow",
    "LearnedFlow",
    "LinearSDE",
    "NonFiniteLossError",
    "PredictorCorrector",
    "QuadraticLoss",
    "SandwichError",
    "ScoreMatching",
    "ScoreMatchingResult",
    "SubVP",
    "adjust_draws",
    "audit",
    "compare",
    "curl",
    "cyclical_schedule",
    "de_bruijn",
    "diffuse",
    "entropy_from_scores",
    "fisher_divergence",
    "fit_flow",
    "generalized_bayes",
    "geometric_levels",
    "hyvarinen_loo",
    "hyvarinen_score",
    "kernel_stein_discrepancy",
    "kl_divergence",
    "local_variance",
    "log_partition",
    "mmd",
    "parzen_score",
    "plot_comparison",
    "plot_de_bruijn",
    "plot_density",
    "plot_influence",
    "plot_khat",
    "plot_losses",
    "plot_marginals",
    "plot_score_field",
    "polynomial_schedule",
    "prior_model",
    "report",
    "sample",
    "score_factor",
    "sparse_path",
    "squared_log_ratio",
    "to_arviz",
]
