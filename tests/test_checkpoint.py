"""Fits that are stopped at any moment go on to the same numbers."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import stop_after
from numpyro.distributions import constraints

from numpyro_score import MALA, NCE, PCD, SSM, AdversarialDynamicsEmbedding, LearnedFlow, ScoreMatching

pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling")
LOSS = PCD(kernel=MALA(step_size=0.1), num_chains=32, num_steps=2)
ROWS = jax.random.normal(jax.random.key(0), (100, 2))


def quartic(x, power=4):
    """Quartic tails, whose fit has no closed form."""
    a = numpyro.param("a", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**power, -1))


def run(checkpoint=None, key=1, x=ROWS, num_steps=300, loss=LOSS, optim=None, **options):
    svi = ScoreMatching(quartic, loss=loss, optim=optim, num_steps=num_steps, average=0.9)
    return svi.run(key, x, progress_bar=False, checkpoint=checkpoint, **options)


def assert_identical(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.fixture(scope="module")
def whole():
    """A run that nothing stops."""
    return run()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same, with every save that is due at once, and its directory."""
    directory = tmp_path_factory.mktemp("run")
    return run(directory, checkpoint_every=1e-9), directory


def test_saving_says_nothing(tmp_path, caplog):
    """Orbax warns of each save in the format that leaves less in memory."""
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        run(tmp_path / "run", checkpoint_every=1e-9)
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_saving_changes_nothing(whole, saved):
    assert_identical((whole.state, whole.losses), (saved[0].state, saved[0].losses))


