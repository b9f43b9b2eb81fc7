"""segments.json as results of YouTube-VIS: numbers of videos, and the checks of its API when it loads results."""

import json
import sys
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from interpreter import segment, segment_video
from interpreter.data import open_video
from interpreter.data.datasets import ytvis
from interpreter.data.datasets.ytvis import published_number
from interpreter.data.predictions import PredictionError, open_predictions
from interpreter.files import read_text
from interpreter.segmentation import Segmentation, SegmentedVideo

from .clips import make_clip
from .data.releases import compressed, write_ytvis, ytvis_annotation, ytvis_video

SIZE, LENGTH = (24, 40), 3
LEFT, RIGHT = (np.repeat([side], 20).repeat(24).reshape(20, 24).T for side in (True, False))
OBJECT = np.hstack([LEFT, RIGHT])  # the left half of a frame


@pytest.fixture
def release(tmp_path):
    """Two videos of YouTube-VIS, 7 and 3; the object of each is the left half of all frames."""
    root = tmp_path / "ytvis"
    videos = [ytvis_video(7, "0043f083b5", LENGTH, SIZE), ytvis_video(3, "00ad5016a4", LENGTH, SIZE)]
    tracks = [compressed(OBJECT)] * LENGTH
    write_ytvis(root, videos, [ytvis_annotation(1, videos[0], tracks), ytvis_annotation(2, videos[1], tracks)])
    return root


def halves(path, frames):
    """Two segments, the left and the right half of each frame."""
    soft = torch.eye(2).expand(frames, -1, -1)
    return SegmentedVideo(open_video(path), Segmentation((1, 2), soft), "none")


def load_results(results, truth):
    """Check results as the API does when it loads them, and return the masks that it reads: {video: [[T, H, W], …]}."""
    assert type(results) is list
    known = {video["id"]: video for video in truth["videos"]}
    assert {entry["video_id"] for entry in results} <= known.keys()
    masks = {}
    for entry in results:
        video = known[entry["video_id"]]
        assert len(entry["segmentations"]) == video["length"]
        assert entry["category_id"] in {category["id"] for category in truth["categories"]}
        assert isinstance(entry["score"], float)
        empty = np.zeros((video["height"], video["width"]), np.uint8)
        decoded = [empty if code is None else coco.decode(code) for code in entry["segmentations"]]
        assert all(mask.shape == empty.shape for mask in decoded)
        assert coco.area([code for code in entry["segmentations"] if code]).sum() == np.sum(decoded)
        masks.setdefault(entry["video_id"], []).append(np.stack(decoded) > 0)
    return masks


def test_results_fit_the_ground_truth_of_the_data_set(release, tmp_path):
    truth, results = json.loads((release / "train.json").read_text()), []
    for name, frames in (("0043f083b5", 4), ("00ad5016a4", 4)):  # a folder has one frame more than the index
        folder = release / "train" / "JPEGImages" / name
        (folder / "00003.jpg").unlink()
        halves(folder, frames - 1).write(tmp_path / name)
        results += json.loads((tmp_path / name / "segments.json").read_text())
    masks = load_results(results, truth)
    assert masks.keys() == {3, 7}
    for left, right in masks.values():
        assert (left == OBJECT).all()
        assert (right != OBJECT).all()


def test_a_clip_of_no_data_set_is_video_1_of_its_own_list(tmp_path):
    halves(make_clip(tmp_path / "clip.mp4", frames=LENGTH), LENGTH).write(tmp_path)
    listed = json.loads((tmp_path / "videos.json").read_text())
    assert listed["videos"] == [{"id": 1, "name": "clip", "height": 48, "width": 64, "length": LENGTH}]
    masks = load_results(json.loads((tmp_path / "segments.json").read_text()), listed)
    assert [mask.shape for mask in masks[1]] == [(LENGTH, 48, 64)] * 2


