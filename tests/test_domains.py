"""Regions of R^d, the flat simplex, and weights of whole points.

As for other supports, the oracle for the objective is that its expected gradient at the true parameters is zero, which
needs every term of the boundary. Expectations are quadratures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy.special import roots_legendre

from numpyro_score import (
    DSM,
    ISM,
    NCE,
    SSM,
    Domain,
    Energy,
    RowWeight,
    ScoreMatching,
    ball,
    flat_simplex,
    log_partition,
    polygon,
    sample,
)

K = np.array([[2.0, 0.7], [0.7, 1.5]])
MU = np.array([0.4, -0.3])
L = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])  # not convex
DOMAINS = {
    "disc": ball(0.9, np.array([0.2, 0.1])),
    "half disc": ball() & Domain(lambda x: x[..., 1]),
    "two discs": ball(0.4, np.array([-0.5, 0.0])) | ball(0.5, np.array([0.4, 0.0])),
    "polygon": polygon(L),
    "quartic": Domain(lambda x: 1 - x[..., 0] ** 4 - x[..., 1] ** 4 - x[..., 0] * x[..., 1]),
    "1-norm": constraints.l1_ball,
    "intervals": Domain(lambda x: jnp.maximum(0.3 - jnp.abs(x[..., 0] + 0.5), 0.2 - jnp.abs(x[..., 0] - 0.6))),
}
PRODUCT = RowWeight(lambda d, x: jnp.prod(jnp.minimum(d, 0.7), -1))


def model(x, support, k=2):
    theta = numpyro.param("theta", {"mu": jnp.zeros(k), "k": jnp.eye(k), "c": 0.0})
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(support, (), (k,)), obs=x)
        y = x - theta["mu"]
        numpyro.factor("energy", -0.5 * jnp.einsum("ni,ij,nj->n", y, theta["k"], y) - theta["c"] * jnp.sum(x**4, -1))


def expected_slope(loss, support, x, weight, k=2):
    """The gradient of the loss averaged over the model's own law, and the size of what is averaged."""
    theta = {"mu": jnp.asarray(np.resize(MU, k)), "k": jnp.eye(k) + jnp.asarray(np.resize(K, (k, k))), "c": 0.2}

    @jax.jit
    def of(theta, x):
        energy = Energy(model, {"theta": theta}, x, support, k)
        f = energy.log_density(energy.data)
        if support is constraints.simplex:  # whose rows are √x, with Σ log √x in their density
            f -= 0.5 * jnp.log(x).sum(-1)
        p = weight * jnp.exp(f - f.max())

        def mean(theta):
            return jnp.sum(p * loss(energy.with_params({"theta": theta}), jax.random.key(0))) / p.sum()

        return jax.grad(mean)(theta)

    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(of(theta, x))])


def midpoints(low, high, n):
    return low + (high - low) * (np.arange(n) + 0.5) / n


@pytest.mark.parametrize("name", DOMAINS)
def test_expected_gradient_is_zero_at_the_truth(name, x64):
    support = DOMAINS[name]
    k = 1 if name == "intervals" else 2
    if k == 1:
        node, weight = roots_legendre(60)
        # Pieces end where the weight has its kinks, the middle of each interval.
        ends = [(-0.8, -0.5), (-0.5, -0.2), (0.4, 0.6), (0.6, 0.8)]
        x = np.concatenate([(b - a) / 2 * node + (a + b) / 2 for a, b in ends])[:, None]
        w = np.concatenate([(b - a) / 2 * weight for a, b in ends])
    else:
        grid = midpoints(-1.2, 1.2, 480)
        x = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
        x = x[np.abs(x).sum(-1) < 1 if name == "1-norm" else np.asarray(support(jnp.asarray(x)))]
        w = np.ones(len(x))
    small = 1e-12 if k == 1 else 3e-3  # what the grid leaves at the boundary, where the weight is zero
    assert np.abs(expected_slope(ISM(), support, x, w, k)).max() < small
    if name == "half disc":
        assert np.abs(expected_slope(ISM(PRODUCT), support, x, w)).max() < small
    if name == "disc":  # the objective without a boundary is far off
        assert np.abs(expected_slope(ISM(RowWeight(lambda d, x: 1.0 + 0 * d[..., 0])), support, x, w)).max() > 0.1


