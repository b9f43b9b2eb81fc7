"""Which version of the sources a result comes from, also where there is no git."""

import os
import subprocess

VARIABLE = "INTERPRETER_REVISION"


def revision() -> str:
    """The variable INTERPRETER_REVISION if it is set, else what ``git describe`` says, else "unknown".

    The variable comes first: a copy of the tree on another machine may lie in a repository of another state.
    """
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return commit or "unknown"
