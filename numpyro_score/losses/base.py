"""What every loss is, and how losses of rows are summed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from numpyro_score.energy import NOT_PERIODIC, AnyEnergy, Energies, Energy, Kink, by_device, find_kink, sum_by_device
from numpyro_score.losses.chunks import chunks_in_a_pass
from numpyro_score.losses.memory import spread_sites
from numpyro_score.programs import being_traced, run_compiled
from numpyro_score.random import integer

__all__ = [
    "SMOOTH_FORM",
    "Loss",
    "as_numbers",
    "at_least_one",
    "check_settings",
    "declare_sites",
    "filled",
    "positive",
    "refuse_kink",
    "refuse_kinks",
    "refuse_kinks_of_score",
    "require_equal_rows",
    "required",
    "row_losses",
    "set_counts",
    "total_loss",
    "total_loss_and_memory",
    "true_or_false",
]


SMOOTH_FORM = "or a form that bends over the width of many rows, by softplus, logcosh or sqrt(x**2 + eps)"


@runtime_checkable
class Loss(Protocol):
    """A pointwise objective: a hashable callable from an energy and a random key to one value per row.

    A loss may also have a method `rows_per_chunk(energy)`, the number of rows that are best treated at once, or None
    for all of them, e.g. by `numpyro_score.losses.chunks.rows_at_once`; and a method `check(energy)`, called before a
    fit where the data's values are known, that raises ValueError if they do not suit its settings.

    A loss with parameters or memory of its own has a method `declare(energy)`, called inside the model's run, that
    declares them by `numpyro.param` and `numpyro.primitives.mutable` and returns {site: value}. They are in
    `energy.params` when the loss is called. If it has memory, `advance(energy, rng_key)` returns its new values,
    {site: value}, before each evaluation; no gradient passes through it. `settle(energy, rng_key)` may return the
    energy with a memory good enough for standard errors, after a fit. The names in the attribute `slots` are sites of
    the memory whose arrays have one slot after another along their first axes, as chains have: where rows lie over
    several devices each device holds, moves and sees some of them.

    A method `prepare(energy)` may add to the energy's `params` what needs all rows, of one device, before they are cut
    into chunks. A loss for data that are not finite has a method `filled(energy)`, the energy at data at which a model
    can be looked at before a fit.

    Over several devices a loss is called with the rows of one, and asks by `energy.over_devices(jax.lax.pmean, ...)`
    for what needs all of them.

    Errors of one point of data, such as a series, need its loss as a sum over coordinates: a method
    `by_coordinate(energy, rng_key)` gives the parts, (N, D).

    A loss that a jump of the score in the data makes wrong says why in the attribute `no_kinks`, and one that only a
    jump whose place depends on the parameters makes wrong in `no_moving_kinks`; :func:`check_settings` then looks for
    one. It does not if the attribute `allow_kinks` is true.

    A loss for discrete data, which have no score, sets the attribute `takes_discrete` to true, and one that is a
    quadratic of the parameters for no model `no_closed_form`, for which none is then looked for.

    Five attributes hold text for error messages: `no_objective`, why its value is not what its gradient descends;
    `no_posterior`, why there is no posterior to sample from and no closed form; `no_curvature`, why its second
    derivatives give no standard errors; `not_finite`, what it may be that fails where density and score are finite;
    `not_saved`, what files do not hold, and what to do instead.
    """

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        ...


def required(owner: str, name: str, value: Any, what: str) -> None:
    """Raises TypeError if a setting that has no default was left out, and says what it is and where to start."""
    if value is None:
        raise TypeError(f"{owner} needs {name}, got None: {what}.")


def positive(owner: str, name: str, value: Any) -> None:
    """Raises unless `value` is one positive number, or traced, so that nothing can be said."""
    if isinstance(value, jax.core.Tracer):
        return
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number)
    )
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{owner} needs one positive number as {name}, got {value!r}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{owner} needs a positive {name}, got {value}.")


def as_numbers(owner: str, name: str, value: Any) -> np.ndarray:
    """The value as an array in double precision; raises TypeError for what holds no numbers, True and text included."""
    leaves = jax.tree.leaves(value)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(f"{owner} got a traced {name}: give its values outside of jit, grad and vmap.")
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise TypeError(f"{owner} needs numbers as {name}, got {value!r}.")
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):  # rows of several lengths, dictionaries
        raise TypeError(f"{owner} needs one array of numbers as {name}, got {value!r}.") from None


def at_least_one(owner: str, name: str, value: Any) -> int:
    """The value as an integer, of which arrays of no axes may hold one; raises unless it is one of at least 1."""
    number = integer(value)
    if number is None:
        raise TypeError(f"{owner} needs an integer as {name}, got {value!r}.")
    if number < 1:
        raise ValueError(f"{owner} needs a {name} of at least 1, got {value}.")
    return number


def set_counts(loss: Any, *names: str) -> None:
    """:func:`at_least_one` of a loss's settings, which become the integers."""
    for name in names:
        object.__setattr__(loss, name, at_least_one(type(loss).__name__, name, getattr(loss, name)))


