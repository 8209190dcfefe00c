"""The derivative operators, against Hessians of single rows and closed forms, in float64."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from models import FAST_COMPILE

from numpyro_score import operators

pytestmark = pytest.mark.usefixtures("x64")

HIDDEN = 6


class Case(NamedTuple):
    """A row function `f(theta, x)`, and whether the forward Laplacian has a rule for all of it.

    None where either route will do.
    """

    f: Callable[[Any, Any], Any]
    forward: bool | None = True


def parameters(d):
    """Parameters that every case draws on; K is symmetric and positive definite."""
    rng = np.random.default_rng(d)
    root = rng.normal(size=(d, d)) / np.sqrt(d)
    return {
        "K": root @ root.T + np.eye(d),
        "B": rng.normal(size=(d, d)) / np.sqrt(d),
        "W": rng.normal(size=(d, HIDDEN)) / np.sqrt(d),
        "b": rng.normal(size=HIDDEN),
        "w": rng.normal(size=HIDDEN),
        "a": rng.uniform(0.5, 1.5, size=d),
        "C": rng.normal(size=(3, d)),
    }


def mlp(activation):
    def f(t, x):
        return activation(activation(x @ t["W"] + t["b"]) * t["b"]) @ t["w"]

    return f


def named(name, fn):
    """A user's jitted function that happens to have the name of a library function."""
    fn.__name__ = fn.__qualname__ = name
    return jax.jit(fn)


def outer(x):
    return x[..., :, None] * x[..., None, :]


def in_scan(t, x):
    def step(carry, column):
        carry = jnp.tanh(0.5 * carry + column[:, None] * t["w"])
        return carry, (carry**2).sum(-1)

    carry, ys = lax.scan(step, jnp.zeros((len(x), HIDDEN)), x.T)
    return carry @ t["b"] + ys.sum(0)


def in_cond(t, x):
    return lax.cond(t["a"][0] > 0, lambda y: jnp.sin(y) @ t["a"], lambda y: y @ t["a"], x)


def cond_by_row(t, x):
    def row(r):
        return lax.cond(r[0] > 0, lambda y: (y**3) @ t["a"], lambda y: jnp.cos(y) @ t["a"], r)

    return jax.vmap(row)(x)


def conv(t, x):
    y = lax.conv_general_dilated(x[:, None, :], t["w"][:3].reshape(1, 1, 3), (1,), "SAME")
    return (jnp.tanh(y[:, 0]) ** 2) @ t["a"]


def indexing(t, x):
    y = jnp.concatenate([x[:, ::-1], jnp.pad(x, ((0, 0), (1, 2)))], axis=1)
    y = y.at[:, 0].add(x[:, -1] ** 2)
    return (jnp.take_along_axis(y, jnp.argmax(y, 1, keepdims=True), 1)[:, 0] + y.sum(1)) ** 3


def fourier(t, x):
    return jnp.sum(jnp.abs(jnp.fft.fft(jnp.sin(x))) ** 4, -1)


