"""Which code made a number."""

import subprocess
from pathlib import Path

from interpreter.versions import DISTRIBUTION, own_version


def code_version() -> str:
    """The commit (``git describe --always --dirty --tags``) of a checkout, else the installed version."""
    root = Path(__file__).resolve().parents[2]
    # The commit of a repository that the installation happens to lie in would be the wrong one.
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        described = _git(root, "describe", "--always", "--dirty", "--tags")
        if described:
            return described
    return f"{DISTRIBUTION} {own_version()}"


def _git(root: Path, *arguments: str) -> str:
    """What git says about a directory; empty where there is no git or no repository."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
