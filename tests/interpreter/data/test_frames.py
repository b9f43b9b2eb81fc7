"""Frames in arrays, tensors, images, containers and iterables become a video with their pixels, or one clear error."""

import copy
import errno
import gc
import io
import itertools
import os
import pickle
import tempfile
import tracemalloc
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from interpreter import read_frames
from interpreter.data import Video, VideoError, open_video
from interpreter.data.video.frames import HeldFrames, SpooledFrames, open_frames
from interpreter.render.video import VideoWriter

from ..videos import encode, moving, save_frames

FRAMES = moving(7, 24, 36)
TENSORS = torch.from_numpy(FRAMES)
HELD = {
    "array": FRAMES,
    "array, channels first": FRAMES.transpose(0, 3, 1, 2),
    "list of arrays": list(FRAMES),
    "tensor": TENSORS,
    "tensor, channels first": TENSORS.permute(0, 3, 1, 2),
    "list of tensors": list(TENSORS.permute(0, 3, 1, 2)),
    "tuple of images": tuple(Image.fromarray(frame) for frame in FRAMES),
    "mixed": [FRAMES[0], TENSORS[1], *map(Image.fromarray, FRAMES[2:])],
}
ONCE = {
    "generator of arrays": lambda: (frame for frame in FRAMES),
    "generator of tensors": lambda: (frame.permute(2, 0, 1) for frame in TENSORS),
    "generator of images": lambda: map(Image.fromarray, FRAMES),
    "frames of PyAV": lambda: (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in FRAMES),
    "islice of an endless one": lambda: itertools.islice(itertools.cycle(FRAMES), 7),
}


@contextmanager
def no_file_left():
    """The block leaves no file descriptor open."""
    before = os.listdir("/proc/self/fd")
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def require_frames(video, frames=FRAMES):
    assert isinstance(video, Video)
    video.check()
    assert (video.num_frames, video.height, video.width) == frames.shape[:3]
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(video.frames())), frames)
    np.testing.assert_array_equal(video.read([5, 0, 5]), frames[[5, 0, 5]])
    np.testing.assert_array_equal(np.stack(list(video.frames_from(4))), frames[4:])
    assert next(video.frames((12, 18))).shape == (12, 18, 3)
    one, other = video.frames(), video.frames()  # two readers at once
    for frame in frames:
        np.testing.assert_array_equal(next(one), frame)
        np.testing.assert_array_equal(next(other), frame)


@pytest.mark.parametrize("kind", HELD)
def test_frames_in_memory_are_referenced(kind):
    video = open_frames(HELD[kind])
    assert isinstance(video, HeldFrames)
    assert video._held is HELD[kind]
    require_frames(video)
    require_frames(pickle.loads(pickle.dumps(video)))
    next(video.frames())[:] = 0  # a new array
    require_frames(video)
    np.testing.assert_array_equal(list(read_frames(HELD[kind])), FRAMES)


@pytest.mark.parametrize("kind", ONCE)
def test_frames_that_come_once_are_kept_in_a_file(kind):
    with no_file_left():
        count = itertools.count()
        video = open_frames(ONCE[kind](), advance=lambda more: next(count))
        assert isinstance(video, SpooledFrames)
        assert next(count) == 7
        require_frames(video)
        copied = pickle.loads(pickle.dumps(video))
        del video
        require_frames(copied)


def test_a_copy_of_frames_in_a_file_shares_it():
    with no_file_left():
        video = open_frames(ONCE["generator of arrays"]())
        copied = copy.copy(video)
        copied.name, descriptor = "other", copied._file.fileno()
        assert (type(copied), video.name, descriptor) == (SpooledFrames, "frames", video._file.fileno())
        del video
        require_frames(copy.copy(copied))
        del copied


def test_array_that_is_filled_anew_gives_each_frame():
    def read():
        frame = np.empty_like(FRAMES[0])
        for pixels in FRAMES:
            frame[:] = pixels
            yield frame

    require_frames(open_frames(read()))
    np.testing.assert_array_equal(list(read_frames(read())), FRAMES)


@pytest.mark.parametrize("rotation", [None, 90])
@pytest.mark.parametrize("container", [True, False])
def test_container_of_pyav_gives_the_pixels_of_the_file(tmp_path, rotation, container):
    path = encode(tmp_path / "clip.mp4", moving(7, 24, 36), fps=Fraction(30000, 1001), rotation=rotation)
    whole = open_video(path)
    with av.open(str(path)) as opened:
        video = open_frames(opened if container else opened.decode(video=0))
    require_frames(video, np.stack(list(whole.frames())))
    assert video.fps == (whole.fps if container else 24)


