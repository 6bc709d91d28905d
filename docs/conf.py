"""Sphinx settings."""

project = "Folo"
author = "The Folo authors"
copyright = "The Folo authors"  # noqa: A001 (Sphinx's name)
version = release = "0.1.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Signatures name classes of torch and of the standard library, whose pages are elsewhere.
nitpick_ignore_regex = [("py:.*", r".*")]

html_theme = "furo"
html_title = "Folo"
