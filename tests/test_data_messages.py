"""Data that are not what the model's site says: each mistake has its own remedy, and dropping rows is none."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

from numpyro_score import Energy, EnergyDistribution, ScoreMatching

# The package's own errors, which the checks of annotations would come before.
pytestmark = pytest.mark.usefixtures("unchecked")

X = np.random.default_rng(0).normal(size=(20, 3))
SHARES = np.random.default_rng(1).dirichlet(4 * np.ones(3), 20)
UNIT = X / np.linalg.norm(X, axis=-1, keepdims=True)
ANGLES = np.linspace(0.1, 6.2, 20)
GAMMA = np.r_[0.0, 0.0, np.linspace(0.2, 3.0, 18)]


def on(support, *event, f=lambda x: -0.5 * x**2):
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(support, (), event), obs=x)
            numpyro.factor("energy", f(x))

    return model


def last(x):
    return x[..., -1]


def with_zero(x):
    x = x.copy()
    x[:2, 0] = 0
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "data", "match"),
    [
        (on(constraints.circular, f=jnp.cos), ANGLES, r"write \(x \+ np.pi\) % \(2 \* np.pi\) - np.pi"),
        (on(constraints.circular, f=jnp.cos), np.rad2deg(ANGLES), "degrees: if.*np.deg2rad.*another period"),
        (on(constraints.circular, f=jnp.cos), np.rad2deg(ANGLES) - 180, "degrees: if.*np.deg2rad"),
        (on(constraints.circular, f=jnp.cos), np.linspace(0, 23.8, 20), r"another unit.*2 \* np.pi / period.*hours"),
        (on(constraints.circular, f=jnp.cos), np.arange(1.0, 13.0), "another unit.*period"),
        (on(constraints.circular, f=jnp.cos), np.arange(20.0) % 7, "another unit.*period"),
        (on(constraints.circular, f=jnp.cos), np.linspace(1.0, 366.0, 20), "another unit.*period"),
        (on(constraints.simplex, 3, f=last), 0.99 * SHARES, "sums on the simplex are off one by up to 0.01.*x.sum"),
        (on(constraints.simplex, 3, f=last), 100 * SHARES, "sums on the simplex lie between.*proportions.*x.sum"),
        (on(constraints.simplex, 3, f=last), with_zero(SHARES), "rows 0, 1 .*share of zero.*half of the smallest"),
        (on(constraints.simplex, 3, f=last), SHARES - [0.9, -0.9, 0], "negative"),
        (on(constraints.sphere, 3, f=last), UNIT.round(2), "norms on the unit sphere are off one.*np.linalg.norm"),
        (on(constraints.sphere, 3, f=last), 3 * UNIT, "norms on the unit sphere lie between.*np.linalg.norm"),
        (on(constraints.positive), GAMMA, "rows 0, 1 .*boundary, at 0.*constraints.nonnegative"),
        (on(constraints.open_interval(0.0, 3.0)), GAMMA, "at 0 and 3.*constraints.interval"),
        (on(constraints.greater_than(1.0)), GAMMA, "from 0 to .* beyond the bounds 1 and inf.*unit or origin"),
        (on(constraints.unit_interval), 90 * SHARES[:, 0], "percentages.*x / 100"),
        (on(constraints.nonnegative, f=jnp.log), GAMMA, "rows 0, 1 .*on the boundary.*model these rows apart"),
        (on(constraints.ordered_vector, 3, f=last), np.ones((20, 3)), "ties"),
    ],
)
def test_outside_of_the_support(model, data, match):
    with pytest.raises(ValueError, match=match) as caught:
        Energy(model, {}, data).check()
    assert "drop" not in str(caught.value)


def test_the_remedies_work():
    """What the messages say to write is taken."""
    wrapped = (ANGLES + np.pi) % (2 * np.pi) - np.pi
    Energy(on(constraints.circular, f=jnp.cos), {}, wrapped).check()
    rounded = UNIT.round(2)
    Energy(on(constraints.sphere, 3, f=last), {}, rounded / np.linalg.norm(rounded, axis=-1, keepdims=True)).check()
    Energy(on(constraints.nonnegative), {}, GAMMA).check()


@pytest.mark.parametrize(
    ("model", "data", "match"),
    [
        (on(constraints.real_vector, 3, f=last), np.ones((20, 4)), r"'x'.*\(20, 4\).*rows of shape \(3,\)"),
        (on(constraints.real_vector, 3, f=last), X.T, "transposed, so pass x.T"),
        (on(constraints.real_vector, 3, f=last), X[:, 0], r"one row is x\[None\]"),
        (on(constraints.real), X[:, :1], r"pass x\[:, 0\]"),
        (on(constraints.real), X, "pass one column"),
    ],
)
def test_data_of_another_shape(model, data, match):
    with pytest.raises(ValueError, match=match):
        Energy(model, {}, data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (X[:, 0].tolist(), "'x' is a list.*np.asarray"),
        ((v for v in X), "'x' is a generator.*array"),
        (X.astype(object), "'x' is an array of Python objects.*np.asarray"),
        (np.array([1.0, None], dtype=object), "'x' is an array of Python objects"),
        (np.array(["a", "b"]), r"'x' is an array of <U1.*x.astype\(float\)"),
        (
            np.array(["2020-01-01", "2020-01-03"], dtype="datetime64[D]"),
            r"datetime64.*\(x - x.min\(\)\) / np.timedelta64",
        ),
        (np.array([1, 2], dtype="timedelta64[h]"), r"timedelta64.*e.g. days, x / np.timedelta64"),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), "'x' is a masked array.*handlers.mask"),
        (np.ma.masked_array([1.0, 2.0]), "'x' is a masked array"),
        (np.array([(1.0, 2.0)], dtype=[("a", float), ("b", float)]), "structured array with the fields a, b"),
        (np.array([1j, 2.0]), "complex.*x.real, x.imag"),
    ],
)
def test_data_that_are_no_array(data, match):
    """As an argument of an energy or of a fit, and observed by the model itself, with the name of what it is."""

    def closure(rows):
        with numpyro.plate("rows", rows):
            numpyro.sample("x", improper(), obs=data)

    with pytest.raises(TypeError, match=match):
        Energy(on(constraints.real), {}, data)
    if isinstance(data, np.ndarray):
        with pytest.raises(TypeError, match=match):
            Energy(closure, {}, len(data))
        with pytest.raises(TypeError, match=match):
            ScoreMatching(on(constraints.real)).init(0, data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_data_of_few_digits(dtype, kind):
    """Are refused where they enter, as data, rows and events; the density may compute in them."""
    few = kind(X.astype(jnp.dtype(dtype)))

    def coarse(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x).astype(dtype)
            numpyro.factor("energy", -0.5 * jnp.sum(x**2, -1).astype(float))

    energy = Energy(coarse, {}, X)
    for call in (
        lambda: Energy(coarse, {}, few),
        lambda: ScoreMatching(coarse).init(0, few),
        lambda: energy.flatten(few),
        lambda: energy.at(few),
        lambda: energy.score(few),
        lambda: EnergyDistribution(energy, log_partition=0.0).log_prob(few),
    ):
        with pytest.raises(TypeError, match=rf"holds {dtype} values.*pass data in single precision, \w+.astype"):
            call()


@pytest.mark.parametrize("rows", ["abc", ["a", "b"], None])
def test_rows_that_are_no_numbers(rows):
    with pytest.raises(TypeError, match=r"'x' (has '\w+' in the place of a number|is None): pass an array of numbers"):
        Energy(on(constraints.real), {}, X[:, 0]).flatten(rows)


def test_shapes_of_events_and_draws():
    """No event has no log density; what is no shape is refused."""
    law = EnergyDistribution(Energy(on(constraints.real_vector, 3, f=last), {}, X), log_partition=0.0)
    assert law.log_prob(np.ones((0, 3))).shape == (0,) and law.log_prob(np.ones((2, 0, 3))).shape == (2, 0)
    for shape, error in (((-1,), ValueError), (3, TypeError), ((2.5,), TypeError)):
        with pytest.raises(error, match=r"EnergyDistribution\.sample needs"):
            law.sample(0, shape)


def test_the_remedies_for_arrays_work():
    masked = np.ma.masked_array([1.0, np.nan, 3.0], [0, 1, 0])

    def model(x, mask):
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * x**2)

    energy = Energy(model, {}, np.ma.getdata(masked), ~np.ma.getmaskarray(masked))
    energy.check()
    assert energy.weights.tolist() == [1, 0, 1]
    dates = np.array(["2020-01-01", "2020-01-03"], dtype="datetime64[D]")
    assert Energy(on(constraints.real), {}, (dates - dates.min()) / np.timedelta64(1, "D")).data.tolist() == [[0], [2]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers(wrong):
    def model(x, scale):
        with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=scale):
            x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", -0.5 * x**2)

    scale = np.ones(20)
    scale[3] = wrong
    with pytest.raises(ValueError, match=r"weight of site .* NaN or infinite in row 3 \(1 of 20\).*handlers.scale"):
        Energy(model, {}, X[:, 0], scale).check()


def test_a_plate_inside_a_scan():
    def model(x):
        def step(previous, value):
            with numpyro.plate("series", len(value)):
                value = numpyro.sample("x", dist.Normal(0.5 * previous, 1.0), obs=value)
            return value, None

        scan(step, jnp.zeros(x.shape[1]), x)

    with pytest.raises(ValueError, match=r"Plate 'series' of 'x' stands inside a scan.*one site"):
        Energy(model, {}, X)


def test_an_observed_list():
    def model(n):
        with numpyro.plate("rows", n):
            numpyro.sample("y", improper(), obs=[1.0, 2.0])

    with pytest.raises(TypeError, match=r"'y' is observed at a list.*np.asarray"):
        Energy(model, {}, 2)


@pytest.mark.parametrize("names", [("xp", "yp"), ("left", "right")])
def test_data_in_different_plates(names):
    """No term is named as the one that stands outside."""

    def model(x):
        for site, plate in zip("xy", names, strict=True):
            with numpyro.plate(plate, len(x)):
                value = numpyro.sample(site, improper(), obs=x[:, "xy".index(site)])
                numpyro.factor(f"e{site}", -(value**2))

    first, second = names
    match = rf"different plates .*'ex' in '{first}'.*'ey' in '{second}'.*generalized_bayes fit all of them"
    with pytest.raises(ValueError, match=match):
        Energy(model, {}, X)


def test_a_covariate_that_is_missing_is_named():
    def model(x, z):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
            numpyro.factor("energy", z["age"] * x - x**2)

    age = np.ones(5)
    age[3] = np.nan
    with pytest.raises(ValueError, match=r"Argument 'z' of the model has NaN in row 3 \(1 of 5\), and the log density"):
        Energy(model, {}, np.arange(5.0), {"age": age}).check()
