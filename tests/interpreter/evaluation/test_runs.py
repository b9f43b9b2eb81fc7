"""A run is evaluated: seeds, sweeps and baselines on features that are encoded once."""

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slotkernels import guided_labels, propagate_labels

from interpreter.configs import VideosConfig
from interpreter.data import open_dataset
from interpreter.evaluate import Evaluation, evaluate, main
from interpreter.evaluation import candidates, gallery
from interpreter.evaluation.candidates import KEPT_FRAMES, Candidate, Entry, SegmenterMasks, Sweep
from interpreter.evaluation.record import Provenance, format_tables
from interpreter.evaluation.scoring import Row, Scores, number, score_dataset
from interpreter.methods import METHODS
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.metrics import PROTOCOLS, kmeans_segments
from interpreter.models.backbones import Backbone

INTERPRETER = PROTOCOLS["interpreter"]
NATIVE = ("slot-contrast",)  # at 128x192, in a fifth of the time


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def data(scenes):
    return VideosConfig(root=scenes, split="val", num_videos=2)


def test_mean_and_spread_over_seeds_are_those_computed_by_hand():
    per_seed = tuple(dict.fromkeys(INTERPRETER.metrics, value) for value in (0.2, 0.5, 0.8))
    row = Row(INTERPRETER, Entry("video stage", "main"), (0, 1, 2), per_seed)
    assert row.mean["miou_video"] == pytest.approx(0.5)
    assert row.std["miou_video"] == pytest.approx(0.3)  # sqrt((0.09 + 0 + 0.09) / 2), not of three
    assert Row(INTERPRETER, row.entry, (0,), per_seed[:1]).std is None


def test_a_number_that_a_seed_leaves_undefined_has_no_mean():
    per_seed = tuple(dict.fromkeys(INTERPRETER.metrics, value) for value in (0.2, math.nan))
    row = Row(INTERPRETER, Entry("video stage", "main"), (0, 1), per_seed)
    assert math.isnan(row.mean["miou_video"])
    assert math.isnan(row.std["miou_video"])


def test_number_of_a_video_is_the_mean_of_what_is_defined():
    assert number([1.0, math.nan, 0.0]) == 0.5
    assert number(0.25) == 0.25
    assert math.isnan(number([]))


def test_seeds_sweeps_and_baselines_encode_each_frame_once(run, data, monkeypatch):
    encoded = []
    features = Backbone.features
    monkeypatch.setattr(
        Backbone, "features", lambda self, frames: encoded.append(len(frames)) or features(self, frames)
    )
    config = Evaluation(
        run=run,
        data=data,
        protocol=NATIVE,
        settings=Settings(association="learned", merge_threshold=0.0),
        sweep_merge=(2.0,),
        sweep_slots=(2, 5),
        baselines=("k-means", "spectral"),
        pictures=0,
    )
    scores = evaluate(config)
    assert sum(encoded) == 2 * 24
    names = ["video stage", *(f"video stage, {s}" for s in ("merge 2", "2 slots", "5 slots"))]
    assert [m.name for m in scores.entries] == [*names, "k-means 3", "spectral 3 per frame, linked"]
    for by_seed in scores.numbers.values():
        assert list(by_seed) == [0, 1, 2]
    means = [[by[seed]["val-00000"]["mbo_frame"] for seed in by] for by in scores.numbers.values()]
    assert len({tuple(m) for m in means}) == len(means)  # settings differ from one another
    assert len(set(means[0])) > 1  # and so do seeds


class _FewOfFour:
    """Four segments, of which this many have pixels in each video; and a baseline with an unknown number."""

    def candidates(self, video, status):
        used = 1 + int(video.name[-1])
        columns = np.arange(192) % used
        yield Candidate(Entry("few", "main"), 0, lambda size: _map(columns, video), segments=4)
        yield Candidate(Entry("one", "blind"), None, lambda size: _map(0 * columns, video))


def _map(columns, video):
    return np.broadcast_to(columns, (video.num_frames, 128, 192)).astype(np.uint8)


