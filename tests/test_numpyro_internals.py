"""The one private name of NumPyro that the package reads."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

MOVED = (
    "NumPyro keeps the mask of a MaskedDistribution elsewhere than in `_mask`. numpyro_score reads it in "
    "`unwrap` (numpyro_score/_trace.py), which must follow, or rows that are masked out will count."
)


def test_mask_of_a_masked_distribution():
    """`MaskedDistribution._mask` holds the mask, from `Distribution.mask` and `handlers.mask` alike."""
    mask = jnp.array([True, False, True])
    with handlers.trace() as trace, handlers.mask(mask=mask):
        numpyro.sample("x", dist.Normal(jnp.zeros(3)), obs=jnp.ones(3))
        numpyro.factor("f", jnp.ones(3))
    for fn in (dist.Normal(jnp.zeros(3)).mask(mask), trace["x"]["fn"], trace["f"]["fn"]):
        assert isinstance(fn, dist.MaskedDistribution), MOVED
        assert hasattr(fn, "_mask"), MOVED
        np.testing.assert_array_equal(fn._mask, mask, err_msg=MOVED)
        # What the package relies on beside the name: zero where the mask is, the base's density elsewhere.
        value, base = jnp.ones(3), fn.base_dist.log_prob(jnp.ones(3))
        np.testing.assert_array_equal(fn.log_prob(value), jnp.where(mask, base, 0.0), MOVED)