CASES = {
    "quadratic": Case(lambda t, x: -0.5 * jnp.einsum("ni,ij,nj->n", x, t["K"], x)),
    "quartic": Case(lambda t, x: -(x**4) @ t["a"]),
    "linear": Case(lambda t, x: x @ t["a"]),
    "constant": Case(lambda t, x: jnp.full(x.shape[0], t["a"].sum()), forward=None),
    "piecewise constant": Case(lambda t, x: jnp.round(3 * x) @ t["a"], forward=None),
    "swish network": Case(mlp(jax.nn.swish)),
    "tanh network": Case(mlp(jnp.tanh)),
    "softplus network": Case(mlp(jax.nn.softplus)),
    "gelu network": Case(mlp(jax.nn.gelu)),
    "relu network": Case(mlp(jax.nn.relu)),
    "network by row": Case(lambda t, x: jax.vmap(lambda r: jnp.tanh(r @ t["W"]) @ t["w"])(x)),
    "mixture": Case(lambda t, x: jax.nn.logsumexp(-0.5 * jnp.sum((x[:, None] - t["C"]) ** 2, -1), axis=-1)),
    "norm": Case(lambda t, x: jnp.linalg.norm((x - t["C"][0]) * t["a"], axis=-1)),
    "sin exp log1p": Case(lambda t, x: (jnp.sin(x) * jnp.exp(0.3 * x) + jnp.log1p(x**2)) @ t["a"]),
    "erf lgamma power": Case(
        lambda t, x: (lax.erf(x) * jax.scipy.special.gammaln(1 + x**2) + jnp.abs(x) ** 2.5) @ t["a"]
    ),
    "division prod where": Case(lambda t, x: jnp.prod(1 + x**2, -1) ** 0.1 / (1 + jnp.where(x > 0, x**2, -x).sum(-1))),
    "logaddexp": Case(lambda t, x: jnp.logaddexp(x @ t["C"][0], (x**2) @ t["a"])),
    "softmax": Case(lambda t, x: jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x * t["a"]), -1)),
    "max": Case(lambda t, x: jnp.max(x * t["a"], -1) ** 3),
    "sort": Case(lambda t, x: (jnp.sort(x, -1) ** 3) @ t["a"], forward=False),
    "cumsum": Case(lambda t, x: (jnp.cumsum(x, -1) ** 3) @ t["a"]),
    "indexing": Case(indexing),
    "einsum of two": Case(lambda t, x: jnp.einsum("ni,ij,nj->n", jnp.sin(x), t["B"], x**2)),
    "slogdet": Case(lambda t, x: jnp.linalg.slogdet(t["K"] + outer(x))[1]),
    "det": Case(lambda t, x: jnp.linalg.det(t["K"] + outer(jnp.sin(x)))),
    "inv": Case(lambda t, x: jnp.einsum("ni,nij,nj->n", x, jnp.linalg.inv(t["K"] + outer(x)), x)),
    "solve": Case(lambda t, x: jnp.sum(x * jnp.linalg.solve(t["K"] + outer(x), x[..., None])[..., 0], -1)),
    "cholesky": Case(
        lambda t, x: (
            jnp.log(jnp.linalg.cholesky(t["K"] + outer(x))).trace(axis1=1, axis2=2)
            if x.shape[1] == 1
            else jnp.sum(jnp.linalg.cholesky(t["K"] + outer(x)) ** 3, (1, 2))
        ),
        forward=False,
    ),
    "scan": Case(in_scan, forward=False),
    "fori_loop": Case(
        lambda t, x: lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ t["B"]) + x, x) @ t["a"],
        forward=False,
    ),
    "cond": Case(in_cond, forward=False),
    "cond by row": Case(cond_by_row),
    "checkpoint": Case(lambda t, x: jax.checkpoint(lambda y: jnp.tanh(y @ t["W"]))(x) @ t["w"], forward=False),
    "convolution": Case(conv, forward=False),
    "fft": Case(fourier, forward=False),
    "user's jit": Case(lambda t, x: named("energy", lambda y, w: jnp.tanh(y @ w))(x, t["W"]) @ t["w"]),
    "library sigmoid and silu": Case(lambda t, x: jnp.sum(jax.nn.sigmoid(x) * jax.nn.silu(2 * x) * jnp.sign(x), -1)),
    # Other mathematics under names that the forward Laplacian has library rules for.
    "named inv": Case(lambda t, x: named("inv", lambda y: 1 / (1 + y**2))(x) @ t["a"], forward=False),
    "named inv by row": Case(lambda t, x: jax.vmap(named("inv", lambda r: (r**2) @ t["K"]))(x) @ t["a"], forward=False),
    "named softplus": Case(
        lambda t, x: named("softplus", lambda y: jnp.log1p(jnp.exp(2 * y)) / 2)(x) @ t["a"],
        forward=False,
    ),
    "named sigmoid": Case(lambda t, x: named("sigmoid", lambda y: y**3)(x) @ t["a"], forward=False),
    "named silu": Case(lambda t, x: named("silu", lambda y: jnp.sin(y))(x) @ t["a"], forward=False),
    "named sign": Case(lambda t, x: named("sign", lambda y: y**2)(x) @ t["a"], forward=False),
    "named solve": Case(lambda t, x: named("solve", lambda k, y: (y @ k) * y)(t["K"], x) @ t["a"], forward=False),
    "named det": Case(lambda t, x: named("det", lambda y: jnp.sum(y**3, (-1, -2)))(outer(x)), forward=False),
    "named slogdet": Case(lambda t, x: named("slogdet", lambda y: jnp.sin(y).sum((-1, -2)))(outer(x)), forward=False),
    "named logaddexp": Case(
        lambda t, x: named("logaddexp", lambda y, z: y * z)(x @ t["a"], jnp.sin(x[:, 0])),
        forward=False,
    ),
}

