"""Finds where a density's slope in its data jumps, which derivatives of the score do not see.

First the density's operations are read: those that can make a jump, and that the data reach. Only where there are any
is it looked at with numbers, so a model without them compiles nothing for this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

from numpyro_score.energy.bound import BoundModel
from numpyro_score.operators import full_precision, value_score
from numpyro_score.placement import fetch
from numpyro_score.programs import compiled, run_compiled

__all__ = ["NOT_PERIODIC", "Kink", "find_kink"]

_DATA, _PARAMS = 1, 2
_OPERATIONS = {
    "abs": "abs",
    "sign": "sign",
    "max": "max",
    "min": "min",
    "reduce_max": "max",
    "reduce_min": "min",
    "cummax": "cummax",
    "cummin": "cummin",
    "clamp": "clip",
    "select_n": "where",
    "select_and_scatter_add": "max",
    "reduce_window_max": "max",
    "floor": "floor",
    "ceil": "ceil",
    "round": "round",
    "rem": "mod",
    "sort": "sort",
    "top_k": "top_k",
    "approx_top_k": "top_k",
    "argmax": "argmax",
    "argmin": "argmin",
    "convert_element_type": "a comparison or rounding",
    "cond": "cond",
    "while": "while_loop",
    "sqrt": "sqrt",
    "rsqrt": "sqrt",
    "cbrt": "cbrt",
    "pow": "power",
    "acos": "arccos",
    "asin": "arcsin",
    "atan2": "arctan2",
    "tan": "tan",
    "eigh": "eigh",
    "svd": "svd",
}
NOT_PERIODIC = "wrap_angle"  # the operation where angles meet that are π and −π
_NAMED = {"relu", "relu6", "leaky_relu", "elu", "clip", "hard_tanh", "hard_sigmoid", "floor", "round", "sort"}
_NAMED |= {NOT_PERIODIC}
# Functions of JAX whose parts have kinks, but not they themselves.
_SMOOTH = {"logaddexp", "softplus", "logsumexp", "softmax", "log_softmax", "log_sigmoid"}


class Kink(NamedTuple):
    """A jump of the score or density between the data.

    Attributes:
        operation: what makes it, e.g. "abs".
        site: the term of the density that it is in.
        moves: whether its place may depend on the parameters.
    """

    operation: str
    site: str
    moves: bool


def find_kink(energy: BoundModel) -> Kink | None:
    """A jump of the score or density among the data or, if it may move with the parameters, further out; or None.

    The rows are joined to their nearest neighbours by straight lines, and by a tree that holds them together, so that
    some line crosses any place with rows on both sides. On a line the score changes by the integral of
    its derivative, unless there is a jump that the derivative leaves out: the trapezoidal rule's error then stays as
    the line is halved, each time to the half with the larger error. Kinks that may move are looked for on lines to the
    origin and out to ten times the data's spread as well, since a fit may bring them to the data. As it may bring any
    parameter away from zero, where it often starts and hides what it multiplies, lines are searched a second time with
    small parameters put between a half and one.
    """
    energy = energy.at_one_point()  # kinks at other places than that of a latent number are integrated over
    found = _suspects(energy)
    if not found:
        return None
    near, far = _lines(energy, *_some_rows(energy))
    for group, lines in ((found, near), ([k for k in found if k.moves], far)):
        if group and lines is not None:
            terms = tuple(dict.fromkeys(k.site for k in group))
            points = jax.ShapeDtypeStruct(lines[1].shape, energy.dtype)
            evaluate = compiled(functools.partial(_evaluate, terms=terms), energy, points, points)
            at_start, away = energy, _away_from_zero(energy)
            if any(_jumps(evaluate, e, *lines) for e in (at_start, away) if e is not None):
                return group[0]
    return None


def _away_from_zero(energy: BoundModel) -> BoundModel | None:
    """With other values of the parameters that are almost zero; None if there are none."""
    rng, moved = np.random.default_rng(0), False

    def move(value: Any) -> Any:
        nonlocal moved
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return value
        v = np.asarray(value, np.float64)
        small = np.abs(v) < _SMALL
        moved |= bool(small.any())
        sign = np.where(v == 0, rng.choice([-1.0, 1.0], v.shape), np.sign(v))
        new = np.where(small, sign * rng.uniform(0.5, 1.0, v.shape), v)
        # Of the same type, as the program is compiled for it.
        return float(new) if isinstance(value, float) else new.astype(value.dtype)

    params = jax.tree.map(move, energy.params)
    return energy._replace(params=params) if moved else None


def _terms(energy: BoundModel, terms: Sequence[str], x: Array) -> Array:
    """The sum of some terms of the log density of rows (N, D), (N,)."""
    return energy.at(x)._sum_of_terms(terms)


# -- the operations ---------------------------------------------------------------------------------------------------


def _suspects(energy: BoundModel) -> list[Kink]:
    """Operations of each term that the data reach and that can make a jump, those that may move first."""
    found = []
    x = jax.ShapeDtypeStruct((energy.num_rows, energy.dim), energy.dtype)
    for term in energy._layout.terms:

        def of(x: Array, params: Any, term: str = term) -> Array:
            return _terms(energy._replace(params=params), [term], x)

        jaxpr = jax.make_jaxpr(of)(x, energy.params).jaxpr
        marks: dict[str, int] = {}
        _walk(jaxpr, [_DATA] + [_PARAMS] * (len(jaxpr.invars) - 1), marks, "")
        found += [Kink(name, term, bool(mark & _PARAMS)) for name, mark in marks.items()]
    return sorted(found, key=lambda k: not k.moves)


def _walk(jaxpr: Jaxpr, inputs: Sequence[int], found: dict[str, int], inside: str) -> list[int]:
    """What reaches each output; adds to `found` the operations on data, with what else reaches them."""
    marks: dict[Var, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> int:
        return 0 if isinstance(v, Literal) else marks.get(v, 0)

    squares: set[Any] = set()
    for eqn in jaxpr.eqns:
        into = [read(v) for v in eqn.invars]
        joint = functools.reduce(int.__or__, into, 0)
        if _is_square(eqn):
            squares.update(eqn.outvars)
        out = [joint] * len(eqn.outvars)
        called = str(eqn.params.get("name", ""))
        bodies = _bodies(eqn)
        if joint & _DATA and called not in _SMOOTH and not _ends_support(eqn):
            if (name := _operation(eqn, into)) is None and eqn.primitive.name == "log" and eqn.invars[0] in squares:
                name = "log of a square"  # exp(½ log x²) = |x|
            if name is not None:
                label = inside or name
                found[label] = found.get(label, 0) | _reaching(eqn, into)
            for body in bodies:
                label = inside or (called if called in _NAMED else "")
                same = len(body.invars) == len(into)
                inner = _walk(body, into if same else [joint] * len(body.invars), found, label)
                if same and len(bodies) == 1 and len(inner) == len(out) and eqn.primitive.name != "scan":
                    out = inner
        marks.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _reaching(eqn: JaxprEqn, into: list[int]) -> int:
    # Which branch is taken depends on the predicate; where the branches meet does not matter.
    return into[0] if eqn.primitive.name in ("select_n", "cond") else functools.reduce(int.__or__, into, 0)


def _operation(eqn: JaxprEqn, into: list[int]) -> str | None:
    """The plain name of an operation that can make a jump, or None."""
    name = eqn.primitive.name
    if name in ("select_n", "cond") and not into[0] & _DATA:
        return None
    if name == "convert_element_type":
        from_float = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact)  # type: ignore[attr-defined]
        if from_float == jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
            return None
    return _OPERATIONS.get(name)


def _is_square(eqn: JaxprEqn) -> bool:
    """Whether an operation is an even power, by any of its ways."""
    name = eqn.primitive.name
    even = name == "integer_pow" and eqn.params["y"] % 2 == 0
    return even or name == "square" or (name == "mul" and eqn.invars[0] is eqn.invars[1])


def _ends_support(eqn: JaxprEqn) -> bool:
    """Whether an operation is the `where` by which distributions are −∞ outside of their support."""
    literals = [v.val for v in eqn.invars if isinstance(v, Literal)]
    chooses = eqn.primitive.name == "select_n" or eqn.params.get("name") == "_where"
    return chooses and any(np.ndim(v) == 0 and v == -np.inf for v in literals)


def _bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    values = [w for p in eqn.params.values() for w in (p if isinstance(p, tuple | list) else (p,))]
    return [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in values if isinstance(p, ClosedJaxpr | Jaxpr)]


# -- the numbers ------------------------------------------------------------------------------------------------------

_SMALL = 0.05
_ROWS, _NEIGHBOURS, _HALVINGS = 128, 4, 24
_FAR = 0.5  # of the data's spread, or twenty times the tree's median: longer lines, as between modes, are left out


def _some_rows(energy: BoundModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of some rows, rows to start from and the columns' deviations.

    The rows to start from are those, or all where a row cannot be had alone.
    """
    n = energy.num_rows
    rows = np.random.default_rng(0).permutation(n)[:_ROWS]

    def read(energy: BoundModel, rows: Array) -> tuple[Array, Array]:
        x = energy.usable()[0].data
        return (x[rows] if energy.resizable else x), x.std(axis=0)

    starts, spread = fetch(run_compiled(read, energy, rows))
    return (np.arange(len(rows)) if energy.resizable else rows), starts, spread


