"""Missing cells of discrete numbers, numbers with bounds and angles: against sums over all values and quadrature."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import (
    DSM,
    ISM,
    DiscreteFisher,
    Energy,
    MissingCells,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
    RowWeight,
    ScoreMatching,
    flat_simplex,
    load,
    log_partition,
    sample,
)
from numpyro_score.losses import Loss, row_losses
from numpyro_score.losses.imputation import moments, typical_rows

KEY = jax.random.key(0)
FIELDS = np.array([0.2, -0.3, 0.1, 0.4])
BONDS = np.triu(np.array([[0, 0.8, 0, 0.5], [0, 0, -0.7, 0], [0, 0, 0, 0.9], [0, 0, 0, 0]]))
STATES = np.array(list(itertools.product([0.0, 1.0], repeat=4)))


def site(name: str, support: Any, value: Any) -> Any:
    return numpyro.sample(name, dist.ImproperUniform(support, (), value.shape[1:]), obs=value)


def spins(x: Any) -> None:
    b, w = numpyro.param("b", jnp.zeros(4)), numpyro.param("w", jnp.zeros(6))
    with numpyro.plate("rows", len(x)):
        x = site("x", constraints.boolean, x)
        i, j = np.triu_indices(4, 1)
        numpyro.factor("energy", x @ b + (x[:, i] * x[:, j]) @ w)


def probabilities() -> np.ndarray:
    f = STATES @ FIELDS + np.einsum("ni,ij,nj->n", STATES, BONDS, STATES)
    return np.exp(f) / np.exp(f).sum()


def at_truth(x: Any) -> Energy:
    return Energy(spins, {"b": jnp.asarray(FIELDS), "w": jnp.asarray(BONDS[np.triu_indices(4, 1)])}, x)


def with_holes(x: np.ndarray, share: float, seed: int = 1) -> np.ndarray:
    missing = np.random.default_rng(seed).uniform(size=x.shape) < share
    missing[missing.all(axis=1), 0] = False
    return np.where(missing, np.nan, x)


def spin_rows(n: int, share: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return with_holes(STATES[rng.choice(16, n, p=probabilities())], share).astype(np.float32)


def by_enumeration(row: np.ndarray, value: Any) -> float:
    """Σ over the spins that were seen of a function of the probability of the row and with one spin turned."""
    seen, p = ~np.isnan(row), probabilities()

    def marginal(values: np.ndarray) -> float:
        return float(p[(STATES[:, seen] == values[seen]).all(axis=1)].sum())

    total = 0.0
    for d in np.flatnonzero(seen):
        turned = row.copy()
        turned[d] = 1 - turned[d]
        total += value(marginal(row), marginal(turned))
    return total


DISCRETE: dict[str, tuple[Loss, Any]] = {
    "pseudo": (PseudoLikelihood(), lambda p, q: -math.log(p / (p + q))),
    "pairs": (PairLikelihood(), lambda p, q: math.log(1 + q / p)),
    "ratios": (RatioMatching(), lambda p, q: (q / (p + q)) ** 2),
    "fisher": (DiscreteFisher(), lambda p, q: (q / p) ** 2 - 2 * p / q),
}


@pytest.mark.parametrize("case", DISCRETE)
def test_integers_are_counted_through(case: str) -> None:
    """Up to three missing spins have eight values: the same as by enumeration, without Monte Carlo error."""
    loss, value = DISCRETE[case]
    x = spin_rows(60)
    found = row_losses(MissingCells(loss, 8), at_truth(x), KEY)[0]
    np.testing.assert_allclose(found, [by_enumeration(row, value) for row in x], rtol=2e-5, atol=2e-5)


def test_draws_of_integers_are_weighted() -> None:
    """Of more values than draws: consistent, with effective draws that tell which rows are exact."""
    x = spin_rows(40, 0.6)
    many = np.isnan(x).sum(axis=1) == 3
    expected = np.array([by_enumeration(row, DISCRETE["pseudo"][1]) for row in x])
    loss = MissingCells(PseudoLikelihood(), 6)
    energy = at_truth(x)

    @jax.jit
    def draws(keys: Any) -> Any:
        values = jax.lax.map(lambda k: row_losses(loss, energy, k)[0], keys)
        return values, loss.effective_draws(energy, KEY)

    found, effective = map(np.asarray, draws(jax.random.split(KEY, 200)))
    np.testing.assert_allclose(found[:, ~many], np.broadcast_to(expected[~many], found[:, ~many].shape), atol=1e-5)
    assert (found[:, many].std(axis=0) > 0.01).all()
    large = np.asarray(row_losses(MissingCells(PseudoLikelihood(), 64), energy, KEY)[0])
    np.testing.assert_allclose(large, expected, atol=1e-5)  # eight values, again all of them
    assert (effective[~many] == 6).all() and (effective[many] < 6).all() and (effective[many] > 1).all()


def counts(x: Any) -> None:
    """Two counts, the more of one the fewer of the other."""
    with numpyro.plate("rows", len(x)):
        x = site("x", constraints.nonnegative_integer, x)
        pull = numpyro.param("w", -0.1) * x[:, 0] * x[:, 1]
        numpyro.factor("energy", x @ numpyro.param("a", jnp.array([1.5, 1.0])) + pull - jax.lax.lgamma(x + 1.0).sum(-1))


def test_counts_are_summed_over(x64: Any) -> None:
    """Against a sum to 60 of the missing one."""
    x = with_holes(np.random.default_rng(0).poisson([3.0, 2.0], (60, 2)).astype(float), 0.5)
    grid = np.arange(61.0)
    factorial = np.vectorize(math.lgamma)(grid + 1)
    joint = 1.5 * grid[:, None] + grid - 0.1 * np.outer(grid, grid) - factorial[:, None] - factorial
    energy = Energy(counts, {"a": jnp.array([1.5, 1.0]), "w": jnp.array(-0.1)}, x)
    found = np.asarray(row_losses(MissingCells(PairLikelihood(3), 4000), energy, KEY)[0])
    for row, value in zip(x, found, strict=True):
        expected = 0.0
        for d in np.flatnonzero(~np.isnan(row)):
            other = row[1 - d]
            along = joint if d == 0 else joint.T
            log_p = np.logaddexp.reduce(along, axis=1) if np.isnan(other) else along[:, int(other)]
            here = int(row[d])
            for step in (-4, -2, -1, 1, 2, 4):
                if here + step >= 0:
                    expected += np.logaddexp(0, log_p[here + step] - log_p[here])
        assert abs(value - expected) < 0.08


def bounded(x: Any, y: Any, z: Any) -> None:
    """A positive number, one between −1 and 2, and an angle, that depend on each other."""
    with numpyro.plate("rows", len(x)):
        x = site("x", constraints.positive, x)
        y = site("y", constraints.interval(-1.0, 2.0), y)
        z = site("z", constraints.circular, z)
        numpyro.factor("energy", numpyro.param("a", 1.0) * density_of_bounded(x, y, z, jnp))


def density_of_bounded(x: Any, y: Any, z: Any, np: Any = np) -> Any:
    return np.log(x) - x * (1 + 0.5 * y**2) - 0.4 * y + 0.8 * np.cos(z - y) + 0.3 * np.cos(z) * x


def test_bounds_and_angles_by_quadrature(x64: Any) -> None:
    """½ h s² + h ∂s + h' s of the density that is integrated over what is missing, cell by cell."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.gamma(2.0, 0.8, 40), rng.uniform(-1, 2, 40), rng.uniform(-3.1, 3.1, 40)], axis=1)
    x = with_holes(x, 0.4)
    energy = Energy(bounded, {"a": jnp.array(1.0)}, *x.T)
    found = np.asarray(row_losses(MissingCells(ISM(), 6000), energy, KEY)[0])
    edges = [np.linspace(0, 25, 601), np.linspace(-1, 2, 61), np.linspace(-np.pi, np.pi, 61)]
    grids, e = [(at[1:] + at[:-1]) / 2 for at in edges], 1e-4

    def log_marginal(row: np.ndarray) -> float:
        whole = (grid if np.isnan(v) else np.array([v]) for v, grid in zip(row, grids, strict=True))
        f = density_of_bounded(*np.meshgrid(*whole, indexing="ij"))
        return float(np.logaddexp.reduce(f, axis=None))

    for row, value in zip(x, found, strict=True):
        expected = 0.0
        for j in np.flatnonzero(~np.isnan(row)):
            below, here, above = (log_marginal(row + step * np.eye(3)[j]) for step in (-e, 0, e))
            s, ds = (above - below) / (2 * e), (above - 2 * here + below) / e**2
            gap = [row[0], min(row[1] + 1, 2 - row[1]), 1.0][j]
            side = 0.0 if gap >= 1 else (1.0 if j == 0 or row[1] < 0.5 else -1.0)
            expected += 0.5 * min(gap, 1) * s**2 + min(gap, 1) * ds + side * s
        assert abs(value - expected) < 0.06


