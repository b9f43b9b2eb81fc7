"""The folder of the server, for all files of the page. It is removed when the server ends."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from interpreter.locks import Lock

PREFIX = "interpreter-app-"
# Waits until the server ends, also if it is killed: its standard input is a pipe that only the server keeps open.
WATCHER = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class ServerFolder:
    """Context manager: a folder that is removed when the server ends, even if it is killed.

    A small process waits until the server ends, and removes the folder. If this process is killed too, or after a power
    cut, the next server removes the folder.

    Args:
        parent: directory in which to create it. Default: the directory for temporary files.

    Raises:
        OSError: if the folder cannot be created.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = Path(tempfile.gettempdir()) if parent is None else parent

    def __enter__(self) -> Path:
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.parent)
            # Create and lock it under another name first: a server that starts now would remove an unlocked folder.
            hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=self.parent))
        except OSError as error:
            raise OSError(
                f"cannot create a folder in {self.parent} ({error.strerror}); give another --folder"
            ) from error
        self._lock = Lock(hidden / ".lock")
        self._lock.take()
        self.path = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
        command = [sys.executable, "-I", "-c", WATCHER, str(self.path.absolute())]
        # In its own session, so that Ctrl-C and signals to the server's group do not reach it.
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's servers that ended without removing them."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            # Without a lock file, it is a folder of the user with a similar name.
            if folder.is_symlink() or not (folder / ".lock").is_file() or folder.stat().st_uid != os.getuid():
                continue
            lock = Lock(folder / ".lock")
            if lock.take():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
        except OSError:  # another server is removing it now
            continue
