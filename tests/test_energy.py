"""Every form that a model may take, against its density by hand; and what is refused, and how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from forms import FORMS, C, X, base, plain
from models import FAST_COMPILE, energy_of, improper
from numpyro import handlers
from refused import LABELS, REFUSED, base_of, rows_plate, site, site_and_labels

from numpyro_score import ISM, Energy, generalized_bayes
from numpyro_score.generalized import LOSS_SITE
from numpyro_score.losses import total_loss

pytestmark = pytest.mark.usefixtures("x64")


def reference(log_density, x):
    """Log density, score and Laplacian of rows (N, D), by the whole Hessian of their sum."""

    def score(y):
        return jax.grad(lambda z: log_density(z).sum())(y)

    return log_density(x), score(x), jnp.einsum("nini->n", jax.jacfwd(score)(x))


def assert_close(found, expected, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), found, expected)


# -- forms of models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_rows_and_weights(name):
    """Data, rows, dimension, weights and support are the model's; flatten and unflatten invert."""
    form = FORMS[name]()
    energy = form.energy
    energy.check()
    assert (energy.num_rows, energy.dim) == form.rows.shape
    assert energy.resizable == form.resizable
    np.testing.assert_array_equal(energy.data, form.rows)
    np.testing.assert_allclose(energy.weights, np.broadcast_to(form.weights, len(form.rows)))
    sites = energy.unflatten(energy.data)
    assert sites.keys() == form.sites.keys()
    for key, value in form.sites.items():
        np.testing.assert_array_equal(sites[key], value)
    np.testing.assert_array_equal(energy.flatten(sites), form.rows)
    if len(sites) == 1:
        np.testing.assert_array_equal(energy.flatten(*sites.values()), form.rows)
        assert energy.support(*form.sites.values()).all()


@pytest.mark.parametrize("name", FORMS)
def test_density_score_and_laplacian(name):
    """Those of the density written by hand, at the data and elsewhere, in any leading shape that the model allows."""
    form = FORMS[name]()
    energy, (n, d), rng = form.energy, form.rows.shape, np.random.default_rng(12)
    if form.resizable:
        shapes = [(d,), (n + 3, d), (2, 3, d)]
    elif n == 1:
        shapes = [(d,), (5, d), (2, 3, d)]
    else:
        shapes = [(n, d), (2, n, d), (2, 3, n, d)]
    x = [rng.normal(size=shape) / np.sqrt(d) for shape in shapes]
    x[-1].flat[: n * d] = form.rows.flat
    rows = n if not form.resizable and n > 1 else 1  # what the density by hand takes at once

    def by_hand(of, x):
        one = jax.vmap(of)(x.reshape(-1, rows, d))
        return jax.tree.map(lambda v: v.reshape(*x.shape[:-1], *v.shape[2:]), one)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(energy, x):
        values = [(energy.log_density(y), by_hand(form.log_density, y)) for y in x]
        all_three = by_hand(lambda z: reference(form.log_density, z), x[-1])
        return *values, (energy.score(x[-1]), all_three[1]), (energy.value_score_laplacian(x[-1]), all_three)

    for found, expected in both(energy, x):
        assert_close(found, expected)


def test_scores_are_not_scaled_by_subsampling():
    """A subsampled plate weighs the loss of its rows by N/B; their scores stay as they are."""

    @dataclasses.dataclass(frozen=True)
    class FirstScore:
        def __call__(self, energy, rng_key):
            return energy.score(energy.data)[:, 0]

    for name in ("subsampled", "indexed"):
        form = FORMS[name]()
        model = handlers.seed(generalized_bayes(form.model, FirstScore()), jax.random.key(3))

        @jax.jit
        def of(args, form=form, model=model):
            sites = handlers.trace(handlers.substitute(model, form.params)).get_trace(*args)
            score = reference(form.log_density, form.rows)[1]
            return sites["rows"]["value"], sites[LOSS_SITE]["fn"].log_factor, score

        rows, found, score = of(form.args)
        assert rows.shape == (2,)
        np.testing.assert_allclose(found, -4 / 2 * score[rows, 0].sum(), rtol=1e-9)


def test_handlers_around_do_not_reach_in():
    """Handlers around an energy neither change it nor see its sites."""
    energy = FORMS["data site"]().energy
    expected = energy.log_density(energy.data)
    with handlers.trace() as sites, handlers.seed(rng_seed=0), handlers.scale(scale=3.0):
        with handlers.substitute(data={"a": 9.0}), handlers.mask(mask=False):
            found, weights = energy.log_density(energy.data), energy.weights
    assert not sites
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(weights, 1.0)


# -- energies as values --------------------------------------------------------------------------


