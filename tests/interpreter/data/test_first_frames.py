"""The first frames of a video as a video of their own."""

import numpy as np
import pytest

from interpreter.data import FrameFolder, VideoError
from interpreter.data.video.first_frames import FirstFrames

from ..videos import write_frames


@pytest.fixture
def video(tmp_path):
    write_frames(tmp_path / "video", 5, (12, 20))
    return FrameFolder(tmp_path / "video")


@pytest.mark.parametrize(("count", "length"), [(1, 1), (3, 3), (5, 5), (9, 5)])
def test_first_frames_match_the_full_video(video, count, length):
    first = FirstFrames(video, count)
    for size in (None, (8, 10)):
        frames = list(first.frames(size))
        assert len(frames) == len(first) == length
        np.testing.assert_array_equal(frames, list(video.frames(size))[:length])
        np.testing.assert_array_equal(first.read([length - 1, 0], size), video.read([length - 1, 0], size))
    assert (first.name, first.path, first.height, first.width) == (video.name, video.path, video.height, video.width)


def test_frames_after_the_first_are_out_of_range(video):
    with pytest.raises(IndexError, match="frames 0 to 2"):
        FirstFrames(video, 3).read([3])
    with pytest.raises(ValueError, match="at least one frame, not 0"):
        FirstFrames(video, 0)


def test_damage_is_found(video):
    video.files[4].write_bytes(video.files[4].read_bytes()[:60])
    with pytest.raises(VideoError, match=video.files[4].name):
        FirstFrames(video, 3).check()
