"""The example of two surveys, against what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import load_script
from scipy.special import gammaln, logsumexp

from numpyro_score import PseudoLikelihood


@pytest.fixture(scope="module")
def survey():
    return load_script("survey")


def test_graph_is_near_maximum_likelihood(survey):
    """Which makes the model's shares of answers and pairs those of the data."""
    x = survey.answers()
    assert x.shape == (944, 10) and set(np.unique(x)) == {0, 1}
    table = survey.graph(x)
    assert (np.abs(table[:, 0] - table[:, 2]) < 0.5 * table[:, 3]).all()
    np.testing.assert_allclose(table[:, 1], table[:, 3], rtol=0.1)
    names = list(survey.ANSWERS)
    largest = np.argmax(table[:, 2])
    assert {names[survey.FIRST[largest]], names[survey.SECOND[largest]]} == {"Republican", "votes Dole"}


def test_regression_is_the_likelihood(survey):
    """Of rows of one number pseudo-likelihood is, here of 400 marriages; the law is that of the formula."""
    z, y = (v[::16] for v in survey.marriages())
    t = np.array([0.5, 1.5, 0.1, -0.1, 2.0])
    k, eta = np.arange(61), z[3] @ t[:4]
    f = k * eta - 2.0 * gammaln(k + 1.0)
    np.testing.assert_allclose(jax.jit(survey.log_law)(jnp.asarray(t, z.dtype), z[3:4])[0], f - logsumexp(f), atol=1e-3)
    ours, errors = survey.regression(y, z, PseudoLikelihood(max_count=30))
    exact, exact_errors, _ = survey.exact_children(y, z)
    assert (np.abs(ours - exact) < 0.02 * exact_errors).all()
    np.testing.assert_allclose(errors, exact_errors, rtol=0.5)