def labelled(x: Any, y: Any) -> None:
    """A spin, and two normal numbers that it moves and that are correlated given it."""
    a, b = numpyro.param("a", 0.3), numpyro.param("b", jnp.array([1.0, -0.5]))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), ()), obs=x)
        y = site("y", constraints.real_vector, y)
        numpyro.factor("energy", a * x + x * (y @ b) - 0.5 * jnp.sum(y**2, -1) + 0.4 * y[:, 0] * y[:, 1])


def test_mixed_rows_by_sums_and_integrals(x64: Any) -> None:
    """The spin by its sum and the normal numbers by closed forms of the density, in all six patterns."""
    rng = np.random.default_rng(0)
    rows = with_holes(np.column_stack([rng.integers(0, 2, 50), rng.normal(size=(50, 2))]).astype(float), 0.4)
    energy = Energy(labelled, {"a": jnp.array(0.3), "b": jnp.array([1.0, -0.5])}, rows[:, 0], rows[:, 1:])
    loss = MissingCells(Mixed(ISM(), PseudoLikelihood(), weight=0.5), 3000)
    found = np.asarray(row_losses(loss, energy, KEY)[0])
    precision, b = np.array([[1.0, -0.4], [-0.4, 1.0]]), np.array([1.0, -0.5])

    def normal(spin: float, y: np.ndarray, seen: np.ndarray) -> tuple[float, np.ndarray, float]:
        """log ∫ e^f over what of y is missing, by the normal law of y given the spin; its gradient and Laplacian."""
        mean, inverse = (
            np.linalg.solve(precision, b * spin),
            np.linalg.inv(np.linalg.inv(precision)[np.ix_(seen, seen)]),
        )
        away = y[seen] - mean[seen]
        value = 0.3 * spin + 0.5 * b @ mean * spin - 0.5 * away @ inverse @ away
        return value, -inverse @ away, -np.trace(inverse)

    for row, value in zip(rows, found, strict=True):
        spin, y, seen = row[0], row[1:], ~np.isnan(row[1:])
        parts = [normal(v, y, seen) for v in ((0.0, 1.0) if np.isnan(spin) else (spin,))]
        logs = np.array([log for log, _, _ in parts])
        shares = np.exp(logs - np.logaddexp.reduce(logs))
        score = sum(share * slope for share, (_, slope, _) in zip(shares, parts, strict=True))
        mean_curvature = sum(w * (bend + slope @ slope) for w, (_, slope, bend) in zip(shares, parts, strict=True))
        expected = 0.5 * (0.5 * score @ score + mean_curvature - score @ score)
        if not np.isnan(spin):
            expected += np.logaddexp(0.0, normal(1 - spin, y, seen)[0] - logs[0])
        assert abs(value - expected) < 0.06


