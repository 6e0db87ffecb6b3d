"""Sphinx configuration: MyST pages, Google docstrings with $...$ maths, warnings as errors."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "pvi"
author = "the pvi authors"
copyright = author
release = installed_version("pvi")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "code"  # `name` in a docstring is code, as in Markdown
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "pvi"


def dollar_maths(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn $$...$$ and $...$ of a docstring, as Markdown writes them, into Sphinx's maths."""
    text = "\n".join(lines)
    text = re.sub(r"^( *)\$\$(.+?)\$\$", _display, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<![\\$`])\$(?!\s)([^$`]+?)(?<!\s)\$(?!\$)", _inline, text)
    lines[:] = text.split("\n")


def _display(match: re.Match[str]) -> str:
    indent, maths = match.groups()
    return f"\n{indent}.. math:: {' '.join(maths.split())}\n\n{indent}"


def _inline(match: re.Match[str]) -> str:
    return f":math:`{' '.join(match[1].split())}`"


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what estimators have from scikit-learn, whose text refers to its own pages."""
    return True if str(getattr(obj, "__module__", "")).startswith("sklearn.") else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", dollar_maths)
