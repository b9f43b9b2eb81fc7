"""YouTube-VIS: splits, run-length codes, overlaps, and indexes that are damaged or leak."""

import json

import numpy as np
import pytest

from interpreter.data import VideoError, open_dataset
from interpreter.data.datasets import find_sources
from interpreter.data.verify import find_leaks

from .releases import compressed, uncompressed, write_ytvis, ytvis_annotation, ytvis_video

SIZE, LENGTH = (24, 40), 5


def square(top, left):
    mask = np.zeros(SIZE, bool)
    mask[max(0, top) : top + 8, max(0, left) : left + 8] = True
    return mask


# The first object leaves and comes back, the second passes over it, and a crowd covers part of both.
FIRST = [square(2, 3), square(2, 6), None, None, square(4, 30)]
SECOND = [None, square(4, 8), square(4, 10), square(0, 0), square(6, 34)]
CROWD = [square(0, 0), square(0, 0), None, square(10, 20), None]


def codes(masks, form):
    return [None if mask is None else form(mask) for mask in masks]


def expected():
    truth = np.zeros((LENGTH, *SIZE), np.uint8)
    for label, masks in ((255, CROWD), (1, FIRST), (2, SECOND)):
        for t, mask in enumerate(masks):
            if mask is not None:
                truth[t][mask] = label
    return truth


@pytest.fixture(params=[uncompressed, compressed])
def release(request, tmp_path):
    """Two videos; annotations of both in one list, the crowd's last, out of order by video."""
    form = request.param
    videos = [ytvis_video(7, "0043f083b5", LENGTH, SIZE), ytvis_video(3, "00ad5016a4", 2, SIZE)]
    annotations = [
        ytvis_annotation(1, videos[0], codes(FIRST, form)),
        ytvis_annotation(2, videos[1], codes([square(1, 1), None], form)),
        ytvis_annotation(3, videos[0], codes(SECOND, form)),
        ytvis_annotation(4, videos[0], codes(CROWD, form), crowd=1),
    ]
    write_ytvis(tmp_path, videos, annotations)
    return tmp_path


def edit(root, change, index="train.json"):
    content = json.loads((root / index).read_text())
    change(content)
    (root / index).write_text(json.dumps(content))


def test_masks_of_the_published_layout(release):
    dataset = open_dataset("ytvis", release, "train")
    assert [video.name for video in dataset.videos] == ["0043f083b5", "00ad5016a4"]
    assert [video.num_frames for video in dataset.videos] == [LENGTH, 2]  # not the frames beside the index's
    assert [file.name for file in dataset[0].files] == ["00000.jpg", "00005.jpg", "00010.jpg", "00015.jpg", "00020.jpg"]
    assert dataset.masks(0).dtype == np.uint8
    np.testing.assert_array_equal(dataset.masks(0), expected())
    np.testing.assert_array_equal(dataset.masks(1), np.stack([square(1, 1), np.zeros(SIZE)]))
    np.testing.assert_array_equal(dataset.mask_frames(0), range(LENGTH))


def test_video_without_annotations_has_no_objects(release):
    edit(release, lambda content: content["annotations"].pop(1))
    masks = open_dataset("ytvis", release, "train").masks(1)
    assert masks.shape == (2, *SIZE)
    assert not masks.any()


@pytest.mark.parametrize("index", ["valid.json", "valid/instances.json", "valid/valid.json"])
@pytest.mark.parametrize("annotations", [None, "null"])
def test_split_without_public_masks_has_none(tmp_path, index, annotations):
    write_ytvis(tmp_path, [ytvis_video(1, "a", 2, SIZE)], None, part="valid", index=index)
    if annotations:
        edit(tmp_path, lambda content: content.update(annotations=None), index)
    dataset = open_dataset("ytvis", tmp_path, "valid")
    assert dataset.masks(0) is None
    assert dataset.mask_frames(0).shape == (0,)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """905 videos of one frame; their ids differ from their positions in the file."""
    root = tmp_path_factory.mktemp("many")
    videos = [ytvis_video(5000 - n, f"v{n:04d}", 1, (8, 8)) for n in range(905)]
    write_ytvis(root, videos, [])
    return root


def test_training_leaves_out_the_hold_out(many):
    splits = {split: find_sources("ytvis", many, split) for split in ("train", "holdout", "all")}
    assert [source.name for source in splits["holdout"]] == [f"v{n:04d}" for n in range(600, 900)]
    assert [source.name for source in splits["train"]] == [f"v{n:04d}" for n in (*range(600), *range(900, 905))]
    assert [source.name for source in splits["all"]] == [f"v{n:04d}" for n in range(905)]
    assert splits["holdout"][0].id == 5000 - 600
    assert find_leaks(splits["train"], splits["holdout"]) == []
    assert len(find_leaks(splits["all"], splits["holdout"])) == 3 * 300  # by id, by folder and by first frame


def test_last_300_are_the_largest_ids_and_training_has_the_rest(many):
    last, rest = (find_sources("ytvis", many, split) for split in ("last-300", "without-last-300"))
    assert [source.name for source in last] == [f"v{n:04d}" for n in range(300)]  # ids fall from 5000
    assert [source.name for source in rest] == [f"v{n:04d}" for n in range(300, 905)]
    assert min(source.id for source in last) == 4701 > max(source.id for source in rest)
    assert find_leaks(rest, last) == []