def test_a_fit_of_spins(tmp_path: Any) -> None:
    """By the default, at the truth but for its errors; draws, log Z and files as of any fit."""
    x = spin_rows(440, 0.25)
    fit = ScoreMatching(spins, loss=MissingCells(num_draws=4), num_steps=800).run(KEY, x, progress_bar=False)
    truth, errors = {"b": FIELDS, "w": BONDS[np.triu_indices(4, 1)]}, fit.stderr()
    for k, v in truth.items():
        assert (np.abs((fit.estimates[k] - v) / errors[k]) < 3.5).all()
    assert f"{int((~np.isnan(x)).sum())} of 1760 of which were seen" in fit.summary().lines[0]
    draws = sample(fit, KEY, 500, num_chains=2)["posterior"]["x"].values.reshape(-1, 4)
    np.testing.assert_allclose(draws.mean(axis=0), probabilities() @ STATES, atol=0.12)
    f = STATES @ np.asarray(fit.estimates["b"])
    i, j = np.triu_indices(4, 1)
    f += (STATES[:, i] * STATES[:, j]) @ np.asarray(fit.estimates["w"])
    assert abs(log_partition(fit, rng_key=KEY).value - np.logaddexp.reduce(f)) < 1e-3
    fit.save(tmp_path / "fit")
    assert load(tmp_path / "fit", spins).svi.score_loss == fit.svi.score_loss


