"""Score matching where the data are bounded, on spheres, on simplices, or elsewhere.

The oracle for the objective itself: at the true parameters its expected gradient is zero, which needs every boundary
and curvature term. Expectations are quadratures.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import FAST_COMPILE, assert_mean
from numpyro.distributions import biject_to, constraints
from scipy.special import roots_legendre

from numpyro_score import DSM, ESM, FSM, ISM, SSM, Energy, KLContraction, ScoreMatching
from numpyro_score.losses import row_losses, total_loss

pytestmark = pytest.mark.usefixtures("x64")

K = np.array([[2.0, 0.7, -0.4], [0.7, 1.5, 0.3], [-0.4, 0.3, 1.0]])
MU = np.array([0.4, -0.3, 0.8])


def on(support, f, *event_shape):
    """A model of rows on a support with the factor f(theta, x)."""

    def model(x):
        theta = numpyro.param("theta", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), event_shape), obs=x)
            numpyro.factor("energy", f(theta, x))

    return model


def rugged(t, x):
    return -0.5 * jnp.einsum("ni,ij,nj->n", x - MU, t, x - MU) - 0.1 * jnp.sum(x**4, -1) + x[:, 0] * x[:, 2] ** 2


def values(loss, model, theta, x):
    of = jax.jit(lambda t, x, k: loss(Energy(model, {"theta": t}, x), k), compiler_options=FAST_COMPILE)
    return np.asarray(of(theta, x, jax.random.key(0)))


def log_weight(d):
    return jnp.minimum(jnp.log1p(d), 2.0)


# -- bounds ----------------------------------------------------------------------------------------

LOW, HIGH = np.array([0.0, -1.0, -np.inf]), np.array([np.inf, 1.5, 2.0])
BOXES = {
    "positive": (constraints.positive, np.zeros(3), np.full(3, np.inf)),
    "half-open": (constraints.greater_than_eq(-0.5), np.full(3, -0.5), np.full(3, np.inf)),
    "below": (constraints.less_than(3.0), np.full(3, -np.inf), np.full(3, 3.0)),
    "interval": (constraints.interval(-1.0, 4.0), np.full(3, -1.0), np.full(3, 4.0)),
    "box": (constraints.interval(LOW, HIGH), LOW, HIGH),
}


def inside(low, high, n=6):
    u = np.random.default_rng(1).uniform(0.05, 0.95, (n, 3))
    low, high = (
        np.where(np.isinf(low), np.minimum(high, 5) - 4, low),
        np.where(np.isinf(high), np.maximum(low, -5) + 4, high),
    )
    return low + u * (high - low)


def weighted(f, x, low, high, h):
    """½ h s² + h ∂s + h' s summed over coordinates, coordinate by coordinate, from the Hessian."""
    score, hessian = jax.jacfwd(f)(x), jax.hessian(f)(x)
    total = 0.0
    for j in range(len(x)):

        def weight(y, j=j):
            d = jnp.minimum(y - low[j], high[j] - y)
            return jnp.where(jnp.isinf(d), 1.0, h(jnp.where(jnp.isinf(d), 1.0, d)))

        total += weight(x[j]) * (score[j] ** 2 / 2 + hessian[j, j]) + jax.grad(weight)(x[j]) * score[j]
    return total


@pytest.mark.parametrize(
    ("name", "h"),
    [
        ("positive", log_weight),
        ("half-open", None),
        ("below", log_weight),
        ("interval", None),
        ("box", None),
        ("box", log_weight),
    ],
    ids=lambda v: v if isinstance(v, str) else "log" if v else "default",
)
def test_bounded_data(name, h):
    """The value is that of the formula, by the forward Laplacian; slices of both forms have it as their mean."""
    support, low, high = BOXES[name]
    x, model = inside(low, high), on(support, rugged, 3)
    by_hand = functools.partial(
        weighted, lambda x: rugged(K, x[None])[0], low=low, high=high, h=h or (lambda d: jnp.minimum(d, 1.0))
    )
    expected = jax.jit(jax.vmap(by_hand))(x)
    np.testing.assert_allclose(values(ISM(h), model, K, x), expected, rtol=1e-10)
    if name == "box":
        for loss in (SSM(boundary_weight=h), SSM(1, "gaussian", False, h)):
            draws = values(loss, model, K, np.repeat(x, 5000, axis=0)).reshape(len(x), -1)
            assert_mean(draws.T, expected)


