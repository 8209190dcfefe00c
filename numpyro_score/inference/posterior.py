"""The one model transformation: densities that need a normaliser are replaced by a loss that needs none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numpyro_score.generalized import GeneralizedModel
from numpyro_score.inference.calibration import CalibratedRate
from numpyro_score.inference.score_matching import calibrated_rate
from numpyro_score.losses import Loss
from numpyro_score.random import Key, as_key

__all__ = ["generalized_bayes"]


def generalized_bayes(
    model: Callable[..., Any],
    loss: Loss | None = None,
    learning_rate: Any = 1.0,
    *,
    data: str | None = None,
    rng_key: Key | None = None,
) -> GeneralizedModel:
    r"""Turns an unnormalised model into an ordinary NumPyro model of its parameters.

    The result keeps the priors, params and deterministic sites of `model`, and has in place of its data one factor,

    .. math:: -\beta \sum_n w_n\, \ell_n(\theta),

    so that its posterior is the generalised posterior :math:`\pi(\theta) \propto \pi_0(\theta) \exp(-\beta \sum_n w_n
    \ell_n(\theta))` [Bissiri, Holmes & Walker 2016]. No normaliser is needed, and everything of NumPyro works on it:
    SVI with any autoguide, NUTS, SteinVI, subsampled plates, reparam. The weights w are 1, times what subsampled
    plates, `handlers.scale` and masks say.

    Factors that do not depend on the data are kept, as part of the prior. Other observed sites are conditioned on.

    A loss may have parameters or memory of its own, which become sites of the result: :class:`~numpyro_score.NCE` has a
    param, and :class:`~numpyro_score.PCD` a mutable site, which SVI carries along.

    Under MCMC a loss with random projections or noise holds them fixed for the whole run (common random numbers), so
    that the target is one well-defined density; more projections bring it closer to the exact one. `numpyro.param`
    sites are frozen at their initial values under MCMC.

    Args:
        model: a NumPyro model with an unnormalised density; see :class:`~numpyro_score.Energy` for the forms.
        loss: a pointwise objective, e.g. :class:`~numpyro_score.ISM`.
        learning_rate: β, how much one unit of loss counts against the prior. The default 1 has no claim to
            calibrated uncertainty. "calibrated" finds the rate of
            :func:`~numpyro_score.uncertainty.calibrated_learning_rate` by a point fit when the model first meets its
            data, and remembers it for these; the data must be known then, not traced by `jit` or `vmap`. Param sites
            are fitted along.
        data: the name of the site or argument that is the data, where several could be.
        rng_key: holds the loss's random numbers fixed at this key, under SVI too. By default SVI draws new ones every
            step, and MCMC holds them fixed at one key whatever key the run has: pass several here to see how much
            the posterior depends on them.

    Returns:
        A NumPyro model with the arguments of `model`.

    Raises:
        TypeError, ValueError: for a loss that is a class or not hashable, or a learning rate that is not positive.
            Of the returned model, TypeError if a rate is to be calibrated on traced arguments, `SandwichError` if
            there is none, and NotImplementedError under MCMC for a loss without a density (CD, PCD, NCE).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_score import ISM, generalized_bayes
        >>> def model(x):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * (x - mu) ** 2)
        >>> x = 1.0 + jax.random.normal(jax.random.key(0), (99,))
        >>> mcmc = MCMC(
        ...     NUTS(generalized_bayes(model, ISM())),
        ...     num_warmup=200,
        ...     num_samples=500,
        ...     progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(1), x)
        >>> posterior_mean = x.sum() / 100  # conjugate: prior precision 1, data precision 99
        >>> bool(jnp.abs(mcmc.get_samples()["mu"].mean() - posterior_mean) < 0.02)
        True
    """
    if loss is None:
        raise TypeError("generalized_bayes needs a loss: write e.g. generalized_bayes(model, ISM()).")
    find_rate = CalibratedRate(partial(calibrated_rate, model, loss, data)) if learning_rate == "calibrated" else None
    key = None if rng_key is None else as_key(rng_key)
    return GeneralizedModel(model, loss, learning_rate, data, key, find_rate)
