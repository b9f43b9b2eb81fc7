"""The folder of the server: everything that comes through the page is kept there, and nothing survives the server."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from interpreter.locks import Lock

PREFIX = "interpreter-app-"
# Waits for the end of the server, however that ends: its standard input is a pipe that only the server holds open.
WATCHER = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


class ServerFolder:
    """A folder that is removed when the server ends, also when it is killed; a context manager.

    A small process waits for the server's end and removes the folder then. If that process is killed too, as by a
    power cut, the next server removes the folder.

    Args:
        parent: where to make it. Default: the directory for temporary files.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = Path(tempfile.gettempdir()) if parent is None else parent

    def __enter__(self) -> Path:
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.parent)
            # Locked under another name first: a server that starts now would take an unlocked folder for abandoned.
            hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=self.parent))
        except OSError as error:
            raise OSError(
                f"no folder can be made in {self.parent} ({error.strerror}); give another --folder"
            ) from error
        self._lock = Lock(hidden / ".lock")
        self._lock.take()
        self.path = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
        command = [sys.executable, "-I", "-c", WATCHER, str(self.path.absolute())]
        # In a session of its own: Ctrl-C, and a signal to the server's group, do not reach it.
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
            # Without a lock file it is something of the user's that begins with the same words.
            if folder.is_symlink() or not (folder / ".lock").is_file() or folder.stat().st_uid != os.getuid():
                continue
            lock = Lock(folder / ".lock")
            if lock.take():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
        except OSError:  # another server removes it at this moment
            continue
