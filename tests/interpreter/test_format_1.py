"""A run of format 1, made by an earlier version, opens, resumes bit for bit and segments.

``format-1-run`` holds both stages of a run after 4 steps on three generated scenes. Its config.json has placeholders in
place of paths: RUN and SCENES.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interpreter.data import open_video
from interpreter.data.video.first_frames import FirstFrames
from interpreter.engine.run import load_stage_state, read_config, weights_hash, write_config
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining
from interpreter.methods.runs import open_segmenter
from interpreter.train import main

from .runs import curve

WITNESS = Path(__file__).parent / "format-1-run"
# Losses of steps 5 and 6 when the version that made the run resumes it.
LOSSES = {"image": [0.9997074, 0.9977089], "video": [3.0724788, 2.6568830]}


@pytest.fixture
def witness(scenes, tmp_path):
    """witness(name) -> a copy of the run of format 1."""

    def copy(name):
        run = shutil.copytree(WITNESS, tmp_path / name)
        config = (run / "config.json").read_text().replace('"RUN"', json.dumps(str(run)))
        (run / "config.json").write_text(config.replace('"SCENES"', json.dumps(str(scenes))))
        return run

    return copy


def test_run_of_format_1_is_read_as_one_of_format_2(witness, scenes):
    run = witness("run")
    config = read_config(run)
    assert config.method == "interpreter"
    assert list(config.stages) == ["image", "video"]
    assert config.trained_on == {"video": weights_hash(load_stage_state(run, "image"))}
    image, video = config.options("image", ImageTraining), config.options("video", VideoTraining)
    assert (image.run, image.data.root, image.data.frame_size) == (run, scenes, (64, 96))
    assert (image.model.num_slots, image.optim.steps, image.optim.schedule) == (4, 4, "cosine")
    assert (video.draws, video.num_frames, video.model.num_slots) == (4, 5, 3)
    assert "samples" not in config.stages["video"]


@pytest.mark.parametrize("stage", ["image", "video"])
def test_run_of_format_1_resumes_bit_for_bit(stage, witness, image_options, video_options):
    options = [*(image_options if stage == "image" else video_options), "--steps", "6"]
    old, new = witness("old"), witness("new")
    write_config(new, read_config(new))
    for run in (old, new):
        main(["--run", str(run), *options])
    first, second = (load_file(run / stage / "checkpoint-00000006.safetensors") for run in (old, new))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert curve(old, stage) == curve(new, stage)
    assert curve(old, stage)[:4] == curve(WITNESS, stage)
    assert [record["loss"] for record in curve(old, stage)[4:]] == pytest.approx(LOSSES[stage], rel=1e-3)
    content = json.loads((old / "config.json").read_text())
    assert content["format"] == 2
    assert content.keys() == {"format", "method", "stages", "trained_on"}
    assert content["stages"]["video"]["draws"] == 4
    assert content["stages"][stage]["optim"]["steps"] == 6


def test_other_settings_on_a_run_of_format_1_are_refused(witness, video_options):
    with pytest.raises(ValueError, match=r"settings: --draws was 4, now 2\. Use the same"):
        main(["--run", str(witness("run")), *video_options, "--steps", "6", "--draws", "2"])


@pytest.mark.parametrize("stage", ["image", "video"])
def test_run_of_format_1_segments_a_clip(stage, witness, scenes):
    segmenter = open_segmenter(INTERPRETER, witness("run"), INTERPRETER.settings(stage=stage, association="learned"))
    assert segmenter.name == f"{stage} stage"
    clip = FirstFrames(open_video(scenes / "JPEGImages" / "480p" / "train-00000"), 5)
    segmentation = segmenter.segment(segmenter.encode(clip))
    assert segmentation.labels(size=(32, 48)).shape == (5, 32, 48)
    assert segmentation.num_segments <= {"image": 4, "video": 3}[stage]
