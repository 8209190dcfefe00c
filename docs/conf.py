"""Sphinx configuration. Build with `make docs`; warnings are errors there."""

import hashlib
import importlib.metadata
import os
import sys
import typing
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
typing.GENERATING_DOCUMENTATION = True  # jaxtyping then writes Float[...], not jaxtyping.Float[...]

# What runs here runs briefly, so that most of its time is that of compiling: see tests/conftest.py. Set before JAX is
# loaded, for the examples in the text, and for the tutorials, whose processes find it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = "--xla_backend_optimization_level=1"
if importlib.metadata.version("jax").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)
# How the tutorials' processes show warnings: without the folders of this machine, and without two that are not ours.
startup = HERE / "_build" / "ipython" / "profile_default" / "startup" / "warnings_of_tutorials.py"
startup.parent.mkdir(parents=True, exist_ok=True)
startup.write_text(
    "import warnings\n"
    "warnings.formatwarning = lambda message, category, *place: f'{category.__name__}: {message}\\n'\n"
    "warnings.filterwarnings('ignore', message='IProgress not found')\n"
    "warnings.filterwarnings('ignore', message=r'\\s*ArviZ is undergoing', category=FutureWarning)\n"
)
os.environ["IPYTHONDIR"] = str(startup.parents[2])

import numpyro_score  # noqa: E402

project = "numpyro-score"
author = "the numpyro-score developers"
copyright = "2026, the numpyro-score developers"
release = numpyro_score.__version__

# owner/name on GitHub, whose runners say it: then the tutorials have links to Colab, which opens the notebooks from a
# branch of that repository where .github/workflows/docs.yml puts them.
repository = os.environ.get("GITHUB_REPOSITORY")
notebook_branch = "notebooks"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "examples",
    "names",
    "notebooks",
    "offline_math",
]
exclude_patterns = ["_build", "_ext", "_static"]
html_math_renderer = "katex"
html_theme = "furo"
html_title = "numpyro-score"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

# Outputs of tutorials are kept for as long as neither they nor the package change.
sources = sorted((HERE.parent / "numpyro_score").rglob("*.py"))
version_of_code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "executed" / version_of_code)
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "plain"

copybutton_exclude = ".linenos, .gp, .go"  # prompts and what was printed

autodoc_member_order = "bysource"
autosummary_generate = False
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or "Attributes:" would describe dataclass fields a second time


# Each page's examples run in a folder of their own.
doctest_global_setup = """
import os, tempfile
os.chdir(tempfile.mkdtemp())
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