def true_or_false(owner: str, **flags: Any) -> None:
    """Raises TypeError for a flag that is neither, such as a word or a number, which Python would take for true."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{owner} needs True or False as {name}, got {value!r}.")


def require_equal_rows(energy: Energy, owner: str) -> None:
    """Raises ValueError unless all rows have one density, of which `owner` takes other points."""
    if not energy.resizable and energy.num_rows > 1:
        raise ValueError(
            f"{owner} compares the data with other points under one density for all rows, and the model's is tied to "
            f"its {energy.num_rows} rows: pass the data as an argument, let the plate follow its length, e.g. "
            "numpyro.plate('data', len(x)), without covariates or masks of a fixed length; or use CD or ISM."
        )


def declare_sites(loss: Loss, energy: AnyEnergy) -> dict[str, Any]:
    """Declares the loss's own parameters and memory, if any, as sites of the model that is running."""
    if hasattr(loss, "declare") and isinstance(energy, Energies):
        raise NotImplementedError(
            f"{type(loss).__name__} has parameters or memory of its own for rows of one plate, and the data stand in "
            f"{len(energy.parts)}: use ISM, SSM, DSM, FSM, KLContraction or CD."
        )
    return getattr(loss, "declare", lambda _: {})(energy)


def check_settings(loss: Loss, energy: AnyEnergy) -> None:
    """Lets the loss look at the data's values, if it wants to; raises TypeError for discrete data it does not take."""
    if isinstance(energy, Energies):
        for part in energy.parts:
            check_settings(loss, part)
        return
    if not getattr(loss, "takes_discrete", False):
        energy.require_continuous(type(loss).__name__)
    getattr(loss, "check", lambda _: None)(energy)
    if not getattr(loss, "allow_kinks", False):
        refuse_kinks(loss, filled(loss, energy))


def filled(loss: Loss, energy: AnyEnergy) -> Any:
    """The energy at data at which a model can be looked at; raises as the loss does for data that it does not take."""
    return getattr(loss, "filled", lambda e: e)(energy)


def refuse_kinks(loss: Loss, energy: Energy) -> None:
    """Raises ValueError where the density's slope jumps among the data, and the loss cannot have that."""
    always, moving = getattr(loss, "no_kinks", None), getattr(loss, "no_moving_kinks", None)
    if getattr(loss, "allow_kinks", False) or not (always or moving):
        return
    kink = find_kink(energy)
    # Where angles end the density may jump by what the parameters are.
    if kink is not None and (always or kink.moves or kink.operation == NOT_PERIODIC):
        name = type(loss).__name__
        way_on = f"{SMOOTH_FORM}; if you know that the jump does no harm, write {name}(..., allow_kinks=True)"
        refuse_kink(kink, f"{name} would be wrong, as {always or moving}", f"NCE, PCD, CD or KLContraction, {way_on}")


def refuse_kinks_of_score(energy: Energy, instead: str) -> None:
    """For what needs second derivatives of the density in all of the data.

    Raises:
        TypeError: for discrete data.
        ValueError: where its slope jumps among the data.
    """
    energy.require_continuous("The Hyvärinen score", "compare(...) has a score of the discrete data, and of mixed rows")
    if (kink := find_kink(energy)) is not None:
        refuse_kink(
            kink, "the Hyvärinen score would be wrong, as its second derivative leaves the jump out",
            f"{instead}, {SMOOTH_FORM}",
        )  # fmt: skip


