"""Small videos to segment, and the label maps that were written for them."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

from .videos import save_frames


def make_clip(path, frames=9, size=(48, 64), pixels="yuv420p", codec="libx264", fps=Fraction(30000, 1001)):
    """A disc that moves across blocky noise."""
    rng = np.random.default_rng(0)
    ground = rng.integers(40, 120, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    rows, columns = np.mgrid[: size[0], : size[1]]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps)
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        for t in range(frames):
            frame = ground[: size[0], : size[1]].copy()
            frame[(rows - size[0] / 2) ** 2 + (columns - 4 - 3 * t) ** 2 < 100] = (230, 200, 40)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def make_folder(path, frames=4, size=(45, 63)):
    """Numbered images of noise."""
    return save_frames(path, np.random.default_rng(1).integers(0, 256, (frames, *size, 3), np.uint8), "frame{}.jpg")


SOURCES = {
    "mp4": lambda p: make_clip(p / "clip.mp4"),
    "one frame": lambda p: make_clip(p / "one.mp4", frames=1),
    "odd size": lambda p: make_clip(p / "odd.mp4", frames=3, size=(49, 35), pixels="yuv444p"),
    "grayscale": lambda p: make_clip(p / "gray.mkv", frames=3, pixels="gray", codec="ffv1"),
    "folder": lambda p: make_folder(p / "frames"),
}


def read_annotations(out, name):
    """Segments counted from 1, uint8 [T, H, W], of the palette PNGs of a video."""
    files = sorted((out / "Annotations" / name).iterdir())
    assert [f.name for f in files] == [f"{t:05d}.png" for t in range(len(files))]
    assert {Image.open(f).mode for f in files} == {"P"}
    return np.stack([np.asarray(Image.open(f)) for f in files])


class Repeated:
    """A video that repeats its frames up to this number."""

    def __init__(self, video, count):
        self.video, self.num_frames, self.path = video, count, video.path

    def frames(self, size):
        count = 0
        while count < self.num_frames:
            for frame in self.video.frames(size):
                yield frame
                count += 1
                if count == self.num_frames:
                    return
