"""A weight of whole points that does not vanish at the boundary is refused, and no other is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, SSM, Domain, RowWeight, ScoreMatching, ball, flat_simplex, polygon

PRODUCT = RowWeight(lambda d, x: jnp.prod(jnp.minimum(d, 0.7), -1))
NEAREST = RowWeight(lambda d, x: jnp.minimum(d.min(-1), 0.3))
SUPPORTS = {
    "disc": ball(),
    "L": polygon([[-1, -1], [1, -1], [1, 0], [0, 0], [0, 1], [-1, 1]]),
    "half disc": Domain(lambda x: 1 - jnp.sum(x**2, -1), lambda x: x[..., 1] + 0.5),
    "ring": Domain(lambda x: jnp.sum(x**2, -1) - 0.04, lambda x: 1 - jnp.linalg.norm(x, axis=-1)),
    "interval": constraints.independent(constraints.interval(-1.0, 1.0), 1),
    "positive": constraints.independent(constraints.positive, 1),
    "simplex": constraints.simplex,
    "flat simplex": flat_simplex,
    "l1 ball": constraints.l1_ball,
}


def rows(name, n=200):
    rng = np.random.default_rng(0)
    if "simplex" in name:
        return jnp.asarray(rng.dirichlet(np.ones(3), n), float)
    x = rng.uniform(-1, 1, (4 * n, 2)) if name != "positive" else rng.exponential(size=(4 * n, 2))
    kept = np.asarray(SUPPORTS[name](jnp.asarray(x, float)))
    return jnp.asarray(x[kept if kept.ndim == 1 else kept.all(-1)][:n], float)


def model(x, support):
    a = numpyro.param("a", jnp.zeros(x.shape[1]))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(support, (), x.shape[1:]), obs=x)
        numpyro.factor("energy", x @ a)


def fitted(name, weight, loss=ISM):
    return ScoreMatching(model, loss=loss(boundary_weight=weight)).init(
        jax.random.key(0), rows(name), support=SUPPORTS[name]
    )


@pytest.mark.parametrize("name", SUPPORTS)
def test_weights_that_vanish(name):
    for weight in (PRODUCT, NEAREST):
        fitted(name, weight)


@pytest.mark.parametrize(("name", "loss"), [*((name, ISM) for name in SUPPORTS), ("disc", SSM)])
def test_weights_that_do_not(name, loss):
    for weight in (RowWeight(lambda d, x: 1.0 + 0 * d[..., 0]), RowWeight(lambda d, x: 0.05 + d.min(-1))):
        with pytest.raises(ValueError, match=rf"{loss.__name__}'s RowWeight is [\d.]+ at the boundary and"):
            fitted(name, weight, loss)


def test_parts_are_looked_at_one_by_one():
    """A weight that forgets one of two; functions of the points themselves may do without distances."""
    fitted("disc", RowWeight(lambda d, x: 1 - jnp.sum(x**2, -1)))
    fitted("positive", RowWeight(lambda d, x: jnp.minimum(x.prod(-1), 1.0)))
    for name, forgets in [
        ("half disc", 0),
        ("half disc", 1),
        ("ring", 0),
        ("ring", 1),
        ("positive", 1),
        ("simplex", 2),
    ]:
        with pytest.raises(ValueError, match="it must be zero wherever one of the distances is"):
            fitted(name, RowWeight(lambda d, x, k=forgets: jnp.prod(jnp.delete(d, k, axis=-1), -1)))
