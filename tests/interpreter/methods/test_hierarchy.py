"""Levels of slots: windows, propagation through all levels, and which segment is part of which."""

import dataclasses

import pytest
import torch

from interpreter.engine.randomness import torch_generator
from interpreter.methods.interpreter.config import VideoModelConfig, VideoTraining
from interpreter.methods.interpreter.hierarchy import (
    Level,
    Slots,
    Windows,
    apply_level,
    describe,
    group_windows,
    propagate,
)
from interpreter.methods.interpreter.settings import Settings, segmenting_stage
from interpreter.methods.interpreter.video_stage import VideoStage

CONFIG = VideoModelConfig(num_slots=4, dim=16, encoder_layers=1, decoder_layers=1, heads=2, restarts=3)


def build(width, frames=6, seed=0, **changes):
    torch.manual_seed(seed)
    return VideoStage(dataclasses.replace(CONFIG, **changes), width, frames).eval().requires_grad_(False)


def image_slots(frames, count=3, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masses = torch.rand(1, frames, count, generator=generator) + 0.1
    return Slots(
        torch.randn(1, frames, count, width, generator=generator),
        masses / masses.sum(2, keepdim=True),
        torch.randn(1, frames, count, 7, generator=generator),
    )


def random_level(steps, below, slots, windows, generator):
    """A level of random slots over ``steps`` steps of ``below`` slots each."""
    starts = windows.starts(steps)
    length = min(windows.length, steps)
    attention = torch.rand(len(starts), length, below, slots, generator=generator) ** 3 + 1e-3
    masses = torch.rand(1, len(starts), slots, generator=generator) + 0.1
    found = Slots(torch.zeros(1, len(starts), slots, 2), masses / masses.sum(2, keepdim=True))
    return Level(found, attention / attention.sum(3, keepdim=True), starts)


@pytest.mark.parametrize(
    ("windows", "steps", "expected"),
    [
        (Windows(4), 8, [0, 4]),
        (Windows(4), 9, [0, 4, 5]),  # the last window ends with the video
        (Windows(4, 3), 6, [0, 1, 2]),
        (Windows(4, 1), 3, [0]),
        (Windows(1), 3, [0, 1, 2]),
    ],
)
def test_windows_cover_every_step(windows, steps, expected):
    assert windows.starts(steps) == expected
    covered = {t for start in expected for t in range(start, min(start + windows.length, steps))}
    assert covered == set(range(steps))


@pytest.mark.parametrize("piece", [1, 2, 5, 11])
@pytest.mark.parametrize("windows", [Windows(4, 1), Windows(3), Windows(20)])
def test_windows_are_cut_from_pieces_of_any_length(windows, piece):
    whole = image_slots(11)
    pieces = (whole.steps(slice(t, t + piece)) for t in range(0, 11, piece))
    cut = list(windows.cut(pieces, 11))
    assert len(cut) == len(windows.starts(11))
    for window, start in zip(cut, windows.starts(11), strict=True):
        expected = whole.steps(slice(start, min(start + windows.length, 11)))
        assert all(torch.equal(a, b) for a, b in zip(window, expected, strict=True))


def test_propagation_is_the_product_of_all_levels_averaged_over_windows():
    """Ahat[t] = mean over the windows w of frame t, and the windows v of w, of A2[w, t] A3[v, w] A4[v]."""
    frames, generator = 13, torch.Generator().manual_seed(0)
    second = random_level(frames, 5, 4, Windows(4, 2), generator)
    third = random_level(len(second.starts), 4, 3, Windows(3, 1), generator)
    top = random_level(len(third.starts), 3, 2, Windows(len(third.starts)), generator)

    def windows_of(level, step):
        length = level.attention.shape[1]
        return [w for w, start in enumerate(level.starts) if start <= step < start + length]

    for levels in ([second, top], [second, third, top]):
        if len(levels) == 2:
            levels = [second, random_level(len(second.starts), 4, 2, Windows(99), generator)]
        across = propagate(levels, frames)
        for t in range(frames):
            expected = torch.zeros(5, 2)
            for w in windows_of(second, t):
                share = 1 / len(windows_of(second, t))
                lowest = second.attention[w, t - second.starts[w]]
                if len(levels) == 2:
                    expected += share * lowest @ levels[1].attention[0, w]
                    continue
                for v in windows_of(third, w):
                    product = lowest @ third.attention[v, w - third.starts[v]] @ top.attention[0, v]
                    expected += share / len(windows_of(third, w)) * product
            torch.testing.assert_close(across[t], expected)
        torch.testing.assert_close(across.sum(2), torch.ones(frames, 5))


def test_a_lower_level_numbers_its_segments_within_the_window_that_owns_a_frame():
    generator = torch.Generator().manual_seed(0)
    level = random_level(10, 3, 4, Windows(4, 1), generator)  # windows begin at 0, 3 and 6
    owners = level.owners(10).tolist()
    assert owners == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]  # by the centres 1.5, 4.5 and 7.5; at equal distance, the first
    across = propagate([level], 10)
    for t, w in enumerate(owners):
        torch.testing.assert_close(across[t], level.attention[w, t - level.starts[w]])


