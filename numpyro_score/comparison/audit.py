"""How good a loss's estimates are, for the model and the data at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, plural
from numpyro_score.generalized import GeneralizedModel
from numpyro_score.losses import DSM, FSM, ISM, SSM, Loss
from numpyro_score.losses.base import refuse_kinks
from numpyro_score.printed import settings
from numpyro_score.random import Key, as_key

__all__ = ["Audit", "AuditRow", "audit"]


@dataclass(frozen=True)
class AuditRow:
    """What was found of one loss, against exact implicit score matching on the same rows.

    Attributes:
        loss: the loss.
        bias: mean difference of its value from the exact one, over rows and draws.
        bias_error: the Monte Carlo standard error of `bias`.
        spread: standard deviation of a row's value over draws, in root mean square over rows.
        gradient_bias: ‖ḡ − g‖ in units of the standard error of g, √(tr S/N), with ḡ the mean over draws of the
            gradient of the mean loss, g the exact one, S the covariance of the exact gradients of single rows, and N
            all rows. What chance alone would add is subtracted.
        signal_to_noise: ‖g‖/√E‖g_k − ḡ‖² of single draws of a full-batch gradient. Zero at a minimum.
        inflation: by how much the loss's own randomness widens standard errors over those of exact score matching,
            √(1 + its variance over that between rows).
        cost: FLOPs of the gradient, in gradients of the mean log density; NaN where that is not known.
    """

    loss: Loss
    bias: float
    bias_error: float
    spread: float
    gradient_bias: float
    signal_to_noise: float
    inflation: float
    cost: float


@dataclass(frozen=True, repr=False)
class Audit:
    """What :func:`audit` returns; print it.

    Attributes:
        rows: one for each loss, in the order given.
        advice: sentences with what to choose.
        num_rows: the rows that were looked at.
        num_draws: independent random numbers for each row.
        total_rows: N, the rows of the data.
    """

    rows: tuple[AuditRow, ...]
    advice: tuple[str, ...]
    num_rows: int
    num_draws: int
    total_rows: int

    def __repr__(self) -> str:
        head = ("loss", "bias", "±", "spread", "gradient bias", "signal/noise", "inflation", "cost")
        cells = [head, *((settings(r.loss), *map(_figure, dataclasses.astuple(r)[1:])) for r in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        what = f"Against exact score matching, on {self.num_rows} of {self.total_rows} rows and {self.num_draws} draws:"
        return "\n".join([what, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *self.advice])


def audit(
    model: Callable[..., Any],
    loss: Loss | Sequence[Loss],
    *args: Any,
    params: dict[str, Any] | None = None,
    rng_key: Key | None = None,
    num_rows: int = 200,
    num_draws: int = 100,
    data: str | None = None,
    **kwargs: Any,
) -> Audit:
    """Measures bias and noise of one loss or several on a sample of rows, and says what to choose.

    The gradient is that in the constrained values of all parameters, at `params`. Advice is given for the number of
    projections (SSM), the step ε (FSM) and the noise level σ (DSM at one level), the last two from a few trials around
    the value of the loss. Costs about `num_draws` gradients of every loss and trial, and one of ISM, on the sample.

    Args:
        model: a NumPyro model, as for :class:`~numpyro_score.ScoreMatching`.
        loss: a pointwise objective, or several.
        *args: the model's arguments.
        params: where to look, e.g. `fit.estimates`; a draw from the prior if not given.
        rng_key: a key for the sample of rows and the losses' random numbers; `jax.random.key(0)` if not given.
        num_rows: rows in the sample; all rows of a model that cannot take another number of them.
        num_draws: independent random numbers for each row, at least 2.
        data: the name of the site or argument that is the data, where several could be.
        **kwargs: the model's keyword arguments.

    Raises:
        ValueError: for no loss, fewer than two rows or draws, a model without parameters, or CD, PCD and NCE, which are
            not on the scale of score matching.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from numpyro_score import SSM, audit
        >>> def model(x):
        ...     k = numpyro.param("k", jnp.array([[2.0, 0.5], [0.5, 1.0]]))
        ...     numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", x, k, x))
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> report = audit(model, [SSM(), SSM(4)], x)
        >>> [round(row.spread, 1) for row in report.rows]  # √(2 Σ_{i≠j} K_ij² / M)
        [1.0, 0.5]
    """
    for name, number in {"num_rows": num_rows, "num_draws": num_draws}.items():
        if number < 2:
            raise ValueError(f"audit needs {name} of at least 2, got {number}.")
    losses = tuple(loss) if isinstance(loss, Sequence) else (loss,)
    if not losses:
        raise ValueError("audit needs at least one loss, e.g. SSM(), got none.")
    if other := [type(v).__name__ for v in losses if hasattr(v, "no_posterior")]:
        raise ValueError(
            f"audit compares with exact score matching, and {other[0]} estimates the likelihood: leave it out."
        )
    rng_key = as_key(0 if rng_key is None else rng_key)
    energy = GeneralizedModel(model, losses[0], 1.0, data).energy(*args, **kwargs)
    if params is not None:
        energy = energy.with_params(params)
    if not jax.tree.leaves(energy.params):
        raise ValueError("The model has no parameters, so a loss has no gradient to audit.")
    energy.check()
    if not any(getattr(v, "allow_kinks", False) for v in losses):
        refuse_kinks(ISM(), energy)  # what all are compared with
    energy, weights = energy.usable()
    total = energy.num_rows
    row_key, draw_key = jax.random.split(rng_key)
    if energy.resizable and num_rows < total:
        rows = jax.random.choice(row_key, total, (num_rows,), replace=False, p=weights / weights.sum())
        energy = energy.at(energy.data[rows])
    bench = _Bench(energy, jax.random.split(draw_key, num_draws), total)
    found = {one: bench.measure(one) for one in losses}
    advice = [line for one in losses if (line := bench.advise(one, found[one]))]
    return Audit(tuple(found[one] for one in losses), tuple(advice), energy.num_rows, num_draws, total)


class _Bench:
    """The sample of rows, exact values there, and what they are compared with."""

    def __init__(self, energy: Energy, keys: Array, total: int) -> None:
        self.energy, self.keys, self.total = energy, keys, total
        values, slope, between_rows = _exact(ISM(), energy, keys[0])
        self.exact, self.slope = np.asarray(values), np.asarray(slope, np.float64)
        self.between_rows = float(between_rows)  # the noise that the data have anyway
        self.unit = _flops(jax.grad(_mean_density, allow_int=True), energy) if energy.has_density else math.nan

    def measure(self, loss: Loss) -> AuditRow:
        values, slopes = _compiled_draws(loss, self.energy, self.keys)
        difference = np.asarray(values - self.exact, np.float64).mean(axis=1)
        off, noise = self._bias_and_noise(slopes)
        return AuditRow(
            loss,
            float(difference.mean()),
            float(difference.std(ddof=1) / math.sqrt(len(difference))),
            float(np.sqrt(values.var(axis=0, ddof=1).mean())),
            math.sqrt(off * self.total / self.between_rows),
            float(np.linalg.norm(self.slope)) / math.sqrt(noise / self.total) if noise else math.inf,
            math.sqrt(1 + noise / self.between_rows),
            _flops(partial(_slope, loss), self.energy, self.keys[0]) / self.unit,
        )

    def _bias_and_noise(self, slopes: Array) -> tuple[float, float]:
        """The squared distance of the mean of gradients (K, P) from the exact one, and the variance of one row's."""
        draws = np.asarray(slopes, np.float64)
        moved = draws - draws[0]  # so that the same gradient over and over has no variance at all
        noise = float(np.sum((moved - moved.mean(axis=0)) ** 2) / (len(draws) - 1))  # of the mean over the rows
        off = float(np.sum((draws.mean(axis=0) - self.slope) ** 2)) - noise / len(draws)
        return max(off, 0.0), noise * self.energy.num_rows

    def advise(self, loss: Loss, found: AuditRow) -> str | None:
        if isinstance(loss, SSM):
            own = (found.inflation**2 - 1) * loss.num_projections
            enough = max(math.ceil(own / 0.1025), 1)  # √1.1025 = 1.05
            return f"{settings(loss)}: {plural(enough, 'projection')} would widen standard errors by at most 5 %."
        if isinstance(loss, FSM):
            best = self._best_step(loss)
            return f"{settings(loss)}: the gradient is most exact at an epsilon of about {best:.2g}."
        if isinstance(loss, DSM) and not isinstance(loss.sigma, tuple):
            best = self._best_noise(loss)
            return (
                f"{settings(loss)}: bias and noise of the gradient together are least at a sigma of about {best:.2g}."
            )
        return None

    def _best_step(self, loss: FSM) -> float:
        """Where doubling the step changes the gradient least, for the same random numbers.

        Below, rounding shows, and above the terms of higher order.
        """
        steps = float(loss.step(self.energy)) * 2.0 ** np.arange(-5, 7)
        slopes = np.asarray(_trials(loss, "epsilon", steps, self.energy, self.keys[:8]))
        changes = np.sum((slopes[1:] - slopes[:-1]) ** 2, axis=(1, 2))
        return float(steps[np.nanargmin(changes)])

    def _best_noise(self, loss: DSM) -> float:
        """The σ whose full-batch gradient has the least mean square error."""
        sigmas = loss.sigma * 2.0 ** np.arange(-6, 5)
        slopes = _trials(loss, "sigma", sigmas, self.energy, self.keys)
        errors = [off + noise / self.total for off, noise in map(self._bias_and_noise, slopes)]
        return float(sigmas[np.argmin(errors)])


