"""Kernels of the distance between rows, k(x, y) = φ(‖x − y‖²/ℓ²), by name."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["KernelName", "Profile", "check_kernel", "profile"]

KernelName = Literal["imq", "gaussian"]
_NAMES = ("imq", "gaussian")


class Profile(NamedTuple):
    """φ and its first two derivatives at squared distances."""

    value: Float[Array, "m"]
    first: Float[Array, "m"]
    second: Float[Array, "m"]


def check_kernel(owner: str, kernel: str) -> None:
    """Raises ValueError for a kernel of no known name."""
    if kernel not in _NAMES:
        raise ValueError(f"{owner} has no kernel {kernel!r}: use one of {', '.join(map(repr, _NAMES))}.")


def profile(kernel: str, squared: Float[Array, "m"]) -> Profile:
    """The inverse multiquadric (1 + ρ)^{-1/2}, or the Gaussian exp(−ρ/2), of ρ = ‖x − y‖²/ℓ²."""
    if kernel == "gaussian":
        value = jnp.exp(-0.5 * squared)
        return Profile(value, -0.5 * value, 0.25 * value)
    root = (1 + squared) ** -0.5
    return Profile(root, -0.5 * root**3, 0.75 * root**5)
