"""The private names of NumPyro that the package relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC

from numpyro_score import MALA

MOVED = (
    "NumPyro keeps the mask of a MaskedDistribution elsewhere than in `_mask`. numpyro_score reads it in "
    "`unwrap` (numpyro_score/energy/trace.py), which must follow, or rows that are masked out will count."
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


def test_what_tells_a_site_of_a_scan():
    """`_control_flow_done` marks the sites of a scan, which are shown to handlers again after it ran."""
    seen = []

    class Look(numpyro.primitives.Messenger):
        def process_message(self, msg):
            seen.append((msg.get("name"), msg.get("_control_flow_done")))

    with Look(), handlers.seed(rng_seed=0):
        scan(lambda c, v: (c, numpyro.sample("x", dist.Normal(), obs=v)), 0.0, jnp.ones(3))
    assert ("x", True) in seen, (
        "NumPyro marks the sites of a scan elsewhere than in `_control_flow_done`: `is_in_control_flow` "
        "(numpyro_score/energy/trace.py) must follow, or a series in a scan counts as independent rows."
    )


def test_what_tells_mcmc_that_a_kernel_is_initialised(monkeypatch):
    """Without `_sample_fn` MCMC calls `init` at a warm restart, which has no start there."""
    kernel = MALA(potential_fn=lambda x: 0.5 * x**2, step_size=0.1)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params=jnp.array(0.0))
    mcmc.post_warmup_state = mcmc.last_state

    def refuse(*args, **kwargs):
        raise AssertionError(
            "MCMC decides by something else than `_sample_fn` whether a kernel is initialised: GradientKernel "
            "(numpyro_score/kernels/base.py) must follow, or warm restarts of a potential need init_params."
        )

    monkeypatch.setattr(MALA, "init", refuse)
    mcmc.run(jax.random.key(1))
