"""The losses that are measured, each beside its hand-written twin, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from benchmarks import by_hand
from benchmarks.problem import OPTIMIZER, ROWS, SITE, WIDTH, Params, init_params, make_data, model
from numpyro_score import DSM, FSM, ISM, SSM, Energy, KLContraction, ScoreMatching

SIGMA, EPSILON, TIME, SAMPLES = 0.1, 0.05, 0.1, 4


@dataclass(frozen=True)
class Bounds:
    """The most that a step may cost at each dimension, in gradients of the mean energy."""

    flops: Callable[[int], float]
    time: Callable[[int], float | None]


@dataclass(frozen=True)
class Case:
    key: str
    name: str
    loss: Any
    by_hand: Callable[[int], by_hand.LossAndGrad]  # of the rows that are taken at once
    bounds: Bounds


CASES = (
    Case(
        "dsm",
        "DSM, plain",
        DSM(SIGMA, control_variate=False),
        partial(by_hand.dsm_plain, SIGMA),
        Bounds(flops=lambda d: 2.1, time=lambda d: 2.4),
    ),
    Case(
        "dsm-cv",
        "DSM, control variate",
        DSM(SIGMA),
        partial(by_hand.dsm_control_variate, SIGMA),
        Bounds(flops=lambda d: 4.1, time=lambda d: None),
    ),
    Case(
        "ssm",
        "SSM, plain",
        SSM(variance_reduced=False),
        by_hand.ssm_plain,
        Bounds(flops=lambda d: 3.9, time=lambda d: 3.0),
    ),
    Case(
        "ssm-vr",
        "SSM, variance-reduced",
        SSM(),
        lambda _: by_hand.ssm_variance_reduced(),
        Bounds(flops=lambda d: 4.2, time=lambda d: 3.9),
    ),
    Case(
        "fsm",
        "FSM, sliced",
        FSM(EPSILON),
        lambda _: by_hand.fsm_sliced(EPSILON),
        Bounds(flops=lambda d: 3.1, time=lambda d: None),
    ),
    Case(
        "fsm-dsm",
        "FSM, denoising",
        FSM(EPSILON, sigma=SIGMA),
        lambda _: by_hand.fsm_denoising(EPSILON, SIGMA),
        Bounds(flops=lambda d: 2.1, time=lambda d: None),
    ),
    Case(
        "kl",
        f"KL contraction, {SAMPLES} samples",
        KLContraction(TIME, SAMPLES),
        lambda _: by_hand.kl_contraction(TIME, SAMPLES),
        Bounds(flops=lambda d: SAMPLES + 2, time=lambda d: None),
    ),
    Case(
        "ism",
        "ISM",
        ISM(),
        by_hand.ism,
        Bounds(flops=lambda d: d + 3, time={16: 27.0, 64: 83.0}.get),
    ),
)


class Step(NamedTuple):
    """`call(state, x)` gives the next state and the loss."""

    call: Callable[[Any, Array], Any]
    state: Any


def rows_per_chunk(case: Case, dim: int) -> int:
    """The rows that the loss takes at once, and so its hand-written twin, too."""
    if not hasattr(case.loss, "rows_per_chunk"):
        return ROWS
    energy = Energy(model, {SITE: init_params(jax.random.key(0), dim)}, make_data(dim))
    rows = min(case.loss.rows_per_chunk(energy) or ROWS, ROWS)
    if ROWS % rows:
        raise SystemExit(f"D={dim}: chunks of {rows} do not divide {ROWS} rows; try a power of two.")
    return rows


def package_fit(loss: Any, width: int = WIDTH) -> ScoreMatching:
    return ScoreMatching(partial(model, width=width), optim=OPTIMIZER, loss=loss)


def package_step(case: Case, x: Array, width: int = WIDTH) -> Step:
    fit = package_fit(case.loss, width)
    return Step(fit.update, fit.init(jax.random.key(0), x))


def hand_step(case: Case, x: Array, width: int = WIDTH, rows: int | None = None) -> Step:
    """Of as many rows at once as are given, or as the package takes of the problem's own size."""
    dim = x.shape[1]
    step = by_hand.make_step(case.by_hand(rows_per_chunk(case, dim) if rows is None else rows))
    return Step(step, by_hand.init(jax.random.key(0), dim, width))


def disagreement(case: Case, x: Array) -> float:
    """How far one step of the package is from the hand-written one on the same random numbers.

    The larger of the relative differences of the loss and of the update, in Euclidean norm.
    """
    # The update is the gradient itself: Adam would blow up the rounding of a gradient that is zero on paper, as that of
    # the last bias is.
    fit = ScoreMatching(model, optim=optax.sgd(1.0), loss=case.loss)
    state = fit.init(jax.random.key(0), x)
    params: Params = fit.get_params(state)[SITE]
    new_state, loss = jax.jit(fit.update)(state, x)
    hand = jax.jit(case.by_hand(rows_per_chunk(case, x.shape[1])))
    hand_loss, grads = hand(params, x, _key_of_first_step(x))

    def flat(tree: Params) -> np.ndarray:
        return np.asarray(ravel_pytree(tree)[0])

    def difference(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    update = flat(params) - flat(fit.get_params(new_state)[SITE])
    return max(difference(loss, hand_loss), difference(update, flat(grads)))


class _KeySpy:
    """A loss that keeps the random key it is handed."""

    def __call__(self, energy: Energy, rng_key: Array) -> Array:
        jax.debug.callback(self._keep, jax.random.key_data(rng_key))
        return jnp.zeros(energy.num_rows)

    def _keep(self, bits: Array) -> None:
        self.key = jax.random.wrap_key_data(jnp.asarray(bits))


def _key_of_first_step(x: Array) -> Array:
    spy = _KeySpy()
    fit = package_fit(spy)
    fit.update(fit.init(jax.random.key(0), x), x)
    jax.effects_barrier()
    return spy.key
