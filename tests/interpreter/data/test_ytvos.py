"""YouTube-VOS: splits, masks of few frames or none, and indexes that are damaged."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_dataset
from interpreter.data.__main__ import main
from interpreter.data.datasets import find_sources

from ..videos import cut
from .releases import write_ytvos

SIZE = (24, 40)


def ids(*squares):
    """Ids [H, W] of squares: (id, top, left)."""
    mask = np.zeros(SIZE, np.uint8)
    for label, top, left in squares:
        mask[top : top + 8, left : left + 8] = label
    return mask


FIRST = [ids((1, 2, 3)), ids((1, 2, 5), (2, 10, 20)), ids((2, 10, 24))]
LATE = [ids((1, 0, 0)), None, ids((2, 12, 30)), None]  # masks of frames where an object appears first


@pytest.fixture
def release(tmp_path):
    write_ytvos(tmp_path, "0a7c", FIRST)
    write_ytvos(tmp_path, "003f", [ids((3, 4, 4)), ids((1, 4, 6))])
    write_ytvos(tmp_path, "0b11", LATE, "valid")
    for name, masks in (("0a7c", FIRST), ("003f", FIRST[:2])):
        write_ytvos(tmp_path, name, masks, all_frames=True)
    return tmp_path


def test_masks_of_the_published_layout(release):
    dataset = open_dataset("ytvos", release, "train")
    assert [video.name for video in dataset.videos] == ["0a7c", "003f"]  # in the order of the index
    assert [file.name for file in dataset[0].files] == ["00000.jpg", "00005.jpg", "00010.jpg"]
    np.testing.assert_array_equal(dataset.masks(0), np.stack(FIRST))
    assert set(np.unique(dataset.masks(1))) == {0, 1, 3}  # ids as they are
    assert [video.name for video in open_dataset("ytvos", release).videos] == ["0a7c", "003f"]


def test_frames_without_a_mask_are_void(release):
    dataset = open_dataset("ytvos", release, "valid")
    np.testing.assert_array_equal(dataset.mask_frames(0), [0, 2])
    np.testing.assert_array_equal(dataset.masks(0)[[0, 2]], [LATE[0], LATE[2]])
    assert (dataset.masks(0)[[1, 3]] == 255).all()


def test_all_frames_have_the_masks_of_every_fifth(release):
    dataset = open_dataset("ytvos", release, "train_all_frames")
    assert [(video.name, video.num_frames) for video in dataset.videos] == [("003f", 6), ("0a7c", 11)]  # no index
    np.testing.assert_array_equal(dataset.mask_frames(1), [0, 5, 10])
    np.testing.assert_array_equal(dataset.masks(1)[[0, 5, 10]], np.stack(FIRST))
    shutil.move(release / "train" / "Annotations", release / "train_all_frames" / "Annotations")
    np.testing.assert_array_equal(open_dataset("ytvos", release, "train_all_frames").mask_frames(1), [0, 5, 10])


def test_masks_and_index_are_optional(release):
    shutil.rmtree(release / "train" / "Annotations")
    (release / "train" / "meta.json").unlink()
    dataset = open_dataset("ytvos", release, "train")
    assert [(video.name, video.num_frames) for video in dataset.videos] == [("003f", 2), ("0a7c", 3)]
    assert dataset.masks(0) is None
    assert str(release / "train" / "Annotations" / "003f") in dataset.expected_masks(0)


def test_splits_are_joined(release):
    names = [source.name for source in find_sources("ytvos", release, "valid+train")]
    assert names == ["0b11", "0a7c", "003f"]
    with pytest.raises(ValueError, match="two videos of the name 003f"):
        find_sources("ytvos", release, "train+train_all_frames")


def test_missing_splits_say_what_is_there(release):
    with pytest.raises(FileNotFoundError, match=r"test/JPEGImages: no such folder; .* holds train, train_all_frames"):
        find_sources("ytvos", release, "test")
    with pytest.raises(ValueError, match=r"splits train, valid, .*test_all_frames, not 'all'"):
        find_sources("ytvos", release, "all")
    (release / "test" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="the index of test names no video"):
        find_sources("ytvos", release, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"videos": {"0a7c": ', r"train/meta\.json: damaged JSON \(.*\); download it again"),
        ('{"videos": ["0a7c"]}', r"train/meta\.json: it has no object 'videos'"),
        ("[]", r"train/meta\.json: it has no object 'videos'"),
        *[(json.dumps({"videos": {name: {}}}), "is no name of a folder") for name in ("../x", "/x", "..", "", "a\\b")],
        ('{"videos": {}}', "the index of train names no video"),
    ],
)
def test_damaged_index_is_refused(release, content, message):
    (release / "train" / "meta.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_sources("ytvos", release, "train")


def test_damaged_and_missing_files_are_skipped_and_named(release, capsys):
    cut(release / "train" / "JPEGImages" / "003f" / "00005.jpg")
    index = release / "train" / "meta.json"
    content = json.loads(index.read_text())
    content["videos"]["gone"] = {"objects": {}}
    index.write_text(json.dumps(content))
    dataset = open_dataset("ytvos", release, "train")
    assert [video.name for video in dataset.videos] == ["0a7c"]
    assert "00005.jpg: damaged" in dataset.report()
    assert str(release / "train" / "JPEGImages" / "gone") in dataset.report()
    assert main(["verify", "ytvos", "--root", str(release)]) == 1
    output = capsys.readouterr().out
    assert "train: 3 videos, 3 frames, 3 of them with masks, 2 problems" in output
    assert "valid: 1 videos, 4 frames, 2 of them with masks, 0 problems" in output
    assert "missing: test: " in output
    assert "https://youtube-vos.org/dataset/vos/" in output


@pytest.mark.parametrize("damage", ["cut", "size", "colours"])
def test_a_damaged_mask_is_named(release, damage):
    path = release / "train" / "Annotations" / "0a7c" / "00005.png"
    if damage == "cut":
        cut(path)
    else:
        mode, size = ("RGB", SIZE[::-1]) if damage == "colours" else ("L", (9, 9))
        Image.new(mode, size, "red").save(path)
    if damage == "colours":  # noticed when the mask is decoded
        with pytest.raises(VideoError, match=r"00005\.png: colours"):
            open_dataset("ytvos", release, "train").masks(0)
    else:
        assert r"00005.png" in open_dataset("ytvos", release, "train").report()
