"""Fitting by score matching: NumPyro's SVI over a generalised model."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import transform_fn
from numpyro.optim import Minimize

from numpyro_score.energy import AnyEnergy, evaluate_for_check, join_arrays, layouts_kept, read_arguments, split_arrays
from numpyro_score.generalized import GeneralizedModel, point_guide, prior_model
from numpyro_score.inference.arguments import (
    InitParams,
    as_floats,
    check_guide,
    check_inside,
    check_keywords,
    check_memory,
    refuse_misplaced,
    refuse_unknown,
)
from numpyro_score.inference.arrival import warn_at_end, warn_of_density
from numpyro_score.inference.batches import FromBatches
from numpyro_score.inference.calibration import CalibratedRate, calibrated_fit, rate_of_fit
from numpyro_score.inference.checkpoint import Checkpoint
from numpyro_score.inference.cost import evaluations_per_row, with_cost
from numpyro_score.inference.failure import explain
from numpyro_score.inference.loop import (
    Course,
    NonFiniteLossError,
    check_num_steps,
    run_steps,
    strongly_typed,
    take_steps,
)
from numpyro_score.inference.optim import (
    NOTHING_TO_AVERAGE,
    as_optimizer,
    check_state,
    current_params,
    default_optimizer,
)
from numpyro_score.inference.pickling import Compiling, refuse_not_pickled
from numpyro_score.inference.processes import require_common
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.solving import solve
from numpyro_score.inference.start import CompiledStart
from numpyro_score.inference.traces import CompiledTrace
from numpyro_score.losses import DefaultLoss, Loss
from numpyro_score.losses.base import check_settings, filled
from numpyro_score.losses.memory import spread_memory
from numpyro_score.placement import Places, Spread, label_auto, places_of, replicate
from numpyro_score.printed import name_of, settings
from numpyro_score.programs import being_traced, shared_jit
from numpyro_score.random import RUN, Key, as_key

__all__ = ["ScoreMatching"]


class ScoreMatching(Compiling, FromBatches, SVI):
    """Fits an unnormalised model by score matching.

    This is :class:`numpyro.infer.SVI` over `generalized_bayes(model, loss)`: `init`, `update`, `evaluate` and
    `get_params` are SVI's, and the reported loss is the sum over rows of the score-matching loss times β, minus the
    log prior (plus, for a guide that is no point, its usual ELBO terms).

    Args:
        model: a NumPyro model with an unnormalised density; see :class:`~numpyro_score.Energy` for the forms.
        guide: a NumPyro guide, or an autoguide class, which is then built on the generalised model
            (`guide=AutoNormal`). Default: a point estimate (`AutoDelta`).
        optim: anything that SVI takes; Optax optimisers with a line search, such as `optax.lbfgs()`, too. Default:
            where the objective is quadratic in the parameters, the solution of its linear equations; else Adam with a
            rate that falls to zero over the run.
        loss: a pointwise objective. Default: ISM up to 64 dimensions, SSM above.
        num_steps: steps of `run`.
        learning_rate: β of :func:`~numpyro_score.generalized_bayes`. It is not the optimiser's step size. "calibrated"
            fits at the β of :func:`~numpyro_score.uncertainty.calibrated_learning_rate`, which the result reports as
            its `learning_rate`: as a rule in two runs of `num_steps`, the second at the rate that the first led to.
        data: the name of the site or argument that is the data, where several could be.
        average: d of an exponential moving average of the parameters θ_i after each of n steps, in unconstrained
            space, Σ_i d^(n−i) θ_i / Σ_i d^(n−i) [Kingma & Ba 2015, section 7.2], with an optimiser of Optax's. The
            estimates, `get_params` and `evaluate` are then those of the average; losses and mutable sites stay those
            of the steps. 0.999 remembers about the last 1,000 steps.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import ScoreMatching
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x**2)
        >>> x = 2.0 * jax.random.normal(jax.random.key(0), (500,))
        >>> fit = ScoreMatching(model, optim=optax.lbfgs(), num_steps=20).run(jax.random.key(1), x, progress_bar=False)
        >>> bool(jnp.isclose(fit.estimates["tau"], 1 / jnp.mean(x**2), rtol=1e-4))  # the maximum likelihood estimate
        True
    """

    optim: Any
    run_batches = FromBatches.run_batches  # so that it is documented here
    _compiled = ("_evaluate", "_advance", "_step_batch", "_start", "trace_prior")
    _optimizers = ("optim",)

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any = None,
        optim: Any = None,
        loss: Loss | None = None,
        *,
        num_steps: int = 2000,
        learning_rate: Any = 1.0,
        data: str | None = None,
        average: float | None = None,
    ) -> None:
        num_steps = check_num_steps(num_steps)
        refuse_misplaced(guide, optim)
        self.score_model, self.score_loss = model, DefaultLoss() if loss is None else loss
        self.num_steps, self.learning_rate, self.data, self.average = num_steps, learning_rate, data, average
        self.prior = prior_model(model, data, loss=self.score_loss)
        find_rate = None
        if isinstance(learning_rate, str):
            find_rate = CalibratedRate(partial(calibrated_rate, model, self.score_loss, data))
        generalized = GeneralizedModel(model, self.score_loss, learning_rate, data, find_rate=find_rate)
        self._guide_class = guide if inspect.isclass(guide) and issubclass(guide, AutoGuide) else None
        self._default_optim, self._default_guide = optim is None, guide is None
        if guide is None:
            guide = point_guide(model, data)
        else:
            guide = check_guide(guide, model, self.score_loss)
        if self._guide_class is not None:
            guide = self._guide_class(self.prior if hasattr(self.score_loss, "no_posterior") else generalized)  # type: ignore[call-arg]
        optim = as_optimizer(optim, num_steps, average, getattr(loss, "no_objective", None))
        super().__init__(generalized, guide, optim, Trace_ELBO())
        self._compile()

    def __repr__(self) -> str:
        options = [name_of(self.score_model), f"loss={settings(self.score_loss)}"]
        if not self._default_guide:
            options.append(f"guide={name_of(self.guide)}")
        if self.learning_rate != 1.0:
            options.append(f"learning_rate={self.learning_rate}")
        if self.average is not None:
            options.append(f"average={self.average}")
        return f"ScoreMatching({', '.join(options)}, num_steps={self.num_steps})"

    def _compile(self) -> None:  # of this object, which traces its model once for arguments of the same shapes
        self._evaluate = shared_jit(evaluate_for_check)
        self._advance = shared_jit(self._advance_impl, static_argnames=("static", "places", "stable_update"))
        self._step_batch = shared_jit(self._step_impl, static_argnames=("static", "places"))
        self.trace_prior = CompiledTrace(self.prior)
        self._start = None
        if self._default_guide:
            self._start = CompiledStart(self.score_model, self.data, self.score_loss, self.guide, self.optim)

    def __copy__(self) -> ScoreMatching:
        new = object.__new__(type(self))  # shares the compiled functions, unlike a copy by way of the pickled state
        new.__dict__.update(self.__dict__)
        return new

    def at_learning_rate(self, learning_rate: float) -> ScoreMatching:
        """The same with another β. It shares the compiled steps, unless its guide holds the density."""
        if self._guide_class is not None:
            return self._with(self._guide_class, learning_rate)
        new = copy.copy(self)
        new.learning_rate = learning_rate
        new.model = GeneralizedModel(self.score_model, self.score_loss, learning_rate, self.data)
        return new

    def point(self) -> ScoreMatching:
        """The same with a point estimate for a guide."""
        return self._with(None, self.learning_rate)

    def _with(self, guide: Any, learning_rate: Any) -> ScoreMatching:
        optim = None if self._default_optim else self.optim
        options = dict(num_steps=self.num_steps, learning_rate=learning_rate, data=self.data, average=self.average)
        return ScoreMatching(self.score_model, guide, optim, self.score_loss, **options)

    @layouts_kept()
    def init(self, rng_key: Key, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The initial `SVIState`, as SVI's; checks the data and the density at the initial parameters.

        Raises:
            ValueError, TypeError, NotImplementedError: for data or a model that score matching cannot take; the
                message names the site and the remedy.
        """
        check_keywords(self.init, self.score_model, kwargs)
        args, kwargs, labels = read_arguments(self.score_model, args, kwargs)
        check = partial(self._check, labels)
        rng_key, found, init_params = as_key(rng_key), None, as_floats(init_params)
        args, kwargs, init_params = label_auto((args, kwargs, init_params))
        refuse_not_pickled(self.optim)
        if self._start is not None and not being_traced((rng_key, args, kwargs, init_params)):
            found = self._start(rng_key, init_params, args, kwargs)
        if found is not None:
            state, transforms, energy = found
            refuse_unknown(init_params, transforms)
            check_inside(init_params, {k: t.codomain for k, t in transforms.items()})
            self.constrain_fn = partial(transform_fn, transforms)
            check(energy)
        else:
            # The loss does not change which parameters there are, and evaluating it here would compile it once more.
            structure = SVI(
                prior_model(self.score_model, self.data, loss=self.score_loss, inspect_energy=check),
                self.guide,
                self.optim,
                self.loss,
            )
            with InitParams(init_params):
                state = structure.init(rng_key, *args, init_params=init_params, **kwargs)
            self.constrain_fn = structure.constrain_fn
        self._mutable = sorted(state.mutable_state or {})
        refuse_unknown(init_params, self.get_params(state))
        return state

    @layouts_kept()
    @with_cost
    def run(
        self,
        rng_key: Key | None = None,
        *args: Any,
        num_steps: int | None = None,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: Any = None,
        init_params: dict[str, Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 30.0,
        **kwargs: Any,
    ) -> ScoreMatchingResult:
        """Fits the model; as in `MCMC.run`, the model's arguments follow the key.

        A second run on arguments of the same shapes compiles nothing. Ctrl-C returns what was fitted so far, with a
        warning.

        With neither guide nor optimiser given, an objective that is quadratic in the constrained parameters, such as
        that of an energy affine in them under ISM, is solved at once, whatever `num_steps` and the starting point: the
        result has one loss, that at the minimum. The random numbers of a stochastic loss are held at one draw. Where
        the minimum violates a constraint the one within is found, at its end, with a warning. Adam takes over, with a
        warning, if the minimum is not unique.

        Args:
            rng_key: a key for the starting point and the loss's random numbers; `jax.random.key(0)` if not given.
            *args: the model's arguments: arrays, or tables of pandas, polars and xarray.
            num_steps: steps of this run, instead of the object's `num_steps`.
            progress_bar: whether to show one.
            stable_update: skip steps whose loss or parameters are not finite, instead of stopping; their losses are
                NaN in the result.
            init_state: go on from this `SVIState`, e.g. `fit.state`. The default optimiser starts its rate anew.
            init_params: initial values of param sites, of the model or the guide.
            checkpoint: a directory to save the run in, which needs Orbax. The same call again goes on from the last
                save, to the same numbers as without a stop, bit for bit on the same devices; after the end it gives
                the fit. Other settings, key or data than those saved are refused, and nothing is overwritten. A
                closed form is worked out anew.
            checkpoint_every: seconds between two saves, at least: they take less than a hundredth of the run.
            **kwargs: the model's keyword arguments.

        Returns:
            The fit.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; the exception holds the last finite state.
            SandwichError: if the learning rate is to be calibrated and cannot be.
            OSError: if the checkpoint cannot be read or written.

        Warns:
            UserWarning: if the loss was still falling at the end, or the minimum violates a constraint.
        """
        num_steps = check_num_steps(self.num_steps if num_steps is None else num_steps)
        if isinstance(self.learning_rate, str):
            numbers = itertools.count(1)
            options: dict[str, Any] = dict(num_steps=num_steps, progress_bar=progress_bar, stable_update=stable_update)

            def run(svi: ScoreMatching, **start: Any) -> ScoreMatchingResult:
                directory = None if checkpoint is None else os.path.join(checkpoint, f"fit-{next(numbers)}")
                kept: dict[str, Any] = dict(checkpoint=directory, checkpoint_every=checkpoint_every)
                return svi.run(rng_key, *args, **options, **kept, **start, **kwargs)

            return calibrated_fit(self, run, init_state=init_state, init_params=init_params)
        rng_key = as_key(0 if rng_key is None else rng_key, RUN)
        check_keywords(self.run, self.score_model, kwargs)
        given = args, kwargs
        args, kwargs, labels = read_arguments(self.score_model, *given)
        args, kwargs = label_auto((args, kwargs))
        result = partial(ScoreMatchingResult, svi=self, args=args, kwargs=kwargs, labels=labels)
        arrays, static = split_arrays((args, kwargs), self.score_model, self.score_loss)
        alike = dict(key=rng_key, num_steps=num_steps, arguments=static[1], loss=self.score_loss)
        require_common("run", arrays, **alike, init_params=init_params)
        if init_state is None or self.constrain_fn is None:
            state = self.init(rng_key, *given[0], init_params=init_params, **given[1])
        state = init_state if init_state is not None else state
        check_memory(state, self.score_loss, self._mutable)
        check_state("run", self, state.optim_state)
        start = int(state.optim_state[0])
        state = self._laid_out(strongly_typed(state), (args, kwargs))
        if self._default_optim and self._default_guide:
            solved = solve(self, result(self.get_params(state), state, np.zeros(0)))
            if solved is not None:
                if self.average is not None:
                    raise ValueError(NOTHING_TO_AVERAGE)
                return result(self.get_params(solved[0]), solved[0], np.array([solved[1]]))
        course = Course(self.constrain_fn.args[0], start, num_steps, self.learning_rate)
        rest = dict(static=static, places=places_of(arrays), stable_update=stable_update)
        advance = partial(self._advance, course, arrays, **rest)

        def non_finite(failing: Any, last: Any, step: int, losses: np.ndarray) -> NonFiniteLossError:
            params = self.constrain_fn(current_params(self.optim, failing.optim_state))
            cause = explain(result(params, failing, np.zeros(0)))
            return NonFiniteLossError(
                f"The loss is {losses[-1]} at step {step}: {cause}. The last finite state is in the exception's "
                "`state`; a smaller step size, other init_params or stable_update=True may help.",
                step, last, self.get_params(last), losses[:-1],
            )  # fmt: skip

        own = dict(loss=self.score_loss, learning_rate=self.learning_rate, average=self.average, begin=(self, state))
        options = dict(num_steps=num_steps, start=start, stable_update=stable_update, rng_key=rng_key)
        kept = Checkpoint.of(checkpoint, checkpoint_every, "ScoreMatching", (args, kwargs), 0.0, **own, **options)
        state, losses, interrupted = run_steps(advance, state, num_steps, progress_bar, non_finite, kept)
        if not interrupted:
            warn_at_end(self, state, losses, self._shape[1])
        fit = result(self.get_params(state), state, losses, interrupted=interrupted)
        if self._approximates:
            warn_of_density(self.score_loss, fit)
        return fit

    def evaluate(self, svi_state: Any, *args: Any, **kwargs: Any) -> Array:
        """The loss at a state, as SVI's; mutable sites have their values in the state, which SVI would leave out."""
        mutable = jax.tree.map(jnp.asarray, svi_state.mutable_state or {})  # a copy, which the model may change
        params = {**self.get_params(svi_state), **mutable}
        return self.loss.loss(jax.random.split(svi_state.rng_key)[1], params, self.model, self.guide, *args, **kwargs)

    def _evaluations(self, fit: ScoreMatchingResult) -> float | None:
        """Evaluations of the density in one step, for each row.

        None for a closed form, and where it is not known: searches along a line, and several fits to calibrate β.
        """
        searches = isinstance(self.optim, Minimize) or getattr(self.optim, "searches", False)
        if searches or isinstance(self.learning_rate, str) or int(fit.state.optim_state[0]) == 0:
            return None
        return evaluations_per_row(self.score_loss, fit.energy, self._shape[1])

    def _check(self, labels: Any, energy: AnyEnergy) -> None:
        energy = energy.labelled(labels)
        self._shape, self._num_plates = (energy.dim, energy.num_rows), len(energy.parts)  # of a step's data
        latents = [latent for part in energy.parts for latent in part.latents]
        self._approximates = hasattr(self.score_loss, "effective_draws") or any(v.integrated for v in latents)
        if energy.is_concrete:
            filled(self.score_loss, energy).check(self._evaluate)
            check_settings(self.score_loss, energy)

    def _laid_out(self, state: Any, arguments: Any) -> Any:
        """The state on the devices of the data, as the steps return it."""
        state = replicate(state, arguments)
        memory = spread_memory(self.score_loss, Spread.first_of(arguments), state.mutable_state)
        return state._replace(mutable_state=memory)

    def _advance_impl(
        self, course: Course, arrays: Any, state: Any, n: Any, *, static: Any, places: Places, stable_update: bool
    ) -> tuple[Any, Array, Array]:
        """Takes n steps, fewer if a loss is not finite: the state, the losses (in a buffer) and the steps taken."""
        svi = self._stepping(course, places)
        args, kwargs = join_arrays(arrays, static)
        step = svi.stable_update if stable_update else svi.update
        return take_steps(lambda s: step(s, *args, **kwargs), state, n, keep_going=stable_update)

    def _stepping(self, course: Course, places: Places) -> ScoreMatching:
        """The same inside of compiled steps, whose arguments lie at `places`."""
        svi = copy.copy(self)
        svi.constrain_fn = partial(transform_fn, course.transforms)
        svi.model = GeneralizedModel(self.score_model, self.score_loss, course.learning_rate, self.data, places=places)
        if self._default_optim:
            svi.optim = default_optimizer(course.total, course.start, self.average)
        return svi


calibrated_rate = partial(rate_of_fit, ScoreMatching)
"""From a model, a loss, what its data are, and its arguments, to the β that a point fit leads to."""
