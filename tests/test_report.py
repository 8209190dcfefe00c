"""The report of a fit: its words, its numbers, and how a browser shows it."""

import base64
import dataclasses
import functools
import html.parser
import io
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from models import improper

import numpyro_score
from numpyro_score import ISM, ScoreMatching, report
from numpyro_score.inference import AdversarialResult
from numpyro_score.reporting import checks
from numpyro_score.reporting.page import page, table, tag
from numpyro_score.reporting.report import _with_error

KEY = jax.random.key(0)
EVIL = "<b>k</b>&\"'"  # a site's name that is HTML
N = 80


def model(x):
    """Precisions of two columns."""
    k = numpyro.param(EVIL, jnp.ones(2))
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", improper(2), obs=x)
        numpyro.factor("energy", -0.5 * jnp.sum(k * x**2, axis=-1) + m * x[:, 0])


X = np.random.default_rng(0).normal(0.3, 1.2, (N, 2)).astype(np.float32)


@functools.cache
def matcher():
    return ScoreMatching(model)


@functools.cache
def fitted():
    return matcher().run(KEY, X, progress_bar=False)


def moved(fit, distance):
    """The same fit `distance` standard errors from its minimum in the second precision."""
    params = dict(fit.params)
    params[EVIL] = params[EVIL].at[1].add(distance * fit.stderr()[EVIL][1])
    return dataclasses.replace(fit, params=params)


