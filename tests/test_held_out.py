"""The loss of rows held out, looked at during a fit to batches."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import counted_compilations
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal

from numpyro_score import ISM, MALA, PCD, SSM, ScoreMatching, load

pytestmark = pytest.mark.filterwarnings("ignore:The loss was still falling")
X = np.random.default_rng(0).normal(size=(140, 2)).astype(np.float32)
BATCHES, V = list(X[:120].reshape(12, 10, 2)), X[120:]


def quartic(x, w=1.0):
    """Quartic tails with a prior of the weight."""
    a = numpyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=w):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=x)
        numpyro.factor("energy", -jnp.sum(a * x**4, -1))


def fit(loss=None, held_out=V, batches=BATCHES, guide=None, **options):
    svi = ScoreMatching(quartic, guide, optax.adam(1e-2), loss or ISM(), average=options.pop("average", None))
    options = dict(num_steps=25, held_out_every=10, progress_bar=False) | options
    return svi.run_batches(1, batches, held_out=held_out, **options)


@pytest.mark.parametrize("average", [None, 0.9])
def test_is_the_mean_loss_at_the_estimates(average):
    """Of runs that stop there: ½‖s‖² + tr ∇s with s = −4ax³, without the prior, whatever the rows of a batch weigh."""
    looks = fit(num_rows=120, average=average).held_out
    assert looks[:, 0].tolist() == [10, 20, 25]
    for steps, value in looks:
        a = np.asarray(fit(held_out=None, num_steps=int(steps), num_rows=120, average=average).estimates["a"])
        np.testing.assert_allclose(value, np.mean(np.sum(8 * a**2 * V**6 - 12 * a * V**2, -1)), rtol=1e-5)


def test_rows_weigh_as_in_the_model():
    """Rows of weight zero do not count."""
    weights = (np.arange(20) < 7).astype(np.float32)
    found = fit(held_out=(V, weights), batches=[(b, np.ones(10, np.float32)) for b in BATCHES]).held_out
    expected = fit(held_out=(V[:7], np.ones(7, np.float32)), batches=[(b, np.ones(10, np.float32)) for b in BATCHES])
    np.testing.assert_allclose(found, expected.held_out, rtol=1e-5)


def test_steps_are_the_same():
    """To the bit with rows held out and without; random numbers are the same at each look."""
    one, other = fit(SSM()), fit(SSM(), held_out=None)
    np.testing.assert_array_equal(one.losses, other.losses)
    np.testing.assert_array_equal(one.estimates["a"], other.estimates["a"])
    assert other.held_out is None
    still = ScoreMatching(quartic, optim=optax.sgd(0.0), loss=SSM())
    looks = still.run_batches(1, BATCHES, held_out=V, held_out_every=5, num_steps=20, progress_bar=False).held_out
    assert len(set(looks[:, 1])) == 1


def test_other_guides():
    """At the median of the guide."""
    found = fit(guide=AutoNormal)
    a = np.asarray(found.estimates["a"])
    np.testing.assert_allclose(found.held_out[-1, 1], np.mean(np.sum(8 * a**2 * V**6 - 12 * a * V**2, -1)), rtol=1e-5)


def test_goes_on_with_its_values(tmp_path):
    """After an error at step 17, to the bit; with other rows held out it does not."""

    class Batches(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from BATCHES if self.passes != 2 else BATCHES[:5]
            if self.passes == 2:
                raise OSError("gone")

    batches, whole = Batches(BATCHES), fit()
    options = dict(batches=batches, checkpoint=tmp_path / "run", checkpoint_every=1e-9)
    with pytest.raises(OSError, match="gone"):
        fit(**options)
    rest = fit(**options)
    np.testing.assert_array_equal(rest.held_out, whole.held_out)
    np.testing.assert_array_equal(rest.losses, whole.losses)
    with pytest.raises(ValueError, match="is of a run on other data"):
        fit(held_out=V + 1, **options)
    rest.save(tmp_path / "fit")
    loaded = load(tmp_path / "fit", quartic)
    np.testing.assert_array_equal(loaded.held_out, whole.held_out)


def test_one_program():
    fit()
    with counted_compilations() as found:
        fit()
    assert not found


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(held_out=V.tolist()), TypeError, "held_out is a list: give an array"),
        (dict(held_out=V[:, :1]), ValueError, None),
        (dict(held_out_every=0), ValueError, "run_batches needs a held_out_every of at least 1"),
        (dict(loss=PCD(4, kernel=MALA(step_size=0.1))), TypeError, "PCD has no value to look at, as"),
        (dict(held_out=np.where(V == V[3, 0], np.nan, V)), ValueError, "have NaN or infinity in row 3"),
    ],
)
def test_refused(unchecked, options, error, message):
    with pytest.raises(error, match=message) as caught:
        fit(**options)
    if "held_out" in options and error is ValueError:
        assert "It was raised by the rows of held_out." in caught.value.__notes__


def test_the_bar_shows_it(capsys):
    fit(progress_bar=True, num_steps=60)
    assert "held out: " in capsys.readouterr().err


def test_more_rows_than_a_batch_in_jit():
    """Rows of another number than the batches', as JAX's arrays."""
    np.testing.assert_allclose(fit(held_out=jnp.asarray(V)).held_out, fit().held_out, rtol=1e-6)
    jax.block_until_ready(fit(held_out=V[:3]).state)
