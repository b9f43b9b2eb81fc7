"""The version of the code that computed a number."""

import subprocess
from pathlib import Path

from interpreter.versions import DISTRIBUTION, own_version


def code_version() -> str:
    """The commit of a checkout (``git describe --always --dirty --tags``), or the installed version."""
    root = Path(__file__).resolve().parents[2]
    # The installation may be inside another repository, whose commit would be wrong.
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        described = _git(root, "describe", "--always", "--dirty", "--tags")
        if described:
            return described
    return f"{DISTRIBUTION} {own_version()}"


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command for a directory; empty without git or without a repository."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
