"""How the guide becomes a site, by `make docs`: pages are Markdown, and reference pages are read out of the code meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from exmy.version import __version__  # noqa: E402

project = "exmy"
author = "the authors of exmy"
copyright = "the authors of exmy; Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "sphinx_copybutton",
    "docs.site_extension",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes = False  # options begin with two minus signs
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "remove"  # what libraries say of fonts and the like
nb_render_text_lexer = "none"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "exmy"
html_copy_source = False
html_show_sphinx = False
