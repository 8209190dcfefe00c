"""The same chains by torchebm. It runs in a process of its own."""

from __future__ import annotations

import time

import numpy as np
import torch
from torchebm.core import BaseModel
from torchebm.samplers import LangevinDynamics


class Mixture(BaseModel):
    def __init__(self, centers: np.ndarray) -> None:
        super().__init__()
        self.centers = torch.tensor(centers)  # on the default device
        self.half = 0.5 * self.centers.square().sum(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.square().sum(-1) - torch.logsumexp(x @ self.centers.T - self.half, -1)


def seconds(
    centers: np.ndarray, num_chains: int, num_steps: int, step_size: float, threads: int
) -> tuple[float, np.ndarray]:
    """The time of one run that keeps all draws, and the variances of the last."""
    torch.set_num_threads(threads)
    sampler = LangevinDynamics(Mixture(centers), step_size=step_size)
    begin = time.perf_counter()
    draws = sampler.sample(x=torch.zeros(num_chains, 2), n_steps=num_steps, return_trajectory=True)
    variance = draws[:, -1].var(0).cpu()  # waits for a GPU
    elapsed = time.perf_counter() - begin
    return elapsed, variance.numpy()
