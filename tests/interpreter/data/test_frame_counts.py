"""Counting frames by their packets agrees with decoding, and a complete pass is not repeated."""

import numpy as np
import pytest

from interpreter.data import VideoError, open_video

from ..videos import cut, encode, moving

COUNTED = {  # clips whose frames are counted without decoding them
    "closed.mp4": {"g": 12, "bf": 3},
    "open_gop.mov": {"g": 12, "x264-params": "open-gop=1:bframes=3"},
    "late.mkv": {"g": 12, "start": 240},
    "fragmented.mp4": {"g": 12, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "index_first.mp4": {"g": 12, "container": {"movflags": "faststart"}},
    "hidden.mp4": {"g": 12, "start": -20},  # an edit list hides the first 20 frames
    "vp9.webm": {"codec": "libvpx-vp9", "g": 10, "auto-alt-ref": 1, "lag-in-frames": 10},
    "mjpeg.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
}
DECODED = {  # clips whose frames are counted by decoding them
    "vp8.webm": {"codec": "libvpx", "g": 10, "auto-alt-ref": 1, "lag-in-frames": 10},
    "mpeg4.mp4": {"codec": "mpeg4", "bf": 2},
    "mpeg4.avi": {"codec": "mpeg4", "bf": 2},
    "same_times.mkv": {"g": 12, "fps": 3000},  # Matroska rounds to milliseconds
    "h264.ts": {"g": 12},
    "animated.gif": {"codec": "gif", "pixels": "rgb8"},
}


@pytest.fixture
def decoded(monkeypatch):
    """How many passes over a file decoded more than its first frame."""
    from interpreter.data.video import file

    passes = []

    class Counting(file.Ending):
        def __init__(self, *args):
            super().__init__(*args)
            self.pictures = []
            passes.append(self.pictures)

        def see_picture(self, shown):
            super().see_picture(shown)
            self.pictures.append(type(shown).__name__)

    monkeypatch.setattr(file, "Ending", Counting)
    return lambda: sum("VideoFrame" in pictures for pictures in passes)


@pytest.mark.parametrize("name", COUNTED | DECODED)
def test_count_is_that_of_decoding(tmp_path, name):
    path = encode(tmp_path / name, moving(31), **(COUNTED | DECODED)[name])
    assert open_video(path).num_frames == len(list(open_video(path).frames())) == (11 if "hidden" in name else 31)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", COUNTED | DECODED)
def test_error_of_a_cut_file_is_that_of_decoding(tmp_path, name, share):
    path = cut(encode(tmp_path / name, moving(60), **(COUNTED | DECODED)[name]), share)
    errors = []
    for action in (lambda video: video.num_frames, lambda video: len(list(video.frames()))):
        try:
            errors.append(action(open_video(path)))
        except VideoError as error:
            errors.append(str(error))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", COUNTED)
def test_counting_decodes_nothing(tmp_path, decoded, name):
    video = open_video(encode(tmp_path / name, moving(31), **COUNTED[name]))
    assert video.num_frames in (11, 31)
    assert decoded() == 0


@pytest.mark.parametrize("name", ["closed.mp4", "h264.ts"])
def test_a_complete_pass_settles_the_count(tmp_path, decoded, name):
    video = open_video(encode(tmp_path / name, moving(31), **(COUNTED | DECODED)[name]))
    assert sum(1 for _ in video.frames()) == video.num_frames == 31
    video.check()
    assert decoded() == 1


@pytest.mark.parametrize("name", ["closed.mp4", "late.mkv"])
def test_damage_inside_is_found_by_decoding(tmp_path, name):
    path = encode(tmp_path / name, moving(60), **COUNTED[name])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    messages = set()
    for action in (lambda video: video.check(), lambda video: list(video.frames()), lambda video: video.read([0])):
        for counted in (False, True):
            video = open_video(path)
            if counted and name == "closed.mp4":
                assert video.num_frames == 60
            with pytest.raises(VideoError, match="download or copy it again") as error:
                action(video)
            messages.add(str(error.value))
    assert len(messages) == 1


def test_frames_that_do_not_decode_are_an_error(tmp_path):
    path = encode(tmp_path / "a.mkv", moving(31), g=12)
    video = open_video(path)
    assert video.num_frames == 31
    encode(path, moving(20), g=12)  # written to meanwhile
    with pytest.raises(VideoError, match=r"a\.mkv changed while .* 20 frames decode, but 31 were counted"):
        list(video.frames())
