"""Tensors of whole videos that do not fit into memory are kept in files: equal results, and no file remains."""

import errno
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from interpreter import large
from interpreter.data import open_video
from interpreter.methods import METHODS
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.runs import open_segmenter
from interpreter.segmentation import SegmentedVideo

from .clips import make_clip

WAYS = {
    "learned": Settings(association="learned"),
    "image": Settings(stage="image"),
    "features": Settings(association="features"),
    "tokens": Settings(association="features", masks_from="tokens"),
}


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Sizes of the files that are created from now on; no tensor fits into memory."""
    made, make = [], large._nameless_file
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(large, "SHARE", 0.0)

    def spy(size, what):
        made.append(size)
        mapping = make(size, what)
        assert not list(folder.iterdir())  # the file has no name any more although it is in use
        return mapping

    monkeypatch.setattr(large, "_nameless_file", spy)
    return made


def results(segmenter, clip, out, seeds=(0, 1)):
    """Masks, label maps, and the files that are written, for the last of some seeds."""
    encoded = segmenter.encode(clip, seeds)
    segmentation = segmenter.segment(encoded, seeds[-1])
    SegmentedVideo(clip, segmentation).write(out)
    files = {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return segmentation.masks(), segmentation.labels(size=(48, 64)), segmentation.tensors, files


@pytest.mark.parametrize("way", WAYS)
def test_results_do_not_depend_on_the_place(way, tiny_run, tmp_path, request):
    clip = open_video(make_clip(tmp_path / "clip.mp4", frames=70))  # three chunks of the backbone
    segmenter = open_segmenter(METHODS["interpreter"], tiny_run, WAYS[way])
    masks, labels, tensors, written = results(segmenter, clip, tmp_path / "memory")
    files = request.getfixturevalue("files")
    in_file = results(segmenter, clip, tmp_path / "file")
    slots = {"learned": 4, "image": 4, "features": 8, "tokens": 8}[way]
    attention, tokens = 70 * 24 * slots * 2, 70 * 24 * 192 * 2
    assert files == [attention, *([tokens] if way == "tokens" else []), attention]
    assert torch.equal(in_file[0], masks)
    assert np.array_equal(in_file[1], labels)
    assert all(torch.equal(in_file[2][name], tensor) for name, tensor in tensors.items())
    assert in_file[3] == written


def test_tensors_share_half_of_the_free_memory(monkeypatch):
    made = []
    monkeypatch.setattr(large, "free_memory", lambda: 2 * 4 * 6 * 2)
    monkeypatch.setattr(large, "_nameless_file", lambda size, what: made.append(size) or bytearray(size))
    tensors = large.FrameTensors(4, torch.device("cpu"))
    for _ in range(2):  # as for two seeds: each would fit alone
        assert tensors.empty((6,), torch.float16, "attention").tensor.shape == (4, 6)
    assert made == [4 * 6 * 2]
    tensors.empty((6,), torch.float32, "slots", elsewhere=False)  # tensors that have to be on the device stay there
    assert len(made) == 1


def test_pages_that_were_written_are_let_go(files):
    count, row = 64, 1 << 20
    whole = large.FrameTensors(count, torch.device("cpu")).empty((row,), torch.float16, "attention")
    values = torch.arange(row, dtype=torch.float32).half()
    before = resident()
    for frame in range(count):
        whole.write(slice(frame, frame + 1), values + frame % 7)
    assert resident() - before < 16e6  # of 134 MB
    assert all(torch.equal(whole.tensor[frame], values + frame % 7) for frame in range(count))


def resident():
    """Bytes of the process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * large.mmap.PAGESIZE


@pytest.mark.parametrize("reserves", [True, False])
def test_full_disk_says_what_is_needed_where(reserves, monkeypatch, small_disk, files):
    folder = small_disk(1 << 20)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    if not reserves:  # a system without posix_fallocate
        monkeypatch.delattr(large.os, "posix_fallocate")
    tensors = large.FrameTensors(10, torch.device("cpu"))
    with pytest.raises(OSError, match=f"attention of the video takes 2.1 MB.*free in {folder} .*set TMPDIR") as error:
        tensors.empty(((1 << 20) // 10,), torch.float16, "attention")
    assert error.value.errno == errno.ENOSPC
    assert not list(folder.iterdir())
