"""Chains, normalisers and tests of discrete laws, against enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.special
import scipy.stats
from discretes import com_poisson, draw, ising, potts, probabilities, states
from models import FAST_COMPILE, assert_mean
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    CD,
    PCD,
    DiscreteLangevin,
    Energy,
    EnergyDistribution,
    Gibbs,
    GibbsWithGradients,
    ScoreMatching,
    kernel_stein_discrepancy,
    log_partition,
    sample,
)
from numpyro_score.divergences.discrete_stein import discrete_rows, discrete_stein_kernel
from numpyro_score.energy import lattice_density, num_values
from numpyro_score.kernels import Lattice

KEY = jax.random.key(0)
log_density = jax.jit(Energy.log_density)
small = functools.partial(ising, side=2)
TRUTH = {"j": 1.0, "h": -0.5}
STATES = states(*[2] * 4)
KERNELS = {
    "Gibbs": Gibbs(),
    "Gibbs at random": Gibbs(scan="random"),
    "Gibbs with gradients": GibbsWithGradients(num_proposals=3),
    "discrete Langevin": DiscreteLangevin(step_size=1.0),
}
LAWS = {
    "binary": (small, TRUTH, STATES),
    "levels": (functools.partial(potts, side=2), {"j": 0.8, "h": 0.4}, states(*[3] * 4)),
    "counts": (com_poisson, {"rate": 2.0, "nu": 0.9}, np.arange(40)[:, None]),
}


def energy_of(law, x=None):
    model, theta, points = LAWS[law]
    x = points if x is None else x
    return Energy(model, theta, x[:, 0] if law == "counts" else x)


def law_of(law):
    model, theta, points = LAWS[law]
    return probabilities(model, theta, points[:, 0] if law == "counts" else points)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_leave_the_law_as_it_is(law, kernel):
    """40,000 chains that start from the law have it still, two steps later: a chi-squared test at 1e-4."""
    if law == "counts" and kernel.startswith("Gibbs") and "gradients" not in kernel:
        with pytest.raises(
            ValueError, match="no largest one, or the model computes its bounds: use GibbsWithGradients"
        ):
            KERNELS[kernel].lattice_chains(Lattice(jnp.sum, 0.0, jnp.inf, None))
        return
    energy, p = energy_of(law), law_of(law)
    points = LAWS[law][2]
    at = np.random.default_rng(0).choice(len(p), 40_000, p=p)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def moved(energy, x):
        low, high = energy.bounds(1)
        lattice = Lattice(lattice_density(energy), low[0], high[0], num_values(energy))
        chains = KERNELS[kernel].lattice_chains(lattice)
        state = chains.step(jax.random.key(2), chains.step(jax.random.key(1), chains.init(x)))
        return state.x, state.accept_prob

    x, accept_prob = moved(energy, jnp.asarray(points[at], float))
    assert np.mean(np.any(x != points[at], axis=1)) > 0.4  # by chance alone some come back
    assert 0.3 < accept_prob.mean() <= 1.0
    x = np.asarray(x, int)
    place = x[:, 0] if law == "counts" else np.ravel_multi_index(x.T, points.max(axis=0) + 1)
    assert law == "counts" or (points[place] == x).all()
    seen, expected = np.bincount(place, minlength=len(p)), 40_000 * p
    common = expected > 5
    seen, expected = (np.append(v[common], v[~common].sum() + 1e-9) for v in (seen, expected))
    chi_squared = np.sum((seen - expected) ** 2 / np.maximum(expected, 1e-6))
    assert scipy.stats.chi2.sf(chi_squared, len(seen) - 1) > 1e-4


@pytest.mark.parametrize("kernel", [None, functools.partial(DiscreteLangevin, step_size=0.5)])
def test_draws(kernel):
    """Draws have the law's means, and are integers in the site's shape."""
    draws = sample(energy_of("binary"), KEY, 1500, kernel=kernel, num_warmup=50)
    x = draws["posterior"]["x"]
    assert x.shape == (4, 1500, 4) and x.dtype.kind == "i"
    mean = law_of("binary") @ STATES
    error = 0.5 / np.sqrt([float(v) for v in draws["ess"]["x"]])
    np.testing.assert_array_less(np.abs(x.values.mean((0, 1)) - mean), 5 * error)


def test_kernels_under_mcmc():
    """The kernels work under NumPyro's MCMC, alone and vectorised; a wrong start is refused."""

    def potential(x):
        return -x[0] * x[1]

    mcmc = MCMC(
        Gibbs(potential), num_warmup=5, num_samples=2000, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(KEY, init_params=jnp.zeros((2, 2)), extra_fields=("accept_prob", "potential_energy"))
    share = mcmc.get_samples().prod(-1).mean()
    assert abs(share - np.e / (3 + np.e)) < 5 * 0.5 / np.sqrt(2000)  # two chains whose draws are hardly correlated
    for z, message in ((jnp.array([0.0, 2.0]), "outside"), (None, "init_params"), (jnp.zeros((2, 2)), "vectors")):
        with pytest.raises(ValueError, match=message):
            Gibbs(potential).init(KEY, 0, z)


def test_contrastive_divergence():
    """At the truth the gradient of CD has mean zero over rows of the law, whatever the number of steps."""
    x = draw(small, TRUTH, STATES, 40_000, seed=4)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def slopes(theta):
        loss = CD(1, kernel=Gibbs())
        return jax.jacfwd(lambda theta: loss(Energy(small, theta, x), KEY))(theta)

    for values in slopes(TRUTH).values():
        assert_mean(values, 0.0)
        assert np.std(values) > 0.5  # so that 5 standard errors are nothing else


@pytest.mark.slow
def test_persistent_chains():
    """PCD comes to maximum likelihood, up to the noise of its chains, and has its errors."""
    counts = np.bincount(np.random.default_rng(1).choice(16, 400, p=law_of("binary")), minlength=16)
    rows = np.repeat(STATES, counts, axis=0)
    # In h and j; maximum likelihood has the data's means for those of the law.
    statistics = np.stack([STATES.sum(1), log_density(energy_of("binary").with_params({"h": 0.0}), 1.0 * STATES)])
    best = np.zeros(2)
    for _ in range(10):
        p = scipy.special.softmax(best @ statistics)
        curvature = np.cov(statistics, aweights=p, ddof=0)
        best = best - np.linalg.solve(curvature, statistics @ (p - counts / 400))
    error = np.sqrt(np.diag(np.linalg.inv(curvature)) / 400)
    loss = PCD(500, kernel=GibbsWithGradients(num_proposals=2))
    fit = ScoreMatching(small, loss=loss, num_steps=500).run(KEY, rows, progress_bar=False)
    np.testing.assert_array_less(np.abs([fit.estimates["h"], fit.estimates["j"]] - best), error)


@pytest.mark.slow
def test_log_partition():
    """By enumeration to rounding; by annealing within five of its standard errors."""
    for law in LAWS:
        energy = energy_of(law, LAWS[law][2][np.random.default_rng(3).choice(len(LAWS[law][2]), 100, p=law_of(law))])
        f = np.asarray(log_density(energy, 1.0 * LAWS[law][2]), np.float64)
        log_z = scipy.special.logsumexp(f)
        result = log_partition(energy)
        assert result.method == "enumeration"
        assert abs(result.value - log_z) < 5 * result.stderr < 2e-5
        if law != "levels":  # the same code as for bits
            result = log_partition(energy, "ais", KEY, num_chains=200, num_levels=30)
            assert 0 < result.stderr < 0.1
            assert abs(result.value - log_z) < 5 * result.stderr
    law = EnergyDistribution(energy_of("binary"), log_partition(energy_of("binary")))
    np.testing.assert_allclose(np.exp(law.log_prob(STATES)), law_of("binary"), rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("law", LAWS)
def test_stein_identity(law):
    """The mean of h against the law is zero, exactly, and h is a positive definite kernel."""
    energy, points = energy_of(law), jnp.asarray(LAWS[law][2], float)

    @jax.jit
    def of_pairs(energy):
        rows = discrete_rows(energy, points, jnp.array(0.7))
        return jax.vmap(discrete_stein_kernel, (0, None))(rows, rows)

    h = np.array(of_pairs(energy))
    np.testing.assert_allclose(h @ law_of(law), 0.0, atol=1e-11)
    np.testing.assert_allclose(h, h.T, atol=1e-9)
    assert np.linalg.eigvalsh(h)[0] > -1e-9 * np.abs(h).max()


def test_stein_test():
    """It sees another coupling, and passes the truth."""
    rows = draw(small, TRUTH, STATES, 300, seed=2)
    assert kernel_stein_discrepancy(rows, energy_of("binary"), KEY).pvalue > 0.01
    other = Energy(small, {"j": 0.2, "h": 0.2}, rows)
    assert kernel_stein_discrepancy(rows, other, KEY).pvalue < 0.01


REFUSED = {
    "NUTS": (lambda e, c: sample(e, KEY, 10, kernel=NUTS), TypeError, "NUTS does not move.*'x'.*Gibbs"),
    "Gibbs of reals": (
        lambda e, c: sample(c, KEY, 10, kernel=Gibbs),
        TypeError,
        "Gibbs does not move.*continuous.*NUTS",
    ),
    "smc": (lambda e, c: log_partition(e, "smc", KEY), ValueError, "discrete data of site 'x'.*'enumeration', 'ais'"),
    "ais of reals": (lambda e, c: log_partition(c, "ais", KEY), ValueError, "continuous data.*'quadrature'"),
    "score": (lambda e, c: e.score(e.data), TypeError, r"'x' is discrete.*PseudoLikelihood\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """What has no meaning for such data is refused in words."""

    def normal(x):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", numpyro.distributions.Normal(), obs=x)
            numpyro.factor("energy", -(x**2))

    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(energy_of("binary"), Energy(normal, {}, np.zeros(3)))


def test_counts_without_a_normaliser():
    """Counts whose density grows, or does not fall, have neither log Z nor draws."""
    for theta in ({"rate": 2.0, "nu": -0.1}, {"rate": 1.0, "nu": 0.0}):
        energy = Energy(com_poisson, theta, np.arange(5))
        for call in (log_partition, lambda e: log_partition(e, "ais", KEY), lambda e: sample(e, KEY, 10)):
            with pytest.raises(ValueError, match=r"counts 'x' goes from .*no normaliser.*gammaln"):
                call(energy)
