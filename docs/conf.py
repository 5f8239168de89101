"""The documentation site: `sphinx-build -W docs build/site`. Its pages can be read without Sphinx, too."""

import re
from importlib import import_module

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import tricorn

project = "Tricorn"
author = "The Tricorn authors"
copyright = f"2026, {author}"
version = release = tricorn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"Tricorn {release}"
html_copy_source = False

myst_heading_anchors = 4  # links between pages name headings, as forges do
myst_enable_extensions = ["colon_fence"]

default_role = "code"  # docstrings write code between single backquotes
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True

PUBLIC = ("tricorn", "tricorn.testing", "tricorn.chat")  # whose `__all__` says what is public


def check_reference(app: Sphinx, environment: BuildEnvironment) -> None:
    """Fail if the reference lacks a public name."""
    described = {name for name, *_ in environment.domains["py"].get_objects()}
    names = [f"{module}.{name}" for module in PUBLIC for name in import_module(module).__all__]
    if missing := [name for name in names if name not in described]:
        raise ExtensionError(f"the API reference lacks {', '.join(missing)}")


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Make links to Markdown files outside docs/ links to files, since they are no pages of the site."""
    if "/" not in page:
        source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    for language in ("haproxy", "caddyfile"):  # which Pygments does not know
        app.add_lexer(language, TextLexer)
    app.connect("source-read", link_files)
    app.connect("env-check-consistency", check_reference)
