"""Maximum likelihood through a bound on the normaliser: adversarial dynamics embedding."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import optax
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import transform_fn

from numpyro_score.energy import Energy, evaluate_for_check, join_arrays, read_arguments, split_arrays
from numpyro_score.flows.dynamics import Trajectory, as_pytree
from numpyro_score.flows.fit import FlowFunction, LearnedFlow, build_flow, flow_params, flow_step
from numpyro_score.generalized import LOSS_SITE, point_guide, prior_model
from numpyro_score.inference.adversarial_result import AdversarialResult, AdversarialState, AdversarialTerms
from numpyro_score.inference.arguments import (
    InitParams,
    as_floats,
    check_keywords,
    check_optimizer,
    is_loss,
    refuse_unknown,
)
from numpyro_score.inference.checkpoint import Checkpoint
from numpyro_score.inference.cost import with_cost
from numpyro_score.inference.failure import explain_terms
from numpyro_score.inference.loop import (
    NonFiniteLossError,
    check_num_steps,
    run_steps,
    strongly_typed,
    take_steps,
)
from numpyro_score.inference.optim import decaying_adam, default_optimizer, optax_optimizer
from numpyro_score.inference.pickling import Compiling
from numpyro_score.losses.terms import require_flat
from numpyro_score.placement import label_auto, replicate
from numpyro_score.printed import name_of, settings
from numpyro_score.programs import shared_jit
from numpyro_score.random import RUN, Key, as_key

__all__ = ["AdversarialDynamicsEmbedding"]


class AdversarialDynamicsEmbedding(Compiling):
    r"""Maximum likelihood of an unnormalised model against a flow along its own score [Dai et al. 2019].

    The mean log likelihood :math:`\mathrm{E}_{\mathrm{data}} f_\theta - \log Z(\theta)` is at most

    .. math:: \max_\theta \min_\varphi \; \mathrm{E}_{\mathrm{data}} f_\theta(x)
              - \mathrm{E}_{q_\varphi}[\log w], \qquad \mathrm{E}_q[\log w] \le \log Z(\theta),

    where the bound is that of a :class:`~numpyro_score.HamiltonianFlow` or :class:`~numpyro_score.LangevinFlow` with
    settings φ, :math:`\mathrm{E}[f_\theta(x_T) + \log N(v_T)] + H(q)` for the plain Hamiltonian flow. A step raises the
    bound in φ, then takes a step in θ along

    .. math:: \mathrm{E}_{\mathrm{data}} \nabla_\theta f_\theta(x)
              - \frac{\mathrm{E}_q[w \nabla_\theta f_\theta(x_T)]}{\mathrm{E}_q[w]},

    the draws x_T held fixed: the gradient of the likelihood, by importance weights. One simulation serves both.
    This is a likelihood method: it sees the weights of modes that score matching does not, and its bias is that of the
    flow. Compare `log_partition_bound` with an importance-weighted estimate, `fit.flow.log_partition_bound(rng_key)`.

    The sum over rows takes the weights of plates and `handlers.scale`; priors and factors without data are added as in
    :func:`~numpyro_score.generalized_bayes`. Latent sites get point estimates.

    Args:
        model: a NumPyro model with an unnormalised density of real data; see :class:`~numpyro_score.Energy`.
        flow: a function from a log density to a flow, with a `numpyro.param` for all that is learned. Default:
            :class:`~numpyro_score.LearnedFlow`, annealed, of five steps, which starts at the data's mean and spread.
        optim: an optimiser of θ, as SVI's; by default Adam with a rate that falls to zero over the run.
        flow_optim: an Optax optimiser of φ; by default the same.
        flow_steps: steps in φ for each step in θ.
        num_samples: draws of the flow in each step.
        importance_weighted: weigh the draws in θ's step by w, which are then those of the model as `num_samples` grows,
            whatever the flow: the gradient of a tighter bound, E log of the mean of w [Burda, Grosse & Salakhutdinov
            2016]. Noisy where few weights carry the sum. With False all weights are equal, as in the objective above;
            networks then run away, as draws that a flow leaves where the density is low are pushed further down
            without end.
        num_steps: steps of `run`.
        data: the name of the site or argument that is the data, where several could be.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import AdversarialDynamicsEmbedding
        >>> def model(x):
        ...     tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (1,)), obs=x)
        ...         numpyro.factor("energy", -0.5 * tau * x[:, 0] ** 2)
        >>> x = 2.0 * jax.random.normal(jax.random.key(0), (500, 1))
        >>> fit = AdversarialDynamicsEmbedding(model, num_steps=500).run(jax.random.key(1), x, progress_bar=False)
        >>> bool(jnp.isclose(fit.estimates["tau"], 1 / jnp.mean(x**2), rtol=0.05))  # the maximum likelihood estimate
        True
    """

    _compiled = ("_evaluate", "_advance")
    _optimizers = ("flow_optim",)

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowFunction | None = None,
        optim: Any = None,
        flow_optim: optax.GradientTransformation | None = None,
        *,
        flow_steps: int = 1,
        num_samples: int = 256,
        importance_weighted: bool = True,
        num_steps: int = 2000,
        data: str | None = None,
    ) -> None:
        if flow_steps < 1 or num_samples < 1:
            raise ValueError(
                "AdversarialDynamicsEmbedding needs positive flow_steps and num_samples, got "
                f"{flow_steps} and {num_samples}."
            )
        if any(map(is_loss, (flow, optim, flow_optim))):
            raise TypeError(
                "AdversarialDynamicsEmbedding is a likelihood method and takes no loss: leave it out, or write "
                "ScoreMatching(model, loss=...)."
            )
        for name, value in {"optim": optim, "flow_optim": flow_optim}.items():
            if value is not None:
                check_optimizer(name, value)
        if flow is not None and not callable(flow):
            raise TypeError(
                f"flow must be a function from a log density to a flow, got {type(flow).__name__}: write e.g. "
                "flow=LearnedFlow(2), or optim=... for an optimiser."
            )
        self.model, self.flow, self.data = model, flow, data
        self.flow_steps, self.num_samples, self.num_steps = flow_steps, num_samples, check_num_steps(num_steps)
        self.importance_weighted = importance_weighted
        self._default_optim, self.flow_optim = optim is None, flow_optim
        if optim is None:
            optim = default_optimizer(num_steps)
        elif isinstance(optim, optax.GradientTransformation):
            optim = optax_optimizer(optim)
        prior = prior_model(model, data, inspect_energy=self._check)
        # Only to find the parameters, their constraints and the optimiser's interface.
        self._svi = _PickledSVI(prior, point_guide(model, data), optim, Trace_ELBO())
        self._compile()

    def __repr__(self) -> str:
        flow = "" if self.flow is None else f", flow={settings(self.flow)}"
        return f"AdversarialDynamicsEmbedding({name_of(self.model)}{flow}, num_steps={self.num_steps})"

    def _compile(self) -> None:
        self._evaluate = shared_jit(evaluate_for_check)
        self._advance = shared_jit(self._advance_impl, static_argnames=("static",))

    def init(
        self, rng_key: Key, *args: Any, init_params: dict[str, Any] | None = None, **kwargs: Any
    ) -> AdversarialState:
        """The initial state; checks the data and the density at the initial parameters.

        Raises:
            ValueError, TypeError, NotImplementedError: for data, a model or a flow that this method cannot take.
        """
        run_key, svi_key, flow_key = jax.random.split(as_key(rng_key), 3)
        check_keywords(self.init, self.model, kwargs)
        init_params = as_floats(init_params)
        with InitParams(init_params):
            optim_state = self._svi.init(svi_key, *args, init_params=init_params, **kwargs).optim_state
        known = self._constrained(optim_state)
        refuse_unknown(init_params, known)
        energy = self._energy(known, flow_key, args, kwargs)
        flow = self.flow or _flow_at_data(energy)
        params = flow_params(flow, as_pytree(energy.log_density), flow_key)
        dim = build_flow(flow, params, energy.log_density).event_shape[-1]
        if dim != energy.dim:
            raise ValueError(
                f"The flow's base has {dim} dimensions, but a row of the data has {energy.dim}: give it a base with "
                f"event_shape ({energy.dim},)."
            )
        return AdversarialState(optim_state, params, self._flow_optim(1, 0).init(params), run_key)

    def get_params(self, state: AdversarialState) -> dict[str, Any]:
        """Constrained values of the param sites of model and guide, as SVI's."""
        return self._constrained(state.optim_state)

    def update(self, state: AdversarialState, *args: Any, **kwargs: Any) -> tuple[AdversarialState, AdversarialTerms]:
        """`flow_steps` steps of the flow and one of the model; the terms are those of the last simulation."""
        return self._update(state, self._flow_optim(self.num_steps, 0), args, kwargs)

    @with_cost
    def run(
        self,
        rng_key: Key | None = None,
        *args: Any,
        num_steps: int | None = None,
        progress_bar: bool = True,
        init_state: AdversarialState | None = None,
        init_params: dict[str, Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 30.0,
        **kwargs: Any,
    ) -> AdversarialResult:
        """Fits model and flow; as in `MCMC.run`, the model's arguments follow the key.

        A second run on arguments of the same shapes compiles nothing. Ctrl-C returns what was fitted so far, with a
        warning.

        Args:
            rng_key: a key for the starting point and the draws; `jax.random.key(0)` if not given.
            *args: the model's arguments.
            num_steps: steps of this run, instead of the object's `num_steps`.
            progress_bar: whether to show one.
            init_state: go on from this state, e.g. `fit.state`. The default optimisers start their rates anew.
            init_params: initial values of param sites.
            checkpoint: a directory to save the run in and to go on from, as that of `ScoreMatching.run`.
            checkpoint_every: seconds between two saves, at least.
            **kwargs: the model's keyword arguments.

        Raises:
            NonFiniteLossError: a term became NaN or infinite; the exception holds the last finite state.
        """
        num_steps = check_num_steps(self.num_steps if num_steps is None else num_steps)
        rng_key = as_key(0 if rng_key is None else rng_key, RUN)
        check_keywords(self.run, self.model, kwargs)
        args, kwargs, labels = read_arguments(self.model, args, kwargs)
        args, kwargs = label_auto((args, kwargs))
        if (state := init_state) is None or self._svi.constrain_fn is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        state = replicate(strongly_typed(state if init_state is None else init_state), (args, kwargs))
        arrays, static = split_arrays((args, kwargs), self.model)
        transforms = self._svi.constrain_fn.args[0]
        start = int(state.optim_state[0])
        advance = partial(self._advance, transforms, arrays, start, num_steps, static=static)

        def error(_: Any, last: AdversarialState, step: int, terms: AdversarialTerms) -> NonFiniteLossError:
            return NonFiniteLossError(
                f"The loss is {terms.loss[-1]} at step {step}: {explain_terms(terms)}. The last finite state is in the "
                "exception's `state`; smaller rates or other init_params may help.",
                step, last, self.get_params(last), terms.loss[:-1],
            )  # fmt: skip

        own: Any = dict(num_samples=self.num_samples, flow_steps=self.flow_steps, weighted=self.importance_weighted)
        options: Any = dict(begin=(self._svi, state), num_steps=num_steps, start=start, rng_key=rng_key)
        like = AdversarialTerms(*jnp.zeros(4))
        kept = Checkpoint.of(checkpoint, checkpoint_every, type(self).__name__, (args, kwargs), like, **own, **options)
        state, terms, interrupted = run_steps(advance, state, num_steps, progress_bar, error, kept)
        params = self.get_params(state)
        sample = self._energy(params, state.rng_key, args, kwargs)
        energy = Energy.bound_to(self.model, sample.params, {}, None, self.data, args, kwargs, labels=labels)
        flow = build_flow(self._flow_of(energy), state.flow_params, energy.log_density)
        return AdversarialResult(
            params,
            state,
            terms.loss,
            terms.data_term,
            terms.log_partition_bound,
            terms.joint_entropy,
            energy,
            flow,
            interrupted,
        )

    def _evaluations(self, fit: AdversarialResult) -> float:
        """In one step, for each row: one at the row, and of each draw T + 1 along its flow and one in θ's step."""
        draws = self.num_samples * (self.flow_steps * (fit.flow.num_steps + 1) + 1)
        return 1 + draws / fit.energy.num_rows

    # -- one step -------------------------------------------------------------------------------------------------

    def _advance_impl(
        self, transforms: Any, arrays: Any, start: Any, total: Any, state: AdversarialState, n: Any, *, static: Any
    ) -> tuple[AdversarialState, AdversarialTerms, Array]:
        args, kwargs = join_arrays(arrays, static)
        optim = default_optimizer(total, start) if self._default_optim else None
        flow_optim = self._flow_optim(total, start)

        def step(state: AdversarialState) -> tuple[AdversarialState, AdversarialTerms]:
            return self._update(state, flow_optim, args, kwargs, optim, partial(transform_fn, transforms))

        return take_steps(step, state, n, like=AdversarialTerms(*jnp.zeros(4)))

    def _update(
        self,
        state: AdversarialState,
        flow_optim: optax.GradientTransformation,
        args: Any,
        kwargs: Any,
        optim: Any = None,
        constrain: Callable[[Any], Any] | None = None,
    ) -> tuple[AdversarialState, AdversarialTerms]:
        optim = self._svi.optim if optim is None else optim
        constrain = self._svi.constrain_fn if constrain is None else constrain
        rng_key, energy_key, model_key, *flow_keys = jax.random.split(state.rng_key, 3 + self.flow_steps)
        energy = self._energy(constrain(optim.get_params(state.optim_state)), energy_key, args, kwargs)
        flow, log_density = self._flow_of(energy), as_pytree(energy.log_density)

        def ascend(params: Any, optimizer: Any, key: Array) -> tuple[Any, Any, Trajectory]:
            return flow_step(flow, flow_optim, log_density, self.num_samples, params, optimizer, key)

        def follow(carry: Any, key: Array) -> tuple[Any, None]:
            params, optimizer, _ = ascend(carry[0], carry[1], key)
            return (params, optimizer), None

        params, optimizer = state.flow_params, state.flow_optimizer
        if self.flow_steps > 1:
            (params, optimizer), _ = jax.lax.scan(follow, (params, optimizer), jnp.stack(flow_keys[1:]))
        entropy = build_flow(flow, params, log_density)._exact_entropy()
        flow_params, flow_optimizer, draws = ascend(params, optimizer, flow_keys[0])
        draws = jax.lax.stop_gradient(draws)
        bound = jnp.mean(draws.log_weights)
        entropy = -jnp.mean(draws.log_prob) if entropy is None else entropy

        def negative(params: Any) -> tuple[Array, Array]:
            found: list[Array] = []

            def objective(*args: Any, **kwargs: Any) -> None:
                energies: list[Energy] = []
                prior_model(self.model, self.data, inspect_energy=energies.append)(*args, **kwargs)
                data_term, total = _data_term(energies[0])
                # f at the draws is all of the bound that θ's gradient sees.
                log_weights = energies[0].log_density(draws.value[:, 0]) + (draws.log_weights - draws.log_density)
                if self.importance_weighted:
                    log_partition = jax.nn.logsumexp(log_weights) - jnp.log(self.num_samples)
                else:
                    log_partition = jnp.mean(log_weights)
                numpyro.factor(LOSS_SITE, total * (data_term - log_partition))
                found.append(data_term)

            loss = Trace_ELBO().loss(model_key, constrain(params), objective, self._svi.guide, *args, **kwargs)
            return loss, found[0]

        (loss, data_term), optim_state = optim.eval_and_update(negative, state.optim_state)
        new = AdversarialState(optim_state, flow_params, flow_optimizer, rng_key)
        return new, AdversarialTerms(loss, data_term, bound, entropy)

    def _flow_optim(self, total: Any, start: Any) -> optax.GradientTransformation:
        if self.flow_optim is not None:
            return self.flow_optim
        return decaying_adam(self.flow_steps * total, self.flow_steps * start)

    def _flow_of(self, energy: Energy) -> FlowFunction:
        return self.flow or LearnedFlow(energy.dim, annealed=True)

    def _constrained(self, optim_state: Any) -> dict[str, Any]:
        return self._svi.constrain_fn(self._svi.optim.get_params(optim_state))

    def _energy(self, params: dict[str, Any], rng_key: Array, args: Any, kwargs: Any) -> Energy:
        """The energy at values of the param sites, on the rows that subsampled plates draw."""
        found: list[Energy] = []
        guide = self._svi.guide
        latent = any(s["type"] == "sample" and not s["is_observed"] for s in guide.prototype_trace.values())
        values = {**params, **(guide.median(params) if latent else {})}
        model = prior_model(self.model, self.data, inspect_energy=found.append)
        with handlers.block(), handlers.seed(rng_seed=rng_key), handlers.substitute(data=values):
            model(*args, **kwargs)
        return found[0]

    def _check(self, energy: Energy) -> None:
        name = type(self).__name__
        if not energy.has_density:
            raise TypeError(
                f"Site '{energy.score_terms[0]}' is a score_factor, whose density is unknown, but {name} needs "
                "it: use ScoreMatching, or declare an energy with numpyro.factor."
            )
        require_flat(energy, name)
        if not energy.resizable and energy.num_rows > 1:
            raise ValueError(
                f"{name} evaluates the density at draws that are not the data, but the model has {energy.num_rows} "
                "rows and takes no others: pass the data as an argument and let the plate follow its length, e.g. "
                "numpyro.plate('data', len(x)), drop masked rows, and take ScoreMatching for rows with covariates."
            )
        if energy.is_concrete:
            energy.check(self._evaluate)


class _PickledSVI(Compiling, SVI):
    """SVI whose pickles hold the optimiser as far as can be."""

    _optimizers = ("optim",)


def _data_term(energy: Energy) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted mean of f over rows, and the sum of the weights."""
    energy, weights = energy.usable()
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights != 0, weights * energy.log_density(energy.data), 0.0)) / total, total


def _flow_at_data(energy: Energy) -> FlowFunction:
    """The default flow, from a base with the data's mean and spread."""
    energy, weights = energy.usable()
    x, share = energy.data, (weights / weights.sum())[:, None]
    mean = jnp.sum(share * x, 0)
    spread = jnp.sqrt(jnp.sum(share * (x - mean) ** 2, 0))
    return LearnedFlow(energy.dim, annealed=True, loc=mean, scale=jnp.where(spread > 0, spread, 1.0))
