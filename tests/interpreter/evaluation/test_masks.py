"""Saved masks are scored through the command evaluate."""

import csv
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from interpreter import evaluate as command
from interpreter.configs import VideosConfig
from interpreter.data import open_dataset
from interpreter.data.predictions import open_predictions
from interpreter.evaluation.candidates import SavedMasks
from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.provenance import code_version
from interpreter.evaluation.scoring import score_dataset
from interpreter.metrics import PROTOCOLS

from ..data.releases import compressed, write_ytvis, ytvis_annotation, ytvis_video
from .videos import FRAMES, SIZE, save_davis, save_json, save_npz, save_png, squares

FORMATS = {"masks": save_png, "masks.npz": save_npz, "masks.json": save_json}
GAPS = np.array([0, 7, 3], np.uint8)  # ids of the prediction: with gaps, and in another order


@pytest.fixture
def root(tmp_path):
    return save_davis(tmp_path / "data", {"a": squares(), "b": squares(), "c": squares()})


def score(masks, root, out, *options):
    """Exit status, and the content of scores.json."""
    arguments = ["--masks", masks, "--data", "davis", "--year", "2017", "--root", root, "--out", out, *options]
    status = command.main([str(argument) for argument in arguments])
    return status, json.loads((out / "scores.json").read_text(), parse_constant=pytest.fail)


def result(report, protocol, method):
    (entry,) = (r for r in report["results"] if r["protocol"] == protocol and r["method"] == method)
    return entry


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_hand_computed_numbers(name, root, tmp_path, capsys):
    # Half of the first object's square in video b is missed: IoU (4·8) / (12·8), one object of six.
    maps = {"a": GAPS[squares()], "b": GAPS[squares(shift=4)], "c": GAPS[squares()]}
    masks = FORMATS[name](tmp_path / name, maps)
    status, report = score(masks, root, tmp_path / "out")
    assert status == 0
    entry = result(report, "davis-2017-unsupervised", name)
    assert entry["mean"]["j"] == pytest.approx((5 + 1 / 3) / 6, abs=1e-12)
    assert entry["mean"]["identity_switches"] == 0
    assert (entry["split"], entry["commit"], entry["std"]) == ("val", code_version(), None)
    assert report["skipped"] == []
    printed = capsys.readouterr().out
    assert f"{(5 + 1 / 3) / 6:.3f}" in printed
    for stamp in ("protocol davis-2017-unsupervised", "split val", f"commit {code_version()}"):
        assert stamp in printed


def test_youtube_vis_results_name_videos_by_number(tmp_path):
    videos = [ytvis_video(7, "0043f083b5", FRAMES, SIZE), ytvis_video(3, "00ad5016a4", FRAMES, SIZE)]
    tracks = {video["id"]: [[compressed(frame == i) for frame in squares()] for i in (1, 2)] for video in videos}
    annotations = [
        ytvis_annotation(10 * video["id"] + i, video, track)
        for video in videos
        for i, track in enumerate(tracks[video["id"]])
    ]
    write_ytvis(tmp_path / "release", videos, annotations)
    masks = save_json(tmp_path / "masks.json", {7: squares(), 3: squares(shift=4)})
    arguments = ["--masks", masks, "--data", "ytvis", "--split", "all", "--root", tmp_path / "release"]
    arguments += ["--protocol", "solv", "--out", tmp_path / "out"]
    assert command.main([str(argument) for argument in arguments]) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert result(report, "solv", "masks.json")["mean"]["miou_video"] == pytest.approx((3 + 1 / 3) / 4)
    (main,) = (v["videos"] for v in report["videos"] if v["method"] == "masks.json")
    assert main["00ad5016a4"]["miou_video"] == pytest.approx([1 / 3, 1])