def test_bounded_data_without_a_forward_laplacian():
    """The fallback knows the weight, too."""

    def f(t, x):
        return rugged(t, x) + jnp.sum(jax.lax.erf_inv(x / 9), -1)  # no rule for this

    x, model = inside(*BOXES["box"][1:]), on(BOXES["box"][0], f, 3)
    by_hand = functools.partial(
        weighted, lambda x: f(K, x[None])[0], low=LOW, high=HIGH, h=lambda d: jnp.minimum(d, 1.0)
    )
    np.testing.assert_allclose(values(ISM(), model, K, x), jax.jit(jax.vmap(by_hand))(x), rtol=1e-10)


def legendre(low, high, n=200):
    """Nodes and weights on pieces that end where the weight has its kinks."""
    ends = sorted({low, *(e for e in (low + 1, high - 1, (low + high) / 2) if low < e < high), high})
    node, weight = roots_legendre(n)
    pieces = [((b - a) / 2 * node + (a + b) / 2, (b - a) / 2 * weight) for a, b in itertools.pairwise(ends)]
    return (np.concatenate(p) for p in zip(*pieces, strict=True))


def expected_slope(loss, model, theta, x, weight):
    """The gradient of the loss in theta, averaged over the density of the model itself with quadrature weights."""

    @jax.jit
    def of(theta, x):
        energy = Energy(model, {"theta": theta}, x)
        p = weight * jnp.exp(energy.log_density(energy.data) - energy.log_density(energy.data).max())
        slopes = jax.jacfwd(lambda t: loss(energy.with_params({"theta": t}), jax.random.key(0)))(theta)
        p = p / p.sum()
        return jnp.tensordot(p, slopes, 1), jnp.tensordot(p, jnp.abs(slopes), 1)

    slope, size = of(jnp.asarray(theta), x)
    return np.asarray(slope) / np.asarray(size)


def curve(t, x):
    x = x.reshape(len(x))
    return t[0] * x - t[1] * x**2 + t[2] * jnp.cos(3 * x)


@pytest.mark.parametrize(
    ("support", "low", "high"),
    [
        (constraints.positive, 0.0, 12.0),
        (constraints.interval(-1.0, 2.0), -1.0, 2.0),
        (constraints.unit_interval, 0.0, 1.0),
        (constraints.less_than(0.5), -12.0, 0.5),
    ],
    ids=["positive", "interval", "unit interval", "below"],
)
def test_bounded_objective_has_its_minimum_at_the_truth(support, low, high):
    """The density is far from zero at the bounds, so without the weight the slope would not vanish."""
    x, weight = legendre(low, high)
    theta = np.array([0.3, 0.8, 0.4])
    assert np.abs(expected_slope(ISM(), on(support, curve), theta, x, weight)).max() < 1e-8
    assert np.abs(expected_slope(ISM(), on(constraints.real, curve), theta, x, weight)).max() > 1e-2


# -- spheres and simplices -------------------------------------------------------------------------


def sphere_points(n=60):
    """Nodes and weights on the 2-sphere: Gauss-Legendre in height, equally spaced in longitude."""
    height, weight = roots_legendre(n)
    angle = 2 * np.pi * np.arange(2 * n) / (2 * n)
    z, a = (m.reshape(-1) for m in np.meshgrid(height, angle, indexing="ij"))
    x = np.stack([np.sqrt(1 - z**2) * np.cos(a), np.sqrt(1 - z**2) * np.sin(a), z], -1)
    return x, np.repeat(weight, 2 * n)


def fisher(t, x):
    return x @ t


def bingham(t, x):
    return jnp.einsum("ni,ij,nj->n", x, t, x)


SPHERE = sphere_points()


def test_von_mises_fisher_by_hand():
    """For f = θ·x: ½‖Pθ‖² - (D-1) θ·x."""
    x = SPHERE[0][::37]
    expected = 0.5 * (MU @ MU - (x @ MU) ** 2) - 2 * x @ MU
    np.testing.assert_allclose(values(ISM(), on(constraints.sphere, fisher, 3), MU, x), expected, rtol=1e-10)


