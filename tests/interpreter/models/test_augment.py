"""Colours and blur of clips, compared with Pillow, colorsys and a plain convolution."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from interpreter.models.augment import NUMBERS, Photometry, adjust, photometry

COUNT = 3
NEUTRAL = {"gray": False, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 0.0}


@pytest.fixture
def clips():
    """Smooth pictures, uint8 [3, 2, 40, 56, 3]."""
    small = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 255
    large = torch.nn.functional.interpolate(small, size=(40, 56), mode="bilinear")
    return large.byte().permute(0, 2, 3, 1).unflatten(0, (COUNT, 2)).contiguous()


def parameters(**values):
    """The same for all clips, or a list with one for each."""
    full = {**NEUTRAL, **values}
    return Photometry(*(torch.tensor(v if isinstance(v, list) else [v] * COUNT) for v in full.values()))


def by_pillow(clip, enhance, factor):
    frames = [np.asarray(enhance(Image.fromarray(frame)).enhance(factor)) for frame in clip.numpy()]
    return torch.from_numpy(np.stack(frames))


def close(found, expected, levels=1):
    """Pillow rounds the gray value, and the mean of the frame, to whole levels."""
    assert (found.int() - expected.int()).abs().max() <= levels


@pytest.mark.parametrize(
    ("name", "enhance", "levels"),
    [
        ("brightness", ImageEnhance.Brightness, 1),
        ("contrast", ImageEnhance.Contrast, 2),
        ("saturation", ImageEnhance.Color, 2),
    ],
)
def test_factors_are_those_of_pillow(name, enhance, levels, clips):
    factors = [0.6, 1.0, 1.4]
    found = adjust(clips, parameters(**{name: factors}))
    for clip, changed, factor in zip(clips, found, factors, strict=True):
        close(changed, by_pillow(clip, enhance, factor), levels)
    assert torch.equal(found[1], clips[1])
    assert (found[0].int() - clips[0].int()).abs().max() > 20


def test_gray_is_that_of_pillow(clips):
    found = adjust(clips, parameters(gray=[True, False, False]))
    grays = [np.asarray(Image.fromarray(frame).convert("L")) for frame in clips[0].numpy()]
    close(found[0], torch.from_numpy(np.stack(grays))[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(found[1:], clips[1:])


def test_hue_turns_the_colours_of_colorsys(clips):
    turns = [-0.1, 0.0, 0.1]
    found = adjust(clips, parameters(hue=[2 * math.pi * turn for turn in turns]))
    for clip, changed, turn in zip(clips, found, turns, strict=True):
        for row in range(0, 40, 7):
            for column in range(0, 56, 9):
                hue, saturation, value = colorsys.rgb_to_hsv(*(clip[0, row, column] / 255).tolist())
                expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
                close(changed[0, row, column], (255 * torch.tensor(expected)).round())


def test_blur_is_a_gaussian(clips):
    found = adjust(clips, parameters(sigma=[0.5, 2.0, 0.0]))
    places = torch.arange(-12, 13, dtype=torch.float64)
    for clip, changed, sigma in zip(clips[:2], found[:2], (0.5, 2.0), strict=True):
        kernel = torch.exp(-(places**2) / (2 * sigma**2))
        kernel = (kernel[:, None] * kernel).div(kernel.sum() ** 2)[None, None]
        frames = clip.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None]
        padded = torch.nn.functional.pad(frames, (12, 12, 12, 12), mode="reflect")
        expected = torch.nn.functional.conv2d(padded, kernel)[:, 0].unflatten(0, (2, 3)).permute(0, 2, 3, 1)
        close(changed, expected.round())
    assert torch.equal(found[2], clips[2])


def test_operations_follow_their_order(clips):
    values = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.3, "hue": 0.4}
    found = adjust(clips, parameters(**values), (3, 1, 0, 2))
    expected = clips
    for name in ("hue", "contrast", "brightness", "saturation"):
        expected = adjust(expected, parameters(**{name: values[name]}))
    close(found, expected, 4)  # which rounds four times
    assert (found.int() - adjust(clips, parameters(**values)).int()).abs().max() > 8


def test_frames_of_a_clip_are_changed_alike(clips):
    still = clips[:, :1].expand(-1, 70, -1, -1, -1)  # more frames than are computed at once
    changed = adjust(still, photometry(torch.rand(COUNT, NUMBERS, generator=torch.Generator().manual_seed(3))))
    assert changed.dtype == torch.uint8
    assert changed.shape == still.shape
    assert (changed == changed[:, :1]).all()


def test_small_frames_are_blurred_too():
    frames = torch.randint(0, 256, (COUNT, 2, 8, 6, 3)).byte()
    assert adjust(frames, parameters(sigma=2.0)).float().std() < frames.float().std() / 2


@pytest.mark.gpu
def test_a_gpu_changes_colours_alike(clips):
    drawn = photometry(torch.rand(COUNT, NUMBERS, generator=torch.Generator().manual_seed(3)))
    close(adjust(clips.cuda(), drawn).cpu(), adjust(clips, drawn))


def test_parameters_have_the_published_distribution():
    drawn = photometry(torch.rand(50_000, NUMBERS, generator=torch.Generator().manual_seed(0)))
    # 50,000 draws of a probability have a standard deviation of at most 0.0023.
    assert drawn.gray.float().mean().item() == pytest.approx(0.2, abs=0.01)
    jittered = drawn.brightness != 1
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(jittered, drawn.hue != 0)
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert 0.6 <= factor.min() < 0.601
        assert 1.399 < factor.max() <= 1.4
    assert drawn.hue.abs().max().item() == pytest.approx(0.2 * math.pi, rel=1e-3)
    blurred = drawn.sigma > 0
    assert blurred.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0.1 <= drawn.sigma[blurred].min() < 0.101
    assert 1.99 < drawn.sigma.max() <= 2
    assert torch.corrcoef(torch.stack([f.float() for f in drawn[1:4]])).triu(1).abs().max() < 0.05
