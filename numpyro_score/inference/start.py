"""Where a point fit starts, found in two compiled programs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import transform_fn

from numpyro_score.energy import AnyEnergy, bind, join_arrays, split_arrays
from numpyro_score.generalized import point_guide, prior_model
from numpyro_score.inference.arguments import InitParams
from numpyro_score.inference.traces import Sites, jit_once
from numpyro_score.losses import Loss

__all__ = ["CompiledStart"]


class CompiledStart:
    """`SVI.init` for the point guide of a model.

    NumPyro runs its model and guide one operation at a time, and JAX compiles each: some seventy programs for a small
    model, which take longer than the fit. Here setting up the guide is one program, and the rest another. Neither
    evaluates the density of the data.

    Args:
        model, data, loss: as those of :class:`~numpyro_score.ScoreMatching`.
        guide: its point guide.
        optim: its optimiser.
    """

    def __init__(self, model: Callable[..., Any], data: str | None, loss: Loss, guide: AutoDelta, optim: Any) -> None:
        self.model, self.data, self.loss, self.guide, self.optim = model, data, loss, guide, optim
        self._init = jit_once(self._run_init, static_argnames=("static",))
        self._last: Any = None  # shapes that the guide's are known to fit

    def __call__(
        self, rng_key: Array, init_params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], AnyEnergy] | None:
        """The `SVIState`, the transforms to constrained space by param site, and the energy there.

        None if no start is found at which penalties and priors are finite; NumPyro then says why.
        """
        arrays, static = split_arrays((args, kwargs), self.model)
        now = [(v.shape, v.dtype) for v in arrays], static[:2]
        if self.guide.prototype_trace is None:
            if not self._set_up(rng_key, arrays, static):
                return None
        elif now != self._last:
            self._refuse_other_shapes(rng_key, arrays, static)
        self._last = now
        state, transforms, held = self._init(rng_key, arrays, self.guide._init_locs, init_params, static=static)
        params, plates, run_key = held
        return state, transforms, bind(self.model, params, plates, run_key, self.data, args, kwargs)

    def _set_up(self, rng_key: Array, arrays: list[Any], static: Any) -> bool:
        """Runs the guide a first time, as `SVI.init` would, and gives it what it has found.

        False if it has found no start: of traced values NumPyro does not say so.
        """
        twin = point_guide(self.model, self.data)

        def run(rng_key: Array, arrays: list[Any]) -> tuple[Array, Any, Sites]:
            args, kwargs = join_arrays(arrays, static)
            handlers.seed(twin, jax.random.split(rng_key, 3)[2])(*args, **kwargs)
            return _is_finite(twin), twin._init_locs, Sites.of(twin.prototype_trace)

        valid, locs, sites = jit_once(run)(rng_key, arrays)
        if not valid:
            return False
        self.guide.__dict__.update(twin.__dict__, prototype_trace=sites.trace(), _init_locs=locs)
        # These hold traced values, and nothing asks for them after the first run.
        self.guide.__dict__.update(dict.fromkeys(("_potential_fn_gen", "_potential_fn", "_postprocess_fn")))
        return True

    def _refuse_other_shapes(self, rng_key: Array, arrays: list[Any], static: Any) -> None:
        """A guide keeps the shapes of its first run; JAX would clip indices into them, and say nothing."""
        twin = point_guide(self.model, self.data)

        def run(rng_key: Array, arrays: list[Any]) -> Any:
            args, kwargs = join_arrays(arrays, static)
            handlers.seed(twin, rng_key)(*args, **kwargs)
            return twin._init_locs

        for name, loc in jax.eval_shape(run, rng_key, arrays).items():
            first = jnp.shape(self.guide._init_locs[name]) if name in self.guide._init_locs else None
            if loc.shape != first:
                seen = f"had shape {first}" if first is not None else "was not there"
                raise ValueError(
                    f"Site '{name}' has shape {loc.shape} and {seen} in the first run of this ScoreMatching, whose "
                    "guide keeps that: write a new ScoreMatching for these data."
                )

    def _run_init(
        self, rng_key: Array, arrays: list[Any], locs: Any, init_params: Any, *, static: Any
    ) -> tuple[Any, Any, Any]:
        args, kwargs = join_arrays(arrays, static)
        guide, held = copy.copy(self.guide), []
        guide._init_locs = locs
        prior = prior_model(self.model, self.data, loss=self.loss, inspect_energy=lambda e: held.append(e.held))
        svi = SVI(prior, guide, self.optim, Trace_ELBO())
        with InitParams(init_params):
            state = svi.init(rng_key, *args, init_params=init_params, **kwargs)
        return state, svi.constrain_fn.args[0], held[0]


def _is_finite(guide: AutoDelta) -> Array:
    """Whether the density and its gradient are finite where a point guide starts, as NumPyro asks."""
    asked = [s["fn"] for s in guide.prototype_trace.values() if s["type"] == "sample"]
    if all(isinstance(fn, dist.MaskedDistribution) and fn._mask is False for fn in asked):
        return jnp.array(True)  # see `point_guide`: nothing is evaluated
    sites = {k: guide.prototype_trace[k] for k in guide._init_locs}
    # Of a subsampled plate NumPyro repeats those of the subsample.
    locs = {k: v[tuple(map(slice, jnp.shape(sites[k]["value"])))] for k, v in guide._init_locs.items()}
    free = transform_fn({k: biject_to(s["fn"].support) for k, s in sites.items()}, locs, invert=True)
    with handlers.seed(rng_seed=jax.random.key(0)):  # for subsampled plates
        found = jax.value_and_grad(guide._potential_fn)(free)
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found)]))
