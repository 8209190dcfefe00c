"""Pictures of fits, data and comparisons. Every function draws into `ax` where it is given, and returns axes."""

from numpyro_score.plots.comparisons import plot_comparison, plot_de_bruijn, plot_khat
from numpyro_score.plots.diffusions import (
    plot_bits_by_noise,
    plot_draws_by_calls,
    plot_simulation_ranks,
    plot_trajectories,
)
from numpyro_score.plots.fits import plot_influence, plot_losses
from numpyro_score.plots.rows import plot_density, plot_marginals, plot_score_field

__all__ = [
    "plot_bits_by_noise",
    "plot_comparison",
    "plot_de_bruijn",
    "plot_density",
    "plot_draws_by_calls",
    "plot_influence",
    "plot_khat",
    "plot_losses",
    "plot_marginals",
    "plot_score_field",
    "plot_simulation_ranks",
    "plot_trajectories",
]
