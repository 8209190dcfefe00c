"""Which densities are taken for improper: both error rates over densities of two variables."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import energy_of

from numpyro_score import log_partition
from numpyro_score.normaliser.source import free_data
from numpyro_score.normaliser.tails import check_tails

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
N = 200
Z = RNG.normal(size=(N, 2))
CAUCHY = RNG.standard_cauchy((N, 2))
LAMBDA = np.log(np.abs(CAUCHY[:, 0]))


def plane(t, x):
    """A sum of terms, each with a coefficient, so that all compile once."""

    def times(a, v):  # not 0 · ∞ far out
        return jnp.where(a == 0, 0.0, a * v)

    squares = jnp.sum(x**2, -1)
    return (
        -0.5 * jnp.sum((x @ t["K"]) * x, -1)
        + x @ t["slope"]
        - times(t["quartic"], jnp.sum(x**4, -1))
        - times(t["laplace"], jnp.sum(jnp.abs(x), -1))
        - times(t["product"], jnp.sum(jnp.log1p(x**2), -1))
        - times(t["radial"], jnp.log1p(squares))
        - times(t["neck"], x[:, 1] ** 2 * jnp.exp(-x[:, 0]))
        - times(t["bend"], (x[:, 1] - x[:, 0] ** 2) ** 2)
        - times(t["horseshoe"], 0.5 * x[:, 1] ** 2 * jnp.exp(-2 * x[:, 0]) + jnp.logaddexp(0.0, 2 * x[:, 0]))
        + t["offset"]
    )


def of_plane(x, k=((0.0, 0.0), (0.0, 0.0)), slope=(0.0, 0.0), **terms):
    names = ("quartic", "laplace", "product", "radial", "neck", "bend", "horseshoe", "offset")
    theta = dict(K=np.array(k), slope=np.array(slope), **{k: float(terms.pop(k, 0.0)) for k in names})
    assert not terms
    return energy_of(plane, theta, x)


def funnel(scale, half):
    """x₀ ~ N(·, scale²), x₁ | x₀ ~ N(0, exp x₀), up to a term −x₀/2 without which it is proper, too."""
    x0 = scale * Z[:, 0] + (0.0 if half else 0.5 * scale**2)
    x = np.column_stack([x0, np.exp(0.5 * x0) * Z[:, 1]])
    return of_plane(x, [[scale**-2, 0], [0, 0]], [-0.5 if half else 0.0, 0.0], neck=0.5)


PROPER = {
    **{f"funnel of scale {s}": funnel(s, False) for s in (0.3, 0.8, 3.0)},
    **{f"funnel of scale {s} with −x₀/2": funnel(s, True) for s in (0.3, 0.8, 3.0)},
    "normal": of_plane(Z, np.eye(2)),
    "correlated by 0.999": of_plane(Z @ [[1, 0.999], [0, 0.0447]], np.linalg.inv([[1, 0.999], [0.999, 1]])),
    "Laplace": of_plane(RNG.laplace(size=(N, 2)), laplace=1.0),
    "Cauchy product": of_plane(CAUCHY, product=1.0),
    "product of t with ν = 0.5": of_plane(RNG.standard_t(0.5, (N, 2)), product=0.75),
    "product of t with ν = 0.5, data elsewhere": of_plane(Z, product=0.75),
    "bivariate Cauchy": of_plane(CAUCHY[:, :1] * Z, radial=1.5),
    "bivariate t with ν = 0.2": of_plane(Z, radial=1.1),
    "banana": of_plane(np.column_stack([Z[:, 0], Z[:, 0] ** 2 + 0.1 * Z[:, 1]]), [[1, 0], [0, 0]], bend=50.0),
    "Rosenbrock": of_plane(
        np.column_stack([1 + 0.7 * Z[:, 0], (1 + 0.7 * Z[:, 0]) ** 2 + 0.07 * Z[:, 1]]),
        [[2, 0], [0, 0]],
        [2, 0],
        bend=100,
    ),
    "horseshoe": of_plane(np.column_stack([LAMBDA, np.exp(LAMBDA) * Z[:, 1]]), horseshoe=1.0),
    "small quartic": of_plane(60 * Z, quartic=1e-8),
    "double wells": of_plane(707 * np.sign(Z) + 0.7 * Z[:, ::-1], -2 * np.eye(2), quartic=1e-6),
    "data in one well": of_plane(707 + 0.7 * Z, -2 * np.eye(2), quartic=1e-6),
    "Cauchy with a large offset": of_plane(CAUCHY, product=1.0, offset=1e6),
}
IMPROPER = {
    "constant": of_plane(Z),
    "constant with a large offset": of_plane(Z, offset=-1e6),
    "flat along an axis": of_plane(Z, [[1, 0], [0, 0]]),
    "1/|x| along both axes": of_plane(Z, product=0.5),
    "1/|x| of heavy data": of_plane(CAUCHY, product=0.5),
    "1/r²": of_plane(Z, radial=1.0),
    "1/r": of_plane(CAUCHY, radial=0.5),
    "linear in one variable": of_plane(Z, [[1, 0], [0, 0]], [0.0, -1.0]),
    "slower than linear": of_plane(Z, slope=[0.9, 1.2], laplace=1.0),
    "negative curvature off the axes": of_plane(Z, [[1.0, 1.1], [1.1, 1.0]]),
    "little negative curvature": of_plane(Z, [[1.0, 0.0], [0.0, -1e-6]]),
    "growing quartic": of_plane(Z, 2 * np.eye(2), quartic=-1.0),
    "funnel without an end": of_plane(Z, neck=0.5),
}


def words(energy):
    """What is said of the density: nothing, "suspected" or "refused"."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            check_tails(energy, free_data(energy))
        except ValueError as error:
            assert "not normalisable" in str(error)
            return "refused"
        except UserWarning as warning:
            assert "may not be normalisable" in str(warning)
            return "suspected"
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["single", "double"])
def test_proper_densities_are_not_suspected(precision):
    """However slowly they fall, and however far they rise first."""
    with jax.enable_x64(precision == "double"):
        said = {name: words(energy) for name, energy in PROPER.items()}
    assert set(said.values()) == {"nothing"}, said


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["single", "double"])
def test_improper_densities_are_refused(precision):
    """Where growth goes on to the end of floats."""
    with jax.enable_x64(precision == "double"):
        said = {name: words(energy) for name, energy in IMPROPER.items()}
    assert set(said.values()) == {"refused"}, said


