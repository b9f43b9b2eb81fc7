"""Slot Contrast: loss and its options, its gradients, training in several processes, segmenting in one pass."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from interpreter.configs import BackboneConfig, DataConfig
from interpreter.data import open_video
from interpreter.engine.schedule import learning_rate
from interpreter.methods.base import Context
from interpreter.methods.slot_contrast import PRESETS, SLOT_CONTRAST, SlotContrast, SlotContrastModelConfig
from interpreter.models.backbones import load_backbone
from interpreter.models.losses import slot_contrast
from interpreter.train import main

from ..clips import Repeated
from ..runs import TWO_RANKS, curve, finish, start

CONFIG = SlotContrastModelConfig(num_slots=3, dim=8, decoder_dim=16, decoder_layers=2)
GRID, FEATURES = (3, 4), 12
STAGE = SLOT_CONTRAST.stages[0]


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return SlotContrast(dataclasses.replace(CONFIG, **changes), FEATURES, GRID).double()


def features(batch=3, frames=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 12, FEATURES, generator=generator, dtype=torch.float64)


def test_loss_is_reconstruction_plus_weighted_contrast():
    model, x = build(contrast_weight=0.7), features()
    loss, numbers = model(x)
    slots = model.grouping(model.to_tokens(x), model.initial.slots.expand(3, -1, -1)).slots
    decoded = [model.decoder(slots[:, frame]) for frame in range(4)]
    error = torch.stack([F.mse_loss(d.features, x[:, t]) for t, d in enumerate(decoded)]).mean()
    torch.testing.assert_close(numbers["reconstruction"], error)
    torch.testing.assert_close(numbers["contrast"], slot_contrast(slots, 0.1))
    torch.testing.assert_close(loss, error + 0.7 * slot_contrast(slots, 0.1))


def test_weight_zero_leaves_the_reconstruction_and_its_gradient():
    model, x = build(contrast_weight=0.0), features()
    loss, numbers = model(x)
    assert torch.equal(loss, numbers["reconstruction"])
    assert numbers["contrast"] > 0  # still logged


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.5}, {"contrast_direction": "next"}, {"positive_in_denominator": False}, {"negatives": "video"}],
)
def test_options_of_the_contrast_reach_it(changes):
    one, other = (build(**options)(features())[1]["contrast"] for options in ({}, changes))
    assert abs(one - other) > 1e-4


def test_initial_slots_learn_from_both_losses():
    model, x = build(contrast_weight=0.0), features()
    initial = model.initial.slots
    (from_error,) = torch.autograd.grad(model(x)[0], initial)
    model.config = dataclasses.replace(CONFIG, contrast_weight=1.0)
    (from_both,) = torch.autograd.grad(model(x)[0], initial)
    assert (from_error.abs().amax(1) > 1e-9).all()
    assert ((from_both - from_error).abs().amax(1) > 1e-9).all()


def test_contrast_gives_the_decoder_nothing():
    model, x = build(contrast_weight=1.0), features()
    loss, _ = model(x)
    decoder = list(model.decoder.parameters())
    both = torch.autograd.grad(loss, decoder)
    model.config = dataclasses.replace(CONFIG, contrast_weight=0.0)
    torch.testing.assert_close(both, torch.autograd.grad(model(x)[0], decoder))


def test_gaussian_slots_come_from_the_noise():
    model, x = build(initial="gaussian"), features()
    assert STAGE.noise(model) == (3, 8)
    noise = torch.randn(3, 3, 8, dtype=torch.float64)
    assert not torch.equal(model(x, noise)[0], model(x, noise + 1)[0])
    assert STAGE.noise(build()) is None


def test_video_in_parts_has_the_masks_of_a_whole_pass():
    model, x = build(), features(batch=1, frames=7)
    with torch.no_grad():
        state, masks = model.initial(1), []
        for number, part in enumerate(x.split(3, 1)):
            slots, state = model.find_slots(part, state, first=number == 0)
            masks.append(model.masks(slots[0]))
        whole = model.masks(model.find_slots(x, model.initial(1)).slots[0])
    torch.testing.assert_close(torch.cat(masks), whole)  # products of other sizes round differently


def test_a_long_video_is_segmented_as_one_recurrence(scenes):
    """40 frames are encoded in chunks of 32; the state passes from one to the next."""
    backbone = load_backbone(BackboneConfig())
    context = Context(
        scenes, torch.device("cpu"), "fp32", DataConfig(frame_size=(64, 96)), BackboneConfig(), backbone, scenes
    )
    torch.manual_seed(0)
    model = SlotContrast(dataclasses.replace(CONFIG, input_positions=True), backbone.dim, context.grid)
    segmenter = STAGE.segmenter(PRESETS["demo"], model, context)
    video = Repeated(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 40)
    kept = []
    segmentation = segmenter.segment(segmenter.encode(video, keep=kept.append))
    assert [len(chunk) for chunk in kept] == [32, 8]
    with torch.no_grad():
        slots = model.find_slots(torch.cat(kept)[None], model.initial(1)).slots[0]
        torch.testing.assert_close(segmentation.tensors["slots"], slots)
        torch.testing.assert_close(segmentation.masks(), model.masks(slots), atol=1e-3, rtol=0)
    assert segmentation.tied_over_time


@pytest.mark.parametrize("name", ["movi-c", "movi-e", "ytvis21"])
def test_rate_ends_at_half_its_peak_and_published_presets_differ_in_the_logits_alone(name):
    config = PRESETS[name]
    optim = config.optim
    assert learning_rate(optim.warmup_steps, optim) == optim.peak_lr
    assert learning_rate(0, optim) == 0
    assert learning_rate(optim.steps - 1, optim) == pytest.approx(optim.peak_lr / 2)
    published = PRESETS[f"{name}-published"]
    assert published.model == dataclasses.replace(config.model, logit_scale="published")
    assert dataclasses.replace(published, run=config.run, model=config.model) == config


def test_parts_of_a_batch_are_refused_with_the_option_that_helps(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"--micro-batch: .* use --recompute or a smaller --batch-size"):
        main(["--method", "slot-contrast", "--run", str(tmp_path / "run"), "--micro-batch", "2"])


@pytest.mark.slow
def test_two_processes_contrast_the_slots_of_the_whole_batch(scenes, tmp_path):
    """Every step has the loss and the gradient norm of a single process; without gathering they differ."""
    options = ["--method", "slot-contrast", "--root", str(scenes), "--frame-size", "64", "96", "--num-videos", "3"]
    options += [
        "--batch-size",
        "4",
        "--precision",
        "fp32",
        "--log-every",
        "1",
        "--sample-every",
        "1000",
        "--steps",
        "4",
    ]
    options += ["--warmup-steps", "1", "--cache", str(tmp_path / "cache")]
    runs = {name: tmp_path / name for name in ("alone", "together", "apart")}
    main(["--run", str(runs["alone"]), *options])
    finish(start(["--run", str(runs["together"]), *options], TWO_RANKS))
    finish(start(["--run", str(runs["apart"]), *options, "--no-contrast-across-ranks"], TWO_RANKS))
    curves = {name: curve(run, "model") for name, run in runs.items()}
    for key in ("loss", "contrast", "grad_norm"):
        values = {name: [record[key] for record in records] for name, records in curves.items()}
        assert values["together"] == pytest.approx(values["alone"], rel=1e-4), key
        assert values["apart"] != pytest.approx(values["alone"], rel=1e-2), key
    shutil.rmtree(tmp_path / "cache")
    assert json.loads((runs["together"] / "config.json").read_text())["method"] == "slot-contrast"
