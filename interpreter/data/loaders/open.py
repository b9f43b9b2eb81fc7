"""Chooses a loader for the videos and the device, and opens it."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from interpreter.data.loaders.base import Loader
from interpreter.data.options import LoaderName
from interpreter.data.threads import cpu_count
from interpreter.data.video import CentralSquare, CroppedVideo, FrameFolder, Size, Video
from interpreter.data.video.squares import uncut_size
from interpreter.large import free_memory

# Codecs that `fn.decoders.video` of DALI 2.4 decodes, by FFmpeg's names.
DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
DALI_GPU_CODECS = DALI_CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}


def open_loader(
    name: LoaderName,
    videos: Sequence[Video],
    size: Size,
    device: torch.device,
    workers: int | None = None,
    ahead: int = 2,
    advance: Callable[[int], None] = lambda frames: None,
    squares: bool = False,
) -> Loader:
    """Open a loader.

    >>> videos = open_dataset("folder", clips).videos
    >>> with open_loader("pyav", videos, (32, 48), torch.device("cpu"), workers=1) as loader:
    ...     requests = [(torch.tensor([0, 7]), torch.tensor([False, True])), (torch.tensor([3]), torch.tensor([False]))]
    ...     [tuple(pixels.shape) for pixels in loader.batches(requests)]
    [(2, 32, 48, 3), (1, 32, 48, 3)]

    Args:
        name: ``dali``, ``pyav``, ``torch``, or ``auto`` (see `choose_loader`).
        videos: the videos, in the order that numbers their frames. Check them first, as `open_dataset` does: otherwise
            each process decodes a file once in full to find its key frames.
        size: (H, W) that frames are resized to.
        device: where pixels go.
        workers: number of decoding processes (pyav) or threads (dali, torch); None for this process' share of the
            cores.
        ahead: requests to load ahead.
        advance: called with numbers of decoded frames while the ``torch`` loader decodes all frames at the start.
        squares: cut a square out of each frame, at the offsets of the request (``--crop random``); ``size`` must be
            square. The squares of a `CentralSquare` are cut from its whole video.

    Raises:
        ValueError: if the loader does not exist, or cannot decode these videos on this device (the message says why and
            what to use), or if ``size`` is not square for squares.
        VideoError: if a video is damaged.
        LoaderError: if the loader cannot start.
    """
    if name not in get_args(LoaderName):
        raise ValueError(f"unknown loader {name!r}; choose from {', '.join(get_args(LoaderName))}")
    workers = workers or max(1, cpu_count() // _local_ranks())
    if squares and size[0] != size[1]:
        raise ValueError(f"squares need a square size, got {size[0]}x{size[1]}")
    chosen = choose_loader(videos, size, device, squares) if name == "auto" else name
    if chosen == "torch":
        if (needed := frame_bytes(videos, size, squares)) > free_memory():
            raise ValueError(
                f"--loader torch: all frames together are {needed / 1e9:.1f} GB, but {free_memory() / 1e9:.1f} GB of "
                "memory are free; use --loader pyav, or auto"
            )
        from interpreter.data.loaders.in_memory import CachedLoader

        return CachedLoader(videos, size, device, ahead, workers, advance, squares)
    if chosen == "pyav":
        from interpreter.data.loaders.pool import PoolLoader

        return PoolLoader(videos, size, device, ahead, workers, squares)
    if obstacle := dali_obstacle(videos, device, squares):
        raise ValueError(f"--loader dali: {obstacle}; use --loader pyav, or auto")
    from interpreter.data.loaders.dali import DaliLoader

    return DaliLoader(videos, size, device, ahead, workers)


def choose_loader(videos: Sequence[Video], size: Size, device: torch.device, squares: bool = False) -> LoaderName:
    """The loader that ``auto`` selects.

    ``torch`` if all frames fit into a quarter of this process' share of the free memory; else, on a GPU, ``dali`` if it
    is installed and decodes all videos; else ``pyav``.
    """
    if frame_bytes(videos, size, squares) <= free_memory() / 4 / _local_ranks():
        return "torch"
    if device.type == "cuda" and dali_obstacle(videos, device, squares) is None:
        return "dali"
    return "pyav"


def frame_bytes(videos: Sequence[Video], size: Size, squares: bool = False) -> int:
    """Number of bytes of all frames at a size. For squares, that of the whole frames that they are cut from."""
    sizes = (uncut_size(video, size[0]) if squares else size for video in videos)
    return sum(video.num_frames * height * width * 3 for video, (height, width) in zip(videos, sizes, strict=True))


def dali_obstacle(videos: Sequence[Video], device: torch.device, squares: bool = False) -> str | None:
    """Why DALI cannot decode these videos, or cut squares out of them, on this device; None if it can."""
    # Imported here, because these load FFmpeg, which a training step does not need.
    from interpreter.data.video.file import VideoFile
    from interpreter.data.video.orientation import UPRIGHT

    if not dali_is_installed():
        return "NVIDIA DALI is not installed (pip install nvidia-dali-cuda130)"
    if squares:
        return "DALI does not cut random squares out of frames (--crop random)"
    codecs, where = (DALI_GPU_CODECS, "a GPU") if device.type == "cuda" else (DALI_CPU_CODECS, "a CPU")
    obstacles: Counter[str] = Counter()
    first: dict[str, Path] = {}
    for video in videos:
        if isinstance(video, FrameFolder):
            continue  # DALI reads every kind of image that FrameFolder does
        if isinstance(video, CentralSquare):
            reason = "DALI does not cut squares out of frames (--crop)"
        elif isinstance(video, CroppedVideo):
            reason = "DALI does not crop borders"
        elif not isinstance(video, VideoFile):
            reason = f"DALI does not support {type(video).__name__}"
        elif video.codec not in codecs:
            reason = f"DALI does not decode {video.codec} on {where}"
        elif video.orientation != UPRIGHT:
            reason = "DALI ignores the rotation or mirroring in the metadata of a video"
        elif video.num_streams > 1:
            reason = "DALI reads the first of several picture streams, which may be cover art"
        else:
            continue
        obstacles[reason] += 1
        first.setdefault(reason, video.path)
    if not obstacles:
        return None
    reason, count = obstacles.most_common(1)[0]
    return f"{reason}: {first[reason]}" + (f" and {count - 1} more" if count > 1 else "")


def dali_is_installed() -> bool:
    """Whether NVIDIA DALI can be imported; does not import it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # the parent package may be missing too
        return False


def _local_ranks() -> int:
    """Number of training processes on this machine, from torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
