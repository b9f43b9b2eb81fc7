"""The video stage: grouping over time, merging, and a loss that compares unordered sets."""

import dataclasses

import pytest
import torch

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage

CONFIG = VideoModelConfig(num_slots=4, dim=16, encoder_layers=1, decoder_layers=1, heads=2)
FRAMES, SLOTS, WIDTH = 5, 3, 12


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoStage(dataclasses.replace(CONFIG, **changes), WIDTH, FRAMES)


def inputs(stage, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    image_slots = torch.randn(batch, FRAMES, SLOTS, WIDTH, generator=generator)
    return image_slots, stage.slot_attention.sample_slots(batch, generator)


def test_loss_is_the_mean_sinkhorn_divergence_of_geomloss():
    geomloss = pytest.importorskip("geomloss", reason="geomloss, the oracle, is not installed")
    stage = build()
    image_slots, slots = inputs(stage)
    with torch.no_grad():
        loss, video = stage(image_slots, slots)
        reconstructed = stage.decode(video, FRAMES, SLOTS)
        oracle = geomloss.SamplesLoss("sinkhorn", p=2, blur=CONFIG.blur, scaling=CONFIG.scaling, backend="tensorized")
        divergences = oracle(reconstructed.flatten(0, 1).double(), image_slots.flatten(0, 1).double())
    assert reconstructed.shape == image_slots.shape
    assert divergences.shape == (2 * FRAMES,)
    torch.testing.assert_close(loss.double(), divergences.mean(), atol=1e-4, rtol=1e-4)


def test_blur_scaling_and_diameter_reach_the_loss():
    losses = []
    for changes in ({}, {"blur": 2.0}, {"scaling": 0.9, "blur": 0.5}, {"scaling": 0.2, "blur": 0.5}, {"diameter": 0.1}):
        stage = build(**changes)
        losses.append(stage(*inputs(stage))[0].item())
    assert len(set(losses)) == len(losses)


def test_loss_does_not_depend_on_the_order_of_a_frames_slots():
    stage = build()
    image_slots, slots = inputs(stage)
    permuted = image_slots.clone()
    permuted[0, 2], permuted[1, 4] = image_slots[0, 2, [2, 0, 1]], image_slots[1, 4, [1, 0, 2]]
    torch.testing.assert_close(stage(permuted, slots)[0], stage(image_slots, slots)[0], atol=1e-5, rtol=1e-5)


def test_loss_depends_on_which_frame_a_slot_belongs_to():
    stage = build()
    image_slots, slots = inputs(stage)
    swapped = image_slots.clone()
    swapped[0, 0, 0], swapped[0, 1, 0] = image_slots[0, 1, 0], image_slots[0, 0, 0]
    assert (stage(swapped, slots)[0] - stage(image_slots, slots)[0]).abs() > 1e-4


def test_targets_are_detached():
    stage = build()
    image_slots, slots = inputs(stage)
    image_slots.requires_grad_()
    stage(image_slots, slots)[0].backward()
    assert image_slots.grad is None


@pytest.mark.parametrize(("implicit", "learns"), [("bilevel", True), ("none", True), ("detach", False)])
def test_gradient_reaches_the_prior(implicit, learns):
    stage = build(implicit=implicit)
    stage(*inputs(stage))[0].backward()
    for parameter in (stage.slot_attention.mu, stage.slot_attention.log_sigma):
        assert (parameter.grad is not None and parameter.grad.abs().max().item() > 0) == learns


def test_every_parameter_learns():
    stage = build()
    stage(*inputs(stage))[0].backward()
    assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_merged_slots_are_hidden_from_the_decoder():
    stage = build()
    slots = torch.randn(1, 4, 16)
    valid = torch.tensor([[True, True, False, False]])

    def decode(slots):
        return stage.decode(VideoSlots(slots, torch.empty(0), valid, slots), FRAMES, SLOTS)

    base = decode(slots)
    hidden, shown = slots.clone(), slots.clone()
    hidden[:, 2:] = 100 * torch.randn(1, 2, 16)
    shown[:, 1] += torch.randn(16)
    assert torch.equal(decode(hidden), base)
    assert (decode(shown) - base).abs().max() > 1e-4
    alone = stage.decode(VideoSlots(slots[:, :2], torch.empty(0), valid[:, :2], slots), FRAMES, SLOTS)
    torch.testing.assert_close(alone, base)


def test_equal_slots_merge_and_their_attention_adds_up():
    stage = build(num_slots=4, merge_threshold=0.15)
    image_slots, slots = inputs(stage, batch=1)
    slots = slots[:, [0, 1, 0, 0]]  # equal at the start: equal at the end
    video = stage.encode(image_slots, slots)
    assert video.valid.tolist() in ([[True, True, False, False]], [[True, False, False, False]])
    count = int(video.valid.sum())
    assert video.slots[0, count:].abs().max() == 0
    assert video.attention[..., count:].abs().max() == 0
    apart = build(num_slots=4, merge_threshold=1e-9).encode(image_slots, slots)
    members = apart.unmerged[0]
    torch.testing.assert_close(members[0], members[2])
    if count == 2:
        torch.testing.assert_close(video.slots[0, 0], members[[0, 2, 3]].mean(0))


@pytest.mark.parametrize("threshold", [1e-6, 0.15, 1.9])
def test_attention_rows_sum_to_one_after_merging(threshold):
    stage = build(merge_threshold=threshold)
    video = stage.encode(*inputs(stage))
    assert video.attention.shape == (2, FRAMES, SLOTS, 4)
    torch.testing.assert_close(video.attention.sum(-1), torch.ones(2, FRAMES, SLOTS))
    assert video.valid.any(1).all()
    assert video.unmerged.shape == (2, 4, 16)


def test_longer_videos_stay_in_the_trained_range_of_time():
    stage, device = build(), torch.device("cpu")
    assert stage.times(FRAMES, device).tolist() == [0, 1, 2, 3, 4]
    assert stage.times(3, device).tolist() == [0, 1, 2]
    torch.testing.assert_close(stage.times(9, device), torch.linspace(0, 4, 9))
    assert stage.times(1, device).tolist() == [0]
    torch.testing.assert_close(VideoStage(CONFIG, WIDTH, 1).times(4, device), torch.zeros(4))
    video = stage.encode(torch.randn(1, 9, SLOTS, WIDTH), inputs(stage)[1][:1])
    assert video.attention.shape == (1, 9, SLOTS, 4)
    assert stage.decode(video, 9, SLOTS).shape == (1, 9, SLOTS, WIDTH)


def test_an_exported_program_has_the_same_times_for_any_number_of_frames():
    class Times(torch.nn.Module):
        def forward(self, frames):
            return stage.times(frames.shape[0], frames.device)

    stage = build()
    frames = {0: torch.export.Dim("frames", min=1)}
    program = torch.export.export(Times(), (torch.zeros(3),), dynamic_shapes=(frames,)).module()
    for count in (1, 2, FRAMES, 9, 1000):
        assert torch.equal(program(torch.zeros(count)), stage.times(count, torch.device("cpu")).float())


@pytest.mark.parametrize("time_scale", [0.0, 1.0])
def test_time_tells_equal_frames_apart_where_it_is_added(time_scale):
    stage = build(time_scale=time_scale)
    _, slots = inputs(stage, batch=1)
    attention = stage.encode(torch.randn(1, 1, SLOTS, WIDTH).expand(-1, FRAMES, -1, -1), slots).attention
    assert (attention.std(1).max() > 1e-4) == (time_scale > 0)


def test_half_precision_keeps_loss_and_normalisers_in_fp32():
    stage = build()
    image_slots, slots = inputs(stage)
    full, _ = stage(image_slots, slots)
    with torch.autocast("cpu", torch.bfloat16):
        loss, video = stage(image_slots, slots)
    assert loss.dtype == torch.float32
    assert video.attention.dtype == torch.float32
    torch.testing.assert_close(video.attention.sum(-1), torch.ones(2, FRAMES, SLOTS))
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0)  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    ("changes", "message"), [({"dim": 18}, "--dim must be a multiple of 4"), ({"heads": 3}, "heads 3")]
)
def test_sizes_that_do_not_fit_are_refused_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_overfits_a_small_batch():
    stage = build(dim=32)
    image_slots, slots = inputs(stage)
    slots = slots.detach()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        loss, _ = stage(image_slots, slots)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
