"""HTML of one self-contained page: all text escaped, pictures inline, no script, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Markup", "page", "picture", "table", "tag"]


class Markup(str):
    """Text that is HTML already; all other text is escaped."""


def tag(element: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes whose names are Python's keywords are written with an underscore, `class_`."""
    written = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items())
    inside = "" if element in _VOID else f"{_escaped(children)}</{element}>"
    return Markup(f"<{element}{written}>{inside}")


def _escaped(children: Iterable[Any]) -> str:
    return "".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children)


_VOID = ("br", "img", "meta")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> Markup:
    """A table; `numbers` are the columns that are aligned to the right."""
    sides = [{"class_": "number"} if i in numbers else {} for i in range(len(head))]

    def line(cell: str, values: Sequence[Any]) -> Markup:
        return tag("tr", *(tag(cell, v, **side) for v, side in zip(values, sides, strict=True)))

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", line("th", head)), body), class_="wide")


def picture(figure: Any, caption: str, *, broad: bool = False) -> Markup:
    """A Matplotlib figure as a PNG inside the page; a broad one takes all columns."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = tag("img", src=source, alt=caption, decoding="sync")
    return tag("figure", image, tag("figcaption", caption), **({"class_": "broad"} if broad else {}))


def page(title: str, *body: Markup) -> str:
    """The whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", *body), lang="en") + "\n"


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; color: #111; max-width: 76rem; margin: 0.8rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; margin: 0 0 0.5rem; }
h2 { font-size: 1.1rem; margin: 1rem 0 0.3rem; }
p { margin: 0.3rem 0; }
dd, li, p { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 2rem;
  grid-auto-flow: dense; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.5rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
th { border-bottom-color: #111; }
.number { text-align: right; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.good { color: #00644b; }
.look { color: #8a5a00; }
.bad { color: #a33b00; }
.unknown, .note { color: #555; }
figure { margin: 0.5rem 0; }
.broad { grid-column: 1 / -1; max-width: 60rem; }
img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: 0.93em; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: 0.3rem; } }
@media print { body { font-size: 10pt; max-width: none; margin: 0; } figure, tr { break-inside: avoid; } }
"""
