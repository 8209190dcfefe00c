"""The builder `examples`: Sphinx's doctest builder, which also says of each page how long its examples took."""

import time

from sphinx.ext.doctest import DocTestBuilder


class Examples(DocTestBuilder):
    name = "examples"

    def test_doc(self, docname, doctree):
        begin, before = time.perf_counter(), self.total_tries
        passed = super().test_doc(docname, doctree)
        if self.total_tries > before:
            took = time.perf_counter() - begin
            self._out(f"{docname}: {self.total_tries - before} examples, executed in {took:.0f} s\n")
        return passed


def setup(app):
    app.add_builder(Examples)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
