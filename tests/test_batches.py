"""Fits to batches that an iterable gives, one after the other."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import counted_compilations
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoLaplaceApproximation

from numpyro_score import ISM, MALA, PCD, SSM, NonFiniteLossError, ScoreMatching

pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling")
X = np.random.default_rng(0).normal(size=(120, 2)).astype(np.float32)
BATCHES = list(X.reshape(12, 10, 2))
CHAINS = PCD(kernel=MALA(step_size=0.1), num_chains=8, num_steps=1)


def quartic(x):
    """Quartic tails with a prior of the weight."""
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, -1))


def weighted(w, x):
    """With a weight of each row, the data the second argument."""
    a = numpyro.param("a", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -a * w * jnp.sum(x**4, -1))


def fitter(loss=None, optim=None, **options):
    return ScoreMatching(options.pop("model", quartic), loss=loss or SSM(), optim=optim, **options)


def fit(batches, key=1, svi=None, **options):
    return (svi or fitter()).run_batches(key, batches, progress_bar=False, **options)


def assert_identical(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


class Counter:
    """An iterator with a position, as Grain's; `fail` is the batch at which it raises, once."""

    def __init__(self, fail=None, as_bytes=False):
        self.i, self.fail, self.as_bytes, self.read = 0, fail, as_bytes, []

    def __iter__(self):
        return self

    def __next__(self):
        if self.i == self.fail:
            raise OSError("the disk is gone")
        if self.i == 100:
            raise StopIteration
        self.i += 1
        self.read.append(self.i - 1)
        return BATCHES[(self.i * 5) % 12]

    def get_state(self):
        return str(self.i).encode() if self.as_bytes else {"next": self.i}

    def set_state(self, state):
        self.i = int(state) if self.as_bytes else state["next"]


class Again:
    """Starts anew in each pass, with a length."""

    def __iter__(self):
        return iter(BATCHES)

    def __len__(self):
        return len(BATCHES)


@pytest.mark.parametrize("loss", [SSM(), CHAINS], ids=["SSM", "PCD"])
def test_steps_are_those_of_svi(loss):
    """A loop of `update` by hand, whose β is N/n of the object's."""
    result = fit(BATCHES, svi=fitter(loss, optax.adam(1e-2), learning_rate=0.5), num_rows=120)
    by_hand = fitter(loss, optax.adam(1e-2), learning_rate=0.5 * 12)
    state = by_hand.init(1, BATCHES[0])
    update, losses = jax.jit(by_hand.update), []
    for batch in BATCHES:
        state, value = update(state, batch)
        losses.append(value)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(result.estimates["a"], by_hand.get_params(state)["a_auto_loc"], rtol=1e-6)
    assert len(result.losses) == 12 and not result.interrupted and result.cost.seconds > 0
    np.testing.assert_array_equal(result.args[0], BATCHES[-1])


@pytest.mark.slow
def test_weights_are_those_of_a_subsampled_plate():
    """The same objective, priors and β included, on the rows that a plate of all rows drew."""

    def subsampled(x):
        a = numpyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x), subsample_size=10) as rows:
            numpyro.deterministic("drawn", rows)
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x[rows])
            numpyro.factor("energy", -jnp.sum(a * x**4, -1))

    svi = ScoreMatching(subsampled, loss=ISM(), optim=optax.sgd(1e-5), learning_rate=0.3)
    state = svi.init(jax.random.key(3), X)
    key = jax.random.split(state.rng_key)[1]
    model_key = jax.random.split(key)[0]
    drawn = numpyro.handlers.trace(
        numpyro.handlers.seed(numpyro.handlers.substitute(svi.model, svi.get_params(state)), model_key)
    ).get_trace(X)["rows"]["value"]
    new, value = jax.jit(svi.update)(state, X)
    ours = fit([X[drawn]], svi=fitter(ISM(), optax.sgd(1e-5), learning_rate=0.3), num_rows=120, init_state=state)
    np.testing.assert_allclose(ours.losses[0], value, rtol=1e-5)
    np.testing.assert_allclose(ours.params["a_auto_loc"], svi.get_params(new)["a_auto_loc"], rtol=1e-6)


