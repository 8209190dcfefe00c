"""Diffusions: noise levels become samplers, likelihoods and posteriors."""

from numpyro_score.diffusion.codes import flow_decode, flow_encode, flow_interpolate
from numpyro_score.diffusion.distribution import ScoreDistribution
from numpyro_score.diffusion.probability_flow import FlowLogProb, flow_log_prob
from numpyro_score.diffusion.sde import EDM, SDE, VE, VP, LinearSDE, SubVP

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "FlowLogProb",
    "LinearSDE",
    "ScoreDistribution",
    "SubVP",
    "flow_decode",
    "flow_encode",
    "flow_interpolate",
    "flow_log_prob",
]
