"""Tensors of all frames of a video: in memory if they fit, otherwise in a temporary file.

The attention of 10,000 frames of 864 patches over 32 slots takes 553 MB in half precision. With a finer grid or a
longer video, it can exceed the memory of the machine. A tensor that does not fit is memory-mapped: you can use it like
any tensor on the CPU, and the system reads and writes its pages. The file is unlinked before anything is written, so it
disappears even if the process is killed.
"""

import errno
import math
import mmap
import os
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from interpreter.console import gigabytes

SHARE = 0.5  # share of the free memory that all tensors of a video may use together


def free_memory() -> int:
    """Bytes of memory that this process can still use, within the limit of its container."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:  # this system has no such limit
        return free
    return free if limit == "max" else min(free, int(limit) - used)


class FrameTensor:
    """A tensor [T, ...] that is written frame by frame.

    Attributes:
        tensor: all frames.
    """

    def __init__(self, tensor: Tensor, mapping: mmap.mmap | None = None) -> None:
        self.tensor, self._mapping = tensor, mapping

    def write(self, frames: slice, values: Tensor) -> None:
        """Copy values [t, ...] to consecutive frames, from any device."""
        self.tensor[frames] = values
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            # Release the written pages: otherwise they count as memory of the process. The file keeps the values.
            row = self.tensor[0].nbytes
            begin = frames.start * row // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, frames.stop * row - begin)


class FrameTensors:
    """Allocates tensors of all frames of a video.

    Together, the tensors use at most half of the memory that was free at the start (on a GPU, half of the GPU's). A
    tensor that does not fit goes to the memory of the host if ``elsewhere`` allows it. If it does not fit there either,
    it goes to a file in the directory for temporary files (``TMPDIR``).

    Args:
        frames: T.
        device: where the values are computed.

    Example:
        >>> attention = FrameTensors(3, torch.device("cpu")).empty((2,), torch.float16, "attention")
        >>> attention.write(slice(0, 3), torch.ones(3, 2))
        >>> attention.tensor.sum().item()
        6.0
    """

    def __init__(self, frames: int, device: torch.device) -> None:
        self.frames, self.device = frames, device
        self._left = {torch.device("cpu"): int(SHARE * free_memory())}
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            self._left[device] = int(SHARE * (torch.cuda.mem_get_info(device)[0] + cached))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, what: str, elsewhere: bool = True) -> FrameTensor:
        """Uninitialised values [T, *shape].

        Args:
            shape: of a frame's values.
            dtype: of the values.
            what: name of the values, for messages.
            elsewhere: whether they may be outside the memory of the device: in host memory or in a file.

        Raises:
            OSError: if they fit neither in memory nor on the disk. The message states the required space.
        """
        shape, size = (self.frames, *shape), self.frames * math.prod(shape) * dtype.itemsize
        places = dict.fromkeys((self.device, torch.device("cpu"))) if elsewhere else (self.device,)
        for place in places:
            if not elsewhere or size <= self._left.get(place, 0):
                self._left[place] = self._left.get(place, 0) - size
                return FrameTensor(torch.empty(shape, dtype=dtype, device=place))
        mapping = _nameless_file(size, what)
        return FrameTensor(torch.frombuffer(mapping, dtype=dtype).view(shape), mapping)


def _nameless_file(size: int, what: str) -> mmap.mmap:
    """A memory-mapped temporary file. Its disk space is reserved, so writing to it cannot fail later."""
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif size > _free_space(folder):
                raise OSError(errno.ENOSPC, "")
            else:
                file.truncate(size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the {what} of the video takes {gigabytes(size)}, more than half of the free memory "
                f"({gigabytes(free_memory())}), and more than is free in {folder} ({gigabytes(_free_space(folder))}); "
                "set TMPDIR to a folder on a larger disk, or lower --frame-size or the number of slots of a frame",
            ) from error
        return mmap.mmap(file.fileno(), size)


def _free_space(folder: str) -> int:
    """Bytes that this user can still write to a folder."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
