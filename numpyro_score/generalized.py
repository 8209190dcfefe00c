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

from numpyro_score.energy import AnyEnergy, Parameters, Site, base_law, bind, read_arguments
from numpyro_score.losses import Loss
from numpyro_score.losses.base import check_settings, declare_sites, filled, positive, total_loss_and_memory
from numpyro_score.placement import Places
from numpyro_score.printed import name_of, settings
from numpyro_score.programs import run_compiled

__all__ = ["LOSS_SITE", "GeneralizedModel", "point_guide", "prior_model"]

LOSS_SITE = "generalized_bayes_loss"
"""The name of the factor that holds the loss; :func:`~numpyro_score.to_arviz` drops it."""

Model = Callable[..., Any]
FindRate = Callable[[tuple[Any, ...], dict[str, Any], Callable[[], Any]], float]


class GeneralizedModel:
    """What :func:`~numpyro_score.generalized_bayes` returns: a NumPyro model that knows what it was made of.

    Args:
        model, loss, learning_rate, data, rng_key: as there.
        find_rate: finds the learning rate where it is "calibrated", from the model's arguments and a function that
            gives its data.
        places: where the arrays among the model's arguments lie, for a program in which they are traced.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        learning_rate: Any,
        data: str | None = None,
        rng_key: Array | None = None,
        find_rate: FindRate | None = None,
        places: Places | None = None,
    ) -> None:
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
        self._find_rate, self._places = find_rate, places
        functools.update_wrapper(self, model, updated=())  # its name and docstring, not its attributes

    def __repr__(self) -> str:
        rate = repr(self.learning_rate) if isinstance(self.learning_rate, str) else self.learning_rate
        return f"generalized_bayes({name_of(self.model)}, {settings(self.loss)}, learning_rate={rate})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the loss is a factor of its own."""
        learning_rate = self.rate(*args, **kwargs)
        value, energy = _run_parameters(self.model, self.data, args, kwargs, self._places)
        if energy.is_concrete:
            filled(self.loss, energy).check()
            check_settings(self.loss, energy)
        energy = energy.with_params(declare_sites(self.loss, energy))
        rng_key = _random_key(self.loss)
        rng_key = rng_key if self.rng_key is None else self.rng_key
        # Outside of `jit` the loss would run one operation at a time; inside another `jit` this changes nothing. It is
        # traced every time, so that what the model closes over may change.
        total, memory = run_compiled(
            functools.partial(total_loss_and_memory, self.loss),
            energy,
            jax.random.key(0) if rng_key is None else rng_key,
        )
        for name, new in memory.items():
            energy.params[name].update(new)  # in place, as NumPyro's mutable sites take a new value
        numpyro.factor(LOSS_SITE, -learning_rate * total)
        return value

    def rate(self, *args: Any, **kwargs: Any) -> Any:
        """β for these arguments of the model: the number given, or the calibrated one."""
        if self._find_rate is None:
            return self.learning_rate
        args, kwargs, _ = read_arguments(self.model, args, kwargs)
        return self._find_rate(args, kwargs, lambda: np.asarray(self.energy(*args, **kwargs).data))

    def energy(self, *args: Any, **kwargs: Any) -> Any:  # an Energy, or Energies
        """The energy at parameters drawn from the prior: for what does not depend on them, such as the data."""
        return self.energy_and_sites(*args, **kwargs)[0]

    def energy_and_sites(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Site]]:
        """The same, and the sites of the parameters there."""
        with handlers.block(), handlers.trace() as sites, handlers.seed(rng_seed=0):
            energy = _run_parameters(self.model, self.data, args, kwargs)[1]
        return energy, sites


def prior_model(
    model: Model,
    data: str | None = None,
    *,
    loss: Loss | None = None,
    inspect_energy: Callable[[Any], None] | None = None,
) -> Model:
    """The priors, params and penalties of `model` alone: its generalised posterior with β = 0.

    With a loss its own sites are there, too. `inspect_energy` is called with the energy of every run.
    """
    return _PriorModel(model, data, loss, inspect_energy)


class _PriorModel:
    """What :func:`prior_model` returns: a callable class, as a function made in a function cannot be pickled."""

    def __init__(
        self, model: Model, data: str | None, loss: Loss | None, inspect_energy: Callable[[Any], None] | None
    ) -> None:
        self._model, self._data, self._loss, self._inspect_energy = model, data, loss, inspect_energy
        functools.update_wrapper(self, model, updated=())

    def __repr__(self) -> str:
        return f"prior_model({name_of(self._model)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value, energy = _run_parameters(self._model, self._data, args, kwargs)
        if self._inspect_energy is not None:
            self._inspect_energy(energy)
        if self._loss is not None:
            declare_sites(self._loss, energy)
        return value


def point_guide(model: Model, data: str | None = None) -> AutoDelta:
    """A point for each latent site of `model`, which starts at the prior's median, where the penalties are finite."""
    return AutoDelta(_WithoutPriors(prior_model(model, data)))


class _WithoutPriors(Messenger):
    """Leaves out the densities of latent sites where that cannot change the start.

    When a guide first runs, NumPyro evaluates the density of its model and the gradient, one operation at a time, each
    of which is compiled, and draws anew until they are finite. It starts at medians of 15 draws: for these priors each
    median is one of the draws, where the density is finite.
    """

    def process_message(self, msg: Site) -> None:
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
    model: Model, data: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], places: Places | None = None
) -> tuple[Any, AnyEnergy]:
    """Runs the model with all its sites but the observed ones seen outside, and binds an energy to their values."""
    args, kwargs, labels = read_arguments(model, args, kwargs)
    parameters = Parameters()
    try:
        with parameters:
            value = model(*args, **kwargs)
    except NotImplementedError as error:
        if str(error):
            raise
        raise NotImplementedError(
            "A site of the model has a law that cannot be drawn from, such as an ImproperUniform that is not observed: "
            "pass the data, e.g. Predictive(...)(key, x), which draws parameters and deterministic sites; for draws of "
            "the data use numpyro_score.sample(fit, key, 1000), with covariates sample(..., given={'z': z})."
        ) from error
    energy = bind(
        model, parameters.values(), parameters.subsamples(), numpyro.prng_key(), data, args, kwargs, places, labels
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
            f"autoguide of SVI on numpyro_score.prior_model(model, loss={name}(...))."
        )
    return message["value"]