class Reader(html.parser.HTMLParser):
    """Tables as lists of rows of text, text outside of tags, and tags with attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.text, self.tags, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data

    def answer(self, question):
        return self.text[self.text.index(question) + 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return report(fitted(), tmp_path_factory.mktemp("report") / "fit.html", num_samples=250)


@pytest.fixture(scope="module")
def read(path):
    return Reader(path.read_text())


# -- what it says -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_estimates_are_those_of_the_fit(read):
    fit = fitted()
    errors = fit.stderr()
    names = [f"{EVIL}[0]", f"{EVIL}[1]", "m"]
    assert [row[0] for row in read.tables[0]] == ["parameter", *names]
    values, spreads = (np.append(tree[EVIL], tree["m"]) for tree in (fit.estimates, errors))
    np.testing.assert_allclose([float(row[1]) for row in read.tables[0][1:]], values, atol=0.5e-2)
    np.testing.assert_allclose([float(row[2]) for row in read.tables[0][1:]], spreads, atol=0.5e-2)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (1.88, 0.1134, ("1.88", "0.11")),
        (-12345.678, 98.7, ("-12346", "99")),
        (0.5, None, ("0.5", "–")),
        (2.0, 0.0, ("2", "0")),
        (1.0, float("nan"), ("1", "nan")),
    ],
)
def test_estimates_have_the_digits_of_their_errors(value, error, shown):
    assert _with_error(value, error) == shown


@pytest.mark.slow
def test_first_lines_answer(read):
    what = f"model, with 3 parameters: {EVIL} (2), m (1); on 80 rows of 2 numbers: x."
    assert read.answer("What was fitted") == what
    assert read.answer("By which loss").startswith("ISM(): Implicit score matching, ½‖s(x)‖²")
    assert read.answer("By which loss").endswith("In closed form, learning rate β = 1.")
    assert read.answer("Did it converge?").startswith("Yes: the objective is quadratic in the parameters")
    assert read.answer("Can it be trusted?") == "Nothing speaks against it: 7 of 7 checks are good."


def test_checks_are_in_the_table(read):
    head, *rows = read.tables[1]
    assert head == ["check", "found", "verdict"]
    assert [r[0] for r in rows] == [
        "Gradient at the end",
        "End of the fit",
        "Sandwich eigenvalues",
        "Row of most influence",
        "Data against model (KSD)",
        "Moments of data and draws",
        "Draws of the model",
    ]
    assert {r[2] for r in rows} == {"✓ good"}


def test_moments_of_data_and_draws(read):
    """Of the data as they are, and of draws near those of the model, N(m/k_0, 1/k_0) and N(0, 1/k_1)."""
    (table,) = (t for t in read.tables if t[0][0] == "column")
    assert table[0][1:] == ["data mean", "data sd", "draws mean", "draws sd", "R-hat", "effective sample size"]
    (k0, k1), m = fitted().estimates[EVIL], fitted().estimates["m"]
    for i, (precision, mean) in enumerate(((k0, m / k0), (k1, 0.0))):
        name, data_mean, data_sd, draws_mean, draws_sd, r_hat, ess = table[1 + i]
        assert name == f"x[{i}]" and float(r_hat) < 1.05
        np.testing.assert_allclose([float(data_mean), float(data_sd)], [X[:, i].mean(), X[:, i].std()], rtol=1e-3)
        sd = float(precision) ** -0.5
        assert abs(float(draws_mean) - mean) < 5 * sd / float(ess) ** 0.5
        assert abs(float(draws_sd) / sd - 1) < 5 / float(ess) ** 0.5


def test_versions_and_machine(read):
    found = dict(read.tables[-1][1:])
    assert found["numpyro-score"] == numpyro_score.__version__
    assert f"jax {jax.__version__}" in found["packages"] and found["precision"] == "float32"
    assert jax.devices()[0].device_kind in found["device"]


def test_nothing_is_fetched_or_run(path, read):
    """Every source is a data: URI; there are no scripts, links, handlers or imports."""
    for name, attributes in read.tags:
        assert name not in ("script", "link", "iframe", "object", "embed", "b")
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("href", "srcset", "action")
            assert key != "src" or value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?://", path.read_text())


def pictures(read):
    return {a["alt"]: plt.imread(io.BytesIO(base64.b64decode(a["src"].partition(",")[2])))
            for name, a in read.tags if name == "img"}  # fmt: skip


def test_pictures_are_not_blank(read):
    """A fit in closed form has no steps to show."""
    found = pictures(read)
    assert list(found) == [
        "Data and fitted density",
        "Score field over the data",
        "Data against draws of the model",
        "Influence of rows",
    ]
    for image in found.values():
        assert (image[..., :3].min(axis=-1) < 0.8).mean() > 0.005


def test_report_leaves_no_figures_behind(read):
    assert not plt.get_fignums()


# -- markup ------------------------------------------------------------------------------------------


def test_text_is_escaped_everywhere():
    found = Reader(page(EVIL, tag("p", EVIL, title=EVIL), table([EVIL], [[EVIL]]), tag("p", tag("i", "kept"))))
    assert found.tables == [[[EVIL], [EVIL]]]
    assert ("p", {"title": EVIL}) in found.tags and ("i", {}) in found.tags
    assert "b" not in [name for name, _ in found.tags] and found.text.count(EVIL) == 4


# -- the checks ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The fit has not converged")
@pytest.mark.parametrize(
    ("distance", "verdict", "answer"), [(0.05, "good", "Yes"), (0.5, "look", "Nearly"), (9, "bad", "No")]
)
def test_distance_of_the_minimum(distance, verdict, answer):
    """The second precision k has the losses ½k²x² − k, in k x² − 1 of which the Newton step and its error are known."""
    fit = moved(fitted(), distance)
    check = checks._ask("Gradient at the end", checks._gradient_check, fit)
    assert check.verdict == verdict
    pattern = r"the minimum is (\S+) standard errors from the estimates, furthest in (.*?)\."
    ratio, name = re.fullmatch(pattern, check.found).groups()
    norm = re.fullmatch(r"The gradient's norm is (.*)\.", check.detail).group(1)
    k, squares = float(fit.estimates[EVIL][1]), X[:, 1].astype(float) ** 2
    gradient = k * squares.sum() - N
    np.testing.assert_allclose(float(norm), gradient, rtol=0.05)
    np.testing.assert_allclose(float(ratio), gradient / (k * np.sqrt(N * squares.var(ddof=1))), rtol=0.05)
    assert name == f"{EVIL}[1]"
    other = checks.Check("End of the fit", "", "good")
    many = dataclasses.replace(fit, losses=np.zeros(9))
    assert checks.converged(many, [check, other]).startswith(f"{answer}: the minimum is")


def trend(losses, **changes):
    fit = dataclasses.replace(fitted(), losses=np.asarray(losses), **changes)
    return checks._ask("End of the fit", checks._trend, fit)


def test_trend_of_the_losses():
    """Still falling, settled within noise, too few steps, and steps that were skipped."""
    noise = np.random.default_rng(0).normal(0, 0.01, 400)
    falling = 1 - np.arange(400) / 400
    check = trend(falling + noise)
    assert check.verdict == "look"
    change, error, share = re.search(r"changed by (\S+) ± (\S+), (\S+)% of its whole", check.found).groups()
    np.testing.assert_allclose(float(change), -0.1, atol=0.01)  # 40 steps of 1/400
    np.testing.assert_allclose(float(error), (2 * np.var(falling[:40] + noise[:40]) / 40) ** 0.5, rtol=0.2)
    np.testing.assert_allclose(float(share), 10.5, atol=1.0)
    assert trend(np.exp(-np.arange(400) / 20) + noise).verdict == "good"
    assert trend(falling[:30]).verdict == "unknown"
    falling[100] = np.nan
    skipped = trend(np.exp(-np.arange(400) / 20) * falling)
    assert skipped.detail == "1 of 400 steps were skipped, as their loss was not finite." and skipped.verdict == "look"
    assert trend(np.zeros(400)).verdict == "good"


def test_early_end_is_said():
    fit = dataclasses.replace(fitted(), losses=np.zeros(50), interrupted=True)
    good = checks.Check("Gradient at the end", "the minimum is near.", "good")
    rest = checks.Check("End of the fit", "", "unknown")
    assert checks.converged(fit, [good, rest]) == "Ctrl-C ended the fit early. Yes: the minimum is near."


def test_sandwich_eigenvalues():
    """Those of the correlation matrix of the estimates, by NumPy."""
    covariance = np.asarray(fitted().covariance(), np.float64)
    scale = np.sqrt(np.diag(covariance))
    values = np.linalg.eigvalsh(covariance / np.outer(scale, scale))
    found, verdict = checks._sandwich(fitted())
    assert found == f"correlations of the 3 estimates have eigenvalues {values[0]:.2g} to {values[-1]:.2g}."
    assert verdict == "good"


def test_one_row_that_carries_an_estimate():
    x = X.copy()
    x[17, 1] = 12.0
    fit = matcher().run(KEY, x, progress_bar=False)
    found, verdict = checks._influence(fit)
    assert found.startswith(f"row 17 moves {EVIL}[1] by ") and verdict == "bad"
    square = x[:, 1].astype(float) ** 2 - np.mean(x[:, 1].astype(float) ** 2)  # 1/k̂ is the mean of squares
    share = np.abs(square[17]) / np.linalg.norm(square)
    np.testing.assert_allclose(float(found.split()[5]), share, rtol=0.02)


def test_the_largest_of_a_long_tail_is_no_outlier():
    """Third powers of normal rows, one of which is moved further and further out."""
    rng = np.random.default_rng(0)
    pvalues = [checks.beyond_the_tail(v, int(np.argmax(np.abs(v)))) for v in rng.normal(size=(1000, 400)) ** 3]
    assert np.mean(np.less(pvalues, 0.01)) < 0.01 + 3.1 * (0.01 * 0.99 / 1000) ** 0.5
    values = rng.normal(size=400) ** 3
    found = [checks.beyond_the_tail(np.append(values, far**3), 400) for far in (4.0, 8.0, 16.0)]
    assert found[0] > 0.01 > 1e-3 > found[1] > found[2]
    assert checks.beyond_the_tail(np.ones(50), 0) == 1


def test_moments_of_draws_that_are_not_the_datas():
    """Draws of the fit agree, and those with the second column moved or stretched are found out."""
    fit, one = fitted(), np.array([0.0, 1.0])
    for change, name in ((lambda x: x, None), (lambda x: x + one, "mean"), (lambda x: x * (one + 1), "variance")):
        draws = change(np.random.default_rng(1).normal(X.mean(0), X.std(0), (4, 250, 2)))
        samples = {"posterior": numpyro_score.arviz.dataset({"x": draws}, ("chain", "draw"))}
        found, verdict, _ = checks._moments(fit, samples, KEY)
        assert verdict == ("good" if name is None else "bad")
        assert name is None or f"furthest is the {name} of x[1]" in found
    assert checks._moments(fit, "none were drawn", KEY)[1] == "unknown"


class Draws(NamedTuple):
    """What the check reads of `sample`'s ArviZ data."""

    r_hat: float
    diverging: int

    def __getitem__(self, group):
        if group == "posterior":
            return numpyro_score.arviz.dataset({"x": np.zeros((4, 1000))}, ("chain", "draw"))
        value = {"r_hat": self.r_hat, "ess": 321.4, "sample_stats": self.diverging}[group]
        return numpyro_score.arviz.dataset({"diverging" if group == "sample_stats" else "x": [value]}, ("one",))