def _lines(energy: BoundModel, rows: np.ndarray, starts: np.ndarray, spread: np.ndarray) -> tuple[Any, Any]:
    """Pairs of ends (S, M, D) of lines between neighbours, and of lines further out, or None."""
    rng, x = np.random.default_rng(0), starts
    d = x.shape[1]
    if energy.num_rows == 1:  # one point: about as far off as its numbers differ
        spread = np.full(d, x.std() or 1.0)
        near = (x, x + 0.3 * spread * rng.normal(size=(16, 1, d)))
    else:
        some = starts[rows]
        distance = np.stack([((starts - row) ** 2).sum(-1, dtype=np.float64) for row in some], axis=-1)
        distance[distance == 0] = np.inf  # itself, and equal rows
        order = np.argsort(distance, axis=-1)[:, : min(_NEIGHBOURS, len(some) - 1)]
        ends = np.concatenate([order, order[:, :1]], axis=1)  # (M, S)
        ends[rows, -1] = _parents(distance[rows], order[rows, 0], _FAR * float(np.linalg.norm(spread)))
        near = (starts, np.swapaxes(some[ends], 0, 1))
    begin, end = np.broadcast_arrays(*(np.asarray(e, x.dtype) for e in near))
    for column in energy.angle_columns:
        if (across := _across_the_end(starts, column, float(spread[column]))) is not None:
            begin, end = (
                np.concatenate([a, b[None].astype(a.dtype)]) for a, b in zip((begin, end), across, strict=True)
            )
    near = begin, end
    if not energy.flat:  # further out may be outside of the support
        return near, None
    start = near[0][0]
    away = 10 * np.where(spread > 0, spread, 1.0) * rng.normal(size=(4, *start.shape))
    ends = np.concatenate([-np.broadcast_to(start, (1, *start.shape)), start + away])
    return near, np.broadcast_arrays(start, ends.astype(x.dtype))


