"""Rows that hold continuous and discrete numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from numpyro_score.energy import Energy, part
from numpyro_score.losses.base import Loss, check_settings, positive
from numpyro_score.losses.discrete import PseudoLikelihood, require_discrete
from numpyro_score.losses.ism import ISM

__all__ = ["Mixed"]


@dataclass(frozen=True)
class Mixed:
    """Rows of continuous and discrete numbers: one objective for each of the two, given the other.

    The value of a row is w times that of the continuous loss, for the density of the continuous numbers given the
    discrete ones, plus that of the discrete loss, for the discrete numbers given the continuous ones. Both conditional
    laws have the model's own log density, up to a constant: the joint normaliser is needed for neither. The estimates
    are consistent for any w, and their variance depends on it: a Fisher divergence has the units of 1/x², so that w is
    well near the variance of the continuous numbers. Returns (N,) values.

    Args:
        continuous: a loss without parameters or memory of its own, such as ISM() or SSM().
        discrete: PseudoLikelihood(), PairLikelihood(), RatioMatching() or DiscreteFisher().
        weight: w.

    Raises:
        TypeError: for classes in the place of losses, and losses with parameters or memory. When called: for rows that
            hold no continuous or no discrete numbers.
        ValueError: for a weight that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import ISM, Mixed, PseudoLikelihood, ScoreMatching
        >>> def model(x, y):  # a label, and a normal variable whose mean depends on it
        ...     a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.boolean, (), ()), obs=x)
        ...         y = numpyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
        ...         numpyro.factor("energy", a * x + b * x * y - 0.5 * y**2)
        >>> x = jax.random.bernoulli(jax.random.key(0), 0.5, (2000,))
        >>> y = 2.0 * x + jax.random.normal(jax.random.key(1), (2000,))
        >>> fit = ScoreMatching(model, loss=Mixed(ISM(), PseudoLikelihood())).run(None, x, y, progress_bar=False)
        >>> bool(abs(fit.estimates["b"] - 2.0) < 4 * fit.stderr()["b"])
        True
    """

    continuous: Loss = ISM()  # noqa: RUF009
    discrete: Loss = PseudoLikelihood()  # noqa: RUF009
    weight: float = 1.0

    takes_discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, loss in (("continuous", self.continuous), ("discrete", self.discrete)):
            if isinstance(loss, type) or not isinstance(loss, Loss):
                raise TypeError(f"Mixed needs a loss such as ISM() as {name}, got {loss!r}.")
            if hasattr(loss, "declare") or hasattr(loss, "no_objective"):
                raise TypeError(
                    f"Mixed adds values of rows, and {type(loss).__name__} has parameters, memory or no objective of "
                    "its own: use ISM(), SSM() or DSM(...) beside a discrete loss."
                )
        for name, loss, discrete in (("continuous", self.continuous, False), ("discrete", self.discrete, True)):
            if getattr(loss, "takes_discrete", False) != discrete or isinstance(loss, Mixed):
                raise TypeError(
                    f"Mixed got {type(loss).__name__} as its {name} loss: write Mixed(continuous, discrete), e.g. "
                    "Mixed(ISM(), PseudoLikelihood())."
                )
        positive("Mixed", "weight", self.weight)

    def __call__(self, energy: Energy, rng_key: Array) -> Float[Array, "n"]:
        """One value per row of the energy's data, (N,)."""
        _require_both(energy)
        continuous_key, discrete_key = jax.random.split(rng_key)
        smooth = self.continuous(part(energy, discrete=False), continuous_key)
        return self.weight * smooth + self.discrete(energy, discrete_key)

    def rows_per_chunk(self, energy: Energy) -> int | None:
        """The fewer of the two."""
        _require_both(energy)
        both = (self.continuous, part(energy, discrete=False)), (self.discrete, energy)
        sizes = [getattr(loss, "rows_per_chunk", lambda _: None)(e) for loss, e in both]
        return min((s for s in sizes if s is not None), default=None)

    def check(self, energy: Energy) -> None:
        """Lets each loss look at its part of the data."""
        _require_both(energy)
        check_settings(self.continuous, part(energy, discrete=False))
        check_settings(self.discrete, part(energy, discrete=True))


def _require_both(energy: Energy) -> None:
    require_discrete(energy, "Mixed")
    if all(a.support.is_discrete for a in energy.arrays):
        raise TypeError(
            f"Mixed is for rows with continuous numbers too, and {energy.arrays[0].what} is discrete: use its discrete "
            "loss alone."
        )
