"""Jumps of the score among the data are refused, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import energy_of, improper
from numpyro import handlers
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    DSM,
    FSM,
    ISM,
    NCE,
    SSM,
    Energy,
    ScoreMatching,
    audit,
    compare,
    fisher_divergence,
    generalized_bayes,
    hyvarinen_score,
)
from numpyro_score.energy import find_kink
from numpyro_score.losses.base import check_settings

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 2)).astype(np.float32)
LINE = X[:, 0]
NET = {"a": RNG.normal(size=(2, 12)), "b": RNG.normal(size=12), "c": RNG.normal(size=12)}
NET = {k: v.astype(np.float32) for k, v in NET.items()}


def q(x):
    return -0.5 * jnp.sum(x**2, -1)


def network(act):
    return lambda t, x: q(x) + act(x @ t["a"] + t["b"]) @ t["c"]


def tilted(g):
    """q with the term −θ Σ g(x)."""
    return lambda t, x: q(x) - t * g(x).sum(-1)


JUMPS = {  # density, parameter, data, operation, whether it moves
    "Laplace": (lambda t, x: -jnp.sum(jnp.abs(x - t), -1), 0.5, X, "abs", True),
    "Laplace started far off": (lambda t, x: -jnp.sum(jnp.abs(x - t), -1), 0.0, X + 50, "abs", True),
    "relu network": (network(jax.nn.relu), NET, X, "relu", True),
    "relu of fixed features": (tilted(lambda x: jax.nn.relu(x - 0.3)), 0.7, X, "relu", False),
    "leaky relu": (network(jax.nn.leaky_relu), NET, X, "leaky_relu", True),
    "where": (tilted(lambda x: jnp.where(x > 0, 2 * x, -x)), 0.7, X, "where", False),
    "where on a parameter": (lambda t, x: q(x) - jnp.where(x > t, x, t).sum(-1), 0.2, X, "where", True),
    "max": (lambda t, x: q(x) - jnp.maximum(x[:, 0], t * x[:, 1]), 0.7, X, "max", True),
    "clip": (tilted(lambda x: jnp.clip(x, -1, 1)), 0.7, X, "clip", False),
    "floor": (tilted(jnp.floor), 0.7, X, "floor", False),
    "root of a square": (tilted(lambda x: jnp.sqrt(x[:, :1] ** 2)), 0.7, X, "sqrt", False),
    "root of a square by logarithms": (tilted(lambda x: jnp.exp(0.5 * jnp.log(x[:, :1] ** 2))), 0.7, X, "log", False),
    "the same of a product": (
        lambda t, x: q(x) - jnp.exp(0.5 * jnp.log((lambda y: y * y)(x[:, 0] - t))),
        0.7,
        X,
        "log",
        True,
    ),
    "sort": (lambda t, x: q(x) - t * jnp.sort(x, -1)[:, 0], 0.7, X, "sort", False),
    "comparison": (tilted(lambda x: (x > 0.3).astype(x.dtype)), 0.7, X, "comparison", False),
    "scan": (
        lambda t, x: jax.lax.scan(lambda c, a: (c - jnp.abs(a - t), None), q(x), x.T)[0],
        0.3,
        X,
        "abs",
        True,
    ),
    "top_k": (lambda t, x: q(x) + t * jax.lax.top_k(x, 1)[0][:, 0], 0.7, X, "top_k", False),
    "argmax": (lambda t, x: q(x) - t * jnp.argmax(x, -1) * x[:, 0], 0.7, X, "argmax", False),
    "angle with a cut": (tilted(lambda x: jnp.arctan2(jnp.sin(2 * x), jnp.cos(2 * x))), 0.7, X, "arctan2", False),
    "tan": (tilted(lambda x: jnp.arctan(jnp.tan(2 * x)) ** 2), 0.7, X, "tan", False),
    "largest eigenvalue": (
        lambda t, x: q(x) - t * jnp.linalg.eigvalsh(x[:, :, None] * jnp.eye(2))[:, -1],
        0.7,
        X,
        "eigh",
        False,
    ),
    "singular values": (
        lambda t, x: q(x) - t * jnp.linalg.svd(x[:, :, None] * jnp.eye(2) + 0.3, compute_uv=False).sum(-1),
        0.7,
        X,
        "svd",
        False,
    ),
    # What a parameter that starts at zero hides.
    "hinges from zero": (
        lambda t, x: q(x) - jnp.maximum(x[:, :1] - jnp.array([-1.0, 0.0, 1.0]), 0) @ t,
        np.zeros(3),
        X,
        "max",
        False,
    ),
    "max from almost zero": (lambda t, x: q(x) - t * x.max(-1), 1e-4, X, "max", False),
    "relu network with a last layer of zeros": (network(jax.nn.relu), {**NET, "c": 0 * NET["c"]}, X, "relu", True),
    "place and size from zero": (lambda t, x: q(x) - t[0] * jnp.abs(x - t[1]).sum(-1), np.zeros(2), X, "abs", True),
    "remat": (jax.checkpoint(lambda t, x: q(x) - jnp.abs(x[:, 0] - t)), 0.3, X, "abs", True),
}
SMOOTH = {
    "guard of 0/0": (
        tilted(lambda x: jnp.where(x == 0, 1.0, jnp.sin(x) / jnp.where(x == 0, 1.0, x))),
        0.7,
        X,
    ),
    "clip far off": (tilted(lambda x: jnp.clip(x, -30, 30)), 0.7, X),
    "abs of a parameter": (lambda t, x: jnp.abs(t) * q(x), 0.7, X),
    "max of a parameter": (lambda t, x: jnp.maximum(t, 0.1) * q(x), 0.7, X),
    "logsumexp": (
        lambda t, x: jax.nn.logsumexp(-0.5 * jnp.sum((x[:, None] - t) ** 2, -1), -1),
        np.array([[0.0, 1.0], [2.0, -1.0]]),
        X,
    ),
    "logaddexp": (lambda t, x: jnp.logaddexp(q(x - t), q(x + t)), 0.5, X),
    "softmax": (lambda t, x: q(x) - t * jax.nn.softmax(x)[:, 0], 0.5, X),
    "softplus": (network(jax.nn.softplus), NET, X),
    "softplus from zero": (network(jax.nn.softplus), jax.tree.map(np.zeros_like, NET), X),
    "elu from zero": (tilted(jax.nn.elu), 0.0, X),
    "Huber from zero": (
        lambda t, x: -jnp.where(jnp.abs(x - t) < 1, 0.5 * (x - t) ** 2, jnp.abs(x - t) - 0.5).sum(-1),
        0.0,
        X,
    ),
    "small scale": (lambda t, x: -0.5 * jnp.sum((x / jnp.maximum(t, 1e-6)) ** 2, -1), 0.01, X * 0.01),
    "gelu": (network(jax.nn.gelu), NET, X),
    "silu": (network(jax.nn.silu), NET, X),
    "tanh": (network(jnp.tanh), NET, X),
    "elu": (tilted(jax.nn.elu), 0.5, X),
    "cube": (tilted(lambda x: jnp.abs(x) ** 3), 0.5, X),
    "relu squared": (lambda t, x: q(x) - (jax.nn.relu(x - t) ** 2).sum(-1), 0.5, X),
    "norm": (lambda t, x: q(x) - t * jnp.linalg.norm(x, axis=-1), 0.5, X),
    "log of positive data's squares": (tilted(lambda x: jnp.log(x**2)), 0.7, abs(X) + 0.1),
    "log of a square and more": (tilted(lambda x: jnp.exp(0.5 * jnp.log(x**2 + 0.1))), 0.7, X),
    "square by logarithms": (tilted(lambda x: jnp.exp(jnp.log(x**2 + 1e-12))), 0.7, X),
    "Student's t": (lambda t, x: -jnp.log1p((x - t) ** 2).sum(-1), 0.7, X),
    "log of a parameter's square": (lambda t, x: q(x) * jnp.exp(0.5 * jnp.log(t**2)), 0.7, X),
    "square": (tilted(jnp.square), 0.7, X),
    "power of positive data": (tilted(lambda x: x**1.5), 0.7, abs(X) + 0.1),
    "rounded root": (tilted(lambda x: jnp.sqrt(x**2 + 1e-2)), 0.5, X),
    "Huber": (
        lambda t, x: -jnp.where(jnp.abs(x - t) < 1, 0.5 * (x - t) ** 2, jnp.abs(x - t) - 0.5).sum(-1),
        0.2,
        X,
    ),
    "near a circle": (
        lambda t, x: -t * (jnp.sum(x**2, -1) - 1) ** 2 + jnp.where(x[:, 0] > 900, 1.0, 0.0),
        200.0,
        X / np.linalg.norm(X, axis=-1, keepdims=True),
    ),
    "log determinant": (
        lambda t, x: q(x) + t * jnp.linalg.slogdet(3 * jnp.eye(2) + x[:, :, None] * x[:, None])[1],
        0.5,
        X,
    ),
    "angle away from its cut": (tilted(lambda x: jnp.arctan2(x, 9.0)), 0.7, X),
    "arccos inside": (tilted(lambda x: jnp.arccos(0.9 * jnp.tanh(x))), 0.7, X),
    "eigenvalue apart": (
        lambda t, x: (
            q(x) - t * jnp.linalg.eigvalsh(0.1 * x[:, :, None] * x[:, None] + jnp.diag(jnp.array([0.0, 9.0])))[:, 1]
        ),
        0.7,
        X,
    ),
    "jump between far clusters": (
        lambda t, x: q(x - jnp.where(x[:, :1] > 0, 8.0, -8.0)),
        0.5,
        X + np.where(np.arange(120) % 2, 8, -8)[:, None],
    ),
}
LAWS = {
    "Laplace": (lambda m: dist.Laplace(m, 1.5), LINE, True),
    "asymmetric Laplace": (lambda m: dist.AsymmetricLaplaceQuantile(m, 1.0, 0.3), LINE, True),
    "normal": (lambda m: dist.Normal(m, 1.0, validate_args=True), LINE, False),
    "Student": (lambda m: dist.StudentT(3.0, m, 1.0), LINE, False),
    "von Mises": (lambda m: dist.VonMises(m, 2.0), LINE, False),
    "truncated": (lambda m: dist.TruncatedNormal(m, 1.0, low=-4.0, validate_args=True), LINE, False),
    "half-normal": (lambda m: dist.HalfNormal(m, validate_args=True), abs(LINE), False),
    "gamma": (lambda m: dist.Gamma(2.0, m, validate_args=True), abs(LINE), False),
    "log-normal": (lambda m: dist.LogNormal(m, 1.0), abs(LINE), False),
    "beta": (lambda m: dist.Beta(m, 1.2, validate_args=True), abs(LINE) % 1, False),
    "logistic": (lambda m: dist.Logistic(m, 1.0), LINE, False),
}


def single(values):
    return jax.tree.map(np.float32, values)


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_found(name):
    """With the operation, and whether its place depends on a parameter, which is what DSM minds."""
    f, theta, x, operation, moves = JUMPS[name]
    kink = find_kink(energy_of(f, single(theta), np.float32(x)))
    assert kink is not None and operation in kink.operation and kink.moves == moves


@pytest.mark.parametrize("name", SMOOTH)
def test_no_false_alarm(name):
    f, theta, x = SMOOTH[name]
    assert find_kink(energy_of(f, single(theta), np.float32(x))) is None


def test_no_sample_hides_a_place():
    """The peak of a Laplace law in each of 40 samples of 1,000 rows, and nothing in as many of a normal law."""
    jump, smooth = (lambda t, x: -jnp.sum(jnp.abs(x - t), -1)), SMOOTH["Huber"][0]
    none = np.zeros((1000, 1), np.float32)
    jumps, smooths = energy_of(jump, np.float32(0), none), energy_of(smooth, np.float32(0.2), none)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert find_kink(jumps.at(rng.laplace(size=(1000, 1)).astype(np.float32))) is not None, seed
        assert find_kink(smooths.at(rng.normal(size=(1000, 1)).astype(np.float32))) is None, seed


@pytest.mark.parametrize("name", LAWS)
def test_laws(name):
    law, x, jumps = LAWS[name]

    def model(x):
        m = numpyro.param("m", 0.5)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", law(m), obs=x)

    assert (find_kink(Energy(model, {"m": 0.5}, x)) is not None) == jumps


def laplace(x):
    mu, r = numpyro.sample("mu", dist.Normal(0, 3)), numpyro.sample("r", dist.LogNormal())
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Laplace(mu, 1 / r), obs=x)


@pytest.mark.slow
def test_who_refuses():
    """ISM and SSM any jump, DSM one that moves; the fit, the model under NUTS, and the audit."""
    moving, fixed = (energy_of(*JUMPS[k][:2], X) for k in ("Laplace", "clip"))
    for loss, refused in (
        (ISM(), (True, True)),
        (SSM(), (True, True)),
        (DSM(0.3), (True, False)),
        (FSM(), (False,) * 2),
    ):
        for energy, wrong in zip((moving, fixed), refused, strict=True):
            if wrong:
                with pytest.raises(ValueError, match=r"'energy'.*'(abs|clip)'.*KLContraction.*allow_kinks=True"):
                    check_settings(loss, energy)
            else:
                check_settings(loss, energy)
    check_settings(ISM(allow_kinks=True), moving)
    with pytest.raises(ValueError, match=r"'x'.*'abs'.*ISM"):
        ScoreMatching(laplace).run(None, LINE, progress_bar=False)
    with pytest.raises(ValueError, match=r"'x'.*'abs'.*DSM"):
        ScoreMatching(laplace, loss=DSM(0.2)).run(None, LINE, progress_bar=False)
    with pytest.raises(ValueError, match=r"'x'.*'abs'.*ISM"):
        MCMC(NUTS(generalized_bayes(laplace, ISM())), num_warmup=1, num_samples=1, progress_bar=False).run(
            jax.random.key(0), LINE
        )
    with pytest.raises(ValueError, match=r"'x'.*'abs'"):
        audit(laplace, [FSM()], LINE)


def test_hyvarinen_scores_of_jumps_are_refused():
    """Of a density, and of compare, which ranks by them as well; that of a smooth one is given."""
    jumps, smooth = (energy_of(f, 0.5, X) for f in (JUMPS["Laplace"][0], lambda t, x: t * q(x)))
    for refused in (
        lambda: hyvarinen_score(jumps),
        lambda: compare({"a": smooth, "b": jumps}, X, rng_key=KEY),
        lambda: fisher_divergence(X, jumps),
        lambda: fisher_divergence(X[:, 0], dist.Laplace(0.1, 2.0)),
    ):
        with pytest.raises(
            ValueError, match=r"'abs'.*Hyvärinen score would be wrong.*Use kl_divergence, or a form that bends"
        ):
            refused()
    assert np.isfinite(hyvarinen_score(smooth).estimate)
    assert np.isfinite(fisher_divergence(X, smooth).value)
    # Between laws no second derivative is taken: E ½(sign x − sign(x)/2)² = ⅛.
    found = fisher_divergence(dist.Laplace(0.0, 1.0), dist.Laplace(0.0, 2.0), KEY)
    assert found.value == pytest.approx(0.125, abs=1e-5)


@pytest.mark.slow
def test_nce_fits_laplace():
    """What the error recommends finds location and rate: 0.5 and 0.66."""
    x = np.random.default_rng(2).laplace(0.5, 1 / 0.66, 2000).astype(np.float32)
    noise = dist.Normal(x.mean(), x.std())
    fit = ScoreMatching(laplace, loss=NCE(noise, 4), num_steps=600).run(jax.random.key(0), x, progress_bar=False)
    assert abs(fit.estimates["mu"] - 0.5) < 0.2 and abs(fit.estimates["r"] - 0.66) < 0.1


@pytest.mark.parametrize(
    "weigh", [lambda: handlers.mask(mask=False), lambda: handlers.mask(mask=np.zeros(len(X), bool))]
)
def test_all_rows_of_weight_zero(weigh):
    """Nothing to fit: refused as empty data are, and not the start returned."""

    def model(x):
        mu = numpyro.param("mu", 0.3)
        with numpyro.plate("rows", len(x)), weigh():
            x = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", q(x - mu))

    with pytest.raises(ValueError, match=r"rows of 'x' have weight zero.*'energy'"):
        ScoreMatching(model).run(None, X, progress_bar=False)
    with pytest.raises(ValueError, match="rows of 'x' have weight zero"):
        handlers.seed(generalized_bayes(model, ISM()), 0)(X)


@pytest.mark.parametrize("counting", [0, 1])
def test_all_rows_of_weight_zero_in_minibatches(counting):
    """Refused where no row of the data counts; a minibatch alone may have none that does."""
    counts = np.arange(len(X)) < counting

    def model(x, counts):
        mu = numpyro.param("mu", 0.3)
        with numpyro.plate("rows", len(x), subsample_size=10):
            with handlers.mask(mask=numpyro.subsample(counts, event_dim=0)):
                x = numpyro.sample("x", improper(2), obs=numpyro.subsample(x, event_dim=1))
                numpyro.factor("energy", q(x - mu))

    fitter, seeded = ScoreMatching(model), handlers.seed(generalized_bayes(model, ISM()), 0)
    if counting:
        fitter.init(KEY, X, counts)
        seeded(X, counts)
        return
    for start in (lambda: fitter.init(KEY, X, counts), lambda: seeded(X, counts)):
        with pytest.raises(ValueError, match="rows of 'x' have weight zero"):
            start()
