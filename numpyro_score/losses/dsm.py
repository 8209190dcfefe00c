"""Denoising score matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score import random
from numpyro_score.energy import Energy
from numpyro_score.losses.base import at_least_one, positive, required, true_or_false
from numpyro_score.losses.chunks import rows_at_once, rows_in_cache
from numpyro_score.losses.terms import require_flat

__all__ = ["DSM", "at_levels", "denoising_values", "geometric_levels"]


@dataclass(frozen=True)
class DSM:
    """Denoising score matching [Vincent 2011], at one noise level or over many [Song & Ermon 2019].

    With x̃ = x + σε and ε ~ N(0, I) each row's value at the level σ is

    - plain: ½‖s(x̃) + ε/σ‖² − D/(2σ²);
    - with control variate (default): ½‖s(x̃)‖² + ε·(s(x̃) − s(x))/σ [Wang et al. 2020; Song & Kingma 2021], the same
      mean; as σ → 0 the variance of its gradient stays bounded, where the plain form's grows as σ⁻² (and that of the
      value as σ⁻⁴). It costs a second score;
    - antithetic: the mean of the plain form over ε and −ε less its mean-zero part, ¼(‖s(x + σε)‖² + ‖s(x − σε)‖²) +
      ε·(s(x + σε) − s(x − σε))/(2σ). The same mean and cost as with the control variate, as good at small σ and better
      at large σ.

    All are unbiased for the Hyvärinen objective of the noisy data p_σ = p * N(0, σ²I), not of the data: the fit
    describes p_σ. Noise is drawn afresh for every row and every call. Returns (N,) values.

    With several levels the value is Σ_i λ(σ_i) DSM(σ_i), and the model takes the level of each row as the keyword
    `sigma`, of shape (N,): `def model(x, sigma=1.0)`. Its score at x and σ is then that of p_σ. A tuple of one level,
    DSM((0.5,)), passes it as well; DSM(0.5) does not, and refuses a model whose `sigma` is not given otherwise.

    Args:
        sigma: σ, in the units of the data; or several, e.g. :func:`~numpyro_score.geometric_levels`.
        control_variate: which of the first two forms.
        weighting: λ, a function of σ. Default: 1 for one level, σ² for several, so that all weigh about the same.
        levels: with several levels, "sampled" gives each row one of them, every level equally likely, and multiplies
            by their number; "all" takes every row at every level.
        antithetic: take the third form instead.
        allow_kinks: do not look for jumps of the score whose place depends on the parameters, which bias the gradient.

    Raises:
        ValueError, TypeError: if sigma is not made of positive numbers, or weighting does not give numbers of at least
            0; for several levels, if the model takes no `sigma` or its arguments give one already; for one level, if
            the model's `sigma` is left at its default.
    """

    sigma: float | Array | tuple[float, ...] = None  # type: ignore[assignment]
    control_variate: bool = True
    weighting: Callable[[Array], Array] | None = None
    levels: Literal["sampled", "all"] = "sampled"
    antithetic: bool = False
    allow_kinks: bool = False

    no_moving_kinks: ClassVar[str] = "its gradient leaves out that the jump moves with the parameters"

    def __post_init__(self) -> None:
        required(
            "DSM",
            "sigma",
            self.sigma,
            "the noise level in the units of the data: start from a tenth of their standard deviation, e.g. "
            "DSM(sigma=0.1 * float(x.std()))",
        )
        if isinstance(self.sigma, Sequence | np.ndarray | jax.Array) and not isinstance(
            self.sigma, str | jax.core.Tracer
        ):
            levels = tuple(np.asarray(self.sigma, float).reshape(-1).tolist())
            if not levels or np.ndim(self.sigma) > 1:
                raise ValueError(f"DSM needs one noise level or a sequence of some, got shape {np.shape(self.sigma)}.")
            # A single level in an array is a number.
            object.__setattr__(self, "sigma", levels if np.ndim(self.sigma) else levels[0])
        for level in self.sigma if isinstance(self.sigma, tuple) else (self.sigma,):
            positive("DSM", "sigma, in the units of the data", level)
        if self.levels not in ("sampled", "all"):
            raise ValueError(f"DSM has no levels {self.levels!r}: use 'sampled' or 'all'.")
        flags = ("control_variate", "antithetic", "allow_kinks")
        true_or_false("DSM", **{name: getattr(self, name) for name in flags})
        if self.weighting is not None and not isinstance(self.sigma, jax.core.Tracer):
            check_weighting("DSM", self.weighting, self.sigma)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        require_flat(energy, "DSM")
        x = energy.data
        if not isinstance(self.sigma, tuple):
            if energy.is_given("sigma") is False:
                raise TypeError(
                    "The model takes 'sigma', which DSM with a single number does not pass: write DSM((0.5,)) if it is "
                    "the noise level, or give its value among the model's arguments."
                )
            level = jnp.asarray(self.sigma, x.dtype)
            values = self._denoise(energy, rng_key, level)
            return values if self.weighting is None else self.weighting(level) * values
        weighting = jnp.square if self.weighting is None else self.weighting
        levels = jnp.asarray(self.sigma, x.dtype)
        level_key, noise_key = jax.random.split(rng_key)
        if self.levels == "all":

            def at_level(level: Array, key: Array) -> Array:
                sigma = jnp.full(len(x), level)
                return weighting(level) * self._denoise(at_levels("DSM with several levels", energy, sigma), key, sigma)

            return jax.vmap(at_level)(levels, jax.random.split(noise_key, len(levels))).sum(axis=0)
        # In turn from a random start: each row's level is uniform, and a batch has as many of each as can be.
        start = jax.random.randint(level_key, (), 0, len(levels))
        sigma = levels[(jnp.arange(len(x)) + start) % len(levels)]
        energy = at_levels("DSM with several levels", energy, sigma)
        return len(levels) * weighting(sigma) * self._denoise(energy, noise_key, sigma)

    def _denoise(self, energy: Energy, rng_key: Array, sigma: Float[Array, "..."]) -> Float[Array, "n"]:
        return denoising_values(
            energy, rng_key, sigma, control_variate=self.control_variate, antithetic=self.antithetic
        )

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """What fits the cache, or bounds the memory."""
        levels = len(self.sigma) if isinstance(self.sigma, tuple) and self.levels == "all" else 1
        evaluations = 4 if self.antithetic else 3 if self.control_variate else 2
        return rows_at_once(energy, evaluations * levels, rows_in_cache(energy, levels))


def check_weighting(owner: str, weighting: Any, levels: Any) -> None:
    """Raises for a weighting that is no function, or that gives no number of at least 0 at some level."""
    if not callable(weighting):
        raise TypeError(f"{owner} needs a function of the level as weighting, got {weighting!r}.")
    with jax.ensure_compile_time_eval():
        weights = weighting(jnp.asarray(levels, jnp.result_type(float)))
    if isinstance(weights, jax.core.Tracer):
        return
    weights = np.asarray(weights)
    if not np.issubdtype(weights.dtype, np.number):
        raise TypeError(f"{owner}'s weighting gave {weights.dtype} in the place of numbers: return one for each level.")
    wrong = ~(np.isfinite(weights) & (weights >= 0)).reshape(-1)
    if wrong.any() or not weights.any():
        i = int(np.argmax(wrong))
        level = np.ravel(levels)[min(i, np.size(levels) - 1)]
        raise ValueError(
            f"{owner}'s weighting gave {weights.reshape(-1)[i]:.3g} at the level {level:.3g}: return a finite number "
            "of at least 0 for each level, and more for some, as negative weights fit what the data are not."
        )


def at_levels(owner: str, energy: Energy, sigma: Float[Array, "n"]) -> Energy:
    """The energy with the noise level of each row.

    Raises:
        TypeError: if the model takes no `sigma`, or its arguments give one already.
    """
    if energy.is_given("sigma"):
        raise TypeError(
            f"The model's arguments give 'sigma', which {owner} passes: leave it out, or take DSM with one level."
        )
    return energy.bind(sigma=sigma)


def denoising_values(
    energy: Energy, rng_key: Array, sigma: Float[Array, "..."], *, control_variate: bool, antithetic: bool
) -> Float[Array, "n"]:
    """The value of :class:`DSM` at one draw of noise for each row, in one of its three forms, (N,).

    Args:
        energy: already bound to the noise levels, if its model takes them.
        rng_key: for the noise.
        sigma: the level of all rows, or of each, (N,).
        control_variate: as that of :class:`DSM`.
        antithetic: likewise.
    """
    x, level, sigma = energy.data, sigma, sigma[..., None]
    noise = random.normal(rng_key, x.shape, x.dtype)
    score = energy.score(x + sigma * noise)
    # The second and third are written so that the large terms, which cancel, never arise.
    if antithetic:
        other = energy.score(x - sigma * noise)
        return jnp.sum(0.25 * (score**2 + other**2) + noise * (score - other) / (2 * sigma), axis=-1)
    if control_variate:
        return jnp.sum(0.5 * score**2 + noise * (score - energy.score(x)) / sigma, axis=-1)
    return 0.5 * jnp.sum((score + noise / sigma) ** 2, axis=-1) - energy.dim / (2 * level**2)


def geometric_levels(largest: float, smallest: float, num: int) -> tuple[float, ...]:
    """Noise levels σ₁ > ... > σ_L in geometric progression [Song & Ermon 2019; 2020 for the choice of the ends].

    Args:
        largest: as large as the largest distance between two rows, so that the modes run together.
        smallest: as small as the finest detail that matters.
        num: L; 10 to 20 for few dimensions.

    Raises:
        ValueError: if they are not positive, in this order, with at least two levels.
    """
    positive("geometric_levels", "largest", largest)
    positive("geometric_levels", "smallest", smallest)
    num = at_least_one("geometric_levels", "num", num)
    if not largest > smallest or num < 2:
        raise ValueError(
            f"geometric_levels needs largest > smallest and at least two levels, got {largest}, {smallest} and {num}."
        )
    return tuple(float(s) for s in np.geomspace(largest, smallest, num))
