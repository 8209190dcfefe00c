"""log Z by noise-contrastive estimation with the parameters fixed, which is bridge sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy.optimize import brentq
from scipy.special import expit

from numpyro_score.energy import Energy
from numpyro_score.normaliser.coordinates import data_to_row, free_dim, free_log_density, to_free
from numpyro_score.normaliser.sampling import sample
from numpyro_score.normaliser.source import fitted_moments, free_data
from numpyro_score.normaliser.tails import check_tails
from numpyro_score.operators import full_precision

__all__ = ["nce"]

_MAX_R_HAT = 1.05


def nce(
    energy: Energy,
    rng_key: Array,
    *,
    draws: Any = None,
    noise: dist.Distribution | None = None,
    num_noise: int = 20_000,
) -> tuple[float, float, dict[str, Any]]:
    r"""The intercept of a logistic regression between draws of the model and of a noise law.

    With r = exp(g)/q for the density exp g over free coordinates and the noise q, n₁ draws u of the model and n₀ draws
    w of the noise, log Z = c solves

    .. math:: \sum_i \sigma\big(c - \log r(u_i) - \log\tfrac{n_1}{n_0}\big)
              = \sum_j \sigma\big(\log r(w_j) - c + \log\tfrac{n_1}{n_0}\big),

    the maximum of a concave log likelihood: noise-contrastive estimation [Gutmann & Hyvärinen 2010] with all but the
    intercept known, Geyer's [1994] reverse logistic regression, and the optimal bridge of Meng & Wong [1996]. Draws of
    a chain count as n₁ of their effective sample size. Standard error of Frühwirth-Schnatter [2004],

    .. math:: \frac{1}{n_0} \frac{\mathrm{Var}_q\, b}{(E_q b)^2}
              + \frac{\tau}{N_1} \frac{\mathrm{Var}_p\, a}{(E_p a)^2},
              \quad b = \frac{p}{s_1 p + s_0 q}, \quad a = \frac{q}{s_1 p + s_0 q},

    with p = exp(g)/Z, s the shares of the two samples, and τ the autocorrelation time of a. It takes the noise law as
    given, and draws that reach all of the mass.

    Args:
        energy: one density for all rows.
        rng_key: a key.
        draws: of the model: what :func:`~numpyro_score.sample` returned, or a dict of arrays (chain, draw, ...) by
            site. By default 4 chains of 2,000 draws by NUTS.
        noise: q, a distribution over the free coordinates (P,), which are the row itself on R^D. By default the normal
            law with mean and covariance of the energy's data.
        num_noise: n₀.

    Returns:
        log Z, its standard error, and diagnostics: `ess` of the draws, `num_noise`, and `overlap`,
        E_q b = ∫ pq / (s₁ p + s₀ q), 1 where the noise is the model and near 0 where they do not meet.

    Raises:
        ValueError: if the chains have not mixed (R-hat above 1.05), the standard error is above one nat, or the data
            are too few to fit the noise.
    """
    fit_key, draw_key, noise_key = jax.random.split(rng_key, 3)
    dim = free_dim(energy)
    data = free_data(energy, rng_key=fit_key)
    check_tails(energy, data)
    if noise is None:
        mean, cholesky = fitted_moments(data, "give noise=, a NumPyro distribution over the free coordinates of a row")
        noise = dist.MultivariateNormal(jnp.asarray(mean, energy.dtype), scale_tril=jnp.asarray(cholesky, energy.dtype))
    elif noise.event_shape != (dim,) or noise.batch_shape:
        raise ValueError(
            f"noise has batch shape {noise.batch_shape} and event shape {noise.event_shape}: give a distribution over "
            f"the free coordinates of one row, event shape ({dim},)."
        )
    if draws is None:
        draws = sample(energy, draw_key, 2000)
    posterior = draws["posterior"] if "posterior" in draws else draws
    values = {a.name: jnp.asarray(np.asarray(posterior[a.name]), energy.dtype) for a in energy.arrays}
    of_draws, of_noise = jax.device_get(_log_ratios(energy, noise, values, noise_key, num_noise))
    return _bridge(np.asarray(of_draws, np.float64), np.asarray(of_noise, np.float64))


@partial(jax.jit, static_argnames="num_noise")
@full_precision
def _log_ratios(
    energy: Energy, noise: dist.Distribution, values: dict[str, Array], rng_key: Array, num_noise: int
) -> tuple[Float[Array, "chain draw"], Float[Array, "n"]]:
    """Log r = g − log q at the draws and at the noise."""
    radius_key, noise_key = jax.random.split(rng_key)
    rows = jax.vmap(jax.vmap(partial(data_to_row, energy)))(values)
    u = to_free(energy, rows, rng_key=radius_key)
    w = noise.sample(noise_key, (num_noise,))
    return tuple(free_log_density(energy, v) - noise.log_prob(v) for v in (u, w))


def _bridge(of_draws: np.ndarray, of_noise: np.ndarray) -> tuple[float, float, dict[str, Any]]:
    """The root c and its standard error from log ratios of draws (C, T) and noise (n₀,)."""
    if not np.isfinite(of_draws).all() or np.isnan(of_noise).any() or (of_noise == np.inf).any():
        raise ValueError("The log density is not finite at draws of the model, or NaN or +∞ at the noise.")
    if of_draws.shape[0] > 1 and not (r_hat := float(split_gelman_rubin(of_draws))) <= _MAX_R_HAT:
        raise ValueError(f"The chains have not mixed (R-hat {r_hat:.3g} of the log density ratio): draw longer chains.")
    n0 = len(of_noise)
    ess = min(float(effective_sample_size(of_draws)), of_draws.size)
    offset = np.log(ess / n0)

    def slope(c: float) -> float:  # of the log likelihood; the draws count as their effective number
        return ess * expit(c - of_draws - offset).mean() - n0 * expit(of_noise - c + offset).mean()

    finite = of_noise[np.isfinite(of_noise)]
    reach = 50 + abs(offset)
    low, high = min(of_draws.min(), finite.min(initial=np.inf)), max(of_draws.max(), finite.max(initial=-np.inf))
    c = float(brentq(slope, low - reach, high + reach, xtol=1e-12))

    share = ess / (ess + n0)
    a = 1 / (share * np.exp(np.minimum(of_draws - c, 700.0)) + 1 - share)
    b = 1 / (share + (1 - share) * np.exp(np.minimum(c - of_noise, 700.0)))  # 700 for what is 0 anyway
    variance = b.var(ddof=1) / b.mean() ** 2 / n0
    variance += a.var(ddof=1) / a.mean() ** 2 / min(float(effective_sample_size(a)), a.size)
    stderr = float(np.sqrt(variance))
    if not stderr < 1:
        raise ValueError(
            f"Noise and draws hardly meet (standard error {stderr:.3g}): give noise= that is closer to the model, or "
            "use method='smc'."
        )
    return c, stderr, {"ess": ess, "num_noise": n0, "overlap": float(b.mean())}
