"""Rows of simple laws, and fits of them that are quadratic in the parameters, for `benchmarks.false_alarms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Rows = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


class Found(NamedTuple):
    """A row of the table."""

    check: str
    case: str
    good: bool  # whether there is nothing to object to
    verdicts: list[str]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.normal(size=shape)
    x[0, 0] = 8.0
    return x


def twins(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.normal(size=shape)
    x[:, 1] = x[:, 0] + 0.02 * x[:, 1]
    return x


def quartic(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Independent columns of density exp(−x⁴/4), by |x|⁴/4 of the gamma law of shape ¼."""
    return (4 * rng.gamma(0.25, size=shape)) ** 0.25 * rng.choice([-1.0, 1.0], size=shape)


def skew(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of variance 1 and skewness 1."""
    return rng.gamma(4.0, size=shape) / 2 - 2


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3.0, shape)


def normal_terms(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of score (N, D, P) and Laplacian (N, P) in the parameters of b·x − ½ xᵀKx."""
    n, d = x.shape
    i, j = np.triu_indices(d, 1)
    score, pair = np.zeros((n, d, 2 * d + len(i))), 2 * d + np.arange(len(i))
    score[:, range(d), range(d)] = 1.0
    score[:, range(d), range(d, 2 * d)] = -x
    score[:, i, pair], score[:, j, pair] = -x[:, j], -x[:, i]
    laplacian = np.zeros(score.shape[2])
    laplacian[d : 2 * d] = -1.0
    return score, np.broadcast_to(laplacian, (n, len(laplacian)))


def chain_terms(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for Σ w_i x_i x_{i+1} − Σ a_i x_i⁴."""
    n, d = x.shape
    score, laplacian = np.zeros((n, d, 2 * d - 1)), np.zeros((n, 2 * d - 1))
    first = np.arange(d - 1)
    score[:, first, first], score[:, first + 1, first] = x[:, 1:], x[:, :-1]
    score[:, range(d), range(d - 1, 2 * d - 1)] = -4 * x**3
    laplacian[:, d - 1 :] = -12 * x**2
    return score, laplacian