@pytest.mark.parametrize(
    ("draws", "verdict"),
    [
        (Draws(1.004, 0), "good"),
        (Draws(1.02, 0), "look"),
        (Draws(1.0, 3), "good"),
        (Draws(1.0, 21), "look"),
        (Draws(np.nan, 0), "look"),
    ],
)
def test_mixing(draws, verdict):
    found, given = checks._mixing(draws)
    assert given == verdict and f"R-hat {draws.r_hat:.3f}" in found and "size 321" in found
    assert (f"{draws.diverging} divergences in 4000" in found) == bool(draws.diverging)


def test_stein_test_tells_data_from_a_wrong_model():
    """Precisions four times those of the data are refused, those of the fit are not."""
    wrong = dataclasses.replace(fitted(), params={**fitted().params, EVIL: 4 * fitted().params[EVIL]})
    assert checks._stein(wrong, KEY)[1] == "look"
    assert checks._stein(fitted(), KEY)[1] == "good"


# -- what cannot be computed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tilted(ISM):
    """<script>alert("a loss")</script>."""

    no_curvature = "it is <i>made up</i>"


def with_offsets(x, z):
    """Rows with densities of their own."""
    k = numpyro.param("k", 1.0)
    numpyro.factor("energy", -0.5 * k * jnp.sum((x - z) ** 2, axis=-1))


