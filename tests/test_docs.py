"""What the documentation must keep to, as far as its source tells; docs/check_site.py looks at what is built."""

import re
from pathlib import Path

import pytest

import numpyro_score

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_all_code_is_executed(path):
    """Python stands in doctests, in code that Sphinx's doctest runs, or in the cells of a tutorial."""
    kinds = set(re.findall(r"^ *```+ *([^\s`]+)", path.read_text(), flags=re.MULTILINE))
    executed = {"{doctest}", "{testcode}", "{testsetup}", "{testoutput}", "{code-cell}"}
    others = {"{eval-rst}", "{toctree}", "{include}", "{literalinclude}", "{figure}", "{bibliography}", "console"}
    assert kinds <= executed | others
    if "{code-cell}" in kinds:
        assert path.read_text().startswith("---\nfile_format: mystnb\n") and "{doctest}" not in kinds


def test_every_public_name_is_in_the_reference_once():
    listed = []
    for path in DOCS.glob("api/*.md"):
        for block in re.findall(r"\.\. names::\n\n(.*?)```", path.read_text(), flags=re.DOTALL):
            listed += block.split()
    assert len(listed) == len(set(listed))
    assert {name for name in listed if "." not in name} == set(numpyro_score.__all__)


def test_every_example_is_in_the_gallery():
    """With a page, a small picture, its figures and its code."""
    gallery, root = (DOCS / "gallery.md").read_text(), DOCS.parent / "examples"
    for name in (path.stem for path in root.glob("*.py")):
        page = (DOCS / "gallery" / f"{name}.md").read_text()
        assert f":img-top: images/thumbs/{name}.png" in gallery and f"{name}.py\n" in page
        for path in (DOCS / "images" / "thumbs" / f"{name}.png", root / "results" / f"{name}.png"):
            assert path.exists(), path
        assert (DOCS / "images" / "thumbs" / f"{name}.png").stat().st_size < 80_000
