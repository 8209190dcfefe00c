"""Tables of pandas, polars and xarray as data: the numbers of arrays, and the names of their columns."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from models import improper
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    ISM,
    Energy,
    ScoreMatching,
    dependent_rows,
    generalized_bayes,
    hyvarinen_score,
    load,
    log_partition,
    mmd,
    plot_influence,
    report,
    sample,
    to_arviz,
)

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
Z = np.linspace(-1, 1, 60, dtype=np.float32)
FRAME = pd.DataFrame(X, columns=["height", "weight"], index=[f"p{i}" for i in range(60)])


def model(x, z=None):
    """A quadratic objective: normal columns about a line in z."""
    with numpyro.plate("x_column", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    gram = numpyro.sample("gram", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        line = mu if z is None else mu * z[:, None]
        numpyro.factor("energy", -0.5 * (x**2).sum(-1) + (line * x).sum(-1) - 0.01 * ((x @ gram) * x**3).sum(-1))


class Frame:
    """A frame with the methods of polars alone."""

    columns = ["height", "weight"]  # noqa: RUF012

    def __getitem__(self, name):
        column = X[:, self.columns.index(name)]
        return SimpleNamespace(to_numpy=lambda: column, dtype=column.dtype)

    def to_numpy(self):
        return X


MATCHER = ScoreMatching(model, loss=ISM())


@pytest.fixture(scope="module")
def fit():
    return MATCHER.run(KEY, FRAME, progress_bar=False)


def test_the_numbers_of_arrays(fit):
    """A frame, a data array and a frame of another library: one fit, to the bit, that compiles once."""
    plain = MATCHER.run(KEY, X, progress_bar=False)
    array = xr.DataArray(X, dims=("person", "x_column"), coords={"x_column": ["height", "weight"]})
    for table in (FRAME, array, Frame()):
        other = MATCHER.run(KEY, table, progress_bar=False)
        jax.tree.map(np.testing.assert_array_equal, other.estimates, plain.estimates)
        assert isinstance(other.args[0], np.ndarray | jax.Array)
    with_z = [Energy(model, plain.estimates, x, z=z) for x, z in ((X, Z), (FRAME, pd.Series(Z)))]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, with_z))


def test_names_everywhere(fit, tmp_path):
    """In the table, in ArviZ's groups, in files, on pictures and in the report."""
    dims = {"gram": ["x_column", "x_column"]}
    names = ["mu[height]", "mu[weight]", *(f"gram[{a}, {b}]" for a in FRAME for b in FRAME)]
    assert sorted(fit.summary(dims=dims).index) == sorted(names)
    data = fit.to_arviz(num_samples=8, dims=dims)
    assert list(data["observed_data"]["x"].coords["x_column"].values) == ["height", "weight"]
    assert data["observed_data"]["x"].sel(x_dim_0="p7", x_column="weight").item() == X[7, 1]
    assert data["posterior"]["gram"].dims == ("chain", "draw", "x_column", "x_column_2")
    fit.save(tmp_path / "fit")
    assert fit.summary().index.equals(load(tmp_path / "fit", model).summary().index)
    axes = plot_influence(fit, of=lambda estimates: {"mu": estimates["mu"]})
    assert re.match(r"row p\d+: mu.(height|weight)", axes.texts[-1].get_text())
    plt.close(axes.figure)
    text = report(fit, tmp_path / "fit.html", num_samples=0).read_text()
    assert "mu[weight]" in text and "<td>height</td>" in text


def test_names_of_draws_and_of_runs(fit):
    """Draws of data have the columns' names, and so have sites in their plate under MCMC."""
    draws = sample(Energy(model, fit.estimates, FRAME), KEY, 3, num_chains=1, num_warmup=3)
    assert list(draws["posterior"]["x"].coords["x_column"].values) == ["height", "weight"]
    mcmc = MCMC(NUTS(generalized_bayes(model, ISM())), num_warmup=2, num_samples=4, progress_bar=False)
    mcmc.run(KEY, FRAME)
    assert list(to_arviz(mcmc, FRAME)["posterior"]["mu"].coords["x_column"].values) == ["height", "weight"]


def test_new_rows_have_the_same_columns(fit):
    """A frame whose columns are in another order would be another law's, without a word."""
    energy = fit.energy
    np.testing.assert_array_equal(energy.flatten(FRAME), X)
    with pytest.raises(ValueError, match=r"columns 'weight', 'height', and the model is bound to data with 'height',"):
        energy.flatten(FRAME[["weight", "height"]])
    with pytest.raises(ValueError, match=r"e.g. frame\[\['height', 'weight'\]\]"):
        mmd(FRAME[["weight", "height"]], energy)
    for refused in (energy.log_density, energy.score, energy.at, lambda rows: hyvarinen_score(fit, rows)):
        with pytest.raises(ValueError, match=r"'x' has the columns 'weight', 'height'"):
            refused(FRAME[["weight", "height"]])
    np.testing.assert_array_equal(energy.log_density(FRAME), energy.log_density(X))