# Every case on the largest shape; those that differ in kind also on the small ones.
CORE = ["quadratic", "constant", "swish network", "norm", "max", "sort", "slogdet", "named inv"]
RUNS = [(name, (5, 7)) for name in CASES]
RUNS += [(name, (1, 1)) for name in CORE]
RUNS += [(name, shape) for name in ("quadratic", "sort", "slogdet") for shape in ((1, 7), (5, 1))]
# By the forward Laplacian the gradient goes through its rules; direction by direction it is all JAX's own.
SLICED = [*CORE, "relu network", "scan", "cond", "checkpoint", "convolution"]  # the other operators are JAX's alone
DIFFERENTIATED = ["quadratic", "softplus network", "relu network", "norm", "mixture", "logaddexp", "cumsum"]
DIFFERENTIATED += ["max", "constant", "slogdet", "solve", "sort", "named inv", "checkpoint"]


def rows(n, d):
    """Rows, and directions: one where there is one row, else three."""
    rng, m = np.random.default_rng(100 * n + d), 1 if n == 1 else 3
    return jnp.asarray(rng.normal(size=(n, d))), jnp.asarray(rng.normal(size=(m, n, d)))


def by_hessian(f, x):
    """Value, score and Hessian of each row on its own: the reference."""

    def single(r):
        return f(r[None])[0]

    return (jax.vmap(g)(x) for g in (single, jax.grad(single), jax.hessian(single)))


def operators_and_reference(f, x, v, sliced):
    """Everything the operators give, beside the same from Hessians."""
    ours = {"exact": operators.value_score_laplacian(f, x)}
    value, score, hessian = by_hessian(f, x)
    reference = {"exact": (value, score, jnp.trace(hessian, axis1=1, axis2=2))}
    if sliced:
        ours["value_score"] = operators.value_score(f, x)
        ours["sliced"] = operators.sliced_derivatives(f, x, v)
        ours["directional"] = operators.score_and_directional(f, x, v)
        along = jnp.einsum("nij,mnj->mni", hessian, v)
        first, second = jnp.einsum("mni,ni->mn", v, score), jnp.einsum("mni,mni->mn", v, along)
        reference |= {"value_score": (value, score), "sliced": (first, second), "directional": (score, along)}
    return ours, reference


def objectives(f, x, sliced):
    """The mean of ISM over rows by each operator, and last the reference, by Hessians."""
    _, score, laplacian = operators.value_score_laplacian(f, x)
    rows = [0.5 * jnp.sum(score**2, -1) + laplacian]
    if sliced:
        unit = jnp.broadcast_to(jnp.eye(x.shape[1])[:, None], (x.shape[1], *x.shape))
        first, second = operators.sliced_derivatives(f, x, unit)
        rows.append(0.5 * jnp.sum(first**2, 0) + jnp.sum(second, 0))
        score, along = operators.score_and_directional(f, x, unit)
        rows.append(0.5 * jnp.sum(score**2, -1) + jnp.einsum("mnm->n", along))
    _, score, hessian = by_hessian(f, x)
    rows.append(0.5 * jnp.sum(score**2, -1) + jnp.trace(hessian, axis1=1, axis2=2))
    return jnp.stack(rows).mean(1)


def assert_close(ours, reference, tolerance=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max())),
        ours,
        reference,
    )


@pytest.fixture
def routes(monkeypatch):
    """The routes that `value_score_laplacian` took: forward Laplacian or direction by direction."""
    taken = []
    for name in ("forward_laplacian", "_by_directions"):
        original = getattr(operators, name)

        def spy(*args, _name=name, _original=original, **kwargs):
            taken.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(operators, name, spy)
    return taken


