"""Clips of different lengths in one batch: padding changes nothing, and masses weight the inputs of a step."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.train import main

from ..runs import curve

CONFIG = VideoModelConfig(
    num_slots=4, dim=16, encoder_layers=2, decoder_layers=2, heads=2, time_scale=1.0, merge_threshold=0.3
)
LENGTHS, FRAMES, SLOTS, WIDTH = (2, 5, 1, 4), 5, 3, 12
CASES = [("transformer", 2), ("transformer", 0), ("masks", 2), ("masks", 0)]
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # sums of float64 in another order

both_decoders = pytest.mark.parametrize(("decoder", "layers"), CASES, ids=[f"{d}-{n}" for d, n in CASES])


def build(decoder, layers, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, decoder=decoder, encoder_layers=layers, **changes)
    stage = VideoStage(config, WIDTH, FRAMES).double()
    for parameter in stage.parameters():  # the initial layers are so small that all slots would be alike
        parameter.data += 0.2 * torch.randn_like(parameter)
    return stage


def batch(stage):
    """Inputs, initial slots and masses of clips of LENGTHS; the padding has arbitrary values."""
    torch.manual_seed(1)
    inputs = torch.randn(len(LENGTHS), FRAMES, SLOTS, WIDTH, dtype=torch.float64)
    present = torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]
    masses = (0.2 + torch.rand(inputs.shape[:3], dtype=torch.float64)) * present.unsqueeze(2)
    noise = torch.randn(len(LENGTHS), CONFIG.num_slots, CONFIG.dim, dtype=torch.float64)
    return inputs, stage.slot_attention.sample_slots(len(LENGTHS), noise=noise).detach(), masses


def differentiated(stage, inputs, slots, masses=None):
    """Loss, merged slots and all gradients: of the parameters, the inputs (also as targets) and the initial slots."""
    stage.zero_grad()
    inputs, slots = inputs.clone().requires_grad_(), slots.clone().requires_grad_()
    video = stage.encode(inputs, slots, masses)
    loss = stage.error(video, inputs, masses).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "inputs": inputs.grad, "slots": slots.grad, **gradients}, video


def assert_same(one, other, exact=False):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.isfinite().all(), name
        tolerance = {"rtol": 0, "atol": 0} if exact else EXACT
        torch.testing.assert_close(tensor, other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@both_decoders
def test_padded_batch_equals_each_clip_alone(decoder, layers):
    stage = build(decoder, layers)
    inputs, slots, masses = batch(stage)
    together, video = differentiated(stage, inputs, slots, masses)
    assert 1 < video.valid.sum() < video.valid.numel()  # some slots were merged
    alone = {name: torch.zeros_like(tensor) for name, tensor in together.items()}
    for clip, length in enumerate(LENGTHS):
        rows = slice(clip, clip + 1)
        values, _ = differentiated(stage, inputs[rows, :length], slots[rows], masses[rows, :length])
        for name, tensor in values.items():
            place = {"inputs": (rows, slice(length)), "slots": (rows,)}.get(name, ...)
            alone[name][place] += tensor / len(LENGTHS)
    assert_same(together, alone)


@both_decoders
def test_equal_masses_equal_none(decoder, layers):
    stage = build(decoder, layers, diameter=6.0)  # without it the annealing starts at another scale
    inputs, slots, _ = batch(stage)
    weighted, _ = differentiated(stage, inputs, slots, torch.full(inputs.shape[:3], 0.3, dtype=torch.float64))
    assert_same(weighted, differentiated(stage, inputs, slots)[0])


@both_decoders
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_nothing_depends_on_what_padding_holds(decoder, layers, poison):
    stage = build(decoder, layers)
    inputs, slots, masses = batch(stage)
    masses[1, 2, 1] = 0  # also within a step
    poisoned = inputs.masked_fill((masses == 0).unsqueeze(3), poison)
    clean, _ = differentiated(stage, inputs, slots, masses)
    assert_same(differentiated(stage, poisoned, slots, masses)[0], clean, exact=True)
    assert clean["inputs"][masses == 0].abs().max() == 0
    assert stage(poisoned, slots, masses)[0] == clean["loss"]


@pytest.mark.parametrize("layers", [2, 0])
def test_an_input_without_mass_could_as_well_be_missing(layers):
    stage = build("masks", layers)  # the other decoder has one query per input, so one more here
    inputs, slots, masses = batch(stage)
    masses[:, :, 2] = 0
    whole, _ = differentiated(stage, inputs, slots, masses)
    less, _ = differentiated(stage, inputs[:, :, :2], slots, masses[:, :, :2])
    whole["inputs"] = whole["inputs"][:, :, :2]
    assert_same(whole, less)


@both_decoders
def test_only_ratios_of_masses_within_a_step_count(decoder, layers):
    stage = build(decoder, layers)
    inputs, slots, masses = batch(stage)
    units = torch.logspace(-3, 3, FRAMES, dtype=torch.float64)[:, None]
    value, _ = differentiated(stage, inputs, slots, masses)
    assert_same(differentiated(stage, inputs, slots, masses * units)[0], value)
    heavier = masses.clone()
    heavier[1, 2, 1] *= 3
    assert (differentiated(stage, inputs, slots, heavier)[0]["loss"] - value["loss"]).abs() > 1e-6


@both_decoders
def test_more_padding_changes_nothing(decoder, layers):
    stage = build(decoder, layers)
    short, slots, masses = (tensor[::2] for tensor in batch(stage))  # 2 frames and 1, padded to 5
    cut, _ = differentiated(stage, short[:, :2], slots, masses[:, :2])
    padded, _ = differentiated(stage, short, slots, masses)
    padded["inputs"] = padded["inputs"][:, :2]
    assert_same(padded, cut)


def test_masked_step_is_one_compiled_graph():
    stage = build("transformer", 1, decoder_layers=1).float()
    inputs, slots, masses = (tensor.float() for tensor in batch(stage))
    inputs[masses == 0] = torch.nan
    losses, gradients = [], []
    for step in (stage, torch.compile(stage, fullgraph=True)):
        stage.zero_grad()
        loss, _ = step(inputs, slots, masses)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[0].items():  # float32: products are summed in another order
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, scenes):
    """A folder of videos of 3, 7 and 24 frames."""
    root = tmp_path_factory.mktemp("uneven")
    videos = sorted(path.parent for path in scenes.glob("JPEGImages/*/train-*/00000.jpg"))
    for video, length in zip(videos, (3, 7, 24), strict=True):
        (root / video.name).mkdir()
        for frame in sorted(video.glob("*.jpg"))[:length]:
            shutil.copy(frame, root / video.name)
    return root


def test_training_on_uneven_videos_resumes_bit_for_bit(uneven, tmp_path, image_options, video_options):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    main(["--run", str(run), *image_options, "--data", "folder", "--root", str(uneven), "--num-videos", "3"])
    options = [*video_options, "--steps", "6", "--checkpoint-every", "3", "--time-scale", "1", "--batch-size", "3"]
    main(["--run", str(run), *options, "--short", "mask"])
    shutil.copytree(run, resumed)
    last = "video/checkpoint-00000006.safetensors"
    (resumed / last).unlink()
    main(["--run", str(resumed), *options, "--short", "mask"])
    one, other = load_file(run / last), load_file(resumed / last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert curve(run, "video") == curve(resumed, "video")

    shutil.rmtree(resumed / "video")
    main(["--run", str(resumed), *options, "--short", "repeat"])
    assert curve(run, "video")[0]["loss"] != curve(resumed, "video")[0]["loss"]
