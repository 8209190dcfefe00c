"""Compiled programs that outlive the function they were traced from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

__all__ = ["being_traced", "compiled", "run_compiled", "shared_jit"]

_KEPT = 64  # programs
_MOST = 2**20  # bytes of constants of a program that is kept
# The last used first, each with its precision, options and constants.
_programs: list[tuple[Jaxpr, Any, Callable[..., Any]]] = []

# Rules for derivatives, which are functions and never equal. Nothing is differentiated here.
_RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"}


def being_traced(tree: Any) -> bool:
    """Whether a JAX transformation is at work, on these values or around."""
    leaves = [*jax.tree.leaves(tree), jnp.zeros(())]  # inside of `jit` a new array is traced, too
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def run_compiled(f: Callable[..., Any], *args: Any) -> Any:
    """`jax.jit(f)(*args)`, where f may be a new function at each call that closes over other values.

    It is traced at each call, and compiled if no program of the same operations was compiled before: the comparison
    is of every operation and its settings, so that a program is at worst compiled once more. JAX's arrays that f
    closes over are inputs of the program. Under a transformation of these or of the arguments, and with
    NumPy's arrays closed over, it is `jax.jit(f)`.
    """
    return compiled(f, *args)(*args)


def shared_jit(f: Callable[..., Any], static_argnames: tuple[str, ...] = (), **options: Any) -> Callable[..., Any]:
    """`jax.jit(f, static_argnames)`, of a function that several objects have, each over its own model.

    Each traces it once for arguments of the same types, and all that trace to the same operations share one program:
    thousands of fits of a simulation compile no more than the first. See :func:`run_compiled`.

    Args:
        f: a function or method.
        static_argnames: its arguments that are no arrays, given by name.
        **options: the compiler's; ignored inside of another program.
    """
    plain = jax.jit(f, static_argnames=static_argnames)
    alone = jax.jit(f, static_argnames=static_argnames, compiler_options=options) if options else plain
    last: list[Any] = [(None, None)]  # a trace and its program, as to compare traces takes time

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        if being_traced((args, kwargs)):
            return plain(*args, **kwargs)
        traced = plain.trace(*args, **kwargs)
        closed = traced.jaxpr
        known, program = last[0]  # at once, as another thread may be here too
        if known is not closed:
            program = _program(closed, getattr(f, "__name__", "run"), options)
            last[0] = closed, program
        if program is None:
            return alone(*args, **kwargs)
        leaves = jax.tree.leaves((args, {k: v for k, v in kwargs.items() if k not in static_argnames}))
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), program(_arrays(closed.consts), _as_jax(leaves)))

    return run


def compiled(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """What :func:`run_compiled` runs, for several calls with arguments of the same types: f is traced once."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        return jax.jit(f)
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    program, treedef = _program(closed), jax.tree.structure(shapes)
    if program is None:
        return jax.jit(f)

    def run(*args: Any) -> Any:
        return jax.tree.unflatten(treedef, program(_arrays(closed.consts), _as_jax(jax.tree.leaves(args))))

    return run


def _arrays(consts: list[Any]) -> list[Any]:
    """JAX's arrays among what a program closes over, which are inputs; None in place of the others."""
    return [c if isinstance(c, jax.Array) else None for c in consts]


def _numpys(consts: list[Any]) -> list[Any]:
    """What is none of JAX's arrays, and stays in the program; None in place of these.

    Copies, as JAX knows an array that it has seen in one precision, while anything holds it, in that precision only.
    """
    return [None if isinstance(c, jax.Array) else np.array(c) for c in consts]


def _as_jax(leaves: list[Any]) -> list[Any]:
    # JAX 0.10 to 0.12 may take a NumPy array in the precision of the program that last returned it, and fail on it in
    # another precision.
    return [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in leaves]


def _program(
    closed: ClosedJaxpr, name: str = "run", options: dict[str, Any] | None = None
) -> Callable[[list[Any], list[Any]], list[Any]] | None:
    """The program from what a function closes over and its arguments' leaves; None if it is not to be kept."""
    jaxpr, consts = closed.jaxpr, closed.consts
    size = sum(np.asarray(c).nbytes for c in consts if not isinstance(c, jax.Array))
    if size > _MOST or any(isinstance(c, jax.core.Tracer) for c in consts):
        return None
    numpys = _numpys(consts)
    # JAX narrows NumPy's numbers where it sees them first, and not here.
    kept = [(c, v.aval) for c, v in zip(numpys, jaxpr.constvars, strict=True) if c is not None]
    if any(c.dtype != aval.dtype or aval.weak_type for c, aval in kept):
        return None
    wanted = [bool(jax.config.jax_enable_x64), sorted((options or {}).items()), numpys]  # type: ignore[attr-defined]
    for i, (known, compiled_for, program) in enumerate(_programs):
        if _equal(compiled_for, wanted) and _same(known, jaxpr):
            _programs.insert(0, _programs.pop(i))
            return program

    def run(arrays: list[Any], leaves: list[Any]) -> list[Any]:
        both = [given if own is None else own for given, own in zip(arrays, numpys, strict=True)]
        return jax.core.eval_jaxpr(jaxpr, both, *leaves)

    run.__name__ = name  # in profiles and logs
    _programs.insert(0, (jaxpr, wanted, jax.jit(run, compiler_options=options or None)))
    del _programs[_KEPT:]
    return _programs[0][2]


def _same(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two programs have the same operations on inputs of the same types."""
    if a is b:
        return True
    if len(a.eqns) != len(b.eqns):
        return False
    names: dict[Any, Any] = {}

    def binds(v: Any, w: Any) -> bool:
        names[v] = w
        return v.aval == w.aval

    def reads(v: Any, w: Any) -> bool:
        if isinstance(v, Literal) or isinstance(w, Literal):
            return type(v) is type(w) and v.aval == w.aval and _equal(v.val, w.val)
        return names.get(v) is w

    def all_of(test: Callable[[Any, Any], bool], vs: Any, ws: Any) -> bool:
        return len(vs) == len(ws) and all(map(test, vs, ws))

    def same_step(p: JaxprEqn, q: JaxprEqn) -> bool:
        return (
            p.primitive is q.primitive
            and p.ctx == q.ctx
            and p.effects == q.effects
            and all_of(reads, p.invars, q.invars)
            and p.params.keys() == q.params.keys()
            and all(_equal(v, q.params[k]) for k, v in p.params.items() if k not in _RULES)
            and all_of(binds, p.outvars, q.outvars)
        )

    inputs = all_of(binds, [*a.constvars, *a.invars], [*b.constvars, *b.invars])
    return inputs and all_of(same_step, a.eqns, b.eqns) and all_of(reads, a.outvars, b.outvars)


def _equal(a: Any, b: Any) -> bool:
    """Whether two settings of an operation are the same; False if that cannot be told."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Jaxpr):
        return _same(a, b)
    if isinstance(a, ClosedJaxpr):
        return _same(a.jaxpr, b.jaxpr) and _equal(a.consts, b.consts)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.shape(a) == np.shape(b) and a.tobytes() == b.tobytes()
    if isinstance(a, float) and a != a:
        return bool(b != b)  # NaN is not equal to itself
    # A float that is equal may still be another number: -0.0.
    return isinstance(a, Hashable) and not isinstance(a, jax.Array) and a == b and repr(a) == repr(b)
