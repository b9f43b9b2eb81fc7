"""The pages name only files, headings, commands, options and make targets that exist."""

import contextlib
import importlib
import io
import os
import re
import runpy
import unittest.mock
from functools import cache
from pathlib import Path

import pytest
import slotkernels

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "examples/*.md", "csrc/*.md", "kernels/*.md", "docs/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"(?:python|PY\)|-m --) (?:-m )?((?:interpreter|profiling)(?:\.\w+)+)")
COMMANDS = "train|segment|propagate|evaluate|cache|data|app|hub|export|convert_checkpoint"
COMMAND = re.compile(rf"(?:-m |-m -- |^)interpreter[. ]({COMMANDS})\b(?!\.)(.*)")


def anchors(text):
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@cache
def help_of(command, *arguments):
    """Everything that ``--help`` of a command prints."""
    is_package = command in ("data", "app", "export", "hub")
    module = f"interpreter.{command}.__main__" if is_package else f"interpreter.{command}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as exit_:
        importlib.import_module(module).main([*arguments, "--help"])
    assert exit_.value.code == 0
    return printed.getvalue()


def method_of(name):
    """``--method`` and the method that a page of docs/methods explains: the longest name that the file's begins with.

    >>> method_of("docs/methods/slot_contrast_paper.md")
    ['--method', 'slot-contrast']
    """
    stem = Path(name).stem.replace("_", "-")
    methods = importlib.import_module("interpreter.methods").METHODS
    named = [method for method in methods if stem.startswith(method)]
    return ["--method", max(named, key=len)] if named else []


def command_lines(text):
    """(command, rest of the line) of every line in a code block that starts one; continued lines are joined."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if (match := COMMAND.search(line.split("  #")[0])) and "COMMAND" not in line:
                yield match[1], match[2]


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_page_lead_to_files_and_headings(name):
    page = ROOT / name
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_modules_scripts_and_targets_of_a_page_exist(name):
    text = (ROOT / name).read_text()
    modules = {module.replace(".", "/") for module in MODULE.findall(text)}
    missing = {m for m in modules if not any((ROOT / f"{m}{end}").exists() for end in (".py", "/__main__.py"))}
    missing |= {s for s in re.findall(r"`?(profiling/[\w/]+\.sh)", text) if not (ROOT / s).exists()}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing |= {f"make {t}" for t in re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.MULTILINE)} - {
        f"make {t}" for t in targets
    }
    assert missing == set()


@pytest.mark.parametrize("name", [name for name in NAMES if any(command_lines((ROOT / name).read_text()))])
def test_options_of_the_commands_on_a_page_exist(name):
    unknown = []
    for command, rest in command_lines((ROOT / name).read_text()):
        words = rest.split()
        arguments = words[:1] if command in ("data", "hub") else []
        for option in {"train": ("--method", "--stage"), "segment": ("--method",)}.get(command, ()):
            if option in words:  # the other options depend on it
                arguments += [option, words[words.index(option) + 1]]
        if command in ("segment", "evaluate") and "--method" not in words and name.startswith("docs/methods/"):
            arguments += method_of(name)  # that of the run, whose settings are options
        known = set(re.findall(r"--[a-z][\w-]*", help_of(command, *arguments)))
        unknown += [f"{command} {word}" for word in words if word.startswith("--") and word.split("=")[0] not in known]
    assert unknown == []


def site():
    """The settings of the site, as Sphinx executes them."""
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    with unittest.mock.patch.dict(os.environ):  # it sets PATH and COLUMNS
        return runpy.run_path(str(ROOT / "docs/conf.py"))


def links_of(page):
    """Files that a page links to."""
    return {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", page.read_text())}


def test_index_lists_every_page():
    """A page that belongs to another by its name, as segment_files.md to segment.md, is linked from that page."""
    index, children = links_of(ROOT / "docs/index.md"), site()["children"]
    pages = {path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "decisions"}
    listed = index | {ROOT / "docs/index.md"}
    for page in pages:
        listed |= links_of(page) & {ROOT / child for child in children(page.relative_to(ROOT))}
    assert {str(page.relative_to(ROOT)) for page in pages - listed} == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_page_has_at_most_120_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 120


def test_changelog_begins_with_the_version_of_the_code():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == slotkernels.__version__


def test_every_decision_is_listed_and_numbered():
    folder = ROOT / "docs" / "develop" / "decisions"
    pages = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [int(name[:3]) for name in pages] == list(range(1, len(pages) + 1))
    listed = re.findall(r"^\| (\d+) \| \[(.*)\]\((.*)\) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [file for _, _, file in listed] == pages
    for number, title, file in listed:
        assert (folder / file).read_text().startswith(f"# {number}. {title}\n")


def test_commands_of_the_script_are_those_of_the_pages():
    commands = importlib.import_module("interpreter.__main__").COMMANDS
    used = {command for name in NAMES for command, _ in command_lines((ROOT / name).read_text())}
    assert used == set(commands)