def test_zeros_and_bounds_of_each_row() -> None:
    """Zeros are on the line by a floor, and what fills a model for a first look is in the row's own bounds."""
    rng = np.random.default_rng(0)
    n = rng.integers(2, 9, 50)
    x = with_holes(rng.binomial(n[:, None], 0.6, (50, 2)).astype(float), 0.3)

    def binomial(x: Any, n: Any) -> None:
        with numpyro.plate("rows", len(x)):
            x = site("x", constraints.integer_interval(0, n[:, None]), x)
            numpyro.factor("energy", numpyro.param("a", 0.1) * x.sum(-1))

    filled = np.asarray(jax.jit(typical_rows)(Energy(binomial, {"a": 0.1}, x, n)))
    assert (filled <= n[:, None]).all() and (filled == np.round(filled)).all()
    np.testing.assert_array_equal(filled[~np.isnan(x)], x[~np.isnan(x)])

    def positive(x: Any) -> None:
        with numpyro.plate("rows", len(x)):
            x = site("x", constraints.nonnegative, x)
            numpyro.factor("energy", -numpyro.param("a", 1.0) * jnp.sum(x, axis=-1))

    x = with_holes(np.where(rng.uniform(size=(400, 3)) < 0.1, 0.0, rng.exponential(2.0, (400, 3))), 0.3)
    energy = Energy(positive, {"a": 0.5}, x)
    assert all(np.isfinite(v).all() for v in jax.jit(moments)(energy))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*boundary|.*zero")
        fit = ScoreMatching(positive, loss=MissingCells(num_draws=16), num_steps=400).run(KEY, x, progress_bar=False)
    h, seen = np.minimum(x, 1), ~np.isnan(x)
    exact = np.sum((x < 1)[seen]) / np.sum(h[seen])  # of ½ a² h − a h', cell by cell
    np.testing.assert_allclose(fit.estimates["a"], exact, rtol=2e-3)


