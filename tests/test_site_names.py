"""Two sites of one name are refused where NumPyro's own trace refuses them, and nowhere else."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_score import ISM, Energy, ScoreMatching, generalized_bayes

X = np.array([[0.3, -1.0], [1.2, 0.4], [-0.5, 0.9]])


def two_factors(x):
    numpyro.factor("twice", -jnp.sum(x, -1))
    numpyro.factor("twice", -jnp.sum(x**2, -1))


def loop_of_factors(x):
    for k in range(3):
        numpyro.factor("twice", -jnp.sum(x ** (2 * k + 2), -1))


def two_latents(x):
    a = numpyro.sample("twice", dist.Normal()), numpyro.sample("twice", dist.Normal())
    numpyro.factor("e", -jnp.sum((x - a[0] - a[1]) ** 2, -1))


def factor_and_deterministic(x):
    numpyro.factor("twice", -jnp.sum(x**2, -1))
    numpyro.deterministic("twice", 1.0)


def param_then_factor(x):
    numpyro.param("twice", 1.0)
    numpyro.factor("twice", -jnp.sum(x**2, -1))


def plate_then_factor(x):
    with numpyro.plate("twice", 3):
        pass
    numpyro.factor("twice", -jnp.sum(x**2, -1))


def data_twice(x):
    for _ in range(2):
        numpyro.sample("x", dist.Normal().expand([3, 2]).to_event(1), obs=x)


def site_of_a_scan(x):
    scan(lambda c, _: (c, numpyro.sample("twice", dist.Normal())), 0.0, None, length=2)
    numpyro.factor("twice", -jnp.sum(x**2, -1))


def shared_param(x):
    w = numpyro.param("w", 1.0) + numpyro.param("w", 1.0)
    numpyro.factor("e", -w * jnp.sum(x**2, -1))


def plate_entered_twice(x):
    plate = numpyro.plate("d", 2)
    with plate:
        a = numpyro.sample("a", dist.Normal())
    with plate:
        b = numpyro.sample("b", dist.Normal())
    numpyro.factor("e", -jnp.sum((x - a - b) ** 2, -1))


def plates_of_one_name(x):
    with numpyro.plate("d", 2):
        a = numpyro.sample("a", dist.Normal())
    with numpyro.plate("d", 2):
        b = numpyro.sample("b", dist.Normal())
    numpyro.factor("e", -jnp.sum((x - a - b) ** 2, -1))


BODIES = [
    two_factors,
    loop_of_factors,
    two_latents,
    factor_and_deterministic,
    param_then_factor,
    plate_then_factor,
    data_twice,
    site_of_a_scan,
    shared_param,
    plate_entered_twice,
    plates_of_one_name,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
def test_as_numpyro(body):
    """`Energy` and `generalized_bayes` refuse a second site of a name if and only if NumPyro's `trace` does."""

    try:
        handlers.trace(handlers.seed(body, 0)).get_trace(X)
        legal = True
    except AssertionError:
        legal = False
    params = {"twice": 0.5, "w": 1.0, "a": np.zeros(2), "b": np.zeros(2)}
    if legal:
        Energy(body, params, X)
        handlers.seed(generalized_bayes(body, ISM()), 0)(X)
    else:
        with pytest.raises(ValueError, match=r"named '(twice|x)'.* name of its own"):
            Energy(body, params, X)
        with pytest.raises((ValueError, AssertionError), match=r"twice|x"):
            handlers.seed(generalized_bayes(body, ISM()), 0)(X)


def test_fit_refuses():
    """The second of two factors used to replace the first: a linear coefficient of 0 with standard error 0."""

    def model(x):
        a, b = numpyro.param("a", 0.0), numpyro.param("b", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("e", -a * x.sum(-1))
            numpyro.factor("e", -b * (x**2).sum(-1))

    with pytest.raises(ValueError, match="named 'e'"):
        ScoreMatching(model).run(None, X)
