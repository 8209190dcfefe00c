"""Discrete data: the losses are right where everything can be enumerated."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
import scipy.special
from discretes import BINARY, COUNT, THREE, com_poisson, discrete, draw, ising, potts, probabilities, states
from jax.flatten_util import ravel_pytree
from jax.scipy.special import gammaln
from models import FAST_COMPILE, improper
from numpyro import handlers
from numpyro.distributions import constraints

import numpyro_score.energy.discrete
from numpyro_score import (
    CD,
    DSM,
    ISM,
    MALA,
    PCD,
    DiscreteFisher,
    Energy,
    Gibbs,
    Mixed,
    PairLikelihood,
    PseudoLikelihood,
    RatioMatching,
    ScoreMatching,
)
from numpyro_score.energy import evaluations, log_ratios

RNG = np.random.default_rng(0)
COUPLINGS = RNG.normal(size=(4, 4))
LBFGS = dict(optim=optax.lbfgs(), num_steps=60)


def pairs(constraint, kernel):
    """A model of four numbers with a coupling of neighbours, which is `kernel` of them, and a field of each."""

    def model(x):
        w, b = numpyro.param("w"), numpyro.param("b")
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(constraint, 4), obs=x)
            numpyro.factor("energy", x @ b + kernel(x) @ w)

    return model


def products(x):
    return jnp.concatenate([x[:, :-1] * x[:, 1:], x[:, :1] * x[:, 2:3] * x[:, 3:]], -1)  # and one of three


def squares(x):
    return jnp.concatenate([x[:, :-1] * x[:, 1:], x[:, :1] ** 2], -1)


WHOLE = constraints.integer_interval(np.array([0, 0, 1, 0]), np.array([2, 1, 3, 2]))
MODELS = {
    "binary": (pairs(BINARY, products), states(2, 2, 2, 2)),
    "binary, quadratic": (pairs(BINARY, squares), states(2, 2, 2, 2)),
    "levels": (pairs(THREE, products), states(3, 3, 3, 3)),
    "levels of several sizes": (pairs(WHOLE, squares), states(3, 2, 3, 3) + np.array([0, 0, 1, 0])),
}
THETA = {"w": np.array([0.5, -0.4, 0.3, -0.2]), "b": np.array([0.1, -0.3, 0.2, -0.1])}
LOSSES = {
    "pseudo-likelihood": PseudoLikelihood(),
    "pairs": PairLikelihood(),
    "ratio matching": RatioMatching(),
    "Fisher": DiscreteFisher(),
    "Fisher on a path": DiscreteFisher("path"),
    "Fisher on all": DiscreteFisher("complete"),
}


def mean_gradient(losses, model, x, weights):
    """The mean losses under exact probabilities of all states and their gradients, as one program of the parameters."""

    @jax.jit
    def of(theta):
        flat, unravel = ravel_pytree(theta)

        def means(flat):
            energy = Energy(model, unravel(flat), x)
            return jnp.stack([jnp.vdot(weights, loss(energy, jax.random.key(0))) for loss in losses])

        return means(flat), jax.jacfwd(means)(flat)

    return of


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_the_truth_is_the_minimum(name):
    """With the exact law of all states for data the gradient vanishes at its parameters, and off them it is higher."""
    model, x = MODELS[name]
    losses = {k: v for k, v in LOSSES.items() if k != "ratio matching" or name.startswith("binary")}
    of = mean_gradient(losses.values(), model, x, probabilities(model, THETA, x))
    values, slopes = of(THETA)
    off, _ = of({k: v + 0.1 for k, v in THETA.items()})
    for loss, value, slope, higher in zip(losses, values, slopes, off, strict=True):
        np.testing.assert_allclose(slope, 0.0, atol=1e-12, err_msg=loss)
        assert higher > value + 1e-5, loss


@pytest.mark.usefixtures("x64")
def test_counts_without_end():
    """Of a Conway–Maxwell–Poisson law, summed to where nothing is left."""
    theta, x = {"rate": 2.0, "nu": 0.8}, np.arange(80)
    weights = probabilities(com_poisson, theta, x)
    losses = (DiscreteFisher(), PairLikelihood(), PairLikelihood(2), PseudoLikelihood(max_count=120))
    np.testing.assert_allclose(mean_gradient(losses, com_poisson, x, weights)(theta)[1], 0.0, atol=1e-10)


def negative_binomial(x):
    """Of log mean and log size."""
    mean, size = numpyro.param("mean", 3.0), numpyro.param("size", 0.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", discrete(COUNT), obs=x)
        r = jnp.exp(size)
        numpyro.factor("energy", gammaln(x + r) - gammaln(x + 1.0) + x * (mean - jnp.logaddexp(mean, size)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("num_distances", "least", "most"), [(11, 0.9, 1.0), (1, 0.0, 0.5)], ids=["the default", "neighbours alone"]
)
def test_pairs_have_nearly_all_of_the_information(num_distances, least, most):
    """Of a wide law, by its exact probabilities: the variance of maximum likelihood over that of pairs."""
    flat, unravel = ravel_pytree({"mean": np.log(8.0), "size": np.log(2.0)})
    x = np.arange(400)
    p = probabilities(negative_binomial, unravel(flat), x)

    def of(flat):
        energy = Energy(negative_binomial, unravel(flat), x)
        return energy.log_density(x[:, None].astype(float)), PairLikelihood(num_distances)(energy, jax.random.key(0))

    @jax.jit
    def derivatives(flat):
        return jax.jacfwd(of)(flat), jax.hessian(lambda flat: p @ of(flat)[1])(flat)

    (slope, g), hessian = jax.tree.map(np.asarray, derivatives(flat))
    np.testing.assert_allclose(p @ g, 0.0, atol=1e-9)
    half = np.linalg.inv(hessian) @ g.T
    spread = np.diag(half * p @ half.T)
    slope = slope - p @ slope
    exact = np.diag(np.linalg.inv(slope.T * p @ slope))
    assert least < (exact / spread).min() and (exact / spread).max() < most


@pytest.mark.usefixtures("x64")
def test_pairs_by_hand():
    """Levels from 1 to 3, which end, and counts; of binary rows pairs are the pseudo-likelihood."""
    model, x = MODELS["levels of several sizes"]
    p = dict(zip(map(tuple, x), probabilities(model, THETA, x), strict=True))
    found = jax.jit(lambda x: PairLikelihood()(Energy(model, THETA, x), jax.random.key(0)))(x)
    for row, value in zip(x, found, strict=True):
        moved = [tuple(row + s * np.eye(4, dtype=int)[d]) for d in range(4) for s in (-2, -1, 1, 2)]
        expected = sum(np.log(1 + p[other] / p[tuple(row)]) for other in moved if other in p)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
    model, x = MODELS["binary"]
    pair, pseudo = (
        jax.jit(lambda x, loss=loss: loss(Energy(model, THETA, x), jax.random.key(0)))(x)
        for loss in (PairLikelihood(), PseudoLikelihood())
    )
    np.testing.assert_allclose(pair, pseudo, rtol=1e-12)


@pytest.mark.parametrize(("given", "message"), [(0, "num_distances"), (2.5, "num_distances"), (25, "at most 24")])
def test_distances_that_are_refused(given, message, unchecked):
    with pytest.raises((ValueError, TypeError), match=message):
        PairLikelihood(given)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [bool, int, float])
def test_values_by_hand(dtype):
    """Each loss of each row, from densities of the flipped rows; and the same by derivatives where these are exact."""

    def model(x, square=True):
        with numpyro.plate("rows", len(x)):
            x = 1.0 * numpyro.sample("x", discrete(BINARY, 4), obs=x)
            f = jnp.einsum("ni,ij,nj->n", x, COUPLINGS, x)
            numpyro.factor("energy", f if square else jnp.log(jnp.exp(f)))

    x = states(2, 2, 2, 2).astype(dtype)
    f = np.einsum("ni,ij,nj->n", x, COUPLINGS, x)
    at = {tuple(row): value for row, value in zip(x.astype(int), f, strict=True)}
    flipped = [[at[tuple(np.where(np.arange(4) == d, 1 - row, row))] for d in range(4)] for row in x.astype(int)]
    u = np.exp(np.array(flipped) - f[:, None])
    expected = {
        PseudoLikelihood(): np.log1p(u).sum(1),
        RatioMatching(): ((u / (1 + u)) ** 2).sum(1),
        DiscreteFisher(): (u**2 - 2 / u).sum(1),
        DiscreteFisher("path"): np.where(x == 1, u**2, -2 / u).sum(1),
    }
    energies = Energy(model, {}, x), Energy(model, {}, x, square=False)
    assert [evaluations(e, 1) for e in energies] == [3, 5]
    of_all = jax.jit(
        lambda energy: [loss(energy, jax.random.key(0)) for loss in expected], compiler_options=FAST_COMPILE
    )
    for energy in energies:
        for found, values in zip(of_all(energy), expected.values(), strict=True):
            np.testing.assert_allclose(found, values, rtol=1e-10)


def minimum(loss, model, start, x, steps=8):
    """The minimiser of the mean loss by Newton steps, and its sandwich errors: one program for all steps."""
    theta, unravel = ravel_pytree(jax.tree.map(jnp.asarray, start))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(theta):
        def rows(theta):
            return loss(Energy(model, unravel(theta), x), jax.random.key(0))

        def along(v):
            return jax.jvp(jax.grad(lambda theta: rows(theta).sum()), (theta,), (v,))

        slope, hessian = jax.vmap(along, out_axes=(None, 0))(jnp.eye(len(theta)))
        g = jax.jacfwd(rows)(theta)
        half = jnp.linalg.solve(hessian, (g - g.mean(0)).T)
        return theta - jnp.linalg.solve(hessian, slope), jnp.sqrt(jnp.diag(half @ half.T) * len(g) / (len(g) - 1))

    for _ in range(steps):
        theta, errors = step(theta)
    return unravel(theta), unravel(errors)


LATTICES = {
    "Ising": (ising, {"j": 0.6, "h": -0.5}, states(*[2] * 16), ["pseudo-likelihood", "ratio matching", "Fisher"]),
    "Potts": (potts, {"j": 0.4, "h": 0.3}, states(*[3] * 9), ["pseudo-likelihood", "Fisher", "Fisher on a path"]),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", LATTICES)
def test_lattices_against_enumeration(case):
    """Fits of 500 independent rows by every loss are within three standard errors of the truth."""
    model, truth, x, losses = LATTICES[case]
    rows = draw(model, truth, x, 500, seed=1)
    for loss in losses:
        found, errors = minimum(LOSSES[loss], model, truth, rows)  # Newton's method needs a start nearby
        for name, value in truth.items():
            assert 0.01 < errors[name] < 0.3
            assert abs(found[name] - value) < 3 * errors[name]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_fits_and_their_errors():
    """From a model to estimates with errors: those of Newton's method and of the formula."""
    model = partial(ising, side=2)
    rows = draw(model, {"j": 0.6, "h": -0.5}, states(*[2] * 4), 300, seed=1)
    found, errors = minimum(PseudoLikelihood(), model, {"j": 0.0, "h": 0.0}, rows)
    fit = ScoreMatching(model, **LBFGS).run(None, rows, progress_bar=False)  # pseudo-likelihood is the default
    stderr = fit.stderr()
    for name in found:
        np.testing.assert_allclose(fit.estimates[name], found[name], atol=1e-4)
        np.testing.assert_allclose(stderr[name], errors[name], rtol=1e-3)
    assert fit.cost is not None


