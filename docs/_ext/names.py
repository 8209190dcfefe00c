"""The directive `names`: a table of what is named, with first sentences, and then the documentation of each."""

import importlib
import inspect

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


class Names(SphinxDirective):
    """Names of numpyro_score, or of one of its rooms as `losses.Loss`. What a subclass inherits is left out."""

    has_content = True

    def run(self):
        names = " ".join(self.content).split()
        lines = [".. currentmodule:: numpyro_score", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        for name in names:
            *room, last = name.split(".")
            thing = getattr(importlib.import_module(".".join(["numpyro_score", *room])), last)
            kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
            lines += [f".. auto{kind}:: numpyro_score.{name}"]
            if kind == "class" and not issubclass(thing, Exception):
                lines += ["   :members:", "   :exclude-members: " + ", ".join(INTERNAL)]
            lines += [""]
        container = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.get_source_info()[0]), self.content_offset, container)
        return container.children


# What the package's own parts ask of each other.
INTERNAL = [
    "advance", "check", "declare", "of_batches", "rows_per_chunk", "settle", "tree_flatten", "tree_unflatten",
]  # fmt: skip


def setup(app):
    app.add_directive("names", Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
