import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.sharding import NamedSharding, PartitionSpec
from numpyro.distributions import constraints

from numpyro_score import SSM, ScoreMatching


def model(x):
    k = numpyro.param("k", jnp.ones(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(k * x**2, axis=-1) - jnp.sum(x**4, axis=-1))


if len(sys.argv) > 1:  # by hand, in two terminals: which of the two this is. CPUs talk by Gloo
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:12345", num_processes=2, process_id=int(sys.argv[1]))
else:  # on a cluster it finds the others by itself; leave it out in a single process
    jax.distributed.initialize()

rows = NamedSharding(jax.make_mesh((jax.device_count(),), ("rows",)), PartitionSpec("rows"))
mine = np.load(f"part-{jax.process_index()}.npy")  # this process's rows, as many as the others have
x = jax.make_array_from_process_local_data(rows, mine)
fit = ScoreMatching(model, loss=SSM(), optim=optax.adam(0.01)).run(jax.random.key(0), x, checkpoint="shared/fit")
if jax.process_index() == 0:
    print(fit.estimates)
