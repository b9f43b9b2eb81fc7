"""Several splits of a data set, joined by +, are opened together."""

import shutil

import numpy as np
import pytest

from interpreter.configs import VideosConfig
from interpreter.data import open_dataset
from interpreter.data.__main__ import main
from interpreter.data.datasets import find_sources, split_parts
from interpreter.engine.videos import open_videos, published_ids

from ..videos import write_frames
from .releases import compressed, write_fbms, write_ytvis, ytvis_annotation, ytvis_video

SIZE = (24, 40)


@pytest.fixture
def ytvis(tmp_path):
    """Two annotated videos of train, two of valid and one of test, which have no masks."""
    mask = np.zeros(SIZE, bool)
    mask[4:12, 5:20] = True
    train = [ytvis_video(n, f"train{n}", 2, SIZE) for n in (5, 1)]
    write_ytvis(tmp_path, train, [ytvis_annotation(n, train[n], [compressed(mask), None]) for n in range(2)])
    write_ytvis(tmp_path, [ytvis_video(n, f"valid{n}", 3, SIZE) for n in (1, 2)], None, part="valid")
    write_ytvis(tmp_path, [ytvis_video(1, "test1", 1, SIZE)], None, part="test")
    return tmp_path


@pytest.fixture
def davis(tmp_path):
    """The layout of DAVIS 2017, which MOVi and generated scenes share: `late` is in two image sets."""
    for number, name in enumerate(("bear", "late", "swan")):
        for folder in ("JPEGImages", "Annotations_unsupervised"):
            write_frames(tmp_path / folder / "480p" / name, 2, SIZE, number, "{:05d}.png")
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    for split, names in {"train": "bear late", "validation": "swan", "test": "late swan"}.items():
        (tmp_path / "ImageSets" / "2017" / f"{split}.txt").write_text("\n".join(names.split()))
    return tmp_path


def names(*arguments):
    return [source.name for source in find_sources(*arguments)]


def test_splits_of_ytvis_come_in_the_order_of_their_names(ytvis):
    dataset = open_dataset("ytvis", ytvis, "train+valid+test")
    assert [video.name for video in dataset.videos] == ["train5", "train1", "valid1", "valid2", "test1"]
    assert [video.num_frames for video in dataset.videos] == [2, 2, 3, 3, 1]
    assert dataset.masks(0)[0].any()
    assert dataset.masks(2) is None
    assert names("ytvis", ytvis, "test+train") == ["test1", "train5", "train1"]
    config = VideosConfig(data="ytvis", root=ytvis, split="train+valid")
    assert len(open_videos(config, ytvis)) == 4
    assert published_ids(config) == {"train5": 5, "train1": 1, "valid1": 1, "valid2": 2}


def test_a_video_of_two_splits_counts_once(davis, ytvis):
    for kind in ("davis", "movi", "synthetic"):
        assert names(kind, davis, "train+validation") == ["bear", "late", "swan"]
        assert names(kind, davis, "test+train+validation") == ["late", "swan", "bear"]
    assert names("ytvis", ytvis, "train+all+valid") == ["train5", "train1", "valid1", "valid2"]


def test_splits_of_fbms_are_joined(tmp_path):
    for part, name in (("Trainingset", "bear01"), ("Testset", "cats01")):
        write_fbms(tmp_path, part, name, 2, {0: np.zeros((20, 30), int)}, [0, 255])
    assert names("fbms", tmp_path, "test+train") == ["cats01", "bear01"]
    # Two videos of one name could not be told apart in tables and files.
    shutil.copytree(tmp_path / "Trainingset" / "bear01", tmp_path / "Testset" / "bear01")
    with pytest.raises(
        ValueError, match=r"split train\+test has two videos of the name bear01, .*Trainingset.*Testset"
    ):
        find_sources("fbms", tmp_path, "train+test")
    assert names("fbms", tmp_path, "test") == ["bear01", "cats01"]


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("ytvis", "train+nowhere", "splits train, .*, not 'nowhere'"),
        ("davis", "train+nowhere+test", r"no image set nowhere\.txt; .*2017/train"),
        ("ytvos", "nowhere", "splits train, valid, test, train_all_frames, .*, not 'nowhere'"),
        ("fbms", "nowhere+train", "splits train and test, not 'nowhere'"),
        ("ytvis", "train+", r"split 'train\+' joins splits, but one of them has no name"),
        ("davis", "+", r"split '\+' joins splits, but one of them has no name"),
        ("folder", "train+valid", "a folder of videos has no splits"),
        ("segtrack", "train+valid", "SegTrack-v2 has no splits, so 'train' cannot be chosen"),
    ],
)
def test_unknown_parts_are_named(ytvis, davis, kind, split, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(kind, ytvis if kind == "ytvis" else davis, split)


def test_one_split_is_itself():
    assert split_parts("without-last-300") == ["without-last-300"]
    assert split_parts("train+valid") == ["train", "valid"]


def test_scenes_of_several_splits_are_generated(tmp_path):
    config = VideosConfig(data="synthetic", root=tmp_path, split="train+val", num_videos=1)
    assert [video.name for video in open_videos(config, tmp_path).videos] == ["train-00000", "val-00000"]


def test_verify_reports_each_split(ytvis, capsys):
    assert main(["verify", "ytvis", "--root", str(ytvis), "--split", "train+valid"]) == 0
    output = capsys.readouterr().out
    assert "train: 2 videos, 4 frames, 4 of them with masks, 0 problems" in output
    assert "valid: 2 videos, 6 frames, 0 of them with masks, 0 problems" in output
    (ytvis / "test.json").unlink()
    assert main(["verify", "ytvis", "--root", str(ytvis), "--split", "train+test"]) == 1
    output = capsys.readouterr().out
    assert "train: 2 videos" in output
    assert "missing: test: " in output


def test_joined_splits_are_converted_together(ytvis, tmp_path, capsys):
    out = tmp_path / "copy"
    assert main(["convert", "ytvis", "--root", str(ytvis), "--out", str(out), "--split", "train+valid"]) == 0
    assert "--split train-valid" in capsys.readouterr().out
    assert names("davis", out, "train-valid") == ["train5", "train1", "valid1", "valid2"]
