"""Models that people look up by name, each a plain NumPyro model of rows x to fit as it is, or to copy and change.

All are fitted by `ScoreMatching(model).run(key, x)`, with further arguments by name. Those that are linear in their
parameters are solved in closed form.
"""

from numpyro_score.models.compositions import dirichlet, polynomially_tilted
from numpyro_score.models.directions import bingham, fisher_bingham, von_mises_fisher
from numpyro_score.models.graphs import gaussian_graph, power_graph, symmetric, truncated_graph
from numpyro_score.models.networks import energy_network

__all__ = [
    "bingham",
    "dirichlet",
    "energy_network",
    "fisher_bingham",
    "gaussian_graph",
    "polynomially_tilted",
    "power_graph",
    "symmetric",
    "truncated_graph",
    "von_mises_fisher",
]