@pytest.mark.parametrize("boundary_weight", [None, PRODUCT])
@pytest.mark.parametrize("support", [constraints.simplex, flat_simplex, constraints.interval(0.0, 0.8)])
def test_several_bounds(support, boundary_weight, x64):
    """Simplices by triangles, a box by a product rule."""
    if support.event_dim:
        n = 200
        i, j = np.meshgrid(np.arange(n), np.arange(n))
        up, down = i + j < n, i + j < n - 1
        a = np.concatenate([np.stack([i[up], j[up]], -1) + 1 / 3, np.stack([i[down], j[down]], -1) + 2 / 3]) / n
        x, w, k, small = np.concatenate([a, 1 - a.sum(-1, keepdims=True)], -1), np.ones(len(a)), 3, 5e-3
    else:
        node, weight = roots_legendre(40)
        half = np.concatenate([node, node + 2]) * 0.2 + 0.2
        x = np.stack(np.meshgrid(half, half), -1).reshape(-1, 2)
        w, k, small = np.outer(np.tile(weight, 2), np.tile(weight, 2)).ravel(), 2, 1e-12
        if boundary_weight is not None:
            small = 1e-4  # its cap lies elsewhere
    slope = expected_slope(ISM(boundary_weight), support, x, w, k)
    assert np.abs(slope).max() < small


def test_slices_have_the_exact_objective_as_their_mean(x64):
    rows = np.random.default_rng(0).uniform(-0.6, 0.6, (3, 2))
    theta = {"mu": jnp.asarray(MU), "k": jnp.asarray(K), "c": 0.2}

    def values(loss, x):
        return np.asarray(jax.jit(lambda x: loss(Energy(model, {"theta": theta}, x, ball()), jax.random.key(1)))(x))

    exact = values(ISM(), rows)
    for loss in (SSM(), SSM(1, "gaussian", False)):
        draws = values(loss, np.repeat(rows, 4000, axis=0)).reshape(3, -1)
        assert (np.abs(draws.mean(-1) - exact) < 4.5 * draws.std(-1) / np.sqrt(4000)).all()


def test_distances_of_a_polygon():
    """Against sides taken one by one, and the winding number."""
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (500, 2))
    ends = np.roll(L, -1, axis=0)
    t = np.linspace(0, 1, 1001)[:, None, None]  # a point to either side of the nearest is 1e-3 away from it at most
    nearest = np.linalg.norm(x[None, :, None] - (L + t[..., None] * (ends - L)), axis=-1).min((0, 2))
    a, b = (np.arctan2(*(v - x[:, None]).transpose(2, 0, 1)[::-1]) for v in (L, ends))
    turns = ((b - a + np.pi) % (2 * np.pi) - np.pi).sum(-1)
    inside = np.abs(turns) > np.pi
    for vertices in (L, L[::-1]):
        found = np.asarray(polygon(vertices).distances(jnp.asarray(x, jnp.float32))[..., 0])
        np.testing.assert_allclose(found, np.where(inside, nearest, -nearest), atol=1e-3)


def truncated(rng, support, n=20000):
    x = np.array([0.8, 0.0]) + 0.5 * rng.normal(size=(3 * n, 2))
    return jnp.asarray(x[np.asarray(support(jnp.asarray(x)))][:n], jnp.float32)


def normal(x, support=ball()):  # noqa: B008
    mu = numpyro.param("mu", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(support, (), (2,)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - mu) ** 2, -1) / 0.25)


