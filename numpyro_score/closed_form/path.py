"""Sparse fits: the path of minimisers of a quadratic objective under Laplace priors of growing strength."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import gammaln

from numpyro_score.closed_form.coordinates import ClosedFormError, Coordinates, FlatObjectiveError
from numpyro_score.closed_form.streaming import QuadraticLoss

__all__ = ["Roc", "SparsePath", "sparse_path"]


@dataclass(frozen=True, eq=False)
class SparsePath:
    """The minimisers for every penalty λ from the largest of interest down to the smallest asked for.

    Between two knots they are linear in λ, so that the path is exact everywhere.

    Attributes:
        penalties: λ at the knots, (L,), falling. λ = 1 is the MAP under the model's own Laplace priors.
        vectors: the minimisers there, (L, P), in the coordinates of the quadratic.
        coordinates: which site each coordinate belongs to.
        quadratic: the objective.
    """

    penalties: Float[np.ndarray, "l"]
    vectors: Float[np.ndarray, "l p"]
    coordinates: Coordinates
    quadratic: QuadraticLoss

    def __repr__(self) -> str:
        first, last = self.penalties[0], self.penalties[-1]
        return f"SparsePath of {len(self.penalties)} knots, penalties {first:.4g} to {last:.4g}, {self.coordinates}"

    def vector(self, penalty: float) -> Float[np.ndarray, "p"]:
        """The minimiser at λ, (P,); above the largest knot all that is penalised is zero.

        Raises:
            ValueError: for a penalty below the end of the path.
        """
        if not penalty >= self.penalties[-1]:
            raise ValueError(
                f"The path ends at the penalty {self.penalties[-1]:.6g}, got {penalty}: ask for a longer one."
            )
        return np.array([np.interp(penalty, self.penalties[::-1], v[::-1]) for v in self.vectors.T])

    def estimates(self, penalty: float) -> dict[str, Any]:
        """Constrained values by site at λ; what the penalty excludes is exactly zero.

        Raises:
            ClosedFormError: if they violate a constraint.
            ValueError: for a penalty below the end of the path.
        """
        vector = self.vector(penalty)
        self.coordinates.require_inside(vector)
        return self.coordinates.by_site(vector)

    def choose(self, held_out: QuadraticLoss | None = None, *, gamma: float = 0.5) -> float:
        """The knot's λ whose minimiser has the smallest loss on other rows, without any prior, or the smallest eBIC.

        Args:
            held_out: of rows that the path has not seen, e.g. `QuadraticLoss.of(target, key, x_test)`; by :meth:`ebic`
                if not given.
            gamma: of the eBIC.
        """
        values = self.ebic(gamma) if held_out is None else [held_out.data(v) for v in self.vectors]
        return float(self.penalties[np.argmin(values)])

    @property
    def selected(self) -> Bool[np.ndarray, "l p"]:
        """Which penalised coordinates are not zero at each knot, (L, P)."""
        return (self.vectors != 0) & (self.quadratic.penalties > 0)

    def refit(self, penalty: float) -> dict[str, Any]:
        """The minimiser at λ's selection without the penalty that shrinks it, by site.

        Raises:
            FlatObjectiveError: if the data do not determine the selected parameters.
            ClosedFormError, ValueError: as :meth:`estimates`.
        """
        vector = self._refitted((self.vector(penalty) != 0) & (self.quadratic.penalties > 0))
        self.coordinates.require_inside(vector)
        return self.coordinates.by_site(vector)

    def ebic(self, gamma: float = 0.5) -> Float[np.ndarray, "l"]:
        r"""The extended Bayesian information criterion at the knots, lower is better.

        .. math:: 2 \beta \sum_n w_n \ell_n(\hat\theta_S) + |S| \log N + 2\gamma \log \binom{m}{|S|}

        with S the selected of m penalised coordinates and the minimiser on S without penalty [Chen & Chen 2008; for
        score matching Lin, Drton & Shojaie 2016; Yu, Drton & Shojaie 2019]. γ = 0 is the BIC, larger γ selects fewer.
        A loss of score matching is no log likelihood: how it weighs against log N is a matter of the units of x at
        β = 1, and that of a likelihood's where β is calibrated. Infinite where the data do not determine S.
        """
        n, m = self.quadratic.num_rows, int((self.quadratic.penalties > 0).sum())
        found: dict[bytes, float] = {}
        for chosen in self.selected:
            if (key := chosen.tobytes()) not in found:
                k = int(chosen.sum())
                log_choices = gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1)
                try:
                    loss = self.quadratic.data(self._refitted(chosen))
                except FlatObjectiveError:
                    loss = np.inf
                found[key] = 2 * loss + k * np.log(n) + 2 * gamma * log_choices
        return np.array([found[chosen.tobytes()] for chosen in self.selected])

    def roc(self, truth: Mapping[str, Any]) -> Roc:
        """How well the path tells the parameters that are zero in truth from those that are not.

        Args:
            truth: by site, an array that is not zero where the parameter is not, of penalised sites.

        Raises:
            ValueError: for sites that are not penalised, arrays of other shapes, or a truth that is all zero or never.
        """
        indices = self.coordinates.by_site(np.arange(self.vectors.shape[1], dtype=float))
        known = np.zeros(self.vectors.shape[1], bool)
        positive = np.zeros_like(known)
        for name, values in truth.items():
            if name not in indices or np.shape(values) != np.shape(indices[name]):
                shapes = {k: np.shape(v) for k, v in indices.items()}
                raise ValueError(
                    f"truth has '{name}' of shape {np.shape(values)}, and the sites are {shapes}: use these."
                )
            at = np.asarray(indices[name]).astype(int)
            known[at], positive[at] = True, np.asarray(values) != 0
        if (known & (self.quadratic.penalties == 0)).any():
            raise ValueError(
                "truth has parameters without a Laplace prior, which no penalty makes zero: leave them out."
            )
        if not (positive[known].any() and not positive[known].all()):
            raise ValueError("truth needs parameters that are zero and some that are not.")
        true = self.selected[:, positive].mean(axis=1)
        false = self.selected[:, known & ~positive].mean(axis=1)
        x, y = np.append(false, 1.0), np.append(true, 1.0)
        order = np.lexsort((y, x))
        x, y = np.append(0.0, x[order]), np.append(0.0, np.maximum.accumulate(y[order]))
        return Roc(self.penalties, false, true, float(np.sum(np.diff(x) * 0.5 * (y[1:] + y[:-1]))))

    def _refitted(self, chosen: np.ndarray) -> np.ndarray:
        index = np.flatnonzero(chosen | (self.quadratic.penalties == 0))
        part = self.quadratic.total.restrict(index)
        vector = np.zeros(len(chosen))
        if index.size:
            vector[index] = -part.solver(lambda i: self.coordinates.site_of(int(index[i])))(part.linear)
        return vector


class Roc(NamedTuple):
    """Of a path, the receiver operating characteristic at its knots."""

    penalties: Float[np.ndarray, "l"]
    false_positive_rate: Float[np.ndarray, "l"]  # the share selected of those that are zero
    true_positive_rate: Float[np.ndarray, "l"]  # of those that are not
    area: float  # under the curve through all knots, from (0, 0) on to (1, 1) by a straight line


def sparse_path(quadratic: QuadraticLoss, smallest: float | Literal["auto"] = 1.0) -> SparsePath:
    r"""The minimisers of an objective with Laplace priors, over a path of penalties.

    .. math:: \hat\theta(\lambda) = \arg\min_\theta
              \tfrac12\theta^\top\Gamma\theta + g^\top\theta + \lambda\sum_j w_j|\theta_j|

    with w = 1/scale of the Laplace prior (where several parameters enter at exactly the same penalty, they are told
    apart in its seventh digit); parameters with other priors or none are not penalised by λ. The path is piecewise
    linear and is followed from knot to knot by least-angle regression [Efron et al. 2004], with scikit-learn; under
    score matching it is the estimator of Lin, Drton & Shojaie [2016].

    Args:
        quadratic: the objective, of a model with at least one Laplace prior centred at zero.
        smallest: λ at which the path ends. The default 1 is the MAP under the model's priors; 0 the unpenalised fit;
            "auto" a ten-thousandth of the λ at which the first parameter enters, or a hundredth with fewer rows than
            parameters, whatever the scales of the priors.

    Raises:
        ImportError: without scikit-learn, `pip install numpyro-score[sparse]`.
        ValueError: for no Laplace prior, or a negative penalty.
        ClosedFormError: if the quadratic is so close to flat that the path could not be followed.
        FlatObjectiveError: if the data do not determine the parameters that are not penalised.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("sparse_path needs scikit-learn: pip install 'numpyro-score[sparse]'.")
    weights, total = quadratic.penalties, quadratic.total
    sparse, free = np.flatnonzero(weights > 0), np.flatnonzero(weights == 0)
    if not sparse.size:
        raise ValueError(
            "The model has no Laplace prior: give the parameters that may be zero one, e.g. numpyro.sample('k', "
            "dist.Laplace(0.0, 1.0))."
        )
    if smallest != "auto" and (isinstance(smallest, str) or not smallest >= 0):
        raise ValueError(f"smallest must be a penalty of at least 0, or 'auto', got {smallest!r}.")

    # Free parameters follow the others: θ_f = −Γ_ff⁻¹ (g_f + Γ_fs θ_s), which leaves a quadratic in θ_s.
    coupling = total.hessian[np.ix_(free, sparse)]
    hessian, linear = total.hessian[np.ix_(sparse, sparse)], total.linear[sparse]
    if free.size:
        inverse = total.restrict(free).solver(lambda i: quadratic.coordinates.site_of(int(free[i])))
        follow, offset = -inverse(coupling), -inverse(total.linear[free])
        hessian, linear = hessian + coupling.T @ follow, linear + coupling.T @ offset
    if isinstance(smallest, str):
        smallest = float(np.abs(linear / weights[sparse]).max())
        smallest *= 1e-4 if quadratic.num_rows >= len(weights) else 1e-2
    penalties, path = _follow(hessian, linear, weights[sparse], smallest)
    if _first_wrong(hessian, linear, weights[sparse], penalties, path, smallest) is not None:
        # Coordinates that enter at exactly the same penalty are stepped over: tell them apart in the seventh digit,
        # by multiples of the golden ratio, less the whole numbers, which are as far apart as can be.
        apart = weights[sparse] * (1.0 + 1e-7 * (np.arange(sparse.size) * 0.6180339887498949 % 1.0))
        penalties, path = _follow(hessian, linear, apart, smallest)
    wrong = _first_wrong(hessian, linear, weights[sparse], penalties, path, smallest)
    if wrong is not None:
        raise ClosedFormError(
            f"The path could be followed down to the penalty {penalties[max(wrong - 1, 0)]:.3g} only, as the quadratic "
            "is close to flat there: take a larger `smallest`, or more rows."
        )

    vectors = np.zeros((len(penalties), len(weights)))
    vectors[:, sparse] = path
    if free.size:
        vectors[:, free] = offset + path @ follow.T
    return SparsePath(penalties, vectors, quadratic.coordinates, quadratic)


