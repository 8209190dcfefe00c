"""Natural mistakes with arguments, each with one sentence that says what to write."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import improper
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

from numpyro_score import (
    CD,
    DSM,
    ESM,
    ISM,
    MALA,
    NCE,
    PCD,
    SSM,
    AdversarialDynamicsEmbedding,
    Energy,
    KLContraction,
    ScoreMatching,
    generalized_bayes,
    geometric_levels,
    log_partition,
    parzen_score,
    report,
    to_arviz,
)
from numpyro_score.random import as_key

# The package's own errors, which the checks of annotations would come before.
pytestmark = pytest.mark.usefixtures("unchecked")

X = np.random.default_rng(0).normal(size=(20, 2))


def model(x, sigma=1.0):
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * a * (x**2).sum(-1) / sigma)


FIT = {}


def fit():
    if not FIT:
        FIT["fit"] = ScoreMatching(model).run(0, X, progress_bar=False)
    return FIT["fit"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DSM(), "DSM needs sigma.*DSM\\(sigma="),
        (lambda: KLContraction(), "needs time.*KLContraction\\(time="),
        (lambda: NCE(), "NCE needs noise.*dist.Normal"),
        (lambda: ESM(), "needs target_score.*parzen_score"),
        (lambda: CD(), "CD needs kernel.*MALA"),
        (lambda: PCD(), "PCD needs kernel.*MALA"),
        (lambda: ScoreMatching(model, ISM()), r"is a loss: write ScoreMatching\(model, loss=ISM"),
        (lambda: ScoreMatching(model, None, DSM(0.5)), "is a loss.*loss=DSM"),
        (lambda: ScoreMatching(model, ISM), r"ISM\(\.\.\.\) is a loss: write ScoreMatching\(model, loss=ISM\("),
        (lambda: ScoreMatching(model, optax.adam(0.1)), "guide given is an optimiser: write .*optim="),
        (lambda: ScoreMatching(model, numpyro.optim.Adam(0.1)), "guide given is an optimiser: write .*optim="),
        (lambda: ScoreMatching(model, optim=optax.adam), r"optim must be an optimiser, got adam.*optax.adam\("),
        (lambda: ScoreMatching(model, optim=AutoNormal), "optim must be an optimiser, got AutoNormal"),
        (lambda: AdversarialDynamicsEmbedding(model, flow_optim=0.1), "flow_optim must be an optimiser, got 0.1"),
        (lambda: AdversarialDynamicsEmbedding(model, optax.adam(0.1)), "optim=... for an optimiser"),
        (lambda: AdversarialDynamicsEmbedding(model, ISM()), "takes no loss"),
        (lambda: generalized_bayes(model), r"needs a loss.*ISM\(\)"),
        (lambda: ScoreMatching(model).run(0, X, num_step=5), "no argument 'num_step'.*did you mean num_steps"),
        (lambda: ScoreMatching(model).run(0, X, sigm=5), "did you mean sigma"),
        (lambda: AdversarialDynamicsEmbedding(model).run(0, X, progres_bar=False), "did you mean progress_bar"),
        (lambda: ScoreMatching(model).run(X), r"rng_key must be one random key.*run\(jax.random.key\(0\), x\)"),
        (lambda: Energy(model, {"a": 1.0}, X).bind(sigma=np.ones(7)), r"sigma of shape \(7,\).*\(20,\)"),
        (lambda: Energy(model, {"a": 1.0}, X).bind(sigma="a"), "evaluated with sigma = 'a'"),
        (lambda: Energy(model, {"a": 1.0}, X).bind(sigma=np.array(["1"])), "'sigma' is an array of <U1"),
        (lambda: Energy(model, {"a": 1.0}, X).score(np.ma.masked_array(X)), "'x' is a masked array"),
        (lambda: Energy(model, {"a": 1.0}, X).flatten(X.astype(object)), "'x' is an array of Python objects"),
        (lambda: Energy(model, X), r"params must be a dict.*shape \(20, 2\).*Energy\(model, params, x\)"),
        (lambda: Energy(model, None, X), "params must be a dict.*got None"),
        (lambda: log_partition(fit(), 0), "method must be one of 'quadrature'.*rng_key="),
        (lambda: log_partition(fit(), jax.random.key(0)), "method must be one of 'quadrature'.*rng_key="),
        (lambda: ScoreMatching(model).init(0, X, init_params=[1.0]), "init_params must be a dict.*got a list"),
        (lambda: ScoreMatching(model).init(0, X, init_params={"a": "1"}), "init_params has a of <U1"),
        (lambda: to_arviz(fit(), num_sample=8), "leave out 'num_sample'"),
        (lambda: ISM(allow_kinks="no"), "ISM needs True or False as allow_kinks, got 'no'"),
        (lambda: SSM(variance_reduced=2), "SSM needs True or False as variance_reduced, got 2"),
        (lambda: ESM(lambda x: -x, allow_kinks=0), "ESM needs True or False as allow_kinks, got 0"),
        (lambda: DSM(0.5, control_variate="yes"), "DSM needs True or False as control_variate, got 'yes'"),
        (lambda: DSM(0.5, weighting=2.0), "DSM needs a function of the level as weighting, got 2.0"),
        (lambda: SSM(jnp.array(3.0)), "SSM needs an integer as num_projections"),
        (lambda: SSM(jnp.array([3])), "SSM needs an integer as num_projections"),
        (lambda: PCD(MALA(step_size=0.1)), "PCD needs an integer as num_chains, got MALA"),
        (lambda: CD(MALA(step_size=0.1)), "CD needs an integer as num_steps, got MALA"),
        (lambda: fit().stderr(of="a"), "of must be a function of the estimates.*got 'a'"),
    ],
)
def test_types(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DSM((0.5, 1.0), weighting=lambda s: -s), "DSM's weighting gave -0.5 at the level 0.5.*at least 0"),
        (lambda: ScoreMatching(model).init(0, X, init_params={"a": -1.0}), "a = -1.0.*(?i:constraint positive)"),
        (lambda: parzen_score(X, 1.0)(X[0]), r"shape \(N, 2\), got \(2,\).*x\[None\]"),
        (lambda: Energy(model, {"a": 1.0}, X).flatten(X[0]), r"'x' have shape \(2,\)"),
        (lambda: fit().to_arviz(dims={"x": ["col"]}), "names 1 axes of 'x'.*has 2"),
        (lambda: fit().to_arviz(coords={"c": "ab"}, dims={"x": ["row", "d"]}), "coords has \\['c'\\]"),
        (lambda: fit().to_arviz(coords={"c": "abc"}, dims={"x": ["r", "c"]}), "3 labels for 'c'.*'x' has 2"),
        (lambda: fit().to_arviz(dims={"y": ["row"]}), "dims has \\['y'\\]"),
        (lambda: Energy(prior, {"b": np.ones(7)}, X), r"site 'b' among the params has shape \(7,\).*has shape \(\)"),
        (lambda: Energy(prior, {"b": np.ones((2, 1))}, X), r"site 'b'.*shape \(2, 1\)"),
        (lambda: report(fit(), "."), "is a directory: give report a file"),
        (lambda: report(fit(), "nowhere/fit.html"), "nowhere is no directory: make it"),
    ],
)
def test_values(make, match):
    with pytest.raises((ValueError, OSError), match=match):
        make()


def prior(x):
    b = numpyro.sample("b", dist.Normal())
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum((x - b) ** 2, axis=-1))


def means(x):
    m = numpyro.param("m", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)


def with_priors(x):
    m, s = numpyro.sample("m", dist.Normal(0, 5)), numpyro.sample("s", dist.HalfNormal(5))
    w = numpyro.param("w", lambda key: jax.random.normal(key, (3,)))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(m + w.sum(), s).expand([2]).to_event(1), obs=x)


@pytest.mark.parametrize("make", [ScoreMatching, AdversarialDynamicsEmbedding])
@pytest.mark.parametrize(
    ("model", "init_params", "match"),
    [
        (means, {"m": 0.0}, r"init_params has m of shape \(\), the site has \(2,\)"),
        (means, {"m": np.zeros(4)}, r"init_params has m of shape \(4,\), the site has \(2,\)"),
        (means, {"m": {"a": 1.0}}, "init_params has m with the parts"),
        (with_priors, {"w": np.zeros((3, 1))}, r"init_params has w of shape \(3, 1\), the site has \(3,\)"),
        (with_priors, {"m_auto_loc": np.zeros(2)}, r"m_auto_loc of shape \(2,\), the site has \(\)"),
        (with_priors, {"m": 7.0, "s": -1.0}, "'m', which is a sample site.*'m_auto_loc'"),
        (with_priors, {"s": 2.0}, "'s', which is a sample site.*'s_auto_loc'"),
    ],
)
def test_initial_values(make, model, init_params, match):
    with pytest.raises(ValueError, match=match):
        make(model).init(0, X, init_params=init_params)


def test_initial_values_of_another_guide():
    for init_params, match in [({"s": -1.0}, "sample site"), ({"s_auto_scale": np.ones(2)}, r"has \(\)")]:
        with pytest.raises(ValueError, match=match):
            ScoreMatching(with_priors, AutoNormal).init(0, X, init_params=init_params)


@pytest.mark.parametrize("value", [np.array([3, -1]), jnp.array([3, -1])])
def test_integers_as_initial_values(value):
    svi = ScoreMatching(means, optim=optax.sgd(0.0), num_steps=1)
    fit = svi.run(0, X, init_params={"m": value}, progress_bar=False)
    np.testing.assert_array_equal(fit.params["m"], [3.0, -1.0])


def test_names_of_axes():
    found = fit().to_arviz(num_samples=8, coords={"col": ["u", "v"]}, dims={"x": ["r", "col"]})["observed_data"]["x"]
    np.testing.assert_allclose(found.sel(col="v"), X[:, 1], rtol=1e-6)


@pytest.mark.parametrize("seed", [0, np.int64(7)])
def test_integers_are_keys(seed):
    assert jax.random.key_data(as_key(seed)).tolist() == jax.random.key_data(jax.random.key(int(seed))).tolist()


@pytest.mark.parametrize("three", [3, np.int64(3), np.array(3), jnp.array(3)])
def test_integers_of_any_kind_are_counts_and_keys(three):
    """And are integers from there on, so that a loss can be hashed."""
    assert SSM(three) == SSM(3) and hash(SSM(three)) == hash(SSM(3)) and type(SSM(three).num_projections) is int
    assert len(geometric_levels(1.0, 0.1, three)) == 3
    assert as_key(three) == jax.random.key(3)
    assert fit().sample_posterior(0, three)["a"].shape == (3,)


@pytest.mark.parametrize("wrong", [True, 1.0, None, jax.random.split(jax.random.key(0))])
def test_other_values_are_no_keys(wrong):
    with pytest.raises(TypeError, match="one random key or an integer"):
        as_key(wrong)


def test_legitimate_values_are_taken():
    """Sizes in a list, a scalar observed over a plate, keywords passed on by **kwargs."""

    def loose(x, sizes, **kwargs):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("label", dist.Bernoulli(0.5), obs=0)
            value = numpyro.sample("x", improper(2), obs=x)
            numpyro.factor("energy", -sizes[0] * (value**2).sum(-1))

    Energy(loose, {}, X, [2, 3], anything=1).check()