def refuse_kink(kink: Kink, wrong: str, instead: str) -> NoReturn:
    """Raises ValueError: what is wrong there, and what to use instead."""
    if kink.operation == NOT_PERIODIC:
        raise ValueError(
            f"Site '{kink.site}' is not periodic in the angles of the data: its density or slope seems to jump where "
            f"π and -π meet: {wrong}. Use functions of cos(x) and sin(x), or, for data that end at ±π, a site with the "
            "support constraints.interval(-np.pi, np.pi)."
        )
    raise ValueError(
        f"Site '{kink.site}' passes the data through '{kink.operation}', and the density or its slope seems to jump at "
        f"or near them: {wrong}. Use {instead}."
    )


def row_losses(loss: Loss, energy: AnyEnergy, rng_key: Array) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """The loss and the weight of each row; rows of weight zero have loss zero, whatever their data.

    Where the rows lie over several devices so do these, and each device takes its own; see :func:`total_loss`. The rows
    of several plates come one plate after the other.
    """
    if not being_traced((energy, rng_key)):
        return run_compiled(partial(row_losses, loss), energy, rng_key)
    if isinstance(energy, Energies):
        found = [row_losses(loss, part, key) for part, key in _parts(energy, rng_key)]
        return jnp.concatenate([v for v, _ in found]), jnp.concatenate([w for _, w in found])
    sites = spread_sites(loss, energy.spread, energy.params)
    return by_device(partial(_row_losses, loss), energy, rng_key, sites=sites)


def _parts(energy: Energies, rng_key: Array) -> Iterator[tuple[Energy, Array]]:
    """The density of each plate with a key of its own."""
    return zip(energy.parts, jax.random.split(rng_key, len(energy.parts)), strict=True)


def _row_losses(loss: Loss, energy: Energy, weights: Array | None, rng_key: Array) -> tuple[Array, Array]:
    energy, weights = energy.usable(weights)
    energy = _prepared(loss, energy)
    chunks = _chunks(loss, energy, rng_key, weights)
    values = _evaluate(loss, energy, rng_key) if chunks is None else _scan_rows(loss, energy, *chunks).reshape(-1)
    values = values[: energy.num_rows]
    return jnp.where(weights != 0, values, 0.0), weights


def total_loss(loss: Loss, energy: AnyEnergy, rng_key: Array) -> Float[Array, ""]:
    """The weighted sum of the loss over rows, Σ_n w_n loss_n.

    Where the loss asks for chunks of rows, the gradient in the parameters is taken chunk by chunk along with the
    value. This keeps the memory to one chunk and adds no arithmetic. Forward mode and higher derivatives work.

    Rows that lie over several devices (`Energy.spread`) stay where they are: the loss is called on each device with the
    rows there and a random key of its own, and one sum goes between them.
    """
    if not being_traced((energy, rng_key)):
        return run_compiled(partial(total_loss, loss), energy, rng_key)
    if isinstance(energy, Energies):
        return jnp.sum(jnp.stack([total_loss(loss, part, key) for part, key in _parts(energy, rng_key)]))
    sites = spread_sites(loss, energy.spread, energy.params)
    return sum_by_device(partial(_total_loss, loss), energy, rng_key, sites=sites)


def _total_loss(loss: Loss, energy: Energy, weights: Array | None, rng_key: Array) -> Array:
    energy, weights = energy.usable(weights)
    energy = _prepared(loss, energy)
    chunks = _chunks(loss, energy, rng_key, weights)
    if chunks is None:
        return _weighted_sum(loss, energy, weights, rng_key)
    leaves, treedef = jax.tree.flatten((energy, *chunks))
    return _chunked_total((loss, treedef), leaves)


def total_loss_and_memory(loss: Loss, energy: AnyEnergy, rng_key: Array) -> tuple[Float[Array, ""], dict[str, Any]]:
    """:func:`total_loss`, after a step of the loss's memory, if it has any; and the new memory, {site: value}."""
    if not hasattr(loss, "advance") or isinstance(energy, Energies):
        return total_loss(loss, energy, rng_key), {}
    memory_key, rng_key = jax.random.split(rng_key)
    if sites := spread_sites(loss, energy.spread, energy.params):
        memory = by_device(lambda energy, _, key: loss.advance(energy, key), energy, memory_key, sites=sites)
    else:
        memory = loss.advance(energy, memory_key)
    return total_loss(loss, energy.with_params(memory), rng_key), memory