def _follow(hessian: np.ndarray, linear: np.ndarray, weights: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Knots λ (L,) and minimisers there (L, P)."""
    from sklearn.linear_model import lars_path_gram

    # In units of 1/w all penalties are one; the overall size is that which scikit-learn's thresholds expect.
    gram, slope = hessian / np.outer(weights, weights), linear / weights
    size = float(np.diag(gram).mean())
    penalties, _, path = lars_path_gram(
        -slope / size,
        gram / size,
        n_samples=1,
        alpha_min=end / size,
        method="lasso",
        max_iter=20 * len(weights) + 20,
    )
    penalties *= size
    if np.isclose(penalties[-1], end, rtol=1e-12, atol=0.0):
        penalties[-1] = end
    # What left the path leaves a rounding behind.
    path = np.where(np.abs(path) > 1e-12 * np.abs(path).max(initial=0.0), path, 0.0)
    return penalties, path.T / weights


def _first_wrong(
    hessian: np.ndarray, linear: np.ndarray, weights: np.ndarray, penalties: np.ndarray, path: np.ndarray, end: float
) -> int | None:
    """The first knot that is no minimiser: −(Γθ + g)_j is λ w_j sign θ_j, or at most λ w_j in size at θ_j = 0."""
    pull = -(path @ hessian + linear) / weights  # (L, P)
    rounding = 1e-6 * max(float(np.abs(linear / weights).max(initial=0.0)), float(penalties[0]))
    penalty = penalties[:, None]
    active = path != 0
    wrong = np.where(active, np.abs(pull - penalty * np.sign(path)), np.abs(pull) - penalty) > rounding
    if wrong.any():
        return int(np.argmax(wrong.any(1)))
    return len(penalties) if penalties[-1] > max(end, 0.0) + rounding else None