def test_largest_ids_are_found_by_number_and_stay_in_file_order(tmp_path):
    numbers = [7, 1000, *range(20, 319), 9]  # as text, 9 would come after 1000
    write_ytvis(tmp_path, [ytvis_video(n, f"v{n}", 1, (8, 8)) for n in numbers], [])
    assert [source.id for source in find_sources("ytvis", tmp_path, "last-300")] == [1000, *range(20, 319)]
    assert [source.id for source in find_sources("ytvis", tmp_path, "without-last-300")] == [7, 9]
    edit(tmp_path, lambda content: content["videos"][1].update(id="1000"))
    with pytest.raises(ValueError, match="split last-300 needs whole numbers as ids"):
        find_sources("ytvis", tmp_path, "last-300")


def test_leak_is_found_by_folder_and_by_bytes(many, tmp_path):
    train, held_out = (find_sources("ytvis", many, split) for split in ("train", "holdout"))
    copy = held_out[5].files[0].read_bytes()
    videos = [ytvis_video(1, "copy", 1, (8, 8)), ytvis_video(2, "v0777", 1, (8, 8))]
    write_ytvis(tmp_path, videos, [])
    (tmp_path / "train/JPEGImages/copy/00000.jpg").write_bytes(copy)
    leaks = find_leaks(find_sources("ytvis", tmp_path, "train"), held_out)
    assert len(leaks) == 2
    assert "v0777 and" in leaks[0]
    assert leaks[0].endswith("same folder of frames")
    assert "copy and" in leaks[1]
    assert "v0605 have the same first frame" in leaks[1]
    assert find_leaks(train, []) == []


def test_hold_out_of_a_short_file_is_an_error(release):
    with pytest.raises(ValueError, match="entries 600 to 899, but it has 2"):
        open_dataset("ytvis", release, "holdout")
    for split in ("last-300", "without-last-300"):
        with pytest.raises(ValueError, match=f"split {split} divides more than 300 entries, but it has 2"):
            open_dataset("ytvis", release, split)
    with pytest.raises(
        ValueError, match="splits train, holdout, without-last-300, last-300, all, valid, test, not 'val'"
    ):
        open_dataset("ytvis", release, "val")


@pytest.mark.parametrize(
    "name", ["../../../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..\\b.jpg", "a\0.jpg", "", 7]
)
def test_paths_out_of_the_root_are_refused(release, name):
    edit(release, lambda content: content["videos"][0]["file_names"].__setitem__(1, name))
    dataset = open_dataset("ytvis", release, "train")
    assert [video.name for video in dataset.videos] == ["00ad5016a4"]
    assert "no path below the folder of frames" in dataset.report()
    assert "video 7" in dataset.report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["videos"][0].update(height=25), "where the index says 25x40"),
        (lambda c: c["videos"][0].pop("width"), "where the index says 24xNone"),
        (lambda c: c["videos"][0].update(file_names=None), "no list of file_names"),
        (lambda c: c["annotations"][0]["segmentations"].pop(), "annotation 1 has 4 masks for 5 frames"),
        (lambda c: c["annotations"][0].update(segmentations="x"), "annotation 1 has no list of run-length codes"),
        (lambda c: c["annotations"][0]["segmentations"].__setitem__(0, [[1, 2, 3, 4]]), "no list of run-length codes"),
        (lambda c: c["annotations"][0]["segmentations"][0].update(size=[10**6] * 2), "frame 0 has a mask of size"),
        (
            lambda c: c["annotations"].extend([c["annotations"][0]] * 253),
            "255 objects, but label maps hold at most 254",
        ),
    ],
)
def test_malformed_video_is_skipped_and_named(release, change, message):
    edit(release, change)
    dataset = open_dataset("ytvis", release, "train")
    assert [video.name for video in dataset.videos] == ["00ad5016a4"]
    assert dataset.report().startswith("Skipped 1 of 2 videos: ")
    assert message in dataset.report()


def test_254_objects_fit(release):
    edit(release, lambda content: content["annotations"].extend([content["annotations"][0]] * 252))
    assert open_dataset("ytvis", release, "train").masks(0)[0].max() == 255  # the crowd's void
    assert (open_dataset("ytvis", release, "train").masks(0)[0] == 254).any()


@pytest.mark.parametrize(
    "counts", [[-1, 961], [10**12], [3.5], [True, 959], ["3"], [], "", "zz\n", "P" * 10**5, "é", None, {"a": 1}]
)
def test_wrong_runs_are_an_error_and_never_a_mask(release, counts):
    edit(release, lambda content: content["annotations"][0]["segmentations"][0].update(counts=counts))
    dataset = open_dataset("ytvis", release, "train")
    with pytest.raises(VideoError, match=r"train\.json: video 7: frame 0"):
        dataset.masks(0)
    assert dataset.masks(1) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("videos"), "'videos' is no list of objects"),
        (lambda c: c.update(annotations={}), None),
        (lambda c: c.update(annotations=[1]), "'annotations' is no list of objects"),
        (lambda c: c["videos"].append(c["videos"][0]), "two videos have the same id"),
        (lambda c: c["annotations"][0].update(video_id=99), "annotation 1 is of video 99, which is not there"),
    ],
)
def test_malformed_index_is_one_error(release, change, message):
    edit(release, change)
    if message is None:
        assert not open_dataset("ytvis", release, "train").masks(0).any()
        return
    with pytest.raises(ValueError, match=message):
        open_dataset("ytvis", release, "train")


def test_no_json_names_the_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.json or train/instances\.json"):
        open_dataset("ytvis", tmp_path, "train")
    (tmp_path / "train.json").write_text('{"videos": []}')
    with pytest.raises(FileNotFoundError, match="JPEGImages: no such folder"):
        open_dataset("ytvis", tmp_path, "train")
    (tmp_path / "train" / "JPEGImages").mkdir(parents=True)
    for text in ("[" * 10**5, "[]", '{"videos"'):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(ValueError, match=r"train\.json: (damaged JSON|not an object)"):
            open_dataset("ytvis", tmp_path, "train")