def test_reasons_are_given(tmp_path):
    """Of missing standard errors, tests and pictures; the report is written all the same, and all is escaped."""
    fit = ScoreMatching(with_offsets, loss=Tilted(), optim=optax.sgd(0.01), num_steps=5).run(
        KEY, X, 0 * X, progress_bar=False
    )
    read = Reader(report(fit, tmp_path / "fit.html", num_samples=0).read_text())
    assert 'Tilted(): <script>alert("a loss")</script>.' in read.answer("By which loss")
    text = " ".join(read.text)
    assert "No standard errors: Tilted gives no standard errors, as it is <i>made up</i>." in text
    assert "script" not in [name for name, _ in read.tags] and "i" not in [name for name, _ in read.tags]
    assert "Score field over the data: not drawn. plot_score_field draws one density" in text
    assert read.tables[0][1][2] == "–"
    verdicts = {row[0]: row[2] for row in read.tables[1][1:]}
    found = {row[0]: row[1] for row in read.tables[1][1:]}
    assert found["Sandwich eigenvalues"].strip() == "as for: Gradient at the end."
    assert verdicts["Gradient at the end"] == verdicts["Draws of the model"] == "? not known"
    assert read.answer("Did it converge?") == "Not known: 5 steps are too few to see a trend."


def test_report_of_an_adversarial_fit(tmp_path):
    """By the trend of the likelihood's bound; there are no standard errors."""
    fit = object.__new__(AdversarialResult)
    noise = np.random.default_rng(0).normal(size=(3, 200))
    fit.__dict__.update(
        params={}, energy=fitted().energy, losses=noise[0], data_term=noise[0], log_partition_bound=noise[1],
        joint_entropy=noise[2], interrupted=False,
    )  # fmt: skip
    read = Reader(report(fit, tmp_path / "fit.html", num_samples=0).read_text())
    assert read.answer("By which loss").endswith("(adversarial dynamics embedding), 200 steps.")
    answer = "As far as can be seen, yes: over the last tenth of 200 steps the data term less bound"
    assert read.answer("Did it converge?").startswith(answer)
    assert [row[2] for row in read.tables[0][1:]] == ["–"] * 3
    assert "Objective by step" in pictures(read)