@pytest.mark.parametrize("rotation", [0, 90])
def test_container_of_pyav_has_a_shape_of_pixels(tmp_path, rotation):
    with VideoWriter(tmp_path / "wide.mp4", Fraction(5), (24, 36), pixel_aspect=Fraction(4, 3)) as writer:
        for frame in FRAMES:
            writer.write(frame)
    with av.open(str(tmp_path / "wide.mp4")) as file, av.open(str(tmp_path / "turned.mp4"), "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0])
        stream.set_display_rotation(rotation)
        for packet in file.demux():
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    whole = open_video(tmp_path / "turned.mp4")
    with av.open(str(whole.path)) as opened:
        video = open_frames(opened)
    assert (
        (video.pixel_aspect, video.fps)
        == (whole.pixel_aspect, whole.fps)
        == (Fraction(3, 4) if rotation else Fraction(4, 3), 5)
    )
    require_frames(video, np.stack(list(whole.frames())))


def test_images_are_read_like_a_folder_of_them(tmp_path):
    folder = save_frames(tmp_path / "frames", FRAMES, "{:05d}.png")
    gray = [
        Image.open(path).convert(mode)
        for path, mode in zip(sorted(folder.iterdir()), itertools.cycle(["L", "RGBA", "P"]), strict=False)
    ]
    for number, image in enumerate(gray):
        image.save(folder / f"{number:05d}.png")
    require_frames(open_frames(gray), np.stack(list(open_video(folder).frames())))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (None, 24),
        (29.97002997, Fraction(30000, 1001)),
        (Fraction(25, 2),) * 2,
        (0.1, Fraction(1, 10)),
        (1 / 3600, Fraction(1, 3600)),
        (1000, 1000),
    ],
)
def test_frame_rate(fps, expected):
    assert open_frames(FRAMES, fps=fps).fps == expected
    assert open_frames(iter(FRAMES), fps=fps).fps == expected


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1 / 7200, Fraction(1, 7200), 1e-320, 2000])
def test_frame_rate_that_is_none(fps):
    with pytest.raises(VideoError, match=r"fps .*: must be a positive number"):
        open_frames(FRAMES, fps=fps)


@pytest.mark.parametrize("name", ["", "../up", "/root", "a/../b"])
def test_name_that_is_no_folder(name):
    with pytest.raises(VideoError, match="must name a folder"):
        open_frames(FRAMES, name)


SOURCES = {
    "None": (None, r"mine: None is no video; pass frames uint8 \[T, H, W, 3\]"),
    "a number": (3, "mine: int is no video"),
    "text": ("clip.mp4", r"mine: 'clip.mp4' is a path; pass av\.open\('clip.mp4'\), or use segment_video"),
    "a dictionary": ({"frames": FRAMES}, "mine: dict is no video"),
    "a file": (io.BytesIO(), r"holds bytes, no frames; pass av\.open\(file\), or use segment_stream"),
    "bytes": (b"clip", "mine: bytes is no video"),
    "one frame": (FRAMES[0], r"\[24, 36, 3\] is one frame, or frames without colour; pass \[frame\] for one frame"),
    "five axes": (FRAMES[None], r"\[1, 7, 24, 36, 3\] are no frames"),
    "an image": (Image.fromarray(FRAMES[0]), "mine: Image is no video"),
    "an empty list": ([], "mine: no frames; the list is empty"),
    "an empty array": (FRAMES[:0], "mine: no frames; the ndarray is empty"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_no_video_is_one_clear_line(kind):
    source, words = SOURCES[kind]
    with pytest.raises(VideoError, match=words) as caught:
        open_frames(source, "mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(VideoError):
        list(read_frames(source))


WRONG = {
    "floats": (FRAMES[0] / 255, r"frame 2 is float64 \[24, 36, 3\].*\(frame \* 255\)\.round\(\)"),
    "a tensor of floats": (TENSORS[0].bfloat16(), r"frame 2 is bfloat16 \[24, 36, 3\], and nothing says"),
    "long integers": (FRAMES[0].astype(int), "frame 2 is int64"),
    "grayscale": (FRAMES[0, ..., 0], r"frame 2 is uint8 \[24, 36\], grayscale; repeat it"),
    "one channel": (FRAMES[0, ..., :1], r"frame 2 is uint8 \[24, 36, 1\], grayscale"),
    "alpha": (np.zeros((24, 36, 4), np.uint8), r"four channels; drop the alpha channel: frame\[\.\.\., :3\]"),
    "a batch": (FRAMES[:2], r"frame 2 is uint8 \[2, 24, 36, 3\], a batch"),
    "no pixels": (FRAMES[0, :0], r"frame 2 is uint8 \[0, 36, 3\]"),
    "another size": (FRAMES[0, :20], r"frame 2 is 20x36 \(height x width\), but the first is 24x36; resize"),
    "None": (None, "frame 2 is None; a frame is an array"),
    "a path": (Path("00002.png"), r"frame 2 is of the type \w*Path; a frame is"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_frame_is_one_clear_line(kind):
    frame, words = WRONG[kind]
    frames = [*FRAMES[:2], frame]
    with pytest.raises(VideoError, match=words) as caught:
        list(open_frames(frames).frames())
    assert "\n" not in str(caught.value)
    with no_file_left(), pytest.raises(VideoError, match=words):
        open_frames(frame for frame in frames)


def test_iterator_that_ended_before_is_empty():
    frames = iter(FRAMES)
    require_frames(open_frames(frames))
    with no_file_left(), pytest.raises(VideoError, match=r"no frames; the .* is empty, or was read to its end before"):
        open_frames(frames)


@pytest.mark.parametrize("error", [RuntimeError("camera unplugged"), KeyboardInterrupt()])
def test_error_of_the_iterable_comes_through_and_leaves_nothing(error):
    def broken():
        yield from FRAMES
        raise error

    with no_file_left(), pytest.raises(type(error)):
        open_frames(broken())


def test_full_disk_is_one_line(small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk("1m")))
    endless = itertools.cycle(moving(3, 240, 320))
    with no_file_left(), pytest.raises(OSError, match=r"the disk of .* is full after [234] frames .*islice") as caught:
        open_frames(endless, "camera")
    assert caught.value.errno == errno.ENOSPC
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_memory_does_not_grow_with_the_frames():
    frame = np.zeros((240, 320, 3), np.uint8)

    def peak(count):
        tracemalloc.start()
        video = open_frames(frame.copy() for _ in range(count))
        assert sum(1 for _ in video.frames()) == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(200) < peak(10) + frame.nbytes < 20 * frame.nbytes
