"""Locks between processes."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from queue import SimpleQueue

import pytest

from interpreter import locks
from interpreter.locks import Lock, is_taken, waiting_for


def start(code, *arguments):
    """A process that runs this code with the path of a lock, until its input is closed."""
    lines = f"import sys; from pathlib import Path; from interpreter.locks import *; path = Path(sys.argv[1]); {code}"
    command = [sys.executable, "-c", lines, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / ".lock"


def test_a_second_process_learns_who_has_the_lock(path):
    with start("assert Lock(path).take(); print('taken', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout.readline() == "taken\n"
        lock = Lock(path)
        assert not lock.take()
        about = lock.owner()
        assert about.startswith(f"process {other.pid} since ")
        assert f" ({sys.executable} -c" in about
        other.kill()
        other.wait()
        assert lock.take()  # it ended with its process
        assert f"process {os.getpid()} since" in lock.owner()
        lock.release()
    assert not path.exists()


def test_a_look_tells_whether_a_lock_is_taken(path):
    assert not is_taken(path)
    with start("assert Lock(path).take(); print('taken', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout.readline() == "taken\n"
        assert is_taken(path)
        other.kill()
        other.wait()
        assert path.exists()
        assert not is_taken(path)  # the file that a killed process leaves
    path.write_text(path.read_text().replace(platform.node(), "elsewhere"))
    assert is_taken(path)  # a process of another machine cannot be checked
    path.write_text("not JSON")
    assert not is_taken(path)


def test_lock_is_not_inherited_by_programs_and_forks(path):
    code = (
        "import os, subprocess; lock = Lock(path); assert lock.take(); "
        "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "read, write = os.pipe(); "
        "os.fork() or (os.close(1), os.close(2), os.write(write, b'.'), sys.stdin.read(), os._exit(0)); "
        "os.read(read, 1); print('taken', flush=True); os.kill(os.getpid(), 9)"
    )
    with start(code, path) as other:
        assert other.stdout.readline() == "taken\n"
        assert other.wait() == -signal.SIGKILL
        lock = Lock(path)
        assert lock.take()
        assert lock.exclusive
        lock.release()


def test_the_others_wait_say_for_whom_and_come_one_at_a_time(path, monkeypatch):
    inside, order, said = Lock(path), [], SimpleQueue()
    monkeypatch.setattr(locks, "_say", said.put)
    assert inside.take()

    def enter(name):
        with waiting_for(path, "the folder") as lock:
            assert lock.exclusive
            order.append(name)
            assert not Lock(path).take()
            order.append(name)

    threads = [threading.Thread(target=enter, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert said.get(timeout=60).startswith(f"waiting for the folder, in use by process {os.getpid()} since ")
    assert order == []
    inside.release()
    for thread in threads:
        thread.join(60)
    assert sorted(order) == ["a", "a", "b", "b"]
    assert order[0] == order[1]
    assert not path.exists()


def test_files_that_cannot_be_locked_are_shared_with_a_warning(path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_told", [])
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    for name in ("one", "other"):
        lock = Lock(path.with_name(name))
        assert lock.take()
        assert not lock.exclusive
        lock.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"files in {path.parent} cannot be locked ([Errno {errno.ENOLCK}] No locks available)")
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_lock_file_still_locks(path, monkeypatch, number):
    really = os.open

    def read_only(name, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(name))
        return really(name, flags, *mode)

    owner = Lock(path)
    assert owner.take()
    monkeypatch.setattr(locks.os, "open", read_only)
    other = Lock(path)
    assert not other.take()
    assert other.owner().startswith(f"process {os.getpid()} since ")
    content = path.read_text()
    owner.release()
    path.write_text(content)  # as if its owner had been killed
    assert other.take()
    assert not Lock(path).take()
    other.release()
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        Lock(path).take()  # there is no folder, and none can be created


def test_lock_file_of_another_user_is_not_removed(path, monkeypatch):
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: os.close(-1))  # EBADF, as NFS answers
    monkeypatch.setattr(locks.os, "access", lambda *_: False)
    assert Lock(path).take()
    assert path.exists()


def test_an_owner_that_left_no_name_is_another_process(path):
    assert Lock(path).owner() == "another process"
    path.parent.mkdir()
    path.write_text("{")
    assert Lock(path).owner() == "another process"
