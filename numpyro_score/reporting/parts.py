"""Parts of pages: pictures that may fail, sentences in the place of what is refused, and the machine."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_score.reporting.page import Markup, picture, tag
from numpyro_score.version import __version__

__all__ = ["draw", "machine", "or_reason"]


def or_reason(make: Callable[[], Any]) -> Any:
    """What a function returns, or the sentence with which it refuses."""
    try:
        return make()
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)


def draw(caption: str, plot: Callable[[Any], Any], shape: tuple[int, int] = (1, 1), width: float = 6.0) -> Markup:
    """A picture in axes of its own, or why it is not drawn."""
    from matplotlib.figure import Figure  # not Pyplot's, which would keep it

    figure = Figure(figsize=(width, max(4.2, 0.8 * width * shape[0] / shape[1])), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    reason = or_reason(lambda: plot(axes))
    if isinstance(reason, str):
        return tag("p", f"{caption}: not drawn. {reason}", class_="note")
    return picture(figure, caption, broad=width > 6)


def machine() -> list[tuple[str, str]]:
    """Versions and what the page was made on, by name."""
    packages = ("jax", "jaxlib", "numpyro", "optax", "arviz", "numpy")
    devices = jax.devices()
    return [
        ("numpyro-score", __version__),
        ("packages", ", ".join(f"{name} {version(name)}" for name in packages)),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("device", f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} CPU cores"),
        ("precision", str(jnp.result_type(float))),
        ("written", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
