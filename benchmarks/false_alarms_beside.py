"""False alarms of leave-one-out, importance weights and fits beside each other, for `benchmarks.false_alarms`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.good_fits import Found, Rows, normal, normal_terms, outlier
from numpyro_score.comparison import HYVARINEN, verdict
from numpyro_score.normaliser.ratios import pareto_smoothed


def leave_one_out(scale: float) -> Iterator[Found]:
    """Pareto k of all rows, with draws of the posterior and with weighted draws around the fit."""
    cases: list[tuple[str, bool, Rows, int, int, int]] = [
        ("normal law, 100 rows", True, normal, 100, 1000, 300),
        ("normal law, 100 rows", True, normal, 100, 4000, 150),
        ("normal law, 400 rows", True, normal, 400, 1000, 60),
        ("normal law, 100 rows, one of 8 standard deviations", False, outlier, 100, 1000, 60),
    ]
    rng = np.random.default_rng(0)
    for case, good, rows, n, s, runs in cases:
        found: dict[str, list[str]] = {"draws of the posterior": [], "weighted draws": []}
        for _ in range(max(int(runs * scale), 5)):
            score, laplacian = normal_terms(rows(rng, (n, 3)))
            flat = score.reshape(-1, score.shape[2])
            hessian = flat.T @ flat
            estimates = -np.linalg.solve(hessian, laplacian.sum(axis=0))
            root = np.linalg.inv(np.linalg.cholesky(hessian))
            z = rng.normal(size=(s, len(estimates)))
            chi = rng.chisquare(5, size=(s, 1)) / 5
            for name, away, wide in (("draws of the posterior", z, False), ("weighted draws", z / chi**0.5, True)):
                square = np.sum(away**2, axis=1)
                own = -0.5 * square + (5 + away.shape[1]) / 2 * np.log1p(square / 5) if wide else 0.0 * square
                theta = estimates + away @ root
                losses = 0.5 * np.sum(np.einsum("ndp,sp->snd", score, theta) ** 2, axis=2) + theta @ laplacian.T
                k = pareto_smoothed((own[:, None] + losses).T, 1.0)[1]
                found[name].append("good" if (k <= min(1 - 1 / np.log10(s), 0.7)).all() else "look")
        for name, verdicts in found.items():
            yield Found("Pareto k of `hyvarinen_loo`, as a warning", f"{case}, {s} {name}", good, verdicts)


def weights_of_log_z(scale: float) -> Iterator[Found]:
    """Pareto k of the 50 of 1,000 draws of the parameters whose ratios of Z vary most."""
    rng = np.random.default_rng(0)
    for n, good in ((100, True), (400, True), (8, False)):
        verdicts = []
        for _ in range(max(int(100 * scale), 5)):
            x = rng.normal(size=(4000, 3))
            # Means and log precisions of a normal law, with the errors of score matching of n rows.
            mean, precision = rng.normal(size=(1000, 3)) / n**0.5, np.exp(rng.normal(size=(1000, 3)) * (2 / n) ** 0.5)
            ratios = -0.5 * (x**2 @ precision.T - 2 * x @ (precision * mean).T) + 0.5 * np.sum(x**2, axis=1)[:, None]
            ratios = ratios.T - ratios.max(axis=0)[:, None]
            relative = np.exp(ratios)
            worst = np.argsort(-(relative.var(axis=1) / relative.mean(axis=1) ** 2))[:50]
            k = pareto_smoothed(ratios[worst], 1.0)[1]
            verdicts.append("good" if (k <= 0.7).all() else "look")
        yield Found("Pareto k of ratios of Z, as a warning", f"normal law fitted to {n} rows", good, verdicts)


def comparisons(scale: float) -> Iterator[Found]:
    """Two normal laws on new rows of a third: how `compare` tells them apart, and what it says of KL and Fisher.

    The equal ones are as far from the truth on either side; others were fitted to rows of their own.
    """
    rng = np.random.default_rng(0)
    cases = [
        ("equally good: means 0.1 and −0.1", 100, True, 5_000),
        ("equally good: means 0.1 and −0.1", 1000, True, 2_000),
        ("variances 1 and 1.5", 1000, False, 300),
    ]
    for case, n, good, runs in cases:
        kl, fisher = [], []
        for _ in range(max(int(runs * scale), 20)):
            x = rng.normal(size=(n, 3))
            laws = [(0.1, 1.0), (-0.1, 1.0)] if good else [(0.0, 1.0), (0.0, 1.5)]
            likelihoods, scores = zip(*(of_normal(x, np.full(3, m), np.eye(3) / v) for m, v in laws), strict=True)
            kl.append("look" if verdict.paired(*likelihoods).significant else "good")
            fisher.append("look" if verdict.paired(*scores).significant else "good")
        yield Found("order of two fits under KL", f"{case}, {n} rows", good, kl)
        yield Found("order of two fits under Fisher", f"{case}, {n} rows", good, fisher)
    for n, runs in ((100, 5_000), (1000, 1_000)):
        sentences = []
        for _ in range(max(int(runs * scale), 20)):
            new, fits = rng.normal(size=(n, 3)), {}
            for name in "ab":
                x = rng.normal(size=(n, 3))
                fits[name] = of_normal(new, x.mean(axis=0), np.linalg.inv(np.cov(x.T)))
            of_kl, of_fisher = ({k: v[i] for k, v in fits.items()} for i in (0, 1))
            widest = float(np.linalg.eigvalsh(np.cov(new.T))[-1])
            said = verdict.find_sentence(of_kl, dict.fromkeys("ab", 0.0), of_fisher, HYVARINEN, widest)
            sentences.append("look" if said else "good")
        yield Found("KL and Fisher disagree", f"normal laws fitted to {n} rows each, {n} new rows", True, sentences)


def of_normal(x: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihood and Hyvärinen score of each row."""
    away = (x - mean) @ precision
    constant = 0.5 * np.linalg.slogdet(precision)[1] - 0.5 * x.shape[1] * np.log(2 * np.pi)
    return constant - 0.5 * np.sum(away * (x - mean), axis=1), 0.5 * np.sum(away**2, axis=1) - np.trace(precision)
