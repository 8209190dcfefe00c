"""Flows along the score of a density: their entropy is exact, so that they bound its normaliser."""

from numpyro_score.flows.dynamics import DynamicsFlow, Trajectory
from numpyro_score.flows.fit import FlowFit, FlowFunction, LearnedFlow, fit_flow
from numpyro_score.flows.hamiltonian import HamiltonianFlow
from numpyro_score.flows.langevin import LangevinFlow
from numpyro_score.flows.leapfrog import Phase, Scaling, leapfrog, leapfrog_inverse
from numpyro_score.flows.weights import WeightSummary, summarize_weights

__all__ = [
    "DynamicsFlow",
    "FlowFit",
    "FlowFunction",
    "HamiltonianFlow",
    "LangevinFlow",
    "LearnedFlow",
    "Phase",
    "Scaling",
    "Trajectory",
    "WeightSummary",
    "fit_flow",
    "leapfrog",
    "leapfrog_inverse",
    "summarize_weights",
]
