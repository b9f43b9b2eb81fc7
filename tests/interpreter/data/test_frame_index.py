"""Global frame numbers: those of all videos concatenated."""

import numpy as np
import pytest
import torch

from interpreter.data import open_video
from interpreter.data.frame_index import FrameIndex

from ..videos import encode, moving

LENGTHS = (3, 0, 4, 1)


def test_frames_are_numbered_video_after_video():
    index = FrameIndex(LENGTHS)
    expected = [(video, frame) for video, length in enumerate(LENGTHS) for frame in range(length)]
    videos, frames = index.locate(np.arange(len(index)))
    assert list(zip(videos.tolist(), frames.tolist(), strict=True)) == expected
    assert index.lengths.tolist() == list(LENGTHS)
    assert index.starts.tolist() == [0, 3, 3, 7, 8]


def test_tensors_keep_their_shape():
    videos, frames = FrameIndex(LENGTHS).locate(torch.tensor([[7, 0], [3, 2]]))
    assert videos.tolist() == [[3, 0], [2, 0]]
    assert frames.tolist() == [[0, 0], [0, 2]]
    assert videos.dtype == frames.dtype == np.int64


@pytest.mark.parametrize("number", [-1, 8])
def test_numbers_out_of_range_are_refused(number):
    with pytest.raises(IndexError, match=rf"frames {min(number, 2)} to {max(number, 2)} .* there are 8"):
        FrameIndex(LENGTHS).locate(np.array([2, number]))


def test_no_frames_are_located_to_nothing():
    for index in (FrameIndex([]), FrameIndex(LENGTHS)):
        assert [len(part) for part in index.locate(np.array([], np.int64))] == [0, 0]


def test_lengths_are_those_of_the_videos(tmp_path):
    paths = [encode(tmp_path / f"{n}.mp4", moving(n)) for n in (5, 2)]
    assert FrameIndex.of(map(open_video, paths)).lengths.tolist() == [5, 2]