def test_empty_segments_are_counted_for_each_video(data):
    """The first video uses one of four segments, the second one two."""
    protocol, dataset = PROTOCOLS["slot-contrast"], open_dataset("synthetic", data.root, "val")
    scores = score_dataset(dataset, _FewOfFour(), [protocol], gallery.Gallery(0))
    main_row, baseline = scores.entries
    by_video = scores.numbers["slot-contrast", main_row][0]
    assert [by_video[name]["empty_segments"] for name in sorted(by_video)] == [0.75, 0.5]
    assert scores.empty_segments(protocol, main_row) == 0.625
    assert math.isnan(scores.empty_segments(protocol, baseline))
    text = format_tables(scores, Provenance("data", "val", "run", "commit"))
    assert "empty segments: 62.5% of those of few have no pixel in a video (mean over videos)" in text


def test_sweep_at_the_setting_of_the_run_is_the_run_itself(run, data):
    method = METHODS["interpreter"]
    segmenter = open_segmenter(method, run, Settings(association="learned"))
    model = segmenter.video_stage.config
    sweeps = (
        Sweep("merge_threshold", "merge threshold", "merge {:g}", (model.merge_threshold,)),
        Sweep("num_slots", "video slots", "{} slots", (model.num_slots,)),
    )
    video = open_dataset("synthetic", data.root, "val").videos[0]
    source = SegmenterMasks(segmenter, (0, 4), sweeps)
    maps = {(c.entry.name, c.seed): c.labels((32, 48)) for c in source.candidates(video, lambda text: None)}
    assert len(maps) == 6
    for seed in (0, 4):
        alone = segmenter.segment(segmenter.encode(video, (seed,)), seed).labels(size=(32, 48))
        for name in ("", f", merge {model.merge_threshold:g}", f", {model.num_slots} slots"):
            assert (maps[f"video stage{name}", seed] == alone).all()


def test_summary_is_that_of_the_videos_in_the_file(run, data):
    scores = evaluate(Evaluation(run=run, data=data, protocol=NATIVE, pictures=1))
    home = run / "evaluation/synthetic-val-video-features"
    report = json.loads((home / "scores.json").read_text(), parse_constant=pytest.fail)
    for entry in report["results"]:
        assert (entry["protocol"], entry["split"]) == ("slot-contrast", "val")
        assert entry["commit"] == report["commit"]
    (main_row,) = (entry for entry in report["results"] if entry["kind"] == "main")
    by_seed = [v["videos"] for v in report["videos"] if v["method"] == "association by features"]
    means = [statistics.fmean(video["fg_ari_frame"] for video in videos.values()) for videos in by_seed]
    assert main_row["mean"]["fg_ari_frame"] == pytest.approx(statistics.fmean(means))
    assert main_row["std"]["fg_ari_frame"] == pytest.approx(statistics.stdev(means))
    switches = [n for video in by_seed[0].values() for n in video["identity_switches"]]
    assert main_row["per_seed"][0]["identity_switches"] == pytest.approx(statistics.fmean(switches))  # of objects
    assert sorted(path.suffix for path in home.iterdir()) == [".csv", ".html", ".json", ".png", ".png", ".txt"]
    assert isinstance(scores, Scores)


def test_label_maps_of_both_edges_are_those_of_the_ops(run, data, monkeypatch):
    segmenter = open_segmenter(METHODS["interpreter"], run, Settings(association="learned", merge_threshold=0.0))
    video = open_dataset("synthetic", data.root, "val").videos[0]
    size, grid = (96, 160), segmenter.grid
    features = []
    segmentation = segmenter.segment(segmenter.encode(video, (4,), keep=features.append), 4)
    guide = torch.from_numpy(np.stack(list(video.frames(size))))[None]
    clusters = torch.from_numpy(kmeans_segments(torch.cat(features).numpy(), grid=grid, k=3, seed=4)).long()
    factors = {
        "video stage": (segmentation.attention[None], segmentation.across[None]),
        "k-means 3": (F.one_hot(clusters).float()[None], torch.eye(3).expand(1, len(video), 3, 3)),
    }

    streamed, stream = [], type(video)._stream
    monkeypatch.setattr(type(video), "_stream", lambda self, size: streamed.append(size) or stream(self, size))
    for limit, decoded in ((KEPT_FRAMES, 1), (0, 3)):
        monkeypatch.setattr(candidates, "KEPT_FRAMES", limit)
        streamed.clear()
        sweeps = (Sweep("merge_threshold", "merge threshold", "merge {:g}", (2.0,)),)
        baselines = ("one-segment", "grid", "k-means")
        source = SegmenterMasks(segmenter, (4,), sweeps, baselines, (3,), ("guided", "none"))
        maps = {}
        for candidate in source.candidates(video, lambda text: None):
            maps[candidate.entry] = candidate.labels(size)
        assert streamed == [segmenter.frame_size, *[size] * decoded]
        assert [(e.name, e.kind, e.edges) for e in maps] == [
            ("video stage, guided edges", "main", "guided"),
            ("video stage", "main", "none"),
            ("video stage, merge 2, guided edges", "sweep", "guided"),
            ("video stage, merge 2", "sweep", "none"),
            ("one segment", "blind", "none"),
            ("grid 3", "blind", "none"),
            ("k-means 3, guided edges", "baseline", "guided"),
            ("k-means 3", "baseline", "none"),
        ]
        by_name = {entry.name: labels for entry, labels in maps.items()}
        for name, (image, across) in factors.items():
            plain = propagate_labels(image, across, grid, size)[0].numpy()
            guided = guided_labels(image, across, grid, guide)[0].numpy()
            np.testing.assert_array_equal(by_name[name], plain)
            np.testing.assert_array_equal(by_name[f"{name}, guided edges"], guided)
            assert (plain != guided).any()