def _across_the_end(starts: np.ndarray, column: int, spread: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Lines (M, D) over the place where angles of π and −π meet, at rows near to it; None if there are none."""
    angles = np.sort(starts[:, column].astype(np.float64))
    gap = 2 * np.pi - angles[-1] + angles[0]
    if gap > max(_FAR * spread, 20 * np.median(np.diff(angles)) if len(angles) > 1 else 0.0):
        return None
    nearest = np.argsort(np.pi - abs(starts[:, column]))
    begin = starts[np.resize(nearest[: max(len(nearest) // 8, 1)], len(starts))].copy()
    end = begin.copy()
    begin[:, column], end[:, column] = angles[-1], angles[0] + 2 * np.pi
    return begin, end


def _parents(distance: np.ndarray, nearest: np.ndarray, far: float) -> np.ndarray:
    """Of each row the next one on a shortest spanning tree, (M,); the nearest where that is far, and at the root."""
    if not np.isfinite(distance).any():  # all rows are one
        return nearest
    lengths = np.where(np.isfinite(distance), np.sqrt(distance), 0.0)
    tree = minimum_spanning_tree(lengths)  # of the rows that differ, zero is no line
    order, parents = breadth_first_order(tree, 0, directed=False)
    parents = np.where(parents < 0, nearest, parents)
    reached = np.isin(np.arange(len(parents)), order)  # all but rows that equal another
    near = lengths[np.arange(len(parents)), parents] <= max(far, 20 * np.median(tree.data))
    return np.where(reached & near, parents, nearest)


def _jumps(evaluate: Any, energy: BoundModel, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether the density or the score along one of the lines, (S, M) of them, jumps.

    `evaluate` takes points and directions (S, M, D) to the density, the score along the direction and its derivative.
    """
    length = np.linalg.norm(end - start, axis=-1)
    v = (end - start) / np.where(length == 0, 1.0, length)[..., None]
    # What is too short for the digits of the data is halved no more.
    least = 200 * np.finfo(start.dtype).eps * np.maximum(abs(start).max(-1), abs(end).max(-1))

    def at(t: np.ndarray) -> np.ndarray:
        points = (start + t[..., None] * (end - start)).astype(start.dtype)
        values = np.asarray(evaluate(energy, points, v.astype(start.dtype)), np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    first, last = at(np.zeros_like(length)), at(np.ones_like(length))
    for k in range(2):  # of the density, and of the score along the line
        left, right, t, size = first, last, np.zeros_like(length), np.ones_like(length)
        history, lost = np.full((5, *length.shape), np.inf), np.zeros(length.shape)
        for _ in range(_HALVINGS):
            size = size / 2
            stop = size * length < least
            middle = at(t + size)
            width = size * length
            low, high = (
                abs(b[k] - a[k] - 0.5 * width * (a[k + 1] + b[k + 1])) for a, b in ((left, middle), (middle, right))
            )
            go = low >= high
            left, right = np.where(stop | go, left, middle), np.where(stop | ~go, right, middle)
            t, size = np.where(stop | go, t, t + size), np.where(stop, 2 * size, size)
            lost = np.where(stop, lost, np.minimum(low, high))
            history = np.where(stop, history, np.concatenate([np.maximum(low, high)[None], history[:-1]]))
        known = np.isfinite(first).all(0) & np.isfinite(last).all(0) & np.isfinite(history[[0, -1]]).all(0)
        if not known.any():
            continue
        values = np.stack([first[k], last[k]])[:, known]
        scale = np.abs(values - np.median(values)).mean() if k == 0 else np.abs(values).mean()
        error, before = history[0][known], history[-1][known]
        # What falls as the line is halved is smooth; what both halves have is rounding.
        if ((error > 0.5 * before) & (error > 5 * lost[known].max()) & (error > 1e-3 * scale)).any():
            return True
    return False


@full_precision
def _evaluate(energy: BoundModel, x: Array, v: Array, *, terms: tuple[str, ...]) -> Array:
    """The sum of some terms, its slope along v and the derivative of that, (3, S, M), at points (S, M, D)."""

    def of(x: Array, v: Array) -> Array:
        def slope(x: Array) -> tuple[Array, tuple[Array, Array]]:
            value, score = value_score(lambda y: _terms(energy, terms, y), x)
            along = jnp.sum(score * v, axis=-1)
            return along.sum(), (value, along)

        curvature, (value, along) = jax.grad(slope, has_aux=True)(x)
        value = value if energy.has_density else jnp.zeros_like(along)
        return jnp.stack([value, along, jnp.sum(curvature * v, axis=-1)])

    if energy.resizable:
        return of(x.reshape(-1, x.shape[-1]), v.reshape(-1, x.shape[-1])).reshape(3, *x.shape[:-1])
    return jnp.moveaxis(jax.lax.map(lambda a: of(*a), (x, v)), 1, 0)
