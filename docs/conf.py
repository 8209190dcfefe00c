"""Sphinx configuration. Build with `make docs`; warnings are errors there."""

import typing

typing.GENERATING_DOCUMENTATION = True  # jaxtyping then writes Float[...], not jaxtyping.Float[...]

import numpyro_score  # noqa: E402

project = "numpyro-score"
author = "the numpyro-score developers"
copyright = "2026, the numpyro-score developers"
release = numpyro_score.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or "Attributes:" would describe dataclass fields a second time

doctest_global_setup = """
import numpyro
numpyro.set_platform("cpu")
"""


def skip_namedtuple_fields(app, what, name, obj, skip, options):
    """Leave out "Alias for field number 0": the class's docstring describes its fields."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def shorten_array(app, what, name, obj, options, signature, return_annotation):
    """Write jax.Array under the name that it is annotated with."""
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, return_annotation))


def setup(app):
    app.connect("autodoc-process-signature", shorten_array)
    app.connect("autodoc-skip-member", skip_namedtuple_fields)