def test_command_and_function_take_a_number(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    segment.main([str(clip), "--run", str(tiny_run), "--out", str(tmp_path / "a"), "--video-id", "12"])
    segment_video(clip, tiny_run, tmp_path / "b", video_id=0)
    for out, number in (("a", 12), ("b", 0)):
        assert {entry["video_id"] for entry in json.loads((tmp_path / out / "segments.json").read_text())} == {number}
        assert json.loads((tmp_path / out / "videos.json").read_text())["videos"][0]["id"] == number


def test_live_stream_takes_no_number(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(closed=False, isatty=lambda: False))
    with pytest.raises(ValueError, match="a live stream has the number 1: leave it out"):
        segment.main(["-", "--run", str(tiny_run), "--out", str(tmp_path / "out"), "--video-id", "3"])


def test_numbers_are_those_of_the_index(release):
    folders = release / "train" / "JPEGImages"
    assert [published_number(folders / name) for name in ("0043f083b5", "00ad5016a4")] == [7, 3]
    (folders / "new").mkdir()
    assert published_number(folders / "new") is None
    (release / "train.json").rename(release / "train" / "instances.json")
    assert published_number(folders / "00ad5016a4") == 3
    (release / "train" / "instances.json").write_text('{"info": {"videos": []}, "videos": [{"id"')
    assert published_number(folders / "00ad5016a4") is None
    (release / "train" / "instances.json").unlink()
    assert published_number(folders / "00ad5016a4") is None
    assert published_number(release / "train.json") is None


def test_the_number_0_is_a_number(tmp_path):
    videos = [ytvis_video(4, "0043f083b5", LENGTH, SIZE), ytvis_video(0, "00ad5016a4", LENGTH, SIZE)]
    write_ytvis(tmp_path / "ytvis", videos, [])
    halves(tmp_path / "ytvis" / "train" / "JPEGImages" / "00ad5016a4", LENGTH + 1).write(tmp_path / "out")
    assert {entry["video_id"] for entry in json.loads((tmp_path / "out" / "segments.json").read_text())} == {0}


def test_an_index_is_read_once_for_all_videos(release, monkeypatch):
    reads = []
    monkeypatch.setattr(ytvis, "read_text", lambda path: reads.append(path) or read_text(path))
    folders = release / "train" / "JPEGImages"
    assert [published_number(folders / name) for name in ("0043f083b5", "00ad5016a4")] == [7, 3]
    assert reads == [release / "train.json"]


def results(path, *videos, **more):
    """A results file with one entry for each video (name, number)."""
    videos = [*videos, *more.items()]
    entry = {"category_id": 1, "score": 1.0, "segmentations": [compressed(OBJECT)]}
    path.write_text(json.dumps([{"video_id": number, **entry} for _, number in videos]))
    listed = [{"id": number, "name": name} for name, number in videos]
    path.with_name("videos.json").write_text(json.dumps({"videos": listed}))
    return path


def test_listed_names_tell_whose_masks_they_are(tmp_path):
    path = results(tmp_path / "segments.json", walk=1, run=2)
    assert open_predictions(path).names == ["run", "walk"]
    assert (open_predictions(path).labels("walk", 1, SIZE) == OBJECT).all()
    # If a data set has its own numbers, a listed name decides, not a number that means another video there.
    assert open_predictions(path, video_ids={"bike": 1, "run": 7}).names == ["run"]
    path.with_name("videos.json").unlink()
    assert open_predictions(path).names == ["1", "2"]
    assert open_predictions(path, video_ids={"bike": 1, "run": 7}).names == ["bike"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")], ids="-".join)
def test_accents_of_listed_names_may_be_composed_or_not(tmp_path, forms):
    listed, known = (normalize(form, "café") for form in forms)
    path = results(tmp_path / "segments.json", (listed, 1), run=2)
    predictions = open_predictions(path, video_ids={known: 9, "run": 2})
    assert predictions.names == ["café", "run"]
    assert (predictions.labels(known, 1, SIZE) == OBJECT).all()


def test_two_numbers_of_one_name_are_refused(tmp_path):
    path = results(tmp_path / "segments.json", (normalize("NFC", "café"), 1), (normalize("NFD", "café"), 2), run=3)
    for video_ids in (None, {"café": 1}):
        with pytest.raises(PredictionError, match="two sets of masks for video 'café': 1 and 2; keep one"):
            open_predictions(path, video_ids)
    assert open_predictions(path, {"run": 3}).names == ["run"]
    # 4 is the release's number of the video that the list calls 3
    path.write_text(path.read_text().replace('"video_id": 2', '"video_id": 4'))
    with pytest.raises(PredictionError, match="two sets of masks for video 'run': 3 and 4"):
        open_predictions(path, {"run": 4})


@pytest.mark.parametrize("content", ["[", '{"videos": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}'])
def test_damaged_list_of_videos_is_refused(tmp_path, content):
    path = results(tmp_path / "segments.json", walk=1)
    path.with_name("videos.json").write_text(content)
    with pytest.raises(PredictionError, match=r"videos\.json: "):
        open_predictions(path)
