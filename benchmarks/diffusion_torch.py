"""The sampler and the likelihood of score_sde's recipe, written by hand in PyTorch. It runs in a process of its own.

The variance-exploding diffusion of Song et al. [2021]: a predictor by reverse diffusion with one Langevin corrector at
each level, whose step is 2(snr ‖z‖/‖s‖)² by the batch's mean norms; the probability flow by Euler's method, by
DPM-Solver++(2M) [Lu et al. 2022] and by Heun's [Karras et al. 2022]; log densities by the flow, with one Rademacher
probe and SciPy's RK45, one step size for all rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp

Score = Callable[[torch.Tensor, float], torch.Tensor]


def score_of(weights: list[np.ndarray]) -> Score:
    layers = [torch.as_tensor(w) for w in weights]

    def score(x: torch.Tensor, sigma: float) -> torch.Tensor:
        level = torch.full_like(x[:, :1], np.log(sigma))
        h = torch.cat([x / (1 + sigma**2) ** 0.5, level], dim=1)
        for w in layers[:-1]:
            h = torch.nn.functional.silu(h @ w)
        return h @ layers[-1] / sigma - x / (1 + sigma**2)

    return score


def predictor_corrector(score: Score, x: torch.Tensor, rho: np.ndarray) -> torch.Tensor:
    for r, lower in itertools.pairwise(rho):
        s, z = score(x, r), torch.randn_like(x)
        step = 2 * (0.16 * z.norm(dim=1).mean() / s.norm(dim=1).mean()) ** 2
        x = x + step * s + (2 * step) ** 0.5 * z
        change = r**2 - lower**2
        x = x + change * score(x, r) + change**0.5 * torch.randn_like(x)
    return x


def reverse_diffusion(score: Score, x: torch.Tensor, rho: np.ndarray) -> torch.Tensor:
    for r, lower in itertools.pairwise(rho):
        change = r**2 - lower**2
        x = x + change * score(x, r) + change**0.5 * torch.randn_like(x)
    return x


def ddim(score: Score, x: torch.Tensor, rho: np.ndarray) -> torch.Tensor:
    for r, lower in itertools.pairwise(rho):
        x = x - (lower - r) * r * score(x, r)
    return x


def dpm_solver(score: Score, x: torch.Tensor, rho: np.ndarray) -> torch.Tensor:
    last, old = 0.0, None
    for r, lower in itertools.pairwise(rho):
        h = np.log(r / lower)
        denoised = x + r**2 * score(x, r)
        ahead = denoised if old is None else denoised + 0.5 * h / last * (denoised - old)
        x, old, last = np.exp(-h) * x - np.expm1(-h) * ahead, denoised, h
    return x


def heun(score: Score, x: torch.Tensor, rho: np.ndarray) -> torch.Tensor:
    for r, lower in itertools.pairwise(rho):
        slope = -r * score(x, r)
        ahead = x + (lower - r) * slope
        x = x + 0.5 * (lower - r) * (slope - lower * score(ahead, lower))
    return x


SAMPLERS = {
    "ddim": ddim,
    "dpm++2m": dpm_solver,
    "edm_heun": heun,
    "predictor_corrector": predictor_corrector,
    "reverse_diffusion": reverse_diffusion,
}


def draw(
    method: str, weights: list[np.ndarray], start: np.ndarray, rho: np.ndarray, threads: int
) -> tuple[float, np.ndarray]:
    """The seconds that a run took, and its draws."""
    torch.set_num_threads(threads)
    score, x = score_of(weights), torch.as_tensor(start)
    begin = time.perf_counter()
    with torch.inference_mode():
        x = SAMPLERS[method](score, x, rho)
    return time.perf_counter() - begin, x.numpy()


def log_prob(
    weights: list[np.ndarray], rows: np.ndarray, ends: tuple[float, float], tolerance: float, threads: int
) -> tuple[float, np.ndarray]:
    """The seconds that log densities (N,) took, and the values, with N(0, ρ²I) at the end and one probe."""
    torch.set_num_threads(threads)
    score, (n, d) = score_of(weights), rows.shape
    probe = torch.as_tensor(np.random.default_rng(0).choice([-1.0, 1.0], size=rows.shape).astype(np.float32))

    def flow(sigma: float, state: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(state[: n * d].reshape(n, d).astype(np.float32)).requires_grad_()
        with torch.enable_grad():
            speed = -sigma * score(x, sigma)
            (along,) = torch.autograd.grad((speed * probe).sum(), x)
        divergence = (along * probe).sum(1)
        return np.concatenate([speed.detach().numpy().ravel(), divergence.numpy()]).astype(np.float64)

    begin = time.perf_counter()
    start = np.concatenate([rows.ravel(), np.zeros(n)]).astype(np.float64)
    end = solve_ivp(flow, ends, start, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1]
    x, change = end[: n * d].reshape(n, d), end[n * d :]
    value = change - 0.5 * (x**2).sum(1) / ends[1] ** 2 - 0.5 * d * np.log(2 * np.pi * ends[1] ** 2)
    return time.perf_counter() - begin, value
