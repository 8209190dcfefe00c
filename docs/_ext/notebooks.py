"""Tutorials as notebooks to take along: each page links to its own, outputs and all, and to Colab."""

from pathlib import Path

import nbformat
from myst_nb.sphinx_ import NbMetadataCollector

LINKS = """<div class="notebook-links"><a download href="{here}">Download this notebook</a>{colab}</div>"""
COLAB = """ <a href="{}">Open it in Colab</a>"""
FIRST = """*Needs numpyro-score and more: `pip install 'numpyro-score[examples,scale]' statsmodels`. Until the first
release, that is `pip install '.[examples,scale]' statsmodels` in a copy of the repository.*"""


def executed(env):
    """Names of pages with cells that ran, and how many seconds each took."""
    known = NbMetadataCollector.get_doc_data(env).items()
    return {name: data["exec_data"] for name, data in known if "exec_data" in data}


def add_links(app, pagename, templatename, context, doctree):
    """Below the title."""
    if pagename in executed(app.env) and app.builder.name == "html":
        name = f"{pagename}.ipynb"
        where = f"https://colab.research.google.com/github/{app.config.repository}/blob/{app.config.notebook_branch}"
        colab = COLAB.format(f"{where}/{name}") if app.config.repository else ""
        links = LINKS.format(here=name.rpartition("/")[-1], colab=colab)
        before, title, after = context["body"].partition("</h1>")
        context["body"] = before + title + links + after


def write(app, exception):
    """The notebooks beside the pages, and on the terminal what ran."""
    if exception is None and app.builder.name == "html":
        for name, data in sorted(executed(app.env).items()):
            book = nbformat.read(Path(app.outdir).parent / "jupyter_execute" / f"{name}.ipynb", as_version=4)
            book.cells.insert(0, nbformat.v4.new_markdown_cell(FIRST))
            cells = [cell for cell in book.cells if cell.cell_type == "code"]
            for number, cell in enumerate(cells, 1):  # which the cache forgets
                cell.execution_count = number
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = number
            nbformat.write(book, Path(app.outdir) / f"{name}.ipynb")
            print(f"{name}: {len(cells)} cells, executed in {data['runtime']:.0f} s")


def setup(app):
    app.add_config_value("repository", None, "html", [str])
    app.add_config_value("notebook_branch", "notebooks", "html", [str])
    app.connect("html-page-context", add_links)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
