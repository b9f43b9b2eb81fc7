"""The clip of a tab: an uploaded file, its frames for the page, and decoding that can be cancelled."""

import io
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from interpreter.data import Video, VideoError, open_video
from interpreter.data.images import resize
from interpreter.data.video.containers import declared
from interpreter.data.video.file import VideoFile
from interpreter.data.video.open import VIDEO_SUFFIXES

VIEW = 960  # pixels of the longer side of the pictures that the page shows
MOST_PIXELS = 8192 * 4320  # of a frame
CACHED = 48  # frames of the view, about 1.5 MB each
JUMP = 64  # up to this distance, frames are decoded and dropped instead of seeking


def safe_name(name: str) -> str:
    """A file name that is safe on every system, made from the name that a browser sent.

    >>> safe_name("../../etc/my walk (1).MP4"), safe_name("..."), safe_name("/")
    ('my walk (1).mp4', 'clip', 'clip')
    """
    name = re.sub(r"[^\w .()+=@,-]", "_", re.split(r"[/\\]", name)[-1]).strip(" .")
    stem, dot, suffix = name.rpartition(".")
    if not dot:
        return _cut(name, 100) or "clip"
    return f"{_cut(stem, 100).rstrip(' .') or 'clip'}.{_cut(suffix.lower(), 10)}"


def check_name(name: str) -> None:
    """Raise ValueError if the suffix is not that of a video."""
    if Path(name).suffix.lower() not in VIDEO_SUFFIXES:
        raise VideoError(f"{name} does not look like a video file; choose an MP4, MOV, MKV, WebM, AVI or GIF file")


class Clip:
    """An uploaded video.

    Args:
        path: the file, in the folder of its tab.
        most_frames: a longer video is refused.
        check: called for each frame that has to be decoded to count them; stops that by raising an error.

    Attributes:
        video: the video.
        view: (H, W) of the pictures that the page shows.

    Raises:
        VideoError: if it is not a video, damaged, or too long. The message names the file without its folder.
    """

    def __init__(self, number: int, path: Path, most_frames: int, check: Callable[[], None] = lambda: None) -> None:
        self.id, self.path = number, path
        width, height, frames = declared(path)
        if width * height > MOST_PIXELS:
            raise VideoError(
                f"{path}: frames of {width}x{height} are too large, {MOST_PIXELS // 10**6} megapixels at most"
            )
        if frames > 1.1 * most_frames:  # the declared number can be slightly wrong; counting may decode the whole file
            raise _too_long(path, frames, most_frames)
        self.video = open_video(path)
        if isinstance(self.video, VideoFile) and not self.video.is_counted:
            for count, _ in enumerate(self.video.frames(), start=1):  # counts now, while the user can cancel
                check()
                if count > most_frames:
                    raise _too_long(path, count, most_frames)
        if self.video.num_frames > most_frames:
            raise _too_long(path, self.video.num_frames, most_frames)
        factor = min(1.0, VIEW / max(self.video.height, self.video.width))
        self.view = (max(1, round(self.video.height * factor)), max(1, round(self.video.width * factor)))
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._next, self._decoding = 0, self.video.frames()

    def frame(self, number: int) -> np.ndarray:
        """A frame in the size of the view, uint8 [H, W, 3].

        Frames that are requested in order are decoded one after the other, without seeking.

        Raises:
            IndexError: if there is no such frame.
            VideoError: if decoding fails.
        """
        if not 0 <= number < self.video.num_frames:
            raise IndexError(f"frame {number}: the clip has frames 0 to {self.video.num_frames - 1}")
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            if not self._next <= number < self._next + JUMP:
                self._next, self._decoding = number, self.video.frames_from(number)
            try:
                while self._next <= number:
                    frame = next(self._decoding)
                    self._next += 1
                    if number - self._next < CACHED // 2:  # users also step back
                        self._cache[self._next - 1] = resize(frame, self.view)
            except BaseException as error:
                self._next, self._decoding = number, self.video.frames_from(number)  # a failed generator has ended
                if isinstance(error, StopIteration):
                    raise VideoError(f"{self.path}: frame {number} could not be decoded again") from None
                raise
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return self._cache[number]

    def jpeg(self, number: int) -> bytes:
        """A frame of the view as JPEG."""
        file = io.BytesIO()
        Image.fromarray(self.frame(number)).save(file, format="JPEG", quality=88)
        return file.getvalue()

    def describe(self) -> dict[str, Any]:
        """The data of the clip for the page."""
        video = self.video
        return {
            "id": self.id,
            "name": self.path.name,
            "frames": video.num_frames,
            "width": video.width,
            "height": video.height,
            "fps": float(video.fps),
            "aspect": float(video.pixel_aspect),
            "view": list(self.view),
        }


class WatchedVideo(Video):
    """A video whose decoding calls a function for each frame, which stops it by raising an error."""

    def __init__(self, video: Video, check: Callable[[], None]) -> None:
        self._video, self._check = video, check
        self.path, self.name, self.height, self.width = video.path, video.name, video.height, video.width
        self.fps, self.pixel_aspect = video.fps, video.pixel_aspect

    @property
    def num_frames(self) -> int:
        """See :class:`Video`."""
        return self._video.num_frames

    def check(self) -> None:
        """See :class:`Video`."""
        self._video.check()

    def _stream(self, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
        for frame in self._video.frames(size):
            self._check()
            yield frame

    def _pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            self._check()
            yield index, self._video.read([index])[0]


def _cut(text: str, most: int) -> str:
    """The beginning of a text, with at most this number of bytes, in which file systems measure names."""
    return text.encode()[:most].decode(errors="ignore")


def _too_long(path: Path, frames: int, most: int) -> VideoError:
    return VideoError(
        f"{path}: {frames} frames or more, but this server accepts {most}; cut the clip, or start the server with a "
        "larger --max-frames"
    )
