"""What all tests share.

The array shapes that the package's annotations state are checked under test: `addopts` in
pyproject.toml installs jaxtyping's import hook before anything is imported.
"""

import jax
import jaxtyping
import numpyro
import pytest

numpyro.set_host_device_count(2)  # for test_sharding.py; the rest runs on the first


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """No shape checks, as users run the package: its own errors come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
