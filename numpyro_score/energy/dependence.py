"""What a traced function's outputs depend on, read off its operations. Nothing here computes numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

__all__ = [
    "agrees_on_floats",
    "coarsest_rounding",
    "depends_on_data",
    "depends_on_inputs",
    "has_constant_curvature",
    "is_constant",
    "is_quadratic",
    "numbers_per_row",
    "treats_rows_alike",
    "varying_outputs",
]

# How an input reaches a value: not at all, through differentiable operations, or also through one whose derivative JAX
# takes to be zero, or leaves out, although the value changes.
_NO, _SMOOTH, _STEP = 0, 1, 3
_STEPS = {"sign", "floor", "ceil", "round", "rem", "nextafter", "stop_gradient"}
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "shard_map",
}


def is_quadratic(f: Callable[[Any], Any], x: Any) -> bool:
    """Whether the gradient of the scalar function `f` of the pytree `x` is affine in x.

    The Hessian times a vector must not depend on x, and the gradient must not contain steps, such as the sign of x in
    the gradient of abs(x), which that derivative would not show. So "yes" holds for all x; "no" may be said of a
    quadratic whose higher terms cancel only in the arithmetic. Steps in the value alone, such as a density's −∞ outside
    its support, are not looked at: gradients do not see them.
    """

    def product(x: Any, v: Any) -> Any:
        return jax.jvp(jax.grad(f), (x,), (v,))[1]

    n = len(jax.tree.leaves(x))
    try:
        jaxpr = jax.make_jaxpr(product)(x, x).jaxpr
    except (TypeError, ValueError, NotImplementedError):  # JAX's, for operations whose gradient has no derivative
        return False
    curvature = _marks(jaxpr, [_SMOOTH] * n + [_NO] * n)
    slope = _marks(jax.make_jaxpr(jax.grad(f))(x).jaxpr, [_SMOOTH] * n)
    return not any(curvature) and _STEP not in slope


def has_constant_curvature(f: Callable[[Array], Array], x: Any, columns: np.ndarray) -> bool:
    """Whether f, (N, D) to (N,), is a quadratic in some columns, with second derivatives there that all x share.

    As :func:`is_quadratic`, but f itself must not contain steps either.
    """

    def slope(x: Array) -> Array:
        return jax.grad(lambda x: f(x).sum())(x)[:, columns]

    def product(x: Array, v: Array) -> Array:
        direction = jnp.zeros(x.shape, x.dtype).at[:, columns].set(v)
        return jax.jvp(slope, (x,), (direction,))[1]

    v = jax.ShapeDtypeStruct((x.shape[0], len(columns)), x.dtype)
    try:
        if any(_STEP in _marks(jax.make_jaxpr(g)(x).jaxpr, [_SMOOTH]) for g in (f, slope)):
            return False
        jaxpr = jax.make_jaxpr(product)(x, v).jaxpr
    except (ValueError, NotImplementedError):  # as in is_quadratic
        return False
    return not any(_marks(jaxpr, [_SMOOTH, _NO]))


_MOVES = {"reshape", "broadcast_in_dim", "transpose", "squeeze", "slice", "concatenate", "expand_dims", "copy", "rev"}
_SUMS = {"add", "sub", "mul", "neg", "integer_pow", "reduce_sum", "dot_general"}
_ROW, _WHOLE = 1, 2


def agrees_on_floats(f: Callable[[Array], Array], x: Any) -> bool:
    """Whether f, which makes integers or truth values of x, is at integers the same function without that.

    It is if these are moved, added and multiplied only, and then made floats. "No" may be said of others.
    """
    return _agrees(jax.make_jaxpr(f)(x).jaxpr, [_ROW])[0]


def _agrees(jaxpr: Jaxpr, inputs: Sequence[int]) -> tuple[bool, list[int]]:
    """Whether the integers made of the inputs are treated so, and which outputs are x (_ROW) or such (_WHOLE)."""
    marks = {v: mark for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for eqn in jaxpr.eqns:
        into = [_NO if isinstance(v, Literal) else marks.get(v, _NO) for v in eqn.invars]
        mark, name = max(into, default=_NO), eqn.primitive.name
        if not mark:
            continue
        inner = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in _parts(eqn)]
        if name in _CALLS and len(inner) == 1:
            fine, out = _agrees(inner[0], into)
            if not fine:
                return False, []
            marks.update({v: m for v, m in zip(eqn.outvars, out, strict=True) if m})
            continue
        dtypes = {v.aval.dtype for v, m in zip(eqn.invars, into, strict=True) if m == _WHOLE}  # type: ignore[attr-defined]
        new = eqn.outvars[0].aval.dtype  # type: ignore[attr-defined]
        if name in _MOVES or (name in ("gather", "dynamic_slice") and not any(into[1:])):
            marks[eqn.outvars[0]] = mark
        elif name == "convert_element_type" and (mark == _WHOLE or not jnp.issubdtype(new, jnp.inexact)):
            if jnp.issubdtype(new, jnp.bool_) and mark == _WHOLE:
                return False, []
            if not jnp.issubdtype(new, jnp.inexact):
                marks[eqn.outvars[0]] = _WHOLE
        elif mark == _WHOLE:
            if name not in _SUMS or any(jnp.issubdtype(d, jnp.bool_) for d in dtypes):
                return False, []
            marks[eqn.outvars[0]] = _WHOLE
        elif not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):  # type: ignore[attr-defined]
            return False, []
    return True, [_NO if isinstance(v, Literal) else marks.get(v, _NO) for v in jaxpr.outvars]


def is_constant(f: Callable[[Any], Any], x: Any) -> bool:
    """Whether nothing that `f` returns varies with the pytree `x`."""
    jaxpr = jax.make_jaxpr(f)(x).jaxpr
    return not any(_marks(jaxpr, [_SMOOTH] * len(jaxpr.invars)))


def varying_outputs(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs vary with the marked inputs, followed into calls and loops."""
    return [mark != _NO for mark in _marks(jaxpr, [_SMOOTH if i else _NO for i in inputs])]