@partial(jax.jit, static_argnums=(0, 1))
def _trials(loss: Loss, name: str, settings: Float[Array, "s"], energy: Energy, keys: Array) -> Float[Array, "s k p"]:
    """The gradients of the mean loss at several values of one setting."""

    def of(setting: Array) -> Array:
        return _draws(dataclasses.replace(loss, **{name: setting}), energy, keys)[1]  # type: ignore[type-var]

    return jax.lax.map(of, settings)


def _ravelled(energy: Energy) -> tuple[Array, Callable[[Array], Energy]]:
    vector, unravel = ravel_pytree(energy.params)
    return vector, lambda v: energy.with_params(unravel(v))


@partial(jax.jit, static_argnums=0)
def _exact(loss: Loss, energy: Energy, key: Array) -> tuple[Float[Array, "n"], Float[Array, "p"], Float[Array, ""]]:
    """Values of the rows, the gradient of their mean, and the trace of the rows' gradients' covariance."""
    vector, at = _ravelled(energy)
    values, pull = jax.vjp(lambda v: loss(at(v), key), vector)
    n = len(values)
    mean = pull(jnp.full(n, 1 / n, values.dtype))[0]
    squares = jax.lax.map(lambda row: jnp.sum(pull(row)[0] ** 2), jnp.eye(n, dtype=values.dtype))
    return values, mean, squares.mean() - jnp.sum(mean**2)


def _slope(loss: Loss, energy: Energy, key: Array) -> tuple[Array, Array]:
    vector, at = _ravelled(energy)

    def mean(v: Array) -> tuple[Array, Array]:
        values = loss(at(v), key)
        return values.mean(), values

    slope, values = jax.grad(mean, has_aux=True)(vector)
    return values, slope


def _draws(loss: Loss, energy: Energy, keys: Array) -> tuple[Float[Array, "k n"], Float[Array, "k p"]]:
    """The values of the rows and the gradient of their mean, for each key."""
    return jax.lax.map(partial(_slope, loss, energy), keys)


_compiled_draws = jax.jit(_draws, static_argnums=0)


def _mean_density(energy: Energy) -> Array:
    return energy.log_density(energy.data).mean()


def _flops(of: Callable[..., Any], *args: Any) -> float:
    analysis = jax.jit(of).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", math.nan))


def _figure(value: float) -> str:
    return f"{value:.3g}"