def test_a_suspicion_is_a_warning():
    """Flat over 3,000 scales of the data and no further: the mass lies far from them. It says so once for all draws."""
    energy = of_plane(Z, np.eye(2) * [1.0, 1e-9])
    assert words(energy) == "suspected"
    k = np.stack([np.eye(2), np.eye(2) * [1.0, 1e-9], np.eye(2) * [1.0, 1e-8]])
    theta = {"theta": {k: np.repeat(np.asarray(v)[None], 3, 0) for k, v in energy.params["theta"].items()} | {"K": k}}
    with pytest.warns(UserWarning, match=r"At 2 draws of 3 \(first: 1\): The density may not") as said:
        check_tails(energy, free_data(energy), theta)
    assert len(said) == 1
    k[2] = -np.eye(2)
    with (
        pytest.raises(ValueError, match=r"At draw 2 of the parameters: The density is not normalisable"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        check_tails(energy, free_data(energy), theta)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*transitions diverged")  # a few of 8,000, in the neck
@pytest.mark.parametrize(
    ("method", "settings"),
    [("quadrature", {}), ("smc", {"num_particles": 128}), ("nce", {}), ("flow", {"num_steps": 300})],
)
def test_log_z_of_a_funnel(method, settings):
    """exp(−½(x₀/s)² − ½x₁² e^(−x₀)) has ∫ dx₁ = √(2π) e^(x₀/2), and so Z = 2πs exp(s²/8)."""

    def alone(s, x):  # the terms of `plane` that are not zero: all of them take long to compile
        return -0.5 * (x[:, 0] / s) ** 2 - 0.5 * x[:, 1] ** 2 * jnp.exp(-x[:, 0])

    energy = energy_of(alone, 0.8, funnel(0.8, False).data)
    result = log_partition(energy, method, KEY, **settings)
    assert abs(result.value - math.log(2 * math.pi * 0.8) - 0.08) < 5 * result.stderr < 0.25
