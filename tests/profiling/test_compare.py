"""Comparing two revisions finds what became slower, names what is missing in the base, and leaves no files."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(repository, *arguments):
    names = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(repository), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.fixture
def repository(tmp_path):
    """Three revisions: without merge_slots, with it, and with a merge_slots that computes 400 extra products."""
    where = tmp_path / "repository"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for folder in ("kernels", "profiling", "interpreter"):
        shutil.copytree(ROOT / folder, where / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, where)
    (where / ".gitignore").write_text("__pycache__/\nbuild/\n*.egg-info/\n")
    public, reference = (where / "kernels/slotkernels/merging" / name for name in ("__init__.py", "reference.py"))
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(where))
    whole = public.read_text()
    public.write_text(whole.replace("def merge_slots(", "def merge(").replace(', "merge_slots"]', "]"))
    package = where / "kernels/slotkernels/__init__.py"
    names = package.read_text()
    package.write_text(
        re.sub(r"\n[^\n]*merge_slots[^\n]*", lambda line: line[0].replace("merge_slots", "cluster_slots"), names)
    )
    git(where, "add", "--all")
    git(where, "commit", "--quiet", "-m", "without merge_slots")
    public.write_text(whole)
    package.write_text(names)
    git(where, "commit", "--quiet", "--all", "-m", "with merge_slots")
    edit(
        reference,
        "    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))\n    dropped = labels < 0",
        "    for _ in range(400):\n        torch.bmm(slots, slots.transpose(1, 2)) @ slots\n"
        "    member, sizes = _membership(labels, accumulate_dtype(slots.dtype))\n    dropped = labels < 0",
    )
    git(where, "commit", "--quiet", "--all", "-m", "slower")
    return where


def command(*arguments):
    return [sys.executable, "-m", "profiling.compare", "--device", "cpu", *arguments]


def environment(repository):
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "SLOTKERNELS_BUILD": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def compare(repository, *arguments):
    options = ("--rounds", "1", "--seconds", "0", "--threads", "1", *arguments)
    return subprocess.run(
        command(*options), cwd=repository, env=environment(repository), capture_output=True, text=True, check=False
    )


def leftovers(repository):
    return git(repository, "worktree", "list").splitlines()[1:] + git(repository, "status", "--porcelain").splitlines()


def first_match(pattern, text):
    """What the first group of a pattern matches."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


@pytest.mark.slow
def test_a_planted_slowdown_is_found_and_nothing_else(repository):
    done = compare(repository, "--base", "HEAD~1", "--threshold", "15", "--only", "merge_slots")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 1 slower by more than 15×" in done.stdout
    assert float(first_match(r"float32 +│ +\S+ │ +\S+ │ +(\S+) │", done.stdout)) > 15
    assert leftovers(repository) == []
    assert not Path(first_match(r"into (\S+)", done.stdout)).exists()

    edit(repository / "kernels/slotkernels/merging/reference.py", "range(400)", "range(0)")
    done = compare(repository, "--base", "HEAD~1", "--threshold", "15", "--only", "merge_slots")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_what_the_base_lacks_is_named_and_left_out(repository):
    done = compare(repository, "--base", "HEAD~2", "--threshold", "100", "--only", "merge_slots", "propagate_attention")
    assert re.search(r"left out: merge_slots: base: ImportError: cannot import name 'merge_slots'", done.stdout)
    assert "0 of 1 slower" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    assert leftovers(repository) == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(repository, kind):
    arguments = command("--base", "HEAD~1", "--only", "merge_slots")
    with subprocess.Popen(
        arguments, cwd=repository, env=environment(repository), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        checkout = Path(first_match(r"into (\S+)", process.stdout.readline()))
        assert checkout.is_dir()
        process.send_signal(kind)
        process.wait(60)
    assert process.returncode == 130
    assert not checkout.parent.exists()
    assert leftovers(repository) == []
    assert (repository / "profiling/compare.py").exists()


def test_an_unknown_revision_is_one_line(repository):
    done = compare(repository, "--base", "nowhere")
    assert done.returncode == 1
    assert re.fullmatch(r"git rev-parse --verify nowhere\S*: fatal: Needed a single revision\n", done.stderr)
