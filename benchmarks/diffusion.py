"""Measures what draws by diffusion cost and how close they come: `python -m benchmarks.diffusion`. Writes DIFFUSION.md.

First every method on a mixture whose noisy score is known, by calls of the model, and where the deterministic ones end
on many mixtures. Then the package's sampler beside the
same method written by hand as a `lax.scan` over a network, for a network that is an energy and one that is a score,
each once in every round. Times are of compiled calls.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

from benchmarks import machine
from benchmarks.measure import flops, interleaved
from numpyro_score import Energy, PredictorCorrector, diffuse, score_factor
from numpyro_score.diffusion.chains import advance, start
from numpyro_score.diffusion.grids import levels_on
from numpyro_score.diffusion.methods import METHODS
from numpyro_score.diffusion.samplers import field_of
from numpyro_score.diffusion.source import noisy_model

OUTPUT = Path(__file__).parent / "DIFFUSION.md"
ENDS = (0.01, 40.0)
WIDTH, HIDDEN = 128, 3

# -- closeness ----------------------------------------------------------------------------------

CENTERS = np.array([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0]], np.float32)
SPREADS, SHARES = np.array([0.3, 0.5, 0.4], np.float32), np.array([0.3, 0.5, 0.2], np.float32)
DETERMINISTIC = ("ddim", "probability_flow", "dpm++2m", "exp_ab3", "edm_heun")


def mixture(x: Array, sigma: Any = 1.0) -> None:
    centers, spreads, shares = (numpyro.param(name) for name in ("centers", "spreads", "shares"))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        variance = spreads**2 + jnp.asarray(sigma)[..., None] ** 2
        squared = jnp.sum((x[:, None] - centers) ** 2, axis=-1)
        numpyro.factor("energy", logsumexp(jnp.log(shares) - squared / (2 * variance) - jnp.log(variance), axis=-1))


def energy_of(centers: np.ndarray, spreads: np.ndarray, shares: np.ndarray, x: np.ndarray) -> Energy:
    laws = {"centers": centers, "spreads": spreads, "shares": shares}
    dtype = jnp.result_type(float)
    return Energy(mixture, {k: jnp.asarray(v, dtype) for k, v in laws.items()}, jnp.asarray(x, dtype))


def exact(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    which = rng.choice(3, n, p=SHARES.astype(float) / SHARES.sum(dtype=float))
    return CENTERS[which] + np.hypot(SPREADS, ENDS[0])[which, None] * rng.normal(size=(n, 2))


def sliced_w2(x: np.ndarray, y: np.ndarray) -> float:
    angles = np.linspace(0, np.pi, 64, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(np.mean((np.sort(x @ directions, 0) - np.sort(y @ directions, 0)) ** 2)))


def closeness(n: int, calls: tuple[int, ...], repeats: int) -> list[str]:
    source = energy_of(CENTERS, SPREADS, SHARES, exact(20_000, 0))

    def draws(method: Any, num_steps: int, key: int) -> np.ndarray:
        found = diffuse(source, key, n, method=method, num_steps=num_steps, noise_range=ENDS)
        return np.asarray(found.draws)

    floor = [sliced_w2(exact(n, 2 * i), exact(n, 2 * i + 1)) for i in range(50, 60)]
    lines = [f"| two exact samples | | {np.mean(floor):.3f} ± {np.std(floor):.3f} | |"]
    converged = draws("exp_ab3", 1000, 0)
    for name, method in METHODS.items():
        for total in calls:
            used = PredictorCorrector(None, 1, 0.22) if name == "annealed_langevin" and total < 32 else method
            if total < 2 * used.calls:
                continue
            num_steps = total // used.calls
            found = [draws(used, num_steps, key) for key in range(repeats)]
            distance = np.mean([sliced_w2(x, exact(n, 100 + i)) for i, x in enumerate(found)])
            away = np.linalg.norm(found[0] - converged, axis=-1)
            ends = f"{np.median(away):.1e}, {np.sqrt(np.mean(away**2)):.1e}" if name in DETERMINISTIC else ""
            lines.append(f"| {name} | {num_steps * used.calls} | {distance:.3f} | {ends} |")
    return lines


def drawn_mixture(seed: int) -> Energy:
    """Four normal laws in the plane, overlapping as a rule."""
    rng = np.random.default_rng(seed)
    centers, spreads = 1.5 * rng.normal(size=(4, 2)), rng.uniform(0.2, 0.8, size=4)
    shares = rng.dirichlet(3 * np.ones(4))
    which = rng.choice(4, 4000, p=shares)
    return energy_of(centers, spreads, shares, centers[which] + spreads[which, None] * rng.normal(size=(4000, 2)))


def ends(n: int, num_mixtures: int, calls: tuple[int, ...]) -> list[str]:
    """How far draws are from the ends of the converged flow, by method, grid and calls."""
    cases = [(m, g, c) for m in DETERMINISTIC for g in ("karras", "log_snr") for c in calls]
    away: dict[Any, list[float]] = {case: [] for case in cases}
    for seed in range(num_mixtures):
        source = drawn_mixture(seed)

        def draws(method: str, grid: str, total: int, source: Energy = source, seed: int = seed) -> np.ndarray:
            options = dict(method=method, grid=grid, num_steps=total // METHODS[method].calls, noise_range=ENDS)
            return np.asarray(diffuse(source, seed, n, **options).draws)

        converged = draws("exp_ab3", "log_snr", 1000)
        for case in cases:
            away[case].append(np.sqrt(np.mean(np.sum((draws(*case) - converged) ** 2, axis=-1))))
    return [
        f"| {method} | {grid} | {total} | " + " | ".join(f"{q:.1e}" for q in np.quantile(found, [0.5, 0.9, 1.0])) + " |"
        for (method, grid, total), found in away.items()
    ]


# -- cost ---------------------------------------------------------------------------------------


class Contest(NamedTuple):
    kind: str
    dim: int
    flops: float  # the package's step over the one by hand
    call: np.ndarray  # seconds of diffuse(...)
    program: np.ndarray  # seconds of the compiled sampler that it runs
    hand: np.ndarray
    apart: float  # the two, at most


def network(weights: list[Array], x: Array, sigma: Array) -> Array:
    x = jnp.concatenate([x / jnp.sqrt(1 + sigma**2)[:, None], jnp.log(sigma)[:, None]], axis=-1)
    for w in weights[:-1]:
        x = jax.nn.swish(x @ w)
    return x @ weights[-1]


def energy_model(x: Array, sigma: Any = 1.0) -> None:
    weights = numpyro.param("weights")
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]), obs=x)
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        numpyro.factor("energy", network(weights, x, sigma)[:, 0] - 0.5 * jnp.sum(x**2, -1) / (1 + sigma**2))


def score_model(x: Array, sigma: Any = 1.0) -> None:
    weights = numpyro.param("weights")
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]), obs=x)
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        score_factor("score", x, network(weights, x, sigma) / sigma[:, None] - x / (1 + sigma[:, None] ** 2))


def score_by_hand(kind: str, weights: list[Array], x: Array, sigma: Array) -> Array:
    def log_density(x: Array) -> Array:
        return jnp.sum(network(weights, x, sigma)[:, 0] - 0.5 * jnp.sum(x**2, -1) / (1 + sigma**2))

    if kind == "energy":
        return jax.grad(log_density)(x)
    return network(weights, x, sigma) / sigma[:, None] - x / (1 + sigma[:, None] ** 2)


def by_hand(kind: str, method: str = "dpm++2m") -> Callable[..., Array]:
    """DPM-Solver++(2M), or Euler–Maruyama for α = 1 and σ = t, as a loop over levels."""
    return solver_by_hand(kind) if method == "dpm++2m" else euler_maruyama_by_hand(kind)


def euler_maruyama_by_hand(kind: str) -> Callable[..., Array]:
    def run(weights: list[Array], u: Array, rho: Array) -> Array:
        def step(u: Array, level: tuple[Array, Array, Array]) -> tuple[Array, None]:
            r, lower, key = level
            spread = 2 * r * (r - lower)  # σ = t
            score = score_by_hand(kind, weights, u, jnp.full(len(u), r))
            return u + spread * score + jnp.sqrt(spread) * jax.random.normal(key, u.shape), None

        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(len(rho) - 1))
        return jax.lax.scan(step, u, (rho[:-1], rho[1:], keys))[0]

    return run


def solver_by_hand(kind: str) -> Callable[..., Array]:
    def run(weights: list[Array], u: Array, rho: Array) -> Array:
        h = jnp.log(rho[:-1] / rho[1:])
        last = jnp.append(jnp.inf, h[:-1])

        def step(carry: tuple[Array, Array], level: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
            (u, old), (r, h, last) = carry, level
            denoised = u + r**2 * score_by_hand(kind, weights, u, jnp.full(len(u), r))
            ahead = denoised + 0.5 * h / last * (denoised - old)
            return (jnp.exp(-h) * u - jnp.expm1(-h) * ahead, denoised), None

        return jax.lax.scan(step, (u, jnp.zeros_like(u)), (rho[:-1], h, last))[0][0]

    return run


def contest(
    kind: str, dim: int, chains: int, num_steps: int, rounds: int, method: str = "dpm++2m", most_apart: float = 2e-3
) -> Contest:
    sizes = [dim + 1, *[WIDTH] * HIDDEN, 1 if kind == "energy" else dim]
    # Small, so that chains stay where data would be.
    weights = [
        0.5 * jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, s in enumerate(itertools.pairwise(sizes))
    ]
    x = jax.random.normal(jax.random.key(9), (1000, dim))
    source = Energy(energy_model if kind == "energy" else score_model, {"weights": weights}, x)
    settings: dict[str, Any] = dict(method=method, num_steps=num_steps, noise_range=ENDS)
    found = diffuse(source, 0, chains, trajectory=True, **settings)
    rho, u = jnp.asarray(found.noise, jnp.float32), found.trajectory[0]
    hand = jax.jit(by_hand(kind, method)).lower(weights, u, rho).compile()
    program, arguments = compiled_sampler(source, u, found.noise, method)
    apart = float(jnp.max(jnp.abs(hand(weights, u, rho) - program(*arguments).u)))
    assert apart < most_apart, f"{method} by hand ends {apart:.2g} away"  # the same method
    times = interleaved(
        [
            lambda: diffuse(source, 0, chains, **settings).draws,
            lambda: program(*arguments),
            lambda: hand(weights, u, rho),
        ],
        rounds,
    )
    return Contest(kind, dim, flops(program) / flops(hand), *times, apart)


def compiled_sampler(source: Energy, u: Array, noise: np.ndarray, name: str = "dpm++2m") -> tuple[Any, tuple[Any, ...]]:
    method, field = METHODS[name], field_of(noisy_model("diffuse", source))
    plan = method.plan(levels_on(None, noise, 1, (noise[-1], noise[0])), field.end)
    plan = jax.tree.map(lambda v: jnp.asarray(v, u.dtype), plan)
    arguments = (field, plan, jax.random.key(0), start(u, method.memory), 0, len(noise) - 1)
    return jax.jit(advance, static_argnums=0).lower(method.step, *arguments).compile(), arguments


def render(lines: list[str], where: list[str], contests: list[Contest], options: argparse.Namespace, load: str) -> str:
    rows = []
    for c in contests:
        low, middle, high = np.quantile(c.program / c.hand, [0.25, 0.5, 0.75])
        overhead = 1e3 * np.median(c.call - c.program)
        rows.append(
            f"| {c.kind} | {c.dim} | {c.flops:.4f} | {middle:.2f} ({low:.2f}–{high:.2f}) | "
            f"{1e3 * np.median(c.program):.1f} | {overhead:.0f} |"
        )
    return "\n".join([
        "# Draws by diffusion", "",
        "Written by `python -m benchmarks.diffusion`.", "",
        "## Closeness", "",
        f"{options.draws:,} draws of a mixture of three normal laws in the plane, whose noisy score is known, by calls "
        f"of the model. Noise from {ENDS[1]:g} to {ENDS[0]:g} on the Karras grid, α = 1, float32. Sliced W2 to exact "
        f"draws with the smallest noise, the mean over {options.repeats} keys; where the method is deterministic, the "
        "median and the root mean square of how far each draw is from the end of the converged flow. A few draws that "
        "begin between two modes and end in the other carry the latter. Langevin dynamics takes one step a level below "
        "32 calls, and else five.", "",
        "| method | calls | sliced W2 | from the flow's end: median, rms |", "|---|---|---|---|", *lines, "",
        "## Where they end", "",
        f"{options.draws:,} draws of each of {options.mixtures} mixtures of four normal laws in the plane, themselves "
        "drawn, and the root mean square of how far the draws are from the ends of the converged flow, those included "
        "that end in another mode: the median over the mixtures, the ninth decile and the largest. float64, noise as "
        "above.", "",
        "| method | grid | calls | median | 90% | largest |", "|---|---|---|---|---|---|", *where, "",
        "## Cost", "",
        f"DPM-Solver++(2M), {options.chains:,} chains of {options.steps} steps, a network of {HIDDEN} layers of "
        f"{WIDTH}: the package's compiled sampler over the same method written by hand as a scan. FLOPs as XLA counts "
        "them; at most 1.01 is asked. Each contestant runs once in every round; medians of ratios, with quartiles in "
        "brackets; at most 1.10 is asked on an idle machine. The last column is what a call of `diffuse` takes beyond "
        "its compiled program.", "",
        "| model | D | FLOPs ratio | time ratio | ms | call, ms more |", "|---|---|---|---|---|---|", *rows, "",
        machine.describe(),
        f"- Load before the run: {load}; {options.rounds} rounds", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diffusion", description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixtures", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--chains", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    load = machine.load()
    contests = [
        contest(kind, dim, options.chains, options.steps, options.rounds)
        for dim in options.dims
        for kind in ("energy", "score")
    ]
    found = closeness(options.draws, tuple(options.calls), options.repeats)
    with jax.enable_x64(True):
        where = ends(options.draws, options.mixtures, (10, 16, 32))
    text = render(found, where, contests, options, load)
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
