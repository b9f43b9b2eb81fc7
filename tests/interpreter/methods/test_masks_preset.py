"""Training of the mask decoder on windows: it resumes, reads streamed features, and refuses invalid options."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from interpreter.data import open_video
from interpreter.methods import METHODS
from interpreter.methods.interpreter.config import IMAGE_PRESETS, VIDEO_PRESETS
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.runs import open_segmenter
from interpreter.train import main, parse_stage

from ..clips import make_clip

_OPTIONS = (
    "--num-videos 3 --frame-size 64 96 --dim 18 --num-slots 4 --decoder masks --no-input-positions --windows 2 3 "
    "--batch-size 4 --steps 4 --warmup-steps 2 --log-every 1 --checkpoint-every 2 --precision fp32 --no-flip"
)
OPTIONS = _OPTIONS.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes):
    run = tmp_path_factory.mktemp("masks") / "run"
    main(["--run", str(run), "--root", str(scenes), *OPTIONS])
    return run


@pytest.mark.parametrize("features", ["stored", "streamed"])
def test_training_on_windows_resumes(run, scenes, tmp_path, features):
    last = "image/checkpoint-00000004.safetensors"
    resumed = shutil.copytree(run, tmp_path / "run")
    (resumed / last).unlink()
    main(["--run", str(resumed), "--root", str(scenes), *OPTIONS, "--features", features])
    one, other = load_file(run / last), load_file(resumed / last)
    tolerance = 0 if features == "stored" else 1e-4  # the cache rounds to fp16
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=tolerance, rtol=tolerance)


def test_windows_segment_whole_frames(run, tmp_path):
    segmenter = open_segmenter(METHODS["interpreter"], run, Settings(stage="image"))
    segmentation = segmenter.segment(segmenter.encode(open_video(make_clip(tmp_path / "clip.mp4"))))
    assert segmentation.masks().shape[1:] == (24, 4)


def test_windows_and_other_decoders_are_refused_before_training(scenes, tmp_path, capsys):
    new = tmp_path / "new"
    with pytest.raises(ValueError, match="--windows needs --decoder masks and --no-input-positions"):
        main(["--run", str(new), "--root", str(scenes), *OPTIONS, "--decoder", "broadcast"])
    with pytest.raises(SystemExit):
        main(["--run", str(new), "--root", str(scenes), *OPTIONS, "--whole-frames", "1.5"])
    assert "--whole-frames must be between 0 and 1, got 1.5" in capsys.readouterr().err
    assert not new.exists()


def test_preset_clips_needs_a_folder_alone():
    _, stage, config = parse_stage(["--preset", "clips", "--root", "FOLDER"])
    assert config == dataclasses.replace(
        IMAGE_PRESETS["clips"], data=dataclasses.replace(IMAGE_PRESETS["clips"].data, root=config.data.root)
    )
    assert str(config.data.root) == "FOLDER"
    assert config.backbone.backbone == "facebook/dinov2-small"
    assert stage.name == "image"
    assert VIDEO_PRESETS.keys() == IMAGE_PRESETS.keys()
