"""Steps of Markov chains on the integers, many at once: pure functions of keys and arrays.

Rows hold integers as floats. Their log density is exact there; where a chain is led by its gradient, that is a guide
alone: each proposal is accepted by the rule of Metropolis and Hastings, and the law of the chains is exact.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.kernels.langevin import Chains, LogDensity
from numpyro_score.operators import value_score

__all__ = [
    "Lattice",
    "LatticeState",
    "discrete_langevin_chains",
    "gibbs_chains",
    "gibbs_with_gradients_chains",
]


class Lattice(NamedTuple):
    """A law on a product of sets of successive integers."""

    log_density: LogDensity  # f, (..., D) to (...), up to a constant; its derivative is that of some extension
    low: Float[Array, "*batch d"] | float  # the least values, which broadcast to rows
    high: Float[Array, "*batch d"] | float  # the largest values, or infinity
    num_values: int | None  # the most values of a number; None if there is no largest one


class LatticeState(NamedTuple):
    """Where chains are, one for each row."""

    x: Float[Array, "*batch d"]
    log_density: Float[Array, "*batch"]
    slope: Float[Array, "*batch d"] | None  # ∇f, for chains that it leads
    accept_prob: Float[Array, "*batch"]  # of the last step, the mean over its proposals
    diverging: Bool[Array, "*batch"]  # whether the log density was not finite


def gibbs_chains(lattice: Lattice, scan: Literal["systematic", "random"] = "systematic") -> Chains:
    """Gibbs chains: each number in turn is drawn from its law given the others [Geman & Geman 1984].

    A step draws D numbers, in their order or at random, and takes D (V − 1) densities for V values.

    Args:
        lattice: with finitely many values.
        scan: "systematic" or "random".
    """
    if lattice.num_values is None:
        raise ValueError(
            "Gibbs draws from all values of a number, and counts have no largest one, or the model computes its "
            "bounds: use GibbsWithGradients(), or write bounds as Python or NumPy integers."
        )

    def step(rng_key: Array, state: LatticeState) -> LatticeState:
        dim = state.x.shape[-1]
        order_key, key = jax.random.split(rng_key)
        order = jnp.arange(dim)
        if scan == "random":
            order = jax.random.randint(order_key, (dim,), 0, dim)

        def draw(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            return _draw_one(lattice, *carry, *at), None

        (x, f), _ = jax.lax.scan(draw, (state.x, state.log_density), (jax.random.split(key, dim), order))
        return LatticeState(x, f, None, jnp.ones_like(f), ~jnp.isfinite(f))

    return Chains(lambda x: _start(lattice, x, led=False), step)


def _draw_one(lattice: Lattice, x: Array, f: Array, rng_key: Array, d: Array) -> tuple[Array, Array]:
    """Rows with number d drawn from its law given the others, and their log densities."""
    num_values = lattice.num_values or 1
    low, high = (jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape)[..., d] for b in (lattice.low, lattice.high))
    turns = jnp.arange(1, num_values).reshape(-1, *(1,) * f.ndim)
    size = high - low + 1
    values = jnp.concatenate([x[..., d][None], low + jnp.mod(x[..., d] - low + turns, size)])
    others = jnp.where(jnp.arange(x.shape[-1]) == d, values[1:, ..., None], x)
    fs = jnp.concatenate([f[None], jnp.where(turns < size, lattice.log_density(others), -jnp.inf)])
    which = jax.random.categorical(rng_key, fs, axis=0)[None]
    # A chain at a density that is not finite stays there.
    which = jnp.where(jnp.isfinite(f), which, 0)
    return (
        jnp.where(jnp.arange(x.shape[-1]) == d, jnp.take_along_axis(values, which, 0)[0][..., None], x),
        jnp.take_along_axis(fs, which, 0)[0],
    )


def gibbs_with_gradients_chains(lattice: Lattice, num_proposals: int | None = None, radius: int = 1) -> Chains:
    r"""Chains that change one number at a time, chosen by the gradient [Grathwohl et al. 2021].

    The proposal x' with x_d + s in the place of x_d has a probability in proportion to exp(½ s ∂_d f(x)), which is the
    locally balanced one [Zanella 2020] where s ∂_d f is the change of f. Costs a gradient for each proposal.

    Args:
        lattice: the law.
        num_proposals: in one step; D if not given.
        radius: the largest s for counts; finite data may take any other value.
    """
    shifts = _shifts(lattice, radius)

    def logits(state: LatticeState) -> Array:
        values = 0.5 * _slope(state)[..., None] * shifts
        inside = _inside(lattice, state.x[..., None] + shifts)
        return jax.nn.log_softmax(jnp.where(inside, values, -jnp.inf).reshape(*state.x.shape[:-1], -1), axis=-1)

    def propose(state: LatticeState, rng_key: Array) -> tuple[LatticeState, Array]:
        choose_key, accept_key = jax.random.split(rng_key)
        ahead = logits(state)
        which = jax.random.categorical(choose_key, ahead)
        d, s = which // len(shifts), which % len(shifts)
        step = jnp.where(jnp.arange(state.x.shape[-1]) == d[..., None], shifts[s][..., None], 0.0)
        new = _start(lattice, state.x + step, led=True)
        back = d * len(shifts) + len(shifts) - 1 - s  # the shifts are symmetric
        log_ratio = _at(logits(new), back) - _at(ahead, which)
        state = _accept(accept_key, state, new, log_ratio)
        return state, state.accept_prob

    def step(rng_key: Array, state: LatticeState) -> LatticeState:
        keys = jax.random.split(rng_key, num_proposals or state.x.shape[-1])
        state, accepted = jax.lax.scan(propose, state, keys)
        return state._replace(accept_prob=accepted.mean(axis=0))

    return Chains(lambda x: _start(lattice, x, led=True), step)


def discrete_langevin_chains(lattice: Lattice, step_size: float | Array, radius: int = 1) -> Chains:
    r"""Discrete Langevin proposals with a Metropolis correction [Zhang, Liu & Liu 2022]: all numbers move at once.

    .. math:: q(x' \mid x) = \prod_d \operatorname{softmax}_s\left(\tfrac12 s\,\partial_d f(x) - s^2 / 2\alpha\right)

    over the steps s = x'_d − x_d. Costs one gradient.

    Args:
        lattice: the law.
        step_size: α, in squared units of x.
        radius: the largest s for counts; finite data may take any other value.
    """
    ahead = _shifts(lattice, radius)
    shifts = jnp.concatenate([ahead[: len(ahead) // 2], jnp.zeros(1), ahead[len(ahead) // 2 :]])

    def logits(state: LatticeState) -> Array:
        values = 0.5 * _slope(state)[..., None] * shifts - shifts**2 / (2 * step_size)
        inside = _inside(lattice, state.x[..., None] + shifts)
        return jax.nn.log_softmax(jnp.where(inside, values, -jnp.inf), axis=-1)

    def step(rng_key: Array, state: LatticeState) -> LatticeState:
        choose_key, accept_key = jax.random.split(rng_key)
        forth = logits(state)
        which = jax.random.categorical(choose_key, forth)
        new = _start(lattice, state.x + shifts[which], led=True)
        back = _at(logits(new), len(shifts) - 1 - which).sum(-1)
        return _accept(accept_key, state, new, back - _at(forth, which).sum(-1))

    return Chains(lambda x: _start(lattice, x, led=True), step)


def _shifts(lattice: Lattice, radius: int) -> Float[Array, "s"]:
    """The steps −W, ..., −1, 1, ..., W."""
    most = radius if lattice.num_values is None else lattice.num_values - 1
    return jnp.concatenate([jnp.arange(-most, 0), jnp.arange(1, most + 1)]).astype(jnp.result_type(float))


def _inside(lattice: Lattice, values: Float[Array, "*batch d s"]) -> Bool[Array, "*batch d s"]:
    low, high = (jnp.asarray(b)[..., None] for b in (lattice.low, lattice.high))
    return (values >= low) & (values <= high)


def _at(values: Float[Array, "*batch s"], index: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _slope(state: LatticeState) -> Array:
    """The slope where it is finite; elsewhere it leads nowhere."""
    slope = jnp.zeros_like(state.x) if state.slope is None else state.slope
    return jnp.where(jnp.isfinite(slope), slope, 0.0)


def _start(lattice: Lattice, x: Array, *, led: bool) -> LatticeState:
    if led:
        f, slope = value_score(lattice.log_density, x)
    else:
        f, slope = lattice.log_density(x), None
    return LatticeState(x, f, slope, jnp.ones_like(f), ~jnp.isfinite(f))


def _accept(rng_key: Array, state: LatticeState, new: LatticeState, log_ratio: Array) -> LatticeState:
    """The new state with the probability of Metropolis and Hastings, given the log ratio of the proposals."""
    log_ratio = new.log_density - state.log_density + log_ratio
    # A comparison with NaN is false: such a chain stays where it is, flagged.
    usable = jnp.isfinite(state.log_density) & ~jnp.isnan(log_ratio)
    accept_prob = jnp.where(usable, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    accept = jax.random.uniform(rng_key, accept_prob.shape, accept_prob.dtype) < accept_prob

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - accept.ndim)), a, b)

    chosen = jax.tree.map(choose, new, state)
    return chosen._replace(accept_prob=accept_prob, diverging=~usable)
