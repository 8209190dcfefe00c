"""Objectives that are quadratic in the parameters: solved at once, over batches of rows, and along penalties."""

from numpyro_score.closed_form.coordinates import ClosedFormError, Coordinates, FlatObjectiveError
from numpyro_score.closed_form.path import Roc, SparsePath, sparse_path
from numpyro_score.closed_form.quadratic import Quadratic, minimise
from numpyro_score.closed_form.streaming import GradientSpread, QuadraticFit, QuadraticLoss

__all__ = [
    "ClosedFormError",
    "Coordinates",
    "FlatObjectiveError",
    "GradientSpread",
    "Quadratic",
    "QuadraticFit",
    "QuadraticLoss",
    "Roc",
    "SparsePath",
    "minimise",
    "sparse_path",
]
