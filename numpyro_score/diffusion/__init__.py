"""Diffusions: noise levels become samplers, likelihoods and posteriors."""

from numpyro_score.diffusion.bits import NoiseBits, bits_by_noise
from numpyro_score.diffusion.calibration import SimulationRanks, simulation_ranks
from numpyro_score.diffusion.codes import flow_decode, flow_encode, flow_interpolate
from numpyro_score.diffusion.distribution import ScoreDistribution
from numpyro_score.diffusion.methods import EDMHeun, PredictorCorrector
from numpyro_score.diffusion.nonlinear import reverse_sde
from numpyro_score.diffusion.posteriors import PosteriorDraws, inpaint, posterior
from numpyro_score.diffusion.preconditioning import preconditioned_energy, preconditioned_score
from numpyro_score.diffusion.probability_flow import FlowLogProb, flow_log_prob
from numpyro_score.diffusion.samplers import Diffused, diffuse
from numpyro_score.diffusion.sde import EDM, SDE, VE, VP, LinearSDE, SubVP

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Diffused",
    "EDMHeun",
    "FlowLogProb",
    "LinearSDE",
    "NoiseBits",
    "PosteriorDraws",
    "PredictorCorrector",
    "ScoreDistribution",
    "SimulationRanks",
    "SubVP",
    "bits_by_noise",
    "diffuse",
    "flow_decode",
    "flow_encode",
    "flow_interpolate",
    "flow_log_prob",
    "inpaint",
    "posterior",
    "preconditioned_energy",
    "preconditioned_score",
    "reverse_sde",
    "simulation_ranks",
]
