"""The ``pyav`` loader: a pool of decoding processes that write into shared, pinned memory."""

import math
import mmap
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from interpreter.data.loaders.base import Loader, LoaderError, Request, split
from interpreter.data.video import Size, Video, VideoError
from interpreter.data.video.decode_worker import Failure, Job

# Decoding a piece starts at the key frame before it, so shorter pieces would mostly decode frames that are not
# requested.
SHORTEST_PIECE = 8


class PoolLoader(Loader):
    """Decode any video that FFmpeg or Pillow reads. Pixels equal those of `Video.read`, bit for bit.

    Args:
        videos, size, device, ahead, squares: see `Loader`.
        workers: decoding processes.
    """

    name = "pyav"

    def __init__(
        self,
        videos: Sequence[Video],
        size: Size,
        device: torch.device,
        ahead: int,
        workers: int,
        squares: bool = False,
    ) -> None:
        super().__init__(videos, size, device, ahead, squares)
        self.workers = workers
        self.memory = SharedMemory(device)
        setup = pickle.dumps((list(videos), size), pickle.HIGHEST_PROTOCOL)
        self._processes = [_Process(setup, self.memory.descriptor) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        # A thread for each process: it sends a job and waits for the reply.
        self._threads = ThreadPoolExecutor(workers, "pyav loader")

    def _start(self, request: Request) -> "_Batch":
        count = len(request.frames)
        pieces = split(request, self.index, max(SHORTEST_PIECE, math.ceil(count / self.workers)))
        row = self.size[0] * self.size[1] * 3
        region = self.memory.take(count * row)
        jobs = []
        for piece in pieces:
            places = [region.offset + int(r) * row for r in piece.rows]
            offsets = None if piece.offsets is None else [float(o) for o in piece.offsets]
            job = Job(piece.video, [int(f) for f in piece.frames], piece.flip, places, offsets)
            jobs.append(self._threads.submit(self._decode, job))
        return _Batch(region, self.memory, jobs, (count, *self.size, 3))

    def _decode(self, job: Job) -> None:
        process = self._idle.get()
        try:
            failure = process.ask(job)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise LoaderError(
                f"a decoding process {process.end()} while it read {self.videos[job.video].path}; if memory ran out, "
                "use fewer --workers, else look for the system's message about it. Rerun the same command to "
                "continue from the newest checkpoint"
            ) from error
        finally:
            self._idle.put(process)  # also if it is dead: its next job then fails instead of waiting forever
        if failure is not None:
            raise VideoError(failure.message) if failure.damaged else LoaderError(failure.message)

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        self.memory.close()


class _Process:
    """A decoding process."""

    def __init__(self, setup: bytes, descriptor: int) -> None:
        self._setup: bytes | None = setup
        # Its own session, so that a terminal's Ctrl-C does not reach it while it starts.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from interpreter.data.video.decode_worker import main; main({descriptor})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )

    def ask(self, job: Job) -> Failure | None:
        """Send a job, and wait for the result."""
        requests, replies = self.process.stdin, self.process.stdout
        assert requests is not None
        assert replies is not None
        if (
            self._setup is not None
        ):  # sent late: a long list of videos does not fit into the pipe until the process reads it
            requests.write(self._setup)
            self._setup = None
        pickle.dump(job, requests)
        requests.flush()
        return pickle.load(replies)

    def end(self) -> str:
        """How the process ended, for a message."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def kill(self) -> None:
        """End the process at once. It has no files or state to save."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a job that was not sent in full
                pipe.close()


@dataclass
class Region:
    """A part of the shared memory, for one batch at a time."""

    offset: int
    pixels: Tensor  # uint8 [bytes], a view of it
    users: list[Future[None]] = field(default_factory=list)  # jobs that may still write into it
    copied: torch.cuda.Event | None = None  # marks the end of its last copy to the GPU

    def free(self) -> bool:
        """Whether no process writes into it anymore."""
        return all(job.done() for job in self.users)


class SharedMemory:
    """Anonymous shared memory. It is freed when the last process that uses it ends, even if that process is killed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._file = None
        if hasattr(os, "memfd_create"):  # not in /dev/shm, which is often limited to 64 MB
            self.descriptor = os.memfd_create("interpreter-loader")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self.descriptor = self._file.fileno()
        self._regions: list[Region] = []  # unused ones

    def take(self, size: int) -> Region:
        """A region of at least ``size`` bytes that no batch uses."""
        for place, region in enumerate(self._regions):
            if len(region.pixels) >= size and region.free():
                if region.copied is not None:
                    region.copied.synchronize()
                return self._regions.pop(place)
        offset, length = self.bytes, max(1, math.ceil(size / mmap.ALLOCATIONGRANULARITY)) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self.descriptor, offset + length)
        self.bytes += length
        pixels = torch.frombuffer(mmap.mmap(self.descriptor, length, offset=offset), dtype=torch.uint8)
        if self.device.type == "cuda":
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pixels.data_ptr(), length, 0))
        return Region(offset, pixels)

    def give_back(self, region: Region) -> None:
        """Let later batches use a region, once its jobs are done."""
        self._regions.append(region)

    def close(self) -> None:
        """Free all regions."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            for region in self._regions:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(region.pixels.data_ptr()))
        self._regions.clear()
        if self._file is not None:
            self._file.close()
        else:
            os.close(self.descriptor)


class _Batch:
    """A request that the processes work on."""

    def __init__(self, region: Region, memory: SharedMemory, jobs: list[Future[None]], shape: tuple[int, ...]) -> None:
        self.region, self.memory, self.jobs, self.shape = region, memory, jobs, shape
        region.users = jobs

    def result(self) -> Tensor:
        try:
            wait(self.jobs, return_when=FIRST_EXCEPTION)
            for job in self.jobs:
                if job.done():
                    job.result()
            pixels = self.region.pixels[: math.prod(self.shape)].view(self.shape)
            if self.memory.device.type != "cuda":
                return pixels.clone()
            moved = pixels.to(self.memory.device, non_blocking=True)
            self.region.copied = torch.cuda.Event()
            self.region.copied.record(torch.cuda.current_stream(self.memory.device))
            return moved
        finally:
            self.cancel()

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()
        self.memory.give_back(self.region)