def test_all_rows_in_one_batch_are_a_run():
    """With the default optimiser and its schedule."""
    one = fit([X], num_steps=40)
    assert_identical(one.losses, fit([X], num_steps=40, num_rows=120).losses)
    run = fitter().run(1, X, num_steps=40, progress_bar=False)
    np.testing.assert_allclose(run.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(run.estimates["a"], one.estimates["a"], rtol=1e-5)


def test_iterables():
    """Each kind gives the same steps; arguments in a tuple, and NumPy's and JAX's arrays, are the same."""
    svi = fitter(optim=optax.adam(1e-2))
    one = fit(BATCHES, svi=svi, num_steps=20)
    forms = [Again(), [(b,) for b in BATCHES], tuple(map(jnp.asarray, BATCHES)), iter([*BATCHES, *BATCHES[:8]])]
    for batches in forms:
        assert_identical(one.state, fit(batches, svi=svi, num_steps=20).state)
    assert len(fit(iter(BATCHES), svi=svi).losses) == 12
    assert len(fit(Again()).losses) == 12
    svi = fitter(model=weighted)
    assert len(fit(((np.ones(10, np.float32), b) for b in BATCHES), svi=svi, num_steps=3).losses) == 3


def test_a_buffer_may_be_filled_again():
    """As readers do that own one: the steps see what it held when the batch was given."""

    def reader():
        buffer = np.empty_like(BATCHES[0])
        for batch in BATCHES:
            buffer[:] = batch
            yield buffer

    svi = fitter(optim=optax.adam(1e-2))
    assert_identical(fit(BATCHES, svi=svi).losses, fit(reader(), svi=svi, prefetch=5).losses)


def test_one_program():
    """A second pass, and a second fit, compile nothing; nor does the first for its second batch."""
    svi = fitter()
    first = fit(BATCHES, svi=svi, num_steps=1)
    with counted_compilations() as found:
        second = fit(BATCHES, svi=svi, num_steps=30)
    assert not found and len(second.losses) == 30 and len(first.losses) == 1


def test_no_more_are_read_than_used():
    """At most `prefetch` wait beside the two on the device, and none beyond the last step."""
    batches, svi = Counter(), fitter(optim=optax.adam(1e-2))
    fit(batches, svi=svi, num_steps=7)
    assert batches.read == list(range(7))
    slow, step, taken = Counter(), svi._step_batch, []

    def slowly(*args, **options):
        time.sleep(0.02)
        taken.append(len(slow.read))
        return step(*args, **options)

    svi._step_batch = slowly
    fit(slow, svi=svi, num_steps=10, prefetch=1)
    assert all(read <= i + 2 for i, read in enumerate(taken))
    assert not [t for t in threading.enumerate() if t.name == "numpyro_score batches"]


def test_double_precision(x64):
    """Which is of a thread in JAX."""
    batches = [b.astype(np.float64) for b in BATCHES]
    result = fit(batches, svi=fitter(optim=optax.adam(1e-2)))
    assert result.args[0].dtype == result.losses.dtype == np.float64


@pytest.mark.parametrize("as_bytes", [False, True])
def test_goes_on_at_the_position(tmp_path, as_bytes):
    """Parameters, chains, key, losses and batches, to the bit, after an error in the middle of an uneven save."""
    svi = fitter(CHAINS, average=0.9)
    whole = fit(Counter(), svi=svi, num_steps=60)
    options = dict(svi=svi, num_steps=60, checkpoint=tmp_path, checkpoint_every=1e-9)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(Counter(37, as_bytes), **options)
    rest = Counter(as_bytes=as_bytes)
    part = fit(rest, **options)
    assert_identical((whole.params, whole.state, whole.losses), (part.params, part.state, part.losses))
    assert rest.read == [0, *range(37, 60)]
    again = fit(Counter(as_bytes=as_bytes), **options)
    assert_identical((whole.params, whole.state, whole.losses), (again.params, again.state, again.losses))


@pytest.mark.parametrize("batches", [BATCHES, Again()], ids=["list", "iterable"])
def test_goes_on_by_number(tmp_path, batches, monkeypatch):
    """In a second pass; Ctrl-C returns the fit so far, with all that was taken."""
    svi = fitter()
    whole, step, calls = fit(batches, svi=svi, num_steps=40), svi._step_batch, iter(range(17))

    def stopped(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*args, **options)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="Interrupted after 17 of 40 steps"):
        patch.setattr(svi, "_step_batch", stopped)
        part = fit(batches, svi=svi, num_steps=40, checkpoint=tmp_path)
    assert part.interrupted and len(part.losses) == 17
    assert_identical(part.losses, whole.losses[:17])
    rest = fit(batches, svi=svi, num_steps=40, checkpoint=tmp_path)
    assert_identical((whole.params, whole.state, whole.losses), (rest.params, rest.state, rest.losses))


