import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter import evaluate as module
from interpreter.data import VOID, open_dataset
from interpreter.evaluate import Evaluation, evaluate, main
from interpreter.metrics.summary import PROTOCOLS

GRID = (4, 6)


class Oracle:
    """Segments every video by its own masks, with the ids shuffled; `spoil` may change them."""

    def __init__(self, dataset, spoil=lambda maps: maps):
        self.masks = {video.name: dataset.masks(i) for i, video in enumerate(dataset.videos)}
        self.spoil, self.frame_size = spoil, (64, 96)
        self.video_stage = SimpleNamespace(config=SimpleNamespace(num_slots=2))
        self.image_stage, self.backbone = SimpleNamespace(grid=GRID), SimpleNamespace(patch=16)

    def segment(self, video, advance, keep):
        maps = self.spoil((7 * self.masks[video.name].astype(int) + 3) % 251).astype(np.uint8)
        keep(torch.randn(len(maps), GRID[0] * GRID[1], 8, generator=torch.Generator().manual_seed(0)))
        advance(len(maps))

        class Found:
            grid = GRID

            def labels(self, frames, size):
                assert size == maps.shape[1:]
                return maps[frames]

            def __len__(self):
                return len(maps)

        return Found()


@pytest.fixture
def with_oracle(monkeypatch, scenes, tmp_path):
    """with_oracle(spoil=…, root=…) -> the summary and what scores.json holds."""

    def run(root=scenes, **options):
        oracle = Oracle(open_dataset("synthetic", root, "val"), **options)
        monkeypatch.setattr(module.Segmenter, "from_run", lambda *_, **__: oracle)
        summary = evaluate(Evaluation(run=tmp_path, root=root, num_videos=2, pictures=0))
        (scores,) = tmp_path.glob("evaluation/*/scores.json")
        return summary, json.loads(scores.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run


def test_perfect_prediction_is_perfect(with_oracle):
    summary, _ = with_oracle()
    perfect = summary["video stage"]
    for name in ("fg_ari_frame", "fg_ari_video", "miou_frame", "miou_video", "j_mean_multi"):
        assert perfect[name] == pytest.approx(1), name
    assert summary["one segment"]["fg_ari_frame"] == pytest.approx(0)
    assert 0 < summary["one segment"]["miou_video"] < 0.5
    assert "k-means 2" in summary


def test_identity_lost_halfway_lowers_the_numbers_of_whole_videos_only(with_oracle):
    def swap(maps):
        half = len(maps) // 2
        return np.concatenate([maps[:half], (maps[half:] + 17) % 251])

    row = with_oracle(spoil=swap)[0]["video stage"]
    assert row["fg_ari_frame"] == pytest.approx(1)
    assert row["miou_frame"] == pytest.approx(1)
    assert row["fg_ari_video"] < 0.95
    assert row["miou_video"] < 0.8


def test_json_holds_what_the_table_shows_and_each_video(with_oracle, capsys):
    summary, report = with_oracle(spoil=lambda maps: maps // 40)
    table = capsys.readouterr().out
    assert report["summary"].keys() == summary.keys()
    for method, row in summary.items():
        assert method in table
        for name, value in row.items():
            assert report["summary"][method][name] == value
        assert f"{row['fg_ari_frame']:.3f}" in table
    assert report["protocols"] == PROTOCOLS
    for name in ("fg_ari_frame", "miou_video"):
        assert PROTOCOLS[name] in table
    videos = report["videos"]["video stage"]
    assert sorted(videos) == ["val-00000", "val-00001"]
    mean = sum(video["fg_ari_frame"] for video in videos.values()) / 2
    assert mean == pytest.approx(summary["video stage"]["fg_ari_frame"])
    assert report["config"]["num_videos"] == 2


def test_undefined_numbers_are_null(with_oracle, scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "empty-scenes")
    for mask in root.glob("Annotations_unsupervised/480p/val-*/*.png"):
        with Image.open(mask) as image:
            empty = Image.fromarray(np.zeros_like(np.asarray(image)))
            empty.putpalette(image.getpalette())
        empty.save(mask)
    summary, report = with_oracle(root=root)
    assert math.isnan(summary["video stage"]["fg_ari_frame"])
    assert report["summary"]["video stage"]["fg_ari_frame"] is None


def test_pixels_outside_the_evaluation_do_not_count(with_oracle, scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "void-scenes")
    for mask in root.glob("Annotations_unsupervised/480p/val-*/*.png"):
        with Image.open(mask) as image:
            palette, ids = image.getpalette(), np.asarray(image).copy()
        ids[:, :20] = VOID
        image = Image.fromarray(ids)
        image.putpalette(palette)
        image.save(mask)

    def spoil(maps):
        maps = maps.copy()
        maps[:, :, :20] = 3  # as the background has: wrong wherever there is an object
        return maps

    assert with_oracle(root=root, spoil=spoil)[0]["video stage"]["fg_ari_frame"] == pytest.approx(1)


def test_data_without_masks_is_refused_by_name(tiny_run, scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "bare", ignore=shutil.ignore_patterns("Annotations*"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"(?i)masks|annotations"):
        evaluate(Evaluation(run=tiny_run, data="davis", year="2017", root=root))


def test_run_without_video_stage_names_the_command(image_run, scenes):
    with pytest.raises(FileNotFoundError, match=r"no trained video stage; .*--stage video"):
        evaluate(Evaluation(run=image_run(), root=scenes, num_videos=2))


@pytest.mark.parametrize("stage", ["video", "image"])
def test_evaluates_a_trained_run(stage, tiny_run, tmp_path, scenes, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ["--run", str(run), "--root", str(scenes), "--num-videos", "2", "--stage", stage, "--pictures", "1"]
    assert main([*arguments, "--positions"]) == 0
    home = run / "evaluation" / f"synthetic-val-{stage}-seed0"
    report = json.loads((home / "scores.json").read_text())
    slots = 3 if stage == "video" else 4
    expected = {f"{stage} stage", "one segment", f"k-means {slots}", f"k-means {slots} + positions"}
    assert report["summary"].keys() == report["videos"].keys() == expected
    for row in report["summary"].values():
        assert all(-1 <= row[name] <= 1 for name in PROTOCOLS)
    assert [path.name for path in home.glob("*.png")] == ["val-00000.png"]
    assert str(home / "scores.json") in capsys.readouterr().out
    first = report["summary"]
    assert main([*arguments, "--positions"]) == 0  # the same command gives the same numbers
    assert json.loads((home / "scores.json").read_text())["summary"] == first


def test_same_scenes_are_scored_at_another_frame_size(tiny_run, tmp_path, scenes):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    summary = evaluate(Evaluation(run=run, root=scenes, num_videos=2, frame_size=(128, 192), pictures=0))
    assert 0 <= summary["video stage"]["miou_video"] <= 1
    with pytest.raises(ValueError, match="--frame-size 64 96"):
        evaluate(Evaluation(run=run, root=scenes, num_videos=2, frame_size=(64, 100), pictures=0))