@pytest.mark.slow
def test_bingham_by_hand():
    """For f = xᵀAx: 2(‖Ax‖² - (xᵀAx)²) + 2 tr A - 2D xᵀAx; slices of both forms have it as their mean."""
    x = SPHERE[0][::1000]
    quadratic = np.einsum("ni,ij,nj->n", x, K, x)
    expected = 2 * (np.sum((x @ K) ** 2, -1) - quadratic**2) + 2 * np.trace(K) - 6 * quadratic
    model = on(constraints.sphere, bingham, 3)
    np.testing.assert_allclose(values(ISM(), model, K, x), expected, rtol=1e-10)
    for loss in (SSM(), SSM(2, "sphere", False)):
        draws = values(loss, model, K, np.repeat(x, 20_000, axis=0)).reshape(len(x), -1)
        assert_mean(draws.T, expected)


def test_two_spheres_in_a_row():
    """A row of several spheres, and of a sphere beside other data, adds up."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=(5, 2, 3))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    y = rng.uniform(0.1, 3.0, 5)

    def model(z, y):
        with numpyro.plate("rows", len(y)):
            y = numpyro.sample("y", dist.ImproperUniform(constraints.positive, (), ()), obs=y)
            z = numpyro.sample("z", dist.ImproperUniform(constraints.sphere, (), (2, 3)), obs=z)
            numpyro.factor("energy", z[:, 0] @ MU + y * (z[:, 1] @ MU) - y**2)

    def alone(s, x):
        return 0.5 * s**2 * (MU @ MU - (x @ MU) ** 2) - 2 * s * (x @ MU)

    slope, h = z[:, 1] @ MU - 2 * y, np.minimum(y, 1)
    expected = alone(1, z[:, 0]) + alone(y, z[:, 1]) + h * (0.5 * slope**2 - 2) + (y < 1) * slope
    found = jax.jit(lambda: ISM()(Energy(model, {}, z, y), jax.random.key(0)))()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(("f", "theta"), [(fisher, 3 * MU), (bingham, K)], ids=["von Mises-Fisher", "Bingham"])
def test_spherical_objective_has_its_minimum_at_the_truth(f, theta):
    """On the 2-sphere, by quadrature."""
    slope = expected_slope(ISM(), on(constraints.sphere, f, 3), theta, *SPHERE)
    assert np.abs(slope).max() < 1e-8


def simplex_points(n):
    """Nodes and weights on the 2-simplex, refined towards the edges, where a Dirichlet density has cusps."""
    u, w = roots_legendre(n)
    u, w = (u + 1) / 2, w / 2
    # The weight has kinks on the lines x_i = x_j: one of six triangles x_1 > x_2 > x_3 at a time.
    a, b = (m.reshape(-1) for m in np.meshgrid(u, u, indexing="ij"))
    weight = np.outer(w, w).reshape(-1)
    a, weight = a**4, weight * 4 * a**3  # towards the edge x_3 = 0
    corner = np.array([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    b, weight = 1 - (1 - b) ** 4, weight * 4 * (1 - b) ** 3  # and the corner (1, 0, 0)
    x = a[:, None] * corner[0] + (1 - a)[:, None] * ((1 - b)[:, None] * corner[1] + b[:, None] * corner[2])
    weight = weight * (1 - a)
    order = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    return np.concatenate([x[:, o] for o in order]), np.tile(weight, 6)


def dirichlet(t, x):
    return jnp.log(x) @ (t[:3] - 1) + t[3] * x[:, 0] * x[:, 1]


@pytest.mark.parametrize("alpha", [1.0, 2.5], ids=["flat at the edge", "zero at the edge"])
def test_simplicial_objective_has_its_minimum_at_the_truth(alpha):
    """A tilted Dirichlet density, also one that is far from zero at the edges."""
    x, weight = simplex_points(40)
    theta = np.array([alpha, alpha + 0.5, alpha + 1, 2.0])
    model = on(constraints.simplex, dirichlet, 3)
    # The rows are √x, and their log density is that on the sphere: undo ∏√x for weights on the simplex.
    slope = expected_slope(ISM(), model, theta, x, weight / np.sqrt(x.prod(-1)))
    assert np.abs(slope).max() < 1e-5


def test_simplex_coordinates():
    """Rows are √x, and densities there include the Jacobian ∏√x."""
    x = np.random.default_rng(5).dirichlet(np.ones(3), 4)
    energy = Energy(on(constraints.simplex, dirichlet, 3), {"theta": np.array([2.0, 1.0, 3.0, 0.5])}, x)
    np.testing.assert_allclose(energy.data, np.sqrt(x), rtol=1e-12)
    np.testing.assert_allclose(energy.unflatten(energy.data)["x"], x, rtol=1e-12)
    expected = dirichlet(np.array([2.0, 1.0, 3.0, 0.5]), x) + 0.5 * np.log(x).sum(-1)
    np.testing.assert_allclose(energy.log_density(energy.data), expected, rtol=1e-12)


# -- other supports --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "shape", "dim", "loss"),
    [
        (constraints.ordered_vector, (3,), 3, ISM()),
        (constraints.ordered_vector, (3,), 3, DSM(0.3)),
        (constraints.positive_definite, (2, 2), 3, ISM()),
        (constraints.corr_cholesky, (3, 3), 3, ISM()),
    ],
    ids=["ordered", "ordered, DSM", "positive definite", "correlation"],
)
def test_other_supports_are_mapped_to_the_line(constraint, shape, dim, loss):
    """The loss is that of a model of the unconstrained coordinates with the Jacobian written out."""
    to = biject_to(constraint)
    u = np.random.default_rng(4).normal(size=(5, dim)) / 2
    x = np.asarray(jax.jit(lambda u: to(u))(u))

    def f(t, x):
        return -t * jnp.sum(jnp.sin(x.reshape(len(x), -1)) + x.reshape(len(x), -1) ** 2, -1)

    def by_hand(t, u):
        y = to(u)
        return f(t, y) + to.log_abs_det_jacobian(u, y)

    expected = values(loss, on(constraints.real_vector, by_hand, dim), 0.7, u)
    np.testing.assert_allclose(values(loss, on(constraint, f, *shape), 0.7, x), expected, rtol=1e-7)
    energy = Energy(on(constraint, f, *shape), {"theta": 0.7}, x)
    assert energy.dim == dim
    np.testing.assert_allclose(jax.jit(lambda e: e.unflatten(e.data))(energy)["x"], x, rtol=1e-8)


# -- densities that NumPyro has ----------------------------------------------------------------------


def test_bounded_sites_with_a_density():
    """A gamma site brings its support and its density along: the weighted objective of (a-1) log x - bx."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Gamma(2.5, 1.5), obs=x)

    x = np.random.default_rng(6).gamma(2.5, size=7)
    score, second, h = 1.5 / x - 1.5, -1.5 / x**2, np.minimum(x, 1)
    expected = h * (score**2 / 2 + second) + (x < 1) * score
    found = jax.jit(lambda: ISM()(Energy(model, {}, x), jax.random.key(0)))()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_circular_data_have_no_boundary():
    """On the circle nothing is lost at ±π: ½f'² + f''."""

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.circular, (), ()), obs=x)
            numpyro.factor("energy", 2.0 * jnp.cos(x - 0.5))

    x = np.linspace(-3.1, 3.1, 9)
    expected = 0.5 * (2 * np.sin(x - 0.5)) ** 2 - 2 * np.cos(x - 0.5)
    found = jax.jit(lambda: ISM()(Energy(model, {}, x), jax.random.key(0)))()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# -- in chunks, with bounds of their own, and what is refused ------------------------------------------


