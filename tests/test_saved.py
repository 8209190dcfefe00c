"""Fits in a directory of arrays and JSON."""

import dataclasses
import json
import pickle
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

import numpyro_score
from numpyro_score import DSM, ISM, MALA, PCD, ContinuousDSM, ScoreMatching, load
from numpyro_score.inference.files import Arrays

pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling", "ignore:The fit has not converged")
ROWS = jax.random.normal(jax.random.key(0), (60, 2))


def quartic(x, scale=1.0, cubes=None):
    """Quartic tails under a prior, and a covariate in a dict."""
    a = numpyro.sample("a", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
    b = numpyro.param("b", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4 - scale * b * x, -1))


def fit(loss=None, guide=None, optim=None, x=ROWS, **arguments):
    svi = ScoreMatching(quartic, guide, optim, loss, num_steps=20)
    return svi.run(1, x, progress_bar=False, **arguments)


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fit of DSM, and its directory."""
    path = tmp_path_factory.mktemp("fits") / "a"
    found = fit(DSM(0.3), scale=2.0, cubes={"unused": [np.arange(3.0), (1, "two", None)]})
    found.save(path)
    return found, path


def test_a_loaded_fit_is_the_fit(saved):
    """Estimates, state, losses, cost and arguments to the bit, and what is computed from them."""
    found, path = saved
    loaded = load(path, quartic)
    assert_equal((found.params, found.state, found.losses), (loaded.params, loaded.state, loaded.losses))
    assert_equal((found.args, found.kwargs), (loaded.args, loaded.kwargs))
    assert loaded.kwargs["cubes"]["unused"][1] == (1, "two", None)
    assert loaded.cost == found.cost and loaded.svi.score_loss == DSM(0.3)
    assert_equal(found.stderr(), loaded.stderr())
    assert str(loaded) == str(found)


def test_going_on_from_a_loaded_fit(saved):
    """The same as going on from the fit itself."""
    options = dict(num_steps=10, progress_bar=False)
    found, path = saved
    loaded = load(path, quartic)
    one = found.svi.run(2, *found.args, init_state=found.state, **found.kwargs, **options)
    two = loaded.svi.run(2, *loaded.args, init_state=loaded.state, **loaded.kwargs, **options)
    assert_equal((one.state, one.losses), (two.state, two.losses))


def test_files_say_what_they_hold(saved):
    """They can be read without the package, and without running any code."""
    head = json.loads((saved[1] / "fit.json").read_text())
    assert head["format"] == 1 and head["numpyro_score"] == numpyro_score.__version__
    names = dict(head["params"])
    with np.load(saved[1] / "arrays.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays[names["['b']"]["array"]], saved[0].params["b"])


def test_without_data(saved, tmp_path):
    saved[0].save(tmp_path / "b", data=False)
    with pytest.raises(ValueError, match=r"saved without the model's arguments: write load\(path, model, x\)"):
        load(tmp_path / "b", quartic)
    loaded = load(tmp_path / "b", quartic, ROWS, scale=2.0)
    assert_equal(saved[0].stderr(), loaded.stderr())
    with np.load(tmp_path / "b" / "arrays.npz") as arrays:
        assert all(len(ROWS) not in v.shape for v in arrays.values())


@pytest.mark.parametrize("guide", [None, AutoNormal], ids=["point", "AutoNormal"])
def test_fits_without_data(tmp_path, guide, unchecked):
    """Estimates, state and files stay, data go, and what needs them says so; also after a pickle."""
    x = jax.random.normal(jax.random.key(0), (5000, 2))
    found = fit(ISM(), guide, x=x, scale=2.0, cubes=None)
    bare = found.without_data()
    assert bare.without_data() is bare and found.has_data and not bare.has_data
    pickled = pickle.dumps(bare)
    some = np.asarray(x[:100]).tobytes()
    assert some not in pickled and some in pickle.dumps(found)
    assert len(pickle.dumps(found)) - len(pickled) > 0.9 * x.nbytes  # guides keep the numbers of rows, int32
    for one in (bare, pickle.loads(pickled)):
        assert_equal((found.params, found.state, found.losses), (one.params, one.state, one.losses))
        assert_equal(found.estimates, one.estimates)
        assert str(one) == str(found)
        needing = [lambda f: f.energy, lambda f: f.stderr(), lambda f: f.sites, lambda f: f.svi.init(0, *f.args)]
        for needs in [*needing, lambda f: f.sample_posterior(0, 3), lambda f: f.influence()]:
            with pytest.raises(ValueError, match=r"The fit has no k?w?args, as without_data"):
                needs(one)
        again = dataclasses.replace(one, args=(x,), kwargs=found.kwargs)
        assert_equal(found.energy.score(x[:3]), again.energy.score(x[:3]))
    bare.save(tmp_path / "bare")
    found.save(tmp_path / "same", data=False)
    assert (tmp_path / "bare/fit.json").read_text() == (tmp_path / "same/fit.json").read_text()
    loaded = load(tmp_path / "bare", quartic, x, guide=guide, scale=2.0, cubes=None)
    assert_equal(found.estimates, loaded.estimates)


def test_a_save_that_fails_leaves_nothing(saved, tmp_path):
    """On a disk that takes no more than 100 bytes of a file, and under a file in the place of a directory."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"The fit could not be saved in .*file/a .*: free space there, or give a path"):
        saved[0].save(tmp_path / "file" / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"The fit could not be saved in .*File too large"):
            saved[0].save(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_optimisers_and_guides(tmp_path):
    """An optimiser that is not given again is missed only where a run would need it."""
    found = fit(ISM(), AutoNormal, optax.adam(0.01))
    found.save(tmp_path / "c")
    with pytest.raises(ValueError, match="The fit has the guide AutoNormal, and this one would have AutoDelta"):
        load(tmp_path / "c", quartic)
    loaded = load(tmp_path / "c", quartic, guide=AutoNormal)
    assert_equal((found.params, found.state.rng_key), (loaded.params, loaded.state.rng_key))
    with pytest.raises(ValueError, match="could not be saved with this fit: give it again"):
        loaded.svi.run(1, ROWS, progress_bar=False)
    loaded = load(tmp_path / "c", quartic, guide=AutoNormal, optim=optax.adam(0.01))
    assert_equal(found.state, loaded.state)
    with pytest.raises(ValueError, match="pass the ones that were fitted"):
        load(tmp_path / "c", quartic, guide=AutoNormal, optim=optax.sgd(0.01))


def test_losses_with_kernels_are_given_again(tmp_path):
    loss = PCD(kernel=MALA(step_size=0.1), num_chains=8, num_steps=1)
    found = fit(loss)
    found.save(tmp_path / "d")
    with pytest.raises(ValueError, match=r"has the loss PCD\(.*pass loss="):
        load(tmp_path / "d", quartic)
    with pytest.raises(ValueError, match="and DSM was given"):
        load(tmp_path / "d", quartic, loss=DSM(0.1))
    assert_equal(found.state, load(tmp_path / "d", quartic, loss=loss).state)


def test_what_cannot_be_saved_or_loaded(saved, tmp_path):
    found, path = saved
    with pytest.raises(FileExistsError, match="is there already"):
        found.save(path)
    with pytest.raises(FileNotFoundError, match=r"holds no fit, as it has no fit\.json"):
        load(tmp_path, quartic)
    with pytest.raises(ValueError, match=r"holds the model's arguments: write load\(path, model\)"):
        load(path, quartic, ROWS)

    def other(x, **_):
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
            numpyro.factor("energy", -jnp.sum(numpyro.param("c", 1.0) * x**4, -1))

    with pytest.raises(ValueError, match="are not those of this model"):
        load(path, other)
    head = json.loads((path / "fit.json").read_text())
    later = tmp_path / "later"
    later.mkdir()
    (later / "fit.json").write_text(json.dumps({**head, "format": 2}))
    with pytest.raises(ValueError, match="which reads formats up to 1: install a later one"):
        load(later, quartic)


@pytest.mark.parametrize(
    ("name", "kept"), [("fit.json", 0.5), ("arrays.npz", 0.5), ("arrays.npz", 0.99), ("arrays.npz", 0.0)]
)
def test_damaged_files(saved, tmp_path, name, kept):
    """Each is told with its directory."""
    shutil.copytree(saved[1], tmp_path / "fit")
    whole = (tmp_path / "fit" / name).read_bytes()
    (tmp_path / "fit" / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=rf"The fit in {tmp_path}/fit is damaged \(.*: take another copy"):
        load(tmp_path / "fit", quartic)


def test_kinds_of_values():
    """Keys, bfloat16, containers and settings come back as they were; anything else is refused by its path."""
    arrays = Arrays()
    tree = {"key": jax.random.key(3), "low": jnp.ones(3, jnp.bfloat16), "rest": [1, (2.5, None), {"s": "t"}]}
    entry = json.loads(json.dumps(arrays.encode(tree, "arguments")))
    found = Arrays(arrays.arrays).decode(entry)
    assert found["low"].dtype == jnp.bfloat16 and found["rest"] == tree["rest"]
    assert_equal(tree, found)
    loss = ContinuousDSM(0.1, 10.0, weighting="edm", sigma_data=1.0)
    assert ContinuousDSM(**arrays.decode(json.loads(json.dumps(arrays.settings(loss)))["fields"])) == loss
    with pytest.raises(TypeError, match=r"arguments\['f'\]\[1\] is a function"):
        arrays.encode({"f": [1, lambda x: x]}, "arguments")
