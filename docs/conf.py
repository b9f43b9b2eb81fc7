"""Settings of the site: ``make site`` builds it into build/site from the pages that GitHub shows as well.

The folder of sources is the repository's, so that a link from one page to another is the same on GitHub and on the
site. docs/index.md is the only list of pages: its tables become the site's table of contents.
"""

import os
import re
import sys
from pathlib import Path

from slotkernels import __version__
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # `python` of --help's pages
os.environ["COLUMNS"] = "100"
INDEXES = ("docs/index", "docs/develop/decisions/README")
ROW = re.compile(r"^\| (?:\d+ \| )?\[[^\]]*\]\((?P<page>[^)#]+)\)")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)\)")
HEADING = re.compile(r"^## (?P<title>.*)")

project = "Interpreter"
author = "the authors of Interpreter"
copyright = f"{author}, Apache-2.0"
version = release = __version__
language = "en"

extensions = [
    "myst_nb",  # Markdown pages, and notebooks that are executed while the site is built
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings with Args:, Returns: and Raises:
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",  # --help of the commands
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/*.md",
    "examples/*.ipynb",
    "csrc/*.md",
]
include_patterns += ["profiling/results/**/*.md", "profiling/results/*.md"]
exclude_patterns = [f"{path.name}/**" for path in ROOT.iterdir() if path.name.startswith(".")]
exclude_patterns += ["build/**", "demo/**", "runs/**", "dist/**", "shared/**"]

myst_heading_anchors = 4  # GitHub's anchors: page.md#a-heading
myst_enable_extensions = ["deflist"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_title = f"Interpreter {release}"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def list_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append a hidden table of contents to an index: a caption for each heading, a page for each row of its tables."""
    if docname not in INDEXES:
        return
    folder, caption = (ROOT / docname).parent, ""
    trees: dict[str, list[str]] = {}
    for line in source[0].splitlines():
        if heading := HEADING.match(line):
            caption = heading["title"]
        elif row := ROW.match(line):
            page = (folder / row["page"]).resolve().relative_to(ROOT)
            trees.setdefault(caption, []).append("/" + str(page.with_suffix("")))
    for title, pages in trees.items():
        options = [":hidden:", f":caption: {title}" if title else ":glob:"]
        source[0] += "\n".join(["\n```{toctree}", *options, "", *pages, "```\n"])


def fit_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adapt what only GitHub can show: a link to a folder becomes text; a report of results has no place in a table."""

    def link(match: re.Match[str]) -> str:
        is_folder = (ROOT / docname).parent.joinpath(match["target"]).is_dir()
        return match["text"] if is_folder else match[0]

    source[0] = LINK.sub(link, source[0])
    if docname.startswith("profiling/results/"):
        source[0] = "---\norphan: true\n---\n" + source[0]


def open_at_the_root(app: Sphinx, exception: Exception | None) -> None:
    """Write the index.html of the whole site, which leads to that of docs."""
    if exception is None and app.builder.format == "html":
        target = f"{root_doc}.html"
        text = f'<!doctype html><meta http-equiv="refresh" content="0; url={target}"><a href="{target}">{project}</a>\n'
        Path(app.outdir, "index.html").write_text(text)


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", list_pages)
    app.connect("source-read", fit_the_site)
    app.connect("build-finished", open_at_the_root)
