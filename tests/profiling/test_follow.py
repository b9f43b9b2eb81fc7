"""Commands of a page run as they are written: in one shell, up to the first failure, with what they install."""

import subprocess
import sys

import pytest

from profiling.common.paths import ROOT
from profiling.follow import follow, main, script

PAGE = """# Title
```bash
name=value
echo "$name" > first.txt
```
prints
```text
false
```
```python
from pathlib import Path

Path("second.txt").write_text("it's here")
```
"""


def test_blocks_run_in_order_in_one_shell(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE + "```bash\ncat first.txt second.txt > third.txt\n```\n")
    assert follow(page, tmp_path / "empty", []) == 0
    assert (tmp_path / "empty/third.txt").read_text() == "value\nit's here"


def test_first_failing_command_ends_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\n(exit 3) | cat\ntouch never.txt\n```\n")
    assert follow(page, tmp_path, []) == 3
    assert not (tmp_path / "never.txt").exists()
    assert follow(page, tmp_path, [("(exit 3)", "true")]) == 0
    assert (tmp_path / "never.txt").exists()


def test_sources_of_the_caller_are_not_imported(tmp_path, monkeypatch):
    """Else a page would be followed with them, and not with the package that it installs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    page = tmp_path / "page.md"
    page.write_text('```bash\ntest -z "${PYTHONPATH:-}"\n```\n')
    assert follow(page, tmp_path, []) == 0


def test_text_to_replace_must_be_on_the_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["follow", str(page), str(tmp_path), "--replace", "absent", "new"])
    with pytest.raises(SystemExit, match=r"^error: .*page\.md does not contain 'absent'"):
        main()


@pytest.mark.parametrize("name", ["start", "start_ops", "tutorial"])
def test_commands_of_the_first_pages_are_complete(name):
    commands = script((ROOT / f"docs/{name}.md").read_text())
    assert commands.count("\n") > 5
    subprocess.run(["bash", "-n", "-c", commands], check=True)
    for line in commands.splitlines():
        assert "…" not in line, "a placeholder cannot be run"
