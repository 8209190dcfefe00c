"""What test_processes.py runs, as one of several processes: python process_job.py PROCESSES RANK PORT FOLDER.

Each of two and of three processes has a device; a single one does in turn what both do together. Three do less.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

COUNT, RANK, PORT, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
OWN = 3 if COUNT == 1 else 1
# As conftest.py compiles, on as many devices as this process has.
FLAGS = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, f"--xla_force_host_platform_device_count={OWN}"])
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
if COUNT > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, RANK)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
import optax  # noqa: E402
import tqdm  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from numpyro.distributions import constraints  # noqa: E402

from numpyro_score import CD, FSM, MALA, PCD, SSM, ScoreMatching, load  # noqa: E402
from numpyro_score.inference import loop  # noqa: E402

N = 210
STEPS = 400  # of a long run: those of its calls are 1, 8 and up to four times as many as in the call before
ADAM = optax.adam(1e-3)  # one object, whose programs all fits of one loss share
X = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)


def quartic(x, power=4):
    """A sum of quartic terms."""
    a = numpyro.param("a", 0.3 * jnp.ones(4), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (4,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**power, axis=-1) - 0.1 * jnp.sum(x, axis=-1) ** 2)


def root(x):
    """The score is not finite where x is the parameter."""
    mu = numpyro.param("mu", 0.0)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (4,)), obs=x)
        numpyro.factor("energy", -jnp.sum(jnp.abs(x - mu) ** 0.5, axis=-1))


def exponential(x):
    """Positive data."""
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.independent(constraints.positive, 1), (), (4,)), obs=x)
        numpyro.factor("energy", -rate * jnp.sum(x**2, axis=-1))


def placed(x, devices=2):
    """The rows over the first devices, each process giving its own."""
    size, mesh = N // COUNT, jax.make_mesh((devices,), ("rows",), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    return jax.make_array_from_process_local_data(rows, x[RANK * size : (RANK + 1) * size])


def with_value(row, value, x=X, devices=2):
    """The data with another value in one row."""
    x = x.copy()
    x[row] = value
    return placed(x, devices)


def message(model, x, loss, key=None, optim=None, **options):
    """What a fit says that fails."""
    optim, key = optim or ADAM, jax.random.key(2) if key is None else key
    try:
        ScoreMatching(model, optim=optim, loss=loss, num_steps=5).run(key, x, **options)
    except (ValueError, OSError, FloatingPointError) as error:
        return str(error)
    return "no error"


def run(sm, x, **kwargs):
    return sm.run(jax.random.key(2), x, progress_bar=False, **kwargs)


class Stopping(tqdm.tqdm):
    """A progress bar at which Ctrl-C is pressed, on the last process, after 60 steps."""

    taken = 0  # which a bar that is not shown does not count

    def update(self, n=1):
        before, self.taken = self.taken, self.taken + n
        if before < 60 <= self.taken and RANK == COUNT - 1:
            os.kill(os.getpid(), signal.SIGINT)


def stopped_and_resumed(sm, x):
    """The steps of a run that Ctrl-C stops, and the parameters of the same call after it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    bar, loop.tqdm = loop.tqdm, Stopping
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stopped = run(sm, x, num_steps=STEPS, checkpoint=FOLDER / "stopped")
    loop.tqdm = bar
    resumed = run(sm, x, num_steps=STEPS, checkpoint=FOLDER / "stopped")
    return len(stopped.losses), resumed.losses, resumed.params["a"]


def errors_of(fit):
    """What is computed from a fit: errors, influence, the fit saved and loaded."""
    fit.save(FOLDER.parent / f"fit-{COUNT}")
    loaded = load(FOLDER.parent / f"fit-{COUNT}", quartic)
    influence = multihost_utils.process_allgather(fit.influence()["a"], tiled=True)
    return {
        "stderr": fit.stderr()["a"],
        "of": fit.stderr(of=lambda estimates: estimates["a"].sum()),
        "influence": influence,
        "loaded": loaded.stderr()["a"],
        "loaded_data": loaded.args[0],
    }


