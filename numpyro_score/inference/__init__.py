"""Fitting: the generalised model, score matching, dynamics embedding, generators, and what they return."""

from numpyro_score.inference.adjustment import adjust_draws
from numpyro_score.inference.adversarial import AdversarialDynamicsEmbedding
from numpyro_score.inference.adversarial_result import AdversarialResult, AdversarialState, AdversarialTerms
from numpyro_score.inference.cost import FitCost
from numpyro_score.inference.dependent import dependent_rows
from numpyro_score.inference.generator import DenoisingGenerator, GeneratorResult, GeneratorState
from numpyro_score.inference.loop import NonFiniteLossError
from numpyro_score.inference.optim import default_optimizer, optax_optimizer
from numpyro_score.inference.posterior import generalized_bayes
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.robust import Windham, windham
from numpyro_score.inference.saved import load
from numpyro_score.inference.score_matching import ScoreMatching
from numpyro_score.inference.summary import Summary

__all__ = [
    "AdversarialDynamicsEmbedding",
    "AdversarialResult",
    "AdversarialState",
    "AdversarialTerms",
    "DenoisingGenerator",
    "FitCost",
    "GeneratorResult",
    "GeneratorState",
    "NonFiniteLossError",
    "ScoreMatching",
    "ScoreMatchingResult",
    "Summary",
    "Windham",
    "adjust_draws",
    "default_optimizer",
    "dependent_rows",
    "generalized_bayes",
    "load",
    "optax_optimizer",
    "windham",
]
