"""Posteriors of data whose prior is a diffusion, and whose observation is a NumPyro model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro import handlers

from numpyro_score.closures import Keyed
from numpyro_score.diffusion.evidence import ALONE, evidence_of, require_numbers, warn_of_few
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.noise_range import shared_noise_range
from numpyro_score.diffusion.observations import check_call, log_likelihood, refuse_traced, split_observation
from numpyro_score.diffusion.particles import Run, run_particles
from numpyro_score.diffusion.samplers import field_of, warn_of_structure
from numpyro_score.diffusion.source import NoisyModel, as_data, noisy_model
from numpyro_score.diffusion.steps import Field
from numpyro_score.diffusion.twists import Twist
from numpyro_score.energy import check_rows, join_arrays, split_arrays
from numpyro_score.losses.base import at_least_one, positive
from numpyro_score.normaliser.coordinates import row_to_data
from numpyro_score.normaliser.source import Source
from numpyro_score.random import Key, as_key

__all__ = ["PosteriorDraws", "Problem", "inpaint", "posterior"]

Method = Literal["smc", "tds", "guided"]


class PosteriorDraws(NamedTuple):
    """Weighted draws of the data given the observation, from R runs of N particles."""

    draws: Any  # (R N, event shape); by name where there are several data sites
    log_weights: Float[np.ndarray, "rn"]  # normalised; all equal for "guided"
    log_evidence: float | None  # log p(y); None for "guided"
    log_evidence_stderr: float | None  # of finitely many particles, by the spread of runs; inf where that says nothing
    log_evidence_step_error: float | None  # for "tds", by how much it moved from half the steps; 0 for "smc"
    ess: float  # the effective number of draws, 1/Σw²
    least_ess: float  # the smallest effective share of a run's particles on the way; for "guided" as if weighted
    unique_ancestors: int  # of how many first particles the draws descend, over all runs
    biased: bool  # true for "guided", which is no method to compute a posterior

    def resample(self, rng_key: Key, num_samples: int) -> Any:
        """Draws of equal weight, in the form of `draws`: some of these several times."""
        weights = jnp.exp(jnp.asarray(self.log_weights))
        chosen = jax.random.choice(as_key(rng_key), len(weights), (num_samples,), p=weights)
        return jax.tree.map(lambda v: v[chosen], self.draws)


def posterior(
    source: Source,
    observation_model: Callable[..., Any],
    rng_key: Key,
    *args: Any,
    method: Method = "tds",
    num_particles: int = 512,
    num_runs: int = 8,
    num_steps: int = 32,
    twist: Twist = "moments",
    grid: Any = "karras",
    noise_range: tuple[float, float] | None = None,
    **kwargs: Any,
) -> PosteriorDraws:
    r"""Draws of the data x given an observation y, with a diffusion as prior and the observation as a NumPyro model.

    The target is :math:`q_{\rho_{\min}}(x)\, p(y \mid x)`: the prior is that of the data with the smallest noise.
    Particles go from noise to less noise by proposals that know of y, with the mean and the covariance of the data
    given the noisy point (`twist`), and are weighted and resampled:

    - "tds", the default: twisted diffusion [Wu et al. 2023], whose target is what the sampler with `num_steps` steps
      draws, given y. **The sampler's own error is not corrected, and no part of `log_evidence_stderr`**, which is that
      of finitely many particles. It falls as 1/num_steps, so that what the evidence moves by from half the steps,
      `log_evidence_step_error`, is about that of all of them. It comes from as many runs again. For a y that the
      prior makes rare it is large: at 32 steps a y with log p(y) = −6.06 came out at −5.81 ± 0.04 with a step error
      of 0.45, and at 128 at −6.00 ± 0.04;
    - "smc", for energies: targets :math:`q_\rho(u)\, h(u)` at every level, with the noising kernel backwards [Del
      Moral, Doucet & Jasra 2006]. What is wrong with steps and twists, the weights correct: only the density at the
      smallest level counts, for draws and evidence alike. The levels' unknown constants are estimated by a second set
      of runs without observation. **Take it for energies that are known, and not for those learned by denoising**: a
      score at little noise does not see the weights of parts that are far apart, so that the energy has them wrong
      there, while the sampler has them from more noise; `examples/two_moons.py` compares the two;
    - "guided": the proposals alone, without weights. **It is biased, by any number of steps**: on mixtures it puts
      mass where there is none, and ranks of the data's own numbers do not show it. For pictures and for comparison.

    Args:
        source: a fit by ContinuousDSM or DSM with several levels, or an energy, whose model takes `sigma`.
        observation_model: a NumPyro model whose first argument is the data of one row, in the shape of its site (a
            dictionary by name for several sites), and whose sites are all observed.
        rng_key: a key.
        *args: further arguments of the observation model, such as y. Numbers of Python are passed as arrays, so that
            others need no new program, unless the model needs them as such, e.g. as a size or in `if`.
        method: "tds", "smc" or "guided".
        num_particles: N, of each run. Each holds a few matrices of D × D numbers: rows may have some hundred numbers,
            and not the thousands of an image of 64 × 64.
        num_runs: R, independent runs, which share nothing but the target.
        num_steps: as in :func:`~numpyro_score.diffuse`.
        twist: "moments", "isotropic" or "plain"; "moments" takes D products with the score's derivative a step, and
            is worth them by a factor of ten in the number of particles.
        grid: as in :func:`~numpyro_score.diffuse`.
        noise_range: as in :func:`~numpyro_score.diffuse`.
        **kwargs: further keyword arguments of the observation model.

    Raises:
        TypeError, ValueError: as :func:`~numpyro_score.diffuse`; an observation model with latent sites, random keys
            or subsampled plates; an observed value that is NaN or that no x makes possible; traced arguments; "smc"
            for a model without a density.
        FloatingPointError: if points or weights are not finite; if log weights are so large that their differences
            are rounding errors, as for y far from all that the prior draws; if the observation is impossible at all
            particles of a run. With the noise, and the number of runs.

    Warns:
        UserWarning: if the largest level is less than twice the data's standard deviation, but for "smc"; if fewer than
            ten particles of a run counted at some level (for "guided" fewer than two, if its draws had their weights);
            if one run holds most of the evidence, or there is but one; for "tds" if the evidence moved from half the
            steps by more than three standard errors.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, posterior
        >>> def prior(x, sigma=1.0):  # a standard normal law with noise
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ...         numpyro.factor("energy", -0.5 * x**2 / (1 + sigma**2))
        >>> def observed(x, y):
        ...     numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> energy = Energy(prior, {}, jnp.array([-1.0, 1.0]))
        >>> found = posterior(energy, observed, jax.random.key(0), 2.0, noise_range=(0.01, 10.0))
        >>> evidence = dist.Normal(0.0, 2**0.5).log_prob(2.0)
        >>> bool(abs(found.log_evidence - evidence) < 4 * found.log_evidence_stderr + 1e-3)
        True
    """
    key = as_key(rng_key, "write posterior(fit, observed, jax.random.key(0), y)")
    check_call("posterior", source, key, observation_model, args, kwargs)
    problem = Problem.of(
        source, observation_model, method, num_particles, num_runs, num_steps, twist, grid, noise_range
    )
    y_key, prior_key = jax.random.split(key)
    if method == "tds" and len(problem.rho) > 2:
        found, coarse = problem.run_twice(y_key, args, kwargs)
    else:
        found, coarse = problem.run(y_key, args, kwargs), None
    rows, log_weights = jnp.asarray(found.u).reshape(-1, problem.field.model.dim), problem.log_weights(found)
    draws = jax.vmap(partial(as_data, problem.field.model.energy))(rows)
    ancestors = sum(len(np.unique(a)) for a in found.ancestors)
    if method == "guided":
        least = float(np.min(found.least_ess))
        warn_of_few(least * num_particles, num_particles, ALONE)
        return PosteriorDraws(draws, log_weights, None, None, None, float(len(log_weights)), least, ancestors, True)
    without = problem._replace(observation=_nothing).run(prior_key, (), {}) if method == "smc" else None
    log_evidence, stderr, step_error, least = evidence_of(found, without, coarse, len(problem.rho) - 1)
    ess = float(np.exp(-np.logaddexp.reduce(2 * log_weights)))
    return PosteriorDraws(draws, log_weights, log_evidence, stderr, step_error, ess, least, ancestors, False)


_SETTINGS = [p.name for p in inspect.signature(posterior).parameters.values() if p.kind is p.KEYWORD_ONLY]


class Problem(NamedTuple):
    """All of a posterior but the observed values."""

    field: Field
    rho: np.ndarray
    observation: Callable[..., Any]
    method: Method
    twist: Twist
    num_particles: int
    num_runs: int

    @classmethod
    def of(
        cls,
        source: Source,
        observation: Callable[..., Any],
        method: Method,
        num_particles: int,
        num_runs: int,
        num_steps: int,
        twist: Twist,
        grid: Any,
        noise_range: tuple[float, float] | None,
        owner: str = "posterior",
    ) -> Problem:
        """From the arguments of :func:`posterior`, or those that `owner` shares with it, checked."""
        num_particles = at_least_one(owner, "num_particles", num_particles)
        num_runs = at_least_one(owner, "num_runs", num_runs)
        if twist not in ("moments", "isotropic", "plain"):
            raise ValueError(f"{owner} has no twist {twist!r}: use 'moments', 'isotropic' or 'plain'.")
        model = noisy_model(owner, source)
        _check_method(owner, model, method)
        levels = levels_on(None, grid, num_steps, shared_noise_range(owner, source, None, noise_range), owner)
        field = field_of(model)
        if method != "smc":  # whose weights are of the model at every level
            warn_of_structure(owner, field, levels.rho[0], "particles start from a normal law", stacklevel=3)
        return cls(field, levels.rho, observation, method, twist, num_particles, num_runs)

    def run(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """All runs, for one observation, on the host."""
        return self.run_checked(jax.random.split(rng_key, self.num_runs), *self._split(args, kwargs))

    def run_checked(self, keys: Array, arrays: list[Any], static: Any) -> Run:
        """Of an observation with the sites of one that :meth:`run` has taken, by the keys of all runs."""
        found = self._run(keys, [self.rho] * len(keys), arrays, static)
        require_numbers(found, self.rho)
        return found

    def run_twice(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, Run]:
        """The same as :meth:`run`, and as many runs of half the steps, which may have failed; one program for both."""
        n, last = self.num_runs, len(self.rho) - 1
        keys = [jax.random.split(k, n) for k in (rng_key, jax.random.fold_in(rng_key, 1))]
        half = self.rho[np.linspace(0, last, last // 2 + 1).round().astype(int)]
        both = self._run(jnp.concatenate(keys), [self.rho] * n + [half] * n, *self._split(args, kwargs))
        found, coarse = (jax.tree.map(lambda v, of=of: v[of], both) for of in (slice(n), slice(n, None)))
        require_numbers(found, self.rho)
        return found, coarse

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        if self.observation is _nothing:
            return split_arrays((args, kwargs))
        return split_observation(self.observation, self.field, args, kwargs)

    def _run(self, keys: Array, levels: list[np.ndarray], arrays: list[Any], static: Any) -> Run:
        # In one array; those that take fewer steps stop early.
        padded = np.stack([np.append(v, np.repeat(v[-1], len(self.rho) - len(v))) for v in levels])
        rho, num_steps = jnp.asarray(padded, self.field.model.dtype), jnp.asarray([len(v) - 1 for v in levels])
        settings = (Keyed(self.observation), static, self.method, self.twist, self.num_particles)
        return jax.device_get(_runs(self.field, rho, num_steps, keys, arrays, *settings))

    def log_weights(self, found: Run) -> Float[np.ndarray, "rn"]:
        """The log weights of the particles of all runs, normalised."""
        if self.method == "guided":
            n = found.log_weights.size
            return np.full(n, -np.log(n))
        log_z = np.asarray(found.log_z, np.float64)[:, None]
        log_weights = (found.log_weights.astype(np.float64) + (log_z - log_z.max())).reshape(-1)
        return log_weights - np.logaddexp.reduce(log_weights)


def inpaint(
    source: Source, x: Any, mask: Any, rng_key: Key, *, noise: float | None = None, **settings: Any
) -> PosteriorDraws:
    """Draws of the data given some of their numbers: :func:`posterior` of what is known.

    Args:
        source: as in :func:`posterior`; one data site.
        x: one row, in the shape of its site. What it holds where `mask` is false does not count, and may be NaN.
        mask: where x is known, of the same shape.
        rng_key: a key.
        noise: the standard deviation with which x is known; by default the smallest noise level, as without any noise
            x would have to be a number that the prior, which has this noise, all but excludes.
        **settings: of :func:`posterior`.

    Raises:
        TypeError, ValueError: as :func:`posterior`; x or mask of another shape; NaN or infinity where x is known.
    """
    if unknown := sorted(settings.keys() - set(_SETTINGS)):
        raise TypeError(f"inpaint has no setting '{unknown[0]}': it takes those of posterior, {', '.join(_SETTINGS)}.")
    refuse_traced("inpaint", getattr(source, "energy", source), x, mask, rng_key)
    model = noisy_model("inpaint", source)
    shapes = {k: v.shape for k, v in row_to_data(field_of(model).model.energy, jnp.zeros(model.dim)).items()}
    if len(shapes) > 1:
        raise TypeError(
            f"inpaint needs one data site, got {sorted(shapes)}: write posterior with a model of the known."
        )
    (shape,) = shapes.values()
    x, mask = np.asarray(x), np.asarray(mask)
    if x.dtype.kind not in "fiub" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"inpaint needs numbers as x, got {x.dtype}: pass one row, and mask where it is known.")
    check_rows("x", x)
    x = x.astype(np.float64)
    if x.shape != shape or mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"inpaint needs x and a boolean mask of one row's shape {shape}, got {x.shape} and {mask.shape} of "
            f"{mask.dtype}."
        )
    if not np.isfinite(x[mask]).all():
        raise ValueError("x has NaN or infinity where mask says that it is known: set mask to False there.")
    if noise is None:
        noise = shared_noise_range("inpaint", source, None, settings.get("noise_range"))[0]
    positive("inpaint", "noise", noise)
    known = jnp.asarray(np.where(mask, x, 0.0), model.dtype)
    return posterior(source, _known, rng_key, known, jnp.asarray(mask), jnp.asarray(noise, model.dtype), **settings)


def _known(x: Array, value: Array, mask: Array, noise: Array) -> None:
    with handlers.mask(mask=mask):
        numpyro.sample("known", dist.Normal(x, noise), obs=value)


def _nothing(_: Any) -> None:
    """No observation."""


def _check_method(owner: str, model: NoisyModel, method: Method) -> None:
    if method not in ("smc", "tds", "guided"):
        raise ValueError(f"{owner} has no method {method!r}: use 'smc', 'tds' or 'guided'.")
    if method == "smc" and not model.energy.has_density:
        raise TypeError(f"{owner} by 'smc' needs the density at every level, and the model has a score: use 'tds'.")


@partial(jax.jit, static_argnames=("observation", "static", "method", "twist", "num_particles"))
def _runs(
    field: Field,
    rho: Float[Array, "runs levels"],
    num_steps: Int[Array, "runs"],
    keys: Array,
    arrays: list[Any],
    observation: Callable[..., Any],
    static: Any,
    method: Method,
    twist: Twist,
    num_particles: int,
) -> Run:
    args, kwargs = join_arrays(arrays, static)
    likelihood = partial(log_likelihood, observation, args, kwargs, field)
    return jax.lax.map(partial(run_particles, field, likelihood, method, twist, num_particles), (rho, num_steps, keys))
