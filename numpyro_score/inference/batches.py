"""Fits to batches of rows that come one after the other, of data that memory does not hold."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_score.energy import join_arrays, layouts_kept, with_outside
from numpyro_score.inference.arguments import GUIDES_WITH_DENSITY, check_memory
from numpyro_score.inference.arrival import warn_at_end, warn_of_density
from numpyro_score.inference.checkpoint import Checkpoint
from numpyro_score.inference.cost import with_cost
from numpyro_score.inference.failure import explain
from numpyro_score.inference.held_out import HeldOut
from numpyro_score.inference.loop import Course, NonFiniteLossError, check_num_steps, next_size, strongly_typed
from numpyro_score.inference.optim import check_state, current_params
from numpyro_score.inference.processes import agreed, gathered, interrupts, is_first, require_common
from numpyro_score.inference.reading import END, Batch, Prefetched, Source
from numpyro_score.inference.result import ScoreMatchingResult
from numpyro_score.losses.base import at_least_one
from numpyro_score.placement import Places, fetch, places_of
from numpyro_score.random import Key, as_key

__all__ = ["FromBatches"]

_ON_DEVICE = 2  # steps that the device has been given, and not finished: one at work, and the next


class FromBatches:
    """The part of :class:`~numpyro_score.ScoreMatching` that fits batch by batch."""

    @layouts_kept()
    @with_cost
    def run_batches(
        self: Any,
        rng_key: Key,
        batches: Iterable[Any],
        *,
        num_rows: int | None = None,
        num_steps: int | None = None,
        prefetch: int = 2,
        held_out: Any = None,
        held_out_every: int = 100,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 30.0,
        progress_bar: bool = True,
        init_state: Any = None,
        init_params: dict[str, Any] | None = None,
    ) -> ScoreMatchingResult:
        r"""Fits the model to data that come in batches, a step for each.

        A thread reads them ahead and moves them to the device. With N rows in all and n in a batch, a step descends

        .. math:: \frac{N}{n} \beta \sum_{i \in \text{batch}} \ell_i(\theta) - \log \pi_0(\theta),

        as with a plate of N rows and a subsample of n. That is without bias where batches are drawn evenly.
        There is no closed form; see :class:`~numpyro_score.QuadraticLoss` for one that adds up over batches.

        Args:
            rng_key: a key for the starting point and the loss's random numbers.
            batches: any iterable of the model's data: arrays, or tuples of the model's positional arguments, all of
                one shape and dtype.
            num_rows: N; without it, a batch stands for itself, and any prior weighs against its rows alone.
            num_steps: batches to take. An iterable that ends before starts anew, where it can: an iterator cannot.
                Default: one pass, of which the default optimiser needs the length. The object's `num_steps` is
                not used.
            prefetch: batches that may wait on the device, beside at most two in use.
            held_out: rows that no batch holds, as an array or tuple like a batch, of any length. Their mean loss at the
                estimates, without the prior and with the same random numbers each time, is in the result's `held_out`
                and in the bar.
            held_out_every: steps from one look at them to the next.
            checkpoint: a directory to save the run in, as in `run`, with the position among the batches that steps
                were taken on: what `get_state()` of the iterator gives, JSON or bytes, or the number of batches where
                the iterable has a length; passes must then keep their order.
            checkpoint_every: seconds between two saves, at least.
            progress_bar: whether to show one.
            init_state: go on from this `SVIState`, e.g. `fit.state`. The default optimiser starts its rate anew.
            init_params: initial values of param sites, of the model or the guide.

        Returns:
            The fit. Its `args` are the last batch, and so `fit.energy`, `fit.stderr()`, `fit.influence()` and draws
            from the sandwich are of those rows alone; `fit.over_batches` gives errors of all rows.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; the exception holds the last finite state.
            ValueError, TypeError: for batches that differ in shape or dtype, and a checkpoint that they cannot go on
                from. What `batches` raises itself comes with a note of the step.
            OSError: if the checkpoint cannot be read or written.

        Warns:
            UserWarning: if the loss was still falling at the end; if the last batch has too few points of latent sites,
                or draws of missing cells.
        """
        if isinstance(self.learning_rate, str):
            raise ValueError(
                "learning_rate='calibrated' needs all rows at once: write ScoreMatching(..., learning_rate=1.0), or "
                "the number that fit.calibrated_learning_rate() gives for as many rows as fit in memory."
            )
        if isinstance(self.guide, GUIDES_WITH_DENSITY):
            name = type(self.guide).__name__
            raise NotImplementedError(f"{name} keeps the density of the first batch: use guide=AutoNormal, or run.")
        total = None if num_steps is None else check_num_steps(num_steps)
        source = Source(batches, repeat=total is not None, positions=checkpoint is not None)
        total = source.length if total is None else total
        if len(lengths := np.unique(gathered(-1 if total is None else total))) > 1:
            raise ValueError(
                f"The processes have {' and '.join(map(str, lengths))} batches: give all as many, or pass num_steps=..."
            )
        if total is None and self._default_optim:
            raise ValueError(
                "The default optimiser needs to know how many batches there are, and these have no length: pass "
                "num_steps=..., or an optimiser, e.g. ScoreMatching(model, optim=optax.adam(1e-3))."
            )
        reader = Prefetched(
            source, total if num_steps is not None else None, at_least_one("run_batches", "prefetch", prefetch)
        )
        rng_key = as_key(rng_key, "write run_batches(jax.random.key(0), batches)")
        try:
            first = reader.first()
        except BaseException as error:  # which the other processes are to know of
            first = error
        first = _in_all(first, 0)
        if isinstance(first, BaseException):
            raise first
        if first is END:
            raise ValueError("batches has none: give at least one, an iterator anew as it can be used only once.")
        alike = dict(key=rng_key, num_steps=num_steps, num_rows=num_rows, loss=self.score_loss)
        require_common("run_batches", first.arrays, **alike, init_params=init_params)
        state = self.init(rng_key, *first.args, init_params=init_params)
        if self._num_plates > 1:
            raise NotImplementedError(
                f"run_batches reads rows of one plate, and the data stand in {self._num_plates}: give run all rows."
            )
        weight = _weight(num_rows, self._shape[1], getattr(self.guide, "prototype_trace", None) or {})
        state = self._laid_out(strongly_typed(state if init_state is None else init_state), first.arrays)
        check_memory(state, self.score_loss, self._mutable)
        check_state("run_batches", self, state.optim_state)
        start = int(state.optim_state[0])
        own = dict(loss=self.score_loss, learning_rate=self.learning_rate, average=self.average)
        options = dict(num_steps=num_steps, num_rows=num_rows, start=start, rng_key=rng_key)
        course = Course(self.constrain_fn.args[0], start, total or 1, self.learning_rate * weight)
        args: Any = first.args
        like: Any = 0.0
        held = None
        if held_out is not None:
            held = HeldOut(self, held_out, held_out_every, rng_key, course, state)
            args, like, options = (args, held.args), (0.0, 0.0), options | {"held_out_every": held.every}
        kept = Checkpoint.of(
            checkpoint, checkpoint_every, "ScoreMatching.run_batches", args, like, begin=(self, state), **own, **options
        )
        static = with_outside(first.static, self.score_model, self.score_loss)
        step = partial(self._step_batch, course, static=static, places=places_of(first.arrays))
        loop = _Loop(step, state, first, None if num_steps is None else total, partial(_failure, self), held)
        del first, state, args  # which take memory that the steps may need
        losses = loop.run(reader, kept, tqdm(total=total, disable=not progress_bar or not is_first()))
        state = loop.at.state
        if not loop.interrupted:
            warn_at_end(self, state, losses, num_rows or self._shape[1])
        params, args = self.get_params(state), loop.at.batch.args
        looks = None if held is None else loop.looks()
        fit = ScoreMatchingResult(params, state, losses, self, args, {}, loop.interrupted, held_out=looks)
        if self._approximates:
            warn_of_density(self.score_loss, fit)
        return fit

    def _step_impl(
        self: Any, course: Course, arrays: Any, state: Any, *, static: Any, places: Places
    ) -> tuple[Any, Array]:
        """One step on one batch: the new state, and the loss before it."""
        args, kwargs = join_arrays(arrays, static)
        return self._stepping(course, places).update(state, *args, **kwargs)


def _in_all(item: Any, taken: int) -> Any:
    """A batch, `END` or an error in reading: of one kind in all processes, as a step needs a batch of each."""
    failed = isinstance(item, BaseException)
    kinds = gathered(2 if failed else int(item is END))[:, 0]
    if failed or not kinds.any():
        return item
    if (kinds == 2).any():
        return RuntimeError(
            f"The batches of process {np.argmax(kinds == 2)} raised an error at step {taken}, which it tells: "
            "a step needs a batch of each process."
        )
    if kinds.all():
        return END
    return ValueError(
        f"The batches of process {np.argmax(kinds)} ended after {taken} steps, and those of process {np.argmin(kinds)} "
        "did not: give all processes as many."
    )


def _weight(num_rows: Any, n: int, sites: dict[str, Any]) -> float:
    """N/n, or 1 without N; raises ValueError for an N below n, and rows that the model weighs already."""
    if num_rows is not None and at_least_one("run_batches", "num_rows", num_rows) < n:
        raise ValueError(f"num_rows={num_rows} is less than the {n} rows of a batch: give the rows of all batches.")
    for name, site in sites.items():
        if site["type"] == "plate" and len(site["value"]) != site["args"][0] and num_rows is not None:
            raise ValueError(
                f"The model subsamples the plate '{name}', which weighs its rows already: leave out subsample_size, "
                "or num_rows."
            )
    return 1.0 if num_rows is None else num_rows / n


def _failure(svi: Any, failing: Any, last: Any, step: int, batch: Batch, losses: np.ndarray) -> NonFiniteLossError:
    given = [v for v in batch.arrays if jnp.issubdtype(v.dtype, jnp.inexact) and v.ndim]
    wrong = [~jnp.isfinite(v.reshape(len(v), -1)).all(-1) for v in given]
    found = [(*fetch((bad.sum(), bad.argmax())), len(bad)) for bad in wrong]
    if bad := next((f for f in found if f[0]), None):
        cause = f"its data are NaN or infinite in {bad[0]} of {bad[2]} rows, first row {bad[1]}"
    else:
        params = svi.constrain_fn(current_params(svi.optim, failing.optim_state))
        cause = explain(ScoreMatchingResult(params, failing, np.zeros(0), svi, batch.args, {}))
    return NonFiniteLossError(
        f"The loss is {losses[-1]} at step {step}, on batch {batch.number} of its pass: {cause}. The last finite state "
        "is in the exception's `state`; a smaller step size or other init_params may help.",
        step, last, svi.get_params(last), losses[:-1],
    )  # fmt: skip


class _At(NamedTuple):
    """Where a run is; one value, so that Ctrl-C finds it whole."""

    state: Any
    done: int
    batch: Batch  # the last that a step was taken on


class _Loop:
    """Steps on batches, two of them given to the device at a time, and a look at each loss one step later.

    Args:
        step: compiled, from the arrays of a batch and a state to the new state and the loss.
        state: the first state.
        first: the first batch.
        num_steps: steps; None to go on to the last batch.
        failure: the error for a loss that is not finite.
        held_out: rows to look at.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        state: Any,
        first: Batch,
        num_steps: int | None,
        failure: Callable[..., Exception],
        held_out: HeldOut | None,
    ) -> None:
        self.step, self.num_steps, self.failure, self.held_out = step, num_steps, failure, held_out
        self.at, self.interrupted = _At(state, 0, first), False
        self.losses: list[float] = []
        self.seen: dict[int, float] = {}  # losses of the rows held out, by the steps taken
        self._pending: deque[tuple[int, Any, Any, Batch]] = deque()  # steps whose losses were not looked at
        self._before: Any = None  # the state before the last step whose loss was

    def run(self, reader: Prefetched, checkpoint: Checkpoint | None, bar: Any) -> np.ndarray:
        """Takes the steps, from what the checkpoint has on: the losses."""
        with checkpoint or contextlib.nullcontext():
            position = None
            if checkpoint is not None:
                done, state, values = checkpoint.start(self.at.state)
                self.at, position = _At(state, done, self.at.batch), checkpoint.position
                if self.held_out is not None:
                    self.seen = {i + 1: float(v) for _, seen in values for i, v in enumerate(seen) if not np.isnan(v)}
                    values = [losses for losses, _ in values]
                self.losses = [float(v) for chunk in values for v in chunk]
                bar.update(done)
            reader.start(self.at.done, position)
            error = None
            try:
                with bar, interrupts() as interrupted:
                    error = self._take_steps(reader, checkpoint, bar, interrupted)
            except KeyboardInterrupt:
                if not self.at.done:
                    raise
                self.interrupted = True
                if is_first():
                    of = "" if self.num_steps is None else f" of {self.num_steps}"
                    warnings.warn(f"Interrupted after {self.at.done}{of} steps; this is the fit so far.", stacklevel=5)
            finally:
                reader.stop()
            self._look(0)
            if checkpoint is not None and self.at.done:
                checkpoint.save(self.at.done, self.at.state, self._fresh(checkpoint.saved), self.at.batch.position)
            if error is not None:
                raise error
        return self._values()

    def _take_steps(
        self, reader: Prefetched, checkpoint: Checkpoint | None, bar: Any, interrupted: Callable[[], bool]
    ) -> BaseException | None:
        """Until the end, or an error in the batches."""
        shown, size, begin = self.at.done, 1, time.perf_counter()
        while self.num_steps is None or self.at.done < self.num_steps:
            batch = _in_all(reader.take(), self.at.done)
            if isinstance(batch, BaseException):
                return batch
            if batch is END:
                return None if self.num_steps is None else self._early()
            state, done = self.at.state, self.at.done
            new, loss = self.step(batch.arrays, state)
            self._pending.append((done, loss, state, batch))
            self.at = _At(new, done + 1, batch)
            self._look(_ON_DEVICE - 1)
            if self.held_out is not None and self.at.done % self.held_out.every == 0:
                self.seen[self.at.done] = self.held_out.look(new)
            if self.at.done - shown < size:
                continue
            mean = np.mean(self.losses[shown:] or self.losses[-1:] or [np.nan])
            held = f", held out: {next(reversed(self.seen.values())):.4f}" if self.seen else ""
            bar.set_postfix_str(f"init loss: {(self.losses or [np.nan])[0]:.4f}, loss: {mean:.4f}{held}", refresh=False)
            bar.update(size)
            # Step counts are those of process 0, as clocks differ.
            size = next_size(size, time.perf_counter() - begin) if shown else 8
            save = checkpoint is not None and checkpoint.due()
            size, save, stop = agreed(size, save, interrupted())
            if stop:
                raise KeyboardInterrupt
            if save and checkpoint is not None:
                self._look(0)
                checkpoint.save(self.at.done, self.at.state, self._fresh(checkpoint.saved), batch.position)
            shown, begin = self.at.done, time.perf_counter()
        return None

    def _look(self, left: int) -> None:
        """Waits for all but the `left` last steps, and raises at a loss that is not finite."""
        while len(self._pending) > left:
            step, loss, state, batch = self._pending[0]
            self.losses[step:] = [float(loss)]
            if not math.isfinite(self.losses[-1]):
                last = state if self._before is None else self._before
                raise self.failure(state, last, step, batch, np.array(self.losses, jnp.result_type(float)))
            self._before = state
            self._pending.popleft()

    def looks(self) -> np.ndarray:
        """Steps taken and the loss of the rows held out there, (K, 2); the last is after the last step."""
        assert self.held_out is not None
        at = self.seen if self.at.done in self.seen else {**self.seen, self.at.done: self.held_out.look(self.at.state)}
        return np.array(list(at.items()), jnp.result_type(float))

    def _fresh(self, since: int) -> Any:
        """What is kept of each step since the last save, after `since` steps; no loss of rows held out is NaN."""
        losses = np.array(self.losses[since : self.at.done], jnp.result_type(float))
        if self.held_out is None:
            return losses
        return losses, np.array([self.seen.get(i + 1, np.nan) for i in range(since, self.at.done)])

    def _values(self) -> np.ndarray:
        return np.array(self.losses[: self.at.done], jnp.result_type(float))

    def _early(self) -> ValueError:
        done = self.at.done
        return ValueError(
            f"batches ended after {done} batches, before num_steps={self.num_steps}: pass num_steps={done}, or a list "
            "or another iterable that can start anew."
        )