def test_several_protocols_each_with_its_own_numbers(root, tmp_path):
    maps = {"a": squares(), "b": squares(), "c": GAPS[squares(shift=4)]}
    masks = save_png(tmp_path / "masks", maps)
    _, report = score(masks, root, tmp_path / "out", "--protocol", "solv", "slot-contrast")
    assert result(report, "solv", "masks")["mean"]["miou_video"] == pytest.approx((5 + 1 / 3) / 6)
    mbo = result(report, "slot-contrast", "masks")["mean"]["mbo_video"]
    assert mbo == pytest.approx((2 + (1 + 1 / 3) / 2) / 3)  # a mean over videos
    assert {"one segment", "grid 8"} <= {r["method"] for r in report["results"]}
    with (tmp_path / "out/videos.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "masks" and row["metric"] == "mbo_video"]
    assert [(row["video"], float(row["value"])) for row in rows] == [("a", 1), ("b", 1), ("c", pytest.approx(2 / 3))]
    assert {(row["protocol"], row["split"], row["commit"]) for row in rows} == {
        ("slot-contrast", "val", code_version())
    }


def test_named_objects_are_scored_on_semi_supervised_masks(tmp_path, capsys):
    truth = squares()
    root = save_davis(tmp_path / "data", {"a": truth, "b": truth}, "Annotations")
    save_png(root / "Annotations_unsupervised/480p", {"a": GAPS[truth], "b": GAPS[truth]})  # not scored
    late = truth.copy()
    late[3:][late[3:] == 2] = 0  # object 2 of video b is lost in the second half: J = 1, 1, 0, 0 between the ends
    late[[0, -1]] = 7  # and the first and last frame are not scored
    masks = save_png(tmp_path / "masks", {"a": truth, "b": late})
    arguments = ["--masks", masks, "--data", "davis", "--root", root, "--split", "val", "--protocol", "davis-2017"]
    assert command.main([str(argument) for argument in (*arguments, "--out", tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    (row,) = report["results"]  # no baselines: they have no such ids
    expected = {
        "j": 3.5 / 4,
        "j_recall": 3.5 / 4,
        "j_decay": 1 / 4,
        "f": 3.5 / 4,
        "f_recall": 3.5 / 4,
        "f_decay": 1 / 4,
    }
    assert row["mean"] == pytest.approx({"jf": 3.5 / 4, **expected}, abs=1e-12)
    printed = capsys.readouterr().out
    for column in (
        "J&F",
        "J recall",
        "J decay",
        "F recall",
        "F decay",
        "on davis-2017, split val, protocol davis-2017,",
    ):
        assert column in printed


def test_video_with_an_unknown_id_is_skipped_by_name(tmp_path):
    root = save_davis(tmp_path / "data", {"a": squares(), "b": squares()}, "Annotations")
    masks = save_png(tmp_path / "masks", {"a": squares(), "b": GAPS[squares()]})
    status, report = score(masks, root, tmp_path / "out", "--protocol", "davis-2017", "--strict")
    assert status == 1
    assert list(report["frames"]) == ["a"]
    (skipped,) = report["skipped"]
    assert skipped["name"] == "b"
    assert "has id 7, but the first annotated frame names the objects 1 to 2" in skipped["reason"]


def test_davis_2017_needs_the_masks_of_its_track(root, tmp_path):
    masks = save_png(tmp_path / "masks", {name: squares() for name in "abc"})
    with pytest.raises(FileNotFoundError, match="no Annotations/480p, so it has no semi-supervised masks"):
        score(masks, root, tmp_path / "out", "--protocol", "davis-2017")


def test_every_number_carries_the_version_of_its_protocol(root, tmp_path):
    masks = save_png(tmp_path / "masks", {name: squares() for name in "abc"})
    names = ("solv", "slot-contrast")
    _, report = score(masks, root, tmp_path / "out", "--protocol", *names, "--baselines", "one-segment")
    versions = {"solv": 2, "slot-contrast": 1}
    assert {(r["protocol"], r["version"]) for r in report["results"] + report["videos"]} == set(versions.items())
    assert report["protocols"]["solv"]["matching"] == "frame-mean"
    with (tmp_path / "out/videos.csv").open() as file:
        assert {(row["protocol"], int(row["version"])) for row in csv.DictReader(file)} == set(versions.items())
    for file in ("table.txt", "report.html"):
        text = (tmp_path / "out" / file).read_text()
        assert "solv (version 2)" in text
        assert "slot-contrast (version" not in text


def test_corrupt_file_is_named_and_the_rest_is_scored(root, tmp_path, capsys):
    masks = save_png(tmp_path / "masks", {name: squares() for name in "abc"})
    bad = masks / "b/00003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    status, report = score(masks, root, tmp_path / "out")
    assert status == 0
    assert result(report, "davis-2017-unsupervised", "masks")["mean"]["j"] == 1
    assert result(report, "davis-2017-unsupervised", "masks")["per_seed"][0]["videos"] == 2
    assert result(report, "davis-2017-unsupervised", "grid 8")["per_seed"][0]["videos"] == 2  # the same videos
    (skipped,) = report["skipped"]
    assert skipped["name"] == "b"
    assert str(bad) in skipped["reason"]
    assert str(bad) in capsys.readouterr().out
    assert "b/00003.png" in (tmp_path / "out/report.html").read_text()
    assert score(masks, root, tmp_path / "out", "--strict")[0] == 1


def test_damaged_ground_truth_counts_as_not_scored_too(root, tmp_path):
    masks = save_png(tmp_path / "masks", {name: squares() for name in "abc"})
    bad = root / "Annotations_unsupervised/480p/a/00001.png"
    bad.write_bytes(bad.read_bytes()[:60])
    status, report = score(masks, root, tmp_path / "out", "--strict")
    assert status == 1
    assert [str(bad) in entry["reason"] for entry in report["skipped"]] == [True]
    assert list(report["frames"]) == ["b", "c"]


def test_strict_passes_where_all_videos_are_scored(root, tmp_path):
    masks = save_png(tmp_path / "masks", {name: squares() for name in "abc"})
    assert score(masks, root, tmp_path / "out", "--strict")[0] == 0


def test_nothing_to_score_is_an_error(root, tmp_path):
    masks = save_png(tmp_path / "masks", {"elsewhere": squares()})
    with pytest.raises(ValueError, match=r"no video could be scored: a: .*no masks of video 'a'"):
        score(masks, root, tmp_path / "out")


@pytest.mark.parametrize("void", [0, 255])
def test_undefined_numbers_are_null_and_say_why(tmp_path, capsys, void):
    empty = np.where(squares() > 0, void, 0).astype(np.uint8)
    root = save_davis(tmp_path / "data", {"a": empty, "b": squares()})
    masks = save_png(tmp_path / "masks", {"a": squares(), "b": squares()})
    why = "–: 1 of 2 videos have no object (ids 1 to 254 in their masks; 0 is background, 255 void): a"
    _, report = score(masks, root, tmp_path / "out")
    assert result(report, "davis-2017-unsupervised", "masks")["mean"]["j"] == 1
    assert why in capsys.readouterr().out
    assert why in (tmp_path / "out/report.html").read_text()
    (root / "ImageSets/2017/val.txt").write_text("a\n")
    _, report = score(masks, root, tmp_path / "out")
    assert result(report, "davis-2017-unsupervised", "masks")["mean"]["j"] is None
    assert "–: 1 of 1 videos have no object" in capsys.readouterr().out


def test_white_truth_is_scored_and_missing_truth_is_located(tmp_path):
    for part, maps in (("JPEGImages", squares() * 60), ("Annotations", np.where(squares() > 0, 255, 0))):
        save_png(tmp_path / "data" / part, {"v [x]": maps.astype(np.uint8)})
    masks = save_png(tmp_path / "masks", {"v [x]": (squares() > 0).astype(np.uint8)})
    options = ["--data", "folder", "--protocol", "slot-contrast"]
    _, report = score(masks, tmp_path / "data", tmp_path / "out", *options)
    assert result(report, "slot-contrast", "masks")["mean"]["mbo_video"] == 1
    shutil.rmtree(tmp_path / "data" / "Annotations" / "v [x]")
    expected = r"no masks to score against; expected .*Annotations/v \[x\]/00000\.png …, but that folder holds nothing"
    with pytest.raises(ValueError, match=expected):
        score(masks, tmp_path / "data", tmp_path / "out", *options)


def test_memory_does_not_grow_with_the_number_of_videos(tmp_path):
    frames = 40
    maps = squares(frames)[:, :, np.minimum(np.arange(400) // 2, 39)].repeat(8, axis=1)  # 40 x 192 x 400
    source = save_png(tmp_path / "masks", {"v0": maps})
    root = save_davis(tmp_path / "data", {"v0": maps})
    for n in range(1, 9):  # eight more videos, of the same files
        for folder in (source, root / "Annotations_unsupervised/480p", root / "JPEGImages/480p"):
            shutil.copytree(folder / "v0", folder / f"v{n}", copy_function=os.link)

    def peak(count):
        (root / "ImageSets/2017/val.txt").write_text("".join(f"v{n}\n" for n in range(count)))
        dataset = open_dataset("davis", root, "val", year=2017)
        masks = SavedMasks(open_predictions(source), "masks", ("one-segment", "grid"), (8,))
        tracemalloc.start()
        scores = score_dataset(dataset, masks, [PROTOCOLS["interpreter"]], Gallery(1))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(scores.videos) == count
        return used

    few, many = peak(3), peak(9)
    assert many - few < maps.nbytes / 3  # if masks were kept, six more videos would take 6 to 12 times maps.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --run DIR"),
        (["--run", "x", "--masks", "y"], "either --run DIR"),
        (["--masks", "x", "--data", "davis"], "--masks needs --root"),
        (["--masks", "x", "--root", "y", "--sweep-merge", "0.1"], "--sweep-merge needs --run"),
        (["--masks", "x", "--root", "y", "--clip-frames", "5"], "--clip-frames needs --run"),
        (["--run", "x", "--stage", "image", "--sweep-slots", "4"], "--sweep-slots: .* no meaning with --stage image"),
        (["--run", "x", "--sweep-slots", "0"], "--sweep-slots must be at least 1, got 0"),
        (["--run", "x", "--num-slots", "0"], "--num-slots must be at least 1, got 0"),
        (["--run", "x", "--sweep-merge", "0.1", "0.1"], "--sweep-merge names a value twice"),
        (["--masks", "x", "--root", "y", "--baselines", "grid", "spectral"], "spectral need a run's features"),
        (["--run", "x", "--protocol", "davis-2017"], "a run numbers its segments by itself; choose davis-2017-unsup"),
        (
            ["--masks", "x", "--root", "y", "--protocol", "davis-2017", "--baselines", "grid"],
            "leave --baselines grid out",
        ),
        (
            ["--masks", "x", "--root", "y", "--protocol", "solv", "davis-2017"],
            "evaluate solv in another command",
        ),
        (["--masks", "x", "--root", "y", "--stage", "image"], "--stage needs --run: saved masks have no settings"),
        (["--masks", "x", "--root", "y", "--frame-size", "64", "96"], "--frame-size needs --run"),
        (["--masks", "x", "--root", "y", "--edges", "guided"], "--edges needs --run: saved masks have no soft masks"),
        (["--run", "x", "--edges"], "--edges must be none, guided or both"),
        (["--run", "x", "--edges", "none", "none"], "--edges must be none, guided or both"),
        (["--run", "x", "--edges", "guided", "--clusters", "256"], "--edges guided needs --clusters of at most 255"),
        (["--run", "x", "--seeds", "1", "1"], "--seeds must be"),
        (["--run", "x", "--seeds"], "--seeds must be"),
        (["--run", "x", "--seeds", "-1"], "--seeds must be at least 0, got -1"),
        (["--run", "x", "--pictures", "-1"], "--pictures must be at least 0"),
        (["--method", "cluster"], "--method needs --root"),
        (["--method", "cluster", "--root", "x", "--sweep-merge", "0.1"], "cluster has no setting merge_th"),
        (["--method", "cluster", "--root", "x", "--clip-frames", "9"], "cluster has no setting repeat_to"),
        (
            ["--run", "x", "--protocol", "interpretter"],
            "unknown --protocol interpretter; choose from interpreter, solv",
        ),
    ],
)
def test_contradicting_options_are_refused_first(options, message):
    with pytest.raises(ValueError, match=message):
        command.main(options)


@pytest.mark.parametrize(
    ("data", "year", "name"),
    [
        ("davis", "2016", "davis-2016"),
        ("davis", "2017", "davis-2017-unsupervised"),
        ("synthetic", "2016", "interpreter"),
    ],
)
def test_each_data_set_has_its_protocol(data, year, name):
    config = command.Evaluation(data=VideosConfig(data=data, year=year))
    assert command.choose_protocols(config) == [PROTOCOLS[name]]
