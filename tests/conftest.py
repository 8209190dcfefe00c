"""What all tests share.

With the argument --jaxtyping-packages=numpyro_score,beartype.beartype, the array shapes that the package's
annotations state are checked too. That takes a fifth more time; tools/test_newest_python.sh does it.
"""

import gc
import itertools
import os
from collections import Counter

import jax
import jaxtyping
import numpyro
import pytest

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    numpyro.set_host_device_count(2)  # for test_sharding.py; the rest runs on the first

# JAX takes three quarters of a GPU's memory at its start unless told otherwise. pytest-xdist's workers and the
# processes that some tests start share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Most of the suite's time is that of compiling what then runs once. JAX reads the flags when it first computes, and
# pytest-xdist's workers find those that its own process set here. To test the code as it is compiled for users, set
# XLA_FLAGS=--xla_backend_optimization_level=3.
QUICKLY_COMPILED = "xla_backend_optimization_level=3" not in os.environ["XLA_FLAGS"]
if QUICKLY_COMPILED:
    jax.config.update("jax_disable_most_optimizations", True)
    flags = ["--xla_backend_optimization_level=1"]  # where the fixture `optimised` lifts that
    if jax.__version_info__[:2] == (0, 10):  # the older emitters take half the time to compile; 0.12 has them no more
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(os.environ["XLA_FLAGS"].split() + flags))

# Tracing makes many small objects that live on: by default, to look for cycles among them takes a sixth of the time.
# `forget_programs` does it.
gc.disable()


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="of a test with several cases run the first alone")


def pytest_collection_modifyitems(config, items):
    # Files of much work first, so that all workers end together; pytest-xdist takes them in this order if told so.
    work = Counter()
    for item in items:
        work[item.path] += 5 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -work[item.path])
    if not config.getoption("first_cases"):
        return
    seen, first, others = set(), [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        (others if name in seen else first).append(item)
        seen.add(name)
    items[:] = first
    config.hook.pytest_deselected(items=others)


_files = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """No file needs what another has compiled; all together takes gigabytes and most maps that a process may have.

    To forget takes half a second.
    """
    yield
    if next(_files) % 4 == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """No shape checks, as users run the package: its own errors come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def optimised():
    """For a test that runs for longer than it compiles: what it compiles runs up to twenty times as fast."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # of programs that another test has compiled, and this one shares
    yield
    jax.config.update("jax_disable_most_optimizations", QUICKLY_COMPILED)