@pytest.mark.slow
def test_truncated_normal_law():
    """Its mean is found in a disc, where the box around it is far off; and draws have the mean of the data."""
    x = truncated(np.random.default_rng(0), ball())
    fit = ScoreMatching(normal).run(0, x, progress_bar=False)
    away = (np.asarray(fit.estimates["mu"]) - [0.8, 0.0]) / np.asarray(fit.stderr()["mu"])
    assert (np.abs(away) < 3.5).all()
    noise = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    # Of 2,000 rows the standard errors are 0.03; without the disc the estimate is 0.37 off.
    contrasted = ScoreMatching(normal, loss=NCE(noise), num_steps=500).run(0, x[:2000], progress_bar=False)
    away = (np.asarray(contrasted.estimates["mu"]) - [0.8, 0.0]) / np.asarray(contrasted.stderr()["mu"])
    assert (np.abs(away) < 3.5).all()
    box = ScoreMatching(normal).run(0, x, support=constraints.interval(-1.0, 1.0), progress_bar=False)
    assert abs(float(box.estimates["mu"][0]) - 0.8) > 0.05
    draws = sample(fit, 1, 2000)
    found = np.asarray(draws["posterior"]["x"])
    assert (np.linalg.norm(found, axis=-1) <= 1).all()
    error = np.sqrt(found.reshape(-1, 2).var(0) / np.asarray(draws["ess"]["x"]))
    assert (np.abs(found.mean((0, 1)) - np.asarray(x.mean(0))) < 4.5 * np.hypot(error, 0.4 / np.sqrt(len(x)))).all()


@pytest.mark.slow
def test_draws_of_compositions():
    """Under the density x₁ on the flat simplex of three shares, a Dirichlet law."""

    def shares(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(flat_simplex, (), (3,)), obs=x)
            numpyro.factor("energy", jnp.log(x[:, 0]))

    energy = Energy(shares, {}, jnp.full((4, 3), 1 / 3))
    draws = sample(energy, 0, 1000)
    np.testing.assert_allclose(np.asarray(draws["posterior"]["x"]).mean((0, 1)), [0.5, 0.25, 0.25], atol=0.03)
    assert log_partition(energy).value == pytest.approx(-np.log(6), abs=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_refused():
    x = truncated(np.random.default_rng(0), ball(), 200)

    def moving(x):
        normal(x, ball(numpyro.param("r", 1.0)))

    with pytest.raises(ValueError, match="bounds of data site 'x' depend on a parameter"):
        ScoreMatching(moving).run(0, x)
    with pytest.raises(ValueError, match=r"'x' lie outside.*functions are down to -1 there"):
        Energy(normal, {"mu": jnp.zeros(2)}, x.at[3].set(jnp.array([2.0, 0.0]))).check()
    energy = Energy(normal, {"mu": jnp.zeros(2)}, x)
    with pytest.raises(NotImplementedError, match="no method for data in a Domain"):
        log_partition(energy)
    with pytest.raises(NotImplementedError, match=r"DSM would move the data off .*domain"):
        ScoreMatching(normal, loss=DSM(0.1)).run(0, x)
    with pytest.raises(ValueError, match=r"gave shape \(200, 2\) for points of shape"):
        ScoreMatching(normal).run(0, x, Domain(lambda x: 1 - x**2))
    with pytest.raises(ValueError, match=r"RowWeight gave shape \(200, 1, 2\)"):
        ISM(RowWeight(lambda d, x: x))(energy, jax.random.key(0))
    for make, match in [
        (lambda: Domain(), "needs a function"),
        (lambda: Domain(3), "needs functions that are positive inside, got 3"),
        (lambda: polygon([[0, 0], [1, 1]]), r"shape \(K, 2\)"),
        (lambda: polygon([[0, 0], [1, 1], [1, 0], [0, 1]]), "from vertices 0 and 2 cross"),
        (lambda: polygon([[0, 0], [0, 0], [1, 0]]), "none twice in a row"),
        (lambda: ISM("far"), "that is a RowWeight or a function of distances"),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            make()
