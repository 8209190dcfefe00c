"""The one model transformation: densities that need a normaliser are replaced by a loss that needs none."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer.autoguide import AutoDelta
from numpyro.primitives import Messenger

from numpyro_score import _trace
from numpyro_score._arguments import refuse_empty
from numpyro_score._supports import base_law
from numpyro_score.energy import Energy
from numpyro_score.inference.calibration import CalibratedRate
from numpyro_score.losses import Loss
from numpyro_score.losses.base import check_settings, declare_sites, positive, total_loss_and_memory

__all__ = ["LOSS_SITE", "GeneralizedModel", "generalized_bayes", "prior_model"]

LOSS_SITE = "generalized_bayes_loss"
"""The name of the factor that holds the loss; :func:`~numpyro_score.to_arviz` drops it."""

Model = Callable[..., Any]


def generalized_bayes(
    model: Model,
    loss: Loss,
    learning_rate: Any = 1.0,
    *,
    data: str | None = None,
    rng_key: Array | None = None,
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
            :func:`~numpyro_score.inference.calibrated_learning_rate` by a point fit when the model first meets its
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
    return GeneralizedModel(model, loss, learning_rate, data, rng_key)


class GeneralizedModel:
    """What :func:`generalized_bayes` returns: a NumPyro model that knows what it was made of."""

    def __init__(self, model: Model, loss: Loss, learning_rate: Any, data: str | None, rng_key: Array | None) -> None:
        if inspect.isclass(loss):
            raise TypeError(f"loss is the class {loss.__name__}: write {loss.__name__}(...).")
        hash(loss)  # a loss is a static argument of compiled functions: fail here, not deep inside
        if not callable(loss):
            raise TypeError(f"loss must be a callable such as ISM(), got {loss!r}.")
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable, got {type(model).__name__}.")
        if isinstance(learning_rate, str):
            if learning_rate != "calibrated":
                raise ValueError(f"learning_rate must be a positive number or 'calibrated', got '{learning_rate}'.")
        else:
            positive("generalized_bayes", "learning_rate", learning_rate)
        self.model, self.loss, self.learning_rate = model, loss, learning_rate
        self.data, self.rng_key = data, rng_key
        self._calibrated = CalibratedRate(model, loss, data)
        functools.update_wrapper(self, model, updated=())  # its name and docstring, not its attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the loss is a factor of its own."""
        learning_rate = self.rate(*args, **kwargs)
        value, energy = _run_parameters(self.model, self.data, args, kwargs)
        if energy.is_concrete:
            energy.check()
            check_settings(self.loss, energy)
        energy = energy.with_params(declare_sites(self.loss, energy))
        rng_key = _random_key(self.loss)
        rng_key = rng_key if self.rng_key is None else self.rng_key
        # Outside of `jit` the loss would run one operation at a time; inside another `jit` this changes nothing. The
        # function is new every time, so that no trace is kept of what the model closes over.
        total, memory = jax.jit(functools.partial(total_loss_and_memory, self.loss))(
            energy, jax.random.key(0) if rng_key is None else rng_key
        )
        for name, new in memory.items():
            energy.params[name].update(new)  # in place, as NumPyro's mutable sites take a new value
        numpyro.factor(LOSS_SITE, -learning_rate * total)
        return value

    def rate(self, *args: Any, **kwargs: Any) -> Any:
        """β for these arguments of the model: the number given, or the calibrated one."""
        if not isinstance(self.learning_rate, str):
            return self.learning_rate
        return self._calibrated(args, kwargs, lambda: np.asarray(self.energy(*args, **kwargs).data))

    def energy(self, *args: Any, **kwargs: Any) -> Energy:
        """The energy at parameters drawn from the prior: for what does not depend on them, such as the data."""
        with handlers.block(), handlers.seed(rng_seed=0):
            return _run_parameters(self.model, self.data, args, kwargs)[1]


def prior_model(
    model: Model,
    data: str | None = None,
    *,
    loss: Loss | None = None,
    inspect_energy: Callable[[Energy], None] | None = None,
) -> Model:
    """The priors, params and penalties of `model` alone: its generalised posterior with β = 0.

    With a loss its own sites are there, too. `inspect_energy` is called with the energy of every run.
    """

    @functools.wraps(model)
    def prior(*args: Any, **kwargs: Any) -> Any:
        value, energy = _run_parameters(model, data, args, kwargs)
        if inspect_energy is not None:
            inspect_energy(energy)
        if loss is not None:
            declare_sites(loss, energy)
        return value

    return prior


def point_guide(model: Model, data: str | None = None) -> AutoDelta:
    """A point for each latent site of `model`, which starts at the prior's median, where the penalties are finite."""
    return AutoDelta(_WithoutPriors(prior_model(model, data)))


class _WithoutPriors(Messenger):
    """Leaves out the densities of latent sites where that cannot change the start.

    When a guide first runs, NumPyro evaluates the density of its model and the gradient, one operation at a time, each
    of which is compiled, and draws anew until they are finite. It starts at medians of 15 draws: for these priors each
    median is one of the draws, where the density is finite.
    """

    def process_message(self, msg: _trace.Site) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            if type(base_law(msg["fn"])) in _SCALAR_PRIORS:
                msg["fn"] = msg["fn"].mask(False)


_SCALAR_PRIORS = {
    dist.Beta,
    dist.Cauchy,
    dist.Exponential,
    dist.Gamma,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.InverseGamma,
    dist.Laplace,
    dist.LogNormal,
    dist.Normal,
    dist.StudentT,
    dist.Uniform,
}


def _run_parameters(
    model: Model, data: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Energy]:
    """Runs the model with all its sites but the observed ones seen outside, and binds an energy to their values."""
    refuse_empty(model, args, kwargs)
    parameters = _trace.Parameters()
    with parameters:
        value = model(*args, **kwargs)
    energy = Energy.bound_to(
        model, parameters.values(), parameters.subsamples(), numpyro.prng_key(), data, args, kwargs
    )
    for name in energy.penalties:
        site = parameters.sites[name]
        scale = 1.0 if site["scale"] is None else site["scale"]
        numpyro.factor(name, scale * site["fn"].log_prob(site["value"]))
    return value, energy


def _random_key(loss: Loss) -> Array | None:
    """A random key, as `numpyro.prng_key()` gives it.

    Raises:
        NotImplementedError: for a loss that gives no posterior, where NumPyro wants a density of the parameters.
    """
    message: dict[str, Any] = dict(
        type="prng_key", fn=lambda rng_key: rng_key, args=(), kwargs={"rng_key": None}, value=None
    )
    numpyro.primitives.apply_stack(message)
    why = getattr(loss, "no_posterior", None)
    # For a density, as in MCMC, NumPyro sets the key itself: it is not from a `seed` handler.
    if why is not None and message["kwargs"]["rng_key"] is None:
        name = type(loss).__name__
        raise NotImplementedError(
            f"{name} gives no posterior density, as {why}: use ISM or SSM for MCMC, fit by ScoreMatching, or build the "
            f"autoguide of SVI on numpyro_score.inference.prior_model(model, loss={name}(...))."
        )
    return message["value"]