def test_rows_that_do_not_count_and_cells_that_are_wrong() -> None:
    """What masked rows hold is not looked at; a wrong cell is the only one that is told of."""

    def masked(x: Any, used: Any) -> None:
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=used):
            x = site("x", constraints.boolean, x)
            numpyro.factor("energy", x @ numpyro.param("b", jnp.zeros(4)))

    x, used = spin_rows(100, 0.25), np.arange(100) < 90
    loss = MissingCells(num_draws=8)

    @jax.jit
    def of(x: Any) -> Any:
        energy = Energy(masked, {"b": FIELDS}, x, used)
        return typical_rows(energy), row_losses(loss, energy, KEY)[0], loss.effective_draws(energy, KEY)

    typical, expected, _ = of(x)
    for other in (0.5, np.inf, -9999.0):
        odd = np.where(used[:, None], x, other).astype(np.float32)
        filled, found, effective = map(np.asarray, of(odd))
        np.testing.assert_array_equal(filled[:90], typical[:90])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert (effective[90:] == 8).all()
    ScoreMatching(masked, loss=loss, num_steps=1).run(KEY, odd, used, progress_bar=False)
    x[np.flatnonzero(~np.isnan(x[:, 0]))[3], 0] = 0.5
    with pytest.raises(ValueError, match=r"outside of the support of the site in row \d+ \(1 of 100\)"):
        ScoreMatching(masked, loss=loss, num_steps=1).run(KEY, x, np.full(100, True), progress_bar=False)


def shares(x: Any) -> None:
    with numpyro.plate("rows", len(x)):
        x = site("x", flat_simplex, x)
        numpyro.factor("energy", numpyro.param("a", 1.0) * jnp.sum(x**2, axis=-1))


def run(model: Any, x: Any, loss: Any) -> None:
    ScoreMatching(model, loss=loss, num_steps=1).run(KEY, x, progress_bar=False)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "class": (lambda: MissingCells(PseudoLikelihood), TypeError, "such as ISM(), got PseudoLikelihood: write"),
    "ISM of spins": (
        lambda: run(spins, spin_rows(50), MissingCells(ISM())),
        TypeError,
        "ISM needs derivatives in the data, and site 'x' is discrete",
    ),
    "ratios of counts": (
        lambda: run(counts, with_holes(np.full((50, 2), 3.0), 0.3), MissingCells(RatioMatching())),
        TypeError,
        "RatioMatching compares two values, and site 'x' has more (counts)",
    ),
    "shares": (
        lambda: run(shares, with_holes(np.full((50, 3), 1 / 3), 0.3), MissingCells()),
        NotImplementedError,
        "those of site 'x' are tied together (flat simplex): fill the cells, or drop these rows",
    ),
    "weight": (
        lambda: MissingCells(ISM(boundary_weight=RowWeight(lambda d, x: jnp.minimum(d, 1).prod(-1)))),
        TypeError,
        "MissingCells knows no distances of cells that are missing, and a RowWeight sees those of whole rows",
    ),
    "plain": (
        lambda: run(spins, spin_rows(50), None),
        ValueError,
        "mask these rows with handlers.mask, or fit what was seen by MissingCells()",
    ),
    "outside": (
        lambda: run(spins, spin_rows(50) + 1, MissingCells()),
        ValueError,
        "Data 'x' lie outside of the support of the site",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("inner", [DSM(0.3), RatioMatching(), PseudoLikelihood()])
def test_a_call_outside_of_programs(inner: Loss) -> None:
    """The same as inside of one, and so are derivatives."""
    support = constraints.real if isinstance(inner, DSM) else constraints.boolean

    def model(x: Any) -> None:
        a = numpyro.param("a", 0.2)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.independent(support, 1), (), (2,)), obs=x)
            numpyro.factor("energy", a * x[:, 0] * x[:, 1] - jnp.sum(1.0 * x**2, axis=-1))

    x = np.random.default_rng(0).integers(0, 2, (12, 2)).astype(np.float32)
    x[:3, 0] = np.nan
    loss, key = MissingCells(inner, 8), jax.random.key(1)

    def total(a: Any) -> Any:
        return loss(Energy(model, {"a": a}, jnp.asarray(x)), key).sum()

    for f in (total, jax.grad(total)):
        np.testing.assert_allclose(f(0.2), jax.jit(f)(0.2), rtol=1e-5)
