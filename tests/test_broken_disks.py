"""Checkpoints on disks that are full or not to be written, and on other devices: nothing that was saved is lost."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import stop_after
from numpyro.distributions import constraints

from numpyro_score import ISM, ScoreMatching
from numpyro_score.inference import checkpoint, loop

pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling")
ROWS = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
STEPS = 200


def quartic(x):
    a = numpyro.param("a", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, -1))


def run(directory=None, x=ROWS, **options):
    svi = ScoreMatching(quartic, loss=ISM(), optim=optax.adam(1e-2), num_steps=STEPS)
    return svi.run(0, x, progress_bar=False, checkpoint=directory, checkpoint_every=1e-9, **options)


@contextlib.contextmanager
def no_file_longer_than(num_bytes):
    """The system refuses to write more, as on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def starts(monkeypatch):
    """The steps at which runs begin."""
    found, start = [], checkpoint.Checkpoint.start

    def spied(self, state):
        answer = start(self, state)
        found.append(answer[0])
        return answer

    monkeypatch.setattr(checkpoint.Checkpoint, "start", spied)
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the loops of Orbax
def test_full_disk_in_the_middle(tmp_path, monkeypatch):
    """The error names the directory, and the same call goes on from the last whole save to the same numbers."""
    monkeypatch.setattr(loop, "next_size", lambda n, seconds: 32)
    monkeypatch.setattr(checkpoint.Checkpoint, "due", lambda self: True)
    whole, begun, saves = run(), starts(monkeypatch), []
    save = checkpoint.Checkpoint.save

    def filling(self, *args, **kwargs):
        saves.append(args[0])
        if len(saves) < 3:
            return save(self, *args, **kwargs)
        if len(saves) == 3:
            self._manager.wait_until_finished()  # for what was begun before the disk was full
            full.enter_context(no_file_longer_than(16))
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch, contextlib.ExitStack() as full:
        patch.setattr(checkpoint.Checkpoint, "save", filling)
        with pytest.raises(OSError, match=rf"checkpoint in {tmp_path}.* could not be written .*: free space there"):
            run(tmp_path)
    rest = run(tmp_path)
    assert begun == [0, saves[1]]
    np.testing.assert_array_equal(rest.losses, whole.losses)
    np.testing.assert_array_equal(rest.estimates["a"], whole.estimates["a"])


def test_other_devices(tmp_path, monkeypatch):
    """Saved on two devices, a run goes on with one, and the other way round: the same but for the order of sums."""
    two = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("rows",)), PartitionSpec("rows"))
    spread, whole = jax.device_put(ROWS, two), run()
    for i, (first, second) in enumerate([(spread, ROWS), (ROWS, spread)]):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="Interrupted"):
            stop_after(patch, 3)
            part = run(tmp_path / str(i), x=first)
        assert 0 < len(part.losses) < STEPS
        rest = run(tmp_path / str(i), x=second)
        np.testing.assert_allclose(rest.losses, whole.losses, rtol=1e-5)
        np.testing.assert_allclose(rest.estimates["a"], whole.estimates["a"], rtol=1e-5)
        assert rest.state.rng_key.sharding.device_set == set(jax.devices()[: 1 + (second is spread)])


def test_two_runs_in_one_directory(tmp_path, monkeypatch):
    """The second is told at once, and the first goes on; what a killed run leaves behind is in nobody's way."""
    told, size = [], loop.next_size

    def another(n, seconds):
        if not told:
            told.append(True)
            with pytest.raises(OSError, match=f"Another run has the checkpoint in {tmp_path} open: wait"):
                run(tmp_path)
        return size(n, seconds)

    monkeypatch.setattr(loop, "next_size", another)
    first = run(tmp_path)
    assert told and len(first.losses) == STEPS and ".lock" not in {p.name for p in tmp_path.iterdir()}
    (tmp_path / ".lock").touch()
    np.testing.assert_array_equal(run(tmp_path).losses, first.losses)


def test_no_directory(tmp_path):
    """A file where the directory should be."""
    (tmp_path / "run").write_text("kept")
    with pytest.raises(OSError, match="could not be opened"):
        run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "kept"