def test_chunks_and_bounds_by_row():
    """In chunks the totals are those of all rows; bounds that differ from row to row stay with their rows."""
    rng = np.random.default_rng(7)
    low = rng.normal(size=1500)
    x = low + rng.gamma(2.0, size=1500)

    def model(x, low):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.greater_than(low), (), ()), obs=x)
            numpyro.factor("energy", -0.5 * x**2)

    @jax.jit
    def both(energy):
        return row_losses(ISM(), energy, jax.random.key(0))[0], total_loss(ISM(), energy, jax.random.key(0))

    for bound in (low, np.full(1500, low.min()), low.min()):
        h, slope = np.minimum(x - bound, 1), (x - bound < 1)
        expected = h * (0.5 * x**2 - 1) - slope * x
        found, total = both(Energy(model, {}, x, bound))
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-10)


def test_data_outside_of_the_support():
    """Rows outside are named; a zero in a composition is not finite."""
    x = np.abs(np.random.default_rng(8).normal(size=(6, 3)))
    cases = [
        (
            constraints.positive,
            x - 9 * np.eye(6, 3),
            rugged,
            K,
            r"outside of the support.*rows 0, 1, 2 \(3 of 6\).*bounds",
        ),
        (constraints.sphere, x, fisher, MU, "outside of the support.*unit sphere"),
        (constraints.simplex, x, dirichlet, np.ones(4), "outside of the support.*simplex"),
        (constraints.simplex, np.eye(3), dirichlet, 2 * np.ones(4), "not finite in rows 0, 1, 2"),
        (
            constraints.simplex,
            (1 + 1e-5) * np.full((4, 3), 1 / 3),
            dirichlet,
            np.ones(4),
            "divide the rows by their sum",
        ),
        (constraints.ordered_vector, -np.sort(x), rugged, K, "outside of the support"),
    ]
    for support, data, f, theta, message in cases:
        with pytest.raises(ValueError, match=message):
            Energy(on(support, f, 3), {"theta": theta}, data).check()
    Energy(on(constraints.positive, rugged, 3), {"theta": K}, x).check()


