"""The version of the sources that a result comes from, also on machines without git."""

import os
import subprocess

VARIABLE = "INTERPRETER_REVISION"


def revision() -> str:
    """The variable INTERPRETER_REVISION if it is set, else what ``git describe`` says, else "unknown".

    The variable comes first, because a copy of the tree may be inside a repository with another commit.
    """
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return commit or "unknown"
