"""Sphinx: `make docs` builds the pages to docs/_build; a warning, such as a broken link, is an error."""

import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from trl_sppo import __version__


project = "trl-sppo"
release = version = __version__
copyright = "the trl-sppo authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"trl-sppo {version}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = True
default_role = "code"  # docstrings write code as Markdown does, between single backticks
autodoc_typehints = "none"  # docstrings say more
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Raises", "returns_style")]  # in whole sentences
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_preprocess_types = False


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written as TRL's: Markdown, for which autodoc knows no other way than this."""
    text = "\n".join(lines)
    # [`SPPOConfig`] and [`~trl.GRPOConfig`] are names
    text = re.sub(r"\[`~?([\w.]+)`\]", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    text = re.sub(r"^( *)> \[!NOTE\]$", r"\1.. note::\n", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)> ?", r"\1   ", text, flags=re.MULTILINE)
    # A list begins after an empty line
    text = re.sub(r"^( *)((?!- )\S.*:)\n(?=\1- )", r"\1\2\n\n", text, flags=re.MULTILINE)
    # Doctests need no fence, other code is a literal block
    text = re.sub(r"```python\n(\s*>>>.*?)\n\s*```", r"\1", text, flags=re.DOTALL)
    text = re.sub(
        r"^( *)```python\n(.*?)\n *```",
        lambda match: f"{match[1]}.. code-block:: python\n\n" + re.sub(r"^(?=.)", "   ", match[2], flags=re.MULTILINE),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    lines[:] = text.splitlines()


def setup(app):
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before Napoleon
