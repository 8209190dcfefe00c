"""What runs in PyTorch: torchebm's losses, the same by hand, and by hand compiled.

Its functions are called from the parent process: they take and return NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import grad

try:
    from torchebm.core import BaseModel
    from torchebm.losses import DenoisingScoreMatching, SlicedScoreMatching
    from torchebm.losses import ScoreMatching as ExactScoreMatching
except ImportError:  # `benchmarks.gpu` compares with PyTorch alone, too
    BaseModel = nn.Module
    DenoisingScoreMatching = SlicedScoreMatching = ExactScoreMatching = None

from benchmarks.peers.common import SIGMA, seconds_per_call

Weights = list[tuple[np.ndarray, np.ndarray]]  # (fan-in, fan-out) and (fan-out,) of each layer
Density = Callable[[Tensor], Tensor]  # the log density of each row, up to a constant
Loss = Callable[[Density, Tensor, Tensor], Tensor]  # of rows and random numbers, the mean over rows


# -- losses by hand, in autograd ------------------------------------------------------------------


def score(f: Density, x: Tensor) -> Tensor:
    return grad(f(x).sum(), x, create_graph=True)[0]


def dsm(f: Density, x: Tensor, noise: Tensor) -> Tensor:
    residual = score(f, (x + SIGMA * noise).requires_grad_()) + noise / SIGMA
    return 0.5 * residual.square().sum(-1).mean() - x.shape[1] / (2 * SIGMA**2)


def ssm_plain(f: Density, x: Tensor, v: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    slope = (score(f, x) * v).sum(-1)
    along = grad(slope.sum(), x, create_graph=True)[0]
    return (0.5 * slope.square() + (along * v).sum(-1)).mean()


def ssm_variance_reduced(f: Density, x: Tensor, v: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    s = score(f, x)
    along = grad((s * v).sum(), x, create_graph=True)[0]
    return (0.5 * s.square() + along * v).sum(-1).mean()


def ism(f: Density, x: Tensor, _: Tensor) -> Tensor:
    # In turn: all directions in one call (`is_grads_batched`) took 0.9 of the time at D = 16, and 1.25 at D = 64.
    x = x.detach().requires_grad_()
    s = score(f, x)
    diagonal = [grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return (0.5 * s.square().sum(-1) + torch.stack(diagonal).sum(0)).mean()


# -- the same in torch.func, as torch.compile cannot differentiate a call of autograd ------------------
# Forward mode would need less arithmetic. Compiled it fails in the backward pass ("ZeroTensors are immutable").


def score_and_pullback(f: Density, x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    return torch.func.vjp(torch.func.grad(lambda y: f(y).sum()), x)


def dsm_functional(f: Density, x: Tensor, noise: Tensor) -> Tensor:
    residual = torch.func.grad(lambda y: f(y).sum())(x + SIGMA * noise) + noise / SIGMA
    return 0.5 * residual.square().sum(-1).mean() - x.shape[1] / (2 * SIGMA**2)


def ssm_plain_functional(f: Density, x: Tensor, v: Tensor) -> Tensor:
    s, pullback = score_and_pullback(f, x)
    return (0.5 * (s * v).sum(-1).square() + (pullback(v)[0] * v).sum(-1)).mean()


def ssm_variance_reduced_functional(f: Density, x: Tensor, v: Tensor) -> Tensor:
    s, pullback = score_and_pullback(f, x)
    return (0.5 * s.square() + pullback(v)[0] * v).sum(-1).mean()


def ism_functional(f: Density, x: Tensor, _: Tensor) -> Tensor:
    row_score = torch.func.grad(lambda row: f(row).sum())
    trace = torch.vmap(lambda row: torch.func.jacrev(row_score)(row).diagonal().sum())(x)
    return (0.5 * torch.vmap(row_score)(x).square().sum(-1) + trace).mean()


# -- contestants ---------------------------------------------------------------------------------


class Energy(BaseModel):
    """What torchebm fits."""

    def __init__(self, log_density: nn.Module) -> None:
        super().__init__()
        self.log_density = log_density

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_density(x)


# torchebm draws directions as the signs of normal numbers, and so does all here: one set of numbers serves all.
DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "dsm": lambda x: torch.randn_like(x),
    "ssm": lambda x: torch.randn_like(x).sign(),
    "ssm-vr": lambda x: torch.randn_like(x).sign(),
    "ism": lambda x: x,  # not used
}
BY_HAND: dict[str, Loss] = {"dsm": dsm, "ssm": ssm_plain, "ssm-vr": ssm_variance_reduced, "ism": ism}
FUNCTIONAL: dict[str, Loss] = {
    "dsm": dsm_functional,
    "ssm": ssm_plain_functional,
    "ssm-vr": ssm_variance_reduced_functional,
    "ism": ism_functional,
}
TORCHEBM: dict[str, Callable[[BaseModel], nn.Module]] = {
    "dsm": partial(DenoisingScoreMatching, noise_scale=SIGMA),
    "ssm": partial(SlicedScoreMatching, n_projections=1),
    "ism": ExactScoreMatching,
}


@dataclass(frozen=True)
class Contestant:
    network: nn.Sequential
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor], Tensor]

    def load(self, weights: Weights) -> None:
        linear = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, (weight, bias) in zip(linear, weights, strict=True):
                layer.weight.copy_(torch.tensor(weight).T)
                layer.bias.copy_(torch.tensor(bias))

    def step(self, x: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        return loss.item()


@cache
def contestant(who: str, key: str, sizes: tuple[int, ...]) -> Contestant:
    layers = [part for m, n in pairwise(sizes) for part in (nn.Linear(m, n), nn.SiLU())]
    network = nn.Sequential(*layers[:-1], nn.Flatten(0))
    loss: Callable[[Tensor], Tensor]
    if who == "torchebm":
        loss = TORCHEBM[key](Energy(network))
    else:
        by_hand = BY_HAND[key]
        if who == "compiled":
            # For these shapes alone: of several it would make one slower function.
            by_hand = torch.compile(FUNCTIONAL[key], fullgraph=True, dynamic=False)

        def loss(x: Tensor) -> Tensor:
            return by_hand(network, x, DRAWS[key](x))

    # The rate is that of benchmarks.problem. Fused is the fastest of torch's forms of Adam.
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    return Contestant(network, optimizer, loss)


def ready(who: str, key: str, weights: Weights) -> Contestant:
    made = contestant(who, key, (*(len(weight) for weight, _ in weights), 1))
    made.load(weights)
    return made


# -- called from the parent ------------------------------------------------------------------------


def use_gpu() -> str:
    """Puts everything on the GPU, multiplied in TF32; its name, or nothing where PyTorch has none."""
    if not torch.cuda.is_available():
        return ""
    torch.set_default_device("cuda")
    torch.set_float32_matmul_precision("high")
    return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"


def describe() -> str:
    return f"PyTorch {torch.get_num_threads()} threads within an operation"


def value_and_grad(who: str, key: str, weights: Weights, x: np.ndarray, noise: np.ndarray) -> tuple[float, Weights]:
    """The mean loss at these weights and random numbers, and its gradient."""
    made = ready(who, key, weights)
    made.optimizer.zero_grad()
    given = torch.tensor(noise)
    with mock.patch.object(torch, "randn_like", lambda *_, **__: given.clone()):
        value = made.loss(torch.tensor(x))
    value.backward()
    linear = [layer for layer in made.network if isinstance(layer, nn.Linear)]
    return value.item(), [(layer.weight.grad.T.numpy(), _grad_or_zero(layer.bias)) for layer in linear]


def _grad_or_zero(parameter: Tensor) -> np.ndarray:
    # Autograd leaves out the last bias, on which no score depends.
    return np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()


def seconds_per_step(who: str, key: str, weights: Weights, x: np.ndarray, block: float) -> float:
    made, rows = ready(who, key, weights), torch.tensor(x)
    return seconds_per_call(lambda: made.step(rows), block)


class Isotropic(BaseModel):
    """E(x) = ½a‖x‖² at a = 0."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float64)
        self.a = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.a * x.square().sum(-1)


SLOPES: dict[str, Callable[..., nn.Module]] = {
    "ISM": ExactScoreMatching,
    "ISM, approximate": partial(ExactScoreMatching, hessian_method="approx"),
    "SSM, plain, rademacher": partial(SlicedScoreMatching, n_projections=1),
    "SSM, plain, gaussian": partial(SlicedScoreMatching, n_projections=1, projection_type="gaussian"),
    "SSM, plain, sphere": partial(SlicedScoreMatching, n_projections=1, projection_type="sphere"),
    "DSM, plain": partial(DenoisingScoreMatching, noise_scale=SIGMA),
}


def slopes_at_zero(batches: np.ndarray) -> dict[str, np.ndarray]:
    """dJ/da of each of torchebm's losses at the flat density, for each batch of rows."""
    torch.manual_seed(0)

    def slope(make: Callable[..., nn.Module], rows: np.ndarray) -> float:
        model = Isotropic()
        loss = make(model, dtype=torch.float64)(torch.tensor(rows))
        return grad(loss, model.a)[0].item()

    return {name: np.array([slope(make, rows) for rows in batches]) for name, make in SLOPES.items()}
