"""Runs a model in isolation, with its sites set, and reads its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_score.energy.quadrature import is_integrated, law_of_numbers, set_point
from numpyro_score.energy.values import check_observed

Site = dict[str, Any]


class Sealed(Messenger):
    """Keeps a run of the model away from every handler around it.

    `handlers.block` would let requests for random keys through, and an outer `seed` would then keep a key that
    belongs to an inner JAX transformation.
    """

    def __init__(self, rng_key: Any) -> None:
        self.rng_key, self.count = rng_key, 0
        super().__init__()

    def process_message(self, msg: Site) -> None:
        """Stops every message here."""
        msg["stop"] = True
        if msg["type"] == "prng_key" and self.rng_key is not None:
            msg["value"] = jax.random.fold_in(self.rng_key, self.count)
            self.count += 1


class _Pin(Messenger):
    """Sets sites and plates to given values; a plate without a value takes all its rows."""

    def __init__(self, values: dict[str, Any], plates: dict[str, Any]) -> None:
        self.values, self.plates = values, plates
        super().__init__()

    def process_message(self, msg: Site) -> None:
        kind, name = msg["type"], msg.get("name", "")
        if is_in_control_flow(msg):
            return
        if kind == "plate":
            size = msg["args"][0]
            rows = self.plates.get(name)
            msg["value"] = jnp.arange(size) if rows is None else rows
            msg["args"] = (size, None)
        elif kind == "control_flow":
            msg["kwargs"]["substitute_stack"].append(("substitute", self.values))
        elif kind in ("sample", "param", "mutable"):
            if is_summed(msg):
                _set_point(msg, self.values.get(name, 0))  # the first where it does not matter
            elif name in self.values:
                value = self.values[name]
                _check_shape(msg, value)
                # A module updates its mutable state in place: give every run its own copy.
                msg["value"] = dict(value) if kind == "mutable" and isinstance(value, dict) else value
            elif kind == "sample" and not msg["is_observed"]:
                raise ValueError(
                    f"Energy has no value for the latent site '{name}': put one in `params`, e.g. {{'{name}': ...}}, "
                    "or pass the data if the model observes it."
                )
            elif kind == "param":
                raise ValueError(
                    f"Energy has no value for the param site '{name}': put one in `params`, e.g. {{'{name}': ...}}."
                )
            if is_observed_sample(msg) and not is_factor(msg):
                check_observed(msg)


def _check_shape(msg: Site, value: Any) -> None:
    """Raises ValueError for a value of a latent site that its law has in another shape."""
    if msg["type"] != "sample" or msg["is_observed"]:
        return
    shape, given = tuple(msg["fn"].shape()), tuple(jnp.shape(value))
    # A mask around a site may give its law batch dimensions that its value has not.
    if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"The value of site '{msg['name']}' among the params has shape {given}, and the site has shape {shape}: "
            "give one of that shape."
        )


def keep(sites: dict[str, Site], msg: Site) -> None:
    """Keeps a message under its name, as NumPyro's `trace` does: no later sample or deterministic site may take it.

    Raises:
        ValueError: for a second site of one name.
    """
    if (name := msg.get("name")) is None:
        return
    if name in sites and msg["type"] in ("sample", "deterministic"):
        raise ValueError(
            f"Two sites of the model are named '{name}', and only one of them would count: give each site, every "
            "factor of a loop included, a name of its own."
        )
    sites[name] = msg


class Parameters(Messenger):
    """Shows the handlers outside every site of a model but the observed and the summed ones, and keeps all of them.

    While a handler outside treats a site it may send messages of its own: under NUTS the log determinant of a
    constrained site, under `reparam` the auxiliary site. Those pass by.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.latent: set[str] = set()  # as the model declares them; a handler outside may condition or reparametrise
        self._outside: Site | None = None
        super().__init__()

    def process_message(self, msg: Site) -> None:
        """Keeps the message, and hides the observed sites and those that the density is summed over."""
        if self._outside is not None:
            return
        if is_observed_sample(msg):
            if not is_factor(msg):
                check_observed(msg)
            msg["stop"] = True
        elif is_summed(msg):
            _set_point(msg, 0)
            msg["stop"] = True
        else:
            self._outside = msg
            if msg["type"] == "sample":
                self.latent.add(msg["name"])
        keep(self.sites, msg)

    def postprocess_message(self, msg: Site) -> None:
        """Ends what handlers outside do with a site."""
        if self._outside is msg:
            self._outside = None

    def values(self) -> dict[str, Any]:
        """Values of the latent, param and mutable sites."""
        kept = {k for k, s in self.sites.items() if s["type"] in ("param", "mutable")}
        return {k: s["value"] for k, s in self.sites.items() if k in kept | self.latent}

    def subsamples(self) -> dict[str, Any]:
        """The rows that subsampled plates drew."""
        plates = {k: s for k, s in self.sites.items() if s["type"] == "plate"}
        return {k: s["value"] for k, s in plates.items() if len(s["value"]) != s["args"][0]}