@pytest.mark.parametrize(("name", "shape"), RUNS, ids=lambda v: str(v).replace(", ", "x"))
def test_operators_equal_hessians(name, shape, routes, caplog):
    """Value, score, Laplacian and directional derivatives are those of each row's Hessian."""
    case, theta = CASES[name], parameters(shape[1])
    ours, reference = jax.jit(
        lambda t, x, v: operators_and_reference(lambda y: case.f(t, y), x, v, name in SLICED),
        compiler_options=FAST_COMPILE,
    )(theta, *rows(*shape))
    if case.forward is not None:
        assert routes == ["forward_laplacian" if case.forward else "_by_directions"]
    assert not caplog.records  # folx reports through the root logger
    assert_close(ours, reference)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_parameter_gradient_through_operators(name):
    """Reverse mode in the parameters goes through every operator as through a Hessian."""
    case, x, sliced = CASES[name], rows(2, 3)[0], name in SLICED
    gradient = jax.jit(
        jax.grad(lambda t, pick: objectives(lambda y: case.f(t, y), x, sliced) @ pick),
        compiler_options=FAST_COMPILE,
    )
    *ours, reference = (gradient(parameters(3), pick) for pick in np.eye(4 if sliced else 2))
    for one in ours:
        assert_close(one, reference, 1e-8)


def test_closed_forms():
    """Scores and Laplacians that are known on paper: quadratic, quartic, norm, log-determinant."""
    t, x = parameters(7), np.asarray(rows(5, 7)[0])
    square = np.sum(x**2, -1)
    cases = {
        "quadratic": (CASES["quadratic"].f, -x @ t["K"], np.full(5, -np.trace(t["K"]))),
        "quartic": (CASES["quartic"].f, -4 * t["a"] * x**3, -12 * (x**2) @ t["a"]),
        "norm": (
            lambda t, x: jnp.linalg.norm(x, axis=-1),
            x / np.sqrt(square)[:, None],
            6 / np.sqrt(square),
        ),
        "slogdet": (  # det(I + xxᵀ) = 1 + ‖x‖²
            lambda t, x: jnp.linalg.slogdet(jnp.eye(7) + outer(x))[1],
            2 * x / (1 + square)[:, None],
            14 / (1 + square) - 4 * square / (1 + square) ** 2,
        ),
    }
    for f, score, laplacian in cases.values():

        @jax.jit
        def both(x, f=f):
            g = functools.partial(f, t)
            return operators.value_score(g, x), operators.value_score_laplacian(g, x)

        (_, once), (_, again, trace) = both(x)
        assert_close((once, again, trace), (score, score, laplacian))


def test_custom_vjp():
    """A function with its own reverse rule keeps it in every operator that uses reverse mode."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (5 * x**2 * g,))  # not 3x²: the rule is used

    def f(x):
        return cube(x).sum(-1)

    x, v = rows(5, 7)
    assert_close(operators.value_score(f, x), ((x**3).sum(-1), 5 * x**2))
    assert_close(operators.score_and_directional(f, x, v), (5 * x**2, 10 * x * v))
    assert_close(operators.value_score_laplacian(f, x)[1:], (5 * x**2, 10 * x.sum(-1)))
    # Forward over forward is the one that JAX cannot do; it depends on the version how it says so.
    with pytest.raises((TypeError, NotImplementedError)):
        operators.sliced_derivatives(f, x, v)


def test_while_loop():
    """Through a loop of unknown length derivatives go forward only, and JAX says so."""

    def f(x):
        def double(state):
            return state[0] + 1, 2 * state[1]

        return lax.while_loop(lambda s: s[0] < 3, double, (0, x**3))[1].sum(-1)

    x, v = rows(5, 7)
    first, second = operators.sliced_derivatives(f, x, v)
    assert_close(first, jnp.einsum("ni,mni->mn", 24 * x**2, v))
    assert_close(second, jnp.einsum("ni,mni->mn", 48 * x, v**2))
    for operator in (operators.value_score, operators.value_score_laplacian):
        with pytest.raises(ValueError, match="while_loop"):
            operator(f, x)


def test_annotations_can_be_checked():
    """A checker of types sees a wrong shape; see conftest.py."""
    checked = jaxtyping.jaxtyped(operators.value_score_laplacian, typechecker=beartype.beartype)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(lambda x: x.sum(-1), jnp.ones((2, 3, 4)))
