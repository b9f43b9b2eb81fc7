"""Folders of random frames."""

import pytest

from interpreter.data import open_video

from .small_caches import LENGTHS, write_frames


@pytest.fixture
def videos(tmp_path):
    for number, length in enumerate(LENGTHS):
        write_frames(tmp_path / "videos" / str(number), length, number)
    return [open_video(tmp_path / "videos" / str(number)) for number in range(len(LENGTHS))]