def coarsest_rounding(f: Callable[[Array], Array], x: Array) -> float:
    """The machine precision of the coarsest number on the way from `x` to what `f` returns.

    Operations on floating numbers of a dtype round to it, and `reduce_precision` to its bits. What is coarser than its
    dtype tells is not seen: products of matrices whose own `precision` is low, functions of the host, quantised tables.
    """
    jaxpr = jax.make_jaxpr(f)(x).jaxpr
    return _coarsest(jaxpr, [True] * len(jaxpr.invars))


def _coarsest(jaxpr: Jaxpr, inputs: Sequence[bool]) -> float:
    """The same for what the marked inputs reach and the outputs need."""
    reached, coarsest = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}, 0.0
    for eqn in _needed(jaxpr):
        into = [not isinstance(v, Literal) and v in reached for v in eqn.invars]
        if any(into):
            reached.update(eqn.outvars)
            coarsest = max(coarsest, _rounding(eqn, into))
    return coarsest


def _rounding(eqn: JaxprEqn, into: list[bool]) -> float:
    if eqn.primitive.name == "reduce_precision":
        return 2.0 ** -eqn.params["mantissa_bits"]
    dtypes = [v.aval.dtype for v in eqn.outvars]  # type: ignore[attr-defined]
    found = [float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    for part in _parts(eqn):
        inner = part.jaxpr if isinstance(part, ClosedJaxpr) else part
        # Of loops and branches all inputs count, as they may be passed on.
        known = eqn.primitive.name in _CALLS and len(inner.invars) == len(into)
        found.append(_coarsest(inner, into if known else [True] * len(inner.invars)))
    return max(found, default=0.0)


def _marks(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """How the marked inputs reach each output."""
    marks = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> int:
        return _NO if isinstance(v, Literal) else marks.get(v, _NO)

    for eqn in jaxpr.eqns:
        marks.update(zip(eqn.outvars, _through(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: JaxprEqn, into: list[int]) -> list[int]:
    name, n_out = eqn.primitive.name, len(eqn.outvars)
    joint = _any(into)
    if not joint:
        return [_NO] * n_out
    inner = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in _parts(eqn)]
    if name in _CALLS and len(inner) == 1:
        return _marks(inner[0], into)
    if name == "scan":
        return _through_scan(eqn, inner[0], into)
    if name == "cond" and not into[0]:
        return [_any(m) for m in zip(*(_marks(branch, into[1:]) for branch in inner), strict=True)]
    if inner and not name.startswith("scatter"):  # some other operation with functions inside, in which steps may hide
        return [_STEP] * n_out
    smooth = name not in _STEPS
    return [
        joint if smooth and jnp.issubdtype(v.aval.dtype, jnp.inexact) else _STEP  # type: ignore[attr-defined]
        for v in eqn.outvars
    ]


def _through_scan(eqn: JaxprEqn, body: Jaxpr, into: list[int]) -> list[int]:
    # Inputs are constants, carry and sequences, outputs carry and sequences, and a sequence has one axis more than its
    # elements inside. JAX's own counts of them have changed names.
    num_carry = sum(v.aval.ndim == w.aval.ndim for v, w in zip(eqn.outvars, body.outvars, strict=True))  # type: ignore[attr-defined]
    num_xs = sum(v.aval.ndim != w.aval.ndim for v, w in zip(eqn.invars, body.invars, strict=True))  # type: ignore[attr-defined]
    stop = len(into) - num_xs
    num_consts = stop - num_carry
    consts, carry, xs = into[:num_consts], into[num_consts:stop], into[stop:]
    while True:
        out = _marks(body, consts + carry + xs)
        grown = [_any(m) for m in zip(carry, out, strict=False)]
        if grown == carry:
            return carry + out[num_carry:]
        carry = grown


def _parts(eqn: JaxprEqn) -> list[Any]:
    """The functions inside an operation."""
    values = [w for p in eqn.params.values() for w in (p if isinstance(p, tuple | list) else (p,))]
    return [p for p in values if isinstance(p, ClosedJaxpr | Jaxpr)]


def _any(marks: Sequence[int]) -> int:
    """The stronger of several marks."""
    return max(marks, default=_NO)


def depends_on_inputs(jaxpr: Jaxpr, inputs: Sequence[bool], *, discrete: bool = False) -> list[bool]:
    """Which outputs of `jaxpr` vary with the marked inputs; calls mix all that goes in.

    Comparisons count, and integers made of the inputs, only where these are `discrete`.
    """
    tainted = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in tainted for v in eqn.invars):
            tainted.update(v for v in eqn.outvars if discrete or jnp.issubdtype(v.aval.dtype, jnp.inexact))  # type: ignore[attr-defined]
    return [not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars]


def depends_on_data(jaxpr: Jaxpr, is_discrete: Sequence[bool]) -> list[bool]:
    """Which outputs vary with the data, the first inputs, each of which is discrete or not."""
    rest = [False] * (len(jaxpr.invars) - len(is_discrete))
    smoothly = depends_on_inputs(jaxpr, [not d for d in is_discrete] + rest)
    at_all = depends_on_inputs(jaxpr, [*is_discrete, *rest], discrete=True)
    return [a or b for a, b in zip(smoothly, at_all, strict=True)]


def treats_rows_alike(trace: Callable[[int], ClosedJaxpr]) -> bool:
    """Whether a density takes any number of rows, and does the same to each of them wherever it stands.

    Running the model on other rows is not evidence enough: indices out of range are clamped, so that `z[i]` of a
    covariate z would quietly take wrong values. The traces for two numbers of rows must differ in that number alone,
    and no output may depend on the rows' indices.

    Args:
        trace: from n to the jaxpr of the log density (n,) of n rows (n, D) with plate indices (n,).
    """
    sizes = (1009, 1013)  # primes, which no other dimension is likely to be
    texts = []
    for n in sizes:
        closed = trace(n)
        if [v.aval.shape for v in closed.jaxpr.outvars] != [(n,)]:
            return False
        if any(n in jnp.shape(c) for c in closed.consts) or _depends_on_position(closed.jaxpr, n):
            return False
        # A number that is part of a shape, not a constant such as 1009.0 or 1009:i32[].
        texts.append((re.sub(rf"(?<![\w.]){n}(?![\w.:])", "n", str(closed.jaxpr)), closed.consts))
    (one, one_consts), (two, two_consts) = texts
    same_consts = len(one_consts) == len(two_consts) and all(
        a is b or (not isinstance(a, jax.core.Tracer) and not isinstance(b, jax.core.Tracer) and np.array_equal(a, b))
        for a, b in zip(one_consts, two_consts, strict=False)
    )
    return one == two and same_consts


def numbers_per_row(jaxpr: Jaxpr, n: int) -> tuple[int, int]:
    """The numbers for each of n rows: the most that any operation gives, and what all give together, both at least 1.

    n is a size that nothing but the rows has. A loop over a known number of steps counts as often for the second.
    """
    most, total = 1, 0
    for eqn in jaxpr.eqns:
        sizes = [math.prod(v.aval.shape) // n for v in eqn.outvars if n in v.aval.shape]  # type: ignore[attr-defined]
        inner = [numbers_per_row(p.jaxpr if isinstance(p, ClosedJaxpr) else p, n) for p in _parts(eqn)]
        most = max([most, *sizes, *(m for m, _ in inner)])
        # What a function inside gives is counted there.
        total += eqn.params.get("length", 1) * sum(t for _, t in inner) if inner else sum(sizes)
    return most, max(total, 1)


def _depends_on_position(jaxpr: Jaxpr, n: int) -> bool:
    """Whether an output varies with the last input, the plate's indices, or with a count of n made on the way."""
    tainted = {jaxpr.invars[-1]}
    for eqn in _needed(jaxpr):
        if _counts(eqn, n) or any(not isinstance(v, Literal) and v in tainted for v in eqn.invars):
            tainted.update(eqn.outvars)
    return any(not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars)


def _counts(eqn: JaxprEqn, n: int) -> bool:
    if eqn.primitive.name == "iota":
        return n in eqn.params["shape"]
    if eqn.primitive.name.startswith("cum"):  # a running sum, product or maximum
        return eqn.outvars[0].aval.shape[eqn.params["axis"]] == n  # type: ignore[attr-defined]
    inner = [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in _parts(eqn)]
    return any(_counts(e, n) for p in inner for e in _needed(p))


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The operations that the outputs need: a plate counts its rows wherever a model runs, and mostly for nothing."""
    needed, found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
            found.append(eqn)
    return found[::-1]
