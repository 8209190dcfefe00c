"""Models that have no density over rows of real data, each with what the error must say."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from forms import FORMS, X, base
from models import density, improper
from numpyro.distributions import constraints


def base_of(a, x):
    return base(x, a)


def site(x, *event_shape):
    return numpyro.sample("x", improper(*event_shape), obs=x)


def rows_plate(x):
    return numpyro.plate("rows", len(x))


def scalar_factor(x):
    with rows_plate(x):
        numpyro.factor("energy", -jnp.sum(site(x, 3) ** 2))


def scalar_factor_of_argument(x):
    with rows_plate(x):
        numpyro.factor("energy", -jnp.sum(x**2))


def column_factor(x):
    with rows_plate(x):
        numpyro.factor("energy", -jnp.sum(site(x, 3) ** 2, -1, keepdims=True))


def square_factor(x):
    with rows_plate(x):
        numpyro.factor("energy", -(site(x, 3) ** 2))


def factor_outside(x):
    with rows_plate(x):
        x = site(x, 3)
    numpyro.factor("energy", -jnp.sum(x**2))


def rows_outside(x):
    with rows_plate(x):
        x = site(x, 3)
    numpyro.factor("energy", -jnp.sum(x**2, -1))


def no_factor(x):
    with rows_plate(x):
        site(x, 3)


def nothing(n=4):
    numpyro.sample("a", dist.Normal())


def site_and_labels(x, label):
    with rows_plate(x):
        y = site(x, 3)
        numpyro.sample("label", dist.Bernoulli(logits=y[:, 0]), obs=label)


def latent_in_plate(x):
    with rows_plate(x):
        z = numpyro.sample("z", dist.Normal())
        numpyro.factor("energy", -jnp.sum((site(x, 3) - z[:, None]) ** 2, -1))


def data_unused(x):
    with rows_plate(x):
        y = site(x, 3)
        numpyro.factor("energy", -jnp.sum(y**2, -1))
        numpyro.factor("other", -jnp.arange(4.0))


def only_normal(x):
    numpyro.sample("x", dist.Normal(), obs=x)


def sum_of_squares(x):
    with rows_plate(x):
        numpyro.factor("energy", -jnp.sum(site(x, x.shape[1]) ** 2, -1))


class Frame:
    """A table that is no array."""

    __hash__ = None


def with_param(x):
    numpyro.factor("energy", -numpyro.param("w", 1.0) * jnp.sum(x**2, -1))


def moving_bounds(x):
    low = numpyro.sample("low", dist.Normal(0.0, 1.0))
    with rows_plate(x):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.greater_than(low), (), ()), obs=x)
        numpyro.factor("energy", -x)


def no_map(x):
    with rows_plate(x):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.positive_definite_circulant_vector, (), (3,)), obs=x)
        numpyro.factor("energy", -x.sum(-1))


LABELS = np.array([0, 1, 1, 0])
INTEGERS = np.arange(12).reshape(4, 3)
REFUSED = {
    "scalar in the plate": (scalar_factor, {}, X, "'energy'.* one value per row"),
    "scalar of an argument": (scalar_factor_of_argument, {}, X, "'energy'.* one value per row"),
    "column": (column_factor, {}, X, "'energy'.* one value per row, shape \\(4,\\)"),
    "square": (square_factor, {}, X[:3], "'energy'.* one value per row"),
    "outside the plate": (factor_outside, {}, X, "'energy'.*'rows'.* move it into the plate"),
    "rows outside": (rows_outside, {}, X, "'energy'.*'rows'.* move it into the plate"),
    "no factor": (no_factor, {}, X, "'x'.* use the value that numpyro.sample returns"),
    "no data": (nothing, {"a": 0.0}, None, "no data.* observe a site"),
    "latent in the plate": (latent_in_plate, {"z": X[:, 0]}, X, "'z'.*'rows'.* marginalise"),
    "data unused": (data_unused, {}, X, "'other'.*'rows'.* use the value.*move it out"),
    "integer site": (density(base_of), {"theta": 1.0}, INTEGERS, "'x'.*int.*x.astype\\(float\\)"),
    "integer argument": (with_param, {"w": 1.0}, INTEGERS, "'x'.*int.*x.astype\\(float\\)"),
    "no columns": (sum_of_squares, {}, X[:, :0], "'x'.*empty.*at least one row of one number"),
    "no rows": (sum_of_squares, {}, X[:0], "'x'.*empty.*at least one row of one number"),
    "no rows, no plate": (only_normal, {}, X[:0], "'x'.*empty.*at least one row of one number"),
    "bounds with a parameter": (moving_bounds, {"low": -9.0}, X[:, 0], "'x'.*depend on a parameter.*constants"),
    "no map to the real line": (no_map, {}, np.abs(X), "'x'.*positivedefinitecirculantvector.*transform"),
    "latent without value": (FORMS["data site"]().model, {}, X, "latent site 'a'.*`params`"),
    "param without value": (with_param, {}, X, "param site 'w'.*`params`"),
    "a table": (density(base_of), {"theta": 1.0}, Frame(), "Frame.*np.asarray"),
}