def _prepared(loss: Loss, energy: Energy) -> Energy:
    prepared: Energy = getattr(loss, "prepare", lambda e: e)(energy)
    return prepared


def _evaluate(loss: Loss, energy: Energy, rng_key: Array) -> Array:
    values = loss(energy, rng_key)
    if jnp.shape(values) != (energy.num_rows,):
        raise ValueError(
            f"The loss {loss!r} gave values of shape {jnp.shape(values)} for {energy.num_rows} rows: return one value "
            f"per row, shape ({energy.num_rows},)."
        )
    return values


def _chunks(loss: Loss, energy: Energy, rng_key: Array, weights: Array) -> tuple[Array, Array, Array] | None:
    """Rows (K, C, D), weights (K, C) and keys (K,), padded by rows of weight zero; None to take all rows at once."""
    size = getattr(loss, "rows_per_chunk", lambda _: None)(energy)
    n, unroll = energy.num_rows, chunks_in_a_pass()
    if size is None or n < unroll * size or n <= size or not energy.resizable:
        return None
    k = -(-n // size)
    k = -(-k // unroll) * unroll  # no remainder to compile apart
    size = -(-n // k)
    pad = k * size - n
    x = jnp.pad(energy.data, ((0, pad), (0, 0)), mode="edge").reshape(k, size, -1)
    return x, jnp.pad(weights, (0, pad)).reshape(k, size), jax.random.split(rng_key, k)


def _scan_rows(loss: Loss, energy: Energy, x: Array, weights: Array, keys: Array) -> Array:
    def body(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _evaluate(loss, energy.at(chunk[0]), chunk[1])

    return jax.lax.scan(body, None, (x, keys), unroll=chunks_in_a_pass())[1]


def _weighted_sum(loss: Loss, energy: Energy, weights: Array, rng_key: Array) -> Array:
    values = _evaluate(loss, energy, rng_key)
    return jnp.sum(jnp.where(weights != 0, weights * values, 0.0))


def _chunk_total(loss: Loss, energy: Energy, x: Array, weights: Array, rng_key: Array) -> Array:
    return _weighted_sum(loss, energy.at(x), weights, rng_key)


def _plain_total(static: Any, leaves: list[Any]) -> Array:
    loss, treedef = static
    energy, x, weights, keys = jax.tree.unflatten(treedef, leaves)

    def body(total: Array, chunk: Any) -> tuple[Array, None]:
        return total + _chunk_total(loss, energy, *chunk), None

    return jax.lax.scan(body, jnp.zeros((), weights.dtype), (x, weights, keys), unroll=chunks_in_a_pass())[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _chunked_total(static: Any, leaves: list[Any]) -> Array:
    return _plain_total(static, leaves)


@partial(_chunked_total.defjvp, symbolic_zeros=True)
def _chunked_total_jvp(static: Any, primals: tuple[list[Any]], tangents: tuple[list[Any]]) -> tuple[Array, Array]:
    (leaves,), (dots,) = primals, tangents
    loss, treedef = static
    moving = [i for i, t in enumerate(dots) if not isinstance(t, SymbolicZero)]
    energy, x, weights, keys = jax.tree.unflatten(treedef, leaves)
    if any(i >= len(jax.tree.leaves(energy)) for i in moving):  # the data or the weights themselves vary
        dots = [jnp.zeros(t.shape, t.dtype) if isinstance(t, SymbolicZero) else t for t in dots]
        return jax.jvp(partial(_plain_total, static), (leaves,), (dots,))
    energy_leaves, energy_def = jax.tree.flatten(energy)

    def body(carry: Any, chunk: Any) -> tuple[Any, None]:
        def of(moved: list[Any]) -> Array:
            new = list(energy_leaves)
            for i, leaf in zip(moving, moved, strict=True):
                new[i] = leaf
            return _chunk_total(loss, jax.tree.unflatten(energy_def, new), *chunk)

        return jax.tree.map(jnp.add, carry, jax.value_and_grad(of)([leaves[i] for i in moving])), None

    start = (jnp.zeros((), weights.dtype), [jnp.zeros_like(leaves[i]) for i in moving])
    (total, grads), _ = jax.lax.scan(body, start, (x, weights, keys), unroll=chunks_in_a_pass())
    return total, sum(
        (jnp.vdot(g, dots[i]) for i, g in zip(moving, grads, strict=True)),
        start=jnp.zeros_like(total),
    )