@pytest.mark.usefixtures("x64")
def test_independent_bits_have_their_frequencies():
    """Ratio matching of independent bits gives the sample frequencies, and pseudo-likelihood maximum likelihood."""

    def model(x):
        b = numpyro.param("b", jnp.zeros(3))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(BINARY, 3), obs=x)
            numpyro.factor("energy", x @ b)

    x = np.random.default_rng(2).random((200, 3)) < np.array([0.2, 0.5, 0.9])
    for loss in (RatioMatching(), PseudoLikelihood()):
        b = minimum(loss, model, {"b": np.zeros(3)}, x)[0]["b"]
        np.testing.assert_allclose(jax.nn.sigmoid(b), x.mean(0), atol=1e-6)


def graph(x, y, batch=None):
    """Two bits, and two normal numbers whose precision and coupling to the bits are parameters."""
    a, w, k = numpyro.param("a", 0.0), numpyro.param("w", jnp.zeros((2, 2))), numpyro.param("k", 1.0)
    with numpyro.plate("rows", len(x), subsample_size=batch):
        x, y = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", discrete(BINARY, 2), obs=x)
        y = numpyro.sample("y", improper(2), obs=y)
        quadratic = -0.5 * k * (y**2).sum(-1) + 0.3 * y[:, 0] * y[:, 1]
        numpyro.factor("energy", quadratic + jnp.einsum("ni,ij,nj->n", 1.0 * x, w, y) + a * x[:, 0] * x[:, 1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_mixed_rows():
    """A Gaussian graph with bits: the mean gradient of each objective vanishes at the truth, and the fit covers it."""
    truth = {"a": 0.8, "w": np.array([[0.5, -0.4], [0.2, 0.6]]), "k": 1.3}
    # Given the bits y is normal with precision K, mean K⁻¹wᵀx, so that p(x) is known.
    cov = np.linalg.inv(np.array([[1.3, -0.3], [-0.3, 1.3]]))
    bits = states(2, 2)
    shift = bits @ truth["w"]
    p = np.exp(0.5 * np.einsum("ni,ij,nj->n", shift, cov, shift) + 0.8 * bits.prod(1))
    node, weight = np.polynomial.hermite_e.hermegauss(16)
    grid = np.stack(np.meshgrid(node, node, indexing="ij"), -1).reshape(-1, 2) @ np.linalg.cholesky(cov).T
    x = np.repeat(bits, len(grid), axis=0)
    y = (shift @ cov)[:, None] + grid
    weights = (p / p.sum())[:, None] * np.outer(weight, weight).reshape(-1) / (2 * np.pi)

    @jax.jit
    def slopes(theta):
        flat, unravel = ravel_pytree(theta)

        def means(flat):
            energy = Energy(graph, unravel(flat), x, y.reshape(-1, 2))
            losses = (Mixed(), Mixed(ISM(), DiscreteFisher(), 0.3))
            return jnp.stack([jnp.vdot(weights, loss(energy, jax.random.key(0))) for loss in losses])

        return jax.jacfwd(means)(flat)

    np.testing.assert_allclose(slopes(truth), 0.0, atol=1e-8)
    rng = np.random.default_rng(3)
    rows = bits[rng.choice(4, 2000, p=p / p.sum())]
    y = rows @ truth["w"] @ cov + rng.multivariate_normal(np.zeros(2), cov, 2000)
    fit = ScoreMatching(graph, **LBFGS).run(None, rows, y, progress_bar=False)
    errors = ravel_pytree(jax.tree.map(lambda a, b, s: (a - b) / s, fit.estimates, truth, fit.stderr()))[0]
    assert np.abs(errors).max() < 3


def test_mixed_minibatches():
    """Rows that a plate draws are the same rows of both sites."""
    x, y, rows = states(2, 2), RNG.normal(size=(4, 2)), np.array([3, 1])
    theta = {"a": 0.8, "w": np.array([[0.5, -0.4], [0.2, 0.6]]), "k": 1.3}
    drawn = Energy.bound_to(graph, theta, {"rows": jnp.asarray(rows)}, None, None, (x, y, 2), {})
    of = jax.jit(Mixed(), compiler_options=FAST_COMPILE)
    np.testing.assert_allclose(
        of(drawn, jax.random.key(0)), of(Energy(graph, theta, x[rows], y[rows]), jax.random.key(0)), rtol=1e-5
    )


def machine(x, hidden=6):
    """A restricted Boltzmann machine, its hidden units summed out."""
    with numpyro.plate("rows", len(x)):
        w = numpyro.param("w", 0.1 * np.random.default_rng(0).normal(size=(x.shape[1], hidden)))
        b, c = numpyro.param("b", jnp.zeros(x.shape[1])), numpyro.param("c", jnp.zeros(hidden))
        x = numpyro.sample("x", discrete(BINARY, x.shape[1]), obs=x)
        numpyro.factor("energy", x @ b + jax.nn.softplus(x @ w + c).sum(-1))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_restricted_boltzmann_machine():
    """Six hidden units: the truth is the minimum, and the enumerated likelihood of a fit is that of the truth."""
    rng, x = np.random.default_rng(4), states(*[2] * 6)
    truth = {"w": rng.normal(size=(6, 6)), "b": rng.normal(size=6), "c": rng.normal(size=6)}
    p = probabilities(machine, truth, x)
    slopes = mean_gradient((PseudoLikelihood(), RatioMatching()), machine, x, p)(truth)[1]
    np.testing.assert_allclose(slopes, 0.0, atol=1e-12)
    counts = rng.multinomial(4000, p)
    sm = ScoreMatching(handlers.scale(machine, scale=counts[counts > 0]), optim=optax.lbfgs(), num_steps=150)
    with warnings.catch_warnings():  # a machine this large has flat directions, along which the loss goes on falling
        warnings.simplefilter("ignore")
        fit = sm.run(None, x[counts > 0], progress_bar=False)

    def divergence(q):
        return float(p @ np.log(p / q))

    bits = counts @ x / 4000
    independent = np.prod(np.where(x == 1, bits, 1 - bits), axis=1)
    # Half the number of parameters over that of rows is what maximum likelihood loses.
    assert divergence(probabilities(machine, fit.params, x)) < 2 * 48 / 2 / 4000 < 0.2 * divergence(independent)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_com_poisson_against_its_summed_likelihood():
    """Pseudo-likelihood is the likelihood, and the others are within three of their standard errors."""
    x = draw(com_poisson, {"rate": 3.0, "nu": 1.3}, np.arange(60), 1000, seed=5)
    k = np.arange(60.0)

    def minus_log_likelihood(theta):
        log_z = scipy.special.logsumexp(k * theta[0] - theta[1] * scipy.special.gammaln(k + 1))
        return log_z - x.mean() * theta[0] + theta[1] * scipy.special.gammaln(x + 1.0).mean()

    def moments(theta):
        """Its gradient: of the law, less of the data."""
        p = scipy.special.softmax(k * theta[0] - theta[1] * scipy.special.gammaln(k + 1))
        log_factorial = scipy.special.gammaln(x + 1.0).mean()
        return np.array([p @ k - x.mean(), log_factorial - p @ scipy.special.gammaln(k + 1)])

    theta = scipy.optimize.minimize(minus_log_likelihood, [0.5, 1.0], jac=moments, tol=1e-10).x
    theta = scipy.optimize.root(moments, theta, tol=1e-14).x
    best = {"rate": np.exp(theta[0]), "nu": theta[1]}
    # One count alone has its likelihood for a pseudo-likelihood; at its minimum the gradient vanishes.
    _, slope = mean_gradient([PseudoLikelihood(max_count=59)], com_poisson, k, np.bincount(x, minlength=60) / 1000)(
        best
    )
    np.testing.assert_allclose(slope, 0.0, atol=1e-10)
    for loss, widest in ((DiscreteFisher(), 0.9), (PairLikelihood(), 0.6)):
        found, errors = minimum(loss, com_poisson, best, x)
        assert all(abs(found[name] - best[name]) < 3 * errors[name] < widest for name in best)


@pytest.mark.parametrize(("mean", "rounded"), [(20_000.0, True), (1_500.0, False)])
@pytest.mark.parametrize("law", ["poisson", "dispersed"])
def test_counts_that_are_rounded_are_told(law, mean, rounded):
    """From 10,000 or so single precision moves log lgamma by more than a ratio can stand; double precision does not."""
    rng = np.random.default_rng(0)

    def poisson(x):
        a = numpyro.param("a", 9.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(COUNT), obs=x)
            numpyro.factor("energy", a * x - gammaln(x + 1.0))

    model = poisson if law == "poisson" else negative_binomial
    x = rng.poisson(mean * (1.0 if law == "poisson" else rng.gamma(2.0, 0.5, 300)), 300)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        ScoreMatching(model).init(jax.random.key(0), x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ScoreMatching(model).init(jax.random.key(0), x)
    told = [str(w.message) for w in caught if "Rounding moves the log density" in str(w.message)]
    assert len(told) == rounded
    assert not told or ("of x" in told[0] and "jax_enable_x64" in told[0])


@pytest.mark.filterwarnings("ignore:The loss was still falling")
@pytest.mark.parametrize("constraint", [COUNT, BINARY], ids=["counts", "binary"])
def test_data_that_are_all_zero_determine_nothing(constraint):
    """Every row has the same gradient, and an error of 0 beside a minimum at minus infinity would be a lie."""

    def model(x):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(constraint), obs=x)
            numpyro.factor("energy", a * x - gammaln(x + 1.0))

    fit = ScoreMatching(model, optim=optax.adam(0.1), num_steps=200).run(None, np.zeros(50, int), progress_bar=False)
    with pytest.warns(UserWarning, match="all rows have the same gradient in site 'a'.*do not determine it"):
        fit.stderr()
    table = fit.summary()
    assert np.isinf(table.loc["a", "distance"]) and "where the distance is infinite" in str(table)


def test_a_regression_whose_laws_differ_by_orders_of_magnitude():
    """Poisson counts of means from 0.1 to 1,000, by the default: within three standard errors, and these as exact."""
    rng = np.random.default_rng(3)
    z = rng.uniform(-1, 1, 1000).astype(np.float32)
    x = rng.poisson(np.exp(2.3 + 4.6 * z))

    def regression(x, z):
        a, b = numpyro.param("a", 2.0), numpyro.param("b", 4.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", discrete(COUNT), obs=x)
            numpyro.factor("energy", (a + b * z) * x - gammaln(x + 1.0))

    fit = ScoreMatching(regression).run(None, x, z, progress_bar=False)
    design = np.stack([np.ones_like(z), z], 1)
    exact = np.sqrt(np.diag(np.linalg.inv(design.T * np.exp(2.3 + 4.6 * z) @ design)))
    errors = fit.stderr()
    for name, truth, error in zip("ab", (2.3, 4.6), exact, strict=True):
        assert abs(fit.estimates[name] - truth) < 3 * errors[name]
        assert 0.9 < errors[name] / error < 1.5


def test_chunks_change_nothing(monkeypatch):
    """Flips in several passes give the same values and gradients as all at once."""
    model, x = MODELS["binary"]

    def value_and_slope():
        def total(theta):
            return PseudoLikelihood()(Energy(model, theta, x), jax.random.key(0)).sum()

        return jax.jit(jax.value_and_grad(total))(jax.tree.map(jnp.asarray, THETA))

    whole = value_and_slope()
    monkeypatch.setattr(numpyro_score.energy.discrete, "_NUMBERS", 3 * 16 * 6)  # rows and layers of the largest width
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), value_and_slope(), whole)


# -- which data are discrete, and what is refused -------------------------------------------------------------------


def labelled(x, label):
    with numpyro.plate("rows", len(x)):
        y = numpyro.sample("x", improper(3), obs=x)
        z = numpyro.sample("label", dist.Bernoulli(logits=y[:, 0]), obs=label)
        numpyro.factor("energy", -0.5 * (y**2).sum(-1) + 0.5 * z)


def test_which_discrete_sites_are_data():
    """Improper ones always; those with a law where nothing continuous is there, or by name."""
    x, label = RNG.normal(size=(5, 3)), np.array([0, 1, 1, 0, 1])

    def names(energy):
        return [a.name for a in energy.arrays]

    assert names(Energy(labelled, {}, x, label)) == ["x"]
    chosen = Energy(labelled, {}, x, label, data="label")
    assert names(chosen) == ["label"]
    ratios = jax.jit(lambda energy: log_ratios(energy, (1,), cycle=True)[0])(chosen)
    np.testing.assert_allclose(ratios[:, 0, 0], (1 - 2 * label) * (x[:, 0] + 0.5), rtol=1e-5)
    assert names(Energy(graph, {"a": 0.0, "w": np.zeros((2, 2)), "k": 1.0}, x[:, :2] > 0, x[:, 1:])) == ["x", "y"]

    def law_alone(z, x, first):  # floats come first
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.Bernoulli(logits=z), obs=x)
            numpyro.factor("energy", -0.5 * z**2 if first else 0.5 * x)

    assert names(Energy(law_alone, {}, x[:, 0], label, False)) == ["x"]  # as the factor depends on it
    assert names(Energy(law_alone, {}, x[:, 0], label, True)) == ["z"]