class Recorder(Messenger):
    """Keeps every message itself, not a copy, so that what inner plates make of it can be compared by identity."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.subsampled: list[tuple[Any, Site]] = []
        super().__init__()

    def process_message(self, msg: Site) -> None:
        """Keeps what is subsampled, before its plate takes rows of it."""
        if msg["type"] == "subsample":
            self.subsampled.append((msg["value"], msg))

    def postprocess_message(self, msg: Site) -> None:
        """Keeps the message."""
        keep(self.sites, msg)

    def origin(self, value: Any) -> Any:
        """What `numpyro.subsample` took `value` from, or `value` itself."""
        for whole, msg in self.subsampled:
            if msg["value"] is value:
                return whole
        return value


def run_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Any],
    plates: dict[str, Any],
    rng_key: Any = None,
) -> Recorder:
    """Runs `model` with sites and plates set, seen by no handler around it."""
    recorder = Recorder()
    with Sealed(rng_key), recorder, _Pin(values, plates):
        model(*args, **kwargs)
    return recorder


def unwrap(fn: dist.Distribution) -> tuple[dist.Distribution, list[Any]]:
    """The distribution under its masks and expansions, and the masks."""
    masks = []
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            # NumPyro has no public way to read a mask back. tests/test_numpyro_internals.py watches this name.
            masks.append(fn._mask)
        fn = fn.base_dist
    return fn, masks


def is_factor(site: Site) -> bool:
    """Whether a site is a `numpyro.factor`."""
    return isinstance(unwrap(site["fn"])[0], dist.Unit)


class ScoreUnit(dist.Unit):
    """What `score_factor` observes: a factor of unknown value."""


def is_score_term(site: Site) -> bool:
    """Whether a site is a `score_factor`."""
    return isinstance(unwrap(site["fn"])[0], ScoreUnit)


def is_in_control_flow(site: Site) -> bool:
    """Whether a site is one of NumPyro's scan or cond, shown again after it ran.

    NumPyro has no public way to tell. tests/test_numpyro_internals.py watches this name.
    """
    return bool(site.get("_control_flow_done"))


def is_observed_sample(site: Site) -> bool:
    """Whether a site is a sample site with a value from outside of the model."""
    return site["type"] == "sample" and site["is_observed"]


def is_summed(site: Site) -> bool:
    """Whether a site is a latent one of each row that the density is to be summed or integrated over.

    NumPyro marks the former by `infer={"enumerate": "parallel"}`.
    """
    if is_integrated(site):
        return True
    return site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def _set_point(msg: Site, numbers: Any) -> None:
    """Sets a site that is summed to its points of these numbers, or where it is integrated as `set_point` says."""
    if is_integrated(msg):
        set_point(msg, numbers)
    else:
        msg["value"] = jnp.broadcast_to(jnp.asarray(support_points(msg))[numbers], msg["fn"].shape())


def support_points(site: Site) -> np.ndarray:
    """The values that one number of a site to be summed takes.

    Raises:
        ValueError: if they are not a few numbers that are known.
    """
    law = law_of_numbers(site)
    if law.event_dim == 0 and law.has_enumerate_support:
        try:
            with jax.ensure_compile_time_eval():
                return np.asarray(law.enumerate_support(expand=False)).reshape(-1)
        except (NotImplementedError, jax.errors.ConcretizationTypeError):
            pass  # a Binomial of various counts
    raise ValueError(
        f"Site '{site['name']}' is to be enumerated, and {type(law).__name__} has no fixed set of values for one "
        "number: use Categorical, Bernoulli or DiscreteUniform, or sum over it in the model."
    )


def term_log_prob(site: Site) -> jax.Array:
    """The unmasked, unscaled log density of a site, one value per element of its batch shape.

    Of one that is integrated it is the log weight of the point that it is at.
    """
    fn, _ = unwrap(site["fn"])
    log_prob = site["log_weight"] if "log_weight" in site else fn.log_prob(site["value"])
    shape = jnp.broadcast_shapes(jnp.shape(log_prob), tuple(site["fn"].batch_shape))
    return jnp.broadcast_to(log_prob, shape)
