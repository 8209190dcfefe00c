"""Effects of groups that no element of a site has alone: their errors are those of the same law written plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_score import ISM, ScoreMatching
from numpyro_score.uncertainty import SandwichError

GROUPS, EACH = 24, 12
GROUP = np.repeat(np.arange(GROUPS), EACH)  # copied, as JAX keeps arrays that it has seen in one precision
FLAT = dist.ImproperUniform(constraints.real, (), ())
PLACE = np.linspace(0, 3, GROUPS)
KERNEL = 0.5 * np.exp(-0.5 * (PLACE[:, None] - PLACE) ** 2 / 0.25) + 1e-3 * np.eye(GROUPS)
ROOT = np.linalg.cholesky(KERNEL)
WALK = 0.4 * np.tril(np.ones((GROUPS, GROUPS)))


def rows(x, mean):
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", FLAT, obs=x)
        numpyro.factor("energy", -0.5 * (x - mean) ** 2)


def shared():
    return numpyro.sample("m", dist.Normal(0.0, 10.0))


def standard(n=GROUPS):
    return numpyro.sample("z", dist.Normal(0.0, 1.0).expand([n]).to_event(1))


def field(x):
    rows(x, (shared() + ROOT.copy() @ standard())[GROUP.copy()])


def walk(x):
    rows(x, (shared() + 0.4 * jnp.cumsum(standard()))[GROUP.copy()])


def of_sites(x):
    u = jnp.stack([numpyro.sample(f"u{i}", dist.Normal(0.0, 1.0)) for i in range(6)])
    rows(x, (shared() + 0.7 * u)[GROUP.copy() // 4])


def of_params(x):
    z = numpyro.param("z", jnp.zeros(GROUPS))
    numpyro.factor("prior", -0.5 * jnp.sum(z**2))
    rows(x, (shared() + 0.7 * z)[GROUP.copy()])


def in_one_site(x):
    b = standard(GROUPS + 1)
    rows(x, b[0] + 0.7 * b[1:][GROUP.copy()])


def data(root, seed=0):
    rng, count = np.random.default_rng(seed), len(root)
    return (0.4 + (root @ rng.normal(size=count))[GROUP * count // GROUPS] + rng.normal(size=len(GROUP))).astype(
        np.float32
    )


def fitted(model, *args):
    return ScoreMatching(model, loss=ISM()).run(jax.random.key(0), *args, progress_bar=False)  # its closed form


def exact(covariance):
    """The error of m under a flat prior: means of groups of n rows have the covariance C + 1/n."""
    count = len(covariance)
    return np.sum(np.linalg.inv(covariance + np.eye(count) * count / len(GROUP))) ** -0.5


CASES = {
    "field": (field, ROOT @ ROOT.T),
    "random walk": (walk, WALK @ WALK.T),
    "sites": (of_sites, 0.49 * np.eye(6)),
    "params": (of_params, 0.49 * np.eye(GROUPS)),
}


@pytest.mark.parametrize(("name", "precision"), [*((name, "single") for name in CASES), ("field", "double")])
def test_errors_hold_the_spread_of_groups(name, precision):
    """Within 20%, as rows' own spread is estimated; taken as independent they would be 2 to 6 times too small."""
    model, covariance = CASES[name]
    with jax.enable_x64(precision == "double"):
        x = data(np.linalg.cholesky(covariance))
        fit = fitted(model, x.astype(np.float64 if precision == "double" else np.float32))
        found = float(fit.stderr()["m"])
    np.testing.assert_allclose(found, exact(covariance), rtol=0.2)


def test_effects_among_others_are_refused():
    with pytest.raises(SandwichError, match="Site 'z' holds effects of groups and what all groups share"):
        fitted(in_one_site, data(0.7 * np.eye(GROUPS))).stderr()


def polynomial(x, t):
    """A smooth curve of continuous covariates with priors, beside a shared level."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    rows(x, shared() + jnp.stack([t**k for k in range(1, 5)], -1) @ w)


def doses(x, t):
    """Two coefficients at six doses."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    rows(x, shared() + jnp.stack([t, t**2, t**3], -1) @ w)


def hinges(x, t):
    """Coefficients that some rows do not have."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
    rows(x, shared() + jax.nn.relu(t[:, None] - jnp.linspace(-1, 1, 6)) @ b)


@pytest.mark.parametrize("name", ["polynomial", "doses", "hinges"])
def test_coefficients_are_no_effects(name):
    """Regressions whose coefficients have priors keep the sandwich of independent rows."""
    rng = np.random.default_rng(3)
    t = rng.choice(np.linspace(-1, 1, 6), 300) if name == "doses" else rng.normal(size=300)
    x = 0.3 + 0.5 * t + rng.normal(size=300)
    model = {"polynomial": polynomial, "doses": doses, "hinges": hinges}[name]
    fit = fitted(model, jnp.asarray(x, float), jnp.asarray(t, float))
    assert fit.curvature.effects == ()
