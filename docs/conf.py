"""Settings of the site: ``make site`` builds it into build/site from the pages that GitHub shows as well.

The folder of sources is the repository's, so that a link from one page to another is the same on GitHub and on the
site. docs/index.md is the only list of pages: its tables become the site's table of contents.
"""

import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from slotkernels import __version__
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # `python` of --help's pages
os.environ["COLUMNS"] = "80"
INDEXES = ("docs/index", "docs/develop/decisions/README")
ROW = re.compile(r"^\| (?:\d+ \| )?(\[[^|]*)", re.MULTILINE)  # the first cell with a link
TARGET = re.compile(r"\]\(([^)#]+)\)")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)\)")

project = "Interpreter"
author = "the authors of Interpreter"
copyright = f"{author}, Apache-2.0"
version = release = __version__
language = "en"

extensions = [
    "myst_nb",  # Markdown pages, and notebooks that are executed while the site is built
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings with Args:, Returns: and Raises:
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
    "kernels/*.md",
    "profiling/results/*.md",
    "profiling/results/**/*.md",
]
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


def toctree(pages: Iterable[Path], *options: str) -> str:
    """A hidden table of contents."""
    return "\n".join(["\n```{toctree}", ":hidden:", *options, "", *(f"/{page}" for page in pages), "```\n"])


def children(page: Path) -> list[Path]:
    """Pages that belong to a page: of segment.md, those of the folder segment, and segment_files.md."""
    around = sorted(path.relative_to(ROOT) for path in (ROOT / page).parent.glob("*.md"))

    def parent(path: Path) -> str:
        return max((other.stem for other in around if path.stem.startswith(f"{other.stem}_")), key=len, default="")

    inside = sorted(path.relative_to(ROOT) for path in (ROOT / page).with_suffix("").glob("*.md"))
    return [path for path in around if parent(path) == page.stem] + inside


def list_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append tables of contents: of an index, what its tables list by heading; of any page, its children."""
    page = Path(f"{docname}.md")
    if docname in INDEXES:
        for part in re.split(r"^## ", source[0], flags=re.MULTILINE):
            links = [link for row in ROW.findall(part) for link in TARGET.findall(row)]
            pages = [(ROOT / page.parent / link).resolve().relative_to(ROOT) for link in links]
            listed = [path for path in dict.fromkeys(pages) if path not in nested()]
            caption = part.partition("\n")[0]
            options = [] if caption.startswith("#") else [f":caption: {caption}"]  # the first part has the title
            source[0] += toctree(listed, *options) if listed else ""
    elif docname.startswith("docs/") and (own := children(page)):
        source[0] += toctree(own)


@cache
def nested() -> set[Path]:
    """Pages that are the child of another."""
    return {child for path in (ROOT / "docs").rglob("*.md") for child in children(path.relative_to(ROOT))}


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
