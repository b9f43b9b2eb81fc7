"""Which version of the sources a result comes from, also where there is no git."""

import os
import subprocess

VARIABLE = "INTERPRETER_REVISION"


def revision() -> str:
    """What ``git describe`` says; without git or a repository the variable INTERPRETER_REVISION, else "unknown"."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or os.environ.get(VARIABLE) or "unknown"
