"""Processes with a device each give the numbers of one process with as many devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

JOB = Path(__file__).parent / "process_job.py"


def start(count, rank, port, folder):
    """One of the processes, with what it prints in a file."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(folder / f"printed-{rank}.txt", "w") as printed:
        return subprocess.Popen(
            [sys.executable, JOB, str(count), str(rank), str(port), folder],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_all(folder, jobs):
    """Waits for all processes, whose prints are shown if any fails."""
    try:
        ended = [job.wait(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    printed = [path.read_text() for path in sorted(folder.glob("*/printed-*.txt"))]
    assert not any(ended), "\n\n".join(printed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process, two and three have found: process_job.py says what."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    (folder / "file").touch()
    run_all(folder, [start(1, 0, 0, folder / "one"), *(start(2, rank, port, folder / "two") for rank in range(2))])
    port = free_port()
    run_all(folder, [start(3, rank, port, folder / "three") for rank in range(3)])
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """By process: the only one, the first of two, the second of two."""
    names = ["one/found-2-0.npz", "two/found-2-0.npz", "two/found-2-1.npz"]
    return [dict(np.load(folder / name)) for name in names]


@pytest.mark.parametrize("what", ["losses", "a"])
def test_same_numbers(found, what):
    """To the bit: losses and parameters of a fit, and of what is read back from its checkpoint."""
    for other in found:
        np.testing.assert_array_equal(other[what], found[0][what])
        np.testing.assert_array_equal(other[f"saved_{what}"], found[0][what])


@pytest.mark.parametrize("what", ["long_losses", "long_a"])
def test_clocks_may_differ(found, what):
    """400 steps, with the second process's clock a hundred times as fast: they agree on the steps of each call."""
    assert len(found[0]["long_losses"]) == 400
    for other in found[1:]:
        np.testing.assert_array_equal(other[what], found[0][what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "Data 'x' have NaN or infinity in row 150 (1 of 210): "),
        ("outside", "Data 'x' lie outside of the support of the site in row 150 (1 of 210): values from -2 to "),
        ("kink", "at step 0: the score is not finite in 1 of 210 rows, first row 150."),
    ],
)
def test_same_errors(found, what, message):
    """All processes say the same of a row that only the second holds, by its number among all."""
    assert message in str(found[0][what])
    assert len({str(f[what]) for f in found}) == 1


@pytest.mark.parametrize(
    "what",
    [
        "pcd",
        "cd",
        "fsm",
        "batches",
        "stderr",
        "of",
        "influence",
        "loaded",
        "loaded_data",
        "resumed_losses",
        "resumed_a",
    ],
)
def test_all_else_has_the_same_numbers(found, what):
    """To the bit: losses with chains and steps of all rows, standard errors, a saved fit, batches, a resumed run."""
    for other in found[1:]:
        np.testing.assert_array_equal(other[what], found[0][what])


def test_interrupted_runs_go_on(found):
    """Ctrl-C on one process stops all at the same step, and the same call then ends where no stop would have."""
    assert found[1]["stopped"] == found[2]["stopped"]
    for f in found:
        assert 60 <= f["stopped"] < 400
        np.testing.assert_array_equal(f["resumed_losses"], f["long_losses"])
        np.testing.assert_array_equal(f["resumed_a"], f["long_a"])


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("batches_end", "batches of process 1 ended after 3 steps, and those of process 0 did not", None),
        ("no_directory", "The checkpoint in", "So says the first process"),
        ("batches_raise", "batches of process 1 raised an error at step 3", "the disk is gone"),
        (
            "batches_missing",
            "at step 3, on batch 3 of its pass: its data are NaN or infinite in 1 of 210 rows, first row 150",
            None,
        ),
        ("other_rates", "The processes call run with different optim, here", None),
        ("other_steps", "The processes call run with different num_steps, here ['5']", "num_steps, here ['6']"),
        ("other_keys", "The processes call run with different key, here", None),
        ("other_arguments", "The processes call run with different arguments, here", None),
        ("apart", "run got other data in each process", None),
        ("batches_apart", "run_batches got other data in each process", None),
    ],
)
def test_all_processes_end(found, what, first, second):
    """Where one process cannot go on none does, and each says why."""
    assert first in str(found[1][what])
    assert (second or first) in str(found[2][what])


def test_one_bar_and_one_warning(folder):
    """The first process alone shows the steps and warns."""
    first, second = ((folder / "two" / f"printed-{rank}.txt").read_text() for rank in range(2))
    assert "it/s" in first
    assert "still falling" in first
    assert "it/s" not in second
    assert "Warning" not in second


def test_three_processes(folder):
    """The numbers of one process with as many devices, but for the order of sums, and the same errors everywhere."""
    one, first = (dict(np.load(folder / f"{name}/found-3-0.npz")) for name in ("one", "three"))
    for rank in range(3):
        found = dict(np.load(folder / f"three/found-3-{rank}.npz"))
        for what in ("losses", "a"):
            np.testing.assert_allclose(found[what], one[what], rtol=1e-6)
            np.testing.assert_array_equal(found[what], first[what])
            np.testing.assert_array_equal(found[f"saved_{what}"], first[what])
        assert "have NaN or infinity in row 150 (1 of 210)" in str(found["missing"])
