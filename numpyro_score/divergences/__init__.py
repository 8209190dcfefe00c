"""How far laws are apart, and tests of whether draws and data agree with a model."""

from numpyro_score.divergences.de_bruijn import DeBruijn, de_bruijn
from numpyro_score.divergences.entropy import ScoreEntropy, entropy_from_scores
from numpyro_score.divergences.estimates import (
    Divergence,
    fisher_divergence,
    kl_divergence,
    local_variance,
    squared_log_ratio,
)
from numpyro_score.divergences.mmd import mmd
from numpyro_score.divergences.pairs import median_distance
from numpyro_score.divergences.stein import SteinTest, kernel_stein_discrepancy

__all__ = [
    "DeBruijn",
    "Divergence",
    "ScoreEntropy",
    "SteinTest",
    "de_bruijn",
    "entropy_from_scores",
    "fisher_divergence",
    "kernel_stein_discrepancy",
    "kl_divergence",
    "local_variance",
    "median_distance",
    "mmd",
    "squared_log_ratio",
]
