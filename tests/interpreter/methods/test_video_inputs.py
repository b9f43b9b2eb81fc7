"""The video stage on the means of tokens, with the mask decoder: values, cache, training and segments."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from interpreter.data import open_video
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import VIDEO_PRESETS, VideoModelConfig
from interpreter.methods.interpreter.image_slots import EncodedVideo
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.token_means import means_as_inputs, token_means
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.train import main

from ..clips import make_clip
from ..runs import curve

OPTIONS = ["--inputs", "means", "--decoder", "masks", "--encoder-layers", "0", "--merge-threshold", "0"]
CONFIG = VideoModelConfig(num_slots=4, dim=16, encoder_layers=0, decoder="masks", merge_threshold=0.0)
FRAMES, SLOTS, WIDTH = 5, 3, 12


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoStage(dataclasses.replace(CONFIG, **changes), WIDTH, FRAMES)


def inputs(stage, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, FRAMES, SLOTS, WIDTH, generator=generator), stage.slot_attention.sample_slots(
        batch, generator
    )


@pytest.fixture(scope="module")
def means_run(tmp_path_factory, image_options, video_options):
    """A tiny run whose video stage reads means."""
    run = tmp_path_factory.mktemp("means") / "run"
    main(["--run", str(run), *image_options])
    main(["--run", str(run), *video_options, *OPTIONS])
    return run


def test_token_means_are_weighted_means():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 5, generator=generator)
    attention = torch.randn(3, 6, 4, generator=generator).softmax(-1)
    means, places, masses = token_means(features, attention, (2, 3))
    centres = [(y, x) for y in (-0.5, 0.5) for x in (-2 / 3, 0, 2 / 3)]
    for t in range(3):
        for n in range(4):
            weights = attention[t, :, n] / attention[t, :, n].sum()
            torch.testing.assert_close(means[t, n], sum(w * x for w, x in zip(weights, features[t], strict=True)))
            torch.testing.assert_close(places[t, n], (weights[:, None] * torch.tensor(centres)).sum(0))
    torch.testing.assert_close(masses, attention.mean(1))
    torch.testing.assert_close(masses.sum(1), torch.ones(3))


def test_means_do_not_depend_on_the_scale_of_attention_and_an_empty_slot_is_finite():
    features, attention = torch.randn(1, 6, 5), torch.rand(1, 6, 2)
    attention[..., 1] = 0
    means, places, masses = token_means(features, attention, (2, 3))
    halved = token_means(features, attention / 2, (2, 3))
    torch.testing.assert_close(halved.features, means)
    assert means[0, 1].abs().max() == places[0, 1].abs().max() == masses[0, 1] == 0


def test_repeated_tokens_are_as_good_as_twice_the_attention():
    """A token with attention 2 counts like two equal tokens."""
    features, attention = torch.randn(1, 4, 5), torch.rand(1, 4, 2)
    doubled = torch.cat([features, features[:, :1]], 1), torch.cat([attention, attention[:, :1]], 1)
    heavier = attention.clone()
    heavier[:, 0] *= 2
    grids = (1, 5), (1, 4)
    torch.testing.assert_close(token_means(*doubled, grids[0])[0], token_means(features, heavier, grids[1])[0])


def test_inputs_are_normalised_features_and_scaled_places():
    means = 3 * torch.randn(2, 7, 10) + 1
    actual = means_as_inputs(means)
    torch.testing.assert_close(actual[..., :-2].mean(-1), torch.zeros(2, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(actual[..., :-2].square().mean(-1), torch.ones(2, 7), atol=1e-3, rtol=0)
    torch.testing.assert_close(actual[..., -2:], 0.25 * (8 * 1.5) ** 0.5 * means[..., -2:])


@pytest.mark.parametrize("changes", [{}, {"encoder_layers": 1, "heads": 2}, {"merge_threshold": 0.3}])
def test_loss_of_masks_is_the_error_of_weighted_means(changes):
    stage = build(**changes)
    x, slots = inputs(stage)
    with torch.no_grad():
        loss, video = stage(x, slots)
        decoded = stage.decoder(video.slots)
    expected = torch.stack(
        [
            sum(video.attention[b, t, n, k] * decoded[b, k] for k in range(4))
            for b in range(2)
            for t in range(FRAMES)
            for n in range(SLOTS)
        ]
    )
    torch.testing.assert_close(loss, F.mse_loss(expected.view_as(x), x))
    torch.testing.assert_close(video.attention.sum(-1), torch.ones(2, FRAMES, SLOTS))


def test_without_encoder_and_merging_the_order_of_slots_and_frames_does_not_matter():
    stage = build()
    x, slots = inputs(stage)
    loss, video = stage(x, slots)
    order = torch.randperm(FRAMES * SLOTS, generator=torch.Generator().manual_seed(3))
    shuffled, permuted = stage(x.flatten(1, 2)[:, order].view_as(x), slots)
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(permuted.attention.flatten(1, 2), video.attention.flatten(1, 2)[:, order])
    assert video.valid.all()


def test_every_parameter_learns_and_targets_do_not():
    stage = build()
    x, slots = inputs(stage)
    x.requires_grad_()
    stage(x, slots)[0].backward()
    assert x.grad is None
    assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_half_precision_keeps_the_loss_in_fp32():
    stage = build()
    full, _ = stage(*inputs(stage))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage(*inputs(stage))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)


def test_a_field_that_a_stored_configuration_lacks_means_what_it_was():
    """Runs from before these options read slots and reconstruct sets, whatever the presets say."""
    assert (VideoModelConfig().inputs, VideoModelConfig().decoder) == ("slots", "transformer")
    assert (VideoModelConfig().merge_threshold, VideoModelConfig().encoder_layers) == (0.05, 2)
    for paper in ("ytvis19", "movi-e"):
        model = VIDEO_PRESETS[paper].model
        assert (model.inputs, model.decoder, model.encoder_layers) == ("slots", "transformer", 4)


def test_training_on_streamed_means_equals_training_on_stored_ones(means_run, image_options, video_options, tmp_path):
    streamed = tmp_path / "streamed"
    main(["--run", str(streamed), *image_options])
    main(["--run", str(streamed), *video_options, *OPTIONS, "--features", "streamed"])
    assert json.loads((means_run / "config.json").read_text())["stages"]["video"]["model"]["inputs"] == "means"
    losses = [[record["loss"] for record in curve(run, "video")] for run in (streamed, means_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert list((means_run / "cache").glob("slots-*"))


def test_cached_video_has_the_means_that_the_segmenter_computes(means_run, scenes):
    segmenter = open_segmenter(INTERPRETER, means_run, Settings(association="learned", image_slots=4))
    clip = open_video(scenes / "JPEGImages" / "480p" / "train-00000")
    encoded = segmenter.encode(clip).by_seed[0]
    assert isinstance(encoded, EncodedVideo)
    assert encoded.described.features.shape == (clip.num_frames, 4, segmenter.backbone.dim)
    inputs = means_as_inputs(torch.cat([encoded.described.features, encoded.described.places], -1))
    expected = segmenter.group_over_time(inputs, 0)[1]
    segmentation = segmenter.segment(segmenter.encode(clip))
    torch.testing.assert_close(segmentation.across, expected)


def test_more_image_slots_are_drawn_for_a_stage_that_reads_means(means_run, tiny_run, tmp_path):
    clip = open_video(make_clip(tmp_path / "clip.mp4"))
    for run, settings, count in [
        (means_run, Settings(association="learned"), 8),
        (means_run, Settings(association="learned", image_slots=5), 5),
        (means_run, Settings(stage="image"), 4),
        (tiny_run, Settings(association="learned"), 4),
        (tiny_run, Settings(), 8),
    ]:
        segmenter = open_segmenter(INTERPRETER, run, settings)
        assert segmenter.encode(clip).by_seed[0].slots.shape[1] == count


@torch.no_grad()
def test_sharpness_at_inference_is_that_of_the_configuration(means_run):
    segmenter = open_segmenter(INTERPRETER, means_run, Settings(association="learned"))
    stage = segmenter.video_stage
    inputs = torch.randn(5, 4, segmenter.backbone.dim + 2, generator=torch.Generator().manual_seed(0))

    def entropy(sharpness):
        stage.config = dataclasses.replace(stage.config, inference_sharpness=sharpness)
        attention = segmenter.group_over_time(inputs, 0)[1]
        torch.testing.assert_close(attention.sum(-1), torch.ones(5, 4))
        return -(attention * attention.clamp_min(1e-30).log()).sum(-1).mean()

    assert entropy(20.0) < 0.9 * entropy(1.0)
