"""Noisy normal laws and mixtures in closed form, which the tests of diffusions share."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import logsumexp
from models import improper

from numpyro_score import Energy, PredictorCorrector, score_factor
from numpyro_score.diffusion import steps
from numpyro_score.diffusion.end import NoisyNormal
from numpyro_score.diffusion.steps import Field

MEAN, VARIANCES = np.array([1.0, -2.0]), np.array([0.5, 2.0])
AXES = np.array([[0.8, -0.6], [0.6, 0.8]])
# Four rows of exactly this mean and covariance.
ROWS = MEAN + np.concatenate([s * np.sqrt(2 * VARIANCES)[:, None] * AXES.T for s in (1, -1)])
CENTERS, SPREADS, SHARES = np.array([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0]]), np.array([0.3, 0.5, 0.4]), [0.3, 0.5, 0.2]


def numbers(*values):
    """In the precision of the moment: JAX remembers NumPy's arrays in that of the first use."""
    return (jnp.array(v, jnp.result_type(float)) for v in values)


def normal_score(x, sigma):
    mean, variances, axes = numbers(MEAN, VARIANCES, AXES)
    return -((x - mean) @ axes / (variances + jnp.asarray(sigma)[..., None] ** 2)) @ axes.T


def normal_energy(x, sigma=1.0):
    """The normal law of ROWS with noise, as an energy."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", 0.5 * jnp.sum(normal_score(x, sigma) * (x - next(numbers(MEAN))), axis=-1))


def normal_network(x, sigma=1.0):
    """The same as a score without an energy."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        score_factor("score", x, normal_score(x, sigma))


def mixture(x, sigma=1.0):
    """A mixture of three normal laws with noise."""
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        centers, spreads, shares = numbers(CENTERS, SPREADS, SHARES)
        variance = spreads**2 + jnp.asarray(sigma)[..., None] ** 2
        squared = jnp.sum((x[:, None] - centers) ** 2, axis=-1)
        numpyro.factor("energy", logsumexp(jnp.log(shares) - squared / (2 * variance) - jnp.log(variance), axis=-1))


def mixture_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    which = rng.choice(3, n, p=SHARES)
    return CENTERS[which] + SPREADS[which, None] * rng.normal(size=(n, 2))


def any_mixture(x, sigma=1.0):
    """A mixture of normal laws with noise, whose centers, spreads and shares are parameters."""
    centers, spreads, shares = (numpyro.param(name) for name in ("centers", "spreads", "shares"))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        variance = spreads**2 + jnp.asarray(sigma)[..., None] ** 2
        squared = jnp.sum((x[:, None] - centers) ** 2, axis=-1)
        numpyro.factor("energy", logsumexp(jnp.log(shares) - squared / (2 * variance) - jnp.log(variance), axis=-1))


def drawn_mixture(seed):
    """A mixture of four in the plane, drawn itself: overlapping as a rule, well apart at times."""
    rng = np.random.default_rng(seed)
    laws = {
        "centers": 1.5 * rng.normal(size=(4, 2)),
        "spreads": rng.uniform(0.2, 0.8, size=4),
        "shares": rng.dirichlet(3 * np.ones(4)),
    }
    which = rng.choice(4, 4000, p=laws["shares"])
    x = laws["centers"][which] + laws["spreads"][which, None] * rng.normal(size=(4000, 2))
    dtype = jnp.result_type(float)
    return Energy(any_mixture, {k: jnp.asarray(v, dtype) for k, v in laws.items()}, jnp.asarray(x, dtype))


def energy(model, x=ROWS):
    return Energy(model, {}, jnp.asarray(x, jnp.result_type(float)))


class OneNormal(NamedTuple):
    """In place of a model: one coordinate of this variance and mean 0."""

    variance: Any

    def score(self, u, rho):
        return -u / (self.variance + rho**2)


def one_normal(variance):
    return Field(OneNormal(variance), NoisyNormal(jnp.zeros(1), jnp.eye(1), jnp.array([variance]), jnp.zeros(())))


def predicted_variance(method, levels, variance, monkeypatch):
    """The exact variance of a method's draws of normal data: its steps are linear in u, memory and noise."""
    one_noise = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[-1].set(1.0)  # noqa: E731
    field = one_normal(variance)
    plan = jax.tree.map(jnp.asarray, method.plan(levels, field.end))
    m = method.memory
    corrected = isinstance(method, PredictorCorrector)
    step = method.step.predict if corrected else method.step

    def move(covariance, now):
        unit = jnp.eye(m + 2)  # u, what is remembered, and the noise of this step
        u, past = unit[:, :1], unit[:, 1 : m + 1].T[..., None]
        if step is not None:
            with monkeypatch.context() as patch:
                patch.setattr(steps.random, "normal", one_noise)
                u, past = step(field, now.predictor if corrected else now, u, past, jax.random.key(0))
        linear = jnp.concatenate([u.T, past[..., 0]])
        if step is None:
            linear = linear.at[:, -1].set(0.0)
        new = linear[:, :-1] @ covariance @ linear[:, :-1].T + jnp.outer(linear[:, -1], linear[:, -1])
        for _ in range(method.num_corrector_steps if corrected else 0):
            new = new * (1 - now.h / (variance + now.rho**2)) ** 2 + 2 * now.h
        return new, None

    first = jnp.zeros((m + 1, m + 1)).at[0, 0].set(variance + levels.rho[0] ** 2)
    return float(jax.jit(partial(jax.lax.scan, move))(first, plan)[0][0, 0])


def sliced_w2(x, y, num=64):
    """The root mean square distance of two equally large samples' projections, in order."""
    directions = np.random.default_rng(0).normal(size=(2, num))
    directions /= np.linalg.norm(directions, axis=0)
    return np.sqrt(np.mean((np.sort(np.asarray(x) @ directions, 0) - np.sort(np.asarray(y) @ directions, 0)) ** 2))
