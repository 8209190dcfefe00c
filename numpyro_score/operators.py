"""Derivatives of a batch of independent rows, at the least known cost.

Every function takes a callable `f` from rows (N, D) to values (N,) whose value n depends on row n alone, so that the
gradient of the sum is the gradient of each row. None of them loops over rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from folx import forward_laplacian
from folx.api import FwdJacobian, FwdLaplArray
from folx.wrapped_functions import is_registered
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, Float

__all__ = [
    "Frame",
    "RowFunction",
    "full_precision",
    "score_and_directional",
    "sliced_derivatives",
    "value_score",
    "value_score_laplacian",
]

P = ParamSpec("P")
T = TypeVar("T")
RowFunction = Callable[[Array], Array]


class Frame(NamedTuple):
    """The frame at some rows: the map v ↦ A v of (..., N, D), and b, (N, D)."""

    apply: Callable[[Array], Array]
    drift: Float[Array, "n d"]


def full_precision(f: Callable[P, T]) -> Callable[P, T]:
    """`f` with all products of matrices in the precision of their dtype, as differences of densities need.

    On GPUs and TPUs JAX rounds float32 factors to 10 bits or fewer unless told otherwise. A precision that the model
    gives to an operation itself stays.
    """

    @functools.wraps(f)
    def precise(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return f(*args, **kwargs)

    return precise


def value_score(f: RowFunction, x: Float[Array, "*n d"]) -> tuple[Float[Array, "*n"], Float[Array, "*n d"]]:
    """Value and score ∇f of each row, by one reverse pass: (..., D) to ((...), (..., D))."""
    value, pull = jax.vjp(f, x)
    return value, pull(jnp.ones_like(value))[0]


def sliced_derivatives(
    f: RowFunction, x: Float[Array, "n d"], v: Float[Array, "m n d"]
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """First and second derivative of each row along each of M directions: (v·∇f, vᵀ∇²f v), in one forward pass.

    Forward over forward is cheaper than a Hessian-vector product here, because only scalars along v are wanted.
    """

    def along(u: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda y: jax.jvp(f, (y,), (u,))[1], (x,), (u,))

    if v.shape[0] == 1:  # a batch of one direction would make every matrix product a batched one
        first, second = along(v[0])
        return first[None], second[None]
    return jax.vmap(along)(v)


def score_and_directional(
    f: RowFunction, x: Float[Array, "n d"], v: Float[Array, "m n d"]
) -> tuple[Float[Array, "n d"], Float[Array, "m n d"]]:
    """Score ∇f and its derivative along each of M directions, ∇²f v: forward over reverse, one shared score."""

    def score(y: Array) -> Array:
        return value_score(f, y)[1]

    if v.shape[0] == 1:
        value, along = jax.jvp(score, (x,), (v[0],))
        return value, along[None]
    value, push = jax.linearize(score, x)
    return value, jax.vmap(push)(v)


def value_score_laplacian(
    f: RowFunction, x: Float[Array, "n d"], frame: Frame | None = None, *, forward: bool = True
) -> tuple[Float[Array, "n"], Float[Array, "n d"], Float[Array, "n"]]:
    """Value, score and Laplacian tr ∇²f of each row, exactly: (N, D) to ((N,), (N, D), (N,)).

    With a frame (A, b) of the rows the second is A ∇f and the third tr(A ∇²f A) + b·∇f, at the same cost.

    The forward Laplacian [Li et al. 2024, "A computational framework for neural network-based variational Monte Carlo
    with Forward Laplacian"] carries the three together through the network in one pass, at D + 2 evaluations. The
    batch goes through whole: its Jacobian with respect to a row's own coordinates is (D, N, ...). Where `folx` has no
    rule for an operation, or `forward` is false, the trace is taken one direction at a time, at about 3 D evaluations.
    """
    n, d = x.shape
    tangents = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype)[:, None, :], (d, n, d))
    drift = jnp.zeros_like(x)
    if frame is not None:
        tangents, drift = frame.apply(tangents), frame.drift
    if not forward or not has_forward_laplacian(jax.make_jaxpr(f)(x).jaxpr):
        return _by_directions(f, x, tangents, drift)
    out = forward_laplacian(f, disable_jit=True)(FwdLaplArray(x, FwdJacobian.from_dense(tangents), drift))
    if not isinstance(out, FwdLaplArray):  # f does not depend on x
        return out, jnp.zeros_like(x), jnp.zeros_like(out)
    return out.x, out.dense_jacobian.T, out.laplacian


def _by_directions(f: RowFunction, x: Array, tangents: Array, drift: Array) -> tuple[Array, Array, Array]:
    value, score = value_score(f, x)
    _, push = jax.linearize(lambda y: value_score(f, y)[1], x)

    def along(tangent: Array) -> tuple[Array, Array]:
        return jnp.sum(tangent * score, axis=-1), jnp.sum(tangent * push(tangent), axis=-1)

    first, second = jax.lax.map(along, tangents, batch_size=min(len(tangents), 16))
    return value, first.T, second.sum(0) + jnp.sum(drift * score, axis=-1)


# Functions that `folx` recognises by the name of their `jit` alone. A user's function of the same name would get the
# library function's Laplacian, so the names count only where the traced code is the library's own.
_NAMED: dict[str, Callable[..., object]] = {
    "sign": jnp.sign,
    "logaddexp": jnp.logaddexp,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "slogdet": jnp.linalg.slogdet,
    "det": jnp.linalg.det,
    "inv": jnp.linalg.inv,
    "solve": jnp.linalg.solve,
}


def has_forward_laplacian(jaxpr: Jaxpr) -> bool:
    """Whether `folx` has a rule for everything in `jaxpr` that depends on its inputs."""
    return _supported(jaxpr, [True] * len(jaxpr.invars))


def _supported(jaxpr: Jaxpr, depends: list[bool]) -> bool:
    tainted = {v for v, yes in zip(jaxpr.invars, depends, strict=True) if yes}
    for eqn in jaxpr.eqns:
        into = [not isinstance(v, Literal) and v in tainted for v in eqn.invars]
        if not any(into) or eqn.primitive.name == "stop_gradient":
            continue
        # Comparisons have no derivative, and what is made of their results needs no rule.
        tainted.update(v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact))  # type: ignore[attr-defined]
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            if is_registered(eqn.params["name"]):
                if not _is_library_function(eqn.params["name"], inner.jaxpr):
                    return False
            elif not _supported(inner.jaxpr, into):
                return False
        elif name == "custom_jvp_call":
            if not _supported(eqn.params["call_jaxpr"].jaxpr, into):
                return False
        elif not is_registered(eqn.primitive):
            return False
    return True


def _is_library_function(name: str, jaxpr: Jaxpr) -> bool:
    if name not in _NAMED:
        return False
    try:
        own = jax.make_jaxpr(_NAMED[name])(*(v.aval for v in jaxpr.invars)).jaxpr
    except (TypeError, ValueError):  # called with other arguments than the library's function takes
        return False
    if len(own.eqns) != 1 or own.eqns[0].primitive.name not in ("jit", "pjit"):
        return False
    return str(own.eqns[0].params["jaxpr"].jaxpr) == str(jaxpr)
