"""Settings of Sphinx. `tools/docs.py` lays pages and notebooks out as the repository has them, and calls it.

Sphinx with MyST-NB, not MkDocs with Material: it shows stored outputs of notebooks as they are, reads
docstrings, stops at a link that leads nowhere (`-W`), and both are maintained.
"""

import re

from fastcore.docments import docments

from loftr_curriculum import __version__

project = "loftr_curriculum"
author = "loftr_curriculum contributors"
copyright = "loftr_curriculum contributors, Apache-2.0"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
html_theme = "furo"
html_title = f"loftr_curriculum {version}"
html_theme_options = {"navigation_with_keys": True}

# stored outputs are shown, nothing is run
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "myst.header",  # notebooks may begin a part with a small heading
    "mystnb.unknown_mime_type",  # pictures follow the widgets that no page can show
]
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False


def in_rst(text: str) -> str:
    """A docstring of ours, plain text with `names`, as reStructuredText."""
    parts = re.split(r"(`[^`\n]+`)", text)
    plain = [re.sub(r"([*|\\_])", r"\\\1", part) for part in parts[::2]]
    names = [f"`{part}`" for part in parts[1::2]]
    return "".join(one + other for one, other in zip(plain, [*names, ""]))


def parameters_of(thing) -> list[str]:
    """A field for every parameter whose comment says what it is."""
    found = docments(thing, returns=True)
    told = [
        f":param {name}: {in_rst(str(text))}" for name, text in found.items() if text and name != "return"
    ]
    if found.get("return"):
        told.append(f":returns: {in_rst(str(found['return']))}")
    return [line.replace("\n", " ") for line in told]


def explain(app, what, name, thing, options, lines):
    """Docstrings in our way of writing, with the comments of the parameters."""
    lines[:] = [in_rst(line) for line in lines]
    if what in ("function", "method"):
        try:
            lines += ["", *parameters_of(thing)]
        except (OSError, TypeError, ValueError, AttributeError):
            return


def setup(app):
    app.connect("autodoc-process-docstring", explain)
