"""The methods that draw by diffusion, by name and with their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from numpyro_score.diffusion.end import NoisyNormal
from numpyro_score.diffusion.grids import Levels
from numpyro_score.diffusion.steps import (
    Corrected,
    HeunPlan,
    LangevinPlan,
    LinearPlan,
    Step,
    ddim,
    ddpm,
    ddpm_covariance,
    dpm_2m,
    euler_maruyama,
    exp_ab3,
    heun_step,
    linear_step,
    probability_flow,
    reverse_diffusion,
    sde_dpm_2m,
)
from numpyro_score.energy import plural
from numpyro_score.losses.base import as_numbers, positive, set_counts

__all__ = ["METHODS", "EDMHeun", "Linear", "Method", "PredictorCorrector", "method_named"]

_MOST_CHURN = np.sqrt(2.0) - 1  # Karras et al. 2022
_MOST_GROWTH = 2.5  # at which they are as good as on the other grids; at 3.7 exp_ab3 is worse than ddim


@runtime_checkable
class Method(Protocol):
    """A way from noise to data: what is compiled once, and what it reads of its grid."""

    @property
    def step(self) -> Step:
        """One step; equal methods have equal steps, whatever the values of their settings."""

    @property
    def memory(self) -> int:
        """How many earlier values of D(u) a step reads."""

    @property
    def calls(self) -> int:
        """Calls of the model in one step."""

    def plan(self, levels: Levels, end: NoisyNormal) -> Any:
        """What the steps read, a pytree of arrays (S, ...)."""


@dataclass(frozen=True, repr=False)
class Linear:
    """A method of one call, linear in u, the last few D(u) and the noise: see :mod:`~numpyro_score.diffusion.steps`."""

    name: str
    factors: Callable[[Levels, NoisyNormal], LinearPlan]
    memory: int = 0

    step = staticmethod(linear_step)
    calls = 1

    def __repr__(self) -> str:
        return repr(self.name)

    def plan(self, levels: Levels, end: NoisyNormal) -> LinearPlan:
        """The factors.

        Raises:
            ValueError: where D is extrapolated, and a step in log ρ is more than 2.5 times the one before, or there
                is no step for the full order.
        """
        if levels.num_steps <= self.memory:
            raise ValueError(
                f"Method '{self.name}' extrapolates from {plural(self.memory, 'step')} before, and there "
                f"{'is 1 step' if levels.num_steps == 1 else f'are {levels.num_steps}'} in all: take {self.memory + 1} "
                "or more, or a method without memory such as 'ddim'."
            )
        h = -np.diff(np.log(levels.rho))
        growth = h[1:] / h[:-1]
        if self.memory and growth.size and growth.max() > _MOST_GROWTH:
            i = int(np.argmax(growth))
            raise ValueError(
                f"Method '{self.name}' extrapolates from the steps before, and step {i + 1} of the grid is "
                f"{growth[i]:.1f} times as long in log noise as the one before, more than 2.5: write grid='karras' or "
                "'log_snr', or take a method without memory such as 'ddim'."
            )
        return self.factors(levels, end)


@dataclass(frozen=True)
class EDMHeun:
    """Heun's method along the probability flow, with noise added before each step if asked [Karras et al. 2022].

    Two calls a step; the last step too, which ends at the smallest noise and not at zero.

    Args:
        churn: how much noise is added over all steps; 0 is the deterministic flow. Within `churn_range` the level
            rises by the factor 1 + min(churn / steps, √2 − 1) before each step, and never above the largest level.
        churn_range: the levels at which it is.
        churn_noise: a factor of the added noise; a little above 1 makes up for networks that denoise too much.

    Raises:
        ValueError, TypeError: for a negative churn, a churn_noise that is not positive, or a range that does not rise.
    """

    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, np.inf)
    churn_noise: float = 1.0

    step = staticmethod(heun_step)
    memory = 0
    calls = 2

    def __post_init__(self) -> None:
        if isinstance(self.churn, bool) or self.churn != 0:
            positive("EDMHeun", "churn, or 0 for none", self.churn)
        positive("EDMHeun", "churn_noise", self.churn_noise)
        ends = as_numbers("EDMHeun", "churn_range=(low, high)", self.churn_range)
        if ends.shape != (2,) or not 0 <= ends[0] < ends[1]:
            raise ValueError(f"EDMHeun needs churn_range=(low, high) of rising noise levels, got {self.churn_range}.")

    def plan(self, levels: Levels, end: NoisyNormal) -> HeunPlan:
        """The levels before and after noise is added."""
        rho = levels.rho[:-1]
        if self.churn == 0:
            return HeunPlan(rho, levels.rho[1:], None)
        low, high = self.churn_range
        rise = min(self.churn / levels.num_steps, _MOST_CHURN)
        raised = np.minimum(np.where((rho >= low) & (rho <= high), 1 + rise, 1.0) * rho, levels.rho[0])
        return HeunPlan(raised, levels.rho[1:], self.churn_noise * np.sqrt(raised**2 - rho**2))


@dataclass(frozen=True)
class PredictorCorrector:
    r"""A step of any method, and then Langevin steps at the level that it has reached [Song et al. 2021, algorithm 1].

    .. math:: u \leftarrow u + h \nabla \log q_\rho(u) + \sqrt{2h}\, z, \qquad h = 2\, (\text{snr} \cdot \rho)^2.

    The step size is a function of the level alone. Song et al. take :math:`h = 2 (\text{snr} \|z\| / \|s\|)^2` with
    means over the batch, which makes the draws depend on each other; where D is large, that is the same, as
    :math:`\|s\| \approx \sqrt D / \rho`. Taking it for each chain is no remedy: steps that depend on the state
    leave another law stationary, the density times :math:`\|s\|^2`.

    Args:
        predictor: a method or its name; None for Langevin steps alone: annealed Langevin dynamics, where
            h = 0.1 ρ² in Song & Ermon 2019 is snr = 0.22.
        num_corrector_steps: Langevin steps at each level, of one call each.
        snr: the length of the step's drift over that of its noise, below 1. As
            :math:`\nabla^2 \log q_\rho = -I/\rho^2 + \mathrm{Cov}(x \mid u)/\rho^4`, the density is nowhere more
            curved than the noise alone, for which steps below :math:`2\rho^2` are stable. There they leave the
            variance :math:`\rho^2/(1 - \text{snr}^2)`: 3% too much at 0.16, a third at 0.5.

    Raises:
        ValueError, TypeError: for settings that are not positive, an snr of 1 or more, or an unknown predictor.
    """

    predictor: Any = "reverse_diffusion"
    num_corrector_steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        set_counts(self, "num_corrector_steps")
        positive("PredictorCorrector", "snr", self.snr)
        if self.snr >= 1:
            raise ValueError(
                f"PredictorCorrector needs an snr below 1, got {self.snr}: its steps of 2 (snr ρ)² are stable below "
                "2 ρ², and beyond chains run away where the data are narrow beside their noise; take 0.1 to 0.3."
            )
        if self.predictor is not None:
            object.__setattr__(self, "predictor", method_named(self.predictor))

    @property
    def step(self) -> Step:
        """The predictor's step and the corrector's."""
        predict = None if self.predictor is None else self.predictor.step
        return Corrected(predict, self.num_corrector_steps)

    @property
    def memory(self) -> int:
        """The predictor's."""
        return 0 if self.predictor is None else self.predictor.memory

    @property
    def calls(self) -> int:
        """The predictor's and the corrector's."""
        return (0 if self.predictor is None else self.predictor.calls) + self.num_corrector_steps

    def plan(self, levels: Levels, end: NoisyNormal) -> LangevinPlan:
        """The predictor's plan, levels and step sizes."""
        predictor = None if self.predictor is None else self.predictor.plan(levels, end)
        rho = levels.rho[1:]
        return LangevinPlan(predictor, rho, 2 * (self.snr * rho) ** 2)


_LINEAR = [
    Linear("ddim", ddim),
    Linear("probability_flow", probability_flow),
    Linear("euler_maruyama", euler_maruyama),
    Linear("reverse_diffusion", reverse_diffusion),
    Linear("ddpm", ddpm),
    Linear("ddpm_covariance", ddpm_covariance),
    Linear("dpm++2m", dpm_2m, memory=1),
    Linear("sde_dpm++2m", sde_dpm_2m, memory=1),
    Linear("exp_ab3", exp_ab3, memory=2),
]
METHODS: dict[str, Method] = {m.name: m for m in _LINEAR}


def method_named(method: str | Method) -> Method:
    """The method of a name, or the method itself."""
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if isinstance(method, Method) and not isinstance(method, type):
        return method
    raise ValueError(f"There is no diffusion method {method!r}: use one of {', '.join(map(repr, METHODS))}.")


METHODS["edm_heun"] = EDMHeun()
METHODS["edm_churn"] = EDMHeun(churn=10.0)
METHODS["predictor_corrector"] = PredictorCorrector()
METHODS["annealed_langevin"] = PredictorCorrector(None, 5, 0.22)
