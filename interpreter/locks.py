"""Locks between processes. A lock is released when its process ends, even if it is killed, and names its owner.

They are advisory locks on a file (flock). The file exists while the lock is taken. Its text is for people.
"""

import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_taken: set[int] = set()  # file descriptors
_told: list[Path] = []  # folders in which locking is impossible; the warning is printed once


class LockedError(ValueError):
    """Another process has the lock that this process needs."""


class Lock:
    """An exclusive lock on a path.

    If files cannot be locked (Windows, some network file systems), every process gets the lock, and a warning is
    printed once.

    Attributes:
        path: the lock file.
        exclusive: whether this process has the lock and other processes cannot get it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.exclusive = path, False
        self._descriptor = -1

    def take(self, wait: bool = False) -> bool:
        """Take the lock; False if another process has it.

        Args:
            wait: whether to wait until it is free.

        Raises:
            OSError: if the lock file cannot be created. An existing one can be read-only or belong to another user.
        """
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(self.path)
            try:
                if not _lock(descriptor, self.path, wait):
                    return True
                if _same_file(descriptor, self.path):  # otherwise its last owner has just removed it
                    self._descriptor, self.exclusive, descriptor = descriptor, True, -1
                    _taken.add(self._descriptor)
                    self._describe()
                    return True
            except BlockingIOError:
                return False
            finally:
                if descriptor != -1:
                    os.close(descriptor)

    def release(self) -> None:
        """Release the lock."""
        if self.exclusive:
            with suppress(OSError):
                self.path.unlink()
            _taken.discard(self._descriptor)
            os.close(self._descriptor)
            self.exclusive = False

    def owner(self) -> str:
        """The owner of the lock: process, machine, start time, and command."""
        try:
            about = json.loads(self.path.read_text(encoding="utf-8"))
            host = "" if about["host"] == platform.node() else f" on {about['host']}"
            return f"process {about['process']}{host} since {about['since']} ({about['command']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _describe(self) -> None:
        about = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(sys.orig_argv),
        }
        with suppress(OSError):  # on a full disk, the lock still works
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(about).encode())
            os.fsync(self._descriptor)  # so that other machines see it


def is_taken(path: Path) -> bool:
    """Whether a process has the lock. Does not take the lock, because that could keep another process out.

    It checks the process that the file names. A process on another machine cannot be checked, so the lock then counts
    as taken if the file exists. A killed process leaves this file behind.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["host"] != platform.node():
            return True
        began = psutil.Process(int(about["process"])).create_time()
        return began <= path.stat().st_mtime + 1  # a later process has the same number as one that has ended
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


@contextmanager
def waiting_for(path: Path, what: str) -> Iterator[Lock]:
    """A block that only one process at a time enters. The others print that they are waiting.

    Args:
        path: the lock file.
        what: name of the locked thing, for the message.
    """
    lock = Lock(path)
    if not lock.take():
        _say(f"waiting for {what}, in use by {lock.owner()}")
        lock.take(wait=True)
    try:
        yield lock
    finally:
        lock.release()


def _open(path: Path) -> int:
    """Create or open the lock file, read-only if it cannot be written: flock does not need to write.

    Child processes do not inherit it: otherwise they would keep the lock after this process has ended.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise error from None


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    """Lock a file. Returns False if the system cannot."""
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if os.access(path, os.W_OK):  # otherwise it belongs to another user, who may have locked it
            with suppress(OSError):
                path.unlink()
        if not _told:
            _told.append(path)
            _say(f"files in {path.parent} cannot be locked ({error}): do not start a second process that writes there")
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _forget() -> None:
    """Close inherited locks in a forked child, so that only the parent holds them."""
    for descriptor in _taken:
        os.close(descriptor)
    _taken.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
