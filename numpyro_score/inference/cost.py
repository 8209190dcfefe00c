"""What a fit has cost."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from numpyro_score.energy import AnyEnergy, Energies, part
from numpyro_score.losses import (
    CD,
    DSM,
    ESM,
    FSM,
    ISM,
    NCE,
    PCD,
    SSM,
    ContinuousDSM,
    DiscreteFisher,
    KLContraction,
    Loss,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
    loss_for,
)

__all__ = ["FitCost", "evaluations_per_row", "with_cost"]


class FitCost(NamedTuple):
    """What a run has cost."""

    seconds: float  # of wall clock, compilation and checks included
    compile_seconds: float  # of them, in XLA's compiler
    device: str  # that holds the parameters, as JAX names its kind, e.g. "cpu"
    peak_memory: int | None  # bytes of that device in use at most since the process began; None where it keeps no count
    gradient_evaluations: float | None  # for each row of a step's data, in all steps; see `evaluations_per_row`


def evaluations_per_row(loss: Loss, energy: AnyEnergy, num_rows: int) -> float | None:
    """Evaluations of the log density in one step of a fit, for each row of the data in it.

    Counted as one each, at a point: a value, a score, and a second derivative along one direction. The gradient in
    the parameters then passes back through them, at a cost that is proportional. So for

    - ISM: D + 2, for the value, D directions and the Laplacian that pass through together;
    - SSM: 1 + M, for the score and M directions;
    - DSM: a score at the noisy row, another with `control_variate` or `antithetic`, times the levels if `levels="all"`;
      ContinuousDSM: a score, two with `antithetic`;
    - FSM: 2 M values, and one at the row itself if `sigma` is not given;
    - ESM: one score. KLContraction: M + 1 values. NCE: 1 + ν values;
    - CD: k scores along the chain, and two values; PCD: C chains for N rows, 1 + (k + 1) C / N. The one score more of a
      Metropolis correction is not counted;
    - the losses for discrete data: what their method `evaluations` says.

    None for a loss that is not the package's, and for data in several plates.

    Args:
        loss: the loss.
        energy: of a fit.
        num_rows: N, of the data of a step.
    """
    if isinstance(energy, Energies):
        return None
    loss = loss_for(loss, energy)
    count: float
    match loss:
        case ISM():
            count = energy.dim + 2
        case SSM():
            count = 1 + loss.num_projections
        case DSM():
            levels = len(loss.sigma) if isinstance(loss.sigma, tuple) and loss.levels == "all" else 1
            count = levels * (2 if loss.control_variate or loss.antithetic else 1)
        case ContinuousDSM():
            count = 1 + loss.antithetic
        case FSM():
            count = 2 * loss.num_projections + (loss.sigma is None)
        case ESM():
            count = 1
        case KLContraction():
            count = 1 + loss.num_samples
        case NCE():
            count = 1 + loss.num_noise
        case CD():
            count = 2 + loss.num_steps
        case PCD():
            count = 1 + (loss.num_steps + 1) * loss.num_chains / num_rows
        case PseudoLikelihood() | PairLikelihood() | RatioMatching() | DiscreteFisher():
            count = loss.evaluations(energy)
        case Mixed():
            smooth = evaluations_per_row(loss.continuous, part(energy, discrete=False), num_rows)
            ratios = evaluations_per_row(loss.discrete, energy, num_rows)
            return None if smooth is None or ratios is None else smooth + ratios
        case _:
            return None
    return float(count)


def with_cost(run: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a method `run` return its result with the field `cost`.

    The object has a method `_evaluations(result)`, the evaluations of one step for each row, or None.
    """

    @functools.wraps(run)
    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiling: list[float] = []
        thread = threading.get_ident()

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == thread:
                compiling.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        begin = time.perf_counter()
        try:
            result = run(self, *args, **kwargs)
            jax.block_until_ready(result.params)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        seconds = time.perf_counter() - begin
        device = next(d for d in result.state.rng_key.devices() if d.process_index == jax.process_index())
        per_step = self._evaluations(result)
        evaluations = None if per_step is None else per_step * len(result.losses)
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return dataclasses.replace(result, cost=FitCost(seconds, sum(compiling), device.device_kind, peak, evaluations))

    return measured
