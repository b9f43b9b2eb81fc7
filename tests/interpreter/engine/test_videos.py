"""The videos of a run, opened from its configuration."""

import json

import numpy as np
import pytest
from PIL import Image

from interpreter.configs import DataConfig
from interpreter.engine.run import read_config
from interpreter.engine.videos import open_videos
from interpreter.methods.interpreter.config import IMAGE_PRESETS
from interpreter.train import main

from ..data.releases import (
    compressed,
    png,
    write_fbms,
    write_segtrack,
    write_ytvis,
    ytvis_annotation,
    ytvis_video,
)
from ..videos import picture, write_frames


@pytest.fixture(scope="module")
def ytvis(tmp_path_factory):
    """602 videos of one frame: two of them are the hold-out."""
    root = tmp_path_factory.mktemp("ytvis")
    videos = [ytvis_video(n, f"v{n:03d}", 1, (8, 8)) for n in range(602)]
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3:7] = True
    write_ytvis(root, videos, [ytvis_annotation(n, video, [compressed(mask)]) for n, video in enumerate(videos)])
    return root


def test_training_split_of_ytvis_excludes_the_hold_out(ytvis, tmp_path):
    names = {
        split: [video.name for video in open_videos(DataConfig("ytvis", ytvis, split), tmp_path).videos]
        for split in ("train", "holdout", "all")
    }
    assert names["holdout"] == ["v600", "v601"]
    assert len(names["train"]) == 600
    assert not set(names["train"]) & set(names["holdout"])
    assert sorted(names["train"] + names["holdout"]) == names["all"]


@pytest.mark.parametrize(("preset", "data", "split"), [("ytvis19", "ytvis", "train"), ("movi-e", "movi", "train")])
def test_presets_train_on_the_published_training_split(preset, data, split):
    config = IMAGE_PRESETS[preset].data
    assert (config.data, config.split) == (data, split)


def test_kinds_without_splits_ignore_the_default_one(tmp_path):
    write_segtrack(tmp_path, "bmx", [np.ones((2, 20, 30), bool)])
    assert len(open_videos(DataConfig("segtrack", tmp_path), tmp_path)) == 1


def test_every_kind_reaches_its_reader(tmp_path):
    write_fbms(tmp_path / "FBMS", "Testset", "bear01", 2, {0: np.ones((20, 30), int)}, [0, 255])
    assert (open_videos(DataConfig("fbms", tmp_path / "FBMS", "test"), tmp_path).masks(0)[0] == 1).all()
    with pytest.raises(ValueError, match="--data movi needs --root DIR"):
        open_videos(DataConfig("movi"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no sequences in Trainingset"):
        open_videos(DataConfig("fbms", tmp_path / "FBMS", "train"), tmp_path)


@pytest.mark.parametrize("annotations", ["unsupervised", "semi-supervised"])
def test_masks_of_davis_2017_are_those_of_the_configuration(tmp_path, annotations):
    write_frames(tmp_path / "JPEGImages/480p/a", 1, (8, 8))
    for label, folder in enumerate(("Annotations_unsupervised", "Annotations"), 1):
        (tmp_path / folder / "480p/a").mkdir(parents=True)
        (tmp_path / folder / "480p/a/00000.png").write_bytes(png(np.full((8, 8), label, np.uint8)))
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/train.txt").write_text("a\n")
    config = DataConfig("davis", tmp_path, year="2017", annotations=annotations)
    label = {"unsupervised": 1, "semi-supervised": 2}[annotations]
    assert (open_videos(config, tmp_path).masks(0) == label).all()


@pytest.mark.parametrize("features", ["stored", "streamed"])
def test_image_stage_trains_on_cropped_youtube_vis(tmp_path, features):
    root, size = tmp_path / "YT", (144, 96)
    videos = [ytvis_video(n, f"v{n}", 3, size) for n in range(2)]
    mask = np.zeros(size, bool)
    mask[40:60, 20:40] = True
    write_ytvis(root, videos, [ytvis_annotation(n, video, [compressed(mask)] * 3) for n, video in enumerate(videos)])
    for seed, frame in enumerate(sorted(root.rglob("*.jpg"))):
        page = np.zeros((*size, 3), np.uint8)
        page[40:104] = picture(seed, 64, 96)
        Image.fromarray(page).save(frame, quality=90)
    options = (
        "--frame-size 64 96 --dim 16 --num-slots 4 --heads 2 --decoder-layers 1 --batch-size 4 --steps 2 "
        "--warmup-steps 1 --log-every 1 --precision fp32 --split train --crop-borders --loader pyav --workers 1"
    )
    run = tmp_path / "run"
    main(["--data", "ytvis", "--root", str(root), "--run", str(run), "--features", features, *options.split()])
    config = read_config(run).stages["image"]["data"]
    assert (config["data"], config["split"], config["crop_borders"]) == ("ytvis", "train", True)
    steps = [json.loads(line) for line in (run / "image" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2
    assert np.isfinite([record["loss"] for record in steps]).all()


def test_names_in_brackets_are_shown_as_they_are(tmp_path, capsys):
    write_frames(tmp_path / "a", 2, (8, 8))
    (tmp_path / "Clip [bold].mp4").write_text("no film")
    (tmp_path / "Clip [id]" / "notes.txt").mkdir(parents=True)
    (tmp_path / "[red]x.txt").touch()
    open_videos(DataConfig("folder", tmp_path), tmp_path)
    shown = "".join(capsys.readouterr().err.split("\n"))
    assert "Clip [bold].mp4" in shown
    assert "left out: 1 .txt ([red]x.txt)" in shown