def test_is_a_pytree():
    """Parameters and arguments are the leaves; jit traces once; vmap, scan, grad map over them."""
    traces = []

    @jax.jit
    def score(energy):
        traces.append(None)
        return energy.score(energy.data)

    scales = np.array([0.5, 1.0, 2.0])
    energies = [energy_of(base_of, a, X + a) for a in scales]
    leaves, treedef = jax.tree.flatten(energies[0])
    assert sorted(np.shape(leaf) for leaf in leaves) == [(), (4, 3)]
    assert treedef == jax.tree.structure(energies[1])
    expected = jax.jit(jax.vmap(lambda a: reference(lambda x: base(x, a), X + a)[1]))(scales)
    assert_close(np.stack([score(e) for e in energies]), expected)
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *values: np.stack(values), *energies)
    assert_close(jax.vmap(score)(stacked), expected)
    scanned = jax.lax.scan(lambda total, e: (total + score(e), score(e)), 0 * X, stacked)
    assert_close(scanned, (expected.sum(0), expected))
    mapped = jax.vmap(lambda a: score(energy_of(base_of, a, X)))(scales)
    assert_close(mapped, jax.jit(jax.vmap(lambda a: reference(lambda x: base(x, a), X)[1]))(scales))
    gradient = jax.grad(lambda e: e.log_density(e.data).sum())(energies[1])
    assert_close(gradient.params["theta"], -0.5 * np.sum((X + 1) ** 2))


def noisy(x, c=None, sigma=1.0):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", base((x - c) / sigma, 1.3))


def test_bind():
    """Other covariates or another noise level give the density there, also under vmap."""
    energy = Energy(noisy, {}, X, c=C)
    x = energy.data

    @jax.jit
    def expected(c, sigma):
        return reference(lambda y: plain((y - c) / sigma), X)[1]

    @jax.jit
    def of(energy, c, sigma):
        return energy.bind(c=c, sigma=sigma).score(x)

    assert_close(of(energy, 2 * C, jnp.array(1.0)), expected(2 * C, 1.0))
    score = jax.jit(lambda energy: energy.score(x))
    assert_close(score(energy.bind(sigma=2.0)), expected(C, 2.0))
    sigmas = np.array([0.5, 3.0])
    mapped = jax.vmap(of, (None, None, 0))(energy, C, sigmas)
    assert_close(mapped, np.stack([expected(C, s) for s in sigmas]))
    assert_close(score(energy), expected(C, 1.0))


def test_other_parameters_and_data():
    """`with_params` and `at` give the same density elsewhere, and leave the energy as it was."""
    energy = FORMS["data site"]().energy
    x = jnp.asarray(np.vstack([X, 2 * X]))
    assert_close(energy.with_params({"a": 0.2}).log_density(x), base(x, 0.2))
    moved = energy.at(x)
    np.testing.assert_array_equal(moved.data, x)
    np.testing.assert_array_equal(moved.weights, np.ones(8))
    assert_close(moved.log_density(moved.data), plain(x))
    np.testing.assert_array_equal(energy.data, X)


# -- what is refused, and what to write instead ---------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name, unchecked):
    """A model with no density over rows is refused; the message names the site and the remedy."""
    model, params, data, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=f"(?is){message}"):
        Energy(model, params, *(() if data is None else (data,)))


def test_refused_choices():
    """A chosen site that is not there is refused with those that would do."""
    with pytest.raises(ValueError, match=r"data='y'.*'x'"):
        Energy(site_and_labels, {}, X, LABELS, data="y")


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("data site", (4, 2), r"\(4, 2\).* 3 numbers.*\(\.\.\., 3\)"),
        ("data site", (), r"\(\).*\(\.\.\., 3\)"),
        ("closure", (5, 3), r"\(5, 3\).* 4 rows.*\(\.\.\., 4, 3\).*len\(x\)"),
        ("closure", (3,), r"\(3,\).* 4 rows.*\(\.\.\., 4, 3\)"),
        ("one big site", (4, 3), r"\(4, 3\).* 12 numbers.*\(\.\.\., 12\)"),
    ],
)
def test_refused_shapes(form, shape, message, unchecked):
    """Rows of the wrong length or number are refused with the shapes that would do."""
    energy = FORMS[form]().energy
    for method in (energy.log_density, energy.score, energy.laplacian):
        with pytest.raises(ValueError, match=message):
            method(jnp.zeros(shape))


def test_refused_rows_in_place(unchecked):
    """Another number of rows in a model that holds its data is refused with the way round."""
    with pytest.raises(ValueError, match=r"4 rows.*5.*argument.*len\(x\)"):
        FORMS["closure"]().energy.at(jnp.zeros((5, 3)))
    with pytest.raises(TypeError, match=r"several sites.*dict.*'x', 'y'"):
        FORMS["several sites"]().energy.flatten(X)