def test_warnings_are_repeated(tmp_path):
    """What the standard errors warn of is in the report, and not raised."""
    read = Reader(report(moved(fitted(), 9.0), tmp_path / "fit.html", num_samples=0).read_text())
    assert "Warnings on the way" in read.text
    assert any("The fit has not converged: the minimum is" in text for text in read.text)
    assert read.answer("Can it be trusted?").startswith("Not as it is: see Gradient at the end.")


def test_what_is_refused(unchecked, tmp_path):
    with pytest.raises(TypeError, match="report takes a fit or a comparison, got Energy"):
        report(fitted().energy, tmp_path / "fit.html")
    with pytest.raises(ValueError, match="num_samples of at least 4, or 0 for no draws, got 3"):
        report(fitted(), tmp_path / "fit.html", num_samples=3)


# -- in a browser ----------------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome")
LOOK = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom].map(Math.round); };
document.title = JSON.stringify({
  images: [...document.images].map(i => ({alt: i.alt, complete: i.complete, width: i.naturalWidth, box: box(i)})),
  tables: [...document.querySelectorAll("table")].map(t => ({rows: t.rows.length, box: box(t)})),
  answers: [...document.querySelectorAll("dd")].map(box),
  width: document.documentElement.scrollWidth});
</script>"""


def browse(page, *arguments, size=(1280, 800)):
    """Opens a page in a headless browser: what it writes, and what it says on its console."""
    browser = next(filter(None, map(shutil.which, NAMES)))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={size[0]},{size[1]}", *arguments, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measured(path, tmp_path, size):
    """Where a browser puts pictures and tables, by a copy of the page with a script, and a screenshot of the page."""
    copy = tmp_path / "measured.html"
    copy.write_text(path.read_text().replace("</body>", LOOK + "</body>"))
    dom, said = browse(copy, "--dump-dom", size=size)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom).group(1)))
    shot = tmp_path / "shot.png"
    more_said = browse(path, f"--screenshot={shot}", size=size)[1]
    assert not said and not more_said
    return found, plt.imread(shot)[..., :3]


@pytest.mark.browser
@pytest.mark.skipif(
    not any(map(shutil.which, NAMES)), reason="none of chromium, chromium-browser, google-chrome is here"
)
def test_report_in_a_browser(path, read, tmp_path):
    """Pictures and tables are laid out with ink in them; answers, estimates and checks are on the first screen."""
    found, screen = measured(path, tmp_path, (1280, 4000))
    assert [i["alt"] for i in found["images"]] == list(pictures(read))
    assert [t["rows"] for t in found["tables"]] == [len(t) for t in read.tables]
    assert found["width"] == 1280
    for what in found["images"] + found["tables"]:
        left, top, right, bottom = what["box"]
        assert what.get("complete", True) and what.get("width", 1) > 0
        assert right - left > 200 and bottom - top > 40 and bottom < 4000
        assert (screen[top:bottom, left:right].min(axis=-1) < 0.8).mean() > 0.005
    for box in (*found["answers"], *(t["box"] for t in found["tables"][:2])):
        assert box[3] <= 800
    phone, _ = measured(path, tmp_path, (500, 4000))  # the narrowest window that Chromium makes
    assert phone["width"] == 500
