"""A generator fitted by KL between two denoising density estimators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jaxtyping import Array, Float
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from numpyro_score.energy import Energy
from numpyro_score.inference.optim import adam
from numpyro_score.inference.pickling import Compiling
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.inference.score_matching import ScoreMatching
from numpyro_score.losses import DSM
from numpyro_score.losses.base import at_least_one, positive
from numpyro_score.printed import name_of, num_numbers
from numpyro_score.random import Key, as_key

__all__ = ["DenoisingGenerator", "GeneratorResult", "GeneratorState"]


class GeneratorState(NamedTuple):
    """The state of a :class:`DenoisingGenerator` between two steps."""

    params: Any  # of the generator
    optimizer: optax.OptState
    critic: SVIState  # of the density estimator of the generator's own samples
    rng_key: Array  # ()


@dataclass(frozen=True)
class GeneratorResult:
    """A fitted generator.

    Attributes:
        params: of the generator.
        state: the last state; pass it to `run` to go on.
        divergences: of each step, the Fisher divergence ½ E‖s_q − s_p‖² between the two estimators at the generator's
            blurred samples, (S,). It falls to zero, up to the estimators' noise.
    """

    params: Any
    state: GeneratorState
    divergences: np.ndarray

    def __repr__(self) -> str:
        last = f"last Fisher divergence {self.divergences[-1]:.4g}"
        return f"GeneratorResult of {len(self.divergences)} steps, {last}, {num_numbers(self.params)}"


class DenoisingGenerator(Compiling):
    r"""Fits a generator of samples to a denoising density estimator [Bigdeli et al. 2020].

    The target is an energy fitted to data by denoising score matching at σ, so that it is log p_σ up to a constant. A
    second energy, the critic, follows the law q of the generator's samples x = g_φ(z) in the same way, and φ goes down

    .. math:: \nabla_\varphi \operatorname{KL}(q_\sigma \| p_\sigma)
              = \mathrm{E}\,[(s_q - s_p)(g_\varphi(z) + \sigma\varepsilon) \cdot \nabla_\varphi g_\varphi(z)],

    which needs no normaliser and no adversary. The gradient is exact where the critic is; at the minimum p_σ = q_σ,
    and so p = q without the noise.

    Args:
        model: the critic's model, with its data as the first argument; that of the target will often do.
        generator: a function of the generator's parameters and z (B, L) that returns samples (B, D).
        sigma: σ of the target.
        base: the law of z, a NumPyro distribution with one event dimension.
        optim: an Optax optimiser of the generator; Adam at 1e-3 if not given.
        critic_optim: an Optax optimiser of the critic; Adam at 3e-3 if not given.
        critic_steps: steps of the critic for each step of the generator.
        batch_size: B.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro_score import DSM, DenoisingGenerator, ScoreMatching
        >>> def model(x):
        ...     mean = numpyro.param("mean", jnp.zeros(1))
        ...     numpyro.factor("energy", -0.5 * jnp.sum((x - mean) ** 2, -1))
        >>> x = 2.0 + jax.random.normal(jax.random.key(0), (1000, 1))
        >>> target = ScoreMatching(model, loss=DSM(0.5)).run(jax.random.key(1), x, progress_bar=False).energy
        >>> base = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
        >>> optim = optax.adam(optax.cosine_decay_schedule(0.05, 600))
        >>> shift = DenoisingGenerator(model, lambda p, z: z + p, 0.5, base, optim=optim)
        >>> fit = shift.run(jax.random.key(2), target, jnp.zeros(1), num_steps=600, progress_bar=False)
        >>> bool(abs(fit.params[0] - x.mean()) < 0.1)
        True
    """

    _compiled = ("_advance",)
    _optimizers = ("optim",)

    def __init__(
        self,
        model: Callable[..., Any],
        generator: Callable[[Any, Array], Array],
        sigma: float,
        base: dist.Distribution,
        *,
        optim: optax.GradientTransformation | None = None,
        critic_optim: optax.GradientTransformation | None = None,
        critic_steps: int = 5,
        batch_size: int = 256,
    ) -> None:
        critic_steps = at_least_one("DenoisingGenerator", "critic_steps", critic_steps)
        batch_size = at_least_one("DenoisingGenerator", "batch_size", batch_size)
        if batch_size < 2:
            raise ValueError(f"DenoisingGenerator needs batch_size of at least 2, got {batch_size}.")
        positive("DenoisingGenerator", "sigma", sigma)
        if len(base.event_shape) != 1:
            raise ValueError(
                f"DenoisingGenerator needs a base with one event dimension, got event_shape {base.event_shape}: write "
                "e.g. dist.Normal(0, 1).expand([2]).to_event(1)."
            )
        self.model, self.generator, self.sigma, self.base = model, generator, sigma, base
        self.optim = adam(1e-3) if optim is None else optim
        self.critic = ScoreMatching(model, optim=critic_optim or adam(3e-3), loss=DSM(sigma))
        self.critic_steps, self.batch_size = critic_steps, batch_size
        self._compile()

    def __repr__(self) -> str:
        return f"DenoisingGenerator({name_of(self.model)}, {name_of(self.generator)}, sigma={self.sigma})"

    def _compile(self) -> None:
        self._advance = jax.jit(self._scan, static_argnums=2)

    def init(self, rng_key: Key, params: Any) -> GeneratorState:
        """The state at generator parameters `params`, with the critic at its model's initial values."""
        run_key, sample_key, critic_key = jax.random.split(as_key(rng_key), 3)
        x = self.sample(sample_key, params, self.batch_size)
        _require_real("critic", self.critic.model.energy(x))
        critic = self.critic.init(critic_key, x)
        return GeneratorState(params, self.optim.init(params), critic, run_key)

    def sample(self, rng_key: Key, params: Any, n: int) -> Float[Array, "n d"]:
        """Draws of the generator, (N, D), without noise."""
        return self.generator(params, self.base.sample(as_key(rng_key), (n,)))

    def update(self, state: GeneratorState, target: Energy) -> tuple[GeneratorState, Float[Array, ""]]:
        """The critic's steps, one step of the generator, and the Fisher divergence before it."""
        rng_key, *keys = jax.random.split(state.rng_key, self.critic_steps + 2)

        def follow(critic: SVIState, key: Array) -> tuple[SVIState, None]:
            return self.critic.update(critic, self.sample(key, state.params, self.batch_size))[0], None

        critic, _ = jax.lax.scan(follow, state.critic, jnp.stack(keys[1:]))
        base_key, noise_key = jax.random.split(keys[0])
        x, pull = jax.vjp(lambda p: self.sample(base_key, p, self.batch_size), state.params)
        noisy = x + self.sigma * jax.random.normal(noise_key, x.shape, x.dtype)
        difference = self._critic_energy(critic, x).score(noisy) - target.score(noisy)
        updates, optimizer = self.optim.update(pull(difference / len(x))[0], state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        divergence = 0.5 * jnp.mean(jnp.sum(difference**2, axis=-1))
        return GeneratorState(params, optimizer, critic, rng_key), divergence

    def run(
        self,
        rng_key: Key,
        target: Energy,
        params: Any,
        *,
        num_steps: int = 2000,
        progress_bar: bool = True,
        init_state: GeneratorState | None = None,
    ) -> GeneratorResult:
        """Fits the generator.

        Args:
            rng_key: a key for the samples and the noise.
            target: a fitted energy, log p_σ up to a constant, on any number of rows. A score alone will do.
            params: initial parameters of the generator, a pytree.
            num_steps: steps of the generator.
            progress_bar: whether to show one.
            init_state: go on from there instead of from `params`.

        Raises:
            ValueError: if the target cannot be evaluated at other rows than its own, or the generator's samples are no
                rows of it.
            NotImplementedError: for a target or critic whose data are bounded.
            FloatingPointError: as soon as a divergence is not finite.
        """
        rng_key = as_key(rng_key, "write run(jax.random.key(0), target, params)")
        num_steps = at_least_one("DenoisingGenerator.run", "num_steps", num_steps)
        if not isinstance(target, Energy):
            raise TypeError(f"The target must be an Energy, such as fit.energy, got {type(target).__name__}.")
        _require_real("target", target)
        shape = jax.eval_shape(lambda: self.sample(rng_key, params, self.batch_size)).shape
        if shape != (self.batch_size, target.dim):
            raise ValueError(
                f"The generator gave samples of shape {shape}, but the target's rows have {target.dim} numbers: return "
                f"({self.batch_size}, {target.dim}) for that many z."
            )
        if not target.resizable:
            raise ValueError(
                "The target is bound to its own rows: pass the data as an argument and let the plate follow its "
                "length, e.g. numpyro.plate('data', len(x))."
            )
        state = self.init(rng_key, params) if init_state is None else init_state
        divergences: list[np.ndarray] = []
        block, done = max(num_steps // 20, 1), 0
        try:
            with tqdm(total=num_steps, disable=not progress_bar) as bar:
                while done < num_steps:
                    n = min(block, num_steps - done)
                    state, found = self._advance(state, target, n)
                    divergences.append(np.asarray(found))
                    if not np.isfinite(divergences[-1]).all():
                        step = done + int(np.argmin(np.isfinite(divergences[-1])))
                        raise FloatingPointError(
                            f"The divergence is not finite at step {step}: take smaller steps, or more critic_steps."
                        )
                    done += n
                    bar.set_postfix_str(f"Fisher divergence: {divergences[-1].mean():.4g}", refresh=False)
                    bar.update(n)
        except KeyboardInterrupt:
            if not divergences:
                raise
            warnings.warn(f"Interrupted after {done} of {num_steps} steps; this is the fit so far.", stacklevel=2)
        return GeneratorResult(state.params, state, np.concatenate(divergences))

    def _scan(self, state: GeneratorState, target: Energy, n: int) -> tuple[GeneratorState, Array]:
        return jax.lax.scan(lambda s, _: self.update(s, target), state, length=n)

    def _critic_energy(self, critic: SVIState, x: Array) -> Energy:
        fit = ScoreMatchingResult(self.critic.get_params(critic), critic, np.zeros(0), self.critic, (x,), {})
        return fit.energy


def _require_real(what: str, energy: Energy) -> None:
    for a in energy.arrays:
        if a.support.kind not in ("real", "circle"):
            raise NotImplementedError(
                f"The generator's samples are real, and site '{a.name}' of the {what} is not: transform the data to "
                "the real line in the model, with the Jacobian as a factor."
            )
