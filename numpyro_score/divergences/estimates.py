"""Divergences between a law p, under which expectations are taken, and a law q."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.divergences.law import (
    Draws,
    Law,
    check_rows,
    draw,
    log_normaliser,
    mean_and_error,
    read_pair,
    refuse_rows,
)
from numpyro_score.energy import Energy
from numpyro_score.losses import ESM, ISM, Loss, row_losses
from numpyro_score.losses.base import positive, refuse_kinks_of_score
from numpyro_score.losses.terms import require_flat
from numpyro_score.normaliser import LogPartition
from numpyro_score.normaliser.coordinates import row_log_jacobian
from numpyro_score.normaliser.source import one_density
from numpyro_score.operators import full_precision
from numpyro_score.random import Key, as_key

__all__ = ["Divergence", "fisher_divergence", "kl_divergence", "local_variance", "squared_log_ratio"]


class Divergence(NamedTuple):
    """An estimate of a divergence."""

    value: float
    stderr: float  # Monte Carlo standard error, that of log Z included
    ess: float  # effective number of rows behind it
    up_to_constant: bool = False  # it lacks a constant that p alone determines, as of data


def fisher_divergence(p: Any, q: Any, rng_key: Key | None = None, *, num_samples: int = 4000) -> Divergence:
    r"""The Fisher divergence :math:`\tfrac12 E_p \|\nabla\log p - \nabla\log q\|^2`. Needs no normaliser.

    Where p is data it is the Hyvärinen score :math:`E_p[\tfrac12\|s\|^2 + \mathrm{tr}\,\nabla s]`, s the score of q,
    which is the divergence less :math:`\tfrac12 E_p\|\nabla\log p\|^2`: of use to compare several q on the same data.
    Both are unbiased. On supports other than R^D both are weighted as :class:`~numpyro_score.ISM` describes for q's.

    Args:
        p: an energy, a fit, a distribution, or rows of data: an array, or arrays by site. A pair (law, draws) uses
            these draws: independent rows, or what :func:`~numpyro_score.sample` returned.
        q: an energy, a fit or a distribution; only its score is needed.
        rng_key: a key to draw from p, where that is needed.
        num_samples: how many draws of p. Those of an energy are MCMC draws of four chains, and the standard error
            counts their effective number.

    Raises:
        TypeError, ValueError: if q is rows; laws of different data; rows out of q's support, scores that are not
            finite, with the rows; no key where one is needed.

    Warns:
        UserWarning: where the values at rows of p have tails so heavy that their variance may be infinite.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import fisher_divergence
        >>> found = fisher_divergence(dist.Normal(0, 1), dist.Normal(1, 1), jax.random.key(0))
        >>> abs(found.value - 0.5) < 1e-5  # the scores differ by 1 everywhere
        True
    """
    p, q = read_pair("fisher_divergence", p, q)
    draws = draw(p, q, rng_key, num_samples)
    check_rows(q.energy, draws.flat)
    if p.energy is None:
        refuse_kinks_of_score(q.energy.at(draws.flat) if q.energy.resizable else q.energy, "kl_divergence")
    values, weights = _fisher_values(p.energy, q.energy, draws.flat)
    if not (weights[0] and (weights == weights[0]).all()):
        raise ValueError("q masks or weighs its rows: bind its model without the mask or scale.")
    refuse_rows("Fisher divergence", values)
    found = mean_and_error(values.reshape(draws.rows.shape[:2]), draws.independent)
    return Divergence(*found, up_to_constant=p.energy is None)


@jax.jit
@full_precision
def _fisher_values(p: Energy | None, q: Energy, x: Float[Array, "n d"]) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    loss: Loss = ISM() if p is None else ESM(p.score)
    if q.resizable or q.num_rows == len(x):
        return row_losses(loss, q.at(x), jax.random.key(0))  # neither is random
    values, weights = jax.lax.map(lambda row: row_losses(loss, q.at(row[None]), jax.random.key(0)), x, batch_size=256)
    return values[:, 0], weights[:, 0]


def kl_divergence(
    p: Any,
    q: Any,
    rng_key: Key | None = None,
    *,
    num_samples: int = 4000,
    log_partition_p: LogPartition | float | None = None,
    log_partition_q: LogPartition | float | None = None,
) -> Divergence:
    r"""The Kullback–Leibler divergence :math:`E_p \log(p/q)`.

    Where p is data it is the mean negative log likelihood :math:`-E_p \log q`, which is the divergence plus the
    entropy of p. Unbiased but for the error of log Z, whose standard error is carried in.

    Args:
        p: as in :func:`~numpyro_score.fisher_divergence`, whose warning of heavy tails holds here, too.
        q: an energy, a fit or a distribution, with a density.
        rng_key: a key, where draws of p or :func:`~numpyro_score.log_partition` need one.
        num_samples: how many draws of p.
        log_partition_p: log Z of p: a result of :func:`~numpyro_score.log_partition`, or a number that is known
            exactly. Estimated by that function, with its defaults, if not given. Distributions need none.
        log_partition_q: the same for q.

    Raises:
        TypeError, ValueError: as :func:`~numpyro_score.fisher_divergence`, and for a model with a
            :func:`~numpyro_score.score_factor`; and as :func:`~numpyro_score.log_partition` says.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import kl_divergence
        >>> found = kl_divergence(dist.Normal(0, 1), dist.Normal(1, 1), jax.random.key(0))
        >>> abs(found.value - 0.5) < 5 * found.stderr < 0.1
        True
    """
    p, q = read_pair("kl_divergence", p, q)
    draw_key, p_key, q_key = _split(rng_key, 3)
    one_density(q.energy)
    if p.energy is None:
        draws = draw(p, q, draw_key, num_samples)
        check_rows(q.energy, draws.flat)
        values = -_values(_data_log_density, draws, q.energy)
        normaliser, of_normaliser = log_normaliser(q, log_partition_q, q_key)
    else:
        draws, values = _log_ratios(p, q, draw_key, num_samples)
        normaliser, of_normaliser = _difference(p, q, log_partition_p, log_partition_q, p_key, q_key)
    mean, stderr, ess = mean_and_error(values, draws.independent)
    return Divergence(mean + normaliser, math.hypot(stderr, of_normaliser), ess, p.energy is None)


def squared_log_ratio(
    p: Any,
    q: Any,
    rng_key: Key | None = None,
    *,
    num_samples: int = 4000,
    log_partition_p: LogPartition | float | None = None,
    log_partition_q: LogPartition | float | None = None,
) -> Divergence:
    r"""Half the mean square of the log ratio, :math:`\tfrac12 E_p \log^2(p/q)`.

    As p and q come close it agrees with the KL divergence to leading order, and it is never negative. Unbiased where
    both log Z are exact; their squared standard errors bias it upwards by half their sum.

    Args:
        p: an energy, a fit or a distribution, or a pair (law, draws) as in :func:`~numpyro_score.fisher_divergence`.
        q: an energy, a fit or a distribution.
        rng_key: a key, where draws of p or :func:`~numpyro_score.log_partition` need one.
        num_samples: how many draws of p.
        log_partition_p: as in :func:`~numpyro_score.kl_divergence`.
        log_partition_q: the same for q.

    Raises:
        TypeError, ValueError: if p or q is rows, and as :func:`~numpyro_score.kl_divergence`.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import squared_log_ratio
        >>> found = squared_log_ratio(dist.Normal(0, 1), dist.Normal(1, 1), jax.random.key(0))
        >>> abs(found.value - 0.625) < 5 * found.stderr < 0.1  # (1/4 + 1)/2
        True
    """
    p, q = read_pair("squared_log_ratio", p, q, needs="pq")
    draw_key, p_key, q_key = _split(rng_key, 3)
    one_density(q.energy)
    draws, values = _log_ratios(p, q, draw_key, num_samples)
    normaliser, of_normaliser = _difference(p, q, log_partition_p, log_partition_q, p_key, q_key)
    values = values + normaliser
    mean, stderr, ess = mean_and_error(0.5 * values**2, draws.independent)
    return Divergence(mean, math.hypot(stderr, float(values.mean()) * of_normaliser), ess)


def local_variance(p: Any, q: Any, rng_key: Key, *, noise: float, num_samples: int = 4000) -> Divergence:
    r"""How much the log ratio r = log p/q changes nearby, :math:`E|r(x+e) - r(x)|^2 / E\|e\|^2`, x from p.

    e has the law N(0, σ²I). Needs no normaliser, and tends to :math:`E_p\|\nabla r\|^2/D = 2 D_F/D` as σ goes to 0,
    with D_F the Fisher divergence; a larger σ sees what scores at single points do not. Unbiased for each σ. At small
    σ the difference loses digits: keep σ‖∇r‖ well above the rounding error of the log densities.

    Args:
        p: an energy, a fit or a distribution, or a pair (law, draws) as in :func:`~numpyro_score.fisher_divergence`.
        q: an energy, a fit or a distribution.
        rng_key: a key.
        noise: σ, in units of the rows.
        num_samples: how many draws of p.

    Raises:
        TypeError, ValueError: if p or q is rows, and as :func:`~numpyro_score.kl_divergence`.
        NotImplementedError: on supports that x + e leaves, naming the site.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_score import local_variance
        >>> found = local_variance(dist.Normal(0, 1), dist.Normal(1, 1), jax.random.key(0), noise=0.1)
        >>> abs(found.value - 1.0) < 5 * found.stderr < 0.2
        True
    """
    positive("local_variance", "noise", noise)
    p, q = read_pair("local_variance", p, q, needs="pq")
    for energy in (p.energy, q.energy):
        one_density(energy)
        require_flat(energy, "local_variance", "use fisher_divergence or kl_divergence")
    draw_key, noise_key = jax.random.split(as_key(rng_key))
    draws = draw(p, q, draw_key, num_samples)
    check_rows(q.energy, draws.flat)
    values = _values(_squared_increments, draws, p.energy, q.energy, noise_key, jnp.asarray(noise, float))
    return Divergence(*mean_and_error(values, draws.independent))


@jax.jit
@full_precision
def _squared_increments(
    x: Float[Array, "n d"], p: Energy, q: Energy, rng_key: Array, noise: Float[Array, ""]
) -> Float[Array, "n"]:
    moved = x + noise * jax.random.normal(rng_key, x.shape, x.dtype)
    ratio = p.log_density(moved) - q.log_density(moved) - (p.log_density(x) - q.log_density(x))
    return ratio**2 / (x.shape[-1] * noise**2)


@jax.jit
@full_precision
def _ratio(x: Float[Array, "n d"], p: Energy, q: Energy) -> Float[Array, "n"]:
    return p.log_density(x) - q.log_density(x)  # the Jacobian of the rows is in both


@jax.jit
@full_precision
def _data_log_density(x: Float[Array, "n d"], q: Energy) -> Float[Array, "n"]:
    """In the measure of the data, as that of log Z."""
    return q.log_density(x) - jax.vmap(partial(row_log_jacobian, q))(x)


def _values(of_rows: Any, draws: Draws, *arguments: Any) -> np.ndarray:
    """A function of rows at the draws, (chain, draw), in double precision."""
    values = np.asarray(of_rows(draws.flat, *arguments), np.float64)
    refuse_rows("log density", values)
    return values.reshape(draws.rows.shape[:2])


def _log_ratios(p: Law, q: Law, rng_key: Array | None, num_samples: int) -> tuple[Draws, np.ndarray]:
    """Draws of p, and f_p − f_q there."""
    one_density(p.energy)
    draws = draw(p, q, rng_key, num_samples)
    check_rows(q.energy, draws.flat)
    return draws, _values(_ratio, draws, p.energy, q.energy)


def _difference(
    p: Law,
    q: Law,
    given_p: LogPartition | float | None,
    given_q: LogPartition | float | None,
    p_key: Array | None,
    q_key: Array | None,
) -> tuple[float, float]:
    """Log Z_q − log Z_p and its standard error."""
    (value_p, stderr_p), (value_q, stderr_q) = (
        log_normaliser(law, given, key) for law, given, key in ((p, given_p, p_key), (q, given_q, q_key))
    )
    return value_q - value_p, math.hypot(stderr_p, stderr_q)


def _split(rng_key: Key | None, n: int) -> Any:
    return (None,) * n if rng_key is None else jax.random.split(as_key(rng_key), n)
