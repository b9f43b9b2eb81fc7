"""segment_video and segment_stream take decoded frames; results equal those of the file."""

import io
import itertools
import json
import os
import signal
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from interpreter import read_frames, segment_stream, segment_video
from interpreter.data import VideoError, open_video
from interpreter.interrupts import Interrupted

from .clips import make_clip, read_annotations
from .videos import digest, moving

MASKS = {"masks_from": "slots"}  # for streams, too
KINDS = {
    "array": lambda frames, path: frames,
    "list": lambda frames, path: list(frames),
    "generator": lambda frames, path: (frame for frame in frames),
    "tensor": lambda frames, path: torch.from_numpy(frames),
    "tensor, channels first": lambda frames, path: torch.from_numpy(frames).permute(0, 3, 1, 2),
    "images": lambda frames, path: [Image.fromarray(frame) for frame in frames],
    "container": lambda frames, path: av.open(str(path)),
    "video": lambda frames, path: open_video(path),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_run):
    """The path of a clip, its frames, and the folder of its results."""
    folder = tmp_path_factory.mktemp("whole")
    path = make_clip(folder / "clip.mp4", frames=5)
    segment_video(path, tiny_run, folder / "out", **MASKS)
    return path, np.stack(list(open_video(path).frames())), folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_frames_give_the_files_of_the_path(tmp_path, tiny_run, whole, kind):
    path, frames, expected = whole
    fps = Fraction(30000, 1001) if kind != "container" else None  # which says it
    source = KINDS[kind](frames, path)
    result = segment_video(source, tiny_run, tmp_path / "out", name="clip", fps=fps, **MASKS)
    assert result.video.fps == Fraction(30000, 1001)
    found, files = digest(tmp_path / "out"), digest(expected)
    if kind != "video":  # slots.safetensors also names the file
        del found["slots.safetensors"], files["slots.safetensors"]
    assert found == files
    shown = [(frame, maps.labels) for frame, maps in result.frames_with_maps()]
    np.testing.assert_array_equal([frame for frame, _ in shown], frames)
    np.testing.assert_array_equal([labels for _, labels in shown], list(result.labels()))


def test_frames_have_a_name_and_a_rate(tmp_path, tiny_run):
    result = segment_video(iter(moving(3)), tiny_run, tmp_path / "out", stage="image")
    assert (result.video.name, result.video.fps) == ("frames", 24)
    assert read_annotations(tmp_path / "out", "frames").shape == (3, 64, 96)
    assert json.loads((tmp_path / "out/videos.json").read_text())["videos"][0]["name"] == "frames"
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    result = segment_video(clip, tiny_run, tmp_path / "other", name="mine", fps=10, stage="image")
    assert (result.video.name, result.video.fps) == ("mine", 10)
    with av.open(str(tmp_path / "other/overlay.mp4")) as file:
        assert file.streams.video[0].average_rate == 10


@pytest.mark.parametrize("crop", ["none", "central"])
@pytest.mark.parametrize("kind", ["generator", "list"])
def test_output_folder_may_have_the_name_of_the_frames(tmp_path, tiny_run, monkeypatch, kind, crop):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        segment_video(KINDS[kind](moving(2), None), tiny_run, "frames", crop=crop, frame_size=(64, 64), stage="image")
    assert len(read_annotations(tmp_path / "frames", "frames")) == 2


