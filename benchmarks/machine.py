"""On what the figures were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "numpyro", "optax", "folx")


def describe(packages: Sequence[str] = PACKAGES) -> str:
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return "\n".join(
        [
            f"- Device: {device.device_kind} ({device.platform})",
            f"- Host: {cpu_model()}, {os.cpu_count()} cores, {platform.system()}",
            f"- Python {platform.python_version()}, {versions}",
        ]
    )


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load() -> str:
    """Processes that wanted a core, on average over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"
