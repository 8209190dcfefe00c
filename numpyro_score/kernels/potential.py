"""The energy of a NumPyro model over its unconstrained parameters, on new rows at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn, find_valid_initial_params, potential_energy, unconstrain_fn
from numpyro.primitives import Messenger

from numpyro_score.energy import is_constant
from numpyro_score.programs import run_compiled

__all__ = ["ModelPotential", "is_concrete"]

Site = dict[str, Any]

# Up to this share of a plate, rows are drawn with replacement, which needs no loop over the rows and no memory of the
# plate's size, as NumPyro's draws without replacement do. It makes the variance 1 / (1 − share) as large, or less.
MAX_SHARE_WITH_REPLACEMENT = 0.1


class ModelPotential:
    """The potential energy U(z) = −log joint density of a model with its arguments, in unconstrained space.

    Everything random in the model but its latent sites is drawn from the key: the rows of subsampled plates, and what
    `numpyro.prng_key` gives. So U is an unbiased estimate where it is linear in that, as it is in a subsampled plate.
    Param and mutable sites stay at their initial values.

    Raises:
        ValueError: for latent sites that are discrete or inside a subsampled plate, and if there is none.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        self.args, self.kwargs = args, kwargs or {}
        # Improper sites cannot be drawn, but they can be started.
        started = handlers.substitute(_on_first_rows(model), substitute_fn=init_to_uniform())
        sites = handlers.trace(started).get_trace(*args, **self.kwargs)
        frozen = {k: s["value"] for k, s in sites.items() if s["type"] in ("param", "mutable")}
        self.model = handlers.substitute(model, data=frozen) if frozen else model
        self.plates = {k: s["value"] for k, s in sites.items() if s["type"] == "plate" and _is_subsampled(s)}
        self.latents = {k: s for k, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        if not self.latents:
            raise ValueError("The model has no latent site to sample: declare its parameters by numpyro.sample.")
        for name, site in self.latents.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"Latent site '{name}' is discrete and has no gradient: sum it out in the model, e.g. with "
                    "dist.MixtureSameFamily."
                )
            for frame in site["cond_indep_stack"]:
                if frame.name in self.plates:
                    raise ValueError(
                        f"Latent site '{name}' lies in the subsampled plate '{frame.name}', so that other rows would "
                        "take its value at the next step: observe it (obs=...), integrate it out, or give the plate "
                        "no subsample_size."
                    )

    def __call__(self, rng_key: Array, z: dict[str, Array]) -> Array:
        """U(z) on rows drawn by the key."""
        rows_key, rng_key = jax.random.split(rng_key)
        return potential_energy(handlers.seed(_NewRows(self.model, rows_key), rng_key), self.args, self.kwargs, z)

    def on_all_rows(self, z: dict[str, Array]) -> Array:
        """U(z) with no plate subsampled."""
        return potential_energy(handlers.seed(_AllRows(self.model), 0), self.args, self.kwargs, z)

    def constrain(self, z: dict[str, Array]) -> dict[str, Array]:
        """Sites in their own supports, with the deterministic ones; in subsampled plates those of the first rows."""
        return constrain_fn(_on_first_rows(self.model), self.args, self.kwargs, z, return_deterministic=True)

    def unconstrain(self, values: dict[str, Array], what: str) -> dict[str, Array]:
        """Constrained values of all latent sites, in unconstrained space; `what` names them in errors."""
        self.check_names(values, what)
        return run_compiled(partial(unconstrain_fn, _on_first_rows(self.model), self.args, self.kwargs), values)

    def check_names(self, values: dict[str, Any], what: str) -> None:
        """Raises ValueError unless there is a value for each latent site."""
        if set(values) != set(self.latents):
            raise ValueError(
                f"{what} has values for {_quoted(values)}, and the model's latent sites are {_quoted(self.latents)}: "
                "give one for each."
            )

    def check_values(self, values: dict[str, Array], what: str) -> None:
        """Raises ValueError unless there is a finite value of the right shape for each latent site."""
        self.check_names(values, what)
        for name, site in self.latents.items():
            if (found := values[name].shape) != (shape := jnp.shape(site["value"])):
                raise ValueError(f"{what} has shape {found} for site '{name}', whose values have shape {shape}.")
            if is_concrete(values[name]) and not np.isfinite(values[name]).all():
                raise ValueError(f"{what} has NaN or infinity for site '{name}': give finite values.")

    def check_plates(self) -> None:
        """Raises ValueError for a subsampled plate whose rows do not matter, because nothing in it is observed."""
        z = self.unconstrain({k: s["value"] for k, s in self.latents.items()}, "the model")
        for name, rows in self.plates.items():

            def with_rows(rows: Array, name: str = name) -> Array:
                model = handlers.substitute(self.model, data={name: rows})
                return potential_energy(handlers.seed(model, 0), self.args, self.kwargs, z)

            if is_constant(with_rows, rows):
                raise ValueError(
                    f"The density does not depend on which rows the subsampled plate '{name}' draws: observe data in "
                    "it (obs=numpyro.subsample(x, event_dim=...)), or leave the plate out."
                )

    def initial(self, rng_key: Array, init_strategy: Callable[..., Any]) -> dict[str, Array]:
        """Positions at which the energy and its gradient are finite, if they are found: one for each of the keys."""
        prototype = self.unconstrain({k: s["value"] for k, s in self.latents.items()}, "the model")

        def find(rng_key: Array) -> dict[str, Array]:
            (z, _, _), _ = find_valid_initial_params(
                rng_key,
                _on_first_rows(self.model, hide_types=["sample"]),
                init_strategy=init_strategy,
                model_args=self.args,
                model_kwargs=self.kwargs,
                prototype_params=prototype,
            )
            return z

        return run_compiled(find, rng_key)  # NumPyro would run the model one operation at a time

    def not_finite(self, z: dict[str, Array]) -> list[str]:
        """The sites whose log density is not finite at one position."""
        model = _on_first_rows(self.model)
        values = constrain_fn(model, self.args, self.kwargs, z)
        sites = handlers.trace(handlers.substitute(model, data=values)).get_trace(*self.args, **self.kwargs)
        return [
            k
            for k, s in sites.items()
            if s["type"] == "sample" and not np.isfinite(np.sum(s["fn"].log_prob(s["value"])))
        ]


class _AllRows(Messenger):
    """Gives every plate all its rows."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate":
            size = msg["args"][0]
            msg["value"], msg["args"] = jnp.arange(size), (size, None)


class _NewRows(Messenger):
    """Draws the rows of plates of which a small share is subsampled."""

    def __init__(self, fn: Callable[..., Any], rng_key: Array) -> None:
        self.rng_key = rng_key
        super().__init__(fn)

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            size, subsample_size = msg["args"]
            if subsample_size <= MAX_SHARE_WITH_REPLACEMENT * size:
                self.rng_key, key = jax.random.split(self.rng_key)
                msg["value"] = jax.random.randint(key, (subsample_size,), 0, size)


class _FirstRows(Messenger):
    """Gives every subsampled plate its first rows, which costs nothing."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            msg["value"] = jnp.arange(msg["args"][1])


def _on_first_rows(model: Callable[..., Any], hide_types: list[str] | None = None) -> Callable[..., Any]:
    """The model with everything random held fixed, but the types of sites to hide."""
    return handlers.seed(_FirstRows(model), 0, hide_types)


def is_concrete(*trees: Any) -> bool:
    """Whether no leaf is traced by a JAX transformation."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def _is_subsampled(site: Site) -> bool:
    size, subsample_size = site["args"]
    return subsample_size is not None and subsample_size != size


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"
