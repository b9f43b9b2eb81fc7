"""Which loader is chosen for which videos, and the errors if none can decode them."""

import sys

import psutil
import pytest
import torch

from interpreter.data import open_video
from interpreter.data.loaders import choose_loader, dali_obstacle, open_loader
from interpreter.data.loaders import open as opening
from interpreter.data.video.file import VideoFile

from ..videos import encode, moving
from .loading import CPU, SIZE


@pytest.fixture
def turned(tmp_path):
    return open_video(encode(tmp_path / "turned.mov", moving(5), "mjpeg", "yuvj420p", rotation=90))


def test_videos_know_their_codec_and_orientation(h264, turned, videos):
    assert [h264.codec, h264.orientation.transposed] == ["h264", False]
    assert [turned.codec, turned.orientation.transposed] == ["mjpeg", True]
    assert [video.codec for video in videos if isinstance(video, VideoFile)] == ["vp9", "mjpeg"]


def test_dali_refuses_what_it_cannot_decode_before_it_starts(h264, turned, videos, monkeypatch):
    monkeypatch.setattr(opening, "dali_is_installed", lambda: True)
    assert dali_obstacle(videos, CPU) is None
    assert dali_obstacle([*videos, h264], torch.device("cuda")) is None
    message = r"--loader dali: DALI does not decode h264 on a CPU: .*h264\.mp4 and 1 more; use --loader pyav, or auto$"
    with pytest.raises(ValueError, match=message):
        open_loader("dali", [*videos, h264, h264], SIZE, CPU)
    for device in (CPU, torch.device("cuda")):
        assert "ignores the rotation or mirroring" in dali_obstacle([*videos, turned], device)


def test_missing_dali_is_an_error_that_says_how_to_install_it(videos, monkeypatch):
    monkeypatch.setattr(opening, "dali_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"NVIDIA DALI is not installed \(pip install .*dali.*use --loader pyav"):
        open_loader("dali", videos, SIZE, CPU)
    assert choose_loader(videos, SIZE, torch.device("cuda")) != "dali"


def test_dali_is_missing_without_its_parent_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    assert not opening.dali_is_installed()


def test_auto_takes_memory_then_dali_on_a_gpu_then_processes(videos, h264, turned, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(opening, "dali_is_installed", lambda: True)
    needed = 53 * SIZE[0] * SIZE[1] * 3
    monkeypatch.setattr(opening, "free_memory", lambda: 4 * needed)
    assert choose_loader(videos, SIZE, CPU) == choose_loader(videos, SIZE, cuda) == "torch"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_loader(videos, SIZE, cuda) == "dali"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(opening, "free_memory", lambda: 4 * needed - 4)
    assert choose_loader([*videos, h264], SIZE, cuda) == "dali"
    assert choose_loader([*videos, h264], SIZE, CPU) == "pyav"
    assert choose_loader(videos, SIZE, CPU) == "pyav"
    assert choose_loader([*videos, turned], SIZE, cuda) == "pyav"
    with open_loader("auto", videos, SIZE, CPU, workers=1) as loader:
        assert loader.name == "pyav"


def test_frames_that_do_not_fit_in_memory_are_refused(videos, monkeypatch):
    monkeypatch.setattr(opening, "free_memory", lambda: 10)
    with pytest.raises(ValueError, match=r"--loader torch: all frames together are 0\.0 GB, but .*--loader pyav"):
        open_loader("torch", videos, SIZE, CPU)


def test_free_memory_is_positive_and_at_most_the_machines():
    assert 0 < opening.free_memory() <= psutil.virtual_memory().total


def test_unknown_loaders_are_refused(videos):
    with pytest.raises(ValueError, match=r"unknown loader 'decord'; choose from auto, dali, pyav, torch"):
        open_loader("decord", videos, SIZE, CPU)
