"""Whether the pages in docs/_build/html work, in a browser where there is one, and the script that one of them shows.

`make docs` runs it after the build.
"""

import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest

SITE = Path(__file__).parent / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TUTORIALS = [
    "first_fit", "regression", "hierarchies", "two_moons", "kl_and_fisher", "diffusion_prior", "to_the_cluster"
]  # fmt: skip
PHONE = 390  # pixels


class Page(HTMLParser):
    """Links, anchors, what is loaded, and names in the text that were meant as links to the API and are none."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.anchors, self.loaded, self.dangling, self.open = path, [], {""}, [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.update(filter(None, [found.get("id"), found.get("name") if tag == "a" else None]))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif "src" in found or (tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload")):
            self.loaded.append(found.get("src") or found.get("href"))
        if "xref py" in (found.get("class") or "") and "a" not in self.open:
            self.dangling.append(self.getpos())
        if tag not in ("br", "col", "hr", "img", "input", "link", "meta", "path", "source", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


@functools.cache
def pages():
    return {path.relative_to(SITE).as_posix(): Page(path) for path in sorted(SITE.rglob("*.html"))}


def test_every_link_inside_leads_somewhere():
    broken = []
    for name, page in pages().items():
        for link in page.links + page.loaded:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:|//", target) or link == "#":
                continue
            path = (page.path.parent / unquote(target.partition("?")[0])).resolve() if target else page.path
            if path.is_dir():
                path /= "index.html"
            key = path.relative_to(SITE).as_posix() if path.is_relative_to(SITE) else ""
            if not path.exists() or (key in pages() and unquote(anchor) not in pages()[key].anchors):
                broken.append((name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere():
    assert not [(name, url) for name, page in pages().items() for url in page.loaded if re.match(r"https?:|//", url)]


def test_every_name_leads_to_the_reference():
    """A role such as {func}`~numpyro_score.sample` that finds nothing is shown as code, and no warning says so."""
    dangling = {name: page.dangling for name, page in pages().items() if not name.startswith("api/")}
    assert not any(dangling.values()), dangling


def test_script_for_many_machines(tmp_path):
    """That of howto/devices, in two processes of this machine: the first prints the estimates of all rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (SITE.parents[1] / "howto" / "fit.py").read_text()
    assert text.count("12345") == 1
    (tmp_path / "fit.py").write_text(text.replace("12345", str(port)))
    for rank in range(2):
        rows = np.random.default_rng(rank).uniform(-1, 1, (200, 2))
        np.save(tmp_path / f"part-{rank}.npy", rows.astype(np.float32))
    jobs = [
        subprocess.Popen([sys.executable, "fit.py", str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        printed = [job.communicate(timeout=200)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0]
    assert ["'k': Array(" in text for text in printed] == [True, False]


# -- in a browser ----------------------------------------------------------------------------------------

WALK = """<!doctype html><title>walk</title><body><script>
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open(url, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = url;
  document.body.append(frame);
  await loaded;
  await frame.contentDocument.fonts.ready;
  return frame;
}
function wide(inside, width) {  // what sticks out, of what does not scroll in a box of its own
  const clips = e => getComputedStyle(e).overflowX !== "visible";
  const scrolls = e => e && e !== inside.body && (clips(e) || scrolls(e.parentElement));
  return [...inside.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.right > width + 1 && box.left < width && !scrolls(e.parentElement);
  }).slice(0, 3).map(e => `${e.tagName}.${e.className}`);
}
async function look(url) {
  const frame = await open(url, PHONE), inside = frame.contentDocument;
  for (const image of inside.images) image.loading = "eager";
  await Promise.all([...inside.images].map(image => image.decode().catch(() => 0)));
  const found = {
    width: inside.documentElement.scrollWidth,
    wide: wide(inside, PHONE),
    math: inside.querySelectorAll(".math").length,
    rendered: inside.querySelectorAll(".math .katex-html").length,
    images: [...inside.images].filter(image => image.naturalWidth === 0).map(image => image.src),
    cells: inside.querySelectorAll(".cell_input").length,
    outputs: inside.querySelectorAll(".cell_output").length,
    failed: inside.querySelectorAll(".output_error, .katex-error, .system-message").length,
    text: parseFloat(inside.defaultView.getComputedStyle(inside.querySelector("article p") || inside.body).fontSize),
  };
  frame.remove();
  return found;
}
async function search(word) {
  const frame = await open("/search.html?q=" + encodeURIComponent(word), 1200);
  const summary = () => frame.contentDocument.querySelector("#search-results .search-summary");
  for (let i = 0; i < 100 && !/found|did not match/i.test(summary()?.textContent || ""); i++) await wait(100);
  const links = [...frame.contentDocument.querySelectorAll("#search-results li > a")];
  const found = links.map(a => new URL(a.href).pathname.slice(1));
  frame.remove();
  return found;
}
(async () => {
  const found = {pages: {}, search: {}};
  for (const page of PAGES) found.pages[page] = await look("/" + page);
  for (const word of WORDS) found.search[word] = await search(word);
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""

# What is searched for, and the page that should be found.
WORDS = {
    "save": "howto/save", "resume": "howto/resume", "GPU": "howto/gpu", "missing": "howto/missing",
    "hierarchy": "tutorials/hierarchies", "discrete": "discrete", "kernel": "kernels", "ISM": "api/losses",
}  # fmt: skip


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/walk.html":
            return super().do_GET()
        given = {"PAGES": list(pages()), "WORDS": list(WORDS), "PHONE": PHONE}
        lines = [f"const {name} = {json.dumps(value)};\n" for name, value in given.items()]
        text = WALK.replace("<script>", "<script>" + "".join(lines))
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_request(self, code="-", size="-"):
        self.server.answers.append((self.path, int(code)))

    def log_error(self, *arguments):
        pass


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """What a browser found on every page at the width of a phone, what it asked for, and what its console said."""
    if BROWSER is None:
        pytest.skip("none of chromium, chromium-browser, google-chrome is here")
    handler = functools.partial(Handler, directory=os.fspath(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.answers, server.done, server.found = [], threading.Event(), None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = tmp_path_factory.mktemp("browser")
        with (folder / "log").open("w") as log:
            browser = subprocess.Popen(
                [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}",
                 "--window-size=1280,900", "--remote-debugging-port=0",
                 f"http://127.0.0.1:{server.server_port}/walk.html"], stderr=log,
            )  # fmt: skip
            assert server.done.wait(600), (folder / "log").read_text()[-2000:]
            browser.terminate()
            browser.wait(30)
        server.shutdown()
    said = [line for line in (folder / "log").read_text().splitlines() if ":CONSOLE" in line]
    return server.found, server.answers, said


def test_no_request_fails(walked):
    _, answers, said = walked
    assert not said
    assert not [answer for answer in answers if answer[1] >= 400 and answer[0] != "/favicon.ico"]


def test_pages_fit_a_phone(walked):
    """No page scrolls sideways, its text is of 14 pixels or more, and every picture is there."""
    for name, page in walked[0]["pages"].items():
        assert page["width"] <= PHONE, (name, page)
        assert page["text"] >= 14 and not page["images"], (name, page)


def test_mathematics_is_set(walked):
    found = walked[0]["pages"]
    assert sum(page["math"] for page in found.values()) > 100
    assert not [name for name, page in found.items() if page["rendered"] != page["math"] or page["failed"]]


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_show_what_they_printed(walked, name):
    page = walked[0]["pages"][f"tutorials/{name}.html"]
    assert page["outputs"] >= 5 and page["cells"] >= page["outputs"]
    book = json.loads((SITE / "tutorials" / f"{name}.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert str(SITE.parents[2]) not in json.dumps(book)  # no folders of this machine


@pytest.mark.parametrize("word", WORDS)
def test_search_finds(walked, word):
    """What is searched for is on the page about it, among the first ten."""
    found = walked[0]["search"][word]
    assert any(WORDS[word] in path for path in found[:10]), found[:10]