# -- what is refused at the data ------------------------------------------------------------------


def roots(a, x):
    return a * jnp.sum(jnp.sqrt(x), -1)


def centred(a, x):
    return base(x - a * x.mean(0), 1.0)


def batch_normalised(a, x):
    return base((x - x.mean(0)) / jnp.sqrt(x.var(0) + a), 1.0)


def differences(a, x):
    return base(x - a * jnp.roll(x, 1, axis=0), 1.0)


def softmax_over_rows(a, x):
    return a * jax.nn.log_softmax(x[:, 0])


HOLES = np.where(np.isin(np.arange(4), [1, 3])[:, None], np.array([np.nan, 1.0, np.inf]), X)
NEGATIVE = np.abs(X) * np.array([1, 1, -1, 1])[:, None]


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        (base_of, HOLES, "'x'.*rows 1, 3 .*drop these rows.*mask"),
        (roots, NEGATIVE, "'x'.*not finite.*row 2 .*correct the density.*parameters"),
        (centred, X, "'x' interact.*row.*mean over the plate.*row alone"),
        (batch_normalised, X, "'x' interact.*row.*normalisation.*row alone"),
        (differences, X, "'x' interact.*row.*row alone"),
        (softmax_over_rows, X, "'x' interact.*row.*row alone"),
    ],
)
def test_refused_data(f, x, message):
    """Bad rows are named, whether the data, the density there or their independence is at fault."""
    with pytest.raises(ValueError, match=message):
        energy_of(f, 0.5, x).check()


def masked_rows(x, mask):
    with rows_plate(x), handlers.mask(mask=mask):
        numpyro.factor("energy", base(site(x, 3), 1.0))


def scaled_factor(x):
    with rows_plate(x):
        x = site(x, 3)
        with handlers.scale(scale=2.0):
            numpyro.factor("energy", base(x, 1.0))


def masked_coordinates(x, mask):
    with numpyro.plate("rows", len(x), dim=-2):
        with numpyro.plate("coordinates", 3, dim=-1), handlers.mask(mask=mask):
            x = numpyro.sample("x", dist.Normal(), obs=x)
        numpyro.factor("energy", base(x, 1.0)[:, None])


def test_refused_weights():
    """Weights that differ within a row are refused, with the site."""
    with pytest.raises(ValueError, match=r"'\w+' and '\w+' have different scales.*all sites"):
        Energy(scaled_factor, {}, X).check()
    with pytest.raises(ValueError, match=r"'x'.*within a row.*jnp\.where"):
        Energy(masked_coordinates, {}, X, X > 0).check()


def test_holes_may_be_masked():
    """Rows of NaN that are masked out pass the check, and have weight zero."""
    energy = Energy(masked_rows, {}, HOLES, np.array([True, False, True, False]))
    energy.check()
    np.testing.assert_array_equal(energy.weights, [1, 0, 1, 0])


def test_independent_rows_pass():
    """In float32, rounding in large energies and in matrix products is no interaction of rows."""

    def large(w, x):
        return -1e5 * jnp.sum(jnp.tanh(x @ w) ** 2, -1) + 1e-3 * jnp.sum(x @ w, -1)

    def near_a_circle(w, x):
        return -w * (jnp.sum(x**2, -1) - 1) ** 2

    rng = np.random.default_rng(13)
    with jax.enable_x64(False):
        angle = rng.uniform(0, 6, 50)
        energy_of(near_a_circle, np.float32(200), np.float32([np.cos(angle), np.sin(angle)]).T).check()
        for n in (1, 2, 300):
            x, w = rng.normal(size=(n, 32)), rng.normal(size=(32, 64))
            energy_of(large, np.float32(w), np.float32(x)).check()


def test_what_the_model_reads_may_change():
    """Lists and NumPy's arrays, which no key of a compiled program holds: every call runs the model."""
    listed, array = [1.0], np.ones(2)

    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()), obs=x)
            numpyro.factor("energy", -0.5 * listed[0] * jnp.asarray(array)[0] * x**2)

    x = jnp.array([[1.0], [2.0]])
    energy = Energy(model, {}, x[:, 0])

    def asked():
        loss = total_loss(ISM(), energy, jax.random.key(0))
        return [energy.log_density(x), energy.score(x)[:, 0], energy.laplacian(x), loss]

    def expected(c):
        return [-0.5 * c * x[:, 0] ** 2, -c * x[:, 0], -c * jnp.ones(2), 2.5 * c**2 - 2 * c]

    assert all(map(np.array_equal, asked(), expected(1.0)))
    listed[0], array[0] = 4.0, 0.5
    assert all(map(np.array_equal, asked(), expected(2.0)))
