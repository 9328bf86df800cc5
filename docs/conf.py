"""Settings of the book that ``make book`` builds: README, course, guides, reports and reference as one static site.

The source folder is the repository itself, so that links between files are the same here as in a checkout.
"""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
release = version = _PROJECT["version"]
author = project_copyright = _PROJECT["authors"][0]["name"]

root_doc = "docs/index"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "docs/**.md", "notebooks/*.md", "notebooks/*.ipynb", "benchmarks/results/**.md", "rfsr_ext/weights/README.md",
    "tests/soak/results.md",
]  # fmt: skip
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.githubpages",
              "sphinx_copybutton", "myst_nb"]  # fmt: skip

html_theme = "furo"
html_title = f"{project} {release}"
html_extra_path = ["site"]  # the site opens at its front page
html_baseurl = os.environ.get("BOOK_URL", "")

nb_execution_mode = "off"  # the stored outputs are what the tests compare with
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # reports begin with small headings
copybutton_exclude = ".linenos, .gp"

default_role = "py:obj"  # `rfsr_ext.losses.HaarLLLoss` in a docstring is a link
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # what torch says of every forward() helps nobody
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