@pytest.mark.parametrize("loss", [DSM(0.3), FSM(0.1), KLContraction(1.0)], ids=repr)
def test_losses_that_leave_the_support_refuse(loss):
    """Noise and differences would step over the boundary."""
    x = np.abs(np.random.default_rng(8).normal(size=(6, 3)))
    name = type(loss).__name__
    with pytest.raises(NotImplementedError, match=rf"{name} would move.*site 'x' \(box\): use ISM or SSM"):
        loss(Energy(on(constraints.positive, rugged, 3), {"theta": K}, x), jax.random.key(0))


# -- the truncated normal ---------------------------------------------------------------------------


def truncated(t, x):
    return -0.5 * (x - t[0]) ** 2 / t[1]


@pytest.mark.parametrize(
    ("which", "variance", "bound"), [(0, 2.795459, 2.751938), (1, 2.379507, 2.0)], ids=["mean", "variance"]
)
def test_asymptotic_variance_of_the_truncated_normal(which, variance, bound):
    """For N(0, 1) on the half-line with h = min(log(1+x), 2): H⁻¹SH⁻¹ of either parameter, the other one known."""
    x, weight = legendre(0.0, 1.0)
    more, more_weight = legendre(1.0, np.exp(2) - 1)
    rest, rest_weight = legendre(np.exp(2) - 1, 14.0)
    x, weight = np.concatenate([x, more, rest]), np.concatenate([weight, more_weight, rest_weight])
    p = weight * np.exp(-0.5 * x**2) / np.sqrt(np.pi / 2)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-10)
    model = on(constraints.positive, truncated)

    def losses(t):
        theta = jnp.array([0.0, 1.0]).at[which].set(t)
        return ISM(log_weight)(Energy(model, {"theta": theta}, x), jax.random.key(0))

    truth = jnp.array([0.0, 1.0])[which]
    slope, curvature = jax.jit(lambda t: (jax.jacfwd(losses)(t), jax.jacfwd(jax.jacfwd(losses))(t)))(truth)
    np.testing.assert_allclose(p @ np.asarray(slope), 0.0, atol=1e-6)
    found = p @ np.asarray(slope) ** 2 / (p @ np.asarray(curvature)) ** 2
    np.testing.assert_allclose(found, variance, atol=1e-3)
    assert found > bound


