"""The data sets that segment writes for other programs hold the label maps, pixel by pixel."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from interpreter import evaluate, segment
from interpreter.data import open_dataset
from interpreter.data.video.frames import open_frames
from interpreter.segmentation import FILES, Segmentation, SegmentedVideo

from .clips import make_clip
from .videos import digest, moving


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A segmented video, the folder of its data sets, and its label maps, counted from 1: segment 2 is in no frame, and
    segment 5 in the last frames only."""
    out, video = tmp_path_factory.mktemp("out"), open_frames(moving(5, 48, 72), "mine", fps=12.5)
    torch.manual_seed(0)
    soft = torch.softmax(4 * torch.randn(5, 24, 5), -1)
    soft[:, :, 1] = 0
    soft[:3, :, 4] = 0
    segmented = SegmentedVideo(video, Segmentation((4, 6), soft.half()), "none")
    segmented.write(out, video_id=7, formats=["coco", "youtube-vis", "coco"])
    labels = np.stack(list(segmented.labels())) + 1
    assert np.unique(labels).tolist() == [1, 3, 4, 5]
    assert 5 not in labels[:3]
    return segmented, out, labels


def test_coco_holds_every_segment_of_every_frame(written):
    segmented, out, labels = written
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO(str(out / "coco/labels.json"))
    assert dataset.dataset["categories"] == [{"id": 1, "name": "segment"}]
    expected = {"id": 7, "name": "mine", "height": 48, "width": 72, "length": 5, "fps": 12.5}
    assert dataset.dataset["videos"] == [expected]
    assert len(dataset.imgs) == 5
    frames = list(segmented.video.frames())
    for number, image in enumerate(dataset.loadImgs(sorted(dataset.imgs))):
        assert (image["video_id"], image["frame_id"], image["file_name"]) == (7, number, f"{number:05d}.jpg")
        painted = np.zeros((48, 72), np.uint8)
        for annotation in dataset.loadAnns(dataset.getAnnIds(image["id"])):
            mask = dataset.annToMask(annotation)
            painted += mask * np.uint8(annotation["track_id"])
            rows, columns = mask.nonzero()
            left, top = columns.min(), rows.min()
            box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert (annotation["area"], annotation["bbox"]) == (mask.sum(), box)
            assert (annotation["category_id"], annotation["iscrowd"], annotation["video_id"]) == (1, 0, 7)
        np.testing.assert_array_equal(painted, labels[number])
        shown = np.asarray(Image.open(out / "coco/data" / image["file_name"])).astype(int)
        assert np.abs(shown - frames[number]).mean() < 8  # JPEG; from one frame to the next it is 16


def test_youtube_vis_is_read_back_by_our_reader_and_scores_one(written, tmp_path):
    _, out, labels = written
    dataset = open_dataset("ytvis", out / "youtube-vis", "all")
    assert [video.name for video in dataset.videos] == ["mine"]
    content = json.loads((out / "youtube-vis/train.json").read_text())
    assert [entry["id"] for entry in content["annotations"]] == [1, 3, 4, 5]
    for order, entry in enumerate(content["annotations"], start=1):  # our reader counts objects in their order
        np.testing.assert_array_equal(dataset.masks(0) == order, labels == entry["id"])
        for code, box, area in zip(entry["segmentations"], entry["bboxes"], entry["areas"], strict=True):
            assert (code is None) == (box is None) == (area is None)
            if code is not None:
                assert box == masks.toBbox(code).tolist()
                assert area == masks.area(code)
    arguments = ["--masks", out / "segments.json", "--data", "ytvis", "--split", "all", "--root", out / "youtube-vis"]
    arguments += ["--protocol", "solv", "--pictures", "0", "--out", tmp_path]
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    (own,) = (result for result in results if result["method"] == "segments.json")
    assert own["mean"]["miou_video"] == 1


def test_command_writes_the_data_sets(tmp_path, tiny_run, capsys):
    clip, out = make_clip(tmp_path / "clip.mp4", frames=3), tmp_path / "out"
    command = [str(clip), "--run", str(tiny_run), "--out", str(out), "--stage", "image"]
    assert segment.main(command) == 0
    plain = digest(out)
    assert segment.main([*command, "--formats", "coco", "youtube-vis"]) == 0
    assert f"{out}/coco\n{out}/youtube-vis\n" in capsys.readouterr().out
    assert {name for name in digest(out) if not name.startswith(("coco", "youtube-vis"))} == set(plain)
    assert sorted(path.name for path in (out / "coco").rglob("*")) == [
        *("00000.jpg", "00001.jpg", "00002.jpg", "data", "labels.json")
    ]
    before = digest(out)
    assert segment.main([*command, "--formats", "coco"]) == 0
    assert digest(out) == before


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        (["voc"], "format 'voc': choose from coco, youtube-vis, label-studio"),
        (["coco"], r"coco already exists and is not from this command; give another --out"),
        (["label-studio"], r"needs Label Studio's SDK \(.*\): pip install label-studio-sdk"),
    ],
)
def test_formats_that_cannot_be_written_are_one_line(tmp_path, tiny_run, formats, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "label_studio_sdk", None)
    (tmp_path / "out/coco").mkdir(parents=True)
    frames = iter(moving(2))
    with pytest.raises(ValueError, match=words):
        segment.segment_video(frames, tiny_run, tmp_path / "out", formats=formats)
    assert len(list(frames)) == 2
    assert not any(path.name in FILES for path in (tmp_path / "out").iterdir())


def test_detections_without_supervision_are_one_line(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install supervision"):
        written[0].detections()
