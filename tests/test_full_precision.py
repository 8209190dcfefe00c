"""What is computed once, at the end, multiplies in the precision of its numbers, whatever steps are fast enough with.

On GPUs JAX rounds the factors of float32 products to 10 bits unless told otherwise. Nothing here has a GPU: the
programs that JAX compiles say with how many bits they want to multiply.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import improper

from numpyro_score import (
    ISM,
    Energy,
    QuadraticLoss,
    ScoreMatching,
    fisher_divergence,
    generalized_bayes,
    hyvarinen_loo,
    kl_divergence,
    local_variance,
    log_partition,
    squared_log_ratio,
)

X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
MATRIX = np.array([[1.0, 0.5], [0.0, 1.0]], np.float32)
LAW = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def model(x):
    scale = numpyro.sample("scale", dist.Exponential(1.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -scale * jnp.sum((x @ MATRIX) ** 2, axis=-1))


@pytest.fixture(scope="module")
def fit():
    return ScoreMatching(model, num_steps=300).run(jax.random.key(0), X, progress_bar=False)


@pytest.fixture(scope="module")
def energy(fit):
    return Energy(model, fit.estimates, X)


ANALYSES = {
    "stderr": lambda fit, energy: fit.stderr(),
    "influence": lambda fit, energy: fit.influence(),
    "closed form": lambda fit, energy: QuadraticLoss.of(generalized_bayes(model, ISM()), jax.random.key(1), X),
    "leave one out": lambda fit, energy: hyvarinen_loo(fit, num_samples=50, rng_key=jax.random.key(2)),
    "quadrature": lambda fit, energy: log_partition(energy, "quadrature"),
    "smc": lambda fit, energy: log_partition(energy, "smc", jax.random.key(2), num_particles=50),
    "nce": lambda fit, energy: log_partition(energy, "nce", jax.random.key(2)),
    "fisher": lambda fit, energy: fisher_divergence(LAW, energy, jax.random.key(3), num_samples=50),
    "kl": lambda fit, energy: kl_divergence(LAW, energy, jax.random.key(3), num_samples=50, log_partition_q=0.0),
    "ratio": lambda fit, energy: squared_log_ratio(LAW, energy, jax.random.key(3), num_samples=40),
    "increments": lambda fit, energy: local_variance(LAW, energy, jax.random.key(3), noise=0.1, num_samples=50),
}


# Draws may be had with fewer bits; and what a model computes where only the names of its sites are read is not used.
NOT_ANALYSED = ("jit_run_chains", "jit_matmul")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k:UserWarning")  # of 50 draws
@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_multiply_in_full_precision(name, fit, energy, tmp_path):
    """All products of matrices in all programs, at a user's setting of eight bits."""
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        with jax.default_matmul_precision("bfloat16"):
            ANALYSES[name](fit, energy)
    finally:
        jax.config.update("jax_dump_ir_to", None)
    programs = {f.name: f.read_text() for f in tmp_path.iterdir() if not any(n in f.name for n in NOT_ANALYSED)}
    lines = [(name, line) for name, text in programs.items() for line in text.splitlines()]
    products = [(name, line) for name, line in lines if "stablehlo.dot_general" in line]
    assert products
    coarse = [p for p in products if "precision = [HIGHEST, HIGHEST]" not in p[1]]
    assert not coarse, coarse[0]
