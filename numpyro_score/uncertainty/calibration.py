"""The learning rate at which a generalised posterior has the spread of the estimates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from numpyro_score.uncertainty.objective import SandwichError
from numpyro_score.uncertainty.sandwich import Curvature

__all__ = ["calibrated_learning_rate"]


def calibrated_learning_rate(curvature: Curvature) -> float:
    r"""The β at which the generalised posterior is as informative as the estimates [Lyddon, Holmes & Walker 2019].

    .. math:: \beta = \operatorname{tr}(H S^{-1} H) / \operatorname{tr}(H), \quad H = \sum_n w_n \nabla^2 \ell_n, \quad
              S = N \operatorname{cov}_n(w_n \nabla \ell_n),

    in unconstrained coordinates, of the losses alone. The precision of the estimates is HS⁻¹H and that of the
    posterior βH, without the prior: β makes their traces equal, and with one parameter the two themselves. Both H and
    S grow as N, so β does not. Weights of c in all rows divide β by c, and so cancel from the posterior. Parameters
    that the losses do not depend on, such as the scale of a prior, do not count, nor those at an end of their
    constraint.

    Raises:
        SandwichError: if H is not positive definite, or S is singular.
    """
    if np.isnan(curvature.loss_hessian).any():
        raise SandwichError(
            "A robust fit is the root of an equation and the minimum of no objective, so no learning rate is "
            "calibrated: take the fit that windham was given."
        )
    p = len(curvature.size)
    counts = ~curvature.at_an_end & ((curvature.size > 0) | (np.diag(curvature.loss_hessian) != 0))
    if curvature.at_an_end.any() and not counts.any():
        raise SandwichError(
            "All parameters are at the end of their constraint, so no learning rate is calibrated: pass learning_rate "
            "as a number, or drop the term that the data do not have."
        )
    h, size = curvature.loss_hessian[np.ix_(counts, counts)], curvature.size[counts]
    root = np.asarray(np.linalg.qr(curvature.root[:, counts], mode="r"))
    resolution = 10 * p * float(np.finfo(jnp.result_type(float)).eps)
    diagonal = np.diag(h)
    if not (counts.any() and (diagonal > 0).all() and _lowest(h / np.sqrt(np.outer(diagonal, diagonal))) > resolution):
        raise SandwichError(
            f"The losses are not curved upwards at the estimates in all {p} parameters, so no learning rate is "
            "calibrated: drop or fix parameters that the data do not determine, enable double precision, or pass "
            "learning_rate as a number."
        )
    # In units of the gradients, so that those that are equal in all rows but for rounding count as equal.
    relative = root / np.where(size > 0, size, 1.0)
    if len(root) < len(h) or np.linalg.svd(relative, compute_uv=False)[-1] < resolution:
        raise SandwichError(
            f"The gradients of the rows do not spread in all {p} parameters, so no learning rate is calibrated: use "
            "more rows than parameters, drop parameters whose gradient is the same in all rows, or pass learning_rate "
            "as a number."
        )
    return float(np.sum(np.linalg.solve(root.T, h) ** 2) / np.trace(h))


def _lowest(symmetric: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(symmetric)[0])
