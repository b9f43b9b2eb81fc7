"""Content-addressed files: one memory-mapped safetensors file for each video. A file is complete or does not exist.

A file's path is ``KIND-RECIPE/VIDEO.safetensors``: RECIPE is a hash of everything but the video that the values depend
on (weights, sizes, flip, …), VIDEO a hash of the video's bytes. If anything changes, the path changes, so an outdated
file is never read. The header contains recipe and video in full, and must match exactly before a file is used.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from interpreter.data import FrameFolder, Video
from interpreter.data.video.cropped import CroppedVideo
from interpreter.files import write_text, written_whole

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
# Each open file is a memory mapping. Linux allows a process 65,530 of them.
OPEN_FILES = 4096

Rows = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Write = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Content:
    """The content of a video: a hash of its bytes, and size and time of each file when it was read."""

    digest: str
    stamp: tuple[tuple[int, int], ...]


def read_content(video: Video) -> Content:
    """Hash the bytes of a video file, or of all frames of a folder, in their order."""
    stamp, digest, view = _stamp(video), hashlib.sha256(), video
    while isinstance(view, CroppedVideo):
        digest.update(f"{view.box}\n".encode())
        view = view.inner
    for file, (size, _) in zip(_files(video), stamp, strict=True):
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return Content(digest.hexdigest()[:32], stamp)


def require_unchanged(video: Video, content: Content) -> None:
    """Raise an error if a video has changed since it was hashed. Its results would be stored under the old hash.

    Raises:
        ValueError: if it has changed; names the video.
    """
    if _stamp(video) != content.stamp:
        raise ValueError(f"{video.path} changed while it was read; do not change it, and run the same command again")


def _files(video: Video) -> list[Path]:
    while isinstance(video, CroppedVideo):
        video = video.inner
    return video.files if isinstance(video, FrameFolder) else [video.path]


def _stamp(video: Video) -> tuple[tuple[int, int], ...]:
    return tuple((status.st_size, status.st_mtime_ns) for status in (file.stat() for file in _files(video)))


class Store:
    """The files of one recipe.

    Args:
        root: directory of all stores.
        recipe: everything but the video that the values depend on, in JSON's types; ``recipe["kind"]`` names the
            directory.
        rows: type and shape of a row of each tensor. Usually a row is a frame; a video of T frames has [T, *shape].
    """

    def __init__(self, root: Path, recipe: Mapping[str, Any], rows: Rows) -> None:
        self.recipe, self.rows = recipe, rows
        self.text = json.dumps(recipe, sort_keys=True)
        key = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        self.directory = root / f"{recipe['kind']}-{key}"
        self._opened = lru_cache(OPEN_FILES)(self._open)

    def path(self, digest: str) -> Path:
        """The path of the file of a video, which need not exist."""
        return self.directory / f"{digest}.safetensors"

    def num_bytes(self, digest: str, frames: int) -> int:
        """Exact size of the file of a video in bytes."""
        header, data = self._header(digest, frames)
        return len(header) + data

    def holds(self, digest: str, frames: int) -> bool:
        """Whether a video's file exists, is complete and was made by this recipe."""
        header, data = self._header(digest, frames)
        try:
            with self.path(digest).open("rb") as file:
                return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == len(header) + data
        except FileNotFoundError:
            return False

    def tensor(self, digest: str, name: str) -> Tensor:
        """A memory-mapped tensor [T, *shape] of a video. Only the rows that you index are read."""
        return self._opened(digest)[name]

    def _open(self, digest: str) -> dict[str, Tensor]:
        with safe_open(self.path(digest), framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.rows}

    @contextmanager
    def writing(self, video: Video, digest: str, rows: int | None = None) -> Iterator[Write]:
        """Yield ``write(name, start, rows)``. The file appears when the block ends without an error.

        Args:
            video: the video.
            digest: hash of its bytes.
            rows: number of rows of its tensors. Default: its number of frames.

        Raises:
            ValueError: if a value is out of the range of its type, or rows are missing.
            OSError: if the disk is full.
        """
        frames = video.num_frames if rows is None else rows
        header, data = self._header(digest, frames)
        filled = dict.fromkeys(self.rows, 0)
        with written_whole(self.path(digest)) as temporary, temporary.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + data)

            def write(name: str, start: int, rows: Tensor) -> None:
                dtype, shape = self.rows[name]
                values = rows.detach().to(dtype).cpu().contiguous()
                if dtype.is_floating_point and not values.isfinite().all():
                    raise ValueError(f"{name} of {video.path} hold values that {NAMES[dtype]} cannot; use --dtype bf16")
                file.seek(len(header) + self._offset(name, frames) + start * math.prod(shape) * dtype.itemsize)
                file.write(values.view(torch.uint8).numpy().data)
                filled[name] += len(values)

            yield write
            written = next((count for count in filled.values() if count != frames), frames)
            if written != frames:
                raise ValueError(f"{video.path} gave {written} frames, but {frames} were counted before")

    def describe(self) -> None:
        """Write ``recipe.json``, for you to read. No code reads it."""
        write_text(self.directory / "recipe.json", json.dumps(self.recipe, indent=2, sort_keys=True) + "\n")

    def _offset(self, tensor: str, frames: int) -> int:
        offset = 0
        for name, (dtype, shape) in self.rows.items():
            if name == tensor:
                break
            offset += frames * math.prod(shape) * dtype.itemsize
        return offset

    def _header(self, digest: str, frames: int) -> tuple[bytes, int]:
        """The first bytes of a video's file, and the number of bytes that follow."""
        entries: dict[str, Any] = {"__metadata__": {"recipe": self.text, "video": digest}}
        end = 0
        for name, (dtype, shape) in self.rows.items():
            start, end = end, end + frames * math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": NAMES[dtype], "shape": [frames, *shape], "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text, end
