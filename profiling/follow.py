"""Follow a page exactly: run its commands as they are written, in their order, in an empty folder.

    python -m profiling.follow docs/start.md FOLDER    # FOLDER holds the files that the page asks for
    python -m profiling.follow docs/start.md FOLDER --replace 'pip install x-*.whl' 'pip install x-*.tar.gz'

All blocks marked ``bash`` run in one shell, so that an activated environment stays active; blocks marked ``python`` run
with that shell's ``python``. The first command that fails ends the script, with its exit status. Other blocks show what
a command prints, and do not run.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def script(page: str) -> str:
    """The commands of a page as one shell script."""
    lines = ["set -euo pipefail\n", """trap 'printf "+ %s\\n" "$BASH_COMMAND"' DEBUG\n"""]  # not what `source` runs
    for language, text in BLOCK.findall(page):
        lines.append(text if language == "bash" else f"python -c {shlex.quote(text)}\n")
    return "".join(lines)


def follow(page: Path, folder: Path, replaced: list[tuple[str, str]]) -> int:
    """The exit status of the page's commands, run in the folder."""
    text = page.read_text()
    for old, new in replaced:
        if old not in text:
            raise ValueError(f"{page} does not contain {old!r}: pass text of the page as the first value of --replace")
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    return run_script(script(text), folder)


def run_script(commands: str, folder: Path) -> int:
    """The exit status of a script in a folder, without PYTHONPATH: only what it installs itself may be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(["bash", "-c", commands], cwd=folder, env=environment, check=False).returncode


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="page whose commands run")
    parser.add_argument("folder", type=Path, help="where they run")
    parser.add_argument(
        "--replace", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="text of the page"
    )
    options = parser.parse_args()
    try:
        sys.exit(follow(options.page, options.folder, options.replace))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