def batches(number, fault=None):
    """Shares of the rows; the last process's end early, raise or hold NaN."""
    for i in range(number):
        if RANK == COUNT - 1 and i == 3 and fault == "end":
            return
        if RANK == COUNT - 1 and i == 3 and fault == "raise":
            raise OSError("the disk is gone")
        value = np.nan if i == 3 and fault == "missing" else X[150, 0]
        yield with_value(150, value, np.roll(X, 7 * i, axis=0))


def batch_message(items):
    """What a fit to batches says that fails."""
    try:
        ScoreMatching(quartic, optim=ADAM, loss=SSM()).run_batches(0, items, num_steps=6, progress_bar=False)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        return str(error)
    return "no error"


def further():
    """Losses with chains, standard errors, batches and Ctrl-C; of several processes what only one of them meets."""
    x, kernel = placed(X), MALA(step_size=0.05)
    found = {}
    for name, loss in (("pcd", PCD(40, kernel=kernel, restart=0.1)), ("cd", CD(2, kernel=kernel)), ("fsm", FSM())):
        found[name] = run(ScoreMatching(quartic, optim=ADAM, loss=loss, num_steps=50), x).params["a"]
    sm = ScoreMatching(quartic, optim=ADAM, loss=SSM())
    found["stopped"], found["resumed_losses"], found["resumed_a"] = stopped_and_resumed(sm, x)
    found |= errors_of(ScoreMatching(quartic).run(0, x, progress_bar=False))
    found["batches"] = sm.run_batches(0, batches(6), num_steps=6, num_rows=1000, progress_bar=False).params["a"]
    if COUNT == 1:
        return found
    for fault in ("end", "raise", "missing"):
        found[f"batches_{fault}"] = batch_message(batches(6, fault))
    found["no_directory"] = message(quartic, x, SSM(), checkpoint=FOLDER.parent / "file")
    found["other_rates"] = message(quartic, x, SSM(), optim=optax.adam(1e-3 * (1 + RANK)))
    found["other_steps"] = message(quartic, x, SSM(), num_steps=5 + RANK)
    found["other_keys"] = message(quartic, x, SSM(), key=jax.random.key(RANK))
    found["other_arguments"] = message(quartic, x, SSM(), power=4 + 2 * RANK)
    found["apart"] = message(quartic, X + RANK, SSM())
    found["batches_apart"] = batch_message([X + RANK] * 6)
    return found


def saved(sm, devices):
    """A run that is saved, the same read back, and the error at a row that is not there."""
    x, folder = placed(X, devices), FOLDER / f"saved-{devices}"
    first = run(sm, x, checkpoint=folder, checkpoint_every=1e-9)
    again = run(sm, x, checkpoint=folder)
    missing = message(quartic, with_value(150, np.nan, devices=devices), SSM())
    return {
        "losses": first.losses,
        "a": first.params["a"],
        "saved_losses": again.losses,
        "saved_a": again.params["a"],
        "missing": missing,
    }


def all_of(sm):
    """What is compared between one process and two."""
    found = saved(sm, 2)
    true_clock, factor = time.perf_counter, 100.0 if RANK else 1.0
    time.perf_counter = lambda: factor * true_clock()
    long = run(sm, placed(X), num_steps=STEPS)
    time.perf_counter = true_clock
    return found | {
        "long_losses": long.losses,
        "long_a": long.params["a"],
        "outside": message(exponential, with_value(150, -2.0, np.abs(X)), SSM()),
        "kink": message(root, with_value(150, 0.0), SSM(allow_kinks=True)),
        **further(),
    }


def main():
    sm = ScoreMatching(quartic, optim=ADAM, loss=SSM(), num_steps=60)
    if COUNT < 3:
        np.savez(FOLDER / f"found-2-{RANK}.npz", **all_of(sm))
    if COUNT != 2:
        np.savez(FOLDER / f"found-3-{RANK}.npz", **saved(sm, 3))


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # the others wait for this one, and its exit would wait for them
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
