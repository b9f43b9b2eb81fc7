"""The decoding processes of the pyav loader: they end with the loader, and two batches never use the same memory."""

import gc
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from interpreter.data.loaders import LoaderError, open_loader
from interpreter.data.loaders.pool import SharedMemory

from .loading import CPU, SIZE, children, requests, whole


def test_killed_process_is_an_error_and_no_hang(videos):
    with open_loader("pyav", videos, SIZE, CPU, workers=2) as loader:
        loader.batch(*whole(videos))
        victim, survivor = children()
        os.kill(victim.pid, signal.SIGKILL)
        for _ in range(4):
            with pytest.raises(LoaderError, match=r"was killed by signal 9 while it read .*--workers"):
                loader.batch(*whole(videos))
        assert survivor.is_running()
    assert not children()


def test_closing_in_the_middle_leaves_no_process_and_no_memory(videos):
    maps = Path("/proc/self/maps")
    loader = open_loader("pyav", videos, SIZE, CPU, workers=2, ahead=3)
    batches = loader.batches(requests(videos, 5, 200))
    next(batches)
    assert len(children()) == 2
    assert not maps.exists() or "memfd:interpreter-loader" in maps.read_text()
    loader.close()
    del loader, batches
    assert not children()
    gc.collect()
    assert not maps.exists() or "memfd:interpreter-loader" not in maps.read_text()


def test_shared_memory_is_reused_once_nothing_writes_to_it(videos):
    memory = SharedMemory(CPU)
    first = memory.take(5000)
    job = Future()
    first.users = [job]
    memory.give_back(first)  # as for a cancelled request, in the middle of a job
    second = memory.take(5000)
    assert second.offset >= first.offset + 5000
    job.set_result(None)
    assert memory.take(4000) is first
    del first, second
    memory.close()
    with open_loader("pyav", videos, SIZE, CPU, workers=2, ahead=2) as loader:
        for _ in loader.batches(requests(videos, 12)):
            pass
        assert loader.memory.bytes <= 4 * (20 * SIZE[0] * SIZE[1] * 3 + 4096)


def test_decoding_processes_end_with_a_killed_parent(paths):
    script = (
        "import psutil, sys, torch\n"
        "from interpreter.data import open_video\n"
        "from interpreter.data.loaders import open_loader\n"
        "videos = [open_video(path) for path in sys.argv[1:]]\n"
        "loader = open_loader('pyav', videos, (48, 80), torch.device('cpu'), workers=2)\n"
        "loader.batch(torch.arange(30), torch.zeros(30, dtype=torch.bool))\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_the_worker_imports_no_torch():
    code = "import sys, interpreter.data.video.decode_worker; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