def test_fit_of_the_truncated_normal():
    """Through `ScoreMatching`: the estimate is the closed form, and its standard error that of the asymptotics."""
    x = np.abs(np.random.default_rng(9).normal(size=4000))

    def model(x):
        mu = numpyro.param("mu", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * (x - mu) ** 2)

    fit = ScoreMatching(model, loss=ISM(log_weight)).run(jax.random.key(0), x, progress_bar=False)
    h = np.minimum(np.log1p(x), 2)
    slope = np.where(np.log1p(x) < 2, 1 / (1 + x), 0)
    np.testing.assert_allclose(fit.estimates["mu"], (h * x - slope).sum() / h.sum(), rtol=1e-4)
    error = float(fit.stderr()["mu"])
    np.testing.assert_allclose(error, np.sqrt(2.795459 / 4000), rtol=0.15)
    assert abs(fit.estimates["mu"]) < 5 * error


# -- explicit score matching -------------------------------------------------------------------------


def projected(theta, x):
    return x @ theta


def tilted(theta, x):
    return -0.5 * (x - theta) ** 2


@pytest.mark.parametrize("support", ["sphere", "half-line"])
def test_explicit_differs_by_a_constant(support):
    """E_p[ESM − ISM] is the same at every θ if the target is p's score, of which only what is tangent counts."""
    if support == "sphere":
        angle = np.arange(200) * np.pi / 100
        x, truth, other = np.stack([np.cos(angle), np.sin(angle)], -1), np.array([0.5, 1.0]), np.array([-0.3, 0.4])
        model, weights = on(constraints.sphere, projected, 2), np.exp(x @ truth)
        target = lambda x: truth - x * (x @ truth)[:, None]  # noqa: E731
    else:
        node, weights = roots_legendre(50)
        x, truth, other = np.concatenate([0.5 * (node + 1), 1 + 4 * (node + 1)]), 0.4, -0.5  # h has a kink at 1
        model = on(constraints.positive, tilted)
        weights = np.concatenate([0.5 * weights, 4 * weights]) * np.exp(-0.5 * (x - truth) ** 2)
        target = lambda x: truth - x  # noqa: E731
    gaps = [
        np.average(values(ESM(target), model, theta, x) - values(ISM(), model, theta, x), weights=weights)
        for theta in (truth, other)
    ]
    np.testing.assert_allclose(*gaps, rtol=1e-8)
    np.testing.assert_allclose(values(ESM(target), model, truth, x), np.zeros(len(x)), atol=1e-20)


def test_unit_vectors_of_single_precision():
    """They are not on the sphere in double precision until they are scaled."""
    z = np.random.default_rng(0).normal(size=(50, 3))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    energy = Energy(on(constraints.sphere, projected, 3), {"theta": MU}, z)
    energy.check()
    np.testing.assert_allclose(np.linalg.norm(energy.data, axis=1), np.ones(50), rtol=1e-15)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (jnp.ones_like, ValueError, "is 1 at distance 0.*zero at the boundary"),
        (lambda d: -d, ValueError, "-1 at 1.*positive inside"),
        (lambda d: jnp.sum(d), ValueError, r"shape \(\) for distances of shape \(2,\)"),
        (lambda d: np.minimum(d, 1.0), TypeError, "write it with jax.numpy"),
        ("distance", TypeError, "a function of distances, got 'distance'"),
    ],
)
@pytest.mark.parametrize("make", [ISM, lambda w: SSM(boundary_weight=w)], ids=["ISM", "SSM"])
def test_weights_that_do_not_vanish_at_the_boundary(make, weight, error, message, unchecked):
    """The normaliser drops out only if the weight is zero there, so that any other is refused."""
    with pytest.raises(error, match=message):
        make(weight)


@pytest.mark.parametrize("beta", [-0.3, 0.0, 1.5])
def test_the_limit_at_a_zero_of_a_composition(beta):
    """½a² + a at one zero, a = 2β + 1 the exponent of √x in the coordinates, and nothing of what multiplies x."""

    def model(x):
        k = numpyro.param("k", 2.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.simplex, (), (3,)), obs=x)
            numpyro.factor("energy", beta * jnp.log(x[..., 0]) + k * x[..., 0] + k * x[..., 1])

    x = np.array([[1e-12, 0.3, 0.7 - 1e-12], [1e-12, 0.6, 0.4 - 1e-12]])
    energy, a = Energy(model, {"k": 2.0}, x), 2 * beta + 1
    np.testing.assert_allclose(ISM()(energy, jax.random.key(0)), 0.5 * a**2 + a, atol=1e-5)