def of_support(constraint, f=lambda x: 0.1 * x.sum(-1), *shape):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraint, (), shape or x.shape[1:]), obs=x)
            numpyro.factor("energy", f(x))

    return model


REFUSED = {
    "spins": (BINARY, np.array([[-1, 1]]), None, r"row 0.*spins.*\(1 \+ x\) / 2"),
    "halves": (BINARY, np.array([[0.5, 1.0]]), None, "0.5.*no integers"),
    "one to three": (THREE, np.array([[1, 3]]), None, "from 1 to 3 lie beyond the bounds 0 and 2"),
    "negative counts": (COUNT, np.array([[-1, 3]]), None, "from -1 to 3 lie beyond"),
    "one value": (constraints.integer_interval(1, 1), np.ones((4, 2), int), None, "one value only.* neighbour"),
    "a multinomial": (constraints.multinomial(3), np.array([[1, 2]]), None, "multinomial.*no neighbours"),
    "counts without end": (COUNT, np.ones((4, 2), int), PseudoLikelihood(), r"'x'.*max_count.*PairLikelihood\(\)"),
    "a low cut": (COUNT, np.array([[5, 2]]), PseudoLikelihood(max_count=4), "max_count=4.*up to 5"),
    "a cycle of counts": (COUNT, np.array([[5, 2]]), DiscreteFisher("cycle"), "no cycle of the counts of site 'x'"),
    "ratios of three": (THREE, np.array([[1, 2]]), RatioMatching(), r"RatioMatching.*'x' has more \(levels\)"),
    "ISM": (BINARY, np.array([[1, 0]]), ISM(), r"'x' is discrete \(binary\).*PseudoLikelihood\(\)"),
    "DSM": (BINARY, np.array([[1, 0]]), DSM(0.3), r"DSM needs derivatives.*'x' is discrete"),
    "CD of reals": (BINARY, np.array([[1, 0]]), CD(kernel=MALA(step_size=0.1)), r"MALA moves real.*kernel=Gibbs\(\)"),
    "continuous data": (constraints.real, np.array([[1.0, 0.0]]), PseudoLikelihood(), r"'x' is continuous.*ISM\(\)"),
    "mixing nothing": (BINARY, np.array([[1, 0]]), Mixed(), "'x' is discrete: use its discrete loss alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, unchecked):
    """Wrong uses are refused in words that name the site and what to write."""
    constraint, x, loss, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        ScoreMatching(of_support(constraint, lambda x: 0.1 * x.sum(-1)), loss=loss).init(jax.random.key(0), x)


def test_refused_of_both():
    """A loss that sees one kind alone, and continuous kernels, are refused for rows of both."""
    x, y = np.array([[0, 1], [1, 1]]), np.ones((2, 2))
    with pytest.raises(TypeError, match=r"'y' is continuous.*Mixed\(ISM\(\), PseudoLikelihood\(\)\)"):
        ScoreMatching(graph, loss=PseudoLikelihood()).init(jax.random.key(0), x, y)
    with pytest.raises(NotImplementedError, match="discrete and continuous numbers"):
        ScoreMatching(graph, loss=CD(kernel=Gibbs())).init(jax.random.key(0), x, y)
    with pytest.raises(TypeError, match="Mixed adds values of rows, and PCD"):
        Mixed(PCD(kernel=Gibbs()))