def test_rows_of_two_tables_are_the_same(fit):
    """By their labels, where both have some: what is sorted in one table alone belongs to other rows."""
    z = pd.Series(Z, index=FRAME.index)
    MATCHER.run(KEY, FRAME, z, progress_bar=False)
    MATCHER.run(KEY, FRAME, Z, progress_bar=False)
    with pytest.raises(ValueError, match=r"rows of 'x' and 'z' have different labels, first 'p0' and 'p59' in row 0"):
        MATCHER.run(KEY, FRAME, z[::-1], progress_bar=False)
    patients = pd.Series(np.repeat(np.arange(30), 2), index=FRAME.index)
    errors = dependent_rows(fit, groups=patients).stderr()["mu"]
    np.testing.assert_array_equal(errors, dependent_rows(fit, groups=patients.to_numpy()).stderr()["mu"])
    with pytest.raises(ValueError, match=r"rows of the data and groups have different labels"):
        dependent_rows(fit, groups=patients.sample(frac=1, random_state=0))


BAD = {
    "Column 'kind' of 'x' holds str such as 'a'": FRAME.assign(kind="a"),
    "Column 'weight' of 'x' holds integers, and score matching": FRAME.assign(weight=1),
    "Column 'weight' of 'x' holds times": FRAME.assign(weight=pd.Timestamp("2020-01-01")),
    "NaN or infinity in row 3 .1 of 60. of column 'weight'": FRAME.assign(
        weight=FRAME["weight"].where(np.arange(60) != 3)
    ),
    r"NaN or infinity in rows 0, 2, .* of column 'weight'": FRAME.assign(
        weight=pd.array([None, 1.5] * 30, dtype="Float64")
    ),
    "Column 'weight' of 'x' holds values that are missing among objects": FRAME.assign(
        weight=pd.Series([None, 1.5] * 30, dtype=object).values
    ),
    "'x' has two columns 'height'": pd.concat([FRAME, FRAME], axis=1),
    "'x' is a Dataset of several arrays": FRAME.to_xarray(),
    "'x' is a Lazy: pass a frame or an array, e.g. x.collect": type(
        "Lazy", (), {"collect_schema": None, "collect": None}
    )(),
    "Argument 'x' is empty, of shape .60, 0.": FRAME.iloc[:, :0],
}


@pytest.mark.parametrize("message", BAD)
def test_columns_that_hold_no_data(message):
    """Each error names the column and what to do."""
    with pytest.raises((TypeError, ValueError), match=message):
        MATCHER.init(KEY, BAD[message])


def test_arguments_given_again_have_the_same_columns(fit, tmp_path):
    """After a file without data, and in `dataclasses.replace`."""
    fit.save(tmp_path / "fit", data=False)
    swapped = FRAME[["weight", "height"]]
    for again in (
        lambda frame: load(tmp_path / "fit", model, frame),
        lambda frame: replace(fit, args=(frame,)),
        lambda frame: replace(fit.without_data(), args=(frame,)),
    ):
        with pytest.raises(ValueError, match=r"'x' has the columns 'weight', 'height'"):
            again(swapped)
        assert again(FRAME).summary().index[0] == fit.summary().index[0]


def test_covariates_have_the_same_columns():
    """A frame of covariates in another order would be another model, wherever new rows or values are given."""
    frame = pd.DataFrame(X, columns=["age", "dose"])

    def regression(y, z):
        w = numpyro.param("w", np.zeros(2, np.float32))
        with numpyro.plate("rows", len(y)):
            numpyro.factor("energy", -0.5 * (y - z @ w) ** 2)

    regressed = ScoreMatching(regression).run(KEY, Z, frame, progress_bar=False)
    refused = [
        lambda z: regressed.energy.at(Z[:, None], z=z),
        lambda z: regressed.energy.bind(z=z),
        lambda z: hyvarinen_score(regressed, Z, z),
        lambda z: log_partition(regressed, given={"z": z[:2]}),
        lambda z: sample(regressed, KEY, 3, given={"z": z[:2]}, num_chains=1, num_warmup=3),
    ]
    for call in refused:
        with pytest.raises(ValueError, match=r"'z' has the columns 'dose', 'age', and the model is bound to data with"):
            call(frame[["dose", "age"]])
    for call in refused[:3]:
        call(frame)
    np.testing.assert_array_equal(regressed.energy.bind(z=frame).data, regressed.energy.data)
    regressed.energy.bind(z=X[:, ::-1])  # an array has no names
    with pytest.raises(ValueError, match=r"'z' has shape \(2,\), and the model is bound to one of shape \(60, 2\)"):
        regressed.energy.at(Z[:2, None], z=pd.Series([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"'z' has shape \(2,\), and the model is bound to one of shape \(60, 2\)"):
        hyvarinen_score(regressed, Z[:2], pd.Series([1.0, 0.0]))