def test_others_do_not_go_on(tmp_path):
    def failing():
        yield from BATCHES[:5]
        raise OSError("gone")

    options = dict(num_steps=12, checkpoint=tmp_path)
    with pytest.raises(OSError, match="gone"):
        fit(failing(), **options)
    with pytest.raises(ValueError, match="batches, a list_iterator, cannot go on where the checkpoint stopped"):
        fit(iter(BATCHES), **options)
    with pytest.raises(ValueError, match="is of a run on other data"):
        fit(BATCHES[::-1], **options)
    with pytest.raises(ValueError, match="num_rows=None, and this one has num_rows=120"):
        fit(BATCHES, num_rows=120, **options)


def test_errors_of_the_iterator_name_the_step():
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(Counter(5), num_steps=20)
    assert caught.value.__notes__ == ["It was raised by batches, read by run_batches for step 5."]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(Counter(0), num_steps=20)
    assert "step 0" in caught.value.__notes__[0]


def test_non_finite_loss():
    """Names step, batch and row, and holds the last finite state."""
    bad = [b.copy() for b in BATCHES]
    bad[7][3] = np.nan
    svi = fitter(optim=optax.adam(1e-2))
    message = r"The loss is nan at step 7, on batch 7 of its pass: its data are NaN or infinite in 1 of 10 rows, .* 3\."
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        fit(bad, svi=svi, num_steps=20)
    assert caught.value.step == 7 and len(caught.value.losses) == 7
    assert_identical(caught.value.state, fit(BATCHES, svi=svi, num_steps=6).state)
    with pytest.raises(NonFiniteLossError, match=r"The loss is inf at step 1, .*: the density and score are"):
        fit(BATCHES, svi=fitter(optim=optax.sgd(1e9)), num_steps=20)


SHORT = [*BATCHES[:3], BATCHES[3][:6]]


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (SHORT, {}, ValueError, r"Batch 3 has arrays float32\[6, 2\] where the first had float32\[10, 2\]"),
        ([BATCHES[0], BATCHES[1].astype(np.float16)], {}, ValueError, r"Batch 1 has arrays float16\[10, 2\]"),
        ([BATCHES[0], (BATCHES[1], 3)], {}, ValueError, "Batch 1 differs from the first in what is no array"),
        ([BATCHES[0], BATCHES[1].tolist()], {}, TypeError, "Batch 1 is a list: give an array"),
        ([{"x": BATCHES[0]}], {}, TypeError, "Batch 0 is a dict: give an array"),
        ([], {}, ValueError, "batches has none"),
        (X, {}, TypeError, r"batches is one array of shape \(120, 2\): write run\(rng_key, x\)"),
        (3, {}, TypeError, "batches must be an iterable of arrays"),
        (iter(BATCHES), {}, ValueError, "these have no length: pass num_steps"),
        (iter(BATCHES), dict(num_steps=20), ValueError, "ended after 12 batches, before num_steps=20: pass"),
        (BATCHES, dict(num_rows=5), ValueError, "num_rows=5 is less than the 10 rows of a batch"),
        (BATCHES, dict(num_steps=0), ValueError, "num_steps must be a positive integer"),
        (BATCHES, dict(prefetch=0), ValueError, "needs a prefetch of at least 1"),
    ],
)  # fmt: skip
def test_bad_batches(unchecked, batches, options, error, message):
    with pytest.raises(error, match=message):
        fit(batches, **options)


def test_refused_models():
    def subsampling(x):
        a = numpyro.param("a", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", 10, subsample_size=5) as rows:
            x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x[rows])
            numpyro.factor("energy", -a * jnp.sum(x**4, -1))

    with pytest.raises(ValueError, match="subsamples the plate 'rows'"):
        fit(BATCHES, svi=fitter(model=subsampling), num_rows=120)
    with pytest.raises(ValueError, match="'calibrated' needs all rows"):
        fit(BATCHES, svi=fitter(learning_rate="calibrated"))
    with pytest.raises(NotImplementedError, match="AutoLaplaceApproximation keeps the density of the first batch"):
        fit(BATCHES, svi=fitter(guide=AutoLaplaceApproximation))
