"""Densities that bend over the width of few rows have an objective full of minima, and errors of one of them."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import NCE, ScoreMatching
from numpyro_score.uncertainty.few_rows import sums_of_bends, warn_if_few_rows_bend
from numpyro_score.uncertainty.sandwich import derivatives

SAID = "rows bend the objective there"


def laplace(eps: float) -> Callable[[Any], None]:
    """A Laplace law whose tip is rounded over a width of √ε; its location and rate."""

    def model(x: Any) -> None:
        mu = numpyro.param("mu", 0.4)
        rate = numpyro.param("rate", 1.5, constraint=constraints.positive)
        numpyro.factor("energy", -rate * jnp.sqrt((x - mu) ** 2 + eps))

    return model


def cauchy(x: Any) -> None:
    mu, scale = numpyro.param("mu", 0.0), numpyro.param("scale", 1.0, constraint=constraints.positive)
    numpyro.sample("x", dist.Cauchy(mu, scale), obs=x)


def draws(seed: int, rows: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).laplace(0.5, 0.66, rows).astype(np.float32)


@functools.cache
def matcher(eps: float) -> ScoreMatching:
    return ScoreMatching(laplace(eps), num_steps=1500)


def said(errors: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors()
    return [str(w.message) for w in caught if SAID in str(w.message)]


def test_few_rows_bend_it() -> None:
    """`benchmarks.narrow_bends`: 91% of 200 data sets are warned of, and intervals of 90% hold the truth in 12%."""
    found = [said(matcher(1e-3).run(jax.random.key(0), draws(k), progress_bar=False).stderr) for k in range(8)]
    assert sum(map(bool, found)) >= 6
    first = next(f[0] for f in found if f)
    assert re.match(r"The errors of site 'mu' are known to ±\d+% only, .* in effect \d\.\d of 1000 rows", first)


@pytest.mark.parametrize("rows", [200, 1000])
def test_heavy_tails_are_not_few_rows(rows: int) -> None:
    """`benchmarks.narrow_bends`: intervals of 90% hold the location in 86% and 91% of data sets."""
    sm = ScoreMatching(cauchy, num_steps=1500)
    for seed in range(6):
        x = np.random.default_rng(seed).standard_cauchy(rows).astype(np.float32)
        assert not said(sm.run(jax.random.key(0), x, progress_bar=False).stderr)


def test_wide_bends_are_quiet() -> None:
    for seed in range(4):
        assert not said(matcher(0.3).run(jax.random.key(0), draws(seed), progress_bar=False).stderr)


def test_a_likelihood_is_not_concerned() -> None:
    sm = ScoreMatching(laplace(1e-5), loss=NCE(dist.Laplace(0.0, 1.5), 4), num_steps=600)
    assert not said(sm.run(jax.random.key(0), draws(0), progress_bar=False).stderr)


def test_sums_over_rows() -> None:
    """Against the derivatives of each row's loss by themselves, some rows of which have no weight."""
    weights = np.arange(1000) % 3 > 0

    def model(x: Any) -> None:
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=jnp.asarray(weights)):
            laplace(0.1)(x)

    objective = ScoreMatching(model, num_steps=300).run(jax.random.key(0), draws(1), progress_bar=False)._objective
    bends = sums_of_bends(derivatives(objective)[-1])
    g, h = jax.jit(lambda p: (jax.jacfwd(objective.rows)(p), jax.hessian(objective.rows)(p)))(objective.position)
    g, h = (np.asarray(v, np.float64)[weights] for v in (g, h))
    h = np.stack([h[:, 0, 0], h[:, 1, 1]], axis=1)
    expected = [np.full(2, weights.sum()), h.sum(0), g.sum(0), (h**2).sum(0), (h * g).sum(0), (g**2).sum(0)]
    np.testing.assert_allclose(bends, expected, rtol=2e-3, atol=2e-2)
    # What a regression of h on g leaves, beside the curvature; that is then made so small that half a row is left.
    left = [np.linalg.lstsq(np.stack([np.ones(len(g)), g[:, j]], 1), h[:, j])[1][0] for j in (0, 1)]
    rows = h.sum(0) ** 2 / left * (len(g) - 1) / len(g)
    hessian = np.diag(h.sum(0)) * (0.5 / rows.min()) ** 0.5
    with pytest.warns(UserWarning, match=r"in effect 0.5 of 666 rows"):
        warn_if_few_rows_bend(objective, hessian, bends)


def test_batches_say_it_too() -> None:
    x = draws(0)
    fit = matcher(1e-3).run(jax.random.key(0), x, progress_bar=False)
    assert said(fit.stderr) == said(lambda: fit.over_batches([(b,) for b in np.split(x, 4)])) != []
