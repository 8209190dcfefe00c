"""Every form that a model may take, each with its log density written out by hand."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen, nnx
from models import improper
from numpyro import handlers
from numpyro.contrib import module
from numpyro.distributions import constraints
from numpyro.infer.reparam import LocScaleReparam

from numpyro_score import Energy


class Form(NamedTuple):
    """A model on its arguments, and what is known of it on paper."""

    model: Callable[..., Any]
    params: dict[str, Any]
    log_density: Callable[[Any], Any]  # rows (N, D) to (N,)
    rows: Any  # the data, (N, D)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})
    sites: Mapping[str, Any] = MappingProxyType({})  # the data in its own shapes
    weights: Any = 1.0
    resizable: bool = True

    @property
    def energy(self):
        return Energy(self.model, self.params, *self.args, **self.kwargs)


FORMS = {}
X = np.random.default_rng(8).normal(size=(4, 3))
C = np.random.default_rng(9).normal(size=(4, 3))
CLEAN = np.array([True, False, True, True])
S = np.eye(3) + 0.5
W = np.random.default_rng(10).normal(size=(3, 5))
B, V = W[0] / 2, W[1] / 3
HALF_NORMAL = dist.HalfNormal(1.0)


def form(make):
    FORMS[make.__name__.replace("_", " ")] = make
    return make


def base(x, a):
    """A log density with couplings of all coordinates, and no symmetry."""
    return -0.5 * a * jnp.sum(x**2, -1) - 0.1 * jnp.sum(x, -1) ** 4 + jnp.sin(x[..., 0])


def plain(x, a=1.3):
    return base(x, a)


@form
def data_site():
    def model(x):
        a = numpyro.sample("a", HALF_NORMAL)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x, a))

    return Form(model, {"a": 1.3}, plain, X, (X,), sites={"x": X})


def optional_data(x=None, n=1):
    a = numpyro.sample("a", HALF_NORMAL)
    with numpyro.plate("rows", n if x is None else len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", base(x, a))


@form
def data_by_keyword():
    return Form(optional_data, {"a": 1.3}, plain, X, kwargs={"x": X}, sites={"x": X})


@form
def data_and_size():
    return Form(optional_data, {"a": 1.3}, plain, X, (X,), {"n": 9}, {"x": X})


@form
def argument():
    def model(x):
        numpyro.factor("energy", base(x, numpyro.sample("a", HALF_NORMAL)))

    return Form(model, {"a": 1.3}, plain, X, (X,), sites={"x": X})


@form
def argument_in_plate():
    def model(x):
        a = numpyro.param("a", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", len(x)):
            numpyro.factor("energy", base(x, a))

    return Form(model, {"a": 1.3}, plain, X, (X,), sites={"x": X})


@form
def chosen_argument():
    def model(c, x):
        numpyro.factor("energy", base(x - c, numpyro.sample("a", HALF_NORMAL)))

    return Form(model, {"a": 1.3}, lambda x: plain(x - C[0]), X, (C[0], X), {"data": "x"}, {"x": X})


@form
def chosen_site():
    def model(z, x):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(np.zeros(3), 1.0).to_event(1), obs=z)
            x = numpyro.sample("x", dist.Normal(z, 2.0).to_event(1), obs=x)
            numpyro.factor("energy", base(x, 1.3))

    def log_density(x):
        return plain(x) - jnp.sum((x - C) ** 2 / 8 + np.log(2 * np.sqrt(2 * np.pi)), -1)

    return Form(model, {}, log_density, X, (C, X), {"data": "x"}, {"x": X}, resizable=False)


@form
def several_sites():
    def model(x, y):
        a = numpyro.sample("a", HALF_NORMAL)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(2), obs=x)
            y = numpyro.sample("y", improper(), obs=y)
            numpyro.factor("energy", base(jnp.concatenate([x, y[:, None]], -1), a))

    x, y = X[:, :2], X[:, 2]
    return Form(model, {"a": 1.3}, plain, X, (x, y), sites={"x": x, "y": y})


@form
def closure():
    def model():
        a = numpyro.sample("a", HALF_NORMAL)
        with numpyro.plate("rows", 4):
            x = numpyro.sample("x", improper(3), obs=X)
            numpyro.factor("energy", base(x, a))

    return Form(model, {"a": 1.3}, plain, X, sites={"x": X}, resizable=False)


@form
def subsampled():
    def model(x):
        a = numpyro.sample("a", HALF_NORMAL)
        with numpyro.plate("rows", len(x), subsample_size=2):
            y = numpyro.subsample(x, event_dim=1)
            y = numpyro.sample("x", improper(3), obs=y)
            numpyro.factor("energy", base(y, a))

    return Form(model, {"a": 1.3}, plain, X, (X,), sites={"x": X})


@form
def indexed():
    def model(x, c):
        a = numpyro.sample("a", HALF_NORMAL)
        with numpyro.plate("rows", len(x), subsample_size=2) as rows:
            y = numpyro.sample("x", improper(3), obs=x[rows])
            numpyro.factor("energy", base(y - c[rows], a))

    def log_density(x):
        return plain(x - C)

    return Form(model, {"a": 1.3}, log_density, X, (X, C), sites={"x": X}, resizable=False)


@form
def covariates():
    def model(x, c):
        w = numpyro.sample("w", dist.Normal(np.zeros((3, 3)), 1.0).to_event(2))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x - c @ w, 1.3))

    w = np.arange(9.0).reshape(3, 3) / 9
    args = (X, C)
    return Form(model, {"w": w}, lambda x: plain(x - C @ w), X, args, {}, {"x": X}, resizable=False)


@form
def labels():
    def model(x, label):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x, 1.3))
            numpyro.sample("label", dist.Bernoulli(logits=x[:, 0] + 2 * x[:, 1]), obs=label)

    def log_density(x):
        sign = np.where(CLEAN, 1.0, -1.0)
        return plain(x) - jnp.log1p(jnp.exp(-sign * (x[:, 0] + 2 * x[:, 1])))

    args = (X, CLEAN.astype(int))
    return Form(model, {}, log_density, X, args, sites={"x": X}, resizable=False)


def network(model, net):
    """A model whose energy is tanh(x·W + b)·v for the parameters `net`, at W, b, v as given."""

    def log_density(x):
        return plain(x) + jnp.tanh(x @ W + B) @ V

    return Form(model, {"net$params": net}, log_density, X, (X,), sites={"x": X})


def with_network(x, net):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(3), obs=x)
        numpyro.factor("energy", base(x, 1.3) + net(x))


@form
def flax_module():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = jnp.tanh(linen.Dense(5)(x))
            return linen.Dense(1, use_bias=False)(hidden)[..., 0]

    def model(x):
        with_network(x, module.flax_module("net", Net(), input_shape=(3,)))

    net = {"Dense_0": {"kernel": W, "bias": B}, "Dense_1": {"kernel": V[:, None]}}
    return network(model, net)


@form
def nnx_module():
    class Net(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(5, 1, use_bias=False, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))[..., 0]

    eager = Net()
    net = {"first": {"kernel": W, "bias": B}, "last": {"kernel": V[:, None]}}
    return network(lambda x: with_network(x, module.nnx_module("net", eager)), net)


@form
def eqx_module():
    eager = equinox.nn.MLP(3, "scalar", 5, 1, jnp.tanh, key=jax.random.key(0))
    parts, _ = equinox.partition(eager, equinox.is_inexact_array)
    leaves = (W.T, B, V[None], np.zeros(1))
    net = jax.tree.unflatten(jax.tree.structure(parts), leaves)
    return network(lambda x: with_network(x, jax.vmap(module.eqx_module("net", eager))), net)


@form
def deterministic_sites():
    def model(x):
        a = numpyro.deterministic("a", 1.0 + numpyro.sample("b", HALF_NORMAL))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            f = numpyro.deterministic("f", base(x, a))
            numpyro.factor("energy", f)

    return Form(model, {"b": 0.3}, plain, X, (X,), sites={"x": X})


@form
def site_in_inner_plate():
    def model(x):
        with numpyro.plate("rows", len(x), dim=-2):
            with numpyro.plate("coordinates", 3, dim=-1):
                x = numpyro.sample("x", improper(), obs=x)
            numpyro.factor("energy", base(x, 1.3)[:, None])

    return Form(model, {}, plain, X, (X,), sites={"x": X})


@form
def site_in_leading_plate():
    def model(x):
        with numpyro.plate("rows", x.shape[1]):
            with numpyro.plate("coordinates", 3):
                x = numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            numpyro.factor("energy", base(x.T, 1.3))

    def log_density(x):
        return plain(x) - jnp.sum(x**2 / 2 + np.log(2 * np.pi) / 2, -1)

    return Form(model, {}, log_density, X, (X.T.copy(),), sites={"x": X.T})


@form
def two_plates_of_rows():
    def model(x):
        with numpyro.plate("outer", 2), numpyro.plate("inner", 2):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x, 1.3))

    x = X.reshape(2, 2, 3)
    return Form(model, {}, plain, X, (x,), sites={"x": x}, resizable=False)


@form
def plate_at_minus_two():
    def model(x):
        with numpyro.plate("rows", len(x), dim=-2):
            x = numpyro.sample("x", improper(3), obs=x[:, None])
            numpyro.factor("energy", base(x, 1.3))

    return Form(model, {}, plain, X, (X,), sites={"x": X[:, None]}, resizable=False)


@form
def scaled():
    def model(x):
        with numpyro.plate("rows", len(x)), handlers.scale(scale=2.5):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x, 1.3))

    return Form(model, {}, plain, X, (X,), sites={"x": X}, weights=2.5)


@form
def masked():
    def model(x, mask):
        with numpyro.plate("rows", len(x)), handlers.mask(mask=mask), handlers.scale(scale=3.0):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x, 1.3))

    args, weights = (X, CLEAN), np.where(CLEAN, 3.0, 0.0)
    return Form(model, {}, plain, X, args, {}, {"x": X}, weights, resizable=False)


@form
def reparametrised():
    def centred(x):
        mu = numpyro.sample("mu", dist.Normal(np.ones(3), 2.0).to_event(1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            numpyro.factor("energy", base(x - mu, 1.3))

    model = handlers.reparam(centred, config={"mu": LocScaleReparam(0)})
    params = {"mu_decentered": C[0]}
    return Form(model, params, lambda x: plain(x - 1 - 2 * C[0]), X, (X,), sites={"x": X})


@form
def image():
    def model(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(8, 8), obs=x)
            numpyro.factor("energy", base(x.reshape(-1, 64), 1.3))

    x = np.random.default_rng(11).normal(size=(3, 8, 8)) / 8
    return Form(model, {}, plain, x.reshape(3, 64), (x,), sites={"x": x})


@form
def one_big_site():
    def model():
        x = numpyro.sample("x", improper(4, 3), obs=X)
        numpyro.factor("energy", base(x.reshape(-1), 1.3))

    return Form(model, {}, plain, X.reshape(1, 12), sites={"x": X}, resizable=False)


@form
def one_big_argument():
    def model(x):
        numpyro.factor("energy", base(x.reshape(-1), 1.3))

    return Form(model, {}, plain, X.reshape(1, 12), (X,), sites={"x": X}, resizable=False)


@form
def normalised_times_factor():
    def model(x):
        mu = numpyro.sample("mu", dist.Normal(np.zeros(3), 1.0).to_event(1))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.Normal(mu, 0.7).to_event(1), obs=x)
            numpyro.factor("tilt", base(x, 1.3))

    def log_density(x):
        z = (x - C[0]) / 0.7
        return plain(x) - jnp.sum(z**2 / 2 + np.log(0.7 * np.sqrt(2 * np.pi)), -1)

    return Form(model, {"mu": C[0]}, log_density, X, (X,), sites={"x": X})


@form
def correlated_normal():
    def model(x):
        x = numpyro.sample("x", dist.MultivariateNormal(np.zeros(3), S).expand([len(x)]), obs=x)
        numpyro.factor("tilt", base(x, 1.3))

    def log_density(x):
        quadratic = jnp.einsum("ni,ij,nj->n", x, np.linalg.inv(S), x)
        return plain(x) - 0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * S)[1])

    return Form(model, {}, log_density, X, (X,), sites={"x": X})


@form
def latents_in_their_own_plate():
    def model(x):
        with numpyro.plate("components", 2):
            centre = numpyro.sample("centre", dist.Normal(np.zeros(3), 1.0).to_event(1))
        numpyro.factor("penalty", -jnp.sum(centre**2))
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", improper(3), obs=x)
            square = jnp.sum((x[:, None] - centre) ** 2, -1)
            numpyro.factor("energy", jax.nn.logsumexp(-square / 2, axis=-1))

    def log_density(x):
        return jnp.log(sum(jnp.exp(-jnp.sum((x - c) ** 2, -1) / 2) for c in C[:2]))

    return Form(model, {"centre": C[:2]}, log_density, X, (X,), sites={"x": X})