def test_interrupted_run_goes_on(whole, tmp_path, monkeypatch):
    """Parameters, their average, the default optimiser's schedule, chains, key and losses, to the bit."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.warns(UserWarning, match="Interrupted after"):
            part = run(tmp_path)
    assert part.interrupted and 0 < len(part.losses) < 300
    fit = run(str(tmp_path))
    assert_identical((whole.params, whole.state, whole.losses), (fit.params, fit.state, fit.losses))
    assert not fit.interrupted


@pytest.mark.slow
def test_adversarial_run_goes_on(tmp_path, monkeypatch):
    fitter = AdversarialDynamicsEmbedding(quartic, LearnedFlow(2, num_steps=1), num_samples=16)
    options = dict(num_steps=100, progress_bar=False)
    one = fitter.run(1, ROWS, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.warns(UserWarning, match="Interrupted after"):
            fitter.run(1, ROWS, checkpoint=tmp_path, **options)
    two = fitter.run(1, ROWS, checkpoint=tmp_path, **options)
    assert_identical((one.state, one.losses), (two.state, two.losses))


def test_finished_run_takes_no_steps(saved, monkeypatch):
    monkeypatch.setattr(ScoreMatching, "update", None)
    again = run(saved[1])
    assert_identical((saved[0].state, saved[0].losses), (again.state, again.losses))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_steps=400), "num_steps=300, and this one has num_steps=400"),
        (dict(key=2), "rng_key="),
        (dict(x=ROWS + 1), "of a run on other data"),
        (dict(x=ROWS[:50]), "of a run on other data"),
        (dict(loss=PCD(kernel=MALA(step_size=0.2), num_chains=32, num_steps=2)), "step_size=0.2"),
        (dict(optim=optax.sgd(1e-3)), "another model or optimiser"),
        (dict(stable_update=True), "stable_update=False, and this one has stable_update=True"),
        (dict(init_params={"a": jnp.array([2.0, 1.0])}), "of a run that began at other parameters"),
        (dict(power=6), "or with other arguments of the model"),
    ],
    ids=lambda v: str(next(iter(v))) if isinstance(v, dict) else "",
)
def test_other_settings_are_refused(saved, changed, message):
    before = sorted(os.listdir(saved[1]))
    with pytest.raises(ValueError, match=message):
        run(saved[1], **changed)
    assert sorted(os.listdir(saved[1])) == before


NOISE = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (dict(optim=optax.adam(0.01)), dict(optim=optax.adam(0.02)), "or other settings of it"),
        (dict(optim=optax.adam(0.01)), dict(optim=optax.adam(0.01, b1=0.5)), "or other settings of it"),
        (
            dict(optim=optax.adam(optax.cosine_decay_schedule(0.01, 300))),
            dict(optim=optax.adam(optax.cosine_decay_schedule(0.01, 100))),
            "or other settings of it",
        ),
        (
            dict(loss=NCE(NOISE)),
            dict(loss=NCE(dist.MultivariateNormal(jnp.zeros(2), 4 * jnp.eye(2)))),
            "run with loss=NCE.* with the arrays",
        ),
    ],
    ids=["rate", "memory", "schedule", "noise"],
)
def test_settings_that_are_not_printed(tmp_path, first, second, message):
    """Numbers inside of optimisers and losses; the same ones, made anew, go on."""
    options = dict(num_steps=5, loss=SSM()) | first
    fit = run(tmp_path, **options)
    assert_identical(fit.state, run(tmp_path, **options).state)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **(options | second))


def test_damaged_saves(whole, saved, tmp_path):
    """The one before the last stands in for it; with none that can be read, nothing is made up."""
    directory = tmp_path / "copy"
    subprocess.run(["cp", "-r", saved[1], directory], check=True)
    saves = sorted((p for p in directory.iterdir() if p.is_dir()), key=lambda p: int(p.name))
    (saves[-1] / "settings" / "metadata").write_text('{"format":')
    with pytest.warns(UserWarning, match=f"The checkpoint of step 300 in {directory} cannot be read"):
        fit = run(directory)
    assert_identical((whole.state, whole.losses), (fit.state, fit.losses))
    for step in [*saves[:-1], directory / "300"]:
        (step / "settings" / "metadata").write_text("")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(OSError, match="None of the checkpoints"):
        run(directory)


def test_values_are_appended(whole, saved, tmp_path):
    """One file has those of all steps; what is missing there makes a save unreadable, and what is beyond is left."""
    directory = tmp_path / "copy"
    subprocess.run(["cp", "-r", saved[1], directory], check=True)
    file = directory / "values.bin"
    np.testing.assert_array_equal(np.fromfile(file, "<f4" if whole.losses.dtype == np.float32 else "<f8"), whole.losses)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="The checkpoint of step 300 .*values.bin holds 299 of 300 steps"):
        fit = run(directory)
    assert_identical((whole.state, whole.losses), (fit.state, fit.losses))
    file.write_bytes(file.read_bytes() + b"cut short")
    assert_identical(whole.losses, run(directory).losses)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(checkpoint=3), TypeError, "checkpoint must be the path of a directory, got int"),
        (dict(checkpoint="/dev/null/run"), OSError, "The checkpoint in /dev/null/run could not be opened"),
        (dict(checkpoint="unused", checkpoint_every=0), ValueError, "checkpoint_every"),
    ],
)
def test_bad_checkpoints(options, error, message, unchecked):
    with pytest.raises(error, match=message):
        run(**options)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import conftest  # compiles as these tests do, so that rows and steps are the same to the bit
import test_checkpoint
test_checkpoint.run({directory!r}, num_steps={num_steps}, checkpoint_every=1e-9)
"""


@pytest.mark.slow
def test_killed_run_goes_on(tmp_path):
    """By SIGKILL, which no process sees coming, at whatever it is doing."""
    directory, num_steps = tmp_path / "run", 4_000
    script = KILLED.format(tests=str(Path(__file__).parent), directory=str(directory), num_steps=num_steps)
    kills = 0
    for seconds in (0.3, 0.1):
        process = subprocess.Popen([sys.executable, "-c", script])
        begin = sorted(os.listdir(directory)) if directory.exists() else []
        while process.poll() is None and (sorted(os.listdir(directory)) if directory.exists() else []) == begin:
            time.sleep(0.01)
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    fit, whole = run(directory, num_steps=num_steps), run(num_steps=num_steps)
    assert_identical((whole.state, whole.losses), (fit.state, fit.losses))