def test_options_that_would_do_nothing_are_refused(tmp_path, tiny_run):
    for option in ({"formats": ["nonsense"]}, {"video_id": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for files that are written: pass out as well"):
            segment_video(moving(2), tiny_run, **option)
    with pytest.raises(ValueError, match="fps 5: the container in the file object has its own frame rate"):
        segment_stream(io.BytesIO(), tiny_run, tmp_path / "out", fps=5)


def test_a_path_is_no_stream(tmp_path, tiny_run):
    with pytest.raises(VideoError, match=r"stream: 'clip.mp4' is a path; pass av\.open"):
        segment_stream("clip.mp4", tiny_run, tmp_path / "out")


def test_central_square_of_frames(tiny_run):
    frames = moving(3)
    square = segment_video(frames, tiny_run, crop="central", frame_size=(64, 64), stage="image")
    cut = segment_video(frames[:, :, 16:80], tiny_run, frame_size=(64, 64), stage="image")
    np.testing.assert_array_equal(list(square.labels()), list(cut.labels()))


@pytest.mark.parametrize("mistake", ["run", "setting", "alpha", "folder", "name", "count", "file", "rights"])
def test_mistakes_are_found_before_a_camera_is_read(tmp_path, tiny_run, mistake, monkeypatch):
    (tmp_path / "taken/Annotations/frames").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    if mistake == "rights":  # root has all of them
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    wrong = {
        "run": {"run": tmp_path / "none"},
        "setting": {"num_slots": 0},
        "alpha": {"alpha": 2},
        "folder": {"out": tmp_path / "taken"},
        "name": {"name": "../elsewhere"},
        "count": {"num_slots": 300},
        "file": {"out": tmp_path / "file" / "sub" / "out"},
        "rights": {"out": tmp_path / "out"},
    }[mistake]
    frames = iter(moving(3))
    with pytest.raises((ValueError, OSError)):
        segment_video(frames, **{"run": tiny_run, "out": tmp_path / "out", **wrong})
    assert len(list(frames)) == 3


def test_what_is_no_video_is_refused(tmp_path, tiny_run):
    for source in (None, moving(1)[0], moving(2) / 255, iter(())):
        with pytest.raises(VideoError):
            segment_video(source, tiny_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Camera:
    """A source without an end, which counts the frames that were read."""

    def __init__(self, frames):
        self.frames, self.taken = itertools.cycle(frames), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return next(self.frames)


def test_some_frames_of_an_endless_camera(tiny_run):
    camera, frames = Camera(moving(4)), moving(4)
    result = segment_video(itertools.islice(read_frames(camera), 6), tiny_run, stage="image")
    assert camera.taken == 6
    expected = segment_video(frames[[0, 1, 2, 3, 0, 1]], tiny_run, stage="image")
    np.testing.assert_array_equal(list(result.labels()), list(expected.labels()))


def test_stream_of_frames_is_labelled_like_their_file(tmp_path, tiny_run, whole):
    path, frames, _ = whole
    first = segment_video(frames[:2], tiny_run, **MASKS)
    for number, source in enumerate([iter(frames), frames, av.open(str(path))]):
        out, fps = tmp_path / str(number), None if number == 2 else 5
        result = segment_stream(source, tiny_run, out, window=2, fps=fps, **MASKS)
        assert (result.frames, result.cut, result.window) == (5, "", 2)
        about = json.loads((out / "stream.json").read_text())
        assert (about["fps"], about["delay"]) == ("5" if fps else "30000/1001", 1)
        labels = read_annotations(out, "stream")
        np.testing.assert_array_equal(labels[:2], np.stack(list(first.labels())) + 1)
        np.testing.assert_array_equal(labels, read_annotations(tmp_path / "0", "stream"))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (OSError("the camera was unplugged"), "the camera was unplugged"),
        (moving(1, 32, 48)[0], "stream: frame 5 is 32x48 (height x width), but the first is 64x96"),
        (None, "stream: frame 5 is None"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_stream_that_fails_keeps_what_came(tmp_path, tiny_run, problem, reason):
    def camera():
        yield from moving(5)
        if isinstance(problem, Exception):
            raise problem
        yield problem

    result = segment_stream(camera(), tiny_run, tmp_path / "out", window=2, **MASKS)
    assert result.frames == 5
    assert reason in result.cut
    assert json.loads((tmp_path / "out/stream.json").read_text())["cut"] == result.cut
    assert read_annotations(tmp_path / "out", "stream").shape == (5, 64, 96)


def test_stop_ends_a_stream_whose_camera_waits(tmp_path, tiny_run):
    """Frames that have arrived are labelled, although the next frame never arrives."""
    waiting = threading.Event()

    def camera():
        yield from moving(3)
        os.kill(os.getpid(), signal.SIGTERM)
        waiting.wait(60)

    with pytest.raises(Interrupted):
        segment_stream(camera(), tiny_run, tmp_path / "out", window=2, **MASKS)
    waiting.set()
    assert read_annotations(tmp_path / "out", "stream").shape == (3, 64, 96)


def test_stream_without_a_frame_is_refused(tmp_path, tiny_run):
    with pytest.raises(VideoError, match="stream: no frames"):
        segment_stream(iter(()), tiny_run, tmp_path / "out", **MASKS)
    assert not (tmp_path / "out").exists()
