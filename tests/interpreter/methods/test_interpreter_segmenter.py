"""Segmenter of Interpreter: seeds, restarts, settings, and memory of the slots."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from interpreter.data import open_video
from interpreter.engine.randomness import torch_generator
from interpreter.methods import METHODS, frames
from interpreter.methods.interpreter.association import group_by_features, slot_groups
from interpreter.methods.interpreter.config import ImageModelConfig
from interpreter.methods.interpreter.image_stage import ImageSlots, ImageStage
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.runs import open_segmenter
from interpreter.models.token_masks import token_masks

from ..clips import make_clip
from ..peak_memory import peak_bytes

INTERPRETER = METHODS["interpreter"]


@pytest.fixture
def segmenter(tiny_run):
    return open_segmenter(INTERPRETER, tiny_run, Settings(association="learned"))


@pytest.fixture
def clip(tmp_path):
    return open_video(make_clip(tmp_path / "clip.mp4"))


def with_restarts(stage, restarts):
    stage.config = dataclasses.replace(stage.config, restarts=restarts)


@torch.no_grad()
def test_frame_keeps_the_draw_that_reconstructs_it_best(segmenter):
    stage, generator = segmenter.image_stage, torch.Generator()
    features = torch.randn(6, 4 * 6, stage.feature_dim, generator=generator.manual_seed(0))
    with_restarts(stage, 5)
    slots, attention, _ = segmenter.find_image_slots(features, generator.manual_seed(1))

    generator.manual_seed(1)
    initial = [stage.slot_attention.sample_slots(6, generator) for _ in range(5)]
    draws = [stage.encode(features, slots=slots, iterations=6) for slots in initial]
    errors = torch.stack([stage.error(draw, features) for draw in draws])
    best = errors.argmin(0)
    assert len(set(best.tolist())) > 1  # each frame keeps its own best draw
    torch.testing.assert_close(stage.error(ImageSlots(slots, attention), features), errors.amin(0))
    for frame, draw in enumerate(best):
        torch.testing.assert_close(slots[frame], draws[draw].slots[frame])
        torch.testing.assert_close(attention[frame], draws[draw].attention[frame])


@torch.no_grad()
def test_single_draw_is_not_reconstructed(segmenter, monkeypatch):
    stage = segmenter.image_stage
    features = torch.randn(6, 4 * 6, stage.feature_dim, generator=torch.Generator().manual_seed(0))
    with_restarts(stage, 1)
    slots, attention, _ = segmenter.find_image_slots(features, torch.Generator().manual_seed(1))
    initial = stage.slot_attention.sample_slots(6, torch.Generator().manual_seed(1))
    draw = stage.encode(features, slots=initial, iterations=6)
    assert torch.equal(slots, draw.slots)
    assert torch.equal(attention, draw.attention)
    monkeypatch.setattr(stage, "decode", None)  # they take as much memory as the slots
    segmenter.find_image_slots(features, torch.Generator())


@torch.no_grad()
def test_video_keeps_the_draw_of_least_divergence(segmenter):
    stage = segmenter.video_stage
    image_slots = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0))
    with_restarts(stage, 6)
    slots, attention = segmenter.group_over_time(image_slots, seed=3)

    generator = torch_generator(segmenter.device, 3, 1)
    initial = [stage.slot_attention.sample_slots(1, generator) for _ in range(6)]
    context = stage.encode_slots(image_slots[None])
    draws = [stage.group(context, slots, iterations=6) for slots in initial]
    divergences = torch.cat([stage.error(draw, image_slots[None]) for draw in draws])
    best = draws[divergences.argmin()]
    count = int(best.valid.sum())
    assert divergences.min() < divergences.max()
    torch.testing.assert_close(slots, best.slots[0, :count])
    torch.testing.assert_close(attention, best.attention[0, :, :, :count])


def test_settings_reach_the_video_stage(segmenter, clip):
    encoded, before = segmenter.encode(clip), segmenter.video_stage.config

    def segments(**settings):
        return segmenter.segment(encoded, **settings).num_segments

    assert segments(merge_threshold=0.0) == 3
    assert segments(merge_threshold=2.0) == 1  # the cosine distance is at most 2
    assert [segments(merge_threshold=0.0, num_slots=k) for k in (1, 2, 7)] == [1, 2, 7]
    assert segmenter.video_stage.config == before


def test_settings_of_a_call_replace_those_of_the_segmenter(tiny_run, clip):
    segmenter = open_segmenter(INTERPRETER, tiny_run, Settings(association="learned", merge_threshold=0.0, num_slots=5))
    assert segmenter.num_segments == 5
    encoded = segmenter.encode(clip)
    assert segmenter.segment(encoded).num_segments == 5
    assert segmenter.segment(encoded, num_slots=2).num_segments == 2
    assert segmenter.segment(encoded, merge_threshold=None).num_segments == 5


def test_iterations_of_the_model_are_those_of_training(segmenter, clip):
    segmenter.segment(segmenter.encode(clip))
    for stage in (segmenter.image_stage, segmenter.video_stage):
        assert stage.slot_attention.iterations == stage.config.iterations == 3


def test_seeds_at_once_equal_the_seeds_one_by_one(segmenter, clip):
    together = segmenter.encode(clip, (3, 1)).by_seed
    for seed in (3, 1):
        alone = segmenter.segment(segmenter.encode(clip, (seed,)), seed).tensors
        slots, attention = together[seed][:2]
        assert torch.equal(slots, alone["image_slots"])
        assert torch.equal(attention, alone["image_attention"])
    assert not torch.equal(together[3][0], together[1][0])


def test_image_setting_segments_each_frame_by_itself(segmenter, clip):
    segmentation = segmenter.segment(segmenter.encode(clip), stage="image")
    assert segmentation.across is None
    assert not segmentation.tied_over_time
    assert segmentation.tensors.keys() == {"image_slots", "image_attention"}


def test_association_by_features_needs_the_image_stage_alone(tiny_run, segmenter, clip):
    alone = open_segmenter(INTERPRETER, tiny_run)
    assert alone.video_stage is None
    assert (alone.name, alone.num_segments) == ("association by features", 9)
    encoded = alone.encode(clip)
    segmentation = alone.segment(encoded, num_slots=3)
    slots, attention, described, _ = encoded.by_seed[0]
    assert slots.shape[1] == 2 * alone.image_stage.config.num_slots
    labels = group_by_features(described, 3)
    assert torch.equal(segmentation.across.argmax(-1), labels)
    assert torch.equal(segmentation.attention, attention)
    # A segmenter with the video stage can do both.
    both = segmenter.segment(segmenter.encode(clip), association="features", num_slots=2)
    assert both.num_segments == 2


def test_run_without_a_video_stage_is_segmented_by_features(tiny_run, tmp_path, clip):
    run = tmp_path / "run"
    (run / "image").mkdir(parents=True)
    for file in (tiny_run / "image").glob("checkpoint*"):
        shutil.copy(file, run / "image")
    content = json.loads((tiny_run / "config.json").read_text())
    del content["stages"]["video"], content["trained_on"]["video"]
    (run / "config.json").write_text(json.dumps(content))
    segmenter = open_segmenter(INTERPRETER, run)
    assert segmenter.name == "association by features"
    assert segmenter.segment(segmenter.encode(clip)).tied_over_time
    with pytest.raises(FileNotFoundError, match="--stage video"):
        open_segmenter(INTERPRETER, run, Settings(association="learned"))


def test_tokens_make_the_masks_on_request(tiny_run, clip):
    segmenter = open_segmenter(INTERPRETER, tiny_run, Settings(association="features", masks_from="tokens"))
    encoded = segmenter.encode(clip)
    of_video = encoded.by_seed[0]
    segmentation = segmenter.segment(encoded)
    exact = token_masks(of_video.tokens, segmenter.grid, slot_groups(of_video.described, 9), 9)
    assert segmentation.across is None
    assert torch.equal(segmentation.masks(), exact.float())
    of_slots = segmenter.segment(encoded, masks_from="slots")
    assert of_slots.across is not None
    without = open_segmenter(INTERPRETER, tiny_run, Settings(association="features"))  # a CNN: slots
    with pytest.raises(ValueError, match="has to be among the settings that the segmenter is opened with"):
        without.segment(without.encode(clip), masks_from="tokens")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "image", "masks_from": "slots"}, "no meaning with --stage image"),
        ({"stage": "image", "num_slots": 3}, "no meaning with --stage image"),
        ({"association": "features", "merge_threshold": 0.1}, "merge_threshold is a setting of --association learned"),
        ({"repeat_to": 30}, "repeat_to is a setting of --association learned"),
        ({"stage": "image", "association": "learned", "repeat_to": 30}, "repeat_to is a setting"),
        ({"association": "learned", "masks_from": "tokens"}, "masks_from=tokens needs --association features"),
    ],
)
def test_settings_that_nothing_would_use_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_number_of_image_slots_is_a_setting(tiny_run, clip):
    segmenter = open_segmenter(INTERPRETER, tiny_run, Settings(image_slots=7, association="learned"))
    assert segmenter.name == "video stage"
    assert segmenter.encode(clip).by_seed[0].slots.shape[1] == 7


def test_repeats_of_a_short_video_are_cut_off_again(segmenter, clip, monkeypatch):
    seen = []
    group = segmenter.group_over_time
    monkeypatch.setattr(segmenter, "group_over_time", lambda slots, *rest: seen.append(slots) or group(slots, *rest))
    segmentation = segmenter.segment(segmenter.encode(clip), repeat_to=21)
    (slots,) = seen
    assert len(slots) == 21
    assert torch.equal(slots[18:], slots[:3])  # the clip has 9 frames
    assert len(segmentation) == len(segmentation.across) == 9


@pytest.mark.parametrize("frames", [4, 6])
def test_video_that_changes_while_encoded_is_an_error(segmenter, tmp_path, frames):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=5))
    assert video.num_frames == 5
    make_clip(tmp_path / "clip.mp4", frames)
    with pytest.raises(ValueError, match=r"clip.mp4 changed while it was (segmented|read)"):
        segmenter.encode(video)


def test_attention_is_held_once(tmp_path, monkeypatch):
    """Memory beyond slots, attention and means is that of a short video. 24x36 patches, 32 slots: 59 kB a frame."""
    stage = ImageStage(ImageModelConfig(num_slots=32, dim=16), feature_dim=8, grid=(24, 36))
    backbone = SimpleNamespace(grid=lambda size: (24, 36), device=torch.device("cpu"))
    data = SimpleNamespace(frame_size=(48, 64))
    context = SimpleNamespace(backbone=backbone, precision="fp32", data=data, run=tmp_path)
    segmenter = InterpreterSegmenter(context, stage, (), Settings(stage="image"))
    # What the backbone needs for a batch would hide the rest.
    monkeypatch.setattr(frames, "encode", lambda backbone, stream, precision: (torch.zeros(1, 864, 8) for _ in stream))

    def find_image_slots(features, generator):
        return ImageSlots(torch.rand(len(features), 32, 16), torch.rand(len(features), 864, 32))

    monkeypatch.setattr(segmenter, "find_image_slots", find_image_slots)

    def beyond(count):
        video = open_video(make_clip(tmp_path / f"{count}.mp4", count))

        def run():
            segmentation = segmenter.segment(segmenter.encode(video))
            return sum(1 for _ in segmentation.label_maps((48, 64)))

        return peak_bytes(run) - (2 * 864 * 32 + 4 * 32 * (16 + 8 + 3)) * count

    assert beyond(256) < 1.1 * beyond(64)  # a second copy of the attention alone would double it
