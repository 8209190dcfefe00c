"""Draws of the data by diffusion, from noise to less noise."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.diffusion.chains import advance, require_finite, run_chains, start
from numpyro_score.diffusion.end import end_law
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.methods import Method, method_named
from numpyro_score.diffusion.noise_range import shared_noise_range
from numpyro_score.diffusion.sde import SDE
from numpyro_score.diffusion.source import NoisyModel, as_data, data_rows, noisy_model
from numpyro_score.diffusion.steps import Field
from numpyro_score.energy import plural
from numpyro_score.losses.base import at_least_one, true_or_false
from numpyro_score.normaliser.source import Source
from numpyro_score.placement import check_sharding
from numpyro_score.random import Key, as_key

__all__ = ["Diffused", "diffuse", "field_of"]

_STEPS = 32


class Diffused(NamedTuple):
    """What :func:`diffuse` returns."""

    draws: Any  # (N, event shape); by name where there are several data sites
    num_calls: int  # calls of the model for each draw
    noise: np.ndarray  # (S + 1,), the levels ρ passed, in the units of the data
    trajectory: Float[Array, "steps n d"] | None  # (S + 1, N, D): rows u = x/α at these levels, if asked for

    def __repr__(self) -> str:
        n = len(jax.tree.leaves(self.draws)[0])
        high, low = self.noise[0], self.noise[-1]
        return f"Diffused: {plural(n, 'draw')} of {plural(self.num_calls, 'call')} each, noise {high:.3g} to {low:.3g}"


def diffuse(
    source: Source,
    rng_key: Key,
    num_samples: int,
    *,
    sde: SDE | None = None,
    method: str | Method = "exp_ab3",
    num_steps: int | None = None,
    grid: Any = "karras",
    noise_range: tuple[float, float] | None = None,
    denoise: bool = False,
    trajectory: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    progress_bar: bool = False,
) -> Diffused:
    r"""Draws data from a model of every noise level, `def model(x, sigma=1.0)`, an energy or a `score_factor`.

    Chains start at the largest noise level, from the normal law with the mean and covariance of the noisy data, and
    follow the model's score down to the smallest level :math:`\rho_{\min}`. They are independent. The draws are of
    :math:`q_{\rho_{\min}}`, the data with this much noise, and not of the data themselves.

    The diffusion is chosen here and not in the fit: in u = x/α and ρ = σ/α every linear SDE asks the model for the
    same scores, see :class:`~numpyro_score.SDE`. What it changes is where the steps of some methods are:

    - deterministic: "ddim", "dpm++2m" (two values of the score), "exp_ab3" (three, the default), "edm_heun" (two calls
      a step) and "probability_flow" (Euler's steps in t);
    - with noise: "euler_maruyama", "reverse_diffusion", "ddpm", "ddpm_covariance" (exact for normal data),
      "sde_dpm++2m", "edm_churn";
    - with Langevin steps: "predictor_corrector", "annealed_langevin".

    Those with settings are objects, too: :class:`~numpyro_score.EDMHeun`,
    :class:`~numpyro_score.PredictorCorrector`.

    Args:
        source: a fit by ContinuousDSM or DSM with several levels, or an energy.
        rng_key: a key.
        num_samples: N, the number of draws, each a chain of its own.
        sde: the diffusion; by default that of Karras et al. 2022, with α = 1 and σ = t.
        method: a name above or a method.
        num_steps: S, 32 if not given; not with the levels themselves as grid, unless they are as many.
        grid: where the levels are: "karras", even in ρ^(1/7); "log_snr", even in log ρ; "uniform", even in t; or the
            S + 1 levels themselves, falling.
        noise_range: the smallest and largest level; by default all that the fit has seen and the SDE reaches.
        denoise: whether to end by the mean of the data given each draw, at one more call. It takes the noise from
            pictures, but the draws then have less spread than the data, by the variance given each.
        trajectory: whether to keep the chains at all levels, before the mean of the data is taken.
        sharding: over which devices to split the chains, e.g. `NamedSharding(mesh, PartitionSpec("chains"))`.
        progress_bar: whether to show one. Calls with and without it share one compiled program, as do those with
            other parameters, keys, levels and settings of the method. Another `sde`, or the same with other numbers,
            compiles the few lines that place its levels.

    Raises:
        TypeError, ValueError: for a model without `sigma`, levels that the fit has not seen or the SDE does not reach,
            bounded data, methods that cannot use their grid or number of steps, and chains that `sharding` cannot split
            evenly.
        FloatingPointError: if a draw is not finite, naming the step and the chains. Under `jax.vmap` or `jax.jit` over
            keys, which work, the draws are then NaN.

    Warns:
        UserWarning: if the largest level is less than twice the data's standard deviation.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, diffuse
        >>> def model(x, sigma=1.0):  # a standard normal law with noise
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))
        >>> energy = Energy(model, {}, jnp.array([-1.0, 1.0]))
        >>> found = diffuse(energy, jax.random.key(0), 10_000, noise_range=(0.01, 10.0))
        >>> bool(abs(found.draws.std() - 1) < 0.03), found.num_calls
        (True, 32)
    """
    num_samples = at_least_one("diffuse", "num_samples", num_samples)
    true_or_false("diffuse", denoise=denoise, trajectory=trajectory, progress_bar=progress_bar)
    key = as_key(rng_key, "write diffuse(fit, jax.random.key(0), 1000)")
    model, method = noisy_model("diffuse", source), method_named(method)
    if not model.energy.is_concrete:
        raise TypeError("The energy is traced by a JAX transformation: only the key of diffuse may be.")
    with jax.ensure_compile_time_eval():  # also while a key is traced by jax.jit
        ends = shared_noise_range("diffuse", source, sde, noise_range)
        levels = levels_on(sde, grid, _STEPS if num_steps is None else num_steps, ends)
        if num_steps is not None and num_steps != levels.num_steps:
            raise ValueError(
                f"diffuse got num_steps={num_steps} and a grid of {levels.num_steps + 1} levels, which are "
                f"{plural(levels.num_steps, 'step')}: leave num_steps out."
            )
        check_sharding("diffuse", "num_samples", sharding, (num_samples, model.dim))
        field = field_of(model)
        warn_of_structure("diffuse", field, levels.rho[0], "chains start from a normal law", stacklevel=3)
        plan = jax.tree.map(lambda v: jnp.asarray(v, model.dtype), method.plan(levels, field.end))

    start_key, run_key = jax.random.split(key)
    u = field.end.sample(start_key, num_samples, jnp.asarray(levels.rho[0], model.dtype))
    u = u if sharding is None else jax.device_put(u, sharding)
    state = start(u, method.memory, levels.num_steps if trajectory else None)
    state = run_chains(partial(_advance, method.step, field, plan, run_key), state, levels.num_steps, progress_bar)
    u = _denoised(field, state.u, jnp.asarray(levels.rho[-1], u.dtype)) if denoise else state.u
    require_finite(u, state.failed, [f"noise {rho:.3g}" for rho in levels.rho])
    draws = jax.vmap(partial(as_data, field.model.energy))(u)
    return Diffused(draws, method.calls * levels.num_steps + denoise, levels.rho, state.trajectory)


def field_of(model: NoisyModel) -> Field:
    """The model at one row, so that samplers are compiled for any number of data, and the law of its data."""
    end = end_law(*data_rows(model.energy), model.dtype)
    one = NoisyModel(model.energy.at(end.mean[None])) if model.energy.resizable else model
    return Field(one, end)


_advance = jax.jit(advance, static_argnums=0)


@jax.jit
def _denoised(field: Field, u: Float[Array, "n d"], rho: Float[Array, ""]) -> Float[Array, "n d"]:
    return field.denoised(u, rho)


def warn_of_structure(owner: str, field: Field, largest: float, what: str, *, stacklevel: int) -> None:
    """Warns if the data with the largest noise may not be normal yet, where `what` takes them to be."""
    scale = float(jnp.sqrt(field.end.largest))
    if largest < 2 * scale:
        warnings.warn(
            f"The largest noise level of {owner}, {largest:.3g}, is less than twice the data's standard deviation of "
            f"{scale:.3g}: {what}, and the noisy data may not be normal yet; fit at larger levels.",
            stacklevel=stacklevel + 1,
        )