def test_windows_of_another_owner_do_not_mix_their_numbers():
    """Below a level with several windows, a frame is the mean over the windows of its owner only."""
    generator = torch.Generator().manual_seed(0)
    second = random_level(9, 3, 2, Windows(3, 1), generator)  # windows begin at 0, 2, 4, 6
    third = random_level(4, 2, 2, Windows(2), generator)  # windows 0 and 1, then 2 and 3
    across = propagate([second, third], 9)
    # Frame 4 lies in windows 1 (the end) and 2 (the start) of level 2, whose owners are different windows of level 3.
    owner = int(second.owners(9)[4])
    expected = second.attention[owner, 4 - second.starts[owner]] @ third.attention[owner // 2, owner % 2]
    torch.testing.assert_close(across[4], expected)


def test_hierarchy_names_the_parent_of_each_segment():
    generator = torch.Generator().manual_seed(0)
    second = random_level(7, 3, 3, Windows(3), generator)  # windows begin at 0, 3 and 4
    second.slots.masses[0, 1, 2] = 0.0  # merged away
    top = random_level(3, 3, 2, Windows(3), generator)
    described = describe([second, top], 7)
    assert [level["level"] for level in described] == [2, 3]
    assert [window["frames"] for window in described[0]["windows"]] == [[0, 2], [3, 5], [4, 6]]
    assert [window["frames"] for window in described[1]["windows"]] == [[0, 6]]
    assert [s["segment"] for s in described[0]["windows"][1]["segments"]] == [1, 2]
    for w, window in enumerate(described[0]["windows"]):
        for segment in window["segments"]:
            shares = top.attention[0, w, segment["segment"] - 1]
            parent = {
                "window": 0,
                "segment": int(shares.argmax()) + 1,
                "share": pytest.approx(float(shares.max()), abs=1e-6),
            }
            assert segment["part_of"] == parent
    assert "part_of" not in described[1]["windows"][0]["segments"][0]


@torch.no_grad()
def test_one_window_over_the_whole_video_is_the_video_stage():
    """A single window of level 2 equals the result of the method with two levels, bit for bit."""
    stage, below, frames = build(12), image_slots(6), 6
    noise = torch.randn(1, 1, 4, 16, generator=torch_generator(torch.device("cpu"), 0, 1))
    level = apply_level(stage, below, Windows(frames), lambda window: noise[:, 0], False, "fp32")
    initial = stage.slot_attention.sample_slots(1, noise=noise[0])
    best = stage.group(stage.encode_slots(below.slots), initial, None, 6, 1.0)
    assert torch.equal(level.slots.slots[0], best.slots)
    assert torch.equal(level.attention, best.attention)
    assert torch.equal(level.valid, best.valid)


@torch.no_grad()
def test_masses_and_means_are_those_of_the_patches_that_a_slot_stands_for():
    stage, below = build(12, merge_threshold=0.0), image_slots(6)
    slots, attention = group_windows(stage, below, torch.randn(1, 1, 4, 16), False, "fp32")
    held = attention[0] * below.masses[0][..., None]  # [L, N, K]
    torch.testing.assert_close(slots.masses[0, 0], held.sum((0, 1)) / 6)
    torch.testing.assert_close(slots.masses.sum(), torch.ones(()))
    for k in range(4):
        weights = held[..., k] / held[..., k].sum()
        torch.testing.assert_close(slots.means[0, 0, k], (weights[..., None] * below.means[0]).sum((0, 1)))


@torch.no_grad()
def test_the_kept_draw_is_the_one_of_least_loss():
    stage, below = build(12), image_slots(6)
    noise = torch.randn(5, 1, 4, 16, generator=torch_generator(torch.device("cpu"), 3))
    losses = []
    for draw in noise:
        found = stage.encode(below.slots, stage.slot_attention.sample_slots(1, noise=draw))
        losses.append(stage.error(found, below.slots, torch.ones_like(below.masses)).item())
    stage.config = dataclasses.replace(stage.config, inference_iterations=stage.config.iterations)
    best, _ = group_windows(stage, below, noise, False, "fp32")
    first, _ = group_windows(stage, below, noise[[losses.index(min(losses))]], False, "fp32")
    assert torch.equal(best.slots, first.slots)
    assert len(set(losses)) == 5


def test_slots_that_a_gate_dropped_come_last():
    stage = build(12, gate=0.1, merge_threshold=0.0)
    stage.config = dataclasses.replace(stage.config, inference_iterations=stage.config.iterations)
    below, noise = image_slots(6), torch.randn(1, 1, 4, 16, generator=torch_generator(torch.device("cpu"), 5))
    found = stage.encode(below.slots, stage.slot_attention.sample_slots(1, noise=noise[0]))
    stage.gate.logit.bias -= stage.gate(found.unmerged).probability.logit().median()  # drops about half
    slots, attention = group_windows(stage, below, noise, False, "fp32")
    kept = slots.masses[0, 0] > 0
    assert 0 < int(kept.sum()) < 4
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    assert not attention[..., ~kept].any()


@torch.no_grad()
def test_windows_do_not_depend_on_how_many_are_grouped_at_once(monkeypatch):
    stage, below = build(12, encoder_layers=0), image_slots(23)

    def noise(window):
        return torch.randn(3, 4, 16, generator=torch_generator(torch.device("cpu"), window))

    several = apply_level(stage, below, Windows(4, 1), noise, False, "fp32")
    monkeypatch.setattr("interpreter.methods.interpreter.hierarchy.WINDOWS_AT_ONCE", 1)
    single = apply_level(stage, below, Windows(4, 1), noise, False, "fp32")
    torch.testing.assert_close(several.attention, single.attention)
    torch.testing.assert_close(several.slots.slots, single.slots.slots)


def test_settings_of_levels():
    assert (Settings().top, Settings().written) == (2, 2)
    assert (Settings(level=3).top, Settings(level=2, levels=4).written) == (3, 2)
    assert segmenting_stage(Settings(level=3)) == "video-3"
    assert segmenting_stage(Settings(level=2, levels=3)) == "video-3"
    assert segmenting_stage(Settings(level=2, association="learned")) == "video"
    assert segmenting_stage(Settings(level=1)) == "image"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"level": 4, "levels": 3}, "level 4 is above the highest of the 3 levels"),
        ({"level": 3, "outlines": 3}, "outlines 3 must be a level below the one that is written, 3"),
        ({"stage": "image", "levels": 3}, "no meaning with --stage image"),
        ({"levels": 3, "repeat_to": 9}, "repeat_to is a setting of two levels"),
    ],
)
def test_levels_that_contradict_each_other_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Settings(**settings)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 4}, "--window and --overlap need --level 3 or more"),
        ({"level": 3, "window": 4, "overlap": 4}, "--overlap 4 must be less than --window 4"),
    ],
)
def test_windows_that_make_no_sense_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        VideoTraining(run=tmp_path, **options)