@pytest.mark.parametrize("edges", [("none", "guided"), ("guided", "none"), ("guided",)])
def test_edges_of_every_row_are_recorded(edges, run, scenes, tmp_path, monkeypatch, capsys):
    encoded, drawn = [], []
    features, draw = Backbone.features, gallery.mask_grid
    monkeypatch.setattr(Backbone, "features", lambda self, f: encoded.append(len(f)) or features(self, f))
    monkeypatch.setattr(
        gallery, "mask_grid", lambda frames, rows, **o: drawn.append(list(rows)) or draw(frames, rows, **o)
    )
    arguments = ["--run", run, "--root", scenes, "--num-videos", 2, "--seeds", 0, "--clusters", 3, "--pictures", 1]
    arguments += ["--association", "learned", "--protocol", *NATIVE, "--sweep-slots", 2, 5, "--out", tmp_path / "out"]
    arguments += ["--edges", *edges]
    assert main([str(argument) for argument in arguments]) == 0
    assert sum(encoded) == 2 * 24
    suffix = {"none": "", "guided": ", guided edges"}
    rows = [(f"{name}{suffix[e]}", e) for name in ("video stage", "k-means 3") for e in edges]
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert report["config"]["edges"] == list(edges)
    main_row = report["results"][0]
    assert (main_row["method"], main_row["kind"], main_row["edges"]) == (*rows[0][:1], "main", edges[0])
    results = {(r["method"], r["edges"]): r for r in report["results"]}
    assert len(results) == len(report["results"]) == 4 * len(edges) + 2
    assert {(r["method"], r["edges"]) for r in report["videos"]} == {*rows, ("one segment", "none"), ("grid 3", "none")}
    with (tmp_path / "out/videos.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["method"], line["edges"]) for line in lines} >= set(rows)
    for name, e in rows:
        values = [float(x["value"]) for x in lines if (x["method"], x["metric"]) == (name, "mbo_video")]
        assert results[name, e]["mean"]["mbo_video"] == pytest.approx(statistics.fmean(values))
    page = (tmp_path / "out/report.html").read_text()
    assert all(name in page for name, _ in rows)
    assert page.count("at inference, guided edges") == (4 if "guided" in edges else 0)  # two metrics, alt and caption
    printed = capsys.readouterr().out
    assert all(name in printed for name, _ in rows)
    assert drawn == [[f"video stage{suffix[edges[0]]}", f"k-means 3{suffix[edges[0]]}"]] * 2


@pytest.mark.parametrize("stage", ["video", "image"])
def test_the_same_command_gives_the_same_numbers(stage, run, scenes, tmp_path, capsys):
    arguments = ["--run", str(run), "--root", str(scenes), "--num-videos", "2", "--stage", stage]
    arguments += ["--protocol", *NATIVE, "--seeds", "5"]
    results = []
    for out in (tmp_path / "one", tmp_path / "two"):
        assert main([*arguments, "--out", str(out), "--baselines", "k-means-positions", "k-means-frame"]) == 0
        assert str(out / "report.html") in capsys.readouterr().out
        results.append(json.loads((out / "scores.json").read_text())["results"])
    assert results[0] == results[1]
    slots, name = {"video": (9, "association by features"), "image": (4, "image stage")}[stage]
    names = [name, f"k-means {slots} + positions", f"k-means {slots} per frame, linked"]
    assert [entry["method"] for entry in results[0]] == names


def test_scenes_are_scored_at_the_size_of_the_protocol(run, data):
    scores = evaluate(Evaluation(run=run, data=data, frame_size=(128, 192), seeds=(0,), pictures=0))
    row = next(row for row in scores.rows() if row.entry.kind == "main")
    assert 0 <= row.mean["miou_video"] <= 1
    with pytest.raises(ValueError, match="--frame-size 64 96"):
        evaluate(Evaluation(run=run, data=data, frame_size=(64, 100), pictures=0))


def test_run_without_video_stage_names_the_command(image_run, data):
    with pytest.raises(FileNotFoundError, match=r"no trained video stage; .*--stage video"):
        evaluate(Evaluation(run=image_run(), data=data, settings=Settings(association="learned")))


def test_central_squares_are_scored_as_squares(run, scenes):
    data = VideosConfig("davis", scenes, "val", "2017", crop="central")
    with pytest.raises(ValueError, match=r"--crop central takes squares, which --frame-size 64 96 would distort"):
        evaluate(Evaluation(run=run, data=data, baselines=(), seeds=(0,), pictures=0))
    squares = Evaluation(run=run, data=data, baselines=("one-segment",), seeds=(0,), pictures=0, frame_size=(64, 64))
    scores = {crop: evaluate(replace(squares, data=replace(data, crop=crop))) for crop in ("none", "central", "random")}
    baselines = {crop: [row.mean for row in of.rows() if "one" in row.entry.name] for crop, of in scores.items()}
    assert baselines["central"] == baselines["random"] != baselines["none"]  # the masks are others


def test_data_without_masks_is_refused_by_name(run, scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "bare", ignore=shutil.ignore_patterns("Annotations*"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"(?i)masks|annotations"):
        evaluate(Evaluation(run=run, data=VideosConfig("davis", root, "val", "2017")))


@pytest.mark.parametrize(("clip_frames", "seen", "scored"), [(5, 5, 5), (30, 30, 24)])
def test_clip_repeats_short_videos_and_cuts_long_ones(clip_frames, seen, scored, run, data, monkeypatch):
    clips, encoded = [], []
    encode_slots, features = VideoStage.encode_slots, Backbone.features
    monkeypatch.setattr(
        VideoStage, "encode_slots", lambda self, s, *rest: clips.append(s[0]) or encode_slots(self, s, *rest)
    )
    monkeypatch.setattr(Backbone, "features", lambda self, f: encoded.append(len(f)) or features(self, f))
    learned = Settings(association="learned")  # its encoder gets the repeated frames
    config = Evaluation(
        run=run, data=data, protocol=NATIVE, seeds=(0,), pictures=0, clip_frames=clip_frames, settings=learned
    )
    scores = evaluate(config)
    assert [len(clip) for clip in clips] == [seen, seen]
    assert torch.equal(clips[0][scored:], clips[0][: seen - scored])
    assert not torch.equal(clips[0][0], clips[0][1])
    assert sum(encoded) == 2 * scored
    assert scores.videos == {"val-00000": scored, "val-00001": scored}
    for by_seed in scores.numbers.values():
        assert all(result["frames"] == scored for videos in by_seed.values() for result in videos.values())


def test_association_by_features_cuts_clips_and_repeats_nothing(run, data):
    scores = evaluate(Evaluation(run=run, data=data, protocol=NATIVE, seeds=(0,), pictures=0, clip_frames=30))
    assert scores.videos == {"val-00000": 24, "val-00001": 24}


def test_both_associations_have_folders_of_their_own(run, data):
    for association in ("features", "learned"):
        settings = Settings(association=association)
        evaluate(Evaluation(run=run, data=data, seeds=(0,), pictures=0, baselines=(), settings=settings))
        home = run / f"evaluation/synthetic-val-video-{association}"
        assert json.loads((home / "scores.json").read_text())["config"]["association"] == association


def test_method_without_stages_needs_no_run(scenes, tmp_path):
    arguments = ["--method", "cluster", "--backbone", "efficientnet-lite0", "--root", scenes, "--seeds", "0"]
    arguments += ["--pictures", "0", "--num-videos", 2, "--protocol", *NATIVE, "--out", tmp_path / "out"]
    arguments += ["--num-segments", 2, "--frame-size", 64, 96]
    assert main([str(argument) for argument in arguments]) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert report["config"]["num_segments"] == 2
    assert report["results"][0]["kind"] == "main"
    assert set(report["frames"]) == {"val-00000", "val-00001"}
