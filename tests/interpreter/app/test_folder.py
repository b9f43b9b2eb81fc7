"""The command: its messages, its exit statuses, and that it deletes all uploads."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from interpreter.app.__main__ import main
from interpreter.app.folder import ServerFolder
from interpreter.commands import run_command

from .client import Client, wait_for

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

HOLD = """
import sys
from pathlib import Path
from interpreter.app.folder import ServerFolder
with ServerFolder(Path(sys.argv[1])) as folder:
    (folder / "clip.mp4").write_text("a clip")
    print(folder, flush=True)
    sys.stdin.read()
"""


def start(*arguments):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **pipes)


@pytest.fixture
def hold():
    """hold(parent) -> a process that has a server's folder in `parent`, that folder, and the process that watches."""
    processes = []

    def run(parent):
        process = start("-c", HOLD, parent)
        processes.append(process)
        folder = Path(process.stdout.readline().strip())
        (watcher,) = psutil.Process(process.pid).children()
        return process, folder, watcher

    yield run
    for process in processes:
        process.kill()
        with process:  # closes its pipes, and waits
            pass


def fail(arguments, capsys):
    """Run the command, which must fail with one line; returns it."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: main([str(a) for a in arguments]))
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_signal_ends_the_server_and_removes_its_folder(tmp_path, clip):
    started = {number: tmp_path / number.name for number in (signal.SIGTERM, signal.SIGINT)}
    processes = {
        number: start("-m", "interpreter.app", "--port", 0, "--folder", parent) for number, parent in started.items()
    }
    try:
        for number, process in processes.items():
            line = process.stdout.readline()
            address = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+) in a browser\. Ctrl-C ends the server\.\n", line)
            assert address, (line, process.poll())
            tab = Client(address[1]).open_tab()
            assert [source["id"] for source in tab.about["sources"]] == ["cluster"]
            with tab.watched() as states:  # an open page does not delay the end
                states.next()
                assert tab.upload(clip).status == 200
                assert len(list(started[number].rglob("walk.mp4"))) == 1
                process.send_signal(number)
                out, errors = process.communicate(timeout=20)
            assert process.returncode == 128 + number
            assert out == ""
            (line,) = errors.splitlines()
            assert line.startswith(f"stopped by {number.name}. The server has stopped")
            assert list(started[number].iterdir()) == []
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_killed_server_leaves_nothing(tmp_path, hold):
    process, folder, watcher = hold(tmp_path)
    assert (folder / "clip.mp4").exists()
    assert folder.stat().st_mode & 0o077 == 0  # of this user alone
    assert os.getpgid(watcher.pid) != os.getpgid(process.pid)  # no signal to the server's group reaches it
    process.kill()
    wait_for(lambda: not any(tmp_path.iterdir()), seconds=15)
    watcher.wait(15)


def test_next_server_removes_what_a_killed_one_left(tmp_path, hold):
    process, folder, watcher = hold(tmp_path)
    watcher.kill()
    process.kill()
    process.wait()
    assert (folder / "clip.mp4").exists()
    with ServerFolder(tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_living_server_is_left_alone(tmp_path, hold):
    process, folder, watcher = hold(tmp_path)
    with ServerFolder(tmp_path) as own:
        assert (folder / "clip.mp4").read_text() == "a clip"
        assert own != folder
    assert (folder / "clip.mp4").exists()
    process.stdin.close()
    process.wait(15)
    assert list(tmp_path.iterdir()) == []
    watcher.wait(15)


def test_what_is_no_folder_of_a_server_is_left_alone(tmp_path):
    mine, linked = tmp_path / "interpreter-app-results", tmp_path / "elsewhere"
    for folder in (mine, linked):
        folder.mkdir()
        (folder / "masks.zip").write_text("mine")
    (linked / ".lock").touch()
    (tmp_path / "interpreter-app-link").symlink_to(linked)
    (tmp_path / "interpreter-app-file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with ServerFolder(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fail(["--port", 0, "--folder", tmp_path / "file"], capsys)


def test_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = fail(["--port", port, "--folder", tmp_path / "new"], capsys)
    assert f"cannot serve on 127.0.0.1, port {port} (Address already in use)" in line
    assert "--port" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [["--port", "70000"], ["--host", "999.1.1.1"], ["--port", "-1"]])
def test_impossible_address_is_one_line(tmp_path, capsys, options):
    assert options[0] in fail([*options, "--folder", tmp_path], capsys)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_missing_package_names_the_extra(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = fail([], capsys)
    assert package in line
    assert "pip install 'interpreter-slots[app]'" in line


def test_file_as_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "run").touch()
    assert "is a file" in fail(["--run", tmp_path / "run"], capsys)


def test_nothing_else_imports_the_page():
    code = """
import sys
import interpreter, interpreter.train, interpreter.segment, interpreter.evaluate, slotkernels
names = ("interpreter.app", "starlette", "uvicorn", "anyio")
print([name for name in sys.modules if name.startswith(names)])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot create a folder in .*file/x .Not a directory.; give another --folder"):
        ServerFolder(tmp_path / "file" / "x").__enter__()
